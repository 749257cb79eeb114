"""How near a reconstruction is to its original: frames, waveforms and onset times."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def _as_pair(a: np.ndarray, b: np.ndarray, data_range: float | None):
    """Both as float64 [...], and the width of the range their values may take."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"cannot compare {a.dtype}{a.shape} with {b.dtype}{b.shape}")
    if data_range is None:
        data_range = 255.0 if a.dtype == np.uint8 else 1.0
    return a.astype(np.float64), b.astype(np.float64), data_range


def psnr(a: np.ndarray, b: np.ndarray, data_range: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(R^2 / MSE), the mean taken over all elements.

    a, b: arrays of one shape and dtype. data_range R: 255 for uint8 and 1 for floats unless given.
    Equal arrays give inf.
    """
    a, b, data_range = _as_pair(a, b, data_range)
    mse = np.mean(np.square(a - b))
    return float("inf") if mse == 0 else float(10 * np.log10(data_range**2 / mse))


def _gaussian_rows(length: int, size: int, sigma: float) -> np.ndarray:
    """Matrix [length - size + 1, length]: times a signal, its Gaussian mean in each full window."""
    offset = np.arange(size) - (size - 1) / 2
    window = np.exp(-(offset**2) / (2 * sigma**2))
    rows = np.zeros((length - size + 1, length))
    for i in range(len(rows)):
        rows[i, i : i + size] = window / window.sum()
    return rows


def ssim(a: np.ndarray, b: np.ndarray, data_range: float | None = None) -> float:
    """Mean structural similarity (Wang et al. 2004, "Image quality assessment", eq. 13), in -1..1.

    a, b: [..., H, W, C] of one shape and dtype; data_range as for `psnr`. Each channel counts as an
    image of its own. Local moments use the paper's circular Gaussian window (11x11, sigma 1.5
    pixels) wherever it fits in the frame. A side shorter than 11 pixels gets the largest odd window
    that fits, cut from the same Gaussian and scaled to sum to one.
    """
    a, b, data_range = _as_pair(a, b, data_range)
    height, width = a.shape[-3:-1]
    sizes = [min(11, length - 1 + length % 2) for length in (height, width)]
    rows, columns = (
        _gaussian_rows(length, size, sigma=1.5) for length, size in zip((height, width), sizes, strict=True)
    )

    def mean(x):  # [..., H, W, C] -> [..., H - 10, W - 10, C]
        return np.einsum("yh,...hwc,xw->...yxc", rows, x, columns, optimize=True)

    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2
    cov = mean(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    contrast_structure = (2 * cov + c2) / (var_a + var_b + c2)
    return float(np.mean(luminance * contrast_structure))


def si_sdr(reference: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al., arXiv:1811.02508, eq. 3).

    reference, estimate: [..., N] waveforms, made zero-mean first -> [...]. A silent reference gives
    nan (the ratio has no meaning there); a silent or unrelated estimate -inf, a scaled copy inf.
    """
    s, e = (np.asarray(x, np.float64) for x in (reference, estimate))
    if s.shape != e.shape:
        raise ValueError(f"cannot compare waveforms of shapes {s.shape} and {e.shape}")
    s, e = (x - x.mean(-1, keepdims=True) for x in (s, e))
    with np.errstate(divide="ignore", invalid="ignore"):
        target = s * (np.sum(e * s, -1) / np.sum(s * s, -1))[..., None]  # the part of e along s
        signal, distortion = np.sum(target**2, -1), np.sum((target - e) ** 2, -1)
        ratio = 10 * np.log10(signal / distortion)
    return np.where(np.sum(s * s, -1) == 0, np.nan, np.where(signal == 0, -np.inf, ratio))


def onset_errors(
    reference_times: np.ndarray, estimated_times: np.ndarray, tolerance: float
) -> tuple[float, np.ndarray]:
    """Pairs reference onsets with estimated ones no further than `tolerance` away (all in seconds).

    Among one-to-one pairings, takes one with most pairs and, of these, least total absolute error.

    Returns (share of the reference onsets that have a partner, nan if there is no onset;
    errors [pairs], estimated minus reference in seconds, in order of reference time). Over many
    clips, sum the pairs and the onsets before dividing.
    """
    reference, estimated = (np.sort(np.asarray(t, np.float64)) for t in (reference_times, estimated_times))
    error = estimated[None, :] - reference[:, None]  # [references, estimates]
    near = np.abs(error) <= tolerance
    # A pair out of reach costs more than all within reach together: the number of pairs is first.
    cost = np.where(near, np.abs(error), tolerance * (len(reference) + 1) + 1)
    i, j = linear_sum_assignment(cost)
    errors = error[i, j][near[i, j]]
    return (len(errors) / len(reference) if len(reference) else float("nan")), errors


def recall_at_k(queries: np.ndarray, candidates: np.ndarray, k: int = 1) -> float:
    """Share of queries, in 0..1, whose own candidate is among the k most similar ones by cosine.

    queries, candidates: [N, D]; row i of one belongs to row i of the other. (text, video) gives
    text-to-video recall, (video, text) the other direction. A tie counts against the query, so that
    embeddings that are all alike score 0 and not 1.
    """
    q, c = (np.asarray(x, np.float64) for x in (queries, candidates))
    if q.ndim != 2 or q.shape != c.shape or len(q) == 0:
        raise ValueError(f"want two arrays [N, D] of one shape, got {q.shape} and {c.shape}")
    # 1e-12: an embedding of zeros is similar to nothing, not nan
    q, c = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (q, c))
    similarity = q @ c.T  # [N, N]
    # 1e-9: equal vectors may differ by rounding, and should still tie
    others_ahead = np.sum(similarity >= np.diag(similarity)[:, None] - 1e-9, axis=-1) - 1
    return float(np.mean(others_ahead < k))
