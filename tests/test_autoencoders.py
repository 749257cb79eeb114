"""The autoencoders are causal, and their latents lie on one time axis."""

import jax
import numpy as np
import pytest

from tests import tiny
from tests.helpers import init_weights, names
from vdm_jax.models.audio_autoencoder import AudioAutoencoder
from vdm_jax.models.video_autoencoder import VideoAutoencoder
from vdm_jax.system import build

T = 3  # latent frames
VIDEO = {  # space strides, time strides
    "time by 2": ((1,), (2,)),
    "time by 4 at once": ((1,), (4,)),
    "space and time by 2 and 2": ((2, 2), (2, 2)),
    "space by 2, then time": ((2, 1), (1, 2)),
}


def variants(x, ends):
    """[1 + len(ends), N, ...]: x [1, N, ...], then for each end a copy with random numbers from that index on."""
    other = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    index = np.arange(x.shape[1]).reshape(-1, *(1,) * (x.ndim - 2))
    return np.concatenate([x] + [np.where(index >= end, other, x) for end in ends])


def first_change(rows):
    """For each row after the first: the smallest index along axis 1 at which it differs from the first row."""
    differs = np.abs(rows[1:] - rows[:1]).reshape(len(rows) - 1, rows.shape[1], -1).max(-1) > 1e-4
    assert differs.any(1).all()
    return differs.argmax(1).tolist()


def small(space_strides, time_strides):
    resolutions = len(space_strides) + 1
    return VideoAutoencoder(
        patch=2,
        channels=(8,) * resolutions,
        space_strides=space_strides,
        time_strides=time_strides,
        blocks=(0,) + (1,) * (resolutions - 1),
        middle_blocks=1,
        latent_channels=3,
        groups=4,
    )


@pytest.mark.parametrize("strides", VIDEO.values(), ids=VIDEO)
def test_video_latents_are_causal(strides):
    model = small(*strides)
    f_t, f_s = int(np.prod(strides[1])), 2 * int(np.prod(strides[0]))
    frames = 1 + f_t * (T - 1)
    video = np.random.default_rng(0).normal(size=(1, frames, 16, 24, 3)).astype(np.float32)
    params = init_weights(model, video, jax.random.key(0))
    encode = jax.jit(lambda video: model.apply({"params": params}, video, method="encode")[0])
    decode = jax.jit(lambda z: model.apply({"params": params}, z, method="decode"))

    # The last frame of latent t is frame f_t * t. A change after it changes latent t + 1, and no earlier latent.
    z = np.asarray(encode(variants(video, [0] + [1 + f_t * t for t in range(T - 1)])))
    assert z.shape == (T + 1, T, 16 // f_s, 24 // f_s, 3)
    assert first_change(z) == list(range(T))
    # Latent 1 depends on each of its f_t frames.
    assert first_change(encode(variants(video, range(1, 1 + f_t)))) == [1] * f_t
    # An image is a video of one frame.
    image = encode(video[:, :1])
    np.testing.assert_allclose(image, z[:1, :1], rtol=1e-4, atol=1e-5)

    out = np.asarray(decode(variants(z[:1], range(T))))
    assert out.shape == (T + 1, *video.shape[1:])
    assert first_change(out) == [0] + [1 + f_t * t for t in range(T - 1)]
    assert decode(image).shape == (1, 1, 16, 24, 3)


@pytest.mark.parametrize("overlap, groups", [(False, 1), (True, 1), (True, 0)])
def test_sound_tokens_are_causal(overlap, groups):
    model = AudioAutoencoder(
        patch=5, channels=(8, 8), strides=(4,), blocks=(1, 1), latent_channels=3, groups=groups, overlap=overlap
    )
    sound = np.random.default_rng(0).normal(size=(1, 6 * 20)).astype(np.float32)
    params = init_weights(model, sound, jax.random.key(0))
    encode = jax.jit(lambda x: model.apply({"params": params}, x, method="encode")[0])
    decode = jax.jit(lambda z: model.apply({"params": params}, z, method="decode"))
    z = np.asarray(encode(variants(sound, [0, 20, 39, 40, 41, 100])))
    assert z.shape == (7, 6, 3)
    assert first_change(z) == [0, 1, 1, 2, 2, 5]
    out = np.asarray(decode(variants(z[:1], range(6))))
    assert out.shape == (7, 120)
    assert first_change(out) == [0, 20, 40, 60, 80, 100]


def test_without_norms_a_quiet_sound_stays_quiet():
    """Small inputs pass in proportion, and GroupNorm makes all of one size."""
    sound = np.random.default_rng(0).normal(size=(1, 400)).astype(np.float32)
    ratios = []
    for groups in (0, 4):
        model = AudioAutoencoder(
            patch=5, channels=(8, 8), strides=(4,), blocks=(1, 1), latent_channels=3, groups=groups, overlap=True
        )
        params = init_weights(model, sound, jax.random.key(0))
        params = jax.tree.map_with_path(lambda path, x: 0 * x if path[-1].key == "bias" else x, params)
        encode = jax.jit(lambda x, model=model, params=params: model.apply({"params": params}, x, method="encode")[0])
        ratios.append(np.linalg.norm(encode(1e-3 * sound)) / np.linalg.norm(encode(2e-3 * sound)))
    assert ratios[0] == pytest.approx(0.5, rel=0.02) and ratios[1] > 0.8


def in_chunks(model, params, method, x, ends):
    """What `stream` gives for the parts of x [B, N, ...] that end at `ends`, in one array or tree of arrays."""
    parts, cache, begin = [], None, 0
    for end in ends:
        out, cache = model.stream(params, method, x[:, begin:end], cache)
        parts.append(out)
        begin = end
    return jax.tree.map(lambda *parts: np.concatenate(parts, 1), *parts)


def assert_all_close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


@pytest.mark.parametrize("strides", VIDEO.values(), ids=VIDEO)
def test_a_video_in_chunks_is_the_video_at_once(strides):
    model = small(*strides)
    f_t = model.f_t
    video = np.random.default_rng(0).normal(size=(2, 1 + f_t * 6, 16, 24, 3)).astype(np.float32)
    params = init_weights(model, video, jax.random.key(0))
    latent = model.apply({"params": params}, video, method="encode")
    ends = [1, 2, 5, 7]  # of latent frames
    assert_all_close(in_chunks(model, params, "encode", video, [1 + f_t * (end - 1) for end in ends]), latent)
    wanted = model.apply({"params": params}, latent[0], method="decode")
    assert wanted.shape == video.shape
    for parts in (ends, [3, 7], [7], range(1, 8)):
        assert_all_close(in_chunks(model, params, "decode", latent[0], parts), wanted)


@pytest.mark.parametrize("settings", [dict(groups=1), dict(groups=0, overlap=True)])
def test_a_sound_in_chunks_is_the_sound_at_once(settings):
    model = AudioAutoencoder(patch=5, channels=(8, 8), strides=(4,), blocks=(1, 1), latent_channels=3, **settings)
    sound = np.random.default_rng(0).normal(size=(2, 9 * 20)).astype(np.float32)
    params = init_weights(model, sound, jax.random.key(0))
    latent = model.apply({"params": params}, sound, method="encode")
    ends = np.array([1, 2, 6, 9])  # of tokens
    assert_all_close(in_chunks(model, params, "encode", sound, 20 * ends), latent)
    wanted = model.apply({"params": params}, latent[0], method="decode")
    assert_all_close(in_chunks(model, params, "decode", latent[0], ends), wanted)


def test_the_state_between_chunks_keeps_its_size():
    model = small((1,), (2,))
    z = np.zeros((1, 4, 8, 12, 3), np.float32)
    params = init_weights(model, np.zeros((1, 3, 16, 24, 3)), jax.random.key(0))
    _, first = model.stream(params, "decode", z[:, :1])
    for chunk in (z[:, :1], z):
        assert names(model.stream(params, "decode", chunk, first)[1]) == names(first)
    assert {shape[1] for shape in names(first).values()} == {2}  # frames that a convolution of width 3 looks back


@pytest.mark.parametrize("name", ["video_autoencoder", "audio_autoencoder"])
def test_training_samples_the_latent(name):
    config = tiny.get_config()
    system = build(config)
    model, size = system.models[name], system.layout
    shapes = {"video_autoencoder": (size.frames, 16, 24, 3), "audio_autoencoder": (size.latent_frames * 500,)}
    x = np.random.default_rng(0).normal(size=(2, *shapes[name])).astype(np.float32)
    params = init_weights(model, x, jax.random.key(0))

    @jax.jit
    def run(x, key):
        out, mean, log_variance = model.apply({"params": params}, x, key)
        z = mean + jax.numpy.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        return out, model.apply({"params": params}, z, method="decode"), mean, log_variance

    out, want, mean, log_variance = run(x, jax.random.key(1))
    assert out.shape == x.shape and out.dtype == np.float32
    assert mean.shape == log_variance.shape == (2, *size.latent_shapes[name.split("_")[0]])
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
    assert np.abs(out - run(x, jax.random.key(2))[0]).max() > 1e-4


@pytest.mark.parametrize("name", ["video_autoencoder", "audio_autoencoder"])
def test_parameters_do_not_depend_on_the_length(name):
    config = tiny.get_config()
    short = build(config).param_shapes[name]
    config.unlock()
    config.data.frames = 13
    assert names(build(config).param_shapes[name]) == names(short)
