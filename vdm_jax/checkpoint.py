"""Checkpoints of a run (Orbax) and weights for others (safetensors).

    python -m vdm_jax.checkpoint export --workdir=DIR --out=FOLDER    # EMA weights of all stages, half precision
    python -m vdm_jax.checkpoint import --weights=FOLDER --workdir=DIR    # a run that goes on from exported weights

An imported run stands where the exported one stood, less its optimiser's memory: raise a stage's steps to train it on,
or delete a stage's folder to train that one anew. --weights=reference names the weights that ship with the package.
With --config=FILE the run is that recipe's, whose models may have parameters that the weights lack: those begin as
drawn, and a stage that has such begins at step 0. Added layers that start as nothing leave a model what it was.
"""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from absl import flags
from etils import epath
from safetensors import SafetensorError

from vdm_jax import cli
from vdm_jax.errors import UserError
from vdm_jax.sharding import path_name

STAGES = ("video_autoencoder", "audio_autoencoder", "clip", "denoiser")
REFERENCE = epath.Path(__file__).parent / "reference"


def manager(directory, keep=2):
    """Orbax manager of `directory`: asynchronous saves, leftovers of killed saves removed, newest `keep` kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(epath.Path(directory).absolute(), options=options)


def save(checkpoints, state):
    checkpoints.save(int(state["step"]), args=ocp.args.StandardSave(state))


def restore(checkpoints, abstract_state):
    """The newest state, with the shapes and shardings of abstract_state; None when there is none."""
    step = checkpoints.latest_step()
    if step is None:
        return None
    return checkpoints.restore(step, args=ocp.args.StandardRestore(abstract_state))


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
    folder = epath.Path(workdir)
    if not (folder / "config.json").exists():
        raise UserError(f"{workdir} is no run folder (no config.json): train one with python -m vdm_jax.train")
    config, expected = open_run(folder, abstract_params)
    params = {s: load_params(folder, s, expected[s]) for s in STAGES}
    return Trained(config, {**params, "statistics": read_statistics(folder / "denoiser" / "statistics.json")})


def load_exported(folder, abstract_params):
    """-> (Trained, {stage: step}) of exported weights. Raises UserError where something is missing or damaged."""
    folder = epath.Path(folder)
    if not (folder / "config.json").exists():
        what = "this installation carries no reference weights" if folder == REFERENCE else f"{folder} holds no weights"
        raise UserError(f"{what}: give --workdir of a trained run")
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
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/config.json is not that of a run of this version ({error}): train again, or restore the file"
        ) from None


def newest_step(workdir, stage):
    """The step of the newest checkpoint of a run's stage, or None."""
    directory = epath.Path(workdir).absolute() / stage / "checkpoints"
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
    target = {"ema": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        arguments = ocp.args.PyTreeRestore(
            item=target,
            partial_restore=True,
            restore_args=jax.tree.map(lambda x: ocp.ArrayRestoreArgs(restore_type=np.ndarray), target),
        )
        restored = checkpointer.restore(directory.absolute() / str(step) / "default", args=arguments)["ema"]
    _check_shapes(restored, expected, f"{workdir}/{stage}")
    return restored


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
    # Imported here: reading a checkpoint needs neither models nor optimisers.
    from vdm_jax import stages, train_state

    options = flags.FLAGS
    if argv[1:] == ["export"] and options.workdir and options.out:
        return export(options.workdir, epath.Path(options.out), stages.abstract_params)
    if argv[1:] == ["import"] and options.weights and options.workdir:
        weights = REFERENCE if options.weights == "reference" else options.weights
        trained, steps = load_exported(weights, stages.abstract_params)
        if options.config is not None:
            trained, steps = grow(trained, steps, options.config, stages.init_fns(options.config))
        return take_over(trained, steps, epath.Path(options.workdir), train_state.create)
    raise UserError(
        "usage: python -m vdm_jax.checkpoint export --workdir=DIR --out=FOLDER, "
        "or python -m vdm_jax.checkpoint import --weights=FOLDER --workdir=DIR [--config=FILE]"
    )


def export(workdir, out, abstract_params):
    trained = load_trained(workdir, abstract_params)
    out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        write_safetensors(out / f"{stage}.safetensors", trained.frozen[stage], newest_step(workdir, stage))
    (out / "config.json").write_text(trained.config.to_json_best_effort(indent=1) + "\n")
    write_statistics(out / "statistics.json", trained.frozen["statistics"])
    size = sum((out / f"{stage}.safetensors").stat().length for stage in STAGES)
    print(f"wrote {out}: {size / 1e6:.2f} MB of weights")


def grow(trained, steps, config, init_fns):
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


def take_over(trained, steps, workdir, create):
    """Makes the run `workdir` of trained weights; create(params, settings) -> a train state at step 0."""
    if (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds a run already: give a new --workdir")
    for stage in STAGES:
        state = create(trained.frozen[stage], trained.config[stage])
        with manager(workdir / stage / "checkpoints") as checkpoints:
            save(checkpoints, state | {"step": state["step"] + steps[stage]})
    write_statistics(workdir / "denoiser" / "statistics.json", trained.frozen["statistics"])
    (workdir / "config.json").write_text(trained.config.to_json_best_effort(indent=1, sort_keys=True) + "\n")
    print(f"made {workdir}: " + ", ".join(f"{stage} at step {steps[stage]}" for stage in STAGES))


def define_flags():
    cli.define_config()
    flags.DEFINE_string("workdir", None, "Run folder, to read or to make.")
    flags.DEFINE_string("out", None, "Folder to write exported weights to.")
    flags.DEFINE_string("weights", None, "Folder of exported weights to read, or 'reference'.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
