import numpy as np
import pytest
from scipy.signal import convolve2d

from vdm_jax.metrics.reconstruction import onset_errors, psnr, recall_at_k, si_sdr, ssim


def test_psnr_of_a_constant_offset():
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(a, a + np.uint8(10)) == pytest.approx(20 * np.log10(255 / 10))
    # uint8 must not wrap around: 5 - 250 is -245
    assert psnr(np.uint8([5]), np.uint8([250])) == pytest.approx(20 * np.log10(255 / 245))
    assert psnr(a, a) == float("inf")


def ssim_by_the_paper(a, b, data_range, size=11):
    """Wang et al. 2004, eq. 13 to 16, with a 2-D window and centered moments, for one channel."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    window = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(a.shape[0] - size + 1):
        for left in range(a.shape[1] - size + 1):
            p, q = (im[top : top + size, left : left + size] for im in (a, b))
            mu_p, mu_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * (p - mu_p) ** 2).sum(), (window * (q - mu_q) ** 2).sum()
            cov = (window * (p - mu_p) * (q - mu_q)).sum()
            c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
            values.append((2 * mu_p * mu_q + c1) * (2 * cov + c2) / ((mu_p**2 + mu_q**2 + c1) * (var_p + var_q + c2)))
    return np.mean(values)


@pytest.mark.parametrize("shape, size", [((32, 24), 11), ((7, 7), 7), ((8, 8), 7)])
def test_ssim_against_the_formula(shape, size):
    rng = np.random.default_rng(0)
    smooth = np.ones((3, 3)) / 9
    frames = [
        np.stack([convolve2d(rng.uniform(0, 255, shape), smooth, mode="same") for _ in "rgb"], -1) for _ in range(2)
    ]
    a = np.stack(frames).astype(np.uint8)  # [F, H, W, C]
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    want = np.mean(
        [
            ssim_by_the_paper(a[f, ..., c].astype(float), b[f, ..., c].astype(float), 255, size)
            for f in range(2)
            for c in range(3)
        ]
    )
    assert ssim(a, b) == pytest.approx(want, abs=1e-9)


def test_ssim_of_flat_and_equal_frames():
    a = np.full((16, 16, 3), 51, np.uint8)
    assert ssim(a, a) == pytest.approx(1)
    # without variance only the luminance term is left
    want = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(a, np.full_like(a, 153)) == pytest.approx(want)


def test_si_sdr_of_known_noise():
    t = np.arange(8000) / 8000  # s
    s, n = np.sin(2 * np.pi * 100 * t), np.sin(2 * np.pi * 333 * t)  # orthogonal, of equal power
    estimates = np.stack([s + 0.1 * n, 3 * (s + 0.1 * n), s + n + 0.5, n])
    ratio = si_sdr(np.broadcast_to(s, estimates.shape), estimates)
    np.testing.assert_allclose(ratio[:3], [20, 20, 0], atol=1e-6)  # scale and offset do not count
    assert ratio[3] < -200


def test_si_sdr_where_it_has_no_value():
    s = np.sin(np.arange(100.0))
    assert np.isnan(si_sdr(np.zeros(100), s))
    assert si_sdr(s, np.zeros(100)) == -np.inf
    assert si_sdr(s, -2 * s) > 250  # rounding keeps it from inf


def test_onsets_pair_one_to_one():
    errors = onset_errors([1.0, 2.0, 3.0], [3.04, 1.02, 2.5], tolerance=0.05)
    np.testing.assert_allclose(errors, [0.02, 0.04])
    # one estimate cannot serve two references
    assert len(onset_errors([1.0, 1.04], [1.02], tolerance=0.05)) == 1


def test_onsets_take_most_pairs_then_least_error():
    # nearest first would pair 1.0 with 1.03 and leave 1.08 and 0.95 alone
    errors = onset_errors([1.0, 1.08], [0.95, 1.03], tolerance=0.055)
    np.testing.assert_allclose(errors, [-0.05, -0.05])
    # first come, first served would take 0.96
    errors = onset_errors([1.0], [0.96, 1.0], tolerance=0.05)
    np.testing.assert_allclose(errors, [0.0])


def test_onsets_where_there_are_none():
    assert len(onset_errors([], [1.0], tolerance=0.05)) == len(onset_errors([1.0], [], tolerance=0.05)) == 0


def test_recall_counts_what_is_ahead():
    candidates = np.eye(3)
    queries = np.array(
        [
            [5.0, 1.0, 0.0],  # own first; length does not count
            [0.9, 0.8, 0.0],  # own second
            [0.9, 0.8, 0.1],  # own third
        ]
    )
    assert [recall_at_k(queries, candidates, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_directions_differ():
    text = np.array([[1.0, 0.0], [0.9, 0.1]])
    video = np.array([[1.0, 0.0], [1.0, 0.05]])
    assert recall_at_k(text, video) == 1.0
    assert recall_at_k(video, text) == 0.5


def test_alike_embeddings_find_nothing():
    collapsed = np.ones((8, 4)) / 3
    assert recall_at_k(collapsed, collapsed) == 0
    assert recall_at_k(np.zeros((8, 4)), np.eye(8, 4)) == 0
    assert recall_at_k(collapsed, collapsed, k=8) == 1


def test_chance_is_k_of_n():
    rng = np.random.default_rng(0)
    recalls = [recall_at_k(rng.normal(size=(64, 32)), rng.normal(size=(64, 32)), k=8) for _ in range(50)]
    # 3200 draws of a share of 1/8: standard error 0.006
    assert np.mean(recalls) == pytest.approx(8 / 64, abs=0.02)
