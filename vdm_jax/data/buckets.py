"""Buckets: clips of several shapes in one training. All clips of a batch are of one bucket.

Which bucket a batch is of is a pure function of (seed, step), so a run that resumes sees the same batches.
"""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from vdm_jax.errors import UserError

PERIOD = 100  # steps in which each bucket gets its share of the batches


class Bucket(NamedTuple):
    frames: int
    height: int  # in pixels
    width: int  # in pixels

    def __str__(self):
        return "x".join(map(str, self))


def parse(text):
    """Returns the Bucket of a text such as "17x48x64": frames, height, width. Raises UserError."""
    if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}x[1-9]\d{0,5}", str(text)):
        raise UserError(f"data.buckets: {text!r} must be frames x height x width, such as 17x48x64")
    return Bucket(*map(int, text.split("x")))


def parse_all(texts):
    """Returns the Buckets of config.data.buckets. Raises UserError for a wrong one, and for one that comes twice."""
    found = tuple(map(parse, texts))
    if len(set(found)) < len(found):
        raise UserError(f"data.buckets={tuple(texts)} names a bucket twice: leave it out once")
    return found


def parse_size(text):
    """Returns (height, width) of a text such as "48x64". Raises UserError."""
    if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", text):
        raise UserError(f"size {text!r} must be height x width, such as 48x64")
    height, width = map(int, text.split("x"))
    return height, width


def nearest(buckets, frames, height, width):
    """Returns the Bucket for a video of this length and size.

    Of the buckets that are not longer than the video, it is the one with the most similar aspect ratio. Of several, it
    is the longest one, then the largest one that does not enlarge the video. A video that is shorter than all buckets
    goes to one of the shortest.
    """
    longest = max(frames, min(bucket.frames for bucket in buckets))
    fitting = [bucket for bucket in buckets if bucket.frames <= longest]

    def rank(bucket):
        distance = abs(math.log(bucket.width / bucket.height) - math.log(width / height))
        enlarges = bucket.height > height and bucket.width > width
        area = bucket.height * bucket.width
        return round(distance, 3), -bucket.frames, enlarges, area if enlarges else -area

    return min(fitting, key=rank)


def schedule(weights, seed, step):
    """Returns (the bucket of the batch of a step, how many batches of each bucket come before it).

    A bucket is given by its number in `weights`. Its share of the batches is in proportion to its weight, and at least
    one batch in a period.
    """
    counts = tuple(max(1, round(PERIOD * weight / sum(weights))) for weight in weights)  # in a period
    period, at = divmod(step, sum(counts))
    order = _order(counts, seed, period)
    before = np.bincount(order[:at], minlength=len(counts))
    return int(order[at]), [period * count + int(more) for count, more in zip(counts, before)]


@functools.lru_cache(maxsize=8)
def _order(counts, seed, period):
    """Returns the number of the bucket for each step of a period."""
    return np.random.default_rng([seed, period]).permutation(np.repeat(np.arange(len(counts)), counts))
