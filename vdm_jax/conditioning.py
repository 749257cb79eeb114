"""The one place where text, given frames and dropped conditions become what the denoiser gets.

A condition is the text, {'states' [B, L, D], 'mask' [B, L], 'pooled' [B, D]}. The null condition is the encoded empty
prompt. Given frames are no condition of their own: they are latents at the cleanest noise level.
"""

import jax
import jax.numpy as jnp


def broadcast_text(words, batch):
    """A condition of batch size 1 repeated to `batch`."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), words)


def drop_text(key, words, null, share):
    """Replaces the text of about `share` of the batch by the null text, so that one network learns both (guidance)."""
    batch = words["pooled"].shape[0]
    dropped = jax.random.uniform(key, (batch,)) < share

    def choose(empty, full):
        return jnp.where(dropped.reshape(-1, *(1,) * (full.ndim - 1)), empty, full)

    return jax.tree.map(choose, broadcast_text(null, batch), words)


def denoise_fn(model, params):
    """denoise(z, log_snr, cond) -> prediction, for `diffusion.loss` and the samplers."""

    def denoise(z, log_snr, cond):
        return model.apply({"params": params}, z, log_snr, cond)

    return denoise
