"""FLOPs counted from shapes, compared with counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from vdm_jax.perf import flops

X, W = jax.ShapeDtypeStruct((5, 7), "float32"), jax.ShapeDtypeStruct((7, 7), "float32")
PRODUCT = 2 * 5 * 7 * 7  # FLOPs of x @ w


def layers(w, x):
    return jnp.tanh(jnp.tanh(x @ w) @ w).sum()


def test_a_first_layer_counts_twice_and_a_later_one_three_times():
    assert flops.count(layers, W, X) == (2 * PRODUCT, (2 + 3) * PRODUCT)
    assert flops.count(lambda w, x: (x @ w).sum(), W, X) == (PRODUCT, 2 * PRODUCT)
    assert flops.count(lambda trained, w, x: layers(w, x) * trained, jnp.ones(()), W, X) == (2 * PRODUCT, 2 * PRODUCT)


def test_attention_between_activations_counts_three_times():
    def attention(w, x):
        y = x @ w  # [5, 7]
        return y @ y.T  # [5, 5]

    assert flops.count(attention, W, X) == (PRODUCT + 2 * 25 * 7, 2 * PRODUCT + 3 * 2 * 25 * 7)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.vmap])
def test_called_functions_and_recomputation(wrap):
    if wrap is jax.vmap:
        batched = jax.ShapeDtypeStruct((3, *X.shape), "float32")
        assert flops.count(jax.vmap(layers, (None, 0)), W, batched) == (6 * PRODUCT, 15 * PRODUCT)
    else:
        assert flops.count(wrap(layers), W, X) == (2 * PRODUCT, 5 * PRODUCT)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_what_no_result_needs_is_not_counted(wrap):
    def pair(w, x):
        return x @ w, jnp.tanh(x @ w) @ w

    assert flops.count(lambda w, x: wrap(pair)(w, x)[0], W, X) == (PRODUCT, 2 * PRODUCT)

    def streams(w, x):  # no result needs the second stream, b
        a, b = wrap(lambda a, b: (a @ w, b @ w))(x, x)
        return wrap(lambda a, b: (a @ w, b @ w))(a, b)[0]

    assert flops.count(streams, W, X) == (2 * PRODUCT, 5 * PRODUCT)


def test_loops_count_as_often_as_they_run():
    def loop(w, x):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, length=4)[0]

    # Each iteration counts three times, the first one too: the body reads the carry, which depends on w.
    assert flops.count(loop, W, X) == (4 * PRODUCT, 4 * 3 * PRODUCT)

    def endless(w, x):
        return jax.lax.while_loop(lambda y: y.sum() < 3, lambda y: y @ w, x)

    with pytest.raises(NotImplementedError):
        flops.count(endless, W, X)


def test_the_most_expensive_branch_of_a_condition_counts():
    def choose(w, x):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x)

    assert flops.count(choose, W, X) == (2 * PRODUCT, 5 * PRODUCT)


def test_convolutions():
    x, w = jax.ShapeDtypeStruct((2, 8, 8, 6), "float32"), jax.ShapeDtypeStruct((3, 3, 6, 10), "float32")

    def conv(w, x, groups=1):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=dims, feature_group_count=groups)

    cost = 2 * (2 * 4 * 4 * 10) * 9 * 6
    assert flops.count(conv, w, x) == (cost, 2 * cost)
    half = jax.ShapeDtypeStruct((3, 3, 3, 10), "float32")
    assert flops.count(lambda w, x: conv(w, x, 2), half, x)[0] == cost // 2


def test_each_device_has_its_peak():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    kinds = {"TPU v5 lite": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "cpu": None}
    kinds |= {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-40GB": 312e12}
    assert {kind: flops.peak(Device(kind)) for kind in kinds} == kinds
