"""Convolutions by minimal filtering: against XLA's own convolutions, and for which shapes they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm_jax.models.ops import cpu, winograd

CASES = [  # shape of x, window, padding, output channels
    ((2, 5, 6, 8, 24), (1, 3, 3), ((0, 0), (1, 1), (1, 1)), 32),
    ((2, 3, 5, 7, 32), (1, 3, 3), ((0, 0), (1, 1), (1, 1)), 24),  # odd sizes
    ((2, 9, 4, 4, 24), (3, 1, 1), ((2, 0), (0, 0), (0, 0)), 24),  # causal
    ((1, 6, 5, 5, 24), (3, 3, 3), ((2, 0), (1, 1), (1, 1)), 40),
    ((2, 15, 24), (3,), ((1, 1),), 24),  # sound
    ((1, 4, 7, 6, 24), (1, 3, 3), ((0, 0), (0, 2), (2, 1)), 24),
]


@pytest.mark.parametrize("shape, window, padding, features", CASES)
def test_values_and_gradients_are_those_of_a_convolution(shape, window, padding, features):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape)
    kernel = jax.random.normal(keys[1], (*window, shape[-1], features)) / np.sqrt(np.prod(window) * shape[-1])
    bias = jax.random.normal(keys[2], (features,))
    assert winograd.suits(x.shape, kernel.shape)

    def plain(x, kernel, bias):
        space = "DHW"[-len(window) :]
        names = (f"N{space}C", f"{space}IO", f"N{space}C")
        strides = (1,) * len(window)
        out = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=names, precision="highest")
        return out + bias

    expected, pull = jax.vjp(plain, x, kernel, bias)
    made, pull_made = jax.vjp(lambda *a: cpu.conv_unit_strides(*a, padding, jnp.float32), x, kernel, bias)
    assert made.shape == expected.shape
    np.testing.assert_allclose(made, expected, atol=5e-6 * np.abs(expected).max())
    grad = jax.random.normal(jax.random.key(1), expected.shape)
    for ours, theirs in zip(pull_made(grad), pull(grad), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "shape, kernel, suits",
    [
        ((1, 16, 32, 32, 64), (1, 3, 3, 64, 64), True),
        ((1, 16, 32, 32, 4), (1, 3, 3, 4, 64), False),  # few channels
        ((1, 16, 4, 4, 256), (1, 3, 3, 256, 256), True),
        ((1, 16, 4, 4, 256), (3, 3, 3, 256, 256), False),  # few places
        ((1, 16, 32, 32, 64), (1, 1, 1, 64, 64), False),
        ((1, 16, 32, 32, 64), (1, 5, 5, 64, 64), False),
    ],
)
def test_shapes_for_which_it_is_used(shape, kernel, suits):
    assert winograd.suits(shape, kernel) == suits
    x, kernel, bias = jnp.zeros(shape), jnp.zeros(kernel), jnp.zeros(kernel[-1])
    padding = tuple(((n - 1) // 2, n // 2) for n in kernel.shape[:-2])
    text = str(jax.make_jaxpr(lambda *a: cpu.conv_unit_strides(*a, padding, jnp.float32))(x, kernel, bias))
    assert ("conv_general_dilated" in text) != suits
