"""How activations lie on the mesh."""

from vdm_jax.sharding import constrain


def constrain_clips(x):
    """Splits a video [B, T, H, W, C] or a sound [B, N, C] over the current mesh; the identity without a mesh."""
    places = ("time", "height", "width") if x.ndim == 5 else ("token",)
    return constrain(x, "batch", *places, "channel")
