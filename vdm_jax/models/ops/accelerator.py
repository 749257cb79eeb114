"""Forms of layers for TPUs and GPUs: XLA's own operations, arranged so that little goes through memory.

Arrays are as in layers.py, which chooses between these and cpu.py; values and gradients are the same.
"""

import functools

import jax
import jax.numpy as jnp

from vdm_jax.sharding import shard_map_batch, split


def conv(x, kernel, bias, strides, padding):
    """XLA's own convolution; a factorized one of a video in as many dimensions as its window has.

    With fewer than eight clips a device XLA's form of a 3-D one for TPUs cuts frames into pieces with halos: up to half
    as many FLOPs again. Frames stay outermost in all forms, so that nothing is moved from one to the other.
    """

    def space(x, kernel, bias):  # frames of all clips are the batch
        b, t = x.shape[:2]
        x = x.swapaxes(0, 1).reshape(t * b, *x.shape[2:])
        out = _convolved(x, kernel[0], strides[1:], padding[1:]) + bias
        return out.reshape(t, b, *out.shape[1:]).swapaxes(0, 1)

    def time(x, kernel, bias):  # pixels of all clips are
        b, t, h, w, c = x.shape
        x = x.swapaxes(0, 1).reshape(t, b * h * w, c)
        out = _convolved(x, kernel[:, 0, 0], strides[:1], padding[:1], "WNC") + bias
        return out.reshape(-1, b, h, w, out.shape[-1]).swapaxes(0, 1)

    def full(x, kernel, bias):
        b, t = x.shape[:2]
        if b >= 8 or strides[0] > 1:
            return _convolved(x, kernel, strides, padding) + bias
        x = jnp.pad(x.swapaxes(0, 1), (padding[0], *[(0, 0)] * 4))
        met = (x[i : i + t].reshape(t * b, *x.shape[2:]) for i in range(kernel.shape[0]))
        out = sum(_convolved(frames, k, strides[1:], padding[1:]) for frames, k in zip(met, kernel)) + bias
        return out.reshape(t, b, *out.shape[1:]).swapaxes(0, 1)

    if kernel.ndim == 5 and not split("sequence"):
        if kernel.shape[0] == strides[0] == 1:
            return shard_map_batch(space, x, kernel, bias)
        if kernel.shape[1:3] == strides[1:] == (1, 1):
            return shard_map_batch(time, x, kernel, bias)
        return shard_map_batch(full, x, kernel, bias)
    return _convolved(x, kernel, strides, padding) + bias


def _convolved(x, kernel, strides, padding, layout=None):
    space = "DHW"[-len(strides) :]
    layout = layout or f"N{space}C"
    dims = (layout, f"{space}IO", layout)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dims)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def norm_act(coefficients, activation, dtype, x, parameters):
    """cpu.norm_act for accelerators: x [B, frames, *space, C] -> the same in `dtype`, computed in float32.

    The backward pass reads x and the gradient twice, in the types they have. Left to itself XLA for TPUs keeps what it
    computed of them for the sums, in float32: twice the bytes, and these layers are bound by bytes.
    """
    x = jax.lax.optimization_barrier(x)  # or what convolves before it would write float32
    return _norm_act_forward(coefficients, activation, dtype, x, parameters)[0]


def _over_space(x):
    return tuple(range(2, x.ndim - 1))  # height and width stay apart: to merge them XLA for TPUs would copy


def _norm_act_forward(coefficients, activation, dtype, x, parameters):
    over, y = _over_space(x), x.astype(jnp.float32)
    (a, b), pull = jax.vjp(coefficients, y.sum(over), jnp.square(y).sum(over), parameters)
    out = activation(y * jnp.expand_dims(a, over) + jnp.expand_dims(b, over)).astype(dtype)
    return out, (x, a, b, pull)


def _norm_act_backward(coefficients, activation, dtype, saved, grad):
    x, a, b, pull = saved
    over = _over_space(x)

    def before_activation(x, grad):
        x, grad = x.astype(jnp.float32), grad.astype(jnp.float32)
        y = x * jnp.expand_dims(a, over) + jnp.expand_dims(b, over)
        return x, jax.vjp(activation, y)[1](grad)[0]

    x, grad = jax.lax.optimization_barrier((x, grad))
    y, g = before_activation(x, grad)
    first, second, parameters = pull(((g * y).sum(over), g.sum(over)))
    x, grad, first, second = jax.lax.optimization_barrier((x, grad, first, second))
    y, g = before_activation(x, grad)
    g = g * jnp.expand_dims(a, over) + jnp.expand_dims(first, over) + 2 * y * jnp.expand_dims(second, over)
    return g.astype(x.dtype), parameters


norm_act.defvjp(_norm_act_forward, _norm_act_backward)
