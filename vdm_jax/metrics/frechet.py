"""The Fréchet distance of two sets of features, as Gaussians (arXiv:1706.08500, eq. 6; of videos arXiv:1812.01717)."""

import numpy as np


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), with the means mu and the covariances S of two sets.

    With X = (rows - mean) / sqrt(N - 1), S is X^T X. The eigenvalues of S_a S_b that are not zero are the squared
    singular values of X_a X_b^T, so the trace of its root is the sum of these singular values. No root of a matrix is
    computed, and N may be less than D. The distance has a bias that falls with N: compare sets of equal size.

    a, b: features [N, D], with at least two rows each
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if min(len(a), len(b)) < 2:
        raise ValueError("a covariance needs two rows at least")
    x_a, x_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    spread = np.square(x_a).sum() + np.square(x_b).sum()
    # X = Q R with orthonormal columns of Q, which do not change singular values: R has at most D rows.
    r_a, r_b = (np.linalg.qr(x, mode="r") for x in (x_a, x_b))
    root = np.linalg.svd(r_a @ r_b.T, compute_uv=False).sum()
    return float(max(np.square(a.mean(0) - b.mean(0)).sum() + spread - 2 * root, 0.0))
