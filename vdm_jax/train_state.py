"""The train state, a plain dict {'step', 'params', 'opt', 'ema', 'loss_mean'}, and the function that updates it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vdm_jax import optim, sharding

LOSS_DECAY = 0.98  # decay a step of the moving average of the loss


def create(params, config, step=0):
    """Returns the state before the next step of a stage; `step` steps are done. config: the stage's settings."""
    return {
        "step": jnp.full((), step, jnp.int32),
        "params": params,
        "opt": optim.optimizer(config).init(params),
        "ema": jax.tree.map(jnp.copy, params),
        "loss_mean": jnp.full((), jnp.nan, jnp.float32),  # moving average over steps, nan before the first step
    }


def make_step(loss_fn, config, loss_over_mean=0.0, start=0):
    """Returns step(state, key, batch, encoder_params) -> (state, metrics).

    loss_fn: loss_fn(params, key, batch, encoder_params) -> (scalar, metrics).
    config: the settings of a stage.
    loss_over_mean: a step is skipped if its loss or its gradients are not finite, or if its loss is above this many
        times the moving average of the earlier losses; 0 for any finite loss.
    start: number of steps before the phase; the learning rate and the EMA count from there.

    A step folds its number into `key`, so a resumed run draws the same random numbers as an uninterrupted one. A
    skipped step changes only state['step'], and sets metrics['skipped'] to 1.
    """
    optimizer = optim.optimizer(config)
    gradients = accumulated(jax.grad(loss_fn, has_aux=True), config.accumulate)

    def step(state, key, batch, encoder_params):
        key = jax.random.fold_in(key, state["step"])
        grads, metrics = gradients(state["params"], key, batch, encoder_params)
        updates, opt = jax.named_scope("optimizer")(optimizer.update)(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = optim.update_ema(state["ema"], params, state["step"] - start, config.ema)
        loss, norm, mean = metrics["loss"], optax.tree.norm(grads), state["loss_mean"]
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        if loss_over_mean:
            good &= ~(loss > loss_over_mean * mean)  # false for the mean before the first step, which is nan
        good = optim.once(good)
        metrics |= {
            "grad_norm": norm,
            "learning_rate": jnp.asarray(optim.schedule(config)(state["step"] - start)),
            "skipped": 1.0 - good,
        }
        mean = jnp.where(jnp.isnan(mean), loss, LOSS_DECAY * mean + (1 - LOSS_DECAY) * loss)
        moved = {"params": params, "opt": opt, "ema": ema, "loss_mean": mean}
        # A select fuses with the update. With a conditional XLA could not write into the donated state.
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, {name: state[name] for name in moved})
        return {"step": state["step"] + 1, **kept}, metrics

    return step


def finite(state):
    """Returns {part: whether its numbers are finite} for 'params' and 'ema'.

    A step is skipped when its loss or its gradient is not finite. An update can still spoil the state.
    """
    # If one number is not finite, the sum is not. A sum compiles in half the time of a test of each number.
    return {part: jnp.isfinite(optax.tree.sum(state[part])) for part in ("params", "ema")}


def accumulated(gradients, parts):
    """Returns a function like `gradients` that processes a batch in parts, one after the other, to save memory.

    gradients: gradients(params, key, batch, encoder_params) -> (grads, metrics).

    The results are the means over the parts. Each part has its own key. A loss that compares the clips of a batch with
    each other, such as the text encoder's, compares only the clips of one part.
    """
    if parts == 1:
        return gradients

    def run(params, key, batch, encoder_params):
        def add(total, numbered):
            number, part = numbered
            grads, metrics = gradients(params, jax.random.fold_in(key, number), part, encoder_params)
            return jax.tree.map(jnp.add, total, grads), metrics

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, metrics = jax.lax.scan(add, zeros, (jnp.arange(parts), sharding.microbatches(batch, parts)))
        return jax.tree.map(lambda x: x / parts, total), jax.tree.map(jnp.nanmean, metrics)

    return run


class Program(NamedTuple):
    """A stage's training on a mesh. Nothing is compiled or run yet."""

    init: Callable  # init() -> state; jitted and sharded
    begin: Callable  # begin(params) -> state before the first step of a phase; jitted and sharded
    step: Callable  # step(state, key, batch, encoder_params) -> (state, metrics); jitted, sharded, donates the state
    finite: Callable  # the function `finite`; jitted
    abstract: Any  # the state as ShapeDtypeStructs with shardings


def program(stage, config, key, mesh, loss_over_mean, start=0):
    """Returns the Program of a stage, a system.losses.Stage.

    config: the settings of the stage.
    key: for the initial parameters.
    loss_over_mean, start: as in `make_step`.
    """

    def begin(params):
        return create(params, config, start)

    def init():
        return begin(stage.init(key))

    abstract = jax.eval_shape(init)
    shardings = sharding.state_shardings(abstract, mesh)
    results = shardings, sharding.replicated(mesh)  # state, metrics
    step = make_step(stage.loss, config, loss_over_mean, start)
    return Program(
        init=jax.jit(init, out_shardings=shardings),
        begin=jax.jit(begin, out_shardings=shardings),
        step=jax.jit(step, donate_argnums=0, out_shardings=results),
        finite=jax.jit(finite, out_shardings=sharding.replicated(mesh)),
        abstract=jax.tree.map(lambda x, s: x.update(sharding=s), abstract, shardings),
    )
