"""Metrics of arrays, as the papers define them: reconstructed frames, waveforms and onset times, and retrieval."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def _as_pair(a: np.ndarray, b: np.ndarray, data_range: float | None):
    """Returns both arrays as float64, and the range of their values. Raises ValueError if they cannot be compared."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"cannot compare {a.dtype}{a.shape} with {b.dtype}{b.shape}")
    if data_range is None:
        data_range = 255.0 if a.dtype == np.uint8 else 1.0
    return a.astype(np.float64), b.astype(np.float64), data_range


def psnr(a: np.ndarray, b: np.ndarray, data_range: float | None = None) -> float:
    """Returns the peak signal-to-noise ratio in dB: 10 log10(R^2 / MSE), with the mean over all elements.

    Equal arrays give inf.

    a, b: arrays of one shape and dtype
    data_range: R; None is 255 for uint8 and 1 for other types
    """
    a, b, data_range = _as_pair(a, b, data_range)
    mse = np.mean(np.square(a - b))
    return float("inf") if mse == 0 else float(10 * np.log10(data_range**2 / mse))


def _gaussian_rows(length: int, size: int, sigma: float) -> np.ndarray:
    """Returns the matrix [length - size + 1, length] that takes a signal to its Gaussian mean in each full window."""
    offset = np.arange(size) - (size - 1) / 2
    window = np.exp(-(offset**2) / (2 * sigma**2))
    rows = np.zeros((length - size + 1, length))
    for i in range(len(rows)):
        rows[i, i : i + size] = window / window.sum()
    return rows


def ssim(a: np.ndarray, b: np.ndarray, data_range: float | None = None) -> float:
    """Returns the mean structural similarity, in -1..1 (Wang et al. 2004, "Image quality assessment", eq. 13).

    Each channel is an image of its own. The local moments use the paper's circular Gaussian window, 11 x 11 pixels with
    sigma 1.5 pixels, at all places where it lies inside the frame. For a side shorter than 11 pixels the window is the
    largest odd one that fits, cut from the same Gaussian and scaled to sum to one.

    a, b: [..., H, W, C] of one shape and dtype
    data_range: as for `psnr`
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
    """Returns the scale-invariant signal-to-distortion ratio in dB, [...] (Le Roux et al., arXiv:1811.02508, eq. 3).

    The mean of each waveform is subtracted first. A silent reference gives nan, because the ratio has no meaning there.
    A silent or unrelated estimate gives -inf, a scaled copy of the reference gives inf.

    reference, estimate: waveforms [..., N]
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
    """Pairs each reference onset with at most one estimated onset. Returns (share, errors).

    share: of the reference onsets that have a partner, in 0..1; nan without any reference onset
    errors: float [pairs], estimated minus reference time in seconds, in the order of the reference times

    Of all possible pairings, the one with the most pairs is taken, and of several the one with the least total absolute
    error. For a share over many clips, divide the sum of the pairs by the sum of the reference onsets.

    reference_times, estimated_times: in seconds
    tolerance: largest distance of two partners, in seconds
    """
    reference, estimated = (np.sort(np.asarray(t, np.float64)) for t in (reference_times, estimated_times))
    error = estimated[None, :] - reference[:, None]  # [references, estimates]
    near = np.abs(error) <= tolerance
    # A pair beyond the tolerance costs more than all other pairs together, so the number of pairs comes first.
    cost = np.where(near, np.abs(error), tolerance * (len(reference) + 1) + 1)
    i, j = linear_sum_assignment(cost)
    errors = error[i, j][near[i, j]]
    return (len(errors) / len(reference) if len(reference) else float("nan")), errors


def recall_at_k(queries: np.ndarray, candidates: np.ndarray, k: int = 1) -> float:
    """Returns the share of queries, in 0..1, whose own candidate is among their k nearest by cosine similarity.

    Queries of texts and candidates of videos give text-to-video recall; exchanged, they give video-to-text recall. A
    tie counts against the query, so embeddings that are all equal score 0 and not 1.

    queries, candidates: [N, D]; row i of the queries belongs to row i of the candidates
    k: number of candidates that count
    """
    q, c = (np.asarray(x, np.float64) for x in (queries, candidates))
    if q.ndim != 2 or q.shape != c.shape or len(q) == 0:
        raise ValueError(f"want two arrays [N, D] of one shape, got {q.shape} and {c.shape}")
    # An embedding of zeros has no direction: with 1e-12, its similarity to all others is 0 and not nan.
    q, c = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (q, c))
    similarity = q @ c.T  # [N, N]
    # Equal vectors may differ by rounding: within 1e-9 they tie.
    others_ahead = np.sum(similarity >= np.diag(similarity)[:, None] - 1e-9, axis=-1) - 1
    return float(np.mean(others_ahead < k))
