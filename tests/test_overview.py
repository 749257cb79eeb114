"""The overview of a recipe: sizes, and a line for each parameter."""

import math
import re

import jax

from tests import tiny
from vdm_jax import overview
from vdm_jax.system import build

CONFIG = "--config=tests/tiny.py"


def test_sizes_and_parameters_are_shown(command):
    done = command(overview, CONFIG)
    assert done.code == 0, done.err
    assert "clip     5 frames of 16x24, 1250 samples of sound" in done.out
    system = build(tiny.get_config())
    for name, shape in system.layout.latent_shapes.items():
        assert f"latents  {name} {shape}, 4 latent frames a second" in done.out
    assert "mesh" not in done.out
    for name, params in system.param_shapes.items():
        section = done.out.split(f"\n{name}: ")[1].split("\n\n")[0]
        million, *lines = section.splitlines()
        sizes = [int(line.split()[0].replace(",", "")) for line in lines]
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
        assert sum(sizes) == count and float(re.match(r"[\d.]+", million)[0]) == round(count / 1e6, 3)


def test_a_missing_recipe_is_one_clear_line(command):
    done = command(overview)
    assert done.code == 2 and done.err[-1].startswith("error: --config=FILE is missing")
