"""Copies of training clips are found, and fresh clips of the same kind are not taken for copies."""

import numpy as np

from vdm_jax.metrics import copies


def nearest(clips, training):
    return copies.distances(clips, training).min(1)


def test_distances_are_root_mean_squares():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 20)), rng.normal(size=(5, 20))
    expected = np.sqrt(np.square(a[:, None] - b).mean(-1))
    np.testing.assert_allclose(copies.distances(a, b), expected, rtol=1e-6)


def test_copies_have_a_ratio_below_one_and_fresh_clips_hold_one():
    rng = np.random.default_rng(1)
    training, held_out, fresh = (rng.normal(size=(n, 8)) for n in (2000, 200, 200))
    copied = training[:200] + 0.01 * rng.normal(size=(200, 8))
    honest = copies.compare(nearest(fresh, training), nearest(held_out, training))
    assert honest["ratio_low"] < 1 < honest["ratio_high"] and honest["ratio_high"] - honest["ratio_low"] < 0.3
    caught = copies.compare(nearest(copied, training), nearest(held_out, training))
    assert caught["ratio_high"] < 0.2
