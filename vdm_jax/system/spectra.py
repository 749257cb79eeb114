"""Distances of two sounds in their spectra, for losses."""

import jax.numpy as jnp
import numpy as np

from vdm_jax.metrics.sound import mel_filters

MEL_BANDS = 80  # at most; a window has one band for each four samples at least
SILENCE = 1e-7  # mean power, -70 dB of a sine of full scale: what is less counts as silence


def window_samples(milliseconds, sample_rate):
    """Returns the samples of a window of about so many milliseconds, a multiple of 4 and at least 16."""
    return 4 * max(4, round(milliseconds * sample_rate / 4000))


def stft_distance(a, b, window):
    """Spectral convergence plus L1 of log magnitudes (arXiv:1910.11480, eq. 4 and 5), hops of window / 4 samples.

    a, b: sounds [B, N]; b is the true one.
    """
    least = 1e-12 * (2 / jnp.hanning(window).sum()) ** 2  # so that the root has a slope in silence
    a, b = (jnp.sqrt(_power(_spectrum(x, window)) + least) for x in (a, b))
    floor = SILENCE * b.size  # so that silence does not make the divisor zero
    convergence = jnp.sqrt(jnp.sum(jnp.square(a - b)) / (jnp.sum(jnp.square(b)) + floor) + 1e-8)
    return convergence + jnp.mean(jnp.abs(jnp.log(a + 1e-3) - jnp.log(b + 1e-3)))


def mel_distance(a, b, window, sample_rate):
    """L1 of log magnitudes of mel bands, hops of window / 4 samples. A quiet band counts as much as a loud one.

    a, b: sounds [B, N]; the order does not matter
    """
    filters = mel_filters(min(MEL_BANDS, window // 4), window, sample_rate).astype(np.float32)
    a, b = (jnp.log(_power(_spectrum(x, window)) @ filters + SILENCE) for x in (a, b))  # [B, frames, bands]
    return 0.5 * jnp.mean(jnp.abs(a - b))


def _spectrum(audio, window):
    """The short-time Fourier transform of audio [B, N], [B, frames, window/2 + 1]. A sine of full scale has size 1."""
    hop = window // 4
    blocks = audio[:, : audio.shape[1] // hop * hop].reshape(audio.shape[0], -1, hop)  # [B, N / hop, hop]
    frames = blocks.shape[1] - 3
    windows = jnp.concatenate([blocks[:, i : i + frames] for i in range(4)], -1)  # [B, frames, window]
    hann = jnp.hanning(window)
    return jnp.fft.rfft(windows * hann) * (2 / hann.sum())


def _power(spectrum):
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)
