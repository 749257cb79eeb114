"""Hard negatives: captions that are wrong by one or two words, and the loss that teaches the denoiser to reject them.

The diffusion loss hardly changes when two words of a caption swap places, so the denoiser does not learn which object
has which direction. The loss here makes the denoiser a classifier of two captions (arXiv:2303.16203): with the right
caption its error must be lower than with the hard negative.
"""

import functools
import itertools
import math
import re
import zlib
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax import diffusion
from vdm_jax.errors import UserError

BATCH_KEY = "hard_negative"  # batch[BATCH_KEY] holds one hard negative per clip, as tokens or as encoded text


def swap_words(caption, groups):
    """Returns the hard negative of a caption: two words of one group, such as ("left", "right"), swap places.

    If no group has two different words in the caption, one word is replaced by another of its group. A caption without
    any word of a group is returned as it is. The draw depends only on the caption and the groups.

    groups: tuples of words. An entry may be several words, such as "to the left", or synonyms, such as "red|scarlet".
        Synonyms never replace each other.
    """
    rng = np.random.default_rng(zlib.crc32(caption.encode("utf-8", errors="replace")))
    pattern, tables = _pattern_and_tables(groups)
    words = pattern.split(caption)  # words[1], words[3], ... are words of the groups, the others the text between them
    words[1::2] = [word.lower() for word in words[1::2]]
    swaps, replacements = [], []  # changes {place: new word}
    for table in tables:
        found = [i for i, word in enumerate(words) if word in table]
        pairs = itertools.combinations(found, 2)
        swaps += [{i: words[j], j: words[i]} for i, j in pairs if table[words[i]] != table[words[j]]]
        replacements += [{i: word} for i in found for word in table if table[word] != table[words[i]]]
    changes = swaps or replacements
    if not changes:
        return caption
    for i, word in changes[rng.integers(len(changes))].items():
        words[i] = word
    wrong = "".join(words)
    return wrong[0].upper() + wrong[1:] if caption[0].isupper() else wrong


def check_groups(where, groups):
    """Raises UserError unless `groups` are as `swap_words` takes them. where: the setting, for the message."""
    for group in groups:
        entries = group if isinstance(group, tuple) and all(isinstance(entry, str) for entry in group) else ()
        words = "|".join(entries).split("|")
        if len(entries) < 2 or any(not word or word != word.strip().lower() for word in words):
            raise UserError(
                f"{where} has the group {group!r}: give two words or more, in small letters and without spaces around "
                'them, such as ("left", "right")'
            )


@functools.lru_cache
def _pattern_and_tables(groups):
    """(a pattern that finds words of the groups, the longest first; for each group {word: number of its entry})."""
    tables = [{word: n for n, entry in enumerate(group) for word in entry.split("|")} for group in groups]
    words = sorted({word for table in tables for word in table}, key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(map(re.escape, words))})\b", re.IGNORECASE), tables


class Pairs(NamedTuple):
    """P noised clips, each once with the right caption and once with its hard negative: 2 P rows for the network."""

    z_t: dict  # noised latents, [2 P, ...] per modality; rows 2 i and 2 i + 1 are clip i
    log_snr: dict  # [2 P, T] per modality
    cond: dict  # conditions, [2 P, ...]; row 2 i is the right caption, row 2 i + 1 the hard negative
    target: jax.Array  # what the network should predict of the video, [P, T, h, w, C]
    error_factor: jax.Array  # turns a squared error of the target into one of eps, [P, 1]
    differ: jax.Array  # bool [P]: False if both captions are the same, because no word could change


def make_pairs(key, z, right, wrong, target, config):
    """Returns a pair for each of the clips 0, config.every, 2 * config.every, ... of a batch.

    Both rows of a clip have the same noise and the same noise level, which is one number for all of the clip. The noise
    levels of the clips are evenly spaced over config.log_snr.

    z: clean latents of both modalities, [B, ...].
    right, wrong: conditions, trees of arrays [B, ...]: the captions and their hard negatives.
    target: what the network predicts, one of diffusion.TARGETS.
    config: config.denoiser.hard_negatives.
    """
    every = config["every"]
    z, right, wrong = jax.tree.map(lambda x: x.reshape(-1, every, *x.shape[1:])[:, 0], (z, right, wrong))  # [P, ...]
    level_key, noise_key = jax.random.split(key)
    count, frames = z["video"].shape[:2]
    low, high = config["log_snr"]
    level = low + (high - low) * diffusion.stratified_uniform(level_key, count, 1)  # [P, 1]
    log_snr = {name: jnp.broadcast_to(level, (count, frames)) for name in z}

    x = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), z)
    eps = diffusion.noise_like(noise_key, x)
    z_t = diffusion.add_noise(x, eps, log_snr)
    differ = jax.tree.map(lambda a, b: jnp.any((a != b).reshape(count, -1), 1), right, wrong)  # bool [P] per array

    def interleave(a, b):  # the rows of a clip are neighbors, so that on a mesh one device has both
        return jax.tree.map(lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]), a, b)

    return Pairs(
        z_t=interleave(z_t, z_t),
        log_snr=interleave(log_snr, log_snr),
        cond=interleave(right, wrong),
        target=diffusion.to_target(x, eps, log_snr, target)["video"],
        error_factor=diffusion.eps_error_factor(level, target),
        differ=jnp.any(jnp.stack(jax.tree.leaves(differ)), 0),
    )


def classification_loss(prediction, pairs, config):
    """Returns the loss of a prediction for Pairs: (float32 scalar, metrics).

    The error of eps in the video, summed over a clip, stands for -log p(clip | caption): arXiv:2303.16203, section 3.
    With logit = (error with the hard negative) - (error with the right caption),

        loss = weight * mean of softplus(-logit) + anchor * mean of (error with the right caption).

    The first mean is over the clips whose captions differ. The metrics are `hard_negative_loss`, the first mean, and
    `hard_negative_accuracy`, the share of the same clips with logit > 0. Both are nan if no captions differ.
    """
    chex.assert_equal_shape([prediction["video"], pairs.z_t["video"]])
    differ = pairs.differ
    target = pairs.target.reshape(len(differ), 1, -1)  # [P, 1, T*h*w*C]
    both = prediction["video"].reshape(len(differ), 2, -1).astype(target.dtype)  # [P, 2, T*h*w*C]
    squares = jnp.square(both - target).sum(2)  # [P, 2]
    error_right, error_wrong = (pairs.error_factor * squares).T  # [P] each
    logit = error_wrong - error_right
    total = jnp.where(differ, jax.nn.softplus(-logit), 0).sum()
    loss = config["weight"] * total / jnp.maximum(differ.sum(), 1) + config["anchor"] * error_right.mean()
    accuracy = (differ & (logit > 0)).sum() / differ.sum()
    return loss, {"hard_negative_loss": total / differ.sum(), "hard_negative_accuracy": accuracy}


def call_together(denoise_fn, rows_a, rows_b):
    """Returns the predictions for two batches, (prediction_a, prediction_b), by one call of the network.

    A program with two calls takes twice as long to compile. The call takes the rows of both batches in turns, for
    example 3 rows of the first, 2 of the second, 3 of the first, 2 of the second. A device of a mesh holds consecutive
    rows of a batch. In this order no row moves to another device when the batches are joined.
    """
    count_a, count_b = (len(jax.tree.leaves(rows)[0]) for rows in (rows_a, rows_b))
    turns = math.gcd(count_a, count_b)
    a_per_turn = count_a // turns  # rows

    def join(a, b):
        parts = [x.reshape(turns, -1, *x.shape[1:]) for x in (a, b)]  # [turns, rows in a turn, ...]
        return jnp.concatenate(parts, 1).reshape(-1, *a.shape[1:])

    def part(rows):
        return jax.tree.map(lambda x: x.reshape(turns, -1, *x.shape[1:])[:, rows].reshape(-1, *x.shape[1:]), prediction)

    prediction = denoise_fn(*jax.tree.map(join, rows_a, rows_b))
    return part(slice(a_per_turn)), part(slice(a_per_turn, None))
