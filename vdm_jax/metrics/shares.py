"""Shares of clips, with the range in which the share of all clips lies."""

import math

import numpy as np

Z = 1.96  # of a standard normal variable, 95 % lies within -Z and Z


class Share(float):
    """A share in 0..1 that was measured on `clips` clips. `low` and `high` are the ends of its 95 % interval.

    The interval is Wilson's (1927, J. Am. Stat. Assoc. 22, p. 209). It is for values of 0 or 1, one for each clip. For
    the mean of other values in 0..1 it is too wide, never too narrow.
    """

    def __new__(cls, share, clips):
        self = super().__new__(cls, share)
        center = (share + Z**2 / (2 * clips)) / (1 + Z**2 / clips)
        half = Z / (1 + Z**2 / clips) * math.sqrt(share * (1 - share) / clips + Z**2 / (4 * clips**2))
        self.low, self.high = max(0.0, center - half), min(1.0, center + half)
        return self


def mean(by_clip):
    """Returns the mean of the values of all clips as a Share; None if there are no values.

    by_clip: for each clip a list of values in 0..1. None stands for a value that could not be measured.
    """
    measured = [[x for x in values if x is not None] for values in by_clip]
    values = [x for found in measured for x in found]
    return Share(np.mean(values), sum(map(bool, measured))) if values else None


def ratio(by_clip):
    """Returns the sum of hits over the sum of totals as a Share; None if there is nothing to count.

    by_clip: (hits, total) of each clip.
    """
    hits, total = np.sum([*by_clip, (0, 0)], axis=0)
    return Share(hits / total, sum(count > 0 for _, count in by_clip)) if total else None
