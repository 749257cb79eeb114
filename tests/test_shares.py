"""Shares and their intervals against scipy, and how often an interval holds the true share."""

import numpy as np
import pytest
from scipy.stats import binomtest

from vdm_jax.metrics.shares import Share, mean, ratio


@pytest.mark.parametrize("hits, clips", [(0, 10), (190, 192), (192, 192), (1, 2)])
def test_the_interval_is_wilsons(hits, clips):
    share, expected = Share(hits / clips, clips), binomtest(hits, clips).proportion_ci(method="wilson")
    np.testing.assert_allclose([share, share.low, share.high], [hits / clips, *expected], atol=1e-4)


def test_two_objects_of_a_clip_count_as_one_clip():
    share = mean([[1.0, 0.5], [None, None], [0.0, None]])
    assert float(share) == 0.5 and share.low == Share(0.5, 2).low
    sync = ratio([(3, 4), (0, 0), (1, 4)])
    assert float(sync) == 0.5 and sync.high == Share(0.5, 2).high


def test_nothing_to_count_is_none():
    assert mean([]) is mean([[], [None]]) is ratio([]) is ratio([(0, 0)]) is None


def test_the_interval_of_dependent_objects_holds_the_true_share():
    """Both objects of a clip are right, or both are wrong: counted apart they would give a narrow interval."""
    rng = np.random.default_rng(0)
    held = [mean([[x, x] for x in rng.random(100) < 0.9]) for _ in range(500)]
    assert np.mean([share.low <= 0.9 <= share.high for share in held]) > 0.93
