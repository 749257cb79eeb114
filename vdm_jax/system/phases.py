"""Phases of a stage: parts of its training, one after the other, each with settings of its own.

    config.denoiser.phases = (
        {"share": 0.7, "data.frames": 9},
        {"share": 0.3, "denoiser.learning_rate": 1e-3},
    )

`share` is the share of config.denoiser.steps, and shares sum to 1. Every other key names a setting of config.data or of
the stage. The value of "denoiser.diffusion.patterns" is {pattern: share}, and replaces all patterns. A phase cannot
change the model, its target and range of noise levels, the steps, the phases or data.text_length.

A phase starts from the EMA weights at the end of the phase before, rounded to half precision as in exported weights,
with a fresh optimizer. So a run can move to another machine between phases with only its exported weights and config.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np

from vdm_jax.errors import UserError, one_of
from vdm_jax.run import folder
from vdm_jax.settings import flat, phase_ends
from vdm_jax.sharding import named_leaves
from vdm_jax.system import System, build

# The position embedding in unet.SpaceTimeAttention: its shape follows the size of a frame.
RESIZED = "pos_embed"
PATTERNS = ".diffusion.patterns"
# Settings that no phase changes; {} is the stage. Sampling reads the target and the noise levels of the recipe.
FIXED = (
    "data.text_length",
    *("{}.source", "{}.hash", "{}.model.", "{}.lora.", "{}.steps", "{}.phases"),
    *("{}.diffusion.target", "{}.diffusion.log_snr_"),
)


class Phase(NamedTuple):
    number: int  # from 1
    title: str  # for the user
    start: int  # number of steps in the phases before
    last_step: int  # of this phase, counted from the start of the stage
    system: System  # with the settings of this phase; <stage>.steps in its config are the steps of this phase
    buckets: list  # the Systems that it is trained on, see System.in_buckets


def phases(system, name):
    """The Phases of stage `name`, a list. A stage without phases is one Phase.

    Raises UserError for shares that do not sum to 1, an unknown setting, or a setting that does not fit.
    """
    steps, parts = system.config[name].steps, system.config[name].phases
    if not parts:
        return [Phase(1, name, 0, steps, system, system.in_buckets(name))]
    for part in parts:
        if not hasattr(part, "items"):
            raise UserError(f'{name}.phases: {part!r} is no phase: write {{"share": 0.5, "data.frames": 9}}')
    shares = [part.get("share", 0) for part in parts]
    positive = all(isinstance(share, int | float) and share > 0 for share in shares)
    if not positive or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise UserError(f"{name}.phases have the shares {shares}: give numbers above 0 whose sum is 1")
    ends = phase_ends(steps, parts)
    made = []
    for number, (part, start, stop) in enumerate(zip(parts, [0, *ends], ends), 1):
        if start == stop:
            raise UserError(f"{name}.steps={steps} leave no step for phase {number} of {len(parts)}: raise the steps")
        title = f"{name}, phase {number} of {len(parts)}"
        try:
            config = _changed(system.config, name, {key: value for key, value in part.items() if key != "share"})
            config[name].update(phases=(), steps=stop - start)
            if (
                config.data.get("buckets")
                and system.stages[name].any_shape
                and {"data.frames", "data.size"} & set(part)
            ):
                raise UserError("data.buckets take the place of data.frames and data.size: change data.buckets")
            phase_system = build(config)
            # The base of adapters has one size, in all phases.
            keep_sizes = number == len(parts) or "base" in phase_system.stages[name].encoder_shapes
            _check_shapes({name: phase_system.param_shapes[name]}, system.param_shapes, keep_sizes)
            # `build` used the settings of the phase for all stages, but they are meant for stage `name` only. So the
            # other stages are taken from `system`, and so are the shapes of the encoders' parameters.
            stage = phase_system.stages[name]._replace(encoder_shapes=system.stages[name].encoder_shapes)
            phase_system = dataclasses.replace(phase_system, stages=system.stages | {name: stage})
            made.append(Phase(number, title, start, stop, phase_system, phase_system.in_buckets(name)))
        except UserError as error:
            raise UserError(f"{title}: {error}") from None
    return made


def _changed(config, name, settings):
    """A copy of the config with the settings {dotted key: value} of one phase. Raises UserError."""
    config = config.copy_and_resolve_references()
    known = [*flat({key: config[key].to_dict() for key in ("data", name)})]
    for key, value in settings.items():
        if one_of("setting", key, known).startswith(tuple(fixed.format(name) for fixed in FIXED)):
            raise UserError(f"{key} cannot change from phase to phase")
        try:
            if value is None:
                raise TypeError("give a value")
            if key.endswith(PATTERNS) and not hasattr(value, "items"):
                raise TypeError('give shares, such as {"text": 1.0}')
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise UserError(f"{key}={value!r}: {error}") from None
    return config


def _check_shapes(shapes, recipe_shapes, keep_sizes):
    """Raises UserError where a phase changes the shape of a parameter.

    Only an embedding of positions may have another shape, and not with `keep_sizes`: in the last phase, whose weights
    are the result.
    """
    recipe_shapes = named_leaves(recipe_shapes)
    for path, leaf in named_leaves(shapes).items():
        before = recipe_shapes[path].shape
        if leaf.shape != before and (keep_sizes or path.split("/")[-1] != RESIZED):
            raise UserError(f"it changes {path} from {before} to {leaf.shape}: keep data.size")


def first_params(ema, expected):
    """The parameters that a phase starts from, float32 NumPy arrays with values of half precision.

    ema: EMA parameters at the end of the phase before, a tree of NumPy arrays.
    expected: tree of ShapeDtypeStruct. Embeddings of positions follow the size of a frame: they are interpolated to the
        expected shapes (arXiv:2010.11929, section 3.2).
    """

    def resize(x, want):
        return x if x.shape == want.shape else np.asarray(jax.image.resize(x, want.shape, "linear"))

    return jax.tree.map(resize, folder.as_exported(ema), expected)
