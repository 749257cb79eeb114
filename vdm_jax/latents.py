"""What the denoiser needs of the earlier stages: their frozen weights, latent statistics, and clips encoded once."""

import contextlib
import hashlib
import json
import logging
import math
import threading

import jax
import numpy as np
from tqdm import tqdm

from vdm_jax import checkpoint, hosts, sharding, stages
from vdm_jax.data import pipeline

logger = logging.getLogger("vdm_jax")

ENCODE_BATCH = 32  # clips


def prepare(config, workdir, source, mesh):
    """-> (frozen, items) for training the denoiser.

    frozen: {stage: EMA params of the three earlier stages, 'statistics': ...}, on the mesh. items: `source` itself, or
    with config.denoiser.cached_clips > 0 a source of that many encoded clips, kept in the run's folder.
    """
    expected = stages.abstract_params(config)
    directory = workdir / "denoiser"
    params = {name: checkpoint.load_params(workdir, name, expected[name]) for name in checkpoint.STAGES[:3]}

    path = directory / "statistics.json"
    if not hosts.agreed(path.exists()):
        statistics = measure(config, params, source)
        if hosts.lead():
            checkpoint.write_statistics(path, statistics)
    else:
        statistics = checkpoint.read_statistics(path)
    frozen = {**params, "statistics": statistics}

    items = source
    if config.denoiser.cached_clips:
        items = _cached(config, frozen, source, directory / "latents")
    return jax.device_put(frozen, sharding.state_shardings(frozen, mesh)), items


def measure(config, params, source):
    """Per-channel mean and standard deviation of the latents of config.denoiser.statistics_clips training clips."""
    count = config.denoiser.statistics_clips
    logger.info("measuring latent statistics on %d clips", count)
    sums = {}
    for batch in _encoded_batches(config, params, source, count):
        for name, x in batch["z"].items():
            x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
            n, total, squares = sums.get(name, (0, 0.0, 0.0))
            sums[name] = n + len(x), total + x.sum(0), squares + np.square(x).sum(0)
    out = {}
    for name, (n, total, squares) in sums.items():
        mean = total / n
        std = np.sqrt(np.maximum(squares / n - mean**2, 1e-8))
        out[name] = {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}
    return out


def _encoded_batches(config, frozen, source, count):
    """Yields the source's first `count` training examples, encoded, in whole batches: {'z', 'text'[, 'near_miss']}.

    Each process encodes its share of a batch; all get the whole of it.
    """
    kinds = config.denoiser.near_misses

    @jax.jit
    def encode(frozen, batch):
        z = stages.encode(config, frozen, batch["video"], batch["audio"])
        texts = {"text": batch["tokens"]} | ({"near_miss": batch["near_miss"]} if kinds else {})
        return {"z": z, **{name: stages.encode_text(config, frozen, tokens) for name, tokens in texts.items()}}

    def to_example(item):
        return pipeline.example(item, config.data.text_length, kinds)

    own = -(-ENCODE_BATCH // jax.process_count())
    first, rows = jax.process_index() * own, jax.process_count() * own
    batches = pipeline.batches(
        source,
        batch_size=rows,
        rows=range(first, first + own),
        seed=config.seed,
        start=0,
        data=config.data,
        to_example=to_example,
    )
    alone = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.local_devices()[:1])
    for _ in tqdm(range(-(-count // rows)), "encode", disable=None if hosts.lead() else True, unit="batch"):
        with jax.set_mesh(alone):
            encoded = encode(frozen, next(batches))
        yield hosts.together(encoded)


class Encoded:
    """Encoded clips as a data source: {'z': latents, 'text': condition[, 'near_miss': condition]}."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays["text"]["pooled"])

    def take(self, numbers):
        """The items of these numbers as one: a leading axis more."""
        return jax.tree.map(lambda rows: rows.take(numbers), self.arrays)


class Rows:
    """An array in a .npy file, on a disk or in a bucket; rows are read as they are asked for, by any thread."""

    def __init__(self, path):
        self.path, self.thread = path, threading.local()
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(file)
            self.start = file.tell()

    def __len__(self):
        return self.shape[0]

    def take(self, numbers):
        if not hasattr(self.thread, "file"):
            self.thread.file = self.path.open("rb")
        file, size = self.thread.file, self.dtype.itemsize * math.prod(self.shape[1:])
        rows = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        for row, number in zip(rows, numbers, strict=True):
            file.seek(self.start + number * size)
            row[...] = np.frombuffer(file.read(size), self.dtype).reshape(self.shape[1:])
        return rows


def _cached(config, frozen, source, folder):
    """The cache in `folder` if it was made by these weights and this data, else made now. Half precision."""
    mark, vouches = _fingerprint(config, frozen), folder / "fingerprint"
    wanted = stages.abstract_batch(config, "denoiser")
    paths = jax.tree_util.tree_map_with_path(
        lambda path, _: folder / f"{sharding.path_name(path).replace('/', '_')}.npy", wanted
    )
    if not hosts.agreed(vouches.exists() and vouches.read_text() == mark):
        count = config.denoiser.cached_clips
        logger.info("encoding %d clips once", count)
        batches = _encoded_batches(config, frozen, source, count)
        if hosts.lead():
            folder.mkdir(parents=True, exist_ok=True)
            vouches.unlink(missing_ok=True)
            _write(paths, wanted, batches, count)
            vouches.write_text(mark)
        else:
            for _ in batches:
                pass
        hosts.agreed(True)  # now all may read
    return Encoded(jax.tree.map(Rows, paths))


def _write(paths, wanted, batches, count):
    """The first `count` rows of the batches as .npy files, of the types wanted; it holds one batch at a time."""
    with contextlib.ExitStack() as stack:
        files = []
        for path, want in zip(jax.tree.leaves(paths), jax.tree.leaves(wanted)):
            path.unlink(missing_ok=True)
            files.append(stack.enter_context(path.open("wb")))
            descr = np.lib.format.dtype_to_descr(np.dtype(want.dtype))
            header = dict(descr=descr, fortran_order=False, shape=(count, *want.shape[1:]))
            np.lib.format.write_array_header_1_0(files[-1], header)
        for batch in batches:
            batch = jax.tree.map(lambda want, x: np.asarray(x, want.dtype), wanted, batch)
            for file, rows in zip(files, jax.tree.leaves(batch)):
                file.write(rows[:count].tobytes())
            count -= min(count, len(rows))


def _fingerprint(config, frozen):
    digest = hashlib.sha256()
    c = config.denoiser
    digest.update(json.dumps([config.seed, c.cached_clips, c.near_misses, config.data.to_json()]).encode())
    for leaf in jax.tree.leaves(frozen):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
