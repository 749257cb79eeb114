"""From a data source to batches on devices.

The batch at step s is a pure function of (seed, s): sample number s * batch_size + j of an endless, seeded shuffle.
A resumed run therefore sees the batches it would have seen, on any number of processes, and nothing about the data
needs saving.
"""

import grain
import jax
import numpy as np

from vdm_jax.data import text
from vdm_jax.data.files import Files
from vdm_jax.data.world import World
from vdm_jax.errors import UserError

HELD_OUT_SEED = 1_000_003  # added to the seed of the procedural world for clips that training never sees


def source(config, split="train"):
    """The data source of config.data; split is "train" or "held_out". Items: {'video', 'audio', 'caption', ...}."""
    data = config.data
    clip = dict(frames=data.frames, size=data.size, fps=data.fps, sample_rate=data.sample_rate)
    if data.source == "world":
        return World(config.seed + (HELD_OUT_SEED if split == "held_out" else 0), **clip, **data.world)
    if data.source == "files":
        if not data.path:
            raise UserError("data.path is empty: give the folder of videos, --config.data.path=FOLDER")
        return Files(data.path, split=split, seed=config.seed, **clip, **data.files)
    if data.source == "tfds":
        from vdm_jax.data.tfds import Tfds  # imports tensorflow_datasets, which few runs need

        return Tfds(data_dir=data.path, seed=config.seed, **clip, **data.tfds)
    raise UserError(f"data.source={data.source!r} is unknown: use world, files or tfds")


def example(item, text_length, hard_negative=None):
    """Returns a source's item as a training example: {'video', 'audio', 'tokens' int32 [L]}.

    item: {'video', 'audio', 'caption', ...}.
    text_length: L, tokens.
    hard_negative: a function caption -> hard negative (system/hard_negatives.py). It adds the field 'hard_negative',
        int32 [L]. None adds nothing.
    """
    caption = item["caption"]
    out = {"video": item["video"], "audio": item["audio"], "tokens": text.encode([caption], text_length)[0]}
    if hard_negative is not None:
        out["hard_negative"] = text.encode([hard_negative(caption)], text_length)[0]
    return out


class _Batches:
    """Random access to `rows` of the global batch of steps `start` to `stop`; take(numbers) gives items as one."""

    def __init__(self, order, take, batch_size, start, stop, rows):
        self.order, self.take, self.batch_size, self.rows = order, take, batch_size, rows
        self.start, self.stop = start, stop

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, step):
        first = (self.start + step) * self.batch_size
        return self.take([int(self.order[first + j]) for j in self.rows])


def batches(items, *, batch_size, seed, start, data, to_example=None, rows=None, stop=None):
    """Iterator of numpy batches, beginning with the batch of step `start`, endless or up to step `stop`.

    items: a random-access source; to_example maps one of its items to a dict of arrays. Or, without to_example, one
    whose take(numbers) gives several items as one. rows: which of the batch this process is to load (default: all).
    """

    def take(numbers):
        return jax.tree.map(lambda *leaves: np.stack(leaves), *[to_example(items[i]) for i in numbers])

    take = items.take if to_example is None else take
    stop = start + 2**31 - 1 if stop is None else stop
    batches = _Batches(_order(items, seed), take, batch_size, start, stop, range(batch_size) if rows is None else rows)
    read = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.prefetch)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(read))


def sample_ids(items, *, batch_size, seed, step):
    """Which of the source's items the batch of step `step` (from 0) holds: what to look at when a step went wrong."""
    order = _order(items, seed)
    return [int(order[step * batch_size + j]) for j in range(batch_size)]


def _order(items, seed):
    """The endless shuffle of the items' numbers."""
    return grain.MapDataset.range(len(items)).seed(seed).shuffle().repeat()


def to_devices(batch, sharding, batch_size):
    """Each process's rows -> one global array a leaf, of `batch_size` rows, split as `sharding` says."""

    def one(rows):
        return jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))

    return jax.tree.map(one, batch)
