"""One compiled program for each shape, noise that belongs to a prompt, and what is given stays."""

import jax
import numpy as np
import pytest

from vdm_jax import checkpoint, generate, stages
from vdm_jax.errors import UserError


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
    third = model(["a red circle moving right"], given={"video": first[0][0, :1]})
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
    assert differ(others[0][1], ten[0][1])  # the text counts, too
    again = model([prompt] * 3, method=method, steps=2, seed=1)
    assert differ(again[0][0], three[0][0])


@pytest.mark.parametrize("part", ["video", "audio"])
def test_a_given_modality_comes_back_and_the_other_is_made(model, clip, part):
    one, two = (model(["a red circle"], given={part: clip[part]}, seed=seed) for seed in (0, 1))
    i, other = (0, 1) if part == "video" else (1, 0)
    assert_same(part, one[i][0], remade(model, part, clip[part]))
    assert_same(part, one[i], two[i])
    assert differ(one[other], two[other])


def test_a_given_image_is_the_first_frame(model, clip):
    one, two = (model(["a red circle"], given={"video": clip["video"][:1]}, seed=seed)[0][0] for seed in (0, 1))
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
