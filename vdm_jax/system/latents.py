"""What the denoiser needs of the earlier stages: their parameters, statistics of the latents, clips encoded once."""

import functools
import hashlib
import json
import logging
import threading

import jax
import numpy as np

from vdm_jax import sharding
from vdm_jax.data import batches
from vdm_jax.errors import UserError
from vdm_jax.run import folder, hosts, storage
from vdm_jax.run.progress import progress
from vdm_jax.system.layout import STAGES
from vdm_jax.system.losses import encode_batch

logger = logging.getLogger("vdm_jax")

ENCODE_BATCH = 32  # clips
CLIPS_PER_FILE = 64 * ENCODE_BATCH
OPEN_FILES = 512  # at a time
ENCODING_SECONDS = 24 * 3600  # longest wait for the slowest process to encode its share


def prepare(system, workdir, examples, mesh):
    """Returns (encoder_params on the mesh, examples) for training the denoiser.

    The encoders are rounded to the precision of exported weights, so that training has the same encoders as sampling.
    With config.denoiser.cached_clips = 0 the given data/batches.Examples are returned. With n > 0 they are encoded
    once, and the result is n Encoded clips in the folder of the run.
    Raises UserError where an earlier stage has no checkpoint, or a student has no teacher.
    """
    params = {name: folder.read_params(workdir, name, system.param_shapes[name])[0] for name in STAGES[:3]}
    params = folder.as_exported(params)
    path = workdir / "denoiser" / "statistics.json"
    if not hosts.broadcast_from_primary(path.exists()):
        statistics = measure(system, params, examples)
        if hosts.is_primary():
            folder.write_statistics(path, statistics)
        hosts.barrier("statistics", ENCODING_SECONDS)
    params["statistics"] = folder.read_statistics(path)
    if system.config.denoiser.cached_clips:
        examples = _cached(system, params, examples, workdir / "denoiser" / "latents")
    if "teacher" in system.models:
        teacher = system.config.denoiser.distillation.teacher
        if not teacher:
            raise UserError("a student needs a teacher: name exported weights in denoiser.distillation.teacher")
        expected = system.stages["denoiser"].encoder_shapes["teacher"]
        params["teacher"] = folder.read_exported(teacher, "denoiser", expected)
    return jax.device_put(params, sharding.state_shardings(params, mesh)), examples


def measure(system, params, examples):
    """Returns {modality: {'mean', 'std'}}, float32 [C], of at least config.denoiser.statistics_clips encoded clips."""
    count = system.config.denoiser.statistics_clips
    logger.info("measuring latent statistics on %d clips", count)
    latents = [batch["z"] for batch in _encoder(system, params, examples)(0, count)]

    def moments(*parts):
        x = np.concatenate(parts).astype(np.float64)
        x = x.reshape(-1, x.shape[-1])  # [clips * places, C]
        std = np.sqrt(np.maximum(x.var(0), 1e-8))
        return {"mean": x.mean(0).astype(np.float32), "std": std.astype(np.float32)}

    return jax.tree.map(moments, *latents)


def _encoder(system, params, examples):
    """Returns encoded_batches(first, count): the batches with clips `first` to `first + count - 1`.

    Clip n is the n-th clip in the shuffled order of training. The devices of this process encode together if their
    number divides ENCODE_BATCH, else one device does.
    """
    devices = jax.local_devices()
    devices = devices if ENCODE_BATCH % len(devices) == 0 else devices[:1]
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1) | {"data": len(devices)}, devices)
    params = jax.device_put(params, sharding.replicated(mesh))
    encode = jax.jit(functools.partial(encode_batch, system))

    def encoded_batches(first, count):
        start, stop = first // ENCODE_BATCH, -(-(first + count) // ENCODE_BATCH)
        order = dict(batch_size=ENCODE_BATCH, seed=system.config.seed, start=start, stop=stop)
        for batch in batches.batches(examples, data=system.config.data, **order):
            with jax.set_mesh(mesh):
                made = encode(params, jax.device_put(batch, sharding.batch_sharding(mesh)))
            yield jax.device_get(made)

    return encoded_batches


class Encoded:
    """A data source of encoded clips. `take` returns a batch in the form of `encode_batch`.

    A .npy file holds CLIPS_PER_FILE clips, on a disk or in a bucket. A clip is a record of a NumPy structured array.
    Any thread may read.
    """

    def __init__(self, paths, abstract_batch, count):
        self.paths, self.count, self.tree = paths, count, jax.tree.structure(abstract_batch)
        self.record = _record(abstract_batch)
        self.open = functools.lru_cache(OPEN_FILES)(self._open)

    def __len__(self):
        return self.count

    def take(self, numbers):
        """Returns the clips of these numbers as one tree, [B, ...]."""
        rows, size = np.empty(len(numbers), self.record), self.record.itemsize
        for i, number in enumerate(numbers):
            file, start = self.open(threading.get_ident(), number // CLIPS_PER_FILE)
            file.seek(start + number % CLIPS_PER_FILE * size)
            clip = file.read(size)
            if len(clip) < size:
                raise self._damaged(number // CLIPS_PER_FILE)
            rows[i] = np.frombuffer(clip, self.record)[0]
        return jax.tree.unflatten(self.tree, [np.ascontiguousarray(rows[name]) for name in self.record.names])

    def _open(self, thread, part):  # `thread` is only a key of the cache: each thread opens the file for itself
        file = storage.reader(self.paths[part])
        np.lib.format.read_magic(file)
        _, _, record = np.lib.format.read_array_header_1_0(file)
        if record != self.record:
            raise self._damaged(part)
        return file, file.tell()

    def _damaged(self, part):
        return UserError(f"{self.paths[part]} is damaged: remove it, to encode its clips anew")


def _record(abstract_batch):
    """Returns the NumPy type of one encoded clip: a field for each leaf of a batch, {'z/video': ...}."""
    leaves = sharding.named_leaves(abstract_batch)
    return np.dtype([(name, leaf.dtype, leaf.shape[1:]) for name, leaf in leaves.items()])


def _cached(system, params, examples, directory):
    """Returns the Encoded clips in `directory`. If anything in the fingerprint has changed, they are made again.

    Each process makes some of the files. A file gets its final name only when it is complete. After an
    interruption, the next run makes the missing files.
    """
    mark, mark_path = _fingerprint(system.config, params), directory / "fingerprint"
    count, abstract_batch = system.config.denoiser.cached_clips, system.stages["denoiser"].batch
    if hosts.is_primary() and not (mark_path.exists() and mark_path.read_text() == mark):
        if directory.exists():
            directory.rmtree()
        directory.mkdir(parents=True)
        mark_path.write_text(mark)
    hosts.barrier("folder", ENCODING_SECONDS)
    paths = [directory / f"clips_{part:05d}.npy" for part in range(-(-count // CLIPS_PER_FILE))]
    missing = [part for part, path in enumerate(paths) if not path.exists()]
    hosts.barrier("looked", ENCODING_SECONDS)  # no process writes before all have listed the missing files
    if missing:
        logger.info("encoding %d clips; %d of %d files are missing", count, len(missing), len(paths))
        encoded_batches = _encoder(system, params, examples)
        parts = missing[jax.process_index() :: jax.process_count()]  # of this process
        sizes = [min(CLIPS_PER_FILE, count - part * CLIPS_PER_FILE) for part in parts]
        with progress("encoding", sum(sizes), "clip") as advance:
            for part, clips in zip(parts, sizes):
                encoded = encoded_batches(part * CLIPS_PER_FILE, clips)
                _write(paths[part], encoded, _record(abstract_batch), clips)
                advance(clips)
    hosts.barrier("encoded", ENCODING_SECONDS)
    return Encoded(paths, abstract_batch, count)


def _write(path, encoded_batches, record, count):
    """Writes the first `count` clips of the batches as a .npy file of records. One batch at a time is in memory."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        descr = np.lib.format.dtype_to_descr(record)
        np.lib.format.write_array_header_1_0(file, dict(descr=descr, fortran_order=False, shape=(count,)))
        for batch in encoded_batches:
            rows = np.empty(min(count, ENCODE_BATCH), record)
            for name, leaf in zip(record.names, jax.tree.leaves(batch), strict=True):
                rows[name] = leaf[: len(rows)]
            file.write(rows.tobytes())
            count -= len(rows)
    unfinished.replace(path)


def _fingerprint(config, params):
    """A hash of the data settings, seed, number of clips, words of hard negatives, and parameters that encode."""
    denoiser, data = config.denoiser, config.data.to_json()
    settings = [CLIPS_PER_FILE, config.seed, denoiser.cached_clips, denoiser.hard_negatives.words, data]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
