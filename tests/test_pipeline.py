"""One compiled program for each shape, noise that belongs to a prompt, and context that stays; then the public API."""

import base64
import dataclasses
import functools
import re

import chex
import jax
import numpy as np
import pytest

import vdm_jax
from tests import tiny
from vdm_jax import pipeline, system, tasks
from vdm_jax.data import media, writing
from vdm_jax.errors import UserError
from vdm_jax.system import sampling


@pytest.fixture(scope="module")
def pipe(tiny_run):
    """A Pipeline; `pipe.traces()` tells how often its sampler was traced, that is, compiled."""
    made = vdm_jax.load(tiny_run)
    count = []

    def counted(*arguments, **options):
        count.append(1)
        return sampling.sample(made.system, *arguments, **options)

    made.sampler.program = jax.jit(counted, static_argnames=("method", "interval", "guides", "history_noise"))
    made.traces = lambda: len(count)
    return made


@pytest.fixture(scope="module")
def clip(pipe):
    """A clip as long as those of training: moving bars and a chirp."""
    layout, size = pipe.system.layout, pipe.config.data.size
    ramp = np.arange(layout.frames)[:, None, None, None] * 9 + np.arange(size[1])[:, None] * np.array([5, 11, 17])
    video = np.broadcast_to(ramp, (layout.frames, *size, 3)).astype(np.uint8)
    time = np.arange(layout.samples) / pipe.config.data.sample_rate
    return {"video": video, "audio": np.sin(300 * time * (1 + time)).astype(np.float32)}


def remade(pipe, part, x):
    """A single clip through its autoencoder and back."""
    name = f"{part}_autoencoder"
    reconstruct = jax.jit(lambda params, x: pipe.system.reconstruct(name, params, x))
    return np.asarray(reconstruct(pipe.params, x[None])[0])


def assert_same(part, a, b):
    """Equal but for rounding, which differs between programs for one clip and for several."""
    np.testing.assert_allclose(a.astype(float), b.astype(float), atol=2 if part == "video" else 5e-3)


def differ(a, b):
    return np.mean(np.abs(a.astype(float) - b.astype(float))) > (5 if a.dtype == np.uint8 else 0.02)


# -------------------------------------------------------------------------------------------------------- sampling


def test_a_second_prompt_of_the_same_shape_does_not_recompile(pipe):
    first = pipe.sample(["a red circle moving right"])
    traces = pipe.traces()
    second = pipe.sample(["two shapes: a blue square going up and a green triangle heading left"], seed=3, guidance=2)
    context = tasks.image(first[0][0, 0], pipe.system.layout)
    third = pipe.sample(["a red circle moving right"], context=context)
    assert pipe.traces() == traces
    data = pipe.config.data
    for video, audio in (first, second, third):
        assert video.shape == (1, data.frames, *data.size, 3) and video.dtype == np.uint8
        assert audio.shape == (1, data.frames * data.sample_rate // data.fps) and audio.dtype == np.float32
        assert np.abs(audio).max() <= 1
    assert differ(first[0], second[0]) and differ(first[1], second[1])


def test_a_compilation_is_announced_once_with_earlier_seconds(pipe, tiny_run, caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where the seconds are kept
    caplog.set_level("INFO", "vdm_jax")

    def said(pipe, **options):
        caplog.clear()
        pipe("a red circle", steps=3, **options)
        return [re.sub(r"\d+ s\b", "N s", message) for message in caplog.messages]

    what = "compiling the sampler, 1 clip(s) of 5 frames in 3 steps"
    assert said(pipe) == [f"{what} (first time here)", "compiled in N s"]
    assert said(pipe, seed=1) == []
    assert said(vdm_jax.load(tiny_run)) == [f"{what} (took N s last time)", "compiled in N s"]


def test_batches_and_windows_are_counted(pipe, caplog):
    pipe.sample(["a red circle"] * 10, steps=2, method="ddpm")  # compiles
    caplog.set_level("INFO", "vdm_jax")
    caplog.clear()
    pipe.sample(["a red circle"] * 10, steps=2, method="ddpm")
    assert caplog.messages == ["sampling: 8 of 10 clips", "sampling: 10 of 10 clips"]
    pipe.rollout(["a red circle"], 10, steps=2, context_frames=2)  # 5 frames, and a window of 2 after each 3
    caplog.clear()
    pipe.rollout(["a red circle"], 10, steps=2, context_frames=2)
    assert caplog.messages == [f"sampling: {done} of 3 windows" for done in (1, 2, 3)]


def test_noisy_context_and_history_guidance_draw_their_own_noise(pipe, monkeypatch):
    """Guidance adds noise to the context. It would not be independent of noise that the context has already."""
    seen = {}

    def add_noise(x, eps, log_snr):
        seen["context"] = eps["video"]
        return x

    def history_guidance(weight, masks, noise, *rest):
        seen["guidance"] = noise["video"]
        return []

    monkeypatch.setattr(sampling, "add_noise", add_noise)
    monkeypatch.setattr(sampling.samplers, "history_guidance", history_guidance)
    picture = tasks.image(np.zeros((16, 24, 3), np.uint8), pipe.system.layout)
    arrays, static = pipe.sampler.arguments(pipe.params, context=picture, guidance={"history": 2.0}, steps=1)
    more = dict(key=jax.random.key(0), numbers=np.arange(1), tokens=np.zeros((1, 96), np.int32))
    jax.eval_shape(functools.partial(sampling.sample, pipe.system, **static), pipe.params, **more, **arrays)
    assert seen["context"] is not seen["guidance"]


@pytest.mark.parametrize("method", ["dpmpp_2m", "ddpm"])
def test_noise_is_a_matter_of_seed_and_number_alone(pipe, method):
    prompt = "a red circle moving right"
    ten, three = (pipe.sample([prompt] * n, method=method, steps=2) for n in (10, 3))  # ten: eight, then two
    for part, a, b in zip(("video", "audio"), ten, three, strict=True):
        for i in range(3):
            assert_same(part, a[i], b[i])
        assert all(differ(a[i], a[j]) for i in range(10) for j in range(i))
    others = pipe.sample([prompt] + ["a large metal blue square"] * 9, method=method, steps=2)
    assert_same("video", others[0][0], ten[0][0])
    assert np.abs(others[0][1].astype(float) - ten[0][1]).max() > 5  # the text counts, too
    again = pipe.sample([prompt] * 3, method=method, steps=2, seed=1)
    assert differ(again[0][0], three[0][0])


@pytest.mark.parametrize("part", ["video", "audio"])
def test_a_modality_that_is_context_comes_back_and_the_other_is_made(pipe, clip, part):
    task = tasks.foley if part == "video" else tasks.audio
    context = task(clip[part], pipe.system.layout)
    first, second = (pipe.sample(["a red circle"], context=context, seed=seed) for seed in (0, 1))
    i, other = (0, 1) if part == "video" else (1, 0)
    assert_same(part, first[i][0], remade(pipe, part, clip[part]))
    assert_same(part, first[i], second[i])
    assert differ(first[other], second[other])


def test_an_image_is_the_first_frame(pipe, clip):
    context = tasks.image(clip["video"][0], pipe.system.layout)
    first, second = (pipe.sample(["a red circle"], context=context, seed=seed)[0][0] for seed in (0, 1))
    assert_same("video", first[0], remade(pipe, "video", clip["video"])[0])
    assert_same("video", first[0], second[0])
    assert differ(first[1:], second[1:])


def test_other_lengths_than_trained(pipe):
    data, traces = pipe.config.data, pipe.traces()
    for count, frames in enumerate((13, 3, 1), 1):
        video, audio = pipe.sample(["a red circle"], frames=frames)
        assert pipe.traces() == traces + count  # a new shape, a new program
        assert video.shape[1] == frames and audio.shape[1] == frames * data.sample_rate // data.fps
    with pytest.raises(UserError, match="6 frames do not fill latent frames of 2: use 5 or 7"):
        pipe.sample(["a red circle"], frames=6)


def test_each_clip_has_its_own_context(pipe, clip):
    layout = pipe.system.layout
    frames = np.stack([x[:3] for x in (clip["video"], clip["video"][::-1])])
    samples = np.stack([x[: 3 * layout.samples_per_frame] for x in (clip["audio"], clip["audio"][::-1])])
    both = pipe.sample(["a red circle"] * 2, context=tasks.continue_(frames, samples, layout))
    for i in range(2):
        context = tasks.continue_(frames[i : i + 1], samples[i : i + 1], layout)
        alone = pipe.sample(["a red circle"], context=context)
        assert_same("video", both[0][i, :3], alone[0][0, :3])
        held = np.concatenate([frames[i], np.repeat(frames[i, -1:], layout.frames - 3, 0)])
        assert_same("video", both[0][i, :3], remade(pipe, "video", held)[:3])
        assert differ(both[0][i, 3:], held[3:])


@pytest.mark.parametrize("options", [
    dict(guidance=dict(history=3.0)),
    dict(guidance=dict(history=3.0), history_noise=0.5),
    dict(guidance=dict(modality=3.0)),
    dict(context_noise=0.2),
    dict(lag=1),
])  # fmt: skip
def test_options_change_what_is_made_and_keep_the_context(pipe, clip, options):
    layout = pipe.system.layout
    context = tasks.continue_(clip["video"][None, :1], clip["audio"][None, : layout.samples_per_frame], layout)
    plain, other = (pipe.sample(["a red circle"], context=context, steps=2, **o) for o in ({}, options))
    assert_same("video", plain[0][:, :1], other[0][:, :1])
    assert np.abs(plain[0][:, 1:].astype(float) - other[0][:, 1:]).max() > 2


def test_a_continued_clip_is_sampled_otherwise(pipe, clip):
    layout = pipe.system.layout

    def made(latents, **options):
        frames = 1 + layout.f_t * (latents - 1)
        sound = clip["audio"][None, : frames * layout.samples_per_frame]
        context = tasks.continue_(clip["video"][None, :frames], sound, layout)
        return pipe.sample(["a red circle"], context=context, steps=2, **options)[0]

    plain = made(2)
    np.testing.assert_array_equal(plain, made(2, guidance=9.0))
    assert np.abs(plain.astype(float) - made(2, guidance=dict(text_continue=9.0))).max() > 2
    assert np.abs(plain.astype(float) - made(2, first_step_times=(0.2, 0.3))).max() > 2
    first = made(1)  # one frame does not show what moves
    np.testing.assert_array_equal(first, made(1, guidance=dict(text_continue=9.0)))
    np.testing.assert_array_equal(first, made(1, first_step_times=(0.2, 0.3)))
    assert np.abs(first.astype(float) - made(1, guidance=9.0)).max() > 2


def test_the_weight_of_the_text_follows_from_the_task(pipe, clip):
    layout = pipe.system.layout
    weights = {"text": 5.0, "text_continue": 1.0, "text_cross_modal": 2.5}
    sound = clip["audio"][None, : 3 * layout.samples_per_frame]
    for context, weight in (
        (tasks.text(layout), 5.0),
        (tasks.image(clip["video"][0], layout), 5.0),
        (tasks.continue_(clip["video"][None, :3], sound, layout), 1.0),
        (tasks.audio(clip["audio"], layout), 2.5),
        (tasks.foley(clip["video"], layout), 2.5),
    ):
        arrays, _ = pipe.sampler.arguments(pipe.params, context=context, guidance=weights)
        assert arrays["weights"]["text"] == weight


def test_a_rollout_continues_from_its_own_end(pipe, clip):
    data, layout = pipe.config.data, pipe.system.layout
    frames, prompts = 3 * layout.frames, ["a red circle", "a blue square"]
    video, audio, _ = pipe.rollout(prompts, frames, context_frames=2, steps=2)
    assert video.shape[:2] == (2, frames) and audio.shape == (2, frames * layout.samples_per_frame)
    first = pipe.sample(prompts, steps=2)
    np.testing.assert_array_equal(video[:, : layout.frames], first[0])
    fade = round(pipeline.FADE * data.sample_rate)
    np.testing.assert_array_equal(audio[:, : layout.samples - fade], first[1][:, :-fade])
    past = 1 + layout.f_t  # two latent frames
    context = tasks.continue_(first[0][:, -past:], first[1][:, -past * layout.samples_per_frame :], layout)
    second = pipe.sample(prompts, window=1, context=context, steps=2)
    new = layout.frames - past
    np.testing.assert_array_equal(video[:, layout.frames : layout.frames + new], second[0][:, past:])
    assert differ(video[:, :new], video[:, layout.frames : layout.frames + new])

    start = clip["video"][None, :4], clip["audio"][None, : 4 * layout.samples_per_frame]  # 3 of 4 fill latent frames
    video, audio, _ = pipe.rollout(["a red circle"], 7, start=start, steps=2)
    np.testing.assert_array_equal(video[:, :4], start[0])
    assert video.shape[1] == 7 and audio.shape == (1, 7 * layout.samples_per_frame)
    with pytest.raises(UserError, match="sample.context_frames=9 must be from 1 to"):
        pipe.rollout(["a red circle"], 99, context_frames=9)


def test_one_sound_gives_way_to_the_next():
    old, new = np.zeros((2, 20), np.float32), np.ones((2, 30), np.float32)
    out = pipeline.crossfade(old, new, overlap=12, fade=4)
    assert out.shape == (2, 20 + 30 - 12)
    np.testing.assert_allclose(out[0], [0] * 16 + [0.2, 0.4, 0.6, 0.8] + [1] * 18, rtol=1e-6)


@pytest.mark.parametrize("options, words", [
    (dict(guidance=float("nan")), "sample.guidance.text=nan must be a finite number"),
    (dict(guidance=dict(txt=1.0)), "did you mean 'text'"),
    (dict(context_noise=2.0), "sample.context_noise=2.0 must be a finite number from 0 to 1"),
    (dict(first_step_times=(0.1, -1.0)), "first_step_times=.* must be 0 or more values, each .* from 0 to 1"),
    (dict(step=3), "did you mean 'steps'"),
])  # fmt: skip
def test_wrong_options_are_named(pipe, options, words):
    with pytest.raises(UserError, match=words):
        pipe.sample(["a red circle"], **options)


# ------------------------------------------------------------------------------------------------------ public API


def test_a_prompt_gives_a_clip_and_a_list_gives_a_list(pipe, tmp_path):
    made = pipe("a red circle", steps=2)
    assert isinstance(made, vdm_jax.Clip) and made.prompt == "a red circle"
    assert made.video.shape == (5, 16, 24, 3) and made.audio.shape == (1250,)
    assert (made.fps, made.sample_rate, made.seconds) == (8, 2000, 0.625)
    several = pipe(["a red circle", "a blue square"], steps=2)
    assert [clip.prompt for clip in several] == ["a red circle", "a blue square"]
    assert_same("video", several[0].video, made.video)
    made.save(tmp_path / "clip.mp4")
    assert len(media.read_video(tmp_path / "clip.mp4", fps=8, size=(16, 24), sample_rate=2000)[0]) == 5
    longer = pipe.extend(made, "it goes on", seconds=1.125, steps=2)
    assert len(longer.video) == 5 + 9 and len(longer.audio) == 14 * 250
    np.testing.assert_array_equal(longer.video[:5], made.video)


def test_a_notebook_shows_a_clip_as_a_player(pipe):
    made = pipe("<b>a red circle</b>", steps=2)
    page = made._repr_html_()
    (data,) = re.findall(r"data:video/mp4;base64,([^\"]+)", page)
    assert base64.b64decode(data)[4:8] == b"ftyp"
    assert "&lt;b&gt;" in page and "<b>" not in page


def test_context_is_read_at_the_size_and_rates_of_the_system(pipe, tmp_path):
    path = tmp_path / "clip.mp4"
    video = np.zeros((9, 32, 48, 3), np.uint8)
    video[:, :, 8:24, 0] = 200  # a third of the width
    writing.write_mp4(path, video, np.sin(np.arange(9 * 500) / 3), fps=8, sample_rate=4000)
    read = pipe("a red circle", video=path, steps=1).video
    assert read.shape == (9, 16, 24, 3) and read.dtype == np.uint8
    assert read[:, :, 5:11, 0].min() > 150 and read[:, :, 13:, 0].max() < 50
    sound = pipe("a red circle", audio=path, steps=1).audio
    assert sound.shape == (9 * 250,) and sound.dtype == np.float32 and np.abs(sound[100:-100]).max() > 0.8
    context = pipe.context(5, image=video[0])
    assert context.masks["video"].tolist() == [True, False, False]
    context = pipe.context(5, between=[path, path])
    assert context.masks["video"].tolist() == [True, False, True]
    assert pipe.context(5).video is None
    clip = vdm_jax.Clip(video[:, :16, :24], np.zeros(9 * 250, np.float32), 8, 2000)
    np.testing.assert_array_equal(pipe("a red circle", video=clip, steps=1).video, clip.video)
    silent = dataclasses.replace(clip, audio=None, sample_rate=0)
    np.testing.assert_array_equal(pipe("a red circle", video=silent, steps=1).video, clip.video)
    with pytest.raises(UserError, match="the clip has 8 fps and 4000 Hz, the system 8 fps and 2000 Hz"):
        pipe("a red circle", video=vdm_jax.Clip(video, np.zeros(4500, np.float32), 8, 4000))


@pytest.mark.parametrize("frames", [2, 5, 12])
def test_what_is_given_whole_comes_back_at_any_length(pipe, frames):
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (frames, 16, 24, 3), np.uint8)
    sound = rng.uniform(-1, 1, frames * 250 - 100).astype(np.float32)
    prompts = ["a red circle", "a blue square"]
    for first, second in (pipe(prompts, video=video, steps=2), pipe(prompts, video=video, steps=2, seed=1)):
        np.testing.assert_array_equal(first.video, video)
        assert len(first.audio) == frames * 250 and differ(first.audio, second.audio)
    dubbed, other = (pipe("a red circle", audio=sound, steps=2, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(dubbed.audio, np.pad(sound, (0, 100)))
    assert len(dubbed.video) == frames and differ(dubbed.video, other.video)


def test_the_windows_of_a_long_sound_see_the_sound_and_what_was_made(pipe, monkeypatch):
    seen, window = [], pipe.window

    def watched(prompts, *, context, **options):
        seen.append((context, window(prompts, context=context, **options)))
        return seen[-1][1]

    monkeypatch.setattr(pipe, "window", watched)
    video = np.random.default_rng(0).integers(0, 256, (12, 16, 24, 3), np.uint8)
    made = pipe("a red circle", video=video, steps=2).audio
    layout, plan = pipe.system.layout, pipe.plan(13)
    assert len(seen) == 1 + len(plan) > 2
    start = 0
    for (context, _), past in zip(seen[1:], plan):
        start += layout.frames - past
        shown = context.video[0, : 12 - start]
        np.testing.assert_array_equal(shown, video[start : start + layout.frames])
        assert context.masks["video"].all() and context.masks["audio"].sum() == 1 + (past - 1) // layout.f_t
        blended = pipe._fade
        heard = context.audio[0, : past * 250 - blended]
        np.testing.assert_array_equal(heard, made[start * 250 : (start + past) * 250 - blended])


def test_a_picture_and_the_ends_of_a_join_come_back(pipe, clip):
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    np.testing.assert_array_equal(pipe("a red circle", image=picture, steps=2).video[0], picture)
    np.testing.assert_array_equal(pipe("a red circle", image=picture, steps=2, seconds=2).video[0], picture)
    ends = [vdm_jax.Clip(clip["video"][::step], clip["audio"], 8, 2000) for step in (1, -1)]
    joined = pipe("a red circle", between=ends, steps=2)
    np.testing.assert_array_equal(joined.video[0], ends[0].video[-1])
    np.testing.assert_array_equal(joined.video[-2:], ends[1].video[:2])
    fade = pipe._fade
    np.testing.assert_allclose(joined.audio[-500 + fade :], ends[1].audio[fade:500], atol=1e-6)


@pytest.fixture(scope="module")
def kinds_of_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    writing.write_mp4(folder / "film.mp4", np.zeros((3, 16, 24, 3), np.uint8), None, 8, 2000)
    writing.write_images(folder / "still.png", np.zeros((1, 16, 24, 3), np.uint8))
    writing.write_wav(folder / "hum.wav", np.zeros(999), 2000)
    return folder


@pytest.mark.parametrize("argument, name, told", [
    ("video", "still_00000.png", "still_00000.png is a picture: give it as --image"),
    ("between", "still_00000.png", "still_00000.png is a picture: give it as --image"),
    ("clip", "still_00000.png", "still_00000.png is a picture: give it as --image"),
    ("audio", "still_00000.png", "still_00000.png is a picture: give it as --image"),
    ("image", "film.mp4", "film.mp4 is a video: give it as --video, --continue or --between"),
    ("image", "hum.wav", "hum.wav is a sound: give it as --audio"),
    ("video", "hum.wav", "hum.wav is a sound: give it as --audio"),
    ("clip", "hum.wav", "hum.wav is a sound: give it as --audio"),
    ("audio", "film.mp4", "it has no sound"),
])  # fmt: skip
def test_a_file_of_another_kind_is_told_where_it_belongs(pipe, kinds_of_files, argument, name, told):
    path = str(kinds_of_files / name)
    with pytest.raises(UserError, match=told):
        if argument == "clip":
            pipe.extend(path, "a red circle")
        else:
            pipe("a red circle", **{argument: [path, path] if argument == "between" else path})


@pytest.mark.parametrize("arguments, words", [
    (dict(image="a.png", audio="a.wav"), "give only one of image, audio"),
    (dict(audio="a.wav", seconds=9.125), "the clip is as long as the given audio: leave out seconds"),
    (dict(between=["a.mp4", "b.mp4"], seconds=9.125), "between is for clips of up to 0.625 s"),
    (dict(between="a.mp4"), "between wants two clips"),
    (dict(image="none.png"), "none.png"),
    (dict(seconds=float("nan")), "seconds=nan: give a length"),
])  # fmt: skip
def test_wrong_context_is_one_clear_line(pipe, arguments, words):
    with pytest.raises(UserError, match=words):
        pipe("a red circle", **arguments)


@pytest.mark.parametrize("seconds, frames", [(0.625, 5), (0.6, 5), (0.01, 1), (1.2, 9), (60, 481)])
def test_lengths_fill_latent_frames(pipe, seconds, frames):
    assert pipe.frames_of(seconds) == frames


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e6])
def test_lengths_that_make_no_sense(pipe, seconds):
    with pytest.raises(UserError, match="seconds="):
        pipe.frames_of(seconds)


def test_the_reference_weights_have_a_name():
    first, second = (vdm_jax.load(*name, stages=("clip",)) for name in ((), ("reference",)))
    chex.assert_trees_all_equal(first.params, second.params)


def test_a_system_is_built_once(tiny_run, monkeypatch):
    built = []

    def count(config):
        built.append(config)
        return system.build(config)

    monkeypatch.setattr(pipeline, "build", count)
    pipe = vdm_jax.load(tiny_run)
    clip = pipe("a red circle", steps=2)
    pipe.extend(clip, "it goes on", seconds=0.625, steps=2)
    assert len(built) == 1 and built[0].to_dict() == tiny.get_config().to_dict()
