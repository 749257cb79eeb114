"""How activations lie on the mesh."""

from vdm_jax.sharding import constrain

_DIMENSIONS = {
    5: ("batch", "time", "height", "width", "channel"),  # a video [B, T, H, W, C]
    3: ("batch", "token", "channel"),  # a sound [B, N, C]
}


def constrain_clips(x):
    """Splits a video [B, T, H, W, C] or a sound [B, N, C] over the current mesh; the identity without a mesh."""
    return constrain(x, *_DIMENSIONS[x.ndim])
