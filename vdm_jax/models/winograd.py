"""Convolutions by minimal filtering, Winograd's F(2, 3): two outputs of a window of 3 for four products instead of six.

Lavin & Gray, arXiv:1509.09308, section 4. It is applied along every dimension whose window is 3, so that a convolution
in space takes 4/9 of the products, one in time 2/3, a full one 8/27. What is multiplied are matrices [places, C_in] and
[C_in, C_out], one product for each of the 4, 16 or 64 places in a tile, with sums and differences before and after.
The result differs from the direct form's by rounding alone, by about as much as two orders of summation would.
"""

import math

import jax
import jax.numpy as jnp


def suits(shape, kernel):
    """Whether a convolution of x [B, *space, C_in] of `shape` with a `kernel` of that shape is faster for it.

    It is not where few channels make products small beside the sums, nor where few places share the larger kernels.
    """
    *window, c_in, c_out = kernel
    tiles = math.prod(shape[:-1]) / 2 ** window.count(3)
    return set(window) <= {1, 3} and 3 in window and min(c_in, c_out) >= 24 and 2 * tiles >= min(c_in, c_out)


def conv(x, kernel, padding):
    """x [B, *space, C_in] with kernel [*window, C_in, C_out], each window 1 or 3; a pair of padding per dimension."""
    axes = _axes(kernel)
    size = [n + low + high - k + 1 for n, k, (low, high) in zip(x.shape[1:], kernel.shape, padding)]
    products = _matmul(_expand(_padded(x, axes, padding), axes, _input), _kernels(kernel))
    return _cropped(_contract(products, axes, _output), [(0, n) for n in size])


def gradients(x, kernel, grad, padding):
    """-> gradients of x and of the kernel, given that of conv(x, kernel, padding): the transpose of each step."""
    axes = _axes(kernel)
    # An even number of places, and at any rate padding: XLA makes what is padded once, all else once a reader.
    grad = jnp.pad(grad, [(0, n % 2 if i in axes[1:] else int(i in axes)) for i, n in enumerate(grad.shape)])
    grads = _expand(grad, axes, _output_transposed)
    parts = _expand(_padded(x, axes, padding), axes, _input)

    taps = jnp.einsum("nmc,nmd->ncd", _flat(parts), _flat(grads))
    kernel_grad = _contract(taps[:, *(None for _ in kernel.shape[:-2])], [a - 1 for a in axes], _kernel_transposed)

    x_grad = _contract(_matmul(grads, _kernels(kernel.swapaxes(-1, -2))), axes, _input_transposed)
    return _cropped(x_grad, [(low, n) for n, (low, _) in zip(x.shape[1:], padding)]), kernel_grad


def _axes(kernel):
    return [i for i, n in enumerate(kernel.shape[:-2], 1) if n == 3]


def _padded(x, axes, padding):
    """x with its padding, and one place more where that makes the output even."""
    ends = [(0, 0), *padding, (0, 0)]
    for axis in axes:
        low, high = ends[axis]
        ends[axis] = low, high + (x.shape[axis] + low + high) % 2
    return jnp.pad(x, ends)


def _cropped(x, spans):
    return x[(slice(None), *(slice(start, start + n) for start, n in spans))]


def _kernels(kernel):
    """[*window, C_in, C_out] -> [4^n, C_in, C_out]"""
    kernels = _expand(kernel, [axis - 1 for axis in _axes(kernel)], _kernel)
    return kernels.reshape(-1, *kernel.shape[-2:])


def _flat(x):
    return x.reshape(len(x), -1, x.shape[-1])


def _matmul(x, kernels):
    """x [4^n, ..., K] @ kernels [4^n, K, N]"""
    return jnp.matmul(_flat(x), kernels).reshape(*x.shape[:-1], -1)


# Places in a tile are the leading dimension, 4^n, the first of the window's dimensions outermost. One dimension is
# transformed after the other, each by an array of its own: that compiles in half the time that all at once takes.


def _expand(x, axes, transform):
    """x -> [4^n, *x.shape, with tiles for places], each dimension by transform(x, axis) -> 4 arrays."""
    x = x[None]
    for axis in axes:
        x = jnp.stack(transform(x, axis + 1), 1)
        x = x.reshape(-1, *x.shape[2:])
    return x


def _contract(x, axes, transform):
    """The reverse, by transform(four) -> arrays, whose places take turns along the dimension."""
    for axis in reversed(axes):
        x = x.reshape(-1, 4, *x.shape[1:])
        x = jnp.stack(transform([x[:, i] for i in range(4)], axis + 1), axis + 2)
        x = x.reshape(*x.shape[: axis + 1], -1, *x.shape[axis + 3 :])
    return x[0]


def _every_other(x, axis, start, count):
    return jax.lax.slice_in_dim(x, start, start + 2 * count - 1, 2, axis)


def _kernel(x, axis):  # G g
    a, b, c = jnp.split(x, 3, axis)
    return a, (a + b + c) / 2, (a - b + c) / 2, c


def _kernel_transposed(parts, axis):
    a, b, c, d = parts
    return a + (b + c) / 2, (b - c) / 2, (b + c) / 2 + d


def _input(x, axis):  # B^T d
    a, b, c, d = (_every_other(x, axis, i, x.shape[axis] // 2 - 1) for i in range(4))
    return a - c, b + c, c - b, b - d


def _input_transposed(parts, axis):
    a, b, c, d = parts

    def both(here, next_tile):  # tiles overlap by two places
        pad = lambda *ends: [ends if i == axis else (0, 0) for i in range(a.ndim)]  # noqa: E731
        return jnp.pad(here, pad(0, 1)) + jnp.pad(next_tile, pad(1, 0))

    return both(a, b + c - a), both(b - c + d, -d)


def _output(parts, axis):  # A^T m
    a, b, c, d = parts
    return a + b + c, b - c - d


def _output_transposed(x, axis):
    a, b = (_every_other(x, axis, i, x.shape[axis] // 2) for i in range(2))
    return a, a + b, a - b, -b
