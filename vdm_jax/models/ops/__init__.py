"""The operations that CPUs and accelerators compute in different ways.

The modules `cpu` and `accelerator` are two tables with the same functions, which give the same values and gradients up
to rounding; `accelerator` says what each function takes and returns. `layers.py` asks `current()` for the table and
never asks which device it runs on.
"""

import contextlib
import contextvars

import jax

from vdm_jax.models.ops import accelerator, cpu

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
    return cpu if platform == "cpu" else accelerator
