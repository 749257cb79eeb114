"""What the denoiser needs of the earlier stages: their frozen weights, latent statistics, and clips encoded once."""

import functools
import hashlib
import json
import logging
import threading

import jax
import numpy as np
from tqdm import tqdm

from vdm_jax import sharding
from vdm_jax.data import batches as pipeline
from vdm_jax.errors import UserError
from vdm_jax.run import checkpoint, hosts, storage
from vdm_jax.system import codec as stages
from vdm_jax.system import hard_negatives

logger = logging.getLogger("vdm_jax")

ENCODE_BATCH = 32  # clips
PART = 64 * ENCODE_BATCH  # clips of one file
OPEN = 512  # files at a time
ENCODING = 24 * 3600  # seconds in which the slowest process must have encoded its share


def prepare(config, workdir, source, mesh):
    """-> (frozen, items) for training the denoiser.

    frozen: {stage: EMA params of the three earlier stages, 'statistics': ...}, on the mesh. items: `source` itself, or
    with config.denoiser.cached_clips > 0 a source of that many encoded clips, kept in the run's folder.
    """
    expected = stages.abstract_params(config)
    directory = workdir / "denoiser"
    params = {name: checkpoint.load_params(workdir, name, expected[name]) for name in checkpoint.STAGES[:3]}

    path = directory / "statistics.json"
    if not hosts.broadcast_from_primary(path.exists()):
        statistics = measure(config, params, source)
        if hosts.is_primary():
            checkpoint.write_statistics(path, statistics)
        hosts.barrier("statistics", ENCODING)
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
    for batch in _encoder(config, params, source)(0, count):
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


def _encoder(config, frozen, source):
    """-> batches(first, count): yields the source's training examples from number `first` on, encoded.

    In whole batches of ENCODE_BATCH, {'z', 'text'[, 'hard_negative']}, by all devices of this process.
    """
    kinds, devices = config.denoiser.hard_negatives.words, jax.local_devices()
    devices = devices if ENCODE_BATCH % len(devices) == 0 else devices[:1]
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1) | {"data": len(devices)}, devices)
    frozen = jax.device_put(frozen, sharding.replicated(mesh))

    @jax.jit
    def encode(frozen, batch):
        z = stages.encode(config, frozen, batch["video"], batch["audio"])
        texts = {"text": batch["tokens"]} | ({"hard_negative": batch["hard_negative"]} if kinds else {})
        return {"z": z, **{name: stages.encode_text(config, frozen, tokens) for name, tokens in texts.items()}}

    def to_example(item):
        return pipeline.example(item, config.data.text_length, hard_negatives.swapper(kinds))

    def batches(first, count):
        start, stop = first // ENCODE_BATCH, -(-(first + count) // ENCODE_BATCH)
        order = dict(batch_size=ENCODE_BATCH, seed=config.seed, start=start, stop=stop)
        for batch in pipeline.batches(source, data=config.data, to_example=to_example, **order):
            with jax.set_mesh(mesh):
                encoded = encode(frozen, jax.device_put(batch, sharding.batch_sharding(mesh)))
            yield jax.device_get(encoded)

    return batches


class Encoded:
    """Encoded clips as a data source: {'z': latents, 'text': condition[, 'hard_negative': condition]}.

    A clip is one record of a .npy file of PART, on a disk or in a bucket, read when it is asked for, by any thread.
    """

    def __init__(self, paths, wanted, count):
        self.paths, self.count, self.tree = paths, count, jax.tree.structure(wanted)
        self.record = _record(wanted)
        self.open = functools.lru_cache(OPEN)(self._open)

    def __len__(self):
        return self.count

    def take(self, numbers):
        """The items of these numbers as one: a leading axis more."""
        rows, size = np.empty(len(numbers), self.record), self.record.itemsize
        for i, number in enumerate(numbers):
            file, start = self.open(threading.get_ident(), number // PART)
            file.seek(start + number % PART * size)
            clip = file.read(size)
            if len(clip) < size:
                raise self._damaged(number // PART)
            rows[i] = np.frombuffer(clip, self.record)[0]
        return jax.tree.unflatten(self.tree, [np.ascontiguousarray(rows[name]) for name in self.record.names])

    def _open(self, thread, part):
        file = storage.reader(self.paths[part])
        np.lib.format.read_magic(file)
        _, _, record = np.lib.format.read_array_header_1_0(file)
        if record != self.record:
            raise self._damaged(part)
        return file, file.tell()

    def _damaged(self, part):
        return UserError(f"{self.paths[part]} is damaged: remove it, to encode its clips anew")


def _record(wanted):
    """The NumPy type of one encoded clip: a field for each leaf of a batch, {'z/video': ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(wanted)
    return np.dtype([(sharding.path_name(path), leaf.dtype, leaf.shape[1:]) for path, leaf in leaves])


def _cached(config, frozen, source, folder):
    """The cache in `folder` if it was made by these weights and this data, else made now. Half precision.

    Each process makes some of the files. One is there when it is whole, so encoding goes on where it was ended.
    """
    mark, vouches, count = _fingerprint(config, frozen), folder / "fingerprint", config.denoiser.cached_clips
    wanted = stages.abstract_batch(config, "denoiser")
    if hosts.is_primary() and not (vouches.exists() and vouches.read_text() == mark):
        if folder.exists():
            folder.rmtree()
        folder.mkdir(parents=True)
        vouches.write_text(mark)
    hosts.barrier("folder", ENCODING)
    paths = [folder / f"clips_{part:05d}.npy" for part in range(-(-count // PART))]
    missing = [part for part, path in enumerate(paths) if not path.exists()]
    hosts.barrier("looked", ENCODING)
    if missing:
        logger.info("encoding %d clips once, %d of %d files", count, len(missing), len(paths))
        batches = _encoder(config, frozen, source)
        own = missing[jax.process_index() :: jax.process_count()]
        sizes = [min(PART, count - part * PART) for part in own]
        with tqdm(
            total=sum(sizes), desc="encode", disable=None if hosts.is_primary() else True, unit="clip"
        ) as progress:
            for part, clips in zip(own, sizes):
                _write(paths[part], batches(part * PART, clips), _record(wanted), clips, progress)
    hosts.barrier("encoded", ENCODING)
    return Encoded(paths, wanted, count)


def _write(path, batches, record, count, progress):
    """The first `count` clips of the batches as a .npy file of records; it holds one batch at a time."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        descr = np.lib.format.dtype_to_descr(record)
        np.lib.format.write_array_header_1_0(file, dict(descr=descr, fortran_order=False, shape=(count,)))
        for batch in batches:
            rows = np.empty(min(count, ENCODE_BATCH), record)
            for name, leaf in zip(record.names, jax.tree.leaves(batch), strict=True):
                rows[name] = leaf[: len(rows)]
            file.write(rows.tobytes())
            count -= len(rows)
            progress.update(len(rows))
    unfinished.replace(path)


def _fingerprint(config, frozen):
    digest = hashlib.sha256()
    c = config.denoiser
    digest.update(
        json.dumps([PART, config.seed, c.cached_clips, c.hard_negatives.words, config.data.to_json()]).encode()
    )
    for leaf in jax.tree.leaves(frozen):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
