"""The train state: a plain dict {'step', 'params', 'opt', 'ema'} and the one function that moves it on."""

import jax
import jax.numpy as jnp
import optax

from vdm_jax import optim


def create(params, config):
    """A fresh state for `params` under a stage's optimiser settings."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt": optim.optimiser(config).init(params),
        "ema": jax.tree.map(jnp.copy, params),
    }


def make_step(loss_fn, config):
    """-> step(state, key, batch, frozen) -> (state, metrics). loss_fn(params, key, batch, frozen) -> (scalar, metrics).

    The key of a step is folded from its number, so a resumed run draws what it would have drawn.
    """
    optimiser = optim.optimiser(config)

    def step(state, key, batch, frozen):
        key = jax.random.fold_in(key, state["step"])
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state["params"], key, batch, frozen)
        updates, opt = optimiser.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = optim.update_ema(state["ema"], params, state["step"], config.ema)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(optim.schedule(config)(state["step"])),
        }
        return {"step": state["step"] + 1, "params": params, "opt": opt, "ema": ema}, metrics

    return step
