"""Optimiser, learning-rate schedule and the moving average of parameters."""

import jax
import jax.numpy as jnp
import optax


def schedule(config):
    """Linear warm-up, then cosine decay to zero (arXiv:1608.03983)."""
    warmup = min(config.warmup_steps, config.steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)


def optimiser(config):
    """AdamW (arXiv:1711.05101) on clipped gradients; only kernels decay."""

    def is_kernel(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule(config), b2=config.beta2, weight_decay=config.weight_decay, mask=is_kernel),
    )


def update_ema(ema, params, step, decay):
    """ema <- d * ema + (1 - d) * params, with d = min(decay, (1 + step) / (10 + step)), so that early steps fade."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)
