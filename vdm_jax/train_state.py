"""The train state: a plain dict {'step', 'params', 'opt', 'ema'} and the one function that moves it on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vdm_jax import optim, sharding


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
    gradients = accumulated(jax.grad(loss_fn, has_aux=True), config.accumulate)

    def step(state, key, batch, frozen):
        key = jax.random.fold_in(key, state["step"])
        grads, metrics = gradients(state["params"], key, batch, frozen)
        updates, opt = jax.named_scope("optimiser")(optimiser.update)(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = optim.update_ema(state["ema"], params, state["step"], config.ema)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(optim.schedule(config)(state["step"])),
        }
        return {"step": state["step"] + 1, "params": params, "opt": opt, "ema": ema}, metrics

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
        total, metrics = jax.lax.scan(add, zeros, (jnp.arange(parts), sharding.in_parts(batch, parts)))
        return jax.tree.map(lambda x: x / parts, total), jax.tree.map(jnp.nanmean, metrics)

    return run


class Program(NamedTuple):
    """A stage's training on a mesh, nothing of it run yet."""

    init: Callable  # init() -> state, jitted, sharded
    step: Callable  # step(state, key, batch, frozen) -> (state, metrics), jitted, sharded; the old state is donated
    abstract: Any  # the state as ShapeDtypeStructs with shardings


def program(stage, config, key, mesh):
    """The Program of a stages.Stage under its settings `config`; its parameters are drawn from `key`."""

    def init():
        return create(stage.init(key), config)

    abstract = jax.eval_shape(init)
    shardings = sharding.state_shardings(abstract, mesh)
    return Program(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            make_step(stage.loss, config), donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh))
        ),
        abstract=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings),
    )
