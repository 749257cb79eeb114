"""Metrics of reconstructed sound against sounds whose partials, levels and onsets are known, and Opus."""

import numpy as np
import pytest

from tests import tiny
from tests.peers import opus
from tests.peers import sound as budget
from vdm_jax.errors import UserError
from vdm_jax.metrics import sound
from vdm_jax.system import build

RATE = 16_000  # Hz
TIME = np.arange(2 * RATE) / RATE  # s


def sine(hertz, decibels=-6.0):
    return (10 ** (decibels / 20) * np.sin(2 * np.pi * hertz * TIME)).astype(np.float32)


def clicks(*times):
    x = np.zeros(len(TIME))
    for time in times:
        x += np.where(TIME >= time, np.exp(-(TIME - time) / 0.03), 0) * np.sin(2 * np.pi * 1000 * (TIME - time))
    return x.astype(np.float32) / 2


def noise(seed, scale=0.1):
    return scale * np.random.default_rng(seed).normal(size=len(TIME)).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 48_000])
def test_a_gain_is_an_error_of_as_many_decibels(rate):
    a = np.stack([noise(0), noise(1)])
    assert sound.mel_error(a, a, rate) == 0
    assert sound.mel_error(a, 0.5 * a, rate) == pytest.approx(20 * np.log10(2), abs=0.01)
    assert sound.mel_error(a, 2 * a, rate) == pytest.approx(20 * np.log10(2), abs=0.01)


def test_what_is_below_the_floor_is_silence():
    quiet = np.stack([noise(0, scale=1e-5)])
    assert sound.mel_error(np.zeros_like(quiet), quiet, RATE) == 0
    loud = sound.mel_error(np.zeros_like(quiet), np.stack([noise(0)]), RATE)
    # White noise of standard deviation 0.1: each frequency has a power of 4 * 0.01 * sum(hann^2) / sum(hann)^2.
    level = 10 * np.log10(4 * 0.01 * 1.5 / round(0.032 * RATE))
    assert loud == pytest.approx(level - sound.FLOOR, abs=1)


def test_mel_filters_are_means():
    filters = sound.mel_filters(64, 256, 8000)
    assert filters.shape == (129, 64) and filters.min() >= 0
    np.testing.assert_allclose(filters.sum(0), 1)
    assert (np.diff(filters.argmax(0)) >= 0).all()


@pytest.mark.parametrize("hertz", [123.4, 440.0, 1234.5, 6000.0])
def test_the_strongest_partial_of_a_sine(hertz):
    found, level, is_tone = sound.tones(sine(hertz) + sine(2.5 * hertz / 2, -20), RATE)
    np.testing.assert_allclose(found, hertz, rtol=0.005)
    np.testing.assert_allclose(level, -6, atol=0.3)
    assert is_tone.all()


def test_noise_and_quiet_have_no_tone():
    for x in (noise(0), sine(440, -60), np.zeros(len(TIME))):
        assert not sound.tones(x, RATE)[2].any()


@pytest.mark.parametrize("estimate, kept", [
    (sine(440), 1), (sine(440 * 1.04), 1), (sine(440 * 1.08), 0), (sine(440, -8), 1), (sine(440, -10), 0),
    (sine(440) + noise(0, 0.03), 1), (noise(0, 0.35), 0), (-sine(440), 1),
])  # fmt: skip
def test_a_tone_is_kept_within_a_semitone_and_3_db(estimate, kept):
    (found, total), (none, nothing) = sound.tone_counts([sine(440), noise(1)], [estimate, estimate], RATE)
    assert total > 30 and found / total == pytest.approx(kept, abs=0.1)
    assert none == nothing == 0


def test_onsets_are_found_within_half_a_frame():
    true, late = clicks(0.5, 1.0, 1.5), clicks(0.55, 1.08)
    np.testing.assert_array_equal(sound.onset_counts([true, true], [true, late], RATE, 0.0625), [[3, 3, 3], [1, 3, 2]])
    found = sound.measure(np.stack([true]), np.stack([late]), fps=8, sample_rate=RATE)
    assert found["onset_recall"] == pytest.approx(1 / 3) and found["onset_precision"] == 0.5
    assert found["tones_kept"] is None or 0 <= found["tones_kept"] <= 1
    silent = np.zeros((1, len(TIME)))
    nothing = {"mel_error": 0, "onset_recall": None, "onset_precision": None, "tones_kept": None}
    assert sound.measure(silent, silent, 8, RATE) == nothing


def test_opus_keeps_more_at_a_higher_rate():
    x = np.stack([sine(440) + clicks(0.5, 1.0), noise(0, 0.05) + sine(800, -12)])
    low, high = (opus.measure(x, 8, RATE, 1000 * kilobits) for kilobits in (8, 64))
    assert low["mel_error"] > 2 * high["mel_error"] and low["kilobits_per_second"] < 12 < high["kilobits_per_second"]
    assert high["onset_recall"] == 1 and high["tones_kept"] > 0.95
    decoded, _ = opus.through_opus(x[0], RATE, 64_000)
    assert decoded.shape == x[0].shape and np.argmax(np.correlate(decoded[200:8200], x[0][:8400], "valid")) == 200
    with pytest.raises(UserError, match="22050 is none of Opus: use one of"):
        opus.through_opus(x[0], 22_050, 12_000)


def test_a_recipe_is_trained_for_a_budget(tmp_path):
    config = tiny.get_config()
    with config.unlocked():
        config.audio_autoencoder.update(steps=2, mel_weight=1.0, mel_windows=(16, 64))
    system = build(config)
    clips = budget.recorded(config, tmp_path / "clips.npz", {"train": 4, "held_out": 2})
    again = budget.recorded(config, tmp_path / "clips.npz", {"train": 4, "held_out": 2})
    assert clips["train"].shape == (4, 1250) and np.array_equal(clips["held_out"], again["held_out"])
    assert budget.step_flops(system) > 1e6
    params = budget.trained(system, clips["train"], steps=2)
    found = budget.reconstructed(system, params, clips["held_out"])
    assert found.shape == clips["held_out"].shape and np.isfinite(found).all()
