"""Products, convolutions and normalisation for XLA's CPU backend: the values of the plain forms, several times faster.

What is slow there, and what is done about it:
- Sums over all rows of an array (gradients of biases and of normalisation) are loops over columns, which XLA joins with
  whatever made the array and then no longer vectorises. A product with a row of ones is the same sum, at full speed.
- A convolution's weight gradient. Here it is a product of matrices for each row of taps.
- Convolutions in float32 altogether, beside products of matrices: where it pays they are a few smaller products, after
  sums and differences (winograd.py).
- bfloat16. Processors with matrix units (AMX) multiply bfloat16 several times faster than float32, and add up in
  float32; everything else is slower in bfloat16. So operands of products are rounded to bfloat16, and arrays between
  products stay float32. Copies of bfloat16 are slow, too, so pairs travel as one 32-bit word.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.models.ops import winograd

# ------------------------------------------------------------------------------------------------------------ helpers


def row_sum(x):
    """Sum of x [..., M, C] over M, float32."""
    return jnp.matmul(jnp.ones((*x.shape[:-2], 1, x.shape[-2]), x.dtype), x)[..., 0, :]


def _flat(x):
    return x.reshape(-1, x.shape[-1])  # [..., C] -> [M, C]


def _pack(x):
    """float32 [..., C] -> bfloat16 in pairs, as float32 words [..., C / 2]."""
    x = x.astype(jnp.bfloat16)
    return jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.float32)


def _unpack(words):
    """Words [..., C / 2] -> bfloat16 [..., C]."""
    x = jax.lax.bitcast_convert_type(words, jnp.bfloat16)
    return x.reshape(*x.shape[:-2], -1)


def _product(a, b):
    """a [..., K] @ b [K, N] in the operands' type, summed in float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _turned(x):
    """x [M, N] -> [N, M], kept apart from the product that made x: XLA would turn that into a form of the slow kind."""
    return jax.lax.optimization_barrier(x).T


def _transposed(x):
    """x float32 [M, C] -> bfloat16 [C, M], by a product with the identity.

    A plain transposition XLA would take into the product that reads it, in a form that its fast products do not know.
    """
    identity = jnp.eye(x.shape[1], dtype=jnp.bfloat16)
    product = jax.lax.dot_general(
        identity, x.astype(jnp.bfloat16), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return product.astype(jnp.bfloat16)


# ------------------------------------------------------------------------------------------------------------- products


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense(x, kernel, bias, dtype):
    """x [..., K] @ kernel [K, N] + bias [N], or without where bias is None; operands in `dtype`, result float32."""
    out = _product(x.astype(dtype), kernel.astype(dtype))
    return out if bias is None else out + bias


def _dense_forward(x, kernel, bias, dtype):
    x = x.astype(dtype)
    return dense(x, kernel, bias, dtype), (x, kernel, bias)


def _dense_backward(dtype, saved, grad):
    x, kernel, bias = saved
    x_grad = _product(grad.astype(dtype), kernel.astype(dtype).T)
    if dtype == jnp.bfloat16:
        kernel_grad = _turned(_product(_transposed(_flat(grad)), _flat(x)))
    else:
        kernel_grad = _product(_flat(x).T, _flat(grad))
    return x_grad, kernel_grad, None if bias is None else row_sum(_flat(grad))


dense.defvjp(_dense_forward, _dense_backward)

# --------------------------------------------------------------------------------------------------------- convolutions


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def conv(x, kernel, bias, padding, dtype):
    """Convolution with unit strides: x [B, *space, C_in], kernel [*window, C_in, C_out], bias [C_out] -> float32.

    padding: a pair for each space dimension. Operands in `dtype`.
    """
    return _form(x, kernel, dtype)(x, kernel, padding) + bias


def _form(x, kernel, dtype):
    """The function (x, kernel, padding) -> output, without bias, that is fastest for these shapes."""
    if dtype == jnp.bfloat16:
        return _conv_products
    return winograd.conv if winograd.suits(x.shape, kernel.shape) else _conv_direct


def _conv_forward(x, kernel, bias, padding, dtype):
    if dtype == jnp.bfloat16:
        x = x.astype(dtype)
    return conv(x, kernel, bias, padding, dtype), (x, kernel)


def _conv_backward(padding, dtype, saved, grad):
    x, kernel = saved
    form = _form(x, kernel, dtype)
    if form is winograd.conv:
        return *winograd.gradients(x, kernel, grad, padding), row_sum(_flat(grad))
    window = kernel.shape[:-2]
    flipped = jnp.flip(kernel, range(len(window))).swapaxes(-1, -2)
    # What was padded before the input is cut off its gradient's end, and the other way round.
    back = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(window, padding))
    x_grad = form(grad, flipped, back)
    columns, slices = _side_by_side(x, window, padding, dtype)
    flat = _flat(grad)
    if dtype == jnp.bfloat16:
        flat = _transposed(flat)
        taps = [_turned(_product(flat, _flat(part))) for part in slices(columns)]
    else:
        taps = [_product(_flat(part).T, flat) for part in slices(columns)]
    return x_grad, jnp.stack(taps).reshape(kernel.shape), row_sum(_flat(grad))


conv.defvjp(_conv_forward, _conv_backward)


def _conv_direct(x, kernel, padding):
    """XLA's own convolution of two dimensions, of which the others are folded into the batch or summed over."""
    if x.ndim == 3:  # sound
        return _conv_2d(x[:, :, None], kernel[:, None], (*padding, (0, 0)))[:, :, 0]
    (b, t, h, w, _), (kt, kh, kw) = x.shape, kernel.shape[:3]
    if (kh, kw) == (1, 1):
        out = _conv_2d(x.reshape(b, t, h * w, -1), kernel[:, 0], (padding[0], (0, 0)))
        return out.reshape(b, -1, h, w, out.shape[-1])
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
    frames = x.shape[1] - kt + 1
    fold = lambda i: x[:, i : i + frames].reshape(-1, *x.shape[2:])  # noqa: E731
    out = sum(_conv_2d(fold(i), kernel[i], padding[1:]) for i in range(kt))
    return out.reshape(b, frames, *out.shape[1:])


def _conv_2d(x, kernel, padding):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _side_by_side(x, window, padding, dtype):
    """-> (columns, slices): x padded, the taps of the last window dimension side by side as channels [..., k * C].

    slices(columns) are the parts that each tap of the other window dimensions meets, in the order of the kernel.
    """
    packed = dtype == jnp.bfloat16 and x.shape[-1] % 2 == 0
    x = _pack(x) if packed else x.astype(dtype)
    x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    size = [n - k + 1 for n, k in zip(x.shape[1:-1], window)]
    columns = jnp.concatenate([x[..., i : i + size[-1], :] for i in range(window[-1])], -1)

    def slices(columns):
        for tap in np.ndindex(*window[:-1]):
            part = columns[(slice(None), *(slice(i, i + n) for i, n in zip(tap, size)))]
            yield _unpack(part) if packed else part

    return columns, slices


def _conv_products(x, kernel, padding):
    """One product of bfloat16 matrices for all taps, summed where each tap's output belongs.

    The taps of the last window dimension lie side by side in the channels of the input, all others in the output's.
    """
    *outer, last, c_in, c_out = kernel.shape
    window = kernel.shape[:-2]
    columns, _ = _side_by_side(x, window, padding, jnp.bfloat16)
    columns = _unpack(columns) if columns.dtype == jnp.float32 else columns
    kernel = kernel.astype(jnp.bfloat16).reshape(-1, last * c_in, c_out).swapaxes(0, 1)
    out = _product(columns, kernel.reshape(last * c_in, -1))
    out = out.reshape(*out.shape[:-1], -1, c_out)  # [B, *padded space, taps, C_out]
    size = [n - k + 1 for n, k in zip(columns.shape[1:-2], outer)]
    parts = (
        out[(slice(None), *(slice(i, i + n) for i, n in zip(tap, size)), ..., number, slice(None))]
        for number, tap in enumerate(np.ndindex(*outer))
    )
    return sum(parts)


# ------------------------------------------------------------------------------------------------------------ attention


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(query, key, value, mask, bounded):
    """Softmax attention of query [B, N, heads, d] to key and value [B, M, heads, d], mask bool [B, M] or None.

    bounded: queries and keys are normalised, so that no score is large and the largest need not be found first. The
    backward pass takes the sum that a softmax's gradient needs from the output (arXiv:2205.14135, appendix B.2), which
    spares a pass over all scores.
    """
    return _attention_forward(query, key, value, mask, bounded)[0]


def _heads_first(x):
    return x.swapaxes(1, 2)  # [B, N, heads, d] <-> [B, heads, N, d]


def _batched(a, b, contract):
    """Products of a and b [B, heads, ...], over dimension contract[0] of a and contract[1] of b."""
    axes = tuple((i,) for i in contract)
    return jax.lax.dot_general(a, b, (axes, ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _attention_forward(query, key, value, mask, bounded):
    query, key, value = (_heads_first(x) for x in (query, key, value))
    query = query / np.float32(np.sqrt(query.shape[-1]))
    scores = _batched(query, key, (3, 3))
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -1e9)
    scores = jnp.minimum(scores, 60.0) if bounded else scores - scores.max(-1, keepdims=True)
    weights = jnp.exp(scores)  # not yet divided by their sum
    total = jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    out = _batched(weights, value, (3, 2)) / total
    return _heads_first(out), (query, key, value, weights, total, out)


def _attention_backward(bounded, saved, grad):
    query, key, value, weights, total, out = saved
    grad = _heads_first(grad)
    along = (grad * out).sum(-1, keepdims=True) / total
    grad = grad / total
    scores_grad = weights * (_batched(grad, value, (3, 3)) - along)
    turned = [jax.lax.optimization_barrier(x.swapaxes(2, 3)) for x in (weights, scores_grad)]
    query_grad = _batched(scores_grad, key, (3, 2)) / np.float32(np.sqrt(query.shape[-1]))
    key_grad, value_grad = _batched(turned[1], query, (3, 2)), _batched(turned[0], grad, (3, 2))
    return (*map(_heads_first, (query_grad, key_grad, value_grad)), None)


attention.defvjp(_attention_forward, _attention_backward)

# -------------------------------------------------------------------------------------------------------- normalisation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def norm_act(coefficients, activation, x, parameters):
    """activation(x * a + b) of x [..., P, C], where a, b [..., C] = coefficients(sum x, sum x^2, parameters).

    The sums run over P. activation: a pointwise function.
    """
    a, b = coefficients(x.sum(-2), jnp.square(x).sum(-2), parameters)
    return activation(x * a[..., None, :] + b[..., None, :])


def _norm_act_forward(coefficients, activation, x, parameters):
    sums = x.sum(-2), jnp.square(x).sum(-2)
    (a, b), pull = jax.vjp(coefficients, *sums, parameters)
    return activation(x * a[..., None, :] + b[..., None, :]), (x, a, b, pull)


def _norm_act_backward(coefficients, activation, saved, grad):
    x, a, b, pull = saved
    grad = jax.vjp(activation, x * a[..., None, :] + b[..., None, :])[1](grad)[0]
    first, second, parameters = pull((row_sum(grad * x), row_sum(grad)))
    return grad * a[..., None, :] + first[..., None, :] + 2 * x * second[..., None, :], parameters


norm_act.defvjp(_norm_act_forward, _norm_act_backward)


@jax.custom_vjp
def affine(x, scale, bias):
    """x [..., C] * scale [C] + bias [C]; bias may be None."""
    return x * scale if bias is None else x * scale + bias


def _affine_backward(saved, grad):
    x, scale, bias = saved
    return grad * scale, row_sum(_flat(grad * x)), None if bias is None else row_sum(_flat(grad))


affine.defvjp(lambda x, scale, bias: (affine(x, scale, bias), (x, scale, bias)), _affine_backward)

# ----------------------------------------------------------------------------------------------------------- upsampling


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeated(x, factors):
    """x [B, *space, C] with every element repeated factors[i] times along space dimension i: nearest neighbours."""
    for axis, factor in enumerate(factors, 1):
        x = jnp.repeat(x, factor, axis)
    return x


def _repeated_backward(factors, _, grad):
    strided = (grad[(slice(None), *(slice(i, None, f) for i, f in zip(at, factors)))] for at in np.ndindex(*factors))
    return (sum(strided),)


repeated.defvjp(lambda x, factors: (repeated(x, factors), None), _repeated_backward)
