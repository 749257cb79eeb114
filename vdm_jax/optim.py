"""Optimiser, learning-rate schedule and the moving average of parameters."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from vdm_jax.errors import UserError

METHODS = ("adamw", "muon")


def schedule(config):
    """Linear warm-up, then cosine decay to zero (arXiv:1608.03983)."""
    warmup = min(config.warmup_steps, config.steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)


def optimiser(config):
    """AdamW (arXiv:1711.05101) or Muon (Jordan et al. 2024) on clipped gradients; only kernels decay.

    Muon takes the kernels, as matrices of inputs by outputs, and updates them with AdamW's typical root mean square
    (arXiv:2502.16982, section 2.2), so one learning rate serves both; embeddings, norms and biases get AdamW.
    """
    if config.optimiser not in METHODS:
        raise UserError(f"optimiser={config.optimiser!r} is unknown: use {' or '.join(METHODS)}")
    rate, decay = schedule(config), config.weight_decay
    if config.optimiser == "adamw":
        method = optax.adamw(rate, b2=config.beta2, weight_decay=decay, mask=_is_matrix)
    else:
        method = optax.contrib.muon(
            rate,
            weight_decay=decay,
            adam_weight_decay=0.0,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=_as_matrices,
            consistent_rms=0.2,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), method)


def _is_matrix(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _as_matrices(params):
    """Which axes of each kernel are inputs and which outputs; None for what is no kernel."""

    def one(path, p):
        names = [str(getattr(k, "key", k)) for k in path]
        if names[-1] != "kernel":
            return None
        # Attention projections are [C, heads, d] in and [heads, d, C] out; all others are [*window, C_in, C_out].
        inputs = 1 if names[-2] in ("query", "key", "value") else p.ndim - 1
        axes = tuple(range(p.ndim))
        return optax.contrib.MuonDimensionNumbers(axes[:inputs], axes[inputs:])

    return jax.tree_util.tree_map_with_path(one, params)


def update_ema(ema, params, step, decay):
    """ema <- d * ema + (1 - d) * params, with d = min(decay, (1 + step) / (10 + step)), so that early steps fade."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)
