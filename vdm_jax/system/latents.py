"""What the denoiser needs of the earlier stages: their parameters, statistics of the latents, clips encoded once."""

import functools
import hashlib
import json
import logging
import threading
import zlib

import jax
import numpy as np

from vdm_jax import sharding
from vdm_jax.data import batches
from vdm_jax.errors import UserError
from vdm_jax.run import checksums, folder, hosts, storage
from vdm_jax.run.progress import progress
from vdm_jax.system.layout import STAGES
from vdm_jax.system.losses import encode_batch

logger = logging.getLogger("vdm_jax")

ENCODE_BATCH = 32  # clips
CLIPS_PER_FILE = 64 * ENCODE_BATCH
OPEN_FILES = 512  # at a time
ENCODING_SECONDS = 24 * 3600  # longest wait for the slowest process to encode its share
FINGERPRINT = "fingerprint.json"  # what the cached clips were encoded from, in their folder
STATISTICS = "statistics.json"  # what the latents of denoiser.latents were scaled by, in their folder
MEANING = {  # {part of a fingerprint: what it stands for}
    "weights": "encoders or statistics",
    "data": "videos or captions",
    "settings": "settings (seed, data, cached_clips, hard negatives or memory)",
}
PARTS = tuple(MEANING)
MAKE = "make them with python -m vdm_jax.prepare --latents"
CRC = "crc32"  # first field of a cached clip


def prepare(systems, workdir, examples, mesh, run, store=False):
    """Returns (encoder_params on the mesh, examples) for training the denoiser.

    systems: one for each bucket, see System.in_buckets. The first one measures the statistics of the latents.
    examples: data/batches.Examples of each bucket

    The encoders are rounded to the precision of exported weights, so that training has the same encoders as sampling.
    With config.denoiser.cached_clips = 0 the given data/batches.Examples are returned. With n > 0 they are encoded
    once, and the result is n Encoded clips of each bucket, in the folder of the run. They may be in the folder
    denoiser.latents already.

    run: the number of the run
    store: whether clips that are missing in denoiser.latents are encoded now
    Raises UserError where denoiser.latents has clips of something else, an earlier stage has no checkpoint, a student
        has no teacher, or adapters have no base.
    """
    system = systems[0]
    trained = [name for name in STAGES[:3] if name in system.stages and name not in system.parts]
    params = {name: folder.read_params(workdir, name, system.param_shapes[name], run)[0] for name in trained}
    params = folder.as_exported(params)
    for name, part in system.parts.items():
        params[name] = part.read(mesh)
    given = system.config.denoiser.cached_clips and system.config.denoiser.latents
    parent = storage.given(given) if given else workdir / "denoiser" / "latents"
    shapes = [f"_{'x'.join(map(str, (own.layout.frames, *own.config.data.size)))}" for own in systems]
    folders = [parent.with_name(f"{parent.name}{shape}") for shape in shapes] if len(systems) > 1 else [parent]
    known, path, beside = system.known_statistics, workdir / folder.STATISTICS, folders[0] / STATISTICS
    params["statistics"] = known or _statistics(system, params, examples[0], path, run, beside if given else None)
    if system.config.denoiser.cached_clips:
        ready = (_begin_stored if store else _check_stored) if given else _make_current
        examples = [
            _cached(own, params, items, directory, ready) for own, items, directory in zip(systems, examples, folders)
        ]
        if store and not known and hosts.is_primary() and not beside.exists():
            folder.write_statistics(beside, params["statistics"], params, parts=system.parts)
    if "teacher" in system.models:
        teacher = system.config.denoiser.distillation.teacher
        if not teacher:
            raise UserError("a student needs a teacher: name exported weights in denoiser.distillation.teacher")
        expected = system.stages["denoiser"].encoder_shapes["teacher"]
        params["teacher"] = folder.read_exported(teacher, "denoiser", expected)
    if system.published and "base" in system.stages["denoiser"].encoder_shapes:
        params["base"] = system.read_published(mesh)
    elif "base" in system.stages["denoiser"].encoder_shapes:
        params["base"], of = folder.read_base(workdir, system, params["statistics"])
        if hosts.is_primary() and not (workdir / folder.BASE).exists():
            storage.write_json(workdir / folder.BASE, {"sha256": of})
    return jax.device_put(params, sharding.state_shardings(params, mesh)), examples


def _statistics(system, params, examples, path, run, beside=None):
    """Returns the statistics in a file. They are measured when it is missing or is of other weights.

    beside: file beside stored latents, for a run without any. Another machine would measure others, in the last bits.
    """
    shapes = system.stages["denoiser"].encoder_shapes["statistics"]
    encoders, stored, of = folder.encoders_hash(params, system.parts), None, None
    is_own = path.exists()
    if is_own:
        stored, of = folder.read_statistics(path, shapes, run)
    elif beside is not None and beside.exists():
        stored, of = folder.read_statistics(beside, shapes)
    current = stored is not None and of in (None, encoders)
    if stored is not None and not current:
        logger.info("%s is of other codecs or another text encoder: it is measured again", path if is_own else beside)
    current = hosts.broadcast_from_primary(current)
    statistics = stored if current else measure(system, params, examples)
    if hosts.is_primary() and not (is_own and of == encoders):
        storage.make_folder(path.parent)
        folder.write_statistics(path, statistics, params, run, system.parts)
    hosts.barrier("statistics", ENCODING_SECONDS)
    return folder.read_statistics(path, shapes, run)[0]


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
    Any thread may read. When a clip is read, it is compared with its CRC-32, which also covers its number and `mark`.
    """

    def __init__(self, paths, abstract_batch, count, mark):
        self.paths, self.count, self.tree = paths, count, jax.tree.structure(abstract_batch)
        self.record, self.mark = _record(abstract_batch), mark
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
            if not _is_whole(clip, size, number, self.mark):
                raise _damaged(self.paths[number // CLIPS_PER_FILE])
            rows[i] = np.frombuffer(clip, self.record)[0]
        return jax.tree.unflatten(self.tree, [np.ascontiguousarray(rows[name]) for name in self.record.names[1:]])

    def _open(self, thread, part):  # `thread` is only a key of the cache: each thread opens the file for itself
        file, record, _ = _open_clips(self.paths[part])
        if record != self.record:
            raise _damaged(self.paths[part])
        return file, file.tell()


def _open_clips(path):
    """Returns (binary file at its first clip, NumPy type of a clip, number of clips). Raises checksums.Damaged."""
    try:
        file = storage.reader(path)
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of the format")
        (count,), _, record = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # a damaged header can raise anything
        raise _damaged(path) from error
    return file, record, count


def _damaged(path):
    return checksums.Damaged(f"{path} is damaged: remove it, to encode its clips anew")


def _is_whole(clip, size, number, mark):
    """Returns whether the bytes of an encoded clip have its size and begin with its CRC-32."""
    return len(clip) == size and clip[:4] == _crc(clip[4:], number, mark)


def _crc(content, number, mark):
    """Returns the CRC-32 of a clip's number, of the mark of all clips and of the clip's content, as 4 bytes."""
    return zlib.crc32(content, zlib.crc32(f"{number} {mark}".encode())).to_bytes(4, "little")


def check(directory):
    """Compares all encoded clips in a folder with their CRC-32, and returns how many bytes it read.

    Raises UserError, which names the first file that is damaged.
    """
    mark, bytes_read = _mark(storage.read_json(directory / FINGERPRINT, "remove the folder, to encode anew")), 0
    for path in sorted(directory.glob("clips_*.npy")):
        file, record, count = _open_clips(path)
        with file:
            first, size = int(path.stem.removeprefix("clips_")) * CLIPS_PER_FILE, record.itemsize
            numbers = range(first, first + count)
            if not all(_is_whole(file.read(size), size, number, mark) for number in numbers) or file.read(1):
                raise _damaged(path)
            bytes_read += file.tell()
    return bytes_read


def _record(abstract_batch):
    """Returns the NumPy type of an encoded clip: its CRC-32, and a field for each leaf of a batch, {'z/video': ...}."""
    leaves = sharding.named_leaves(abstract_batch)
    return np.dtype([(CRC, "<u4"), *((name, leaf.dtype, leaf.shape[1:]) for name, leaf in leaves.items())])


def _cached(system, params, examples, directory, ready):
    """Returns the Encoded clips in `directory`.

    ready: (directory, fingerprint) -> None, which prepares or checks the folder: `_make_current` or `_check_stored`

    Each process makes some of the files. A file gets its final name only when it is complete. After an
    interruption, the next run makes the missing files.
    """
    if hosts.is_primary():
        ready(directory, _fingerprint(system.config, params, system.parts), examples.source)
    hosts.barrier("folder", ENCODING_SECONDS)
    mark = _mark(storage.read_json(directory / FINGERPRINT, "start the training again"))
    count, abstract_batch = system.config.denoiser.cached_clips, system.stages["denoiser"].batch
    paths = [_clips_file(directory, part) for part in range(-(-count // CLIPS_PER_FILE))]
    missing = [part for part, path in enumerate(paths) if not path.exists()]
    hosts.barrier("looked", ENCODING_SECONDS)  # no process writes before all have listed the missing files
    if missing:
        lacking = f"{len(missing)} of {len(paths)} files"
        logger.info("%s: encoding %d clips; %s are missing", directory.name, count, lacking)
        encoded_batches = _encoder(system, params, examples)
        parts = missing[jax.process_index() :: jax.process_count()]  # of this process
        sizes = [min(CLIPS_PER_FILE, count - part * CLIPS_PER_FILE) for part in parts]
        with progress("encoding", sum(sizes), "clip") as advance:
            for part, clips in zip(parts, sizes):
                first = part * CLIPS_PER_FILE
                _write(paths[part], encoded_batches(first, clips), _record(abstract_batch), first, clips, mark)
                advance(clips)
    hosts.barrier("encoded", ENCODING_SECONDS)
    return Encoded(paths, abstract_batch, count, mark)


def _clips_file(directory, part):
    return directory / f"clips_{part:05d}.npy"


def _write(path, encoded_batches, record, first, count, mark):
    """Writes the first `count` clips of the batches as a .npy file of records. One batch at a time is in memory.

    first: number of the first clip
    """
    numbers = iter(range(first, first + count))
    with storage.writing(path) as file:
        descr = np.lib.format.dtype_to_descr(record)
        np.lib.format.write_array_header_1_0(file, dict(descr=descr, fortran_order=False, shape=(count,)))
        for batch in encoded_batches:
            rows = np.empty(min(count, ENCODE_BATCH), record)
            for name, leaf in zip(record.names[1:], jax.tree.leaves(batch), strict=True):
                rows[name] = leaf[: len(rows)]
            for row, number in zip(rows, numbers):
                content = row.tobytes()[4:]
                file.write(_crc(content, number, mark) + content)
            count -= len(rows)


def _make_current(directory, fingerprint, source):
    """Empties the folder of encoded clips, if they have another fingerprint or their data differs from `source`."""
    begun = directory.exists()
    stored, fault = _stored(directory)
    fingerprint = _with_data(fingerprint, stored, source)
    changed = [part for part in PARTS if stored.get(part) != fingerprint[part]]
    if changed:
        if begun:
            logger.info("the cached clips are encoded again: %s", fault or f"other {' and '.join(changed)}")
        storage.make_folder(directory)
        for old in list(directory.iterdir()):
            old.rmtree() if old.is_dir() else old.unlink()
    if stored != fingerprint:
        storage.write_json(directory / FINGERPRINT, fingerprint)


def _begin_stored(directory, fingerprint, source):
    """Makes the folder of denoiser.latents. Raises UserError where it holds something else than these clips."""
    stored, fault = _stored(directory)
    if stored:
        _check_same(directory, fingerprint, stored, source)
    elif directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} holds something else than latents{fault and f' ({fault})'}: give another --out")
    else:
        storage.make_folder(directory)
        storage.write_json(directory / FINGERPRINT, _with_data(fingerprint, {}, source))


def _check_stored(directory, fingerprint, source):
    """Raises UserError unless the folder of denoiser.latents holds all clips that this training asks for."""
    stored, fault = _stored(directory)
    if not stored:
        raise UserError(f"{directory} holds no latents{fault and f' ({fault})'}: {MAKE}, or leave out denoiser.latents")
    _check_same(directory, fingerprint, stored, source)
    files = -(-fingerprint["clips"] // CLIPS_PER_FILE)
    lacking = sum(not _clips_file(directory, part).exists() for part in range(files))
    if lacking:
        raise UserError(f"{directory} lacks {lacking} of {files} files: {MAKE}, which goes on there")


def _check_same(directory, fingerprint, stored, source):
    """Raises UserError where the clips in a folder were encoded from something else."""
    fingerprint = _with_data(fingerprint, stored, source)
    changed = [f"other {MEANING[part]}" for part in PARTS if stored.get(part) != fingerprint[part]]
    if changed:
        raise UserError(f"{directory} has the latents of {' and '.join(changed)}: {MAKE} --out=NEW")


def _stored(directory):
    """Returns (the fingerprint of a folder of encoded clips, {} without a good one; what is wrong with it)."""
    if not directory.exists():
        return {}, ""
    try:
        return storage.read_json(directory / FINGERPRINT, "it tells what the clips were encoded from"), ""
    except UserError as error:
        return {}, str(error)


def _with_data(fingerprint, stored, source):
    """Returns a fingerprint with the hash of the data. Files that `stored` knows are not read again."""
    files = source.fingerprint(stored.get("files", {})) if hasattr(source, "fingerprint") else {}
    # The time of a file is not part of the data: a copy of the folder is the same data.
    data = [[name, size, crc, captions] for name, (size, _, crc, captions) in sorted(files.items())]
    data += [fingerprint["data"]] if fingerprint["data"] else []
    return {**fingerprint, "data": _hash(data), "files": files}


def _mark(fingerprint):
    """Returns the text that enters the CRC-32 of each encoded clip."""
    return " ".join(str(fingerprint.get(part)) for part in PARTS)


def _fingerprint(config, params, parts):
    """Returns hashes of the parameters that encode, of a data set, and of the settings that decide what is encoded."""
    denoiser, data = config.denoiser, config.data.to_dict()
    of_data = data["hash"] if data["source"] == "tfds" else ""  # for a folder of videos, see `_with_data`
    if of_data:  # a data set that only moved is the same data
        del data["path"], data["tfds"]["name"]
    unused = {"hash", "threads", "prefetch", "world", "files", "tfds", "doom"} - {data["source"]}
    unused |= set() if data.get("control") else {"control"}
    unused |= {"path"} if data["source"] == "files" else set()  # a folder that only moved is the same data
    data = {key: value for key, value in data.items() if key not in unused}
    settings = [CLIPS_PER_FILE, config.seed, denoiser.cached_clips, denoiser.hard_negatives.words, data]
    if denoiser.memory.windows > 1:
        settings += [denoiser.memory.windows, config.sample.context_frames]
    digest = hashlib.sha256()
    for name in sorted(params):
        if name in parts:
            digest.update(parts[name].fingerprint.encode())
        else:
            for leaf in jax.tree.leaves(params[name]):
                digest.update(np.asarray(leaf).tobytes())
    return {"weights": digest.hexdigest(), "data": of_data, "settings": _hash(settings), "clips": denoiser.cached_clips}


def _hash(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
