"""From a data source to batches on devices.

The batch of step s is a pure function of (seed, s): its example j is number s * batch_size + j of an endless, seeded
shuffle. A source with epochs of its own, whose items come in a drawn order already, is asked for them in turn. A run
that resumes therefore sees the batches that it would have seen without the interruption, on any number of processes,
and no state of the data needs to be saved.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence

import absl.logging
import jax
import numpy as np

from vdm_jax.data import buckets
from vdm_jax.data.doom import CONTROL, Doom
from vdm_jax.data.files import Files
from vdm_jax.data.world import World
from vdm_jax.errors import UserError

_verbosity = absl.logging.get_verbosity()
absl.logging.set_verbosity(absl.logging.ERROR)  # grain warns when it is imported beside an older jaxlib
import grain  # noqa: E402

absl.logging.set_verbosity(_verbosity)

logger = logging.getLogger("vdm_jax")

CLIP = ("video", "audio", "control")  # arrays of an item; the last one is not in every source
HELD_OUT_SEED = 1_000_003  # added to the seed of the procedural world for clips that training never sees


def source(config, split="train", in_bucket=False, frames=None):
    """Returns the data source of config.data, split "train" or "held_out"; its items are {'video', 'audio', 'caption'}
    and with config.data.control {'control'}.

    in_bucket: only the videos of the bucket with data.frames and data.size, see data/buckets.py
    frames: of a clip; None: data.frames
    Raises UserError if the source cannot be opened.
    """
    data = config.data
    clip = dict(frames=frames or data.frames, size=data.size, fps=data.fps, sample_rate=data.sample_rate)
    control = tuple(data.get("control", ()))  # older weights have none
    if control and control != (known := CONTROL if data.source == "doom" else ()):
        raise UserError(f"data.source={data.source} has no control {control}: set data.control={known}")
    if data.source == "world":
        return World(config.seed + (HELD_OUT_SEED if split == "held_out" else 0), **clip, **data.world)
    if data.source == "files":
        if not data.path:
            raise UserError("data.path is empty: name the folder of videos, --config.data.path=FOLDER")
        shapes = buckets.parse_all(data.get("buckets", ())) if in_bucket else ()
        return Files(data.path, split=split, seed=config.seed, buckets=shapes, **clip, **data.files)
    if data.source == "doom":
        return Doom(config.seed, split, with_control=bool(control), **clip, **data.doom)
    from vdm_jax.data.tfds import Tfds  # imports tensorflow_datasets, which few runs need

    if split == "held_out" and not holds_out(config):
        logger.warning(
            "data.tfds.held_out is empty, so nothing is held out: validation and evaluation show training clips"
        )
    return Tfds(data_dir=data.path, seed=config.seed, part=split, **clip, **data.tfds)


def holds_out(config):
    """Returns whether training never sees the clips of split "held_out"."""
    return config.data.source != "tfds" or bool(config.data.tfds.get("held_out"))


@dataclasses.dataclass(eq=False)
class Examples:
    """The items of a data source as training examples."""

    source: Sequence
    tokenize: Callable  # texts -> tokens int32 [B, L]
    hard_negative: Callable[[str], str] | None = None  # caption -> wrong caption

    def __len__(self):
        return len(self.source)

    @property
    def in_epochs(self):
        """Whether the source shuffles its items itself, epoch by epoch."""
        return getattr(self.source, "in_epochs", False)

    @property
    def weight(self):
        """The number of videos; 1 for a source without any, which makes clips."""
        return len(getattr(self.source, "videos", "1"))

    def take(self, numbers):
        """Returns a batch of the items of these numbers.

        It is {'video', 'audio', 'tokens' int32 [B, L]}; with hard negatives it also has 'hard_negative' int32 [B, L],
        and where the source has control, 'control' float32 [B, F, A].
        """
        items = [self.source[number] for number in numbers]
        captions = [item["caption"] for item in items]
        batch = {part: np.stack([item[part] for item in items]) for part in CLIP if part in items[0]}
        batch["tokens"] = self.tokenize(captions)
        if self.hard_negative:
            batch["hard_negative"] = self.tokenize([self.hard_negative(caption) for caption in captions])
        return batch


def _order(items, seed):
    """Returns the numbers of the items in the order of training, without end."""
    if getattr(items, "in_epochs", False):
        return range(2**62)
    return grain.MapDataset.range(len(items)).seed(seed).shuffle().repeat()


def batches(items, *, batch_size, seed, start, data, rows=None, stop=None):
    """Returns an iterator of batches as NumPy arrays, from the batch of step `start` on.

    items: Examples, or another source whose `take(numbers)` returns a batch
    batch_size: examples of a batch, over all processes
    data: config.data, for the number of threads and of batches that are read ahead
    rows: numbers of the batch's examples that this process loads; None loads all
    stop: step after the last batch; None is endless
    """
    order = _order(items, seed)
    rows = range(batch_size) if rows is None else rows
    steps = grain.MapDataset.range(start, start + 2**31 - 1 if stop is None else stop)
    taken = steps.map(lambda step: items.take([int(order[step * batch_size + row]) for row in rows]))
    read = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.prefetch)
    return iter(taken.to_iter_dataset(read))


def in_buckets(items, weights, *, seed, start, **options):
    """Returns an iterator of (number of a bucket, batch), from step `start` on. See data/buckets.py.

    items: for each bucket, what `batches` takes
    weights: of the buckets
    options: further arguments of `batches`
    """
    _, before = buckets.schedule(weights, seed, start)
    streams = [batches(own, seed=seed, start=step, **options) for own, step in zip(items, before)]
    numbers = (buckets.schedule(weights, seed, step)[0] for step in itertools.count(start))
    return ((number, next(streams[number])) for number in numbers)


def sample_ids(items, weights, *, batch_size, seed, step):
    """Returns the numbers of the items in the batch of a step, to look at when that step has gone wrong.

    items, weights: as in `in_buckets`
    """
    bucket, before = buckets.schedule(weights, seed, step)
    order = _order(items[bucket], seed)
    return [int(order[before[bucket] * batch_size + row]) for row in range(batch_size)]


def sample_names(items, sources, weights, *, batch_size, seed, step):
    """Returns the samples of a step's batch for a message: their numbers, and the names of the files of a folder.

    items, weights: as in `in_buckets`
    sources: for each bucket, the Examples; where `items` has other objects, these hold the Examples in training order
    """
    bucket, _ = buckets.schedule(weights, seed, step)
    numbers = sample_ids(items, weights, batch_size=batch_size, seed=seed, step=step)
    examples = sources[bucket]
    name_of = getattr(examples.source, "name_of", None)
    if name_of is None:
        return numbers
    order = range(2**62) if items[bucket] is examples else _order(examples, seed)
    return [f"{number} ({name_of(int(order[number]))!r})" for number in numbers]


def to_devices(batch, sharding, batch_size):
    """Returns a batch as global arrays on the devices, made of the rows that each process loaded.

    batch: tree of arrays [rows of this process, ...]
    sharding: of each global array
    batch_size: rows of a global array, over all processes
    """
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:])), batch
    )
