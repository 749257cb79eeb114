"""One compiled program for each shape, noise that belongs to a prompt, and what is given stays."""

import jax
import numpy as np
import pytest

from vdm_jax import pipeline as generate
from vdm_jax import tasks
from vdm_jax.errors import UserError
from vdm_jax.run import checkpoint
from vdm_jax.system import codec as stages


class Counted(generate.Generator):
    """Counts how often the sampler is traced, that is, compiled."""

    traces = 0

    def _sample(self, *arguments, **options):
        self.traces += 1
        return super()._sample(*arguments, **options)


@pytest.fixture(scope="module")
def model(tiny_run):
    return Counted(*checkpoint.load_trained(tiny_run, stages.abstract_params))


@pytest.fixture(scope="module")
def clip(model):
    """A clip as long as those of training: moving bars and a chirp."""
    size, side = stages.layout(model.config), model.config.data.size
    ramp = np.arange(size.frames)[:, None, None, None] * 9 + np.arange(side)[:, None] * np.array([5, 11, 17])
    video = np.broadcast_to(ramp, (size.frames, side, side, 3)).astype(np.uint8)
    time = np.arange(size.samples) / model.config.data.sample_rate
    return {"video": video, "audio": np.sin(300 * time * (1 + time)).astype(np.float32)}


def remade(model, part, x):
    """A single clip through its autoencoder and back."""
    name = f"{part}_autoencoder"
    reconstruct = jax.jit(lambda params, x: stages.reconstruct(model.config, name, params, x))
    return np.asarray(reconstruct(model.frozen[name], x[None])[0])


def assert_same(part, a, b):
    """Equal but for rounding, which differs between programs for one clip and for several."""
    np.testing.assert_allclose(a.astype(float), b.astype(float), atol=2 if part == "video" else 5e-3)


def differ(a, b):
    return np.mean(np.abs(a.astype(float) - b.astype(float))) > (5 if a.dtype == np.uint8 else 0.02)


def test_a_second_prompt_of_the_same_shape_does_not_recompile(model):
    first = model(["a red circle moving right"])
    traces = model.traces
    second = model(["two shapes: a blue square going up and a green triangle heading left"], seed=3, guidance=2)
    third = model(["a red circle moving right"], given=tasks.image(first[0][0, 0], stages.layout(model.config)))
    assert model.traces == traces
    config = model.config.data
    for video, audio in (first, second, third):
        assert video.shape == (1, config.frames, config.size, config.size, 3) and video.dtype == np.uint8
        assert audio.shape == (1, config.frames * config.sample_rate // config.fps) and audio.dtype == np.float32
        assert np.abs(audio).max() <= 1
    assert differ(first[0], second[0]) and differ(first[1], second[1])


@pytest.mark.parametrize("method", ["dpmpp_2m", "ddpm"])
def test_noise_is_a_matter_of_seed_and_number_alone(model, method):
    prompt = "a red circle moving right"
    ten, three = (model([prompt] * n, method=method, steps=2) for n in (10, 3))  # ten: eight, and a batch of two
    for part, a, b in zip(("video", "audio"), ten, three, strict=True):
        for i in range(3):
            assert_same(part, a[i], b[i])
        assert all(differ(a[i], a[j]) for i in range(10) for j in range(i))
    others = model([prompt] + ["a large metal blue square"] * 9, method=method, steps=2)
    assert_same("video", others[0][0], ten[0][0])
    assert np.abs(others[0][1].astype(float) - ten[0][1]).max() > 5  # the text counts, too
    again = model([prompt] * 3, method=method, steps=2, seed=1)
    assert differ(again[0][0], three[0][0])


@pytest.mark.parametrize("part", ["video", "audio"])
def test_a_given_modality_comes_back_and_the_other_is_made(model, clip, part):
    size = stages.layout(model.config)
    given = tasks.foley(clip["video"], size) if part == "video" else tasks.audio(clip["audio"], size)
    one, two = (model(["a red circle"], given=given, seed=seed) for seed in (0, 1))
    i, other = (0, 1) if part == "video" else (1, 0)
    assert_same(part, one[i][0], remade(model, part, clip[part]))
    assert_same(part, one[i], two[i])
    assert differ(one[other], two[other])


def test_a_given_image_is_the_first_frame(model, clip):
    given = tasks.image(clip["video"][0], stages.layout(model.config))
    one, two = (model(["a red circle"], given=given, seed=seed)[0][0] for seed in (0, 1))
    assert_same("video", one[0], remade(model, "video", clip["video"])[0])
    assert_same("video", one[0], two[0])
    assert differ(one[1:], two[1:])


def test_other_lengths_than_trained(model):
    config, traces = model.config.data, model.traces
    for count, frames in enumerate((13, 3, 1), 1):
        video, audio = model(["a red circle"], frames=frames)
        assert model.traces == traces + count  # a new shape, a new program
        assert video.shape[1] == frames and audio.shape[1] == frames * config.sample_rate // config.fps
    with pytest.raises(UserError, match="6 frames do not fill latent frames of 2: use 5 or 7"):
        model(["a red circle"], frames=6)


def test_what_each_clip_is_given_is_its_own(model, clip):
    size = stages.layout(model.config)
    frames, samples = (np.stack([x, x[::-1]]) for x in (clip["video"][:3], clip["audio"][: 3 * size.samples_per_frame]))
    both = model(["a red circle"] * 2, given=tasks.continue_(frames, samples, size))
    for i in range(2):
        alone = model(["a red circle"], given=tasks.continue_(frames[i : i + 1], samples[i : i + 1], size))
        assert_same("video", both[0][i, :3], alone[0][0, :3])
        held = np.concatenate([frames[i], np.repeat(frames[i, -1:], size.frames - 3, 0)])
        assert_same("video", both[0][i, :3], remade(model, "video", held)[:3])
        assert differ(both[0][i, 3:], held[3:])


@pytest.mark.parametrize("options", [
    dict(history_guidance=3.0),
    dict(history_guidance=3.0, history_noise=0.5),
    dict(modality_guidance=3.0),
    dict(context_noise=0.2),
    dict(lag=1),
])  # fmt: skip
def test_options_change_what_is_made_and_keep_what_is_given(model, clip, options):
    size = stages.layout(model.config)
    given = tasks.continue_(clip["video"][None, :1], clip["audio"][None, : size.samples_per_frame], size)
    plain, other = (model(["a red circle"], given=given, steps=2, **o) for o in ({}, options))
    assert_same("video", plain[0][:, :1], other[0][:, :1])
    assert np.abs(plain[0][:, 1:].astype(float) - other[0][:, 1:]).max() > 2


def test_where_a_clip_goes_on_it_is_sampled_otherwise(model, clip):
    size = stages.layout(model.config)

    def made(latents, **options):
        frames = 1 + size.f_t * (latents - 1)
        sound = clip["audio"][None, : frames * size.samples_per_frame]
        given = tasks.continue_(clip["video"][None, :frames], sound, size)
        return model(["a red circle"], given=given, steps=2, **options)[0]

    plain = made(2)
    np.testing.assert_array_equal(plain, made(2, guidance=9.0))
    assert np.abs(plain.astype(float) - made(2, onward_guidance=9.0)).max() > 2
    earlier = model.config.copy_and_resolve_references()
    with earlier.unlocked():
        for name in ("onward_guidance", "across_guidance", "first_step_times"):
            del earlier.sample[name]  # as in runs of earlier versions
    given = tasks.continue_(clip["video"][None, :3], clip["audio"][None, : 3 * size.samples_per_frame], size)
    arrays, _ = generate.Generator(earlier, model.frozen).arguments(given=given, guidance=5.0)
    assert arrays["weights"]["guidance"] == 5.0  # one for all
    for given, weight in ((tasks.audio(clip["audio"], size), 2.5), (tasks.foley(clip["video"], size), 2.5),
                          (tasks.image(clip["video"][0], size), 5.0)):  # fmt: skip
        arrays, _ = model.arguments(given=given, guidance=5.0)
        assert arrays["weights"]["guidance"] == weight
    first = made(1)  # one frame does not show what moves
    np.testing.assert_array_equal(first, made(1, onward_guidance=9.0))
    np.testing.assert_array_equal(first, made(1, first_step_times=(0.2, 0.3)))
    assert np.abs(plain.astype(float) - made(2, first_step_times=(0.2, 0.3))).max() > 2
    assert np.abs(first.astype(float) - made(1, guidance=9.0)).max() > 2


def test_a_roll_out_goes_on_from_its_own_end(model, clip):
    config, size = model.config, stages.layout(model.config)
    frames, prompts = 3 * size.frames, ["a red circle", "a blue square"]
    video, audio = model.rollout(prompts, frames, history=2, steps=2)
    assert video.shape[:2] == (2, frames) and audio.shape == (2, frames * size.samples_per_frame)
    first = model(prompts, steps=2)
    np.testing.assert_array_equal(video[:, : size.frames], first[0])
    fade = round(generate.FADE * config.data.sample_rate)
    np.testing.assert_array_equal(audio[:, : size.samples - fade], first[1][:, :-fade])
    past = 1 + size.f_t  # two latent frames
    given = tasks.continue_(first[0][:, -past:], first[1][:, -past * size.samples_per_frame :], size)
    second = model(prompts, window=1, given=given, steps=2)
    new = size.frames - past
    np.testing.assert_array_equal(video[:, size.frames : size.frames + new], second[0][:, past:])
    assert differ(video[:, :new], video[:, size.frames : size.frames + new])

    start = clip["video"][None, :4], clip["audio"][None, : 4 * size.samples_per_frame]  # 3 of the 4 fill latent frames
    video, audio = model.rollout(["a red circle"], 7, start=start, steps=2)
    np.testing.assert_array_equal(video[:, :4], start[0])
    assert video.shape[1] == 7 and audio.shape == (1, 7 * size.samples_per_frame)
    with pytest.raises(UserError, match="sample.history=9 must be from 1 to"):
        model.rollout(["a red circle"], 99, history=9)


def test_joined_sounds_give_way_to_each_other():
    old, new = np.zeros((2, 20), np.float32), np.ones((2, 30), np.float32)
    out = generate.joined(old, new, overlap=12, fade=4)
    assert out.shape == (2, 20 + 30 - 12)
    np.testing.assert_allclose(out[0], [0] * 16 + [0.2, 0.4, 0.6, 0.8] + [1] * 18, rtol=1e-6)


@pytest.mark.parametrize("options, told", [
    (dict(guidance=float("nan")), "guidance=nan"),
    (dict(context_noise=2.0), "context_noise=2.0 must be from 0 to 1"),
    (dict(first_step_times=(0.1, -1.0)), "first_step_times=.* must be times from 0 to 1"),
    (dict(step=3), "did you mean 'steps'"),
])  # fmt: skip
def test_wrong_options_are_told(model, options, told):
    with pytest.raises(UserError, match=told):
        model(["a red circle"], **options)
