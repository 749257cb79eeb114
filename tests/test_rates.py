"""Frame rates as fractions, and the sample rates that fit them."""

from fractions import Fraction

import pytest

from configs import doom
from tests import tiny
from vdm_jax.data.rates import rational, sample_count
from vdm_jax.errors import UserError
from vdm_jax.system.layout import layout


@pytest.mark.parametrize("fps, exact", [
    (8, 8), (8.0, 8), (12.5, Fraction(25, 2)), (25, 25), (15, 15), (7.5, Fraction(15, 2)),
    (29.97, Fraction(30000, 1001)), (30000 / 1001, Fraction(30000, 1001)), (23.976, Fraction(24000, 1001)),
    (59.94, Fraction(60000, 1001)), (119.88, Fraction(120000, 1001)), (29.9, Fraction(299, 10)), (30, 30),
    (Fraction(24000, 1001), Fraction(24000, 1001)),
])  # fmt: skip
def test_a_rate_is_a_fraction(fps, exact):
    assert rational(fps) == exact


def test_sound_does_not_drift():
    for frames in (1, 17, 107_892, 10**9):  # 107,892 frames of 29.97 fps are an hour
        assert sample_count(frames, 29.97, 30_000) == frames * 1001
        assert sample_count(frames, 24000 / 1001, 48_000) == frames * 2002
        assert sample_count(frames, 12.5, 8000) == frames * 640
    assert sample_count(1, 30, 22_050) == 735 and sample_count(5, 29.97, 48_000) == 8008


def config(fps, sample_rate):
    made = tiny.get_config()
    made.data.update(fps=fps, sample_rate=sample_rate)
    return made


@pytest.mark.parametrize("fps, sample_rate, per_frame", [(12.5, 3125, 250), (29.97, 30_000, 1001), (2, 500, 250)])
def test_a_clip_of_such_a_rate_has_a_layout(fps, sample_rate, per_frame):
    model = config(fps, sample_rate)
    if per_frame % 250:
        model.audio_autoencoder.model.update(patch=7, strides=(11,))
    sizes = layout(model)
    assert sizes.samples_per_frame == per_frame and sizes.samples == per_frame * sizes.frames
    assert sizes.latent_fps == pytest.approx(fps / sizes.f_t, rel=1e-4)


@pytest.mark.parametrize("fps, sample_rate, words", [
    (29.97, 48_000, "1601.6 samples in a frame at data.fps=30000/1001, and not a whole number: use 30000 or 60000"),
    (24, 22_050, "918.75 samples in a frame at data.fps=24, and not a whole number: use 22032 or 22056"),
    (12.5, 8010, "640.8 samples in a frame at data.fps=25/2, and not a whole number: use 8000 or 8025"),
])  # fmt: skip
def test_a_rate_that_does_not_fit_names_those_that_do(fps, sample_rate, words):
    with pytest.raises(UserError, match=words):
        layout(config(fps, sample_rate))


@pytest.mark.parametrize("fps, sample_rate, hop, words", [
    (30, 22_050, (50, 5), "1470 samples is no multiple of the 250 .* times the product of strides 245 or 294"),
    (24, 48_000, (49, 5), "4000 samples is no multiple of the 245 .* times the product of strides 200 or 250"),
    (25, 44_100, (50, 5), "3528 samples is no multiple of the 250 .* times the product of strides 196 or 252"),
])  # fmt: skip
def test_a_token_that_does_not_fit_names_those_that_do(fps, sample_rate, hop, words):
    made = config(fps, sample_rate)
    made.audio_autoencoder.model.update(patch=hop[0], strides=(hop[1],))
    with pytest.raises(UserError, match=words):
        layout(made)


@pytest.mark.parametrize("sample_rate, patch", [(16_000, 50), (24_000, 75), (48_000, 150), (22_050, 49), (44_100, 147)])
def test_the_recipe_of_doom_takes_the_usual_sample_rates(sample_rate, patch):
    made = doom.get_config()
    with made.unlocked():
        made.data.update(sample_rate=sample_rate, fps=7.5 if sample_rate % 8 else 8)
        made.audio_autoencoder.model.patch = patch
    tokens, channels = layout(made).audio
    assert channels == 32 and tokens * 5 * patch == 2 * sample_rate / made.data.fps
