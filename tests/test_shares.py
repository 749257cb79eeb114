"""Shares and their intervals against scipy, and how often an interval holds the true share."""

import numpy as np
import pytest
from scipy.stats import binomtest

from vdm_jax.metrics.shares import Share, difference, mean, pooled


@pytest.mark.parametrize("hits, clips", [(0, 10), (190, 192), (192, 192), (1, 2)])
def test_the_interval_is_wilsons(hits, clips):
    share, expected = Share(hits / clips, clips), binomtest(hits, clips).proportion_ci(method="wilson")
    np.testing.assert_allclose([share, share.low, share.high], [hits / clips, *expected], atol=1e-4)


def test_two_objects_of_a_clip_count_as_one_clip():
    share = pooled([(1.5, 2), (0, 0), (0.0, 1)])
    assert float(share) == 0.5 and share.low == Share(0.5, 2).low


def test_nothing_to_count_is_none():
    assert mean([]) is pooled([]) is pooled([(0, 0)]) is difference([], []) is difference([(0, 0)], [(1, 1)]) is None


def test_the_interval_of_dependent_objects_holds_the_true_share():
    """Both objects of a clip are right, or both are wrong: counted apart they would give a narrow interval."""
    rng = np.random.default_rng(0)
    held = [pooled([(2 * x, 2) for x in rng.random(100) < 0.9]) for _ in range(500)]
    assert np.mean([share.low <= 0.9 <= share.high for share in held]) > 0.93


def test_the_difference_of_two_measures_of_the_same_clips():
    """Its standard error is that of the differences by clip, which is small where the two measures agree."""
    rng = np.random.default_rng(1)
    first = rng.random(400) < 0.9
    second = first & (rng.random(400) < 0.95)
    found = difference([(x, 1) for x in second], [(x, 1) for x in first])
    by_clip = second.astype(float) - first
    error = by_clip.std() / 20
    np.testing.assert_allclose(found, by_clip.mean())
    np.testing.assert_allclose([found.low, found.high], found + 1.96 * error * np.array([-1, 1]), atol=0.25 * error)
