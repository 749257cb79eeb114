"""Checkpoints of a run (Orbax) and weights for others (safetensors).

python -m vdm_jax.checkpoint export --workdir=DIR --out=FOLDER    # EMA weights of all stages, half precision
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
        if not (REFERENCE / "config.json").exists():
            raise UserError("this installation carries no reference weights: give --workdir of a trained run")
        config, expected = open_run(REFERENCE, abstract_params)
        params = {s: read_safetensors(REFERENCE / f"{s}.safetensors", expected[s]) for s in STAGES}
        return Trained(config, {**params, "statistics": read_statistics(REFERENCE / "statistics.json")})
    folder = epath.Path(workdir)
    if not (folder / "config.json").exists():
        raise UserError(f"{workdir} is no run folder (no config.json): train one with python -m vdm_jax.train")
    config, expected = open_run(folder, abstract_params)
    params = {s: load_params(folder, s, expected[s]) for s in STAGES}
    return Trained(config, {**params, "statistics": read_statistics(folder / "denoiser" / "statistics.json")})


def open_run(folder, abstract_params):
    """-> (config of the run in `folder`, abstract_params(config)). Raises UserError where the two do not fit."""
    config = load_config(epath.Path(folder) / "config.json")
    try:
        return config, abstract_params(config)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/config.json is not that of a run of this version ({error}): train again, or restore the file"
        ) from None


def load_params(workdir, stage, expected):
    """The EMA weights in the newest checkpoint of a run's stage, on the host. Raises UserError when there is none."""
    directory = epath.Path(workdir) / stage / "checkpoints"
    # Looked up without a manager, which might clean up a save that a training run has under way.
    found = ocp.utils.checkpoint_steps(directory.absolute()) if directory.exists() else []
    step = max(found, default=None)
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


def write_safetensors(path, params, dtype=np.float16):
    """Writes a tree of parameters as flat names 'a/b/c'."""
    flat = {}
    jax.tree_util.tree_map_with_path(lambda p, x: flat.update({path_name(p): np.asarray(x, dtype)}), params)
    epath.Path(path).write_bytes(safetensors.numpy.save(flat))


def read_safetensors(path, expected):
    """A tree like `expected` (shapes checked), float32. Raises UserError."""
    try:
        flat = safetensors.numpy.load(epath.Path(path).read_bytes())
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
    return tree


def main(argv):
    if argv[1:] != ["export"] or not flags.FLAGS.workdir or not flags.FLAGS.out:
        raise UserError("usage: python -m vdm_jax.checkpoint export --workdir=DIR --out=FOLDER")
    from vdm_jax import stages  # stages imports models; reading a checkpoint does not need them

    trained = load_trained(flags.FLAGS.workdir, stages.abstract_params)
    out = epath.Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        write_safetensors(out / f"{stage}.safetensors", trained.frozen[stage])
    (out / "config.json").write_text(trained.config.to_json_best_effort(indent=1) + "\n")
    write_statistics(out / "statistics.json", trained.frozen["statistics"])
    size = sum((out / f"{stage}.safetensors").stat().length for stage in STAGES)
    print(f"wrote {out}: {size / 1e6:.2f} MB of weights")


def define_flags():
    flags.DEFINE_string("workdir", None, "Run folder to read.")
    flags.DEFINE_string("out", None, "Folder to write.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
