"""Metrics of arrays, as the papers define them: reconstructed frames, waveforms and onset times, and retrieval."""

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment

PEAK = 255.0  # the largest value of a pixel


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio in dB of uint8 arrays, 10 log10(255^2 / MSE); inf if they are equal."""
    mse = np.mean(np.square(a.astype(np.float64) - b))
    return float("inf") if mse == 0 else float(10 * np.log10(PEAK**2 / mse))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the mean structural similarity, in -1..1 (Wang et al. 2004, "Image quality assessment", eq. 13).

    Each channel is an image of its own. The local moments use the paper's circular Gaussian window, 11 x 11 pixels with
    sigma 1.5 pixels, at all places where it lies inside the frame. For a side shorter than 11 pixels the window is the
    largest odd one that fits, cut from the same Gaussian and scaled to sum to one.

    a, b: uint8 [..., H, W, C]
    """

    height, width = a.shape[-3:-1]
    up, left = (min(5, (side - 1) // 2) for side in (height, width))  # half of a window, without its middle

    def mean(x):  # [..., H, W, C] -> [..., H - 10, W - 10, C]
        x = gaussian_filter(x, 1.5, axes=(-3, -2), radius=(up, left))
        return x[..., up : height - up, left : width - left, :]

    a, b = a.astype(np.float64), b.astype(np.float64)
    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2
    cov = mean(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    contrast_structure = (2 * cov + c2) / (var_a + var_b + c2)
    return float(np.mean(luminance * contrast_structure))


def si_sdr(reference: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Returns the scale-invariant signal-to-distortion ratio in dB, [...] (Le Roux et al., arXiv:1811.02508, eq. 3).

    The mean of each waveform [..., N] is subtracted first. A silent reference gives nan, a silent or unrelated estimate
    -inf, and a scaled copy of the reference inf.
    """
    s, e = (np.asarray(x, np.float64) for x in (reference, estimate))
    s, e = (x - x.mean(-1, keepdims=True) for x in (s, e))
    with np.errstate(divide="ignore", invalid="ignore"):
        target = s * (np.sum(e * s, -1) / np.sum(s * s, -1))[..., None]  # the part of e along s
        signal, distortion = np.sum(target**2, -1), np.sum((target - e) ** 2, -1)
        return np.where(signal == 0, -np.inf, 10 * np.log10(signal / distortion))


def onset_errors(reference: np.ndarray, estimated: np.ndarray, tolerance: float) -> np.ndarray:
    """Pairs each reference onset with at most one estimated onset. Returns a pair's estimated minus reference time.

    Of all pairings, the one with the most pairs is taken, and of several the one with the least total absolute error.

    reference, estimated: times, in seconds as the errors
    tolerance: largest distance of two partners, in seconds
    """
    reference, estimated = (np.sort(np.asarray(t, np.float64)) for t in (reference, estimated))
    error = estimated[None, :] - reference[:, None]  # [references, estimates]
    near = np.abs(error) <= tolerance
    # A pair beyond the tolerance costs more than all other pairs together, so the number of pairs comes first.
    pairs = linear_sum_assignment(np.where(near, np.abs(error), tolerance * (len(reference) + 1) + 1))
    return error[pairs][near[pairs]]


def recall_at_k(queries: np.ndarray, candidates: np.ndarray, k: int = 1) -> float:
    """Returns the share of queries, in 0..1, whose own candidate is among their k nearest by cosine similarity.

    A tie counts against the query, so embeddings that are all equal score 0 and not 1.

    queries, candidates: [N, D]; row i of the queries belongs to row i of the candidates
    """
    q, c = (np.asarray(x, np.float64) for x in (queries, candidates))
    # An embedding of zeros has no direction: with 1e-12, its similarity to all others is 0 and not nan.
    q, c = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (q, c))
    similarity = q @ c.T  # [N, N]
    # Equal vectors may differ by rounding: within 1e-9 they tie.
    others_ahead = np.sum(similarity >= np.diag(similarity)[:, None] - 1e-9, axis=-1) - 1
    return float(np.mean(others_ahead < k))
