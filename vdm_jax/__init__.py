"""Train and sample video-with-sound diffusion models in JAX."""

import importlib

__all__ = ["Clip", "Pipeline", "Scene", "load"]


def __getattr__(name):  # JAX is loaded when one of these names is asked for: reading data must start quickly
    if name in __all__:
        return getattr(importlib.import_module("vdm_jax.pipeline"), name)
    raise AttributeError(f"module 'vdm_jax' has no attribute {name!r}")
