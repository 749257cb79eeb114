"""Operations for TPUs and GPUs: XLA's own, arranged so that few bytes go through memory.

`dtype` is the type in which products are computed. Space is any number of dimensions, of which time is the first.
"""

import functools
import math

import jax
import jax.numpy as jnp

from vdm_jax.sharding import constrain, shard_map_batch, split


def dense(x, kernel, bias, dtype):
    """x [..., K] @ kernel [K, N] + bias [N], in `dtype`; bias may be None."""
    return add_bias(x.astype(dtype) @ kernel.astype(dtype), bias)


def add_bias(x, bias):
    """x + bias, in the type of x; bias may be None."""
    return x if bias is None else x + bias.astype(x.dtype)


def upsample(x, factors):
    """Nearest-neighbor upsampling of x [B, *space, C] by one factor for each space dimension."""
    for axis, factor in enumerate(factors, 1):
        x = jnp.repeat(x, factor, axis)
    return x


def affine(x, scale, bias):
    """x [..., C] * scale [C] + bias [C]; bias may be None."""
    return x * scale if bias is None else x * scale + bias


def attention(query, key, value, mask, bounded=False):
    """Softmax attention (arXiv:1706.03762, eq. 1) of query [..., N, heads, d] to key and value [..., M, heads, d].

    mask: bool [..., M], True = may be read, or None
    bounded: whether queries and keys are normalized, so that no score is large; only `cpu.attention` uses it
    """
    scores = jnp.einsum("...nhd,...mhd->...hnm", query, key) / math.sqrt(query.shape[-1])
    scores = scores.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[..., None, None, :], scores, -1e9)
    weights = jax.nn.softmax(scores, -1).astype(value.dtype)
    return jnp.einsum("...hnm,...mhd->...nhd", weights, value)


def conv(x, kernel, bias, strides, padding, dtype):
    """Convolves x [B, *space, C_in] with kernel [*window, C_in, C_out] and adds the bias, in `dtype`; bias may be None.

    strides: one for each space dimension
    padding: a pair (before, after) for each space dimension
    """
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if split("sequence"):
        # XLA may choose a split along time that is finer than sharding.MIN_SHARD allows, and then computes wrong
        # values. Constraints on input and output prevent this, also for the gradients.
        return constrain(add_bias(xla_conv(constrain(x), kernel, strides, padding), bias))
    if kernel.ndim == 5:
        return _conv_video(x, kernel, bias, strides, padding)
    return add_bias(xla_conv(x, kernel, strides, padding), bias)


def _conv_video(x, kernel, bias, strides, padding):
    """The convolution of a video in as few dimensions as its window has, with the frames outermost in memory.

    With fewer than eight clips on a device, XLA for TPUs cuts the frames of a 3-D convolution into pieces with halos,
    which costs up to 1.5 times the FLOPs.
    """

    def space(x, kernel, bias):  # a 2-D convolution, whose batch is all frames of all clips
        b, t = x.shape[:2]
        x = x.swapaxes(0, 1).reshape(t * b, *x.shape[2:])  # [T*B, H, W, C]
        out = add_bias(xla_conv(x, kernel[0], strides[1:], padding[1:]), bias)
        return out.reshape(t, b, *out.shape[1:]).swapaxes(0, 1)

    def time(x, kernel, bias):  # a 1-D convolution, whose batch is all pixels of all clips
        b, t, h, w, c = x.shape
        x = x.swapaxes(0, 1).reshape(t, b * h * w, c)  # [T, B*H*W, C]
        out = add_bias(xla_conv(x, kernel[:, 0, 0], strides[:1], padding[:1], "WNC"), bias)
        return out.reshape(-1, b, h, w, out.shape[-1]).swapaxes(0, 1)

    def full(x, kernel, bias):  # a sum of 2-D convolutions, one for each frame of the window
        b = len(x)
        if b >= 8 or strides[0] > 1:
            return add_bias(xla_conv(x, kernel, strides, padding), bias)
        x = jnp.pad(x.swapaxes(0, 1), (padding[0], *[(0, 0)] * 4))  # [T + padding, B, H, W, C]
        t = len(x) - len(kernel) + 1
        shifted = (x[i : i + t].reshape(t * b, *x.shape[2:]) for i in range(kernel.shape[0]))
        out = sum(xla_conv(frames, tap, strides[1:], padding[1:]) for frames, tap in zip(shifted, kernel))
        return add_bias(out, bias).reshape(t, b, *out.shape[1:]).swapaxes(0, 1)

    if kernel.shape[0] == strides[0] == 1:
        return shard_map_batch(space, x, kernel, bias)
    if kernel.shape[1:3] == strides[1:] == (1, 1):
        return shard_map_batch(time, x, kernel, bias)
    return shard_map_batch(full, x, kernel, bias)


def xla_conv(x, kernel, strides, padding, layout=None):
    """XLA's own convolution. layout: of the dimensions of x and of the result; None for [N, *space, C]."""
    space = "DHW"[-len(strides) :]
    layout = layout or f"N{space}C"
    dimensions = (layout, f"{space}IO", layout)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dimensions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def norm_act(coefficients, activation, dtype, x, parameters):
    """activation(x * a + b), where a, b [B, frames, C] = coefficients(sum of x, sum of x^2, parameters).

    x is [B, frames, *space, C], and the sums run over space. All is computed in float32; the result is in `dtype`.

    Memory traffic limits the speed. With its own gradient, XLA for TPUs stores x and the gradient in float32 between
    the two passes of the backward computation. Here each pass reads both in the types that they already have.
    """
    x = jax.lax.optimization_barrier(x)  # without it the convolution that makes x would write float32
    return _norm_act_forward(coefficients, activation, dtype, x, parameters)[0]


def _norm_act_forward(coefficients, activation, dtype, x, parameters):
    space = tuple(range(2, x.ndim - 1))  # height and width stay apart: XLA for TPUs would copy x to merge them
    y = x.astype(jnp.float32)
    (a, b), pull = jax.vjp(coefficients, y.sum(space), jnp.square(y).sum(space), parameters)
    out = activation(y * jnp.expand_dims(a, space) + jnp.expand_dims(b, space)).astype(dtype)
    return out, (x, a, b, pull)


def _norm_act_backward(coefficients, activation, dtype, saved, grad):
    x, a, b, pull = saved
    space = tuple(range(2, x.ndim - 1))

    def before_activation(x, grad):
        """-> (x, the gradient of x * a + b), float32."""
        x, grad = x.astype(jnp.float32), grad.astype(jnp.float32)
        y = x * jnp.expand_dims(a, space) + jnp.expand_dims(b, space)
        return x, jax.vjp(activation, y)[1](grad)[0]

    x, grad = jax.lax.optimization_barrier((x, grad))
    y, g = before_activation(x, grad)
    sum_grad, squares_grad, parameters_grad = pull(((g * y).sum(space), g.sum(space)))
    x, grad, sum_grad, squares_grad = jax.lax.optimization_barrier((x, grad, sum_grad, squares_grad))
    y, g = before_activation(x, grad)  # again: the barrier keeps XLA from storing the first results in float32
    g = g * jnp.expand_dims(a, space) + jnp.expand_dims(sum_grad, space) + 2 * y * jnp.expand_dims(squares_grad, space)
    return g.astype(x.dtype), parameters_grad


norm_act.defvjp(_norm_act_forward, _norm_act_backward)
