"""What several tests share."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from vdm_jax import train_state
from vdm_jax.run import checkpoint
from vdm_jax.sharding import path_name
from vdm_jax.system import build

ROOT = Path(__file__).parents[1]

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # the latter up to jax 0.7


def weights(abstract, seed=0):
    """Random parameters for a tree of shapes. None is zero, so that every input counts."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if leaf.ndim > 1:
            return noise / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))  # keeps the variance
        return np.float32(path_name(path).endswith("scale")) + 0.1 * noise

    return jax.tree_util.tree_map_with_path(draw, abstract)


def init_weights(module, *arguments, seed=0, **options):
    """`weights` for a Flax module called with `arguments`."""
    shapes = jax.eval_shape(lambda key: module.init(key, *arguments, **options), jax.random.key(0))
    return weights(shapes["params"], seed)


def names(tree):
    """{path: shape} of a tree of arrays."""
    return {path_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def digest(state):
    """A hash of all arrays of a train state, with their names."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state)):
        leaf = np.asarray(leaf)
        sha.update(f"{path_name(path)} {leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
    return sha.hexdigest()


def final_state(workdir, stage, config):
    """The newest train state of a stage of a run, on the host."""
    params = build(config).stages[stage].param_shapes
    abstract = jax.eval_shape(lambda p: train_state.create(p, config[stage]), params)
    with checkpoint.manager(workdir / stage / "checkpoints") as checkpoints:
        return jax.device_get(checkpoint.restore(checkpoints, abstract))


def start(*arguments, **environment):
    """Starts `python *arguments` at the root of the project, on the CPU and without PyTorch, its output in pipes."""
    path = os.pathsep.join(filter(None, [str(ROOT / "tests" / "without_torch"), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, seconds=1200):
    """Waits for a process -> (exit code, output, lines of stderr). One that takes longer is killed: a time-out.

    As it is, that tells a hang: a machine shared with others does not reach it.
    """
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"not done after {seconds} s:\n{out}\n{err}") from None
    return process.returncode, out, err.splitlines()
