"""Checkpoints of a train state, written and read with Orbax.

What is on disk at each moment, in the folder `<stage>/checkpoints/`:

1. `save` copies the state and returns. A thread writes it to `<step>.orbax-checkpoint-tmp/`, which no reader looks at.
2. When all arrays are written, `checksums.txt` is added. It names the step and the run, and lists every file with its
   size in bytes and its CRC-32.
3. Orbax renames the folder to `<step>/`. A disk renames a folder in one go, so a folder with this name is complete.
   A bucket cannot rename. Orbax ends with the file `commit_success.txt` there, and a folder without it does not count.
4. `finish` adds the checksums of the files that Orbax wrote last.
5. A checkpoint that is superseded is first renamed to `superseded/<step>/` and then deleted. So a run that is killed
   in between leaves no half-deleted checkpoint under its number.
6. The next start deletes `*tmp*` and `superseded/`. Then it reads every checkpoint, and moves one that differs from
   its checksums, or is of another step or run, to `<stage>/damaged/`. The run continues from the newest checkpoint that
   is left.

The older checkpoint stays until the newer one is complete. So one good checkpoint exists at any moment after the first.
"""

import contextlib
import logging
import math
import operator
import os
import re
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from vdm_jax.errors import SaveError, UserError
from vdm_jax.run import checksums, hosts, storage
from vdm_jax.sharding import named_leaves

logger = logging.getLogger("vdm_jax")

SUPERSEDED = "superseded"  # subfolder for checkpoints that are being deleted
ARRAYS = "default"  # subfolder of a checkpoint, as Orbax names it


def manager(directory, run=0, newest=2, best=1):
    """Returns an Orbax manager of `directory` that saves in the background. It deletes what killed saves left.

    run: the number of the run that the saves are of
    newest, best: how many of the newest checkpoints, and of the checkpoints of the lowest loss, are kept.
    """
    directory = storage.absolute(directory)
    _delete_superseded(directory)

    def seal():
        """Adds checksums to a save whose arrays are complete. Orbax calls it before it renames the folder."""
        for folder in directory.iterdir() if hosts.is_primary() else ():
            if folder.is_dir() and not ocp.utils.is_checkpoint_finalized(folder):
                checksums.write(folder, mark(folder.name.partition(".")[0], run))  # `<step>.orbax-checkpoint-tmp`

    loss = operator.itemgetter("loss")
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
    if hosts.is_primary():
        (directory / SUPERSEDED).rmtree(missing_ok=True)


def save(checkpoints, state, loss=math.inf):
    """Starts to save a state that has its number of steps under 'step'. The caller may donate it when this returns.

    Raises UserError when this save or the save before it fails, or when this step or a later one exists already.
    """
    step = int(state["step"])
    finish(checkpoints)
    with _explain_failed_save(checkpoints, step):
        loss = loss if math.isfinite(loss) else math.inf  # Orbax would rank nan as the best
        saved = checkpoints.save(step, args=ocp.args.StandardSave(state), metrics={"loss": loss})
    if not saved:
        there = f"{checkpoints.directory} holds step {checkpoints.latest_step()}"
        raise UserError(f"step {step} is not saved: {there}; two runs cannot share a folder")


def finish(checkpoints):
    """Waits until the current save is complete, then deletes what it supersedes. Raises UserError when it failed."""
    with _explain_failed_save(checkpoints, checkpoints.latest_step()):
        checkpoints.wait_until_finished()
        checkpoints.check_for_errors()
        _delete_superseded(checkpoints.directory)
        step = checkpoints.latest_step()
        if hosts.is_primary() and step is not None:
            with contextlib.suppress(checksums.Damaged):  # the next start reports it
                checksums.add_later(checkpoints.directory / str(step))


@contextlib.contextmanager
def _explain_failed_save(checkpoints, step):
    try:
        yield
    except Exception as error:  # for a full disk Orbax raises OSError, and TensorStore raises ValueError
        complete = steps(checkpoints.directory)
        left = f"step {max(complete)} is the newest checkpoint" if complete else "there is no checkpoint"
        raise SaveError(f"cannot save step {step} in {checkpoints.directory}: {_one_line(error)}; {left}") from error


def _one_line(error):
    """Returns the informative part of an error of Orbax or TensorStore."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return "no space left on the device" if "No space left" in text else text[:300] or type(error).__name__


def steps(directory):
    """Returns the steps of the complete checkpoints in `directory`, ascending. It changes nothing on disk.

    Raises UserError where the folder is on a disk that is not there.
    """
    directory = storage.absolute(directory)
    for folder in (directory.parent, directory):
        if os.path.islink(folder) and not folder.exists():
            raise UserError(f"{folder} is a link to a folder that is missing: mount its disk, or restore it")
    # No manager is made here: it would delete the unfinished save of a training run.
    complete = ocp.utils.checkpoint_steps(directory) if directory.exists() else []
    return sorted({step for step in complete if (directory / str(step)).is_dir()})  # for "031" Orbax gives 31


def is_step(name):
    """Returns whether a checkpoint may have this name: a number as Python writes it."""
    return re.fullmatch("0|[1-9][0-9]*", name) is not None


def mark(step, run):
    """Returns what the `checksums.txt` of a checkpoint says that it is. run: the number of its run."""
    return f"step {step} of run {run}"


def check(folder, run=0):
    """Compares the files of the checkpoint in one folder with their checksums, and its step with the folder's name.

    run: the number of the run that it should be of
    Returns how many bytes were compared. Raises checksums.Damaged.
    """
    folder = storage.absolute(folder)
    if not (folder / ARRAYS).is_dir():
        raise checksums.Damaged(f"{folder} holds no arrays, so it is no checkpoint: restore it, or move it away")
    return checksums.check(folder, mark=mark(folder.name, run))


def has_own_step(folder):
    """Returns whether a folder may hold the step that is its name: it has arrays, and names no other step."""
    folder, stored = storage.absolute(folder), ""
    with contextlib.suppress(checksums.Damaged):
        stored = checksums.read_mark(folder)
    return (folder / ARRAYS).is_dir() and (not stored or stored.startswith(f"step {folder.name} of "))


def is_of(folder, run):
    """Returns whether a checkpoint names this run. One that names none, because it is damaged, may be of any."""
    with contextlib.suppress(checksums.Damaged):
        return checksums.read_mark(storage.absolute(folder)).endswith(f" of run {run}")
    return True


def accept(folder, run):
    """Makes a checkpoint one of this run, where `check` finds no damage, but no checksums, or another run."""
    try:
        check(folder, run)
    except checksums.Unverified as error:
        if has_own_step(folder):
            logger.warning("%s; accepted", error)
            checksums.write(folder, mark(folder.name, run))
    except checksums.Damaged:
        pass  # see `quarantine_damaged`


def quarantine_damaged(directory, run=0):
    """Moves each damaged checkpoint in `directory` to the folder `damaged` beside it. Call it before a run continues.

    A checkpoint is damaged when its files differ from its checksums, when it has no checksums, when its step is not
    the one in its name, or when it is not of the run with this number. When all checkpoints are damaged, none is moved
    and UserError is raised. What else has the name of a step, such as an empty folder or a link to nowhere, is moved,
    too: a save could not take this name.
    """
    directory, fault = storage.absolute(directory), ""
    if hosts.is_primary():
        checked = [directory / str(step) for step in reversed(steps(directory))]
        damaged = {}
        for folder in checked:
            try:
                check(folder, run)
                checksums.add_later(folder)  # a killed run may not have reached `finish`
            except checksums.Damaged as error:
                damaged[folder] = error
        if checked and len(damaged) == len(checked):
            fault = f"no checkpoint in {directory} is whole ({damaged[checked[0]]})"
            damaged = {}
        elif directory.exists():
            others = (path for path in directory.iterdir() if is_step(path.name) and not path.is_dir())
            damaged |= {path: f"{path} is no folder, so it is no checkpoint" for path in others}
        whole = next((f"goes on from step {folder.name}" for folder in checked if folder not in damaged), "begins anew")
        for folder, error in damaged.items():
            aside = directory.parent / "damaged" / f"{folder.name}-{time.time_ns()}"
            storage.make_folder(aside.parent)
            folder.rename(aside)
            logger.error("%s; it is moved to %s, and the stage %s", error, aside, whole)
    if hosts.broadcast_from_primary(bool(fault)):  # all processes continue from the same checkpoint, or none does
        fault = fault or "no checkpoint is whole"
        raise UserError(
            f"{fault}: restore a copy, or delete {directory.parent} to train this stage anew (--unverified accepts a "
            "checkpoint that has no checksums or is of another run)"
        )


def restore(checkpoints, abstract_state):
    """Returns the newest state in the shardings of `abstract_state`, or None when there is none.

    Raises UserError when the stored state is that of another model, and names the first difference.
    """
    step = checkpoints.latest_step()
    if step is None:
        return None
    with _readable(checkpoints.directory / str(step) / ARRAYS, abstract_state):
        state = checkpoints.restore(step, args=ocp.args.StandardRestore(abstract_state))
    if int(state["step"]) != step:  # its checksums were accepted as they are
        raise UserError(f"{checkpoints.directory / str(step)} holds step {int(state['step'])}: move it away")
    return state


def read(checkpoint, expected, run=0):
    """Returns parts of the checkpoint in one folder as NumPy arrays: of 'ema' for `expected` = {'ema': tree}.

    run: the number of its run
    Raises UserError when the checkpoint is damaged, or the parts are those of another model.
    """
    checkpoint = storage.absolute(checkpoint)
    check(checkpoint, run)
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)  # without shardings
    as_numpy = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(restore_type=np.ndarray), expected)
    arguments = ocp.args.PyTreeRestore(item=expected, restore_args=as_numpy, partial_restore=True)
    folder = checkpoint / ARRAYS
    with _readable(folder, expected, partial=True), ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(folder, args=arguments)


@contextlib.contextmanager
def _readable(folder, expected, partial=False):
    """Checks that the arrays in `folder`, or in the expected parts of it, are as expected, and explains all faults."""
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata.tree
        if partial:
            stored = {part: tree for part, tree in stored.items() if part in expected}
        check_arrays(folder, named_leaves(stored), named_leaves(expected))
        yield
    except UserError:
        raise
    except Exception as error:  # a file whose checksum was changed with it can raise anything in the libraries
        raise UserError(f"{folder} cannot be restored: {_one_line(error)}") from error


def check_arrays(where, stored, expected, dtypes=True):
    """Raises UserError unless the arrays {name: array} have the expected names, shapes and, with `dtypes`, dtypes.

    where: the folder or the file, for the message, which names the first difference.
    """

    def kind(x):
        return f"{np.dtype(x.dtype).name} {tuple(x.shape)}" if dtypes else f"{tuple(x.shape)}"

    for name, want in expected.items():
        if name not in stored:
            raise UserError(f"{where} has no {name}: it is of another model or optimizer")
        if kind(stored[name]) != kind(want):
            raise UserError(f"{where}: {name} is {kind(stored[name])}, the config asks for {kind(want)}")
    if extra := sorted(set(stored) - set(expected)):
        raise UserError(f"{where} has {extra[0]}, which the config does not: it is of another model or optimizer")
