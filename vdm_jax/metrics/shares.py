"""Shares of clips, and the ranges in which the shares of all clips lie with a probability of 95 %."""

import math

import numpy as np

Z = 1.96  # of a standard normal variable, 95 % lies within -Z and Z
DRAWS = 2000  # of a bootstrap


class Share(float):
    """A share in 0..1 that was measured on `clips` clips. `low` and `high` are the ends of its interval.

    The interval is Wilson's (1927, J. Am. Stat. Assoc. 22, p. 209). It is for values of 0 or 1, one for each clip. For
    the mean of other values in 0..1 it is too wide, never too narrow.
    """

    def __new__(cls, share, clips):
        self = super().__new__(cls, share)
        center = (share + Z**2 / (2 * clips)) / (1 + Z**2 / clips)
        half = Z / (1 + Z**2 / clips) * math.sqrt(share * (1 - share) / clips + Z**2 / (4 * clips**2))
        self.low, self.high = max(0.0, center - half), min(1.0, center + half)
        return self

    @classmethod
    def within(cls, share, low, high):
        """Returns a Share whose interval is known already."""
        self = float.__new__(cls, share)
        self.low, self.high = low, high
        return self


class Difference(float):
    """The difference of two shares in -1..1, with the ends `low` and `high` of its interval."""

    def __new__(cls, difference, low, high):
        self = super().__new__(cls, difference)
        self.low, self.high = low, high
        return self


def mean(values):
    """Returns the mean of one value in 0..1 per clip as a Share; None if there are no values."""
    return pooled([(value, 1) for value in values])


def pooled(counts):
    """Returns the sum of the first numbers over the sum of the second as a Share; None if there is nothing to count.

    counts: for each clip (sum of values in 0..1, number of values).
    """
    total, number = np.sum([*counts, (0, 0)], axis=0)
    return Share(total / number, sum(n > 0 for _, n in counts)) if number else None


def difference(counts, others):
    """Returns `pooled` of counts minus `pooled` of others, two measures of the same clips, as a Difference.

    The interval is of draws of clips, so the two measures of a clip stay together. None if there is nothing to count.
    """
    pairs = np.hstack([np.reshape(counts, (-1, 2)), np.reshape(others, (-1, 2))])  # [clips, 4]
    if not pairs[:, 1].any() or not pairs[:, 3].any():
        return None

    def of_clips(pairs):
        sums = pairs.sum(-2)
        return sums[..., 0] / np.maximum(sums[..., 1], 1) - sums[..., 2] / np.maximum(sums[..., 3], 1)

    return Difference(of_clips(pairs), *bootstrap(of_clips, pairs))


def bootstrap(statistic, *samples):
    """Returns the ends of the 95 % bootstrap interval of statistic(*samples), [low, high].

    samples: arrays [N, ...]. Each is drawn from on its own, and the statistic gets all draws at once: [DRAWS, N, ...].
    """
    rng = np.random.default_rng(0)
    draws = [x[rng.integers(len(x), size=(DRAWS, len(x)))] for x in samples]
    return np.percentile(statistic(*draws), [2.5, 97.5]).tolist()
