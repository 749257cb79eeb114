"""The operations that CPUs and accelerators compute in different ways, behind one table.

Both tables give the same values and gradients up to rounding. `layers.py` asks `current()` for the table and never asks
which device it runs on.
"""

import contextlib
import contextvars
from collections.abc import Callable
from typing import NamedTuple

import jax

from vdm_jax.models.ops import accelerator, cpu


class Ops(NamedTuple):
    """One table. Arrays are channels last, and `dtype` is the type in which products are computed.

    Sizes: space is any number of dimensions, of which time is the first; N queries read M keys.
    """

    activation_dtype: Callable  # (dtype) -> the type of arrays between layers
    dense: Callable  # (x [..., K], kernel [K, N], bias [N] or None, dtype) -> [..., N]
    conv: Callable  # (x [B, *space, C_in], kernel [*window, C_in, C_out], bias, strides, padding, dtype) -> like x
    upsample: Callable  # (x [B, *space, C], factors) -> like x
    norm_act: Callable  # (coefficients, activation, dtype, x [B, frames, *space, C], parameters) -> like x
    affine: Callable  # (x [..., C], scale [C], bias [C] or None) -> like x
    attention: Callable  # (query [B, N, heads, d], key, value [B, M, heads, d], mask [B, M], bounded) -> like query


def _table(module):
    return Ops(*(getattr(module, name) for name in Ops._fields))


CPU, ACCELERATOR = _table(cpu), _table(accelerator)

_platform = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def backend(platform):
    """Within this context, models are traced with the table of `platform` ("cpu", "gpu" or "tpu").

    `dry_run` compiles for TPUs on a machine without one, and `bench` counts the FLOPs of a model in the forms of
    accelerators. A function that was jitted before keeps the table that it was traced with.
    """
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def current():
    """The table of the platform that is being traced for: that of `backend`, or else JAX's default backend."""
    platform = _platform.get() or jax.default_backend()
    return CPU if platform == "cpu" else ACCELERATOR
