"""The operations that CPUs and accelerators compute in different ways.

The modules `cpu` and `accelerator` are two tables with the same functions, which give the same values and gradients up
to rounding; `accelerator` says what each function takes and returns. `layers.py` asks `current()` for the table and
never asks which device it runs on.
"""

import jax
import jax.numpy as jnp

from vdm_jax.models.ops import accelerator, cpu

# Within `with backend("tpu"):` models are traced with the table of that platform ("cpu", "gpu" or "tpu"). `dry_run`
# compiles for TPUs on a machine without one, and `bench` counts the FLOPs of a model in the forms of accelerators.
backend = jax.make_user_context(None)


def current():
    """The table of the platform that is being traced for: that of `backend`, or else JAX's default backend."""
    return cpu if (backend.value or jax.default_backend()) == "cpu" else accelerator


def activation_dtype(dtype):
    """The type of the arrays between layers whose products are computed in `dtype`: on a CPU always float32."""
    return jnp.float32 if current() is cpu else dtype
