"""The programs that bench runs and dry_run compiles: their arguments on a mesh, and their counts.

The first test runs this file in a process with 8 virtual devices: python tests/test_programs.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the process with 8 devices

import jax
import numpy as np
import pytest

from tests import tiny
from tests.helpers import finish, start
from vdm_jax import sharding
from vdm_jax.perf import programs
from vdm_jax.system import build
from vdm_jax.system.sampling import Sampler

PARTS = ("clip", "denoiser", "sample", "encode")
FSDP = dict(data=1, fsdp=-1, sequence=1, tensor=1)


def system_of_eight_clips():
    config = tiny.get_config()
    config.denoiser.batch_size = config.clip.batch_size = 8
    return build(config)


def make(system, part, mesh):
    if part == "sample":
        return programs.sampling(system, Sampler(system), mesh, rows=2)
    if part == "encode":
        return programs.encoding(system, mesh, rows=8)
    return programs.train_step(system, part, mesh)


def test_on_eight_devices():
    code, out, err = finish(start(__file__, JAX_NUM_CPU_DEVICES="8"))
    assert code == 0, "\n".join(err[-20:])
    assert out.splitlines() == [f"equal: {part}" for part in PARTS]


def test_only_shapes_become_random_values():
    where = sharding.replicated(sharding.make_mesh(FSDP))
    shape = jax.ShapeDtypeStruct
    arguments = ({"x": shape((1000,), "float32"), "mask": shape((3,), bool)}, np.arange(3), 0.5, shape((2,), "int32"))
    tree, numbers, weight, tokens = programs.fill(arguments, (where,) * 4)
    assert tree["x"].dtype == "float32" and np.std(tree["x"]) == pytest.approx(0.1, rel=0.1)
    assert np.all(tree["mask"]) and np.array_equal(numbers, [0, 1, 2]) and weight == 0.5 and not np.any(tokens)


def test_which_parameters_are_counted():
    system, mesh, count = system_of_eight_clips(), sharding.make_mesh(FSDP), programs.count_parameters
    assert make(system, "clip", mesh).params == count(system.param_shapes["clip"])
    assert make(system, "sample", mesh).params == count(system.param_shapes["denoiser"])
    assert make(system, "encode", mesh).params == count(system.stages["denoiser"].encoder_shapes)


def test_the_train_step_skips_as_training_does():
    """It has the comparison of the loss with its mean if the config asks for it."""
    mesh, config, texts = sharding.make_mesh(FSDP), tiny.get_config(), []
    for config.skip.loss_over_mean in (0.0, 2.0):
        program = make(build(config), "clip", mesh)
        with jax.set_mesh(mesh):
            texts.append(program.lower(*program.arguments).as_text())
    assert texts[0] != texts[1]


def compare(system, part):
    """Arrays are split as the abstract arguments are, and model FLOPs do not depend on the mesh."""
    program = make(system, part, sharding.make_mesh(FSDP))
    arrays, abstract = program.init(), program.arguments
    assert jax.tree.structure(arrays) == jax.tree.structure(abstract)
    for x, wanted in zip(jax.tree.leaves(arrays), jax.tree.leaves(abstract), strict=True):
        assert (x.shape, x.dtype) == (wanted.shape, wanted.dtype)
        assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(arrays))
    one_device = make(system, part, sharding.make_mesh(FSDP, jax.devices()[:1]))
    assert program.count_flops() == one_device.count_flops() > 0
    print(f"equal: {part}")


if __name__ == "__main__":
    assert jax.device_count() == 8
    for name in PARTS:
        compare(system_of_eight_clips(), name)
