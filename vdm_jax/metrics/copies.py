"""Whether samples are copies of training clips: how near the nearest training clip is, beside held-out clips."""

import functools
import logging

import jax
import numpy as np

from vdm_jax.data import batches
from vdm_jax.metrics import shares

logger = logging.getLogger("vdm_jax")

BATCH = 64  # clips that are encoded at once


def measure(pipe, samples, held_out, count):
    """Returns the figures of `compare` for samples of a Pipeline and for held-out clips.

    A distance is the root mean square difference of the latents of the video.

    samples, held_out: videos, uint8 [P, F, H, W, 3].
    count: training clips to compare with, the first ones of the training.
    """
    config, system = pipe.config, pipe.system

    @jax.jit
    def encode(params, video):
        audio = np.zeros((len(video), system.layout.samples), np.float32)
        return system.encode(params, video, audio)["video"].reshape(len(video), -1)

    encode = functools.partial(encode, pipe.params)
    videos = np.concatenate([samples, held_out])
    clips = np.concatenate([encode(videos[i : i + BATCH]) for i in range(0, len(videos), BATCH)])
    examples = batches.Examples(batches.source(config), system.tokenize)
    steps = -(-count // BATCH)
    training = batches.batches(examples, batch_size=BATCH, seed=config.seed, start=0, stop=steps, data=config.data)
    nearest = np.full(len(samples) + len(held_out), np.inf)
    logger.info("looking for copies of %d training clips", steps * BATCH)
    for batch in training:
        nearest = np.minimum(nearest, distances(clips, np.asarray(encode(batch["video"]))).min(1))
    return compare(nearest[: len(samples)], nearest[len(samples) :]) | {"training_clips": steps * BATCH}


def distances(a, b):
    """Returns the root mean square differences of vectors a [N, D] and b [M, D]: [N, M]."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0) / a.shape[1])


def compare(samples, held_out):
    """Returns the median distances of both, their ratio, and the ends of its 95 % bootstrap interval.

    Samples that are copies have a ratio far below 1. samples, held_out: distances to the nearest training clip, [P].
    """

    def ratio(samples, held_out):
        return np.median(samples, -1) / np.median(held_out, -1)

    low, high = shares.bootstrap(ratio, samples, held_out)
    return {
        "samples_to_training": float(np.median(samples)),
        "held_out_to_training": float(np.median(held_out)),
        "ratio": float(ratio(samples, held_out)),
        "ratio_low": low,
        "ratio_high": high,
    }
