"""The optimizer, the learning-rate schedule and the moving average of parameters."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import optax

from vdm_jax.errors import one_of

METHODS = ("adamw", "muon")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of Muon's polynomial a s + b s^3 + c s^5 (Jordan et al. 2024)


def schedule(config):
    """Returns the learning rate as a function of the step: linear warm-up, then cosine decay to 0 (arXiv:1608.03983).

    The warm-up takes half of the steps at most.
    """
    warmup = min(config.warmup_steps, config.steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)


def optimizer(config):
    """Returns AdamW (arXiv:1711.05101) or Muon (Jordan et al. 2024), both with clipped gradients.

    AdamW decays arrays of two or more dimensions. Muon updates and decays the kernels, as matrices of inputs by
    outputs. Embeddings, norms and biases then get AdamW without decay. Muon's updates have AdamW's typical root mean
    square (arXiv:2502.16982, section 2.2), so both use the same learning rate. Raises UserError for an unknown method.
    """
    name = one_of("optimizer", config.optimizer, METHODS)
    rates, decay = schedule(config), config.weight_decay

    def rate(step):
        return once(rates(step))

    if name == "adamw":
        matrices = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
        method = optax.adamw(rate, b2=config.beta2, weight_decay=decay, mask=matrices)
    else:
        muon = optax.chain(
            optax.trace(0.95, nesterov=True),
            optax.stateless(lambda updates, _: orthogonalized(updates)),
            optax.scale(0.2),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(rate),
        )
        adam = optax.adamw(rate, b2=config.beta2, weight_decay=0.0, nesterov=True)
        labels = functools.partial(
            jax.tree.map_with_path, lambda path, p: "muon" if path[-1].key == "kernel" and p.ndim > 1 else "adam"
        )
        method = optax.partition({"muon": muon, "adam": adam}, labels)
    return optax.chain(optax.stateless(lambda updates, _: clipped(updates, config.clip_norm)), method)


def clipped(grads, largest):
    """Returns gradients scaled down so that their global norm is `largest` at most.

    optax.clip_by_global_norm divides each array by the norm instead. On a CPU these divisions are not fused.
    """
    factor = once(jnp.minimum(1.0, largest / optax.tree.norm(grads)))
    return jax.tree.map(lambda x: x * factor, grads)


def orthogonalized(kernels):
    """Returns for each kernel about the nearest orthogonal matrix, scaled to a root mean square of 1.

    Kernels of one shape are one batch. optax.contrib.muon iterates each kernel alone and compiles almost twice as long.
    """
    leaves, tree = jax.tree.flatten_with_path(kernels)
    batches = collections.defaultdict(list)
    for number, (path, x) in enumerate(leaves):
        matrix = x.reshape(math.prod(x.shape[: input_dimensions(path, x.ndim)]), -1)
        tall = matrix.shape[0] > matrix.shape[1]
        matrix = matrix.T if tall else matrix  # [rows, columns], rows <= columns
        batches[matrix.shape].append((number, tall, matrix))
    out = [None] * len(leaves)
    for shape, members in batches.items():
        batch = _newton_schulz(jnp.stack([matrix for *_, matrix in members])) * shape[1] ** 0.5
        for (number, tall, _), matrix in zip(members, batch, strict=True):
            out[number] = (matrix.T if tall else matrix).reshape(leaves[number][1].shape)
    return tree.unflatten(out)


def input_dimensions(path, ndim):
    """Returns how many dimensions of the kernel at a path of jax.tree_util are inputs; the others are outputs.

    Attention projections are [C, heads, d] in and [heads, d, C] out. All others are [*window, C_in, C_out].
    """
    return 1 if path[-2].key in ("query", "key", "value") else ndim - 1


def _newton_schulz(x):
    """Returns matrices [n, rows, columns], rows <= columns, with singular values between about 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    x /= jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8

    def iteration(_, x):
        gram = x @ x.mT  # [n, rows, rows]
        return a * x + (b * gram + c * gram @ gram) @ x

    return jax.lax.fori_loop(0, 5, iteration, x)


def once(x):
    """Returns the scalar x, which XLA then computes once.

    XLA repeats a cheap scalar in every kernel that reads it. A train step has thousands of kernels that read the same
    few scalars, and on a CPU the repetitions take a tenth of the time to compile. XLA does not repeat a sort.
    """
    return jax.lax.sort(jnp.stack([x, x]))[0]


def update_ema(ema, params, step, decay):
    """Returns d * ema + (1 - d) * params with d = min(decay, (1 + step) / (10 + step)).

    Early in training d is small, so the initial parameters are soon forgotten.
    """
    d = once(jnp.minimum(decay, (1.0 + step) / (10.0 + step)))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)
