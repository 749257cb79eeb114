"""Operations for CPUs: the values and gradients of XLA's own operations, in forms that XLA's CPU backend runs faster.

`accelerator.py` says what each function takes and returns; here results are float32. A residual block of the world_tiny
denoiser takes 1.8 times as long with XLA's own operations: `taskset -c 0 python -m tests.peers.forms`.

What XLA's own operations do slowly on a CPU, and what these functions do instead:
- Sums over all rows of an array. XLA joins the sum with the operations that made the array, and then does not vectorize
  it. Here the sum is a product with a row of ones.
- The weight gradient of a convolution. Here it is a product of matrices for each row of taps.
- float32 convolutions. Where it pays, `winograd.py` replaces them by a few smaller products of matrices.
- bfloat16. Processors with matrix units (AMX) multiply bfloat16 several times faster than float32 and sum in float32,
  but all other bfloat16 operations are slower. Here only the operands of products are bfloat16, and the arrays between
  products stay float32. Copies of bfloat16 arrays are slow too, so they are copied as pairs in 32-bit words.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.models.ops import accelerator, winograd
from vdm_jax.models.ops.accelerator import add_bias


def _row_sum(x):  # [..., M, C] -> [..., C]
    return jnp.matmul(jnp.ones((*x.shape[:-2], 1, x.shape[-2]), x.dtype), x)[..., 0, :]


def _flat(x):
    return x.reshape(-1, x.shape[-1])  # [..., C] -> [M, C]


def _pack(x, dtype):
    """x in `dtype`. bfloat16 channels become pairs, as float32 words [..., C / 2], if their number is even."""
    x = x.astype(dtype)
    if dtype != jnp.bfloat16 or x.shape[-1] % 2:
        return x
    return jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.float32)


def _unpack(x, dtype):
    if x.dtype == dtype:
        return x
    x = jax.lax.bitcast_convert_type(x, dtype)
    return x.reshape(*x.shape[:-2], -1)


def _product(a, b):  # in the type of the operands, summed in float32
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _transpose_apart(x):
    """x.T, which XLA does not merge with the product that made x: it would choose a slow form of that product."""
    return jax.lax.optimization_barrier(x).T


def _transpose_to_bfloat16(x):
    """x.T, by a product with the identity: XLA would make the product that reads a plain transposition a slow one."""
    identity = jnp.eye(x.shape[1], dtype=jnp.bfloat16)
    rows = (((1,), (1,)), ((), ()))
    product = jax.lax.dot_general(identity, x.astype(jnp.bfloat16), rows, preferred_element_type=jnp.float32)
    return product.astype(jnp.bfloat16)


def _places(tap, size, strides=None):
    """Indexes, in [B, *space, ...], the `size` places from a tap on that are `strides` apart."""
    strides = strides or (1,) * len(size)
    return (slice(None), *(slice(i, i + (n - 1) * s + 1, s) for i, n, s in zip(tap, size, strides)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense(x, kernel, bias, dtype):
    """x [..., K] @ kernel [K, N] + bias [N]; bias may be None."""
    return add_bias(_product(x.astype(dtype), kernel.astype(dtype)), bias)


def _bias_grad(bias, grad):
    return None if bias is None else _row_sum(_flat(grad))


def _dense_backward(dtype, saved, grad):
    x, kernel, bias = saved
    x_grad = _product(grad.astype(dtype), kernel.astype(dtype).T)
    if dtype == jnp.bfloat16:
        kernel_grad = _transpose_apart(_product(_transpose_to_bfloat16(_flat(grad)), _flat(x)))
    else:
        kernel_grad = _product(_flat(x).T, _flat(grad))
    return x_grad, kernel_grad, _bias_grad(bias, grad)


dense.defvjp(
    lambda x, kernel, bias, dtype: (dense(x, kernel, bias, dtype), (x.astype(dtype), kernel, bias)), _dense_backward
)


def conv(x, kernel, bias, strides, padding, dtype):
    """Convolves x [B, *space, C_in] with kernel [*window, C_in, C_out] and adds the bias; bias may be None."""
    if max(strides) > 1:
        return _conv_strided(x, kernel, bias, strides, padding, dtype)
    if max(kernel.shape[:-2]) == 1:
        return dense(x, kernel.reshape(kernel.shape[-2:]), bias, dtype)
    return conv_unit_strides(x, kernel, bias, padding, dtype)


def _conv_strided(x, kernel, bias, strides, padding, dtype):
    """One product of matrices: the inputs of all taps lie side by side in the channels."""
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    *window, _, c_out = kernel.shape
    size = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:-1], window, strides)]
    inputs = [x[_places(tap, size, strides)] for tap in np.ndindex(*window)]
    columns = jnp.concatenate(inputs, -1)  # [B, *space, taps * C_in]
    return add_bias(dense(columns, kernel.reshape(-1, c_out), None, dtype), bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def conv_unit_strides(x, kernel, bias, padding, dtype):
    """`conv` with unit strides."""
    return add_bias(_unit_form(x, kernel, dtype)(x, kernel, padding), bias)


def _unit_form(x, kernel, dtype):
    """The function (x, kernel, padding) -> output that is fastest for these shapes."""
    if dtype == jnp.bfloat16:
        return _conv_products
    return winograd.conv if winograd.suits(x.shape, kernel.shape) else _conv_direct


def _conv_forward(x, kernel, bias, padding, dtype):
    x = x.astype(dtype)
    return conv_unit_strides(x, kernel, bias, padding, dtype), (x, kernel, bias)


def _conv_backward(padding, dtype, saved, grad):
    x, kernel, bias = saved
    form = _unit_form(x, kernel, dtype)
    if form is winograd.conv:
        return *winograd.gradients(x, kernel, grad, padding), _bias_grad(bias, grad)
    window = kernel.shape[:-2]
    flipped = jnp.flip(kernel, range(len(window))).swapaxes(-1, -2)
    # The gradient of the input is a convolution too. Padding p before the input becomes k - 1 - p before the gradient.
    grad_padding = tuple((k - 1 - before, k - 1 - after) for k, (before, after) in zip(window, padding))
    x_grad = form(grad, flipped, grad_padding)
    columns = _side_by_side(x, window, padding, dtype)
    size = [n - k + 1 for n, k in zip(columns.shape[1:-2], window)]
    parts = (_unpack(columns[_places(tap, size)], dtype) for tap in np.ndindex(*window[:-1]))
    flat = _flat(grad)
    if dtype == jnp.bfloat16:
        flat = _transpose_to_bfloat16(flat)
        taps = [_transpose_apart(_product(flat, _flat(part))) for part in parts]
    else:
        taps = [_product(_flat(part).T, flat) for part in parts]
    return x_grad, jnp.stack(taps).reshape(kernel.shape), _bias_grad(bias, grad)


conv_unit_strides.defvjp(_conv_forward, _conv_backward)


def _conv_direct(x, kernel, padding):
    """XLA's own 2-D convolution; other dimensions are folded into the batch, or summed over tap by tap."""
    conv_2d = functools.partial(accelerator.xla_conv, strides=(1, 1))
    (b, t, *space, c), (taps, *window, _, features) = x.shape, kernel.shape
    if math.prod(window) == 1:  # a sound, or the frames of each pixel
        x, kernel = x.reshape(b, t, -1, c), kernel.reshape(taps, 1, c, features)
        return conv_2d(x, kernel, padding=(padding[0], (0, 0))).reshape(b, -1, *space, features)
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
    frames = x.shape[1] - taps + 1
    shifted = (x[:, tap : tap + frames].reshape(-1, *space, c) for tap in range(taps))  # [B*T, H, W, C]
    out = sum(conv_2d(part, kernel[tap], padding=padding[1:]) for tap, part in enumerate(shifted))
    return out.reshape(b, frames, *out.shape[1:])


def _side_by_side(x, window, padding, dtype):
    """The padded x, packed, with the inputs of the taps of the last window dimension side by side in the channels."""
    x = jnp.pad(_pack(x, dtype), [(0, 0), *padding, (0, 0)])
    places = x.shape[-2] - window[-1] + 1
    return jnp.concatenate([x[..., i : i + places, :] for i in range(window[-1])], -1)


def _conv_products(x, kernel, padding):
    """One product of bfloat16 matrices for all taps. Then each tap's output is added where it belongs.

    The taps of the last window dimension lie side by side in the input's channels, all others in the output's channels.
    """
    *outer, last, c_in, c_out = kernel.shape
    columns = _unpack(_side_by_side(x, kernel.shape[:-2], padding, jnp.bfloat16), jnp.bfloat16)
    kernel = kernel.astype(jnp.bfloat16).reshape(-1, last * c_in, c_out).swapaxes(0, 1)
    out = _product(columns, kernel.reshape(last * c_in, -1))
    out = out.reshape(*out.shape[:-1], -1, c_out)  # [B, *padded space, taps, C_out]
    size = [n - k + 1 for n, k in zip(columns.shape[1:-2], outer)]
    taps = enumerate(np.ndindex(*outer))
    return sum(out[(*_places(tap, size), ..., number, slice(None))] for number, tap in taps)


ATTENTION_AT_ONCE = 2**16  # scores of a head, N * M, from which on attention takes one example after the other
BLOCK = 1024  # queries whose scores are in memory at the same time, in the larger case


def attention(query, key, value, mask, bounded=False):
    """Softmax attention, at once or in blocks. `bounded` scores are not large: their maximum is not searched for."""
    if query.shape[1] * key.shape[1] < ATTENTION_AT_ONCE:
        return attention_at_once(query, key, value, mask, bounded)
    mask = jnp.ones(key.shape[:2], bool) if mask is None else mask
    tokens = query.shape[1]
    blocks = next(n for n in range(-(-tokens // BLOCK), tokens + 1) if tokens % n == 0)

    def attend_in_blocks(example):  # the backward pass computes the scores again
        query, key, value, mask = example
        attend = jax.checkpoint(lambda block: accelerator.attention(block, key, value, mask))
        return jax.lax.map(attend, query.reshape(blocks, -1, *query.shape[1:])).reshape(query.shape)

    # The scores of all examples together would go through memory several times. One example's scores stay in the cache.
    return jax.lax.map(attend_in_blocks, (query, key, value, mask))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention_at_once(query, key, value, mask, bounded):
    """`attention` that holds all scores in memory.

    The backward pass computes the sum in a softmax's gradient from the output (arXiv:2205.14135, appendix B.2).
    """
    return _attention_forward(query, key, value, mask, bounded)[0]


def _heads_first(x):
    return x.swapaxes(1, 2)  # [B, N, heads, d] <-> [B, heads, N, d]


def _batched(a, b, i, j):
    """Products of a and b [B, heads, ...], over dimension i of a and dimension j of b."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _attention_forward(query, key, value, mask, bounded):
    query, key, value = (_heads_first(x) for x in (query, key, value))
    query = query / np.float32(np.sqrt(query.shape[-1]))
    scores = _batched(query, key, 3, 3)  # [B, heads, N, M]
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -1e9)
    scores = jnp.minimum(scores, 60.0) if bounded else scores - scores.max(-1, keepdims=True)
    weights = jnp.exp(scores)  # not yet divided by their sum
    total = jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    out = _batched(weights, value, 3, 2) / total
    return _heads_first(out), (query, key, value, weights, total, out)


def _attention_backward(bounded, saved, grad):
    query, key, value, weights, total, out = saved
    grad = _heads_first(grad)
    softmax_sum = (grad * out).sum(-1, keepdims=True) / total
    grad = grad / total
    scores_grad = weights * (_batched(grad, value, 3, 3) - softmax_sum)
    weights_t, scores_grad_t = (jax.lax.optimization_barrier(x.swapaxes(2, 3)) for x in (weights, scores_grad))
    query_grad = _batched(scores_grad, key, 3, 2) / np.float32(np.sqrt(query.shape[-1]))
    key_grad, value_grad = _batched(scores_grad_t, query, 3, 2), _batched(weights_t, grad, 3, 2)
    return (*map(_heads_first, (query_grad, key_grad, value_grad)), None)


attention_at_once.defvjp(_attention_forward, _attention_backward)


def norm_act(coefficients, activation, dtype, x, parameters):
    """activation(x * a + b), where a, b [B, frames, C] = coefficients(sum of x, sum of x^2, parameters)."""
    flat = x.astype(jnp.float32).reshape(*x.shape[:2], -1, x.shape[-1])  # [B, frames, pixels, C]
    return _norm_act(coefficients, activation, flat, parameters).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm_act(coefficients, activation, x, parameters):
    a, b = coefficients(x.sum(-2), jnp.square(x).sum(-2), parameters)
    return activation(x * a[..., None, :] + b[..., None, :])


def _norm_act_forward(coefficients, activation, x, parameters):
    (a, b), pull = jax.vjp(coefficients, x.sum(-2), jnp.square(x).sum(-2), parameters)
    return activation(x * a[..., None, :] + b[..., None, :]), (x, a, b, pull)


def _norm_act_backward(coefficients, activation, saved, grad):
    x, a, b, pull = saved
    grad = jax.vjp(activation, x * a[..., None, :] + b[..., None, :])[1](grad)[0]
    sum_grad, squares_grad, parameters_grad = pull((_row_sum(grad * x), _row_sum(grad)))
    return grad * a[..., None, :] + sum_grad[..., None, :] + 2 * x * squares_grad[..., None, :], parameters_grad


_norm_act.defvjp(_norm_act_forward, _norm_act_backward)


affine = jax.custom_vjp(accelerator.affine)


def _affine_backward(saved, grad):
    x, scale, bias = saved
    return grad * scale, _row_sum(_flat(grad * x)), _bias_grad(bias, grad)


affine.defvjp(lambda x, scale, bias: (affine(x, scale, bias), (x, scale, bias)), _affine_backward)


upsample = jax.custom_vjp(accelerator.upsample, nondiff_argnums=(1,))


def _upsample_backward(factors, _, grad):
    strided = (grad[(slice(None), *(slice(i, None, f) for i, f in zip(at, factors)))] for at in np.ndindex(*factors))
    return (sum(strided),)


upsample.defvjp(lambda x, factors: (upsample(x, factors), None), _upsample_backward)
