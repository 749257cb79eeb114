"""Convolutions by minimal filtering, Winograd's F(m, 3) (Lavin & Gray, arXiv:1509.09308, section 4).

For a window of 3, m outputs (one tile) take m + 2 products instead of 3 m. The method is applied along every dimension
whose window is 3, with m = 4 or m = 2. With m = 4 a convolution in space takes 1/4 of the products, a convolution in
time 1/2, and a full 3-D convolution 1/8.

The steps: sums and differences of the input; one matrix product [tiles, C_in] @ [C_in, C_out] for each of the
m + 2 = 6 places of a tile (36 in space, 216 in 3-D); sums and differences of the products.

The result differs from a direct convolution by rounding only. Relative to the largest output the error is 1e-6 in time,
2e-6 in space and 4e-6 in 3-D. The error of the direct convolution itself is 5e-7.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def _factors(*squares):
    """Returns factors b [m + 2, m + 2], g [m + 2, 3] and a [m, m + 2] of the paper's B^T = P b, G = P g and A^T = a P.

    P is the function `_pairs` below: sums and differences of the two rows that belong to p and -p.

    squares: p^2 for each pair of points. The polynomials are evaluated at 0, at all p and -p, and at infinity.
    """
    m, x = 2 * len(squares), np.polynomial.Polynomial([0, 1])
    every = math.prod(x**2 - square for square in squares)
    inputs, kernel, output = [every], [[1 / every(0), 0, 0]], [np.arange(m) == 0]
    for square in squares:
        p, others = square**0.5, math.prod((x**2 - q for q in squares if q != square), start=x**0)
        inputs += [x**2 * others, p * x * others]  # the even and the odd part of x * every / (x - p)
        kernel += [scale / (2 * square * others(p)) for scale in np.array([[1, 0, square], [0, p, 0]])]
        output += [np.where(np.arange(m) % 2 == odd, p ** np.arange(m), 0) for odd in (0, 1)]
    inputs, kernel, output = [*inputs, x * every], [*kernel, [0, 0, 1]], [*output, np.arange(m) == m - 1]
    inputs = [np.pad(row.coef, (0, m + 2 - len(row.coef))) for row in inputs]
    return np.stack(inputs), np.array(kernel), np.array(output).T


# For m = 4 these points have the smallest rounding error. The paper's points, with squares 1 and 4, have five times
# that error.
_FACTORS = {2: _factors(1.0), 4: _factors(0.5, 2.0)}
INPUT, KERNEL, OUTPUT = ({m: factors[i] for m, factors in _FACTORS.items()} for i in range(3))  # m -> b, g and a


def suits(shape, kernel):
    """Whether this method is faster than a direct convolution of x with `shape` and a kernel with shape `kernel`.

    It is slower with few channels, where the sums cost more than the products, and with few tiles, where transforming
    the kernel costs more than it saves.
    """
    *window, c_in, c_out = kernel
    tiles = math.prod(shape[:-1]) / 4 ** window.count(3)
    return set(window) <= {1, 3} and 3 in window and min(c_in, c_out) >= 24 and 32 * tiles >= min(c_in, c_out)


@functools.partial(jax.jit, static_argnames="padding")  # all layers of one shape share one trace
def conv(x, kernel, padding):
    """Convolves x [B, *space, C_in] with kernel [*window, C_in, C_out], whose window sizes are 1 or 3.

    padding: a tuple of pairs (before, after), one for each space dimension
    """
    size, tiles = _tiling(x, kernel, padding)
    products = _matmul(_parts(x, tiles, padding), _kernels(kernel, tiles))
    return _cropped(_contract(products, tiles, OUTPUT), [(0, n) for n in size])


@functools.partial(jax.jit, static_argnames="padding")
def gradients(x, kernel, grad, padding):
    """-> the gradients of x and of the kernel: the transposes of the steps of `conv`, in reverse order.

    grad: the gradient of conv(x, kernel, padding)
    """
    _, tiles = _tiling(x, kernel, padding)
    # The padding fills the tiles, and is at least one place. XLA computes a padded array once; an array without padding
    # it would compute again for each operation that reads it.
    ends = {axis: -grad.shape[axis] % m for axis, m in tiles.items()}
    ends[min(tiles)] = ends[min(tiles)] or 1
    grad = jnp.pad(grad, [(0, ends.get(i, 0)) for i in range(grad.ndim)])
    grads = _expand(grad, tiles, _transposed(OUTPUT))

    taps = jnp.einsum("nmc,nmd->ncd", _flat(_parts(x, tiles, padding)), _flat(grads))
    kernel_grad = jnp.tensordot(_kernel_matrix(tiles).T, taps, 1).reshape(kernel.shape)

    x_grad = _contract(_matmul(grads, _kernels(kernel, tiles).swapaxes(1, 2)), tiles, _transposed(INPUT))
    return _cropped(x_grad, [(low, n) for n, (low, _) in zip(x.shape[1:], padding)]), kernel_grad


def _tiling(x, kernel, padding):
    """-> (size of the output's space, {dimension of x: m} for each dimension whose window is 3)."""
    size = [n + low + high - k + 1 for n, k, (low, high) in zip(x.shape[1:], kernel.shape, padding)]
    m = [min(_FACTORS, key=lambda m: -(-n // m) * (m + 2)) for n in size]  # of both, the one with fewer products
    return size, {axis: m[axis - 1] for axis, k in enumerate(kernel.shape[:-2], 1) if k == 3}


def _parts(x, tiles, padding):
    """x padded to whole tiles and transformed: [products of a tile, B, *tiles, C_in]."""
    ends = [(0, 0), *padding, (0, 0)]
    for axis, m in tiles.items():
        low, high = ends[axis]
        ends[axis] = low, high + -(x.shape[axis] + low + high - 2) % m
    return _expand(jnp.pad(x, ends), tiles, INPUT)


def _cropped(x, spans):
    return x[(slice(None), *(slice(start, start + n) for start, n in spans))]


def _kernels(kernel, tiles):
    """[*window, C_in, C_out] -> [products of a tile, C_in, C_out]."""
    return jnp.tensordot(_kernel_matrix(tiles), kernel.reshape(-1, *kernel.shape[-2:]), 1)


def _kernel_matrix(tiles):
    """[products of a tile, places of the window]."""
    return functools.reduce(np.kron, (np.stack(_pairs(KERNEL[m])) for m in tiles.values())).astype(np.float32)


def _transposed(matrices):
    return {m: matrix.T for m, matrix in matrices.items()}


def _flat(x):
    return x.reshape(len(x), -1, x.shape[-1])


def _matmul(x, kernels):
    """x [products of a tile, ..., K] @ kernels [products of a tile, K, N]."""
    return jnp.matmul(_flat(x), kernels).reshape(*x.shape[:-1], -1)


# The products of a tile are the leading dimension, and the first dimension of the window is outermost in it. Space is
# transformed one dimension after the other. That compiles in half the time of one transformation of all dimensions.


def _expand(x, tiles, matrices):
    """x [B, *space, C] -> [products of a tile, B, *tiles, C]; matrices: m -> [m + 2, places that a tile reads]."""
    x = x[None]
    for axis, m in tiles.items():
        places = matrices[m].shape[1]
        last = (x.shape[axis + 1] - places) // m * m  # where the last tile starts
        read = [jax.lax.slice_in_dim(x, i, i + last + 1, m, axis + 1) for i in range(places)]
        x = jnp.stack(_pairs(_combined(matrices[m], read)), 1)
        x = x.reshape(-1, *x.shape[2:])
    return x


def _contract(x, tiles, matrices):
    """[products of a tile, B, *tiles, C] -> [B, *space, C], as the transpose of `_expand`; matrices: transposed too."""
    for axis, m in reversed(tiles.items()):
        x = x.reshape(-1, m + 2, *x.shape[1:])
        parts = _combined(matrices[m], _pairs([x[:, i] for i in range(m + 2)]))
        if len(parts) > m:  # each tile overlaps the next one by two places
            pad = functools.partial(_pad, axis=axis + 1)
            *inner, first, second = parts
            inner = [pad(part, (0, 1)) for part in inner]
            parts = [inner[0] + pad(first, (1, 0)), inner[1] + pad(second, (1, 0)), *inner[2:]]
        x = jnp.stack(parts, axis + 2)
        x = x.reshape(*x.shape[: axis + 1], -1, *x.shape[axis + 3 :])
    return x[0]


def _pad(x, ends, axis):
    return jnp.pad(x, [ends if i == axis else (0, 0) for i in range(x.ndim)])


def _pairs(arrays):
    """Keeps the first and the last array; two neighbors (a, b) in between become (a + b, a - b). Its own transpose."""
    first, *inner, last = arrays
    return [first, *(x for a, b in zip(inner[::2], inner[1::2]) for x in (a + b, a - b)), last]


def _combined(matrix, arrays):
    """For each row of the matrix: the sum of the arrays, weighted by the row."""
    sums = []
    for row in matrix:
        total = None
        for weight, x in zip(row, arrays):
            if total is None and weight:
                total = x if weight == 1 else x * float(weight)
            elif weight:
                term = x if abs(weight) == 1 else x * abs(float(weight))
                total = total + term if weight > 0 else total - term
        sums.append(total)
    return sums
