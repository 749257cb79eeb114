"""The layers against XLA's convolutions, against Flax's normalization, and against what their docstrings say."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import init_weights
from vdm_jax.models import layers, ops
from vdm_jax.models.ops import accelerator, cpu

CONVOLUTIONS = {  # input, window, features, strides, time padding
    "space, few channels": ((2, 3, 6, 5, 3), (1, 3, 3), 4, None, "same"),
    "space, many channels": ((2, 3, 4, 4, 40), (1, 3, 3), 8, None, "same"),
    "time": ((2, 5, 4, 4, 6), (3, 1, 1), 5, None, "same"),
    "time, causal": ((2, 5, 4, 3, 6), (3, 1, 1), 5, None, "causal"),
    "full": ((2, 4, 5, 4, 3), (3, 3, 3), 4, None, "same"),
    "full, causal, many channels": ((1, 4, 4, 4, 36), (3, 3, 3), 8, None, "causal"),
    "full, causal, few channels": ((2, 4, 5, 4, 3), (3, 3, 3), 4, None, "causal"),
    "full, many clips": ((8, 3, 4, 4, 2), (3, 3, 3), 3, None, "same"),
    "halving space and time": ((2, 4, 6, 6, 4), (2, 2, 2), 5, (2, 2, 2), "same"),
    "halving, causal": ((2, 5, 6, 6, 4), (3, 2, 2), 5, (2, 2, 2), "causal"),
    "quartering time, causal": ((2, 9, 2, 2, 4), (7, 1, 1), 5, (4, 1, 1), "causal"),
    "one by one": ((2, 3, 4, 4, 5), (1, 1, 1), 6, None, "same"),
    "sound": ((2, 12, 5), (3,), 7, None, "same"),
    "sound, causal": ((2, 12, 40), (3,), 7, None, "causal"),
    "sound, halving": ((2, 12, 5), (2,), 7, (2,), "same"),
}


def conv(x, kernel, bias, strides, time_padding, dtype=jnp.float32):
    module = layers.Conv(kernel.shape[-1], kernel.shape[:-2], strides, time_padding, dtype=dtype)
    return module.apply({"params": {"kernel": kernel, "bias": bias}}, x)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_have_the_values_and_gradients_of_xla(case, platform):
    shape, window, features, strides, time_padding = case
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    kernel = rng.normal(size=(*window, shape[-1], features)).astype(np.float32)
    pads = [((k - 1) // 2, k // 2) for k in window]  # "same" at stride 1
    if time_padding == "causal":
        pads[0] = (window[0] - 1, 0)

    def reference(x, kernel):
        space = "DHW"[-len(window) :]
        numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
        ones = (1,) * len(window)
        return jax.lax.conv_general_dilated(x, kernel, strides or ones, pads, dimension_numbers=numbers)

    def both(x, kernel):
        def run(function):
            out, back = jax.vjp(function, x, kernel)
            return out, back(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

        bias = np.zeros(features, np.float32)
        return run(lambda x, k: conv(x, k, bias, strides, time_padding)), run(reference)

    with ops.backend(platform):
        got, want = jax.jit(both)(x, kernel)
    if strides is None:
        assert got[0].shape == (*shape[:-1], features)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("channels", [3, 36])
def test_a_convolution_with_the_frames_before_it_is_the_causal_one(channels, platform):
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 5, channels)).astype(np.float32)
    causal = layers.Conv(28, (3, 3, 3), time_padding="causal")
    unpadded = layers.Conv(28, (3, 3, 3), padding=((0, 0), (1, 1), (1, 1)))
    params = {"params": init_weights(causal, x)}
    with ops.backend(platform):
        got = unpadded.apply(params, np.pad(x, ((0, 0), (2, 0), (0, 0), (0, 0), (0, 0))))
        np.testing.assert_allclose(got, causal.apply(params, x), atol=1e-5)


UNIT_STRIDES = [name for name, case in CONVOLUTIONS.items() if case[3] is None]


@pytest.mark.parametrize("name", UNIT_STRIDES)
def test_convolutions_in_bfloat16_are_those_of_rounded_operands(name):
    shape, window, features, _, time_padding = CONVOLUTIONS[name]
    rng = np.random.default_rng(0)
    x, kernel, bias, weights = (
        jnp.asarray(rng.normal(size=size), jnp.bfloat16).astype(
            jnp.float32
        )  # rounding to bfloat16 does not change these values
        for size in (shape, (*window, shape[-1], features), (features,), (*shape[:-1], features))
    )

    def both(dtype):
        def run(x, kernel, bias):
            return conv(x, kernel, bias, None, time_padding, dtype)

        out, back = jax.vjp(run, x, kernel, bias)
        return out, back(weights)

    got, want = jax.jit(lambda: (both(jnp.bfloat16), both(jnp.float32)))()
    assert got[0].dtype == jnp.float32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_has_the_values_and_gradients_of_a_product(dtype):
    rng = np.random.default_rng(0)
    x, kernel, bias, weights = (
        jnp.asarray(rng.normal(size=size), jnp.bfloat16).astype(jnp.float32)
        for size in ((2, 3, 5), (5, 4), (4,), (2, 3, 4))
    )

    def dense(x, kernel, bias):
        params = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
        return layers.Dense(4, use_bias=bias is not None, dtype=dtype).apply({"params": params}, x)

    out, back = jax.vjp(dense, x, kernel, bias)
    want, want_back = jax.vjp(lambda x, k, b: x @ k + b, x, kernel, bias)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), back(weights), want_back(weights))
    np.testing.assert_allclose(dense(x, kernel, None), want - bias, rtol=1e-5, atol=1e-5)


def test_upsampling_repeats_and_its_gradient_sums():
    x = np.random.default_rng(0).normal(size=(2, 2, 3, 1, 4)).astype(np.float32)
    out, back = jax.vjp(lambda x: layers.upsample(x, (2, 1, 3)), x)
    np.testing.assert_array_equal(out, x.repeat(2, 1).repeat(3, 3))
    weights = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)
    want = weights.reshape(2, 2, 2, 3, 1, 3, 4).sum((2, 5))
    np.testing.assert_allclose(back(weights)[0], want, rtol=1e-5, atol=1e-6)


def later_frames_changed(x, frame):
    """x with random numbers in place of all frames after `frame`."""
    other = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    return np.where(np.arange(x.shape[1]).reshape(-1, *(1,) * (x.ndim - 2)) > frame, other, x)


@pytest.mark.parametrize(
    "module, shape",
    [
        (layers.Conv(4, (3, 3, 3), time_padding="causal"), (1, 5, 4, 4, 3)),
        (layers.FactorizedConv(4, True, "causal"), (1, 5, 4, 4, 3)),
        (layers.FactorizedConv(4, False, "causal"), (1, 5, 4, 4, 3)),
        (layers.ResidualBlock(8, time_padding="causal", groups=2), (1, 5, 4, 4, 4)),
        (layers.ResidualBlock(8, time_padding="causal", groups=2), (1, 5, 4)),
    ],
    ids=["conv", "factorized", "full", "block", "block of sound"],
)
def test_causal_layers_do_not_look_ahead(module, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    params = init_weights(module, x)
    apply = jax.jit(lambda x: module.apply({"params": params}, x))
    before = apply(x)
    for frame in (0, 2):
        after = apply(later_frames_changed(x, frame))
        np.testing.assert_allclose(after[:, : frame + 1], before[:, : frame + 1], rtol=1e-5, atol=1e-6)
        assert (np.abs(after - before).reshape(5, -1).max(1)[frame + 1 :] > 1e-3).all()


def test_a_residual_block_starts_as_its_skip():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 8)).astype(np.float32)
    embedding = np.ones((2, 3, 5), np.float32)
    block = layers.ResidualBlock(8, groups=4)
    variables = jax.jit(block.init)(jax.random.key(0), x, embedding)
    np.testing.assert_array_equal(block.apply(variables, x, embedding), x)
    params = init_weights(layers.ResidualBlock(6, groups=2), x)
    assert params["skip"]["kernel"].shape == (8, 6) and "skip" not in variables["params"]


def test_the_embedding_of_a_frame_reaches_all_its_sound_tokens():
    x = np.random.default_rng(0).normal(size=(1, 12, 8)).astype(np.float32)  # 3 frames of K = 4 tokens
    embedding = np.zeros((1, 3, 5), np.float32)
    block = layers.ResidualBlock(8, groups=4)
    params = init_weights(block, x, embedding)
    apply = jax.jit(lambda e: block.apply({"params": params}, x, e))
    changed = np.abs(apply(embedding + np.eye(3)[1][:, None]) - apply(embedding)).max((0, 2)) > 1e-6
    # Tokens 4 to 7 belong to frame 1. The convolution of width 3 carries the change one token further on each side.
    assert changed.tolist() == [False] * 3 + [True] * 6 + [False] * 3


@pytest.mark.parametrize(
    "shape, frames, folded",
    [
        ((2, 3, 4, 5, 12), 0, (6, 4, 5, 12)),
        ((2, 12, 12), 3, (6, 4, 12)),  # 4 sound tokens for each frame
        ((2, 5, 12), 0, (10, 1, 12)),  # statistics of each time step alone
    ],
)
def test_group_norm_is_flax_group_norm_of_each_frame(shape, frames, folded):
    x = np.random.default_rng(0).normal(2.0, 3.0, size=shape).astype(np.float32)
    module = layers.GroupNorm(groups=8, frames=frames)  # 4 groups: the greatest common divisor of 8 and 12 channels
    params = init_weights(module, x)
    want = nn.GroupNorm(num_groups=4, epsilon=1e-5).apply({"params": params}, x.reshape(folded)).reshape(shape)
    np.testing.assert_allclose(module.apply({"params": params}, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_group_norm_takes_an_offset_before_and_a_film_and_an_activation_after(platform):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 5, 12)).astype(np.float32)
    offset, scale, shift = rng.normal(size=(3, 2, 3, 12)).astype(np.float32)
    offset = offset[:, :1]  # the same for all frames
    module = layers.GroupNorm(groups=4, activation=nn.silu)
    params = init_weights(module, x)
    weights = rng.normal(size=x.shape).astype(np.float32)

    def ours(params, x, offset, scale, shift):
        return module.apply({"params": params}, x, offset, (scale, shift))

    def plain(params, x, offset, scale, shift):
        x = (x + offset[:, :, None, None]).reshape(6, 4, 5, 12)
        h = nn.GroupNorm(num_groups=4, epsilon=1e-5).apply({"params": params}, x).reshape(2, 3, 4, 5, 12)
        return nn.silu(h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

    arguments = (params, x, offset, scale, shift)
    with ops.backend(platform):
        got, want = (jax.jit(lambda *a, f=f: (f(*a), jax.vjp(f, *a)[1](weights)))(*arguments) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)


def test_layer_norm_is_flax_layer_norm():
    x = np.random.default_rng(0).normal(2.0, 3.0, size=(2, 3, 12)).astype(np.float32)
    params = init_weights(layers.LayerNorm(), x)
    weights = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def both(module):
        out, back = jax.vjp(lambda params, x: module.apply({"params": params}, x), params, x)
        return out, back(weights)

    got, want = both(layers.LayerNorm()), both(nn.LayerNorm())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, want)


def test_both_tables_give_the_same_values_and_gradients():
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 4, 8)).astype(np.float32)
    embedding = np.random.default_rng(1).normal(size=(1, 3, 5)).astype(np.float32)
    block = layers.ResidualBlock(6, groups=2)
    params = init_weights(block, x, embedding)

    def run():
        out, back = jax.vjp(lambda params, x: block.apply({"params": params}, x, embedding), params, x)
        return out, back(jnp.cos(out))

    def traced():
        return str(jax.make_jaxpr(lambda x: block.apply({"params": params}, x, embedding))(x))

    here = run()
    with ops.backend("tpu"):
        assert "name=conv_unit_strides" not in traced()
        there = run()
    assert "name=conv_unit_strides" in traced()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), here, there)


def test_space_to_depth_keeps_each_square_together():
    x = np.arange(2 * 3 * 4 * 6 * 3).reshape(2, 3, 4, 6, 3)
    y = np.asarray(layers.space_to_depth(x, 2))
    assert y.shape == (2, 3, 2, 3, 12)
    np.testing.assert_array_equal(y[1, 2, 1, 2], x[1, 2, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(layers.depth_to_space(y, 2), x)


def test_fourier_features():
    y = np.asarray(layers.fourier_features(np.array([0.0, 1.0, 2 * np.pi]), 8, max_period=16.0))
    np.testing.assert_allclose(y[0], [1] * 4 + [0] * 4, atol=1e-6)
    np.testing.assert_allclose(y[1, :4], np.cos(16.0 ** (-np.arange(4) / 4)), atol=1e-6)
    np.testing.assert_allclose(y[2, [0, 4]], [1, 0], atol=1e-5)  # the shortest period is 2 pi


def test_rotary_scores_depend_on_time_differences_only():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 4, 2, 8)).astype(np.float32)
    here, there = np.array([0.0, 0.4, 1.1, 3.0]), np.array([0.2, 0.5, 2.0, 2.5])

    def scores(a, b):
        return np.einsum("bnhd,bmhd->bhnm", layers.rotary(query, a), layers.rotary(key, b))

    np.testing.assert_allclose(scores(here + 1.7, there + 1.7), scores(here, there), atol=1e-4)
    assert np.abs(scores(here + 0.3, there) - scores(here, there)).max() > 0.1
    np.testing.assert_allclose(layers.rotary(query, np.zeros(4)), query)
    lengths = np.linalg.norm(layers.rotary(query, here), axis=-1)
    np.testing.assert_allclose(lengths, np.linalg.norm(query, axis=-1), rtol=1e-5)


def test_attention_is_a_softmax_over_what_the_mask_allows():
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 3, 2, 4)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 5, 2, 4)).astype(np.float32)
    mask = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]], bool)
    out = np.asarray(cpu.attention(query, key, value, mask))
    for b in range(2):
        for h in range(2):
            weights = np.exp(query[b, :, h] @ key[b, mask[b], h].T / 2)
            want = weights / weights.sum(1, keepdims=True) @ value[b, mask[b], h]
            np.testing.assert_allclose(out[b, :, h], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("queries", [7, 300, 2100])  # all at once; one block for each example; three blocks
def test_attention_on_a_cpu_has_the_values_and_gradients_of_the_direct_form(queries, bounded):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, queries, 2, 4)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 300, 2, 4)).astype(np.float32)
    if not bounded:
        query *= 100  # the exponential of these scores would overflow
    mask = rng.random((2, 300)) < 0.5
    weights = rng.normal(size=query.shape).astype(np.float32)

    def both(function):
        loss = lambda *x: jnp.sum(function(*x, mask) * weights)  # noqa: E731
        return function(query, key, value, mask), jax.grad(loss, (0, 1, 2))(query, key, value)

    assert (query.shape[1] * key.shape[1] >= cpu.ATTENTION_AT_ONCE) == (queries > 7)
    got = both(functools.partial(cpu.attention, bounded=bounded))
    want = both(accelerator.attention)
    scale = 1 if bounded else 100
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale), got, want)


def test_attention_module_reads_the_context_at_its_time():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 6)).astype(np.float32)
    context = rng.normal(size=(1, 4, 5)).astype(np.float32)
    mask = np.array([[True, True, True, False]])
    times = np.array([0.0, 0.5, 1.0]), np.array([0.1, 0.2, 0.6, 0.9])
    module = layers.Attention(4, heads=2)
    params = init_weights(module, x, context)
    assert (
        np.asarray(module.init(jax.random.key(0), x)["params"]["out"]["kernel"]) == 0
    ).all()  # adds nothing at first

    @jax.jit
    def run(context, mask, here, there):
        return module.apply({"params": params}, x, context, mask, here, there)

    out = run(context, mask, *times)
    assert out.shape == x.shape
    order = np.array([2, 0, 3, 1])  # only the times of the context matter, not its order
    np.testing.assert_allclose(run(context[:, order], mask[:, order], times[0], times[1][order]), out, atol=1e-5)
    assert np.abs(run(context[:, order], mask[:, order], *times) - out).max() > 1e-3
    np.testing.assert_allclose(run(context, mask, times[0] + 3, times[1] + 3), out, atol=1e-4)
    hidden = context + 9 * ~mask[..., None]
    np.testing.assert_array_equal(run(hidden, mask, *times), out)


def test_snake_is_of_its_paper():
    x = np.linspace(-3, 3, 14, dtype=np.float32).reshape(1, 7, 2)
    factors = np.float32([0.5, 4.0])
    y = layers.Snake().apply({"params": {"log_factor": np.log(factors)}}, x)
    np.testing.assert_allclose(y, x + np.sin(factors * x) ** 2 / factors, rtol=1e-5, atol=1e-6)
    assert (np.diff(y, axis=1) >= 0).all()  # its slope is 1 + sin(2 a x), never below 0
