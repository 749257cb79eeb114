"""Train and sample video-with-sound diffusion models in JAX."""

from vdm_jax.pipeline import Clip, Pipeline, load

__all__ = ["Clip", "Pipeline", "load"]
