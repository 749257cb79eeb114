"""Checkpoints of a run (Orbax) and weights for others (safetensors).

    python -m vdm_jax.checkpoint export --workdir=DIR --out=FOLDER    # EMA weights of all stages, half precision
    python -m vdm_jax.checkpoint import --weights=FOLDER --workdir=DIR    # a run that goes on from exported weights
    python -m vdm_jax.checkpoint verify DIR    # are the files of a run, or of exported weights, what was written?

An imported run stands where the exported one stood, less its optimizer's memory: raise a stage's steps to train it on,
or delete a stage's folder to train that one anew. --weights=reference names the weights that ship with the package.
With --config=FILE the run is that recipe's, whose models may have parameters that the weights lack: those begin as
drawn, and a stage that has such begins at step 0. Added layers that start as nothing leave a model what it was.

Every checkpoint, and every folder of exported weights, holds checksums of its files; nothing is restored unverified.
"""

import contextlib
import json
import logging
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from absl import flags
from etils import epath
from jax.experimental import multihost_utils
from safetensors import SafetensorError

from vdm_jax.errors import UserError
from vdm_jax.run import checksums, cli, storage
from vdm_jax.sharding import path_name

logger = logging.getLogger("vdm_jax")

STAGES = ("video_autoencoder", "audio_autoencoder", "clip", "denoiser")
REFERENCE = epath.Path(__file__).parents[1] / "reference"
SUPERSEDED = "superseded"  # beside checkpoints on a disk: those being deleted, so that none is ever half there


def manager(directory, newest=2, best=1):
    """Orbax manager of `directory`: asynchronous saves, leftovers of killed saves removed.

    The `newest` checkpoints are kept, and the `best` ones of least loss.
    """
    directory = storage.absolute(directory)
    _delete_superseded(directory)

    def seal():
        """Runs when a save's files are complete, before it is renamed to be a checkpoint: no checkpoint is without."""
        for folder in directory.iterdir() if jax.process_index() == 0 else ():
            if folder.is_dir() and not ocp.utils.is_checkpoint_finalized(folder):
                checksums.write(folder)

    def loss(metrics):
        return metrics["loss"]

    policies = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        best_fn=loss,
        best_mode="min",
        preservation_policy=policies.AnyPreservationPolicy(
            [
                policies.LatestN(max(1, newest)),
                policies.BestN(get_metric_fn=loss, reverse=True, n=best, keep_checkpoints_without_metrics=False),
            ]
        ),
        async_options=ocp.AsyncOptions(post_finalization_callback=seal),
        todelete_subdir=SUPERSEDED,
    )
    return ocp.CheckpointManager(directory, options=options)


def _delete_superseded(directory):
    if jax.process_index() == 0 and (directory / SUPERSEDED).exists():
        (directory / SUPERSEDED).rmtree()


def save(checkpoints, state, loss=math.inf):
    """Begins to save a state, which may be donated at once; `loss` is what checkpoints are ranked by.

    Raises UserError where this or the save before fails, and where the step, or a later one, is saved already.
    """
    step = int(state["step"])
    finish(checkpoints)
    with _saving(checkpoints, step):
        there = checkpoints.latest_step()
        loss = loss if math.isfinite(loss) else math.inf  # Orbax would rank nan as the best
        if not checkpoints.save(step, args=ocp.args.StandardSave(state), metrics={"loss": loss}):
            raise UserError(
                f"step {step} is not saved: {checkpoints.directory} holds step {there}; two runs cannot share a folder"
            )


def finish(checkpoints):
    """Waits for the save under way, and deletes what it supersedes. Raises UserError where it failed."""
    with _saving(checkpoints, checkpoints.latest_step()):
        checkpoints.wait_until_finished()
        checkpoints.check_for_errors()
        _delete_superseded(checkpoints.directory)
        step = checkpoints.latest_step()
        if jax.process_index() == 0 and step is not None:
            with contextlib.suppress(checksums.Damaged):  # is told when it is to be restored
                checksums.add_later(checkpoints.directory / str(step))


@contextlib.contextmanager
def _saving(checkpoints, step):
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a full disk is an OSError here and a ValueError of TensorStore there
        good = ocp.utils.checkpoint_steps(checkpoints.directory)
        left = f"step {max(good)} is the newest checkpoint" if good else "there is no checkpoint"
        reason = _reason(error)
        raise UserError(f"cannot save step {step} in {checkpoints.directory}: {reason}; {left}") from error


def _reason(error):
    """The telling part of an error of Orbax or TensorStore, on one line."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return "no space left on the device" if "No space left" in text else text[:300] or type(error).__name__


def quarantine_damaged(directory):
    """Before a run goes on: moves checkpoints that are not what was written to the folder `damaged` beside theirs.

    Raises UserError where no good one is left; then all stay where they are. One from before there were checksums
    counts as good, with a warning.
    """
    directory, fault = storage.absolute(directory), ""
    if jax.process_index() == 0 and directory.exists():
        damaged = {}
        steps = sorted(ocp.utils.checkpoint_steps(directory), reverse=True)
        for step in steps:
            try:
                _verify(directory / str(step))
                checksums.add_later(directory / str(step))  # a run that was killed may not have come to that
            except checksums.Damaged as error:
                damaged[step] = error
        if steps and len(damaged) == len(steps):
            fault = f"no checkpoint in {directory} is whole ({damaged[steps[0]]})"
        else:
            for step, error in damaged.items():
                aside = directory.parent / "damaged" / f"{step}-{time.time_ns()}"
                aside.parent.mkdir(exist_ok=True)
                (directory / str(step)).rename(aside)
                logger.error("%s; set aside as %s", error, aside)
    if jax.process_count() > 1:  # all begin with the same checkpoint, or none does
        fault = multihost_utils.broadcast_one_to_all(np.int32(bool(fault))) and (fault or "no checkpoint is whole")
    if fault:
        raise UserError(f"{fault}: restore a copy, or delete {directory.parent} to train this stage anew")


def _verify(folder):
    """Raises Damaged unless the files in `folder` are those whose checksums it holds. -> bytes read."""
    count = checksums.check(folder)
    if count is None:
        logger.warning("%s has no checksums, so damage would not be seen", folder)
    return count


def restore(checkpoints, abstract_state):
    """The newest state, with the shapes and shardings of abstract_state; None when there is none.

    Raises UserError where another model was stored, naming what differs.
    """
    step = checkpoints.latest_step()
    if step is None:
        return None
    folder, wanted = checkpoints.directory / str(step) / "default", dict(abstract_state)
    with _reading(folder):
        stored = _stored(folder)
        fresh = {}
        if ("loss_mean",) not in stored and "loss_mean" in wanted:  # of a checkpoint older than this part of the state
            fresh = {"loss_mean": jax.device_put(np.float32(np.nan), wanted.pop("loss_mean").sharding)}
        _check_stored(stored, wanted, folder)
        return checkpoints.restore(step, args=ocp.args.StandardRestore(wanted)) | fresh


@contextlib.contextmanager
def _reading(folder):
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a file that was tampered with may make of the libraries
        raise UserError(f"{folder} cannot be restored: {_reason(error)}") from error


def _stored(folder):
    """{path of an array in a checkpoint: its metadata}."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        return ocp.tree.to_flat_dict(checkpointer.metadata(folder).item_metadata.tree)


def _check_stored(stored, wanted, where):
    """Raises UserError unless the arrays are stored as they are wanted: Orbax would silently cast another dtype."""
    wanted = ocp.tree.to_flat_dict(wanted)
    for path, want in wanted.items():
        name = "/".join(map(str, path))
        if path not in stored:
            raise UserError(f"{where} has no {name}: it is of another model or optimizer")
        found, asked = ((tuple(x.shape), np.dtype(x.dtype).name) for x in (stored[path], want))
        if found != asked:
            raise UserError(f"{where}: {name} is {found[1]} {found[0]}, the config asks for {asked[1]} {asked[0]}")
    if extra := sorted("/".join(map(str, path)) for path in stored if path not in wanted):
        raise UserError(f"{where} has {extra[0]}, which the config does not: it is of another model or optimizer")


# ------------------------------------------------------------------------------------------------- trained weights


class Trained(NamedTuple):
    """What sampling and evaluation need of a run."""

    config: ml_collections.ConfigDict
    frozen: dict  # {stage: EMA weights, 'statistics': {modality: {'mean' [C], 'std' [C]}} of the latents}


def load_trained(workdir, abstract_params):
    """A trained run, or the reference weights when `workdir` is None. Raises UserError where something is missing.

    abstract_params(config) -> {stage: tree of ShapeDtypeStruct} tells which weights and shapes the config asks for.
    """
    if workdir is None:
        return load_exported(REFERENCE, abstract_params)[0]
    folder = storage.given(workdir)
    if not (folder / "config.json").exists():
        raise UserError(f"{workdir} is no run folder (no config.json): train one with python -m vdm_jax.train")
    config, expected = open_run(folder, abstract_params)
    params = {s: load_params(folder, s, expected[s]) for s in STAGES}
    return Trained(config, {**params, "statistics": read_statistics(folder / "denoiser" / "statistics.json")})


def load_exported(folder, abstract_params):
    """-> (Trained, {stage: step}) of exported weights. Raises UserError where something is missing or damaged."""
    folder = storage.given(folder)
    if not (folder / "config.json").exists():
        what = "this installation carries no reference weights" if folder == REFERENCE else f"{folder} holds no weights"
        raise UserError(f"{what}: give --workdir of a trained run")
    _verify(folder)
    config, expected = open_run(folder, abstract_params)
    read = {s: read_safetensors(folder / f"{s}.safetensors", expected[s]) for s in STAGES}
    params = {s: tree for s, (tree, _) in read.items()}
    trained = Trained(config, {**params, "statistics": read_statistics(folder / "statistics.json")})
    return trained, {s: step for s, (_, step) in read.items()}


def open_run(folder, abstract_params):
    """-> (config of the run in `folder`, abstract_params(config)). Raises UserError where the two do not fit."""
    config = load_config(epath.Path(folder) / "config.json")
    try:
        return config, abstract_params(config)
    except UserError:
        raise
    except Exception as error:  # whatever wrong settings make of models
        raise UserError(
            f"{folder}/config.json is not that of a run of this version ({type(error).__name__}: {_reason(error)}): "
            "train again, or restore the file"
        ) from error


def newest_step(workdir, stage):
    """The step of the newest checkpoint of a run's stage, or None."""
    directory = storage.absolute(workdir) / stage / "checkpoints"
    # Looked up without a manager, which might clean up a save that a training run has under way.
    return max(ocp.utils.checkpoint_steps(directory), default=None) if directory.exists() else None


def load_params(workdir, stage, expected):
    """The EMA weights in the newest checkpoint of a run's stage, on the host. Raises UserError when there is none."""
    directory, step = epath.Path(workdir) / stage / "checkpoints", newest_step(workdir, stage)
    if step is None:
        raise UserError(
            f"{workdir} is unfinished: stage {stage} has no checkpoint; go on with "
            f"python -m vdm_jax.train --config=FILE --workdir={workdir} --stage={stage}"
        )
    target, folder = (
        {"ema": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)},
        storage.absolute(directory),
    )
    _verify(folder / str(step))
    folder = folder / str(step) / "default"
    with _reading(folder), ocp.PyTreeCheckpointer() as checkpointer:
        _check_stored(
            {path: x for path, x in _stored(folder).items() if path[0] == "ema"}, target, f"{workdir}/{stage}"
        )
        arguments = ocp.args.PyTreeRestore(
            item=target,
            partial_restore=True,
            restore_args=jax.tree.map(lambda x: ocp.ArrayRestoreArgs(restore_type=np.ndarray), target),
        )
        return checkpointer.restore(folder, args=arguments)["ema"]


def _check_shapes(tree, expected, where):
    def check(path, want, got):
        if tuple(want.shape) != tuple(got.shape):
            raise UserError(f"{where}: {path_name(path)} has shape {got.shape}, the config asks for {want.shape}")

    jax.tree_util.tree_map_with_path(check, expected, tree)


def load_config(path):
    """config.json of a run -> locked ConfigDict (data, never code). Lists come back as tuples."""

    def untuple(value):
        if isinstance(value, dict):
            return {k: untuple(v) for k, v in value.items()}
        return tuple(untuple(v) for v in value) if isinstance(value, list) else value

    stored = read_json(path)
    if not isinstance(stored, dict):
        raise UserError(f"{path} is damaged (no mapping of settings): restore it or train again")
    config = ml_collections.ConfigDict(untuple(stored))
    config.lock()
    return config


def read_statistics(path):
    """statistics.json -> {modality: {'mean', 'std'}} of float32 arrays."""
    return {m: {k: np.asarray(v, np.float32) for k, v in s.items()} for m, s in read_json(path).items()}


def write_statistics(path, statistics):
    lists = {m: {k: np.asarray(v).tolist() for k, v in s.items()} for m, s in statistics.items()}
    path = epath.Path(path)
    part = path.with_name(path.name + ".tmp")
    part.write_text(json.dumps(lists, indent=1) + "\n")
    part.replace(path)  # whole or not there: a run that is killed here starts again


def read_json(path):
    try:
        return json.loads(epath.Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the run that should hold it is unfinished") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it or train again") from None


# ---------------------------------------------------------------------------------------------------- safetensors


def write_safetensors(path, params, step, dtype=np.float16):
    """Writes a tree of parameters as flat names 'a/b/c', and the step they are of as metadata."""
    flat = {}
    jax.tree_util.tree_map_with_path(lambda p, x: flat.update({path_name(p): np.asarray(x, dtype)}), params)
    epath.Path(path).write_bytes(safetensors.numpy.save(flat, metadata={"step": str(step)}))


def read_safetensors(path, expected):
    """-> (a tree like `expected`, shapes checked, float32; the step it is of). Raises UserError."""
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


def main(argv):
    # Imported here: reading a checkpoint needs neither models nor optimizers.
    from vdm_jax import train_state
    from vdm_jax.system import codec as stages

    options = flags.FLAGS
    if argv[1:] == ["export"] and options.workdir and options.out:
        return export(options.workdir, storage.given(options.out), stages.abstract_params)
    if len(argv) == 3 and argv[1] == "verify":
        return verify(storage.given(argv[2]))
    if argv[1:] == ["import"] and options.weights and options.workdir:
        weights = REFERENCE if options.weights == "reference" else options.weights
        trained, steps = load_exported(weights, stages.abstract_params)
        if options.config is not None:
            trained, steps = add_missing_params(trained, steps, options.config, stages.init_fns(options.config))
        steps |= dict.fromkeys(options.restart, 0)
        return import_weights(trained, steps, storage.given(options.workdir), train_state.create)
    raise UserError(
        "usage: python -m vdm_jax.checkpoint export --workdir=DIR --out=FOLDER, "
        "or python -m vdm_jax.checkpoint import --weights=FOLDER --workdir=DIR [--config=FILE] "
        "[--restart=STAGE], "
        "or python -m vdm_jax.checkpoint verify DIR"
    )


def export(workdir, out, abstract_params):
    trained = load_trained(workdir, abstract_params)
    out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        write_safetensors(out / f"{stage}.safetensors", trained.frozen[stage], newest_step(workdir, stage))
    (out / "config.json").write_text(trained.config.to_json_best_effort(indent=1) + "\n")
    write_statistics(out / "statistics.json", trained.frozen["statistics"])
    checksums.write(out)
    size = sum((out / f"{stage}.safetensors").stat().length for stage in STAGES)
    print(f"wrote {out}: {size / 1e6:.2f} MB of weights")


def verify(folder):
    """Checks all checkpoints and exported weights in `folder`; prints each. Raises UserError where one is damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give a run, a checkpoint or exported weights")
    paths = [p for p in map(epath.Path, checksums.files(folder)) if {"damaged", SUPERSEDED}.isdisjoint(p.parts)]
    folders = {folder / p.parent for p in paths if p.name in (checksums.NAME, "_CHECKPOINT_METADATA")}
    faults, total, began = [], 0, time.perf_counter()
    for one in sorted(folders):
        try:
            count = checksums.check(one)
            total += count or 0
            print(f"{one}: {'good' if count is not None else 'no checksums, made by an earlier version'}")
        except checksums.Damaged as error:
            faults.append(error)
            print(f"{one}: DAMAGED")
    seconds = time.perf_counter() - began
    print(f"read {total / 1e9:.3f} GB at {total / 1e9 / seconds:.2f} GB/s")
    if faults:
        raise UserError(f"{faults[0]}" + (f", and {len(faults) - 1} more are damaged" if len(faults) > 1 else ""))
    if not folders:
        raise UserError(f"{folder} holds neither checkpoints nor exported weights")


def add_missing_params(trained, steps, config, init_fns):
    """-> (Trained of `config`, {stage: step}): the weights there are, and what the config adds to them as drawn.

    Raises UserError where the config drops a parameter or gives it another shape.
    """
    key, frozen, steps = jax.random.key(config.seed), dict(trained.frozen), dict(steps)
    for stage in STAGES:
        drawn = jax.jit(init_fns[stage])(key)
        frozen[stage], added, dropped = _overlay(trained.frozen[stage], drawn)
        if dropped:
            raise UserError(f"the weights have {stage}/{dropped[0]}, which the config's model lacks")
        _check_shapes(frozen[stage], drawn, f"the weights of {stage}")
        if added:
            print(f"{stage}: {len(added)} parameters begin as drawn, {added[0]} the first; the stage begins at step 0")
            steps[stage] = 0
    return Trained(config, frozen), steps


def _overlay(stored, drawn):
    """-> (`drawn` with the leaves that `stored` has, names that only drawn has, names that only stored has), sorted."""
    have = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(stored)}
    want = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(drawn)}
    tree = jax.tree_util.tree_map_with_path(lambda path, leaf: have.get(path_name(path), leaf), drawn)
    return tree, sorted(want - set(have)), sorted(set(have) - want)


def import_weights(trained, steps, workdir, create):
    """Makes the run `workdir` of trained weights; create(params, settings) -> a train state at step 0."""
    if (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds a run already: give a new --workdir")
    for stage in STAGES:
        state = create(trained.frozen[stage], trained.config[stage])
        with manager(workdir / stage / "checkpoints") as checkpoints:
            save(checkpoints, state | {"step": state["step"] + steps[stage]})
            finish(checkpoints)
    write_statistics(workdir / "denoiser" / "statistics.json", trained.frozen["statistics"])
    (workdir / "config.json").write_text(trained.config.to_json_best_effort(indent=1, sort_keys=True) + "\n")
    print(f"made {workdir}: " + ", ".join(f"{stage} at step {steps[stage]}" for stage in STAGES))


def define_flags():
    cli.define_config()
    flags.DEFINE_string("workdir", None, "Run folder, to read or to make.")
    flags.DEFINE_string("out", None, "Folder to write exported weights to.")
    flags.DEFINE_string("weights", None, "Folder of exported weights to read, or 'reference'.")
    flags.DEFINE_multi_enum(
        "restart", [], STAGES, "Stage that is to be trained on from its weights as if anew: step 0, full learning rate."
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
