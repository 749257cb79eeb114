"""The train state: a plain dict {'step', 'params', 'opt', 'ema', 'loss_mean'} and the one function that moves it on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vdm_jax import optim, sharding

LOSS_DECAY = 0.98  # a step, of the moving average of the loss


def create(params, config):
    """A fresh state for `params` under a stage's optimizer settings."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt": optim.optimizer(config).init(params),
        "ema": jax.tree.map(jnp.copy, params),
        "loss_mean": jnp.full((), jnp.nan, jnp.float32),  # moving average over steps, nan before the first
    }


def make_step(loss_fn, config, loss_over_mean=0.0):
    """-> step(state, key, batch, frozen) -> (state, metrics). loss_fn(params, key, batch, frozen) -> (scalar, metrics).

    The key of a step is folded from its number, so a resumed run draws what it would have drawn.

    A step whose loss or gradients are not finite is skipped: only its number moves on, and metrics["skipped"] is 1.
    With loss_over_mean > 0 so is one whose loss is more than that many times the moving average of the losses before.
    """
    optimizer = optim.optimizer(config)
    gradients = accumulated(jax.grad(loss_fn, has_aux=True), config.accumulate)

    def step(state, key, batch, frozen):
        key = jax.random.fold_in(key, state["step"])
        grads, metrics = gradients(state["params"], key, batch, frozen)
        updates, opt = jax.named_scope("optimizer")(optimizer.update)(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = optim.update_ema(state["ema"], params, state["step"], config.ema)
        loss, norm, mean = metrics["loss"], optax.tree.norm(grads), state["loss_mean"]
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        if loss_over_mean:
            good &= ~(loss > loss_over_mean * mean)  # no mean yet (nan): no spike
        metrics |= {
            "grad_norm": norm,
            "learning_rate": jnp.asarray(optim.schedule(config)(state["step"])),
            "skipped": 1.0 - good,
        }
        mean = jnp.where(jnp.isnan(mean), loss, LOSS_DECAY * mean + (1 - LOSS_DECAY) * loss)
        moved = {"params": params, "opt": opt, "ema": ema, "loss_mean": mean}
        # A select fuses with the update; a conditional would keep XLA from writing into the donated state.
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, {name: state[name] for name in moved})
        return {"step": state["step"] + 1, **kept}, metrics

    return step


def accumulated(gradients, parts):
    """gradients(params, key, batch, frozen) -> (grads, metrics), for `parts` parts of the batch one after the other.

    The means of both over the parts; a part draws from a key of its own. A loss that compares the clips of a batch
    with one another (the text encoder's) sees those of a part.
    """
    if parts == 1:
        return gradients

    def run(params, key, batch, frozen):
        def add(total, numbered):
            number, part = numbered
            grads, metrics = gradients(params, jax.random.fold_in(key, number), part, frozen)
            return jax.tree.map(jnp.add, total, grads), metrics

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, metrics = jax.lax.scan(add, zeros, (jnp.arange(parts), sharding.microbatches(batch, parts)))
        return jax.tree.map(lambda x: x / parts, total), jax.tree.map(jnp.nanmean, metrics)

    return run


class Program(NamedTuple):
    """A stage's training on a mesh, nothing of it run yet."""

    init: Callable  # init() -> state, jitted, sharded
    step: Callable  # step(state, key, batch, frozen) -> (state, metrics), jitted, sharded; the old state is donated
    abstract: Any  # the state as ShapeDtypeStructs with shardings


def program(stage, config, key, mesh, loss_over_mean=0.0):
    """The Program of a stages.Stage under its settings `config`; its parameters are drawn from `key`. See make_step."""

    def init():
        return create(stage.init(key), config)

    abstract = jax.eval_shape(init)
    shardings = sharding.state_shardings(abstract, mesh)
    return Program(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            make_step(stage.loss, config, loss_over_mean),
            donate_argnums=0,
            out_shardings=(shardings, sharding.replicated(mesh)),
        ),
        abstract=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings),
    )
