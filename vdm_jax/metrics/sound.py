"""How much of a sound a reconstruction keeps: the level of mel bands, the onsets and the tones."""

import numpy as np

from vdm_jax.metrics import reconstruction, shares, tracker

FLOOR = -70.0  # dB of a sine of full scale; what is less counts as silence
MEL_WINDOW, MEL_HOP = 0.032, 0.008  # s
MEL_BANDS = 64  # up to half of the sample rate
TONE_WINDOW, TONE_HOP = 0.1, 0.05  # s
LEAST_TONE = -50.0  # dB of a sine of full scale
PROMINENCE = 20.0  # dB of a tone above the median of the frequencies up to a factor of 1.5 away
LOWEST_TONE = 100.0  # Hz; a semitone below is less than the window resolves
SEMITONE = 2 ** (1 / 12)
TONE_DB = 3.0  # largest change of the level of a tone that is kept


def mel_filters(bands: int, window: int, sample_rate: int) -> np.ndarray:
    """Returns triangular filters on the mel scale of O'Shaughnessy (1987), [window / 2 + 1, bands].

    Each has a sum of one, so a band is a mean of powers. A band that is narrower than the distance of two frequencies
    of the window interpolates between them.
    """
    nyquist = sample_rate / 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + nyquist / 700), bands + 2) / 2595) - 1)  # Hz
    step = nyquist / (window // 2)
    centers, width = edges[1:-1], np.maximum(np.diff(edges), step)
    offset = np.arange(window // 2 + 1)[:, None] * step - centers
    filters = np.maximum(0, 1 - np.where(offset < 0, -offset / width[:-1], offset / width[1:]))
    return filters / filters.sum(0)


def power(audio: np.ndarray, window: int, hop: int) -> np.ndarray:
    """Returns the power of the short-time Fourier transform of a sound [N], [frames, window / 2 + 1].

    A sine of full scale has power 1. Half a window of silence is put before the sound and after it.
    """
    padded = np.pad(np.asarray(audio, np.float32), window // 2)
    hann = np.hanning(window + 1)[:-1].astype(np.float32)
    spans = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    return np.square(np.abs(np.fft.rfft(spans * hann)) * (2 / hann.sum()))


def decibels(powers: np.ndarray) -> np.ndarray:
    """Returns powers in dB of a sine of full scale, at least FLOOR."""
    return 10 * np.log10(np.maximum(powers, 10 ** (FLOOR / 10)))


def mel_error(reference: np.ndarray, estimate: np.ndarray, sample_rate: int) -> float:
    """Returns the mean absolute difference of the levels of mel bands, in dB. Levels below FLOOR count as FLOOR.

    reference, estimate: sounds [P, N]
    """
    window, hop = 2 * round(MEL_WINDOW * sample_rate / 2), round(MEL_HOP * sample_rate)
    filters = mel_filters(MEL_BANDS, window, sample_rate)
    errors = [
        np.abs(decibels(power(a, window, hop) @ filters) - decibels(power(b, window, hop) @ filters)).mean()
        for a, b in zip(reference, estimate, strict=True)
    ]
    return float(np.mean(errors))


def onset_counts(reference: np.ndarray, estimate: np.ndarray, sample_rate: int, tolerance: float) -> np.ndarray:
    """Returns (pairs, onsets of the reference, onsets of the estimate) of each sound, [P, 3].

    Onsets are those of tracker.onsets. Partners are `tolerance` seconds apart at most.

    reference, estimate: sounds [P, N]
    """
    counts = []
    for a, b in zip(reference, estimate, strict=True):
        true, heard = tracker.onsets(a, sample_rate), tracker.onsets(b, sample_rate)
        counts.append((len(reconstruction.onset_errors(true, heard, tolerance)), len(true), len(heard)))
    return np.array(counts)


def tones(audio: np.ndarray, sample_rate: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the strongest partial in each window of a sound [N]: Hz, dB, and whether it is a tone, [windows] each.

    The frequency and the level are those of the parabola through the levels at the peak and beside it.
    """
    window, hop = 2 * round(TONE_WINDOW * sample_rate / 2), round(TONE_HOP * sample_rate)
    powers = power(audio, window, hop)[1:-1]  # without those that are cut by an end of the sound
    level = 10 * np.log10(np.maximum(powers, 1e-12))
    step = sample_rate / window
    first = int(LOWEST_TONE / step)
    peak = np.clip(first + level[:, first:].argmax(1), 1, level.shape[1] - 2)
    rows = np.arange(len(level))
    before, at, after = (level[rows, peak + i] for i in (-1, 0, 1))
    curve = np.minimum(before - 2 * at + after, -1e-6)
    shift = np.clip(0.5 * (before - after) / curve, -0.5, 0.5)
    height = at - 0.25 * (before - after) * shift
    around = np.array([np.median(level[i, int(p / 1.5) : int(p * 1.5) + 2]) for i, p in enumerate(peak)])
    return (peak + shift) * step, height, (height > LEAST_TONE) & (height > around + PROMINENCE)


def tone_counts(reference: np.ndarray, estimate: np.ndarray, sample_rate: int) -> np.ndarray:
    """Returns (windows with a tone that is kept, windows with a tone) of each sound, [P, 2].

    A tone is kept where the strongest partial of the estimate is within a semitone and within TONE_DB.

    reference, estimate: sounds [P, N]
    """
    counts = []
    for a, b in zip(reference, estimate, strict=True):
        (hertz, level, is_tone), (other_hertz, other_level, _) = (tones(x, sample_rate) for x in (a, b))
        near = np.abs(np.log(other_hertz / hertz)) <= np.log(SEMITONE)
        kept = is_tone & near & (np.abs(other_level - level) <= TONE_DB)
        counts.append((kept.sum(), is_tone.sum()))
    return np.array(counts)


def measure(reference: np.ndarray, estimate: np.ndarray, fps: float, sample_rate: int) -> dict:
    """Returns {metric: value} of reconstructed sounds: the error of mel bands in dB, and shares.

    An onset is found within half a frame. A share that has nothing to count is None.

    reference, estimate: sounds [P, N] in [-1, 1]
    """
    onsets = onset_counts(reference, estimate, sample_rate, 0.5 / fps)
    return {
        "mel_error": mel_error(reference, estimate, sample_rate),
        "onset_recall": shares.pooled(onsets[:, [0, 1]]),
        "onset_precision": shares.pooled(onsets[:, [0, 2]]),
        "tones_kept": shares.pooled(tone_counts(reference, estimate, sample_rate)),
    }
