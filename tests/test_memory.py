"""The memory of a scene: empty it changes nothing, it knows the past alone, and it goes on in another process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdm_jax
from tests import tiny
from vdm_jax import pipeline, scene
from vdm_jax.data import batches
from vdm_jax.errors import UserError
from vdm_jax.system import build, losses, memory


def noisy(shapes, seed=0):
    """Parameters that are nowhere zero."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves)])


@pytest.fixture(scope="module")
def system():
    return build(tiny.get_config("memory"))


@pytest.fixture(scope="module")
def params(system):
    return noisy(system.stages["denoiser"].param_shapes)


@pytest.fixture(scope="module")
def pipe(system):
    statistics = jax.tree.map(lambda x: jnp.ones(x.shape), system.stages["denoiser"].encoder_shapes["statistics"])
    return pipeline.Pipeline(system, noisy(system.param_shapes) | {"statistics": statistics})


def latents(system, *lead):
    shapes = system.layout.latent_shapes
    return {name: jax.random.normal(jax.random.key(len(name)), (*lead, *shape)) for name, shape in shapes.items()}


def text(rows):
    return {"states": jnp.ones((rows, 96, 16)), "mask": jnp.ones((rows, 96), bool), "pooled": jnp.ones((rows, 16))}


def test_an_empty_memory_adds_exactly_nothing(system, params):
    z = latents(system, 2)
    log_snr = {name: jnp.zeros((2, system.layout.latent_frames)) for name in z}

    def denoise(**more):
        return system.models["denoiser"].apply({"params": params}, z, log_snr, text(2) | more)

    before = memory.empty(system.config.denoiser.model, system.layout, 2)
    after = memory.write(system, params, before, z)
    plain, empty, full = denoise(), denoise(memory=before), denoise(memory=after)
    for name in z:
        np.testing.assert_array_equal(plain[name], empty[name])
        assert np.abs(full[name] - plain[name]).max() > 1e-4


def test_a_memory_keeps_the_latest_windows_at_falling_sizes(system, params):
    windows = [latents(system, 1), jax.tree.map(jnp.ones_like, latents(system, 1))]
    now = memory.empty(system.config.denoiser.model, system.layout, 1)
    for z in windows:
        now = memory.write(system, params, now, z)
    assert now["windows"] == 2
    latest, older = now["past"]
    assert latest["video"].shape == (1, 2, 2, 3, 4)  # half of T = 3, h = 4, w = 6, rounded up
    assert older["video"].shape == (1, 1, 1, 2, 4)
    np.testing.assert_allclose(latest["video"], 1.0, rtol=1e-6)
    assert abs(float(older["video"].mean() - windows[0]["video"].mean())) < 0.3


def test_a_window_knows_only_the_windows_before_it(system, params):
    """The memory of window w changes with the windows before w, and with no other."""
    z, cond = latents(system, 2, 3), text(2)

    def memories(z):
        return memory.training_rows(system, params, jax.random.key(1), z, cond)[1]["memory"]["tokens"]

    with system.config.unlocked():
        system.config.denoiser.memory.cuts = 0.0
    try:
        before = memories(z).reshape(2, 3, -1)
        changed = memories({name: x.at[:, 1].add(1.0) for name, x in z.items()}).reshape(2, 3, -1)
    finally:
        with system.config.unlocked():
            system.config.denoiser.memory.cuts = 0.5
    np.testing.assert_array_equal(before[:, :2], changed[:, :2])
    assert np.abs(before[:, 2] - changed[:, 2]).max() > 1e-3
    assert not before[:, 0].any()


def test_a_cut_shows_a_window_of_another_clip_with_its_text(system, params):
    z = jax.tree.map(lambda x: jnp.broadcast_to(jnp.arange(4.0).reshape(-1, *(1,) * (x.ndim - 1)), x.shape),
                     latents(system, 4, 3))  # fmt: skip
    cond = text(4) | {"pooled": jnp.broadcast_to(jnp.arange(4.0)[:, None], (4, 16))}
    with system.config.unlocked():
        system.config.denoiser.memory.cuts = 1.0
    try:
        rows, of_rows = memory.training_rows(system, params, jax.random.key(1), z, cond)
    finally:
        with system.config.unlocked():
            system.config.denoiser.memory.cuts = 0.5
    shown = rows["video"].reshape(4, 3, -1)[..., 0]
    np.testing.assert_array_equal(shown, [[0, 1, 0], [1, 2, 1], [2, 3, 2], [3, 0, 3]])
    np.testing.assert_array_equal(of_rows["pooled"][:, 0].reshape(4, 3), shown)


def test_the_windows_of_a_clip_are_those_of_a_rollout(system):
    """9 frames are three windows of 5, and each begins with 3 frames of the one before."""
    frames = jnp.arange(9.0)[None, :, None, None, None]
    sound = jnp.arange(9.0 * 250)[None]
    split = memory.windows(system, {"video": frames, "audio": sound})
    np.testing.assert_array_equal(split["video"][..., 0, 0, 0], [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [4, 5, 6, 7, 8]])
    np.testing.assert_array_equal(split["audio"][:, 0], [0, 500, 1000])
    assert system.stages["denoiser"].clip_frames == 9
    assert system.stages["clip"].clip_frames == 5


def test_only_the_memory_is_trained_where_the_config_says_so():
    config = tiny.get_config("memory")
    with config.unlocked():
        config.denoiser.trained = "memory"
    system = build(config)
    stage = system.stages["denoiser"]
    source = batches.source(config, frames=stage.clip_frames)
    batch = batches.Examples(source, system.tokenize).take(range(config.denoiser.batch_size))
    encoders = noisy(stage.encoder_shapes, 1)
    gradient = jax.jit(jax.grad(lambda params: stage.loss(params, jax.random.key(0), batch, encoders)[0]))
    found = gradient(noisy(stage.param_shapes))
    moved = {name for name, part in found.items() if any(x.any() for x in jax.tree.leaves(part))}
    assert moved == {name for name in found if "memory" in name}


def test_wrong_settings_of_a_memory():
    def with_settings(**values):
        config = tiny.get_config("memory")
        with config.unlocked():
            config.update_from_flattened_dict(values)
        return config

    with pytest.raises(UserError, match="denoiser.model.memory tokens"):
        build(with_settings(**{"denoiser.model.memory": 0}))
    with pytest.raises(UserError, match="found in no path"):
        build(with_settings(**{"denoiser.trained": "momery"}))
    with pytest.raises(UserError, match="no regular expression"):
        build(with_settings(**{"denoiser.trained": "("}))
    with pytest.raises(UserError, match="hard_negatives.words"):
        build(with_settings(**{"denoiser.hard_negatives.words": (("left", "right"),)}))


def test_a_scene_goes_on_from_a_file_bit_for_bit(pipe, tmp_path):
    first = pipe("a red circle moving right", seed=3, seconds=1)
    path = tmp_path / "scene.state"
    pipe.save_scene(path, [first])
    straight = pipe.extend(first, "a red circle moving right", seconds=1)
    read = pipe.read_scene(path)
    resumed = pipe.extend(read, "a red circle moving right", seconds=1)
    length = len(first.video)
    np.testing.assert_array_equal(straight.video[:length], first.video)
    np.testing.assert_array_equal(straight.video[length:], resumed.video)
    np.testing.assert_array_equal(straight.audio[len(first.audio) :], resumed.audio)
    jax.tree.map(np.testing.assert_array_equal, straight.scene.arrays, resumed.scene.arrays)
    assert resumed.scene.window == straight.scene.window > read.window

    forgot = pipe.extend(read._replace(memory=None), "a red circle moving right", seconds=1)
    assert (forgot.video != resumed.video).any()
    elsewhere = pipe.extend(read._replace(maker="another system"), "a red circle moving right", seconds=1)
    np.testing.assert_array_equal(elsewhere.video, forgot.video)
    after_cut = pipe.extend(read, "a red circle moving right", seconds=1, cut=True)
    assert (after_cut.video[:1] != resumed.video[:1]).any()


def test_a_scene_file_of_other_weights_or_damaged_is_one_clear_line(pipe, system, tmp_path):
    path = tmp_path / "scene.state"
    pipe.save_scene(path, [pipe("a red circle")])
    other = pipeline.Pipeline(system, jax.tree.map(lambda x: x + 1, pipe.params))
    with pytest.raises(UserError, match="of other weights"):
        other.read_scene(path)
    with pytest.raises(UserError, match="is missing"):
        pipe.read_scene(tmp_path / "none.state")
    with pytest.raises(UserError, match="the config asks for"):
        pipe.read_scene(path, clips=2)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, 8 * len(whole), 40):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged|other weights"):
            pipe.read_scene(path)
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            pipe.read_scene(path)
    with pytest.raises(UserError, match="no scene"):
        pipe.save_scene(path, [vdm_jax.Clip(np.zeros((1, 16, 24, 3), np.uint8), None, 8, 2000)])
    assert scene.KIND in whole[:4096].decode(errors="ignore")


def test_cached_clips_of_windows_are_those_encoded_on_the_fly(system):
    stage = system.stages["denoiser"]
    encoders = noisy(stage.encoder_shapes, 1)
    batch = batches.Examples(batches.source(system.config, frames=9), system.tokenize).take(range(2))
    encoded = jax.jit(lambda batch: losses.encode_batch(system, encoders, batch))(batch)
    assert encoded["z"]["video"].shape == (2, 3, *system.layout.latent_shapes["video"])
    one = {"video": batch["video"][:, 2:7], "audio": batch["audio"][:, 500:1750], "tokens": batch["tokens"]}
    alone = jax.jit(lambda batch: losses.encode_batch(system, encoders, batch))(one)
    for name in ("video", "audio"):
        np.testing.assert_allclose(encoded["z"][name][:, 1], alone["z"][name], rtol=1e-5, atol=1e-4)
