"""Distances of spectra against sounds whose spectra are known."""

import jax
import numpy as np
import pytest

from vdm_jax.system import spectra

RATE = 16_000  # Hz
TIME = np.arange(8192) / RATE  # s
NOISE = 0.1 * np.random.default_rng(0).normal(size=(2, len(TIME))).astype(np.float32)


def test_stft_distance():
    t = np.arange(4096)
    sine = 0.7 * np.sin(2 * np.pi * t / 8)[None].astype(np.float32)  # a whole number of periods in each window
    distance = jax.jit(jax.value_and_grad(spectra.stft_distance), static_argnums=2)
    for window in (64, 256):
        magnitudes = np.abs(spectra._spectrum(sine, window))
        assert magnitudes.shape == (1, 4096 // (window // 4) - 3, window // 2 + 1)
        peak = window // 8
        np.testing.assert_allclose(magnitudes[..., peak], 0.7, rtol=0.02)
        assert (magnitudes[..., peak + 3 :] < 0.02).all()
        # At half the amplitude the spectrum is off by a half, in the log by log 2 where there is sound.
        half = spectra.stft_distance(sine / 2, sine, window)
        assert 0.5 < half < 0.5 + np.log(2)
        for x in (sine, 0 * sine):  # silence, too, is no division by zero, nor is a sound met exactly
            value, gradient = distance(x, x, window)
            assert 0 <= value < 1e-3 and np.isfinite(gradient).all()
    noise = 1e-3 * np.random.default_rng(0).normal(size=sine.shape).astype(np.float32)
    assert spectra.stft_distance(noise, 0 * sine, 256) < 3  # -60 dB beside silence


@pytest.mark.parametrize(
    "milliseconds, rate, samples", [(4, 16_000, 64), (64, 22_050, 1412), (1, 8000, 16), (8, 48_000, 384)]
)
def test_windows_are_given_in_milliseconds(milliseconds, rate, samples):
    assert spectra.window_samples(milliseconds, rate) == samples


@pytest.mark.parametrize("window", [64, 512])
def test_mel_distance_of_a_gain(window):
    for gain in (0.5, 2.0):
        assert spectra.mel_distance(gain * NOISE, NOISE, window, RATE) == pytest.approx(np.log(2), rel=0.01)
    assert spectra.mel_distance(-NOISE, NOISE, window, RATE) == pytest.approx(0, abs=1e-6)  # the phase does not count


def test_mel_distance_of_quiet_and_equal_sounds():
    distance = jax.jit(jax.value_and_grad(spectra.mel_distance), static_argnums=(2, 3))
    for x in (NOISE, 0 * NOISE, 1e-5 * NOISE):
        value, gradient = distance(x, x, 256, RATE)
        assert value == 0 and np.isfinite(gradient).all()
    assert spectra.mel_distance(1e-4 * NOISE, 0 * NOISE, 256, RATE) < 1e-3  # -100 dB beside silence


def test_quiet_bands_count_as_much_as_loud_ones():
    """The mean square of the waveform would hardly see the high part of this noise, which is 30 dB quieter."""
    spectrum = np.fft.rfft(NOISE)
    is_low = np.arange(spectrum.shape[1]) < spectrum.shape[1] * 0.1
    low, high = (np.fft.irfft(spectrum * part).astype(np.float32) for part in (is_low, 0.03 * ~is_low))
    softer = [spectra.mel_distance(x, low + high, 512, RATE) for x in (low + 0.5 * high, 0.5 * low + high)]
    assert 0.5 < softer[0] / softer[1] < 2
    assert np.square(high).mean() < 0.01 * np.square(low).mean()
