"""The folder of a run, and the folder of exported weights.

    <workdir>/config.json                         the config of the run
    <workdir>/lock                                held by the training that is running
    <workdir>/<stage>/checkpoints/<step>/         see checkpoint.py
    <workdir>/denoiser/statistics.json            mean and standard deviation of the latents

    <weights>/config.json, statistics.json        as above
    <weights>/<stage>.safetensors                 parameters in half precision, and the step that they are from
    <weights>/checksums.txt                       see checksums.py

This file knows no models. What a folder should hold is an argument: expected = {stage: tree of ShapeDtypeStruct}.
"""

import contextlib
import errno
import json
import logging

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors.numpy
from etils import epath
from safetensors import SafetensorError

from vdm_jax.errors import UserError
from vdm_jax.run import checkpoint, checksums, hosts, storage
from vdm_jax.sharding import path_name

logger = logging.getLogger("vdm_jax")

REFERENCE = epath.Path(__file__).parents[1] / "reference"  # the weights that ship with the package
STATISTICS = "denoiser/statistics.json"  # in the folder of a run
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


# ----------------------------------------------------------------------------------------------------- a training run


@contextlib.contextmanager
def exclusive_lock(workdir):
    """Makes the folder of a run, and locks it against other trainings until the context ends. Raises UserError.

    A bucket has no locks: its launcher must start a run only once.
    """
    if not hosts.is_primary() or fcntl is None or storage.in_bucket(workdir):
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
        except OSError as error:  # a file system without locks
            logger.debug("%s cannot be locked: %s", workdir, error)
        yield


@contextlib.contextmanager
def explain_disk_faults(workdir, stage):
    """Turns the OSError of a full or broken disk into a UserError that names the newest checkpoint of a stage."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        newest = newest_step(workdir, stage)
        left = "there is no checkpoint" if newest is None else f"step {newest} is the newest checkpoint"
        raise UserError(f"{stage}: cannot write in {workdir}: {error.strerror}; {left}") from None


def newest_step(workdir, stage):
    """Returns the step of the newest checkpoint of a stage, or None when there is none."""
    return max(checkpoint.steps(storage.absolute(workdir) / stage / "checkpoints"), default=None)


# -------------------------------------------------------------------------------------------------------- config.json


def read_config(folder):
    """Returns the config of a run or of exported weights: a locked ConfigDict. Lists come back as tuples.

    Raises UserError when config.json is missing or damaged.
    """
    folder = storage.given(folder)
    path = folder / "config.json"
    if not path.exists():
        if folder == REFERENCE:
            raise UserError("this installation has no reference weights: give --workdir of a trained run")
        if not folder.exists():
            raise UserError(f"there is no folder {folder}: check the path of the run or of the weights")
        raise UserError(
            f"{folder} is neither a run nor exported weights, because it has no config.json: give another folder, or "
            f"train a run with python -m vdm_jax.train --config=FILE --workdir={folder}"
        )

    def untuple(value):
        if isinstance(value, dict):
            return {k: untuple(v) for k, v in value.items()}
        return tuple(untuple(v) for v in value) if isinstance(value, list) else value

    stored = _read_json(path)
    if not isinstance(stored, dict):
        raise UserError(f"{path} is damaged (it holds no mapping of settings): restore it or train again")
    config = ml_collections.ConfigDict(untuple(stored))
    config.lock()
    return config


def checked_build(folder, config, build):
    """Returns build(config) for the config that `read_config(folder)` returned.

    Raises UserError, whatever the settings in a damaged or outdated config.json make `build` raise.
    """
    try:
        return build(config)
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"{folder}/config.json does not fit this version ({reason}): train again, or restore the file"
        ) from error


def write_config(workdir, config, stages):
    """Writes the config.json of a run. All processes call this.

    stages: names of all stages.

    Raises UserError when the folder holds a run of other data sizes, or whose started stages have other models.
    """
    path = workdir / "config.json"
    if path.exists():
        before = read_config(workdir)
        for stage in stages:
            if newest_step(workdir, stage) is None or stage not in before:
                continue
            if json.loads(before[stage].model.to_json()) != json.loads(config[stage].model.to_json()):
                raise UserError(
                    f"{workdir} was started with another {stage}.model: use another --workdir, or its config"
                )
        for key in ("size", "fps", "sample_rate", "text_length"):
            if key in before.data and before.data[key] != config.data[key]:
                raise UserError(f"{workdir} was started with data.{key}={before.data[key]}: use another --workdir")
    hosts.broadcast_from_primary(True)  # the file is written only after every process has read the old one
    if not hosts.is_primary():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(config.to_json_best_effort(indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------- statistics.json


def read_statistics(path):
    """Returns the statistics of the latents, {modality: {'mean' [C], 'std' [C]}}, float32."""
    return {m: {k: np.asarray(v, np.float32) for k, v in s.items()} for m, s in _read_json(epath.Path(path)).items()}


def write_statistics(path, statistics):
    lists = {m: {k: np.asarray(v).tolist() for k, v in s.items()} for m, s in statistics.items()}
    path = epath.Path(path)
    part = path.with_name(path.name + ".tmp")
    part.write_text(json.dumps(lists, indent=1) + "\n")
    part.replace(path)  # a run that is killed before this line leaves the old file, or none


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the run that should hold it is unfinished") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it or train again") from None


# ------------------------------------------------------------------------------------------------------------ weights


def read_weights(folder, expected, unverified=False):
    """Returns (params, steps) of a run or of exported weights. Raises UserError.

    folder: see the top of this file.
    expected: {stage: tree of ShapeDtypeStruct} of the stages to read.
    unverified: accepts exported weights that have no checksums.txt.

    params: {stage: EMA parameters}; with the denoiser also 'statistics', see `read_statistics`.
    steps: {stage: step that the parameters are from}.
    """
    folder = storage.given(folder)
    if any((folder / f"{stage}.safetensors").exists() for stage in expected):
        return read_exported(folder, expected, unverified)
    return read_run(folder, expected)


def read_run(workdir, expected):
    """Returns (params, steps) of the newest checkpoints of a run; see `read_weights`. Raises UserError."""
    workdir = storage.given(workdir)
    params = {stage: read_params(workdir, stage, tree) for stage, tree in expected.items()}
    steps = {stage: newest_step(workdir, stage) for stage in expected}
    return params | _statistics_of(params, workdir / STATISTICS), steps


def read_params(workdir, stage, expected):
    """Returns the EMA parameters in the newest checkpoint of one stage, as NumPy arrays.

    expected: tree of ShapeDtypeStruct.

    Raises UserError when the stage has no checkpoint, or a damaged one, or one of another model.
    """
    step = newest_step(workdir, stage)
    if step is None:
        raise UserError(
            f"{workdir} is unfinished: stage {stage} has no checkpoint; train it with "
            f"python -m vdm_jax.train --config=FILE --workdir={workdir} --stage={stage}"
        )
    return checkpoint.read(epath.Path(workdir) / stage / "checkpoints" / str(step), {"ema": expected})["ema"]


def read_exported(folder, expected, unverified=False):
    """Returns (params, steps) of exported weights; see `read_weights`. Raises UserError."""
    folder = storage.given(folder)
    try:
        checksums.check(folder)
    except checksums.Missing as error:
        if not unverified:
            raise UserError(f"{error}, or import the weights with python -m vdm_jax.weights --unverified") from None
    params, steps = {}, {}
    for stage, tree in expected.items():
        params[stage], steps[stage] = read_safetensors(folder / f"{stage}.safetensors", tree)
    return params | _statistics_of(params, folder / "statistics.json"), steps


def _statistics_of(params, path):
    return {"statistics": read_statistics(path)} if "denoiser" in params else {}


def write_exported(folder, config, params, steps):
    """Writes exported weights, with their checksums. params, steps: as `read_weights` returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage, step in steps.items():
        write_safetensors(folder / f"{stage}.safetensors", params[stage], step)
    (folder / "config.json").write_text(config.to_json_best_effort(indent=1) + "\n")
    write_statistics(folder / "statistics.json", params["statistics"])
    checksums.write(folder)


def as_exported(params):
    """Returns a tree of NumPy arrays with the values that `write_safetensors` would keep of it, in float32."""
    return jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), params)


def write_safetensors(path, params, step, dtype=np.float16):
    """Writes a tree of parameters under flat names 'a/b/c', and the step that they are from as metadata."""
    flat = {path_name(p): np.asarray(x, dtype) for p, x in jax.tree_util.tree_leaves_with_path(params)}
    epath.Path(path).write_bytes(safetensors.numpy.save(flat, metadata={"step": str(step)}))


def read_safetensors(path, expected):
    """Returns (a tree like `expected`, in its shapes and dtypes; the step that it is from).

    Raises UserError when the file is missing or damaged, or belongs to another model.
    """
    try:
        stored = epath.Path(path).read_bytes()
        flat = safetensors.numpy.load(stored)
        length = int.from_bytes(stored[:8], "little")
        step = int(json.loads(stored[8 : 8 + length]).get("__metadata__", {}).get("step", 0))
        if not 0 <= step < 2**31:
            raise ValueError(f"step {step}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, ValueError, OverflowError, KeyError) as error:
        raise UserError(f"{path} is no readable safetensors file: {error}") from None
    names = set()

    def leaf(p, want):
        name = path_name(p)
        names.add(name)
        if name not in flat:
            raise UserError(f"{path}: {name} is missing; the file belongs to another model")
        if flat[name].shape != tuple(want.shape):
            raise UserError(f"{path}: {name} has shape {flat[name].shape}, the config asks for {tuple(want.shape)}")
        return jnp.asarray(flat[name], want.dtype)

    tree = jax.tree_util.tree_map_with_path(leaf, expected)
    if extra := sorted(set(flat) - names):
        raise UserError(f"{path}: {extra[0]} is unknown to the config; the file belongs to another model")
    return tree, step
