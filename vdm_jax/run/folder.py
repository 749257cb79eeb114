"""The folder of a run, and the folder of exported weights.

    <workdir>/config.json, starts.jsonl           the config of the run, and what changed it; see record.py
    <workdir>/lock                                held by the training that is running
    <workdir>/<stage>/checkpoints/<step>/         see checkpoint.py
    <workdir>/denoiser/statistics.json            mean and standard deviation of the latents
    <workdir>/denoiser/base.json                  with adapters: a hash of the weights that they change

    <weights>/config.json, statistics.json        as above; config.json is the config in force
    <weights>/changes.jsonl                       the changes in starts.jsonl, if there are any
    <weights>/<stage>.safetensors                 parameters in half precision, and the step that they are from
    <weights>/README.md                           see card.py
    <weights>/checksums.txt                       see checksums.py

This file knows no models. What a folder should hold is an argument, `expected`: a tree of ShapeDtypeStruct.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors.numpy
from etils import epath
from safetensors import SafetensorError

from vdm_jax import lora, settings
from vdm_jax.errors import SaveError, UserError, one_of
from vdm_jax.run import card, checkpoint, checksums, hosts, record, storage
from vdm_jax.sharding import named_leaves, path_name

logger = logging.getLogger("vdm_jax")

REFERENCE = epath.Path(__file__).parents[1] / "reference"  # the weights that ship with the package
STATISTICS = "denoiser/statistics.json"  # in the folder of a run
STATISTICS_FIX = f"remove it, and train the denoiser, which measures it anew, or {record.FIX}"
BASE = "denoiser/base.json"  # in the folder of a run
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def given(path):
    """Returns the folder that a setting names; "reference" names the weights of this package."""
    return REFERENCE if path == "reference" else storage.given(path)


@contextlib.contextmanager
def exclusive_lock(workdir):
    """Makes the folder of a run, and locks it against other trainings. A bucket has no locks. Raises UserError."""
    if not hosts.is_primary() or storage.in_bucket(workdir):
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        held = open(workdir / "lock", "a")
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from None
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another training is running in {workdir}: stop it, or use another --workdir") from None
        except OSError:
            pass  # a file system without locks
        yield


def is_training(workdir):
    """Returns whether a training holds the lock of a run. It does not see a training in a bucket."""
    try:
        with open(workdir / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no training has begun, or a file system without locks
    return False


@contextlib.contextmanager
def explain_disk_faults(workdir, stage):
    """Turns the OSError of a disk or a lost folder into a UserError that names the newest checkpoint of a stage."""
    try:
        yield
    except (OSError, UserError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__  # storage.writing raises a UserError from it
        lost = isinstance(cause, FileNotFoundError) and str(workdir) in str(cause.filename)
        if getattr(cause, "errno", None) not in DISK_FAULTS and not lost:
            raise
        fault = "it, or a part of it, was deleted, moved or replaced" if lost else cause.strerror
        newest = newest_step(workdir, stage)
        left = "there is no checkpoint" if newest is None else f"step {newest} is the newest checkpoint"
        raise SaveError(f"{stage}: cannot write in {workdir}: {fault}; {left}") from None


def newest_step(workdir, stage):
    """Returns the step of the newest checkpoint of a stage, or None when there is none."""
    return max(checkpoint.steps(epath.Path(workdir) / stage / "checkpoints"), default=None)


def done_step(workdir, stage):
    """Returns the newest step that a stage has saved, or None. A folder that holds no such step does not count."""
    directory = workdir / stage / "checkpoints"
    own = (step for step in checkpoint.steps(directory) if checkpoint.has_own_step(directory / str(step)))
    return max(own, default=None)


def read_config(folder):
    """Returns the config in force of a run or of exported weights, locked. Lists become tuples. Raises UserError."""
    if not (folder / "config.json").exists():
        if folder == REFERENCE:
            raise UserError("this installation has no reference weights: give --workdir of a trained run")
        if not folder.exists():
            raise UserError(f"there is no folder {folder}: check the path of the run or of the weights")
        raise UserError(
            f"{folder} is neither a run nor exported weights, because it has no config.json: give another folder, or "
            f"train a run with python -m vdm_jax.train --config=FILE --workdir={folder}"
        )

    def as_tuples(value):
        if isinstance(value, dict):
            return {k: as_tuples(v) for k, v in value.items()}
        return tuple(map(as_tuples, value)) if isinstance(value, list) else value

    return ml_collections.ConfigDict(as_tuples(record.read(folder, is_exported(folder))[0])).lock()


def is_exported(folder):
    """Returns whether a folder holds exported weights, and no run."""
    return any((folder / f"{stage}.safetensors").exists() for stage in settings.STAGES)


def run_number(workdir):
    """Returns the number of a run, which its checkpoints and statistics name. Raises UserError for a damaged record."""
    return record.read(workdir)[1]


def write_config(workdir, config, stages, change=False, unverified=False):
    """Writes the config.json of a new run, or adds a row to starts.jsonl of a run that goes on. All processes call it.

    stages: those that this start trains.
    change: whether the user allows changes of the training.
    unverified: whether the user accepts files of the run that have no checksums, or are of another run.
    Returns the number of the run. Raises UserError, and writes nothing, for a change that is refused; see
    settings.changes. It raises UserError, too, when the config.json of a run is missing or damaged, and when the folder
    holds exported weights.
    """
    if is_exported(workdir):
        raise UserError(
            f"{workdir} holds exported weights, and no run: give another --workdir, or make a run of them with "
            f"python -m vdm_jax.weights import --weights={workdir} --workdir=NEW"
        )
    path, run, made = workdir / "config.json", None, None
    directories = [workdir / stage / "checkpoints" for stage in settings.STAGES]
    saved = [directory / str(step) for directory in directories for step in checkpoint.steps(directory)]
    done = {stage: done_step(workdir, stage) for stage in settings.STAGES}
    if path.exists():
        before, run = record.read(workdir, unverified)
        if saved and not unverified and not any(checkpoint.is_of(folder, run) for folder in saved):
            raise UserError(f"{path} is of run {run}, and no checkpoint in {workdir} is: {record.FIX}")
        measured = (workdir / STATISTICS).exists()
        made = settings.changes(workdir, settings.flat(before), record.of(config), done, stages, measured, change)
        for key, (old, new) in made.items():
            logger.info("%s: %r before, %r from this start on", key, old, new)
    elif not unverified and (saved or (workdir / record.NAME).exists()):
        raise UserError(f"{path} is missing, but {workdir} holds a run: {record.FIX}")
    # Nothing is written before every process has read the old files.
    run = hosts.broadcast_from_primary(record.new_number() if run is None else run)
    if hosts.is_primary():
        if made is None:
            record.begin(workdir, run, config)
        else:
            record.append(workdir, run, done, made)
        if unverified:
            for folder in saved:
                checkpoint.accept(folder, run)
            if (path := workdir / STATISTICS).exists():
                storage.write_json(path, storage.read_json(path, STATISTICS_FIX, sealed=False) | {record.RUN: run})
    return run


def read_statistics(path, expected, run=None):
    """Returns (statistics of the latents, `encoders_hash` of the parameters that they were measured with).

    The statistics are {modality: {'mean' [C], 'std' [C]}}, float32. The hash is None in a file of an earlier version.

    expected: a tree of ShapeDtypeStruct
    run: the number of the run that they should be of; None in exported weights, whose checksums.txt covers the file
    Raises UserError when the file is damaged, or when a value is not finite or a 'std' is not above 0.
    """
    fix = STATISTICS_FIX
    stored = storage.read_json(path, fix, sealed=run is not None)
    encoders, of = stored.pop("encoders", None), stored.pop(record.RUN, None)
    if run not in (None, of):
        raise UserError(f"{path} is of another run: {fix}")
    try:
        arrays = {f"{m}/{name}": np.asarray(x, np.float32) for m, pair in stored.items() for name, x in pair.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): {fix}") from None
    checkpoint.check_arrays(path, arrays, named_leaves(expected))
    for name, x in arrays.items():
        if not np.isfinite(x).all() or name.endswith("std") and x.min() <= 0:
            raise UserError(f"{path} is damaged (a value of {name} is not possible): {fix}")
    return jax.tree_util.tree_map_with_path(lambda p, x: arrays[path_name(p)], expected), encoders


def write_statistics(path, statistics, params, run=None, parts=None):
    """Writes the statistics of the latents, with the hash of the encoders in {stage: parameters}.

    run: the number of the run that they are of; None in exported weights
    parts: see `encoders_hash`
    """
    lists, number = jax.tree.map(lambda x: np.asarray(x).tolist(), statistics), {} if run is None else {record.RUN: run}
    storage.write_json(path, lists | {"encoders": encoders_hash(params, parts)} | number)


def encoders_hash(params, parts=None):
    """Returns a hash of the autoencoders and the text encoder in {stage: parameters}, as `weights_hash` does.

    parts: System.parts, whose hashes take the place of their parameters
    """
    parts = parts or {}
    names = [name for name in settings.STAGES[:3] if name in params]
    trained = weights_hash({name: params[name] for name in names if name not in parts})
    hashes = [parts[name].fingerprint for name in names if name in parts]
    return hashlib.sha256("".join([trained, *hashes]).encode()).hexdigest() if hashes else trained


def weights_hash(params):
    """Returns a hash of parameters and their names, in the precision of exported weights."""
    digest = hashlib.sha256()
    for name, x in named_leaves(params).items():
        digest.update(name.encode() + np.asarray(x, np.float16).tobytes())
    return digest.hexdigest()


def read_base(workdir, system, statistics):
    """Returns (the denoiser's parameters that the adapters of a run change, their `weights_hash`).

    The parameters have the precision of exported weights, so a run and its exported weights are the same base.

    statistics: of the latents in the run
    Raises UserError when they cannot be read, do not fit the run, or are others than those at its start.
    """
    config = system.config
    if not config.denoiser.lora.base:
        raise UserError("adapters need a base: name a run, exported weights or reference in denoiser.lora.base")
    source = given(config.denoiser.lora.base)
    trained_with = read_config(source)
    if lora.active(trained_with.denoiser):
        raise UserError(
            f"denoiser.lora.base={source} has adapters itself: merge them with python -m vdm_jax.weights export, and "
            "name the exported weights"
        )
    settings.check_diffusion(record.of(trained_with), record.of(config), f"give the old value, which {source} has")
    expected = system.param_shapes["denoiser"]
    if (source / "denoiser.safetensors").exists():
        params = read_exported(source, "denoiser", expected)
        of_base, _ = read_statistics(source / "statistics.json", statistics)
    else:
        run = run_number(source)
        params = read_params(source, "denoiser", expected, run)[0]
        of_base, _ = read_statistics(source / STATISTICS, statistics, run)
    if not all(jax.tree.leaves(jax.tree.map(np.array_equal, of_base, statistics))):
        raise UserError(
            f"the latents of {workdir} have another mean and scale than those of denoiser.lora.base={source}: make the "
            f"run with python -m vdm_jax.weights import --weights={source} --config=FILE --workdir=NEW"
        )
    found, path = weights_hash(params), workdir / BASE
    if path.exists():
        if storage.read_json(path, "restore it from a copy").get("sha256") != found:
            raise UserError(
                f"denoiser.lora.base={source} differs from the weights that {workdir} began with, which its adapters "
                "change: name these weights"
            )
    elif newest_step(workdir, "denoiser"):
        raise UserError(f"{path} is missing: restore it from a copy")
    return as_exported(params), found


class Weights(NamedTuple):
    """A system and its trained parameters, ready to sample from or to train further."""

    system: Any
    params: dict  # {stage: EMA parameters}; with the denoiser also 'statistics', see `read_statistics`
    steps: dict  # {stage: the step that its parameters are from}


def read_system(source, build, parts=None):
    """Returns build(config) for the config of a run or of exported weights. Raises UserError.

    parts: {part, of settings.SOURCES: its folder of today}, for parts that are no longer where the config has them
    """
    config = read_config(source)
    for key, path in (parts or {}).items():
        if not config.get(one_of("part", key, settings.SOURCES), {}).get("source"):
            raise UserError(f"{source} has its own {key}: leave out {key}={path}")
        with config.unlocked():
            config[key].source = os.fspath(path)
    try:
        return build(config)
    except UserError:
        raise
    except Exception as error:  # a damaged or outdated config.json can raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"{source}/config.json does not fit this version ({reason}): train again, or restore the file"
        ) from error


def load(source, build, stages=None, unverified=False, parts=None):
    """Returns the Weights of a run or of exported weights. Raises UserError when something is missing or damaged.

    The adapters of a run are merged into its denoiser, and its config is `lora.without` them.

    source: see the top of this file; None or "reference" for the reference weights.
    build: build(config) returns the system, whose `param_shapes` are {stage: tree of ShapeDtypeStruct}.
    stages: names of the stages to read; None for all.
    unverified: accepts exported weights that have no checksums.txt.
    parts: see `read_system`
    """
    source = given("reference" if source is None else source)
    exported, stages = is_exported(source), stages or settings.STAGES
    if exported:
        present = [f"{stage}.safetensors" for stage in stages if (source / f"{stage}.safetensors").exists()]
        try:
            checksums.check(source, ["config.json", "statistics.json", *present])
        except checksums.Unverified as error:
            if not unverified:
                raise UserError(
                    f"{error}, or import the weights with python -m vdm_jax.weights import --unverified "
                    f"--weights={source} --workdir=NEW"
                ) from None
    system = read_system(source, build, parts)
    if system.published:
        raise UserError(
            f"{source} trains the denoiser of a published model: only python -m vdm_jax.sample --workdir={source} and "
            "python -m vdm_jax.weights export take it"
        )
    run = None if exported else run_number(source)
    params, steps = {}, {}
    for stage in stages:
        if stage in system.parts:
            params[stage] = system.parts[stage].read()
            continue
        if exported:
            read = read_safetensors(source / f"{stage}.safetensors", system.param_shapes[stage])
        else:
            read = read_params(source, stage, system.stages[stage].param_shapes, run)
        params[stage], steps[stage] = read
    if "denoiser" in params:
        path = source / ("statistics.json" if exported else STATISTICS)
        shapes = system.stages["denoiser"].encoder_shapes["statistics"]
        params["statistics"], encoders = read_statistics(path, shapes, run)
        if params.keys() > system.param_shapes.keys() and encoders not in (None, encoders_hash(params, system.parts)):
            logger.warning(
                "%s is of other codecs or another text encoder: train the denoiser further, or restore the file", path
            )
        if adapters := not exported and lora.active(system.config.denoiser):
            base, _ = read_base(source, system, params["statistics"])
            params["denoiser"] = lora.merge(base, params["denoiser"], adapters.alpha)
            system = build(lora.without(system.config))
    return Weights(system, params, steps)


def read_params(workdir, stage, expected, run):
    """Returns (the EMA parameters in the newest checkpoint of a stage, as NumPy arrays; its step). Raises UserError.

    run: the number of the run
    """
    step = newest_step(workdir, stage)
    if step is None:
        raise UserError(
            f"{workdir} is unfinished: stage {stage} has no checkpoint; train it with "
            f"python -m vdm_jax.train --config=FILE --workdir={workdir} --stage={stage}"
        )
    try:
        stored = checkpoint.read(epath.Path(workdir) / stage / "checkpoints" / str(step), {"ema": expected}, run)
    except checksums.Damaged as error:
        raise UserError(f"{error}; or continue training with --stage={stage}, from the checkpoint before") from None
    return stored["ema"], step


def write_exported(folder, weights, workdir, outcomes=None, license=""):
    """Writes Weights as exported weights, with their checksums, and with the model card and changes of their run.

    workdir: the run or the exported weights that they are from
    outcomes, license: see card.text
    Weights of an earlier export in the folder are replaced. Other files in it are left alone, and get no checksum.
    Raises UserError, and writes nothing, where the folder holds a run, or a README.md that no export has written.
    """
    folder, workdir = storage.make_folder(folder), storage.given(workdir)
    if (folder / "config.json").exists() and not is_exported(folder):
        raise UserError(f"{folder} has a config.json, but no exported weights: give a new --out")
    if (folder / card.NAME).exists() and not checksums.is_unchanged(folder, card.NAME):
        raise UserError(f"{folder / card.NAME} would be lost, and is not as an export wrote it: move it away")
    files = {}
    for stage in settings.STAGES:
        if stage not in weights.steps:
            (folder / f"{stage}.safetensors").unlink(missing_ok=True)
    for stage, step in weights.steps.items():
        path = folder / f"{stage}.safetensors"
        write_safetensors(path, weights.params[stage], step)
        with path.open("rb") as file:
            files[stage] = hashlib.file_digest(file, "sha256").hexdigest()
    storage.replace(folder / "config.json", weights.system.config.to_json_best_effort(indent=1) + "\n")
    statistics, parts = weights.params["statistics"], weights.system.parts
    write_statistics(folder / "statistics.json", statistics, weights.params, parts=parts)
    changes = record.write_changes(workdir, folder)
    base = storage.read_json(workdir / BASE, "restore it from a copy") if (workdir / BASE).exists() else {}
    sha256 = base.get("sha256", "")
    described = card.text(read_config(workdir), weights.steps, files, changes, sha256, outcomes, license)
    storage.replace(folder / card.NAME, described)
    others = ["config.json", "statistics.json", card.NAME, *([record.CHANGES] if changes else [])]
    checksums.write(folder, names=[*(f"{stage}.safetensors" for stage in files), *others])


def as_exported(params):
    """Returns NumPy parameters, float32, with the values that `write_safetensors` keeps."""
    return jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), params)


def read_exported(folder, stage, expected):
    """Returns the parameters of a stage in exported weights, a tree like `expected`. Raises UserError.

    folder: of the weights, or "reference".
    """
    folder = given(folder)
    checksums.check(folder, [f"{stage}.safetensors"])
    return read_safetensors(folder / f"{stage}.safetensors", expected)[0]


def exported_hash(folder, stage):
    """Returns what checksums.txt says of a stage in exported weights: CRC-32, bytes and name; "" without a checksum.

    folder: of the weights, or "reference". `read_exported` compares the file with it.
    """
    return checksums.listed(given(folder)).get(f"{stage}.safetensors", "")


def write_safetensors(path, params, step):
    """Writes parameters in half precision under flat names 'a/b/c', and the step that they are from as metadata."""
    flat = {name: np.asarray(x, np.float16) for name, x in named_leaves(params).items()}
    with storage.writing(path) as file:
        file.write(safetensors.numpy.save(flat, metadata={"step": str(step)}))


def read_safetensors(path, expected):
    """Returns (a tree like `expected`, in its dtypes; the step that it is from). Raises UserError."""
    try:
        stored = epath.Path(path).read_bytes()
        flat = safetensors.numpy.load(stored)
        length = int.from_bytes(stored[:8], "little")
        step = int(json.loads(stored[8 : 8 + length]).get("__metadata__", {}).get("step", 0))
        if not 0 <= step < 2**31:
            raise ValueError(f"step {step}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, OSError, ValueError, OverflowError, KeyError) as error:
        raise UserError(f"{path} is no readable safetensors file: {error}") from None
    checkpoint.check_arrays(path, flat, named_leaves(expected), dtypes=False)
    tree = jax.tree_util.tree_map_with_path(lambda p, x: jnp.asarray(flat[path_name(p)], x.dtype), expected)
    return tree, step
