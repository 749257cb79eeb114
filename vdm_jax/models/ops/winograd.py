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
    """Returns three factors (b, g, a) of the paper's matrices: B^T = P b, G = P g and A^T = a P.

    P is the function `_pairs` below: sums and differences of the two rows that belong to p and -p.
    b is [m + 2, m + 2], g is [m + 2, 3] and a is [m, m + 2].

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
    return (
        np.stack([np.pad(row.coef, (0, m + 2 - len(row.coef))) for row in inputs]),
        np.array(kernel),
        np.array(output).T,
    )


# m -> factors. For m = 4 these points have the smallest rounding error. The paper's points, with squares 1 and 4, have
# five times that error.
FACTORS = {2: _factors(1.0), 4: _factors(0.5, 2.0)}


def suits(shape, kernel):
    """Whether this method is faster than a direct convolution.

    It is slower with few channels, where the sums cost more than the products, and with few tiles, where transforming
    the kernel costs more than it saves.

    shape: of x [B, *space, C_in]
    kernel: shape of the kernel [*window, C_in, C_out]
    """
    *window, c_in, c_out = kernel
    tiles = math.prod(shape[:-1]) / 4 ** window.count(3)
    return set(window) <= {1, 3} and 3 in window and min(c_in, c_out) >= 24 and 32 * tiles >= min(c_in, c_out)


@functools.partial(jax.jit, static_argnames="padding")  # all layers of one shape share one trace
def conv(x, kernel, padding):
    """Convolves x [B, *space, C_in] with kernel [*window, C_in, C_out].

    Each window size is 1 or 3. padding: a tuple of pairs (before, after), one for each space dimension.
    """
    size = _size(x, kernel, padding)
    tiles = _tiles(size, kernel)
    products = _matmul(_parts(x, tiles, padding), _kernels(kernel, tiles))
    return _cropped(_contract(products, tiles, _output), [(0, n) for n in size])


@functools.partial(jax.jit, static_argnames="padding")
def gradients(x, kernel, grad, padding):
    """-> the gradients of x and of the kernel: the transposes of the steps of `conv`, in reverse order.

    grad: the gradient of conv(x, kernel, padding)
    """
    tiles = _tiles(_size(x, kernel, padding), kernel)
    # The padding fills the tiles, and is at least one place. XLA computes a padded array once; an array without padding
    # it would compute again for each operation that reads it.
    ends = {axis: -grad.shape[axis] % m for axis, m in tiles.items()}
    ends[min(tiles)] = ends[min(tiles)] or 1
    grad = jnp.pad(grad, [(0, ends.get(i, 0)) for i in range(grad.ndim)])
    grads = _expand(grad, tiles, _output_transposed)

    taps = jnp.einsum("nmc,nmd->ncd", _flat(_parts(x, tiles, padding)), _flat(grads))
    kernel_grad = jnp.tensordot(_kernel_matrix(tiles).T, taps, 1).reshape(kernel.shape)

    x_grad = _contract(_matmul(grads, _kernels(kernel, tiles).swapaxes(1, 2)), tiles, _input_transposed)
    return _cropped(x_grad, [(low, n) for n, (low, _) in zip(x.shape[1:], padding)]), kernel_grad


def _size(x, kernel, padding):
    return [n + low + high - k + 1 for n, k, (low, high) in zip(x.shape[1:], kernel.shape, padding)]


def _tiles(size, kernel):
    """{dimension of x: m}, for each dimension whose window is 3; of both m, the one that takes fewer products."""
    return {
        axis: min(FACTORS, key=lambda m: -(-n // m) * (m + 2))
        for axis, (n, k) in enumerate(zip(size, kernel.shape), 1)
        if k == 3
    }


def _parts(x, tiles, padding):
    """x padded to whole tiles and transformed: [products of a tile, B, *tiles, C_in]."""
    ends = [(0, 0), *padding, (0, 0)]
    for axis, m in tiles.items():
        low, high = ends[axis]
        ends[axis] = low, high + -(x.shape[axis] + low + high - 2) % m
    return _expand(jnp.pad(x, ends), tiles, _input)


def _cropped(x, spans):
    return x[(slice(None), *(slice(start, start + n) for start, n in spans))]


def _kernels(kernel, tiles):
    """[*window, C_in, C_out] -> [products of a tile, C_in, C_out]"""
    return jnp.tensordot(_kernel_matrix(tiles), kernel.reshape(-1, *kernel.shape[-2:]), 1)


def _kernel_matrix(tiles):
    """[products of a tile, places of the window]"""
    sides = (np.stack(_pairs(FACTORS[m][1])) for m in tiles.values())
    return functools.reduce(np.kron, sides).astype(np.float32)


def _flat(x):
    return x.reshape(len(x), -1, x.shape[-1])


def _matmul(x, kernels):
    """x [products of a tile, ..., K] @ kernels [products of a tile, K, N]"""
    return jnp.matmul(_flat(x), kernels).reshape(*x.shape[:-1], -1)


# The products of a tile are the leading dimension, and the first dimension of the window is outermost in it. Space is
# transformed one dimension after the other. That compiles in half the time of one transformation of all dimensions.


def _expand(x, tiles, transform):
    """x [B, *space, C] -> [products of a tile, B, *tiles, C].

    transform(x, axis, m): -> the m + 2 arrays that one dimension becomes
    """
    x = x[None]
    for axis, m in tiles.items():
        x = jnp.stack(transform(x, axis + 1, m), 1)
        x = x.reshape(-1, *x.shape[2:])
    return x


def _contract(x, tiles, transform):
    """[products of a tile, B, *tiles, C] -> [B, *space, C].

    transform(arrays, axis, m): m + 2 arrays -> the arrays whose places alternate along the dimension
    """
    for axis, m in reversed(tiles.items()):
        x = x.reshape(-1, m + 2, *x.shape[1:])
        x = jnp.stack(transform([x[:, i] for i in range(m + 2)], axis + 1, m), axis + 2)
        x = x.reshape(*x.shape[: axis + 1], -1, *x.shape[axis + 3 :])
    return x[0]


def _pairs(arrays):
    """Keeps the first and the last array; two neighbors (a, b) in between become (a + b, a - b). Its own transpose."""
    first, *inner, last = arrays
    return [first, *(x for a, b in zip(inner[::2], inner[1::2]) for x in (a + b, a - b)), last]


def _combined(matrix, arrays):
    """For each row of the matrix: the sum of the arrays, weighted by the row."""

    def add(total, weighted):
        weight, x = weighted
        if total is None:
            return x if weight == 1 else x * float(weight)
        term = x if abs(weight) == 1 else x * abs(float(weight))
        return total + term if weight > 0 else total - term

    rows = (((w, a) for w, a in zip(row, arrays) if w) for row in matrix)
    return [functools.reduce(add, row, None) for row in rows]


def _strided(x, axis, starts, step, count):
    return [jax.lax.slice_in_dim(x, i, i + step * (count - 1) + 1, step, axis) for i in range(starts)]


def _input(x, axis, m):
    return _pairs(_combined(FACTORS[m][0], _strided(x, axis, m + 2, m, (x.shape[axis] - 2) // m)))


def _input_transposed(parts, axis, m):
    *inner, first, second = _combined(FACTORS[m][0].T, _pairs(parts))
    pad = lambda x, *ends: jnp.pad(x, [ends if i == axis else (0, 0) for i in range(x.ndim)])  # noqa: E731
    inner = [pad(x, 0, 1) for x in inner]
    # Each tile overlaps the next one by two places.
    return [inner[0] + pad(first, 1, 0), inner[1] + pad(second, 1, 0), *inner[2:]]


def _output(parts, axis, m):
    return _combined(FACTORS[m][2], _pairs(parts))


def _output_transposed(x, axis, m):
    return _pairs(_combined(FACTORS[m][2].T, _strided(x, axis, m, m, x.shape[axis] // m)))
