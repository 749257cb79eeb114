"""Phases of a stage: parts of its training, one after the other, each with settings of its own.

    config.denoiser.phases = (
        {"share": 0.7, "data.frames": 9},
        {"share": 0.3, "denoiser.learning_rate": 1e-3},
    )

`share` is the share of config.denoiser.steps, and shares sum to 1. Every other key names a setting of config.data or of
the stage. The value of "denoiser.diffusion.patterns" is {pattern: share}, and replaces all patterns. A phase cannot
change the model, the steps, the phases or data.text_length.

A phase starts from the EMA weights at the end of the phase before, rounded to half precision, with a fresh optimizer.
Exported weights are rounded in the same way. So a run can move to another machine at the end of a phase: the next phase
needs only the exported weights and the config.
"""

import dataclasses
import difflib
import math
from typing import NamedTuple

import jax
import numpy as np

from vdm_jax.errors import UserError
from vdm_jax.run import folder
from vdm_jax.sharding import named_leaves
from vdm_jax.system import System, build

RESIZED = "pos_embed"  # a parameter of unet.SpaceTimeAttention, of the size of a frame
PATTERNS = ".diffusion.patterns"
FIXED = ("data.text_length", "{}.model.", "{}.steps", "{}.phases")  # settings that no phase changes; {} is the stage


class Phase(NamedTuple):
    number: int  # from 1
    title: str  # for the user
    start: int  # number of steps in the phases before
    last_step: int  # of this phase, counted over all phases
    system: System  # with the settings of this phase; <stage>.steps in its config are the steps of this phase


def phases(system, name):
    """The Phases of stage `name`, a list. A stage without phases is one Phase.

    Raises UserError for shares that do not sum to 1, an unknown setting, or a setting that does not fit.
    """
    steps, parts = system.config[name].steps, system.config[name].phases
    if not parts:
        return [Phase(1, name, 0, steps, system)]
    for part in parts:
        if not hasattr(part, "items") or not all(isinstance(key, str) for key in part):
            raise UserError(f'{name}.phases: {part!r} is no phase: write {{"share": 0.5, "data.frames": 9}}')
        if not isinstance(part.get("share", 0), int | float):
            raise UserError(f"{name}.phases: share={part['share']!r} must be a number above 0")
    shares = [part.get("share", 0) for part in parts]
    if min(shares) <= 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise UserError(f"{name}.phases have the shares {shares}: each must be above 0, and their sum must be 1")
    ends = [round(steps * sum(shares[: i + 1])) for i in range(len(parts))]
    made = []
    for number, (part, start, stop) in enumerate(zip(parts, [0, *ends], ends), 1):
        if start == stop:
            raise UserError(f"{name}.steps={steps} leave no step for phase {number} of {len(parts)}: raise the steps")
        title = f"{name}, phase {number} of {len(parts)}"
        try:
            config = _changed(system.config, name, {key: value for key, value in part.items() if key != "share"})
            config[name].update(phases=(), steps=stop - start)
            made.append(Phase(number, title, start, stop, _with_stage(system, build(config), name)))
            _check_shapes(made[-1], system, name, last=number == len(parts))
        except UserError as error:
            raise UserError(f"{title}: {error}") from None
    return made


def _changed(config, name, settings):
    """A copy of the config with the settings {dotted key: value} of one phase. Raises UserError."""
    config = config.copy_and_resolve_references()
    known = [*_keys("data", config.data), *_keys(name, config[name])]
    fixed = tuple(key.format(name) for key in FIXED)
    for key, value in settings.items():
        if key in known and key.startswith(fixed):
            raise UserError(f"{key} cannot change from phase to phase")
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(f"there is no setting {key!r}: did you mean {nearest!r}?")
        try:
            if value is None:
                raise TypeError("give a value")
            if not key.endswith(PATTERNS):
                config.update_from_flattened_dict({key: value})
            elif hasattr(value, "items"):
                config[name].diffusion.patterns = dict(value)
            else:
                raise TypeError('give shares, such as {"text": 1.0}')
        except (TypeError, ValueError) as error:
            raise UserError(f"{key}={value!r}: {error}") from None
    return config


def _keys(prefix, settings):
    """The dotted keys of all settings in a ConfigDict; the patterns are one setting."""
    if prefix.endswith(PATTERNS):
        yield prefix
        return
    for key, value in settings.items():
        yield from _keys(f"{prefix}.{key}", value) if hasattr(value, "items") else [f"{prefix}.{key}"]


def _with_stage(system, phase_system, name):
    """The System of a phase. Its config, layout and models have the settings of the phase.

    The other stages are those of `system`, because they are trained with its settings.
    """
    stage = phase_system.stages[name]._replace(encoder_params=system.stages[name].encoder_params)
    return dataclasses.replace(phase_system, stages=system.stages | {name: stage})


def _check_shapes(phase, system, name, last):
    """Raises UserError where a phase has parameters of other shapes than the recipe.

    Only embeddings of positions may differ, and not in the last phase, whose weights are the result.
    """
    recipe = named_leaves(system.params[name])
    for path, leaf in named_leaves(phase.system.params[name]).items():
        if leaf.shape != recipe[path].shape and (last or path.split("/")[-1] != RESIZED):
            raise UserError(f"it changes {name}/{path} from {recipe[path].shape} to {leaf.shape}: keep data.size")


def first_params(ema, expected):
    """The parameters that a phase starts from, float32 NumPy arrays with values of half precision.

    ema: EMA parameters at the end of the phase before, a tree of NumPy arrays.
    expected: tree of ShapeDtypeStruct. Embeddings of positions follow the size of a frame: they are interpolated to the
        expected shapes (arXiv:2010.11929, section 3.2).
    """

    def resize(x, want):
        return x if x.shape == want.shape else np.asarray(jax.image.resize(x, want.shape, "linear"))

    return jax.tree.map(resize, folder.as_exported(ema), expected)
