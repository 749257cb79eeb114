"""The layers all models share: convolutions, normalisation, embeddings, attention.

Arrays are channels last. A video is [B, T, H, W, C]; a sound is [B, N, C]. Forms are chosen here and only here:
those of accelerator.py, of XLA's own operations, or those of cpu.py, of the same values.

`dtype` of a layer is what products are computed in. Accelerators keep the arrays between products in it, too; a CPU
keeps them in float32.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from vdm_jax.models.ops import accelerator, cpu
from vdm_jax.sharding import constrain, split

_platform = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def backend(platform):
    """Inside, layers take the forms of `platform`, whatever this process runs on: to compile for it, or to count."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def on_cpu():
    return (_platform.get() or jax.default_backend()) == "cpu"


def activation_dtype(dtype):
    """The type of arrays between the layers of a model whose products are in `dtype`."""
    return jnp.float32 if on_cpu() else dtype


# --------------------------------------------------------------------------------------------------- rematerialisation


# The names under which rematerialisation knows what `constrain_activation`, and what products and attention give.
ACTIVATION, PRODUCT = "activation", "product"
REMAT = ("none", "pointwise", "blocks")


def apply_remat(call, mode):
    """A function or class of modules whose backward pass keeps less of the forward one. mode: "none" or

    "pointwise"  keeps what convolutions, linear layers and attention give: norms, activation functions and the weights
                 of attention are computed again
    "blocks"     keeps the output of each block only: about a third more FLOPs
    """
    if mode == "none":
        return call
    names = (ACTIVATION,) if mode == "blocks" else (ACTIVATION, PRODUCT)
    transform = nn.remat if isinstance(call, type) else jax.checkpoint
    return transform(call, policy=jax.checkpoint_policies.save_only_these_names(*names))


# ------------------------------------------------------------------------------------------------------------- products


def dense(x, kernel, bias, dtype):
    """x [..., K] @ kernel [K, N] + bias [N]; bias may be None."""
    if on_cpu():
        return checkpoint_name(cpu.dense(x, kernel, bias, dtype), PRODUCT)
    out = x.astype(dtype) @ kernel.astype(dtype)
    return checkpoint_name(out if bias is None else out + bias.astype(dtype), PRODUCT)


class Dense(nn.Module):
    """A linear layer from the last `axes` dimensions of x to `features`, a size or several."""

    features: int | tuple[int, ...]
    axes: int = 1
    use_bias: bool = True
    zero: bool = False  # zero-initialised: the layer starts as nothing
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        given, wanted = x.shape[-self.axes :], math.prod(features)

        def init(key, shape):
            draw = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
            return draw(key, (math.prod(given), wanted)).reshape(shape)

        kernel = self.param("kernel", init, (*given, *features)).reshape(-1, wanted)
        bias = self.param("bias", nn.initializers.zeros, features).reshape(-1) if self.use_bias else None
        x = x.reshape(*x.shape[: -self.axes], -1)
        return dense(x, kernel, bias, self.dtype).reshape(*x.shape[:-1], *features)


# ---------------------------------------------------------------------------------------------------- convolutions


def conv(x, kernel, bias, strides=None, time_padding="same", dtype=jnp.float32):
    """Convolves x [B, *space, C_in] with kernel [*window, C_in, C_out], any number of space dimensions; adds the bias.

    "Same" padding in space; the first dimension is time and may be "causal" (all padding before the first frame).
    """
    window = kernel.shape[:-2]
    strides = strides or (1,) * len(window)
    padding = [((k - 1) // 2, k // 2) for k in window]
    if time_padding == "causal":
        padding[0] = (window[0] - 1, 0)
    if on_cpu() and max(window) == 1 and max(strides) == 1:
        return dense(x, kernel.reshape(kernel.shape[-2:]), bias, dtype)
    if on_cpu() and max(strides) == 1:
        return checkpoint_name(cpu.conv(x, kernel, bias, tuple(padding), dtype), PRODUCT)
    x, kernel, bias = x.astype(dtype), kernel.astype(dtype), bias.astype(dtype)
    if on_cpu():
        x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
        return (_conv_products(x, kernel, strides) + bias).astype(jnp.float32)
    # Split along time only as `constrain` says, and so its gradient: a split that XLA makes up may be too fine for it.
    place = _constrained if split("sequence") else lambda x: x
    return checkpoint_name(place(accelerator.conv(place(x), kernel, bias, tuple(strides), tuple(padding))), PRODUCT)


def _conv_products(x, kernel, strides):
    """VALID convolution of any strides as one product of matrices: all taps lie side by side in the channels."""
    *window, c_in, c_out = kernel.shape
    size = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:-1], window, strides)]

    def met_by(tap):
        return x[(slice(None), *(slice(i, i + (n - 1) * s + 1, s) for i, n, s in zip(tap, size, strides)))]

    columns = jnp.concatenate([met_by(tap) for tap in np.ndindex(*window)], -1)
    return dense(columns, kernel.reshape(-1, c_out), None, x.dtype)


class Conv(nn.Module):
    """A convolution over [B, *space, C]; `window` has one size per space dimension, time first.

    With factors in `upsample`, one per space dimension, x is first upsampled by them (nearest neighbours).
    """

    features: int
    window: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    time_padding: str = "same"
    upsample: tuple[int, ...] | None = None
    zero: bool = False  # zero-initialised: the layer starts as nothing
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (*self.window, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = upsample(x, self.upsample) if self.upsample else x
        x = conv(x, kernel, bias, self.strides, self.time_padding, self.dtype)
        return constrain_activation(x) if self.strides else x  # fewer places: they may be split over fewer devices


class FactorizedConv(nn.Module):
    """A 3-D convolution, full (3x3x3) or factorized (1x3x3 then 3x1x1); for sound, one 1-D convolution of width 3."""

    features: int
    factorized: bool = True
    time_padding: str = "same"
    zero: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        make = functools.partial(Conv, self.features, time_padding=self.time_padding, dtype=self.dtype)
        if x.ndim == 3:
            return make(window=(3,), zero=self.zero, name="time")(x)
        if not self.factorized:
            return make(window=(3, 3, 3), zero=self.zero, name="full")(x)
        x = make(window=(1, 3, 3), name="space")(x)
        return make(window=(3, 1, 1), zero=self.zero, name="time")(x)


def upsample(x, factors):
    """Nearest-neighbour upsampling of x [B, *space, C] by a factor for each space dimension."""
    if on_cpu():
        return cpu.repeated(x, tuple(factors))
    return functools.reduce(lambda x, i: jnp.repeat(x, factors[i], i + 1), range(len(factors)), x)


def space_to_depth(x, patch):
    """[B, T, H, W, C] -> [B, T, H/p, W/p, p*p*C]."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, t, h // patch, w // patch, patch * patch * c)


def depth_to_space(x, patch, time=1):
    """[B, T, h, w, t*p*p*C] -> [B, T*t, h*p, w*p, C]."""
    b, t, h, w, c = x.shape
    c //= time * patch**2
    x = x.reshape(b, t, h, w, time, patch, patch, c).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(b, t * time, h * patch, w * patch, c)


# --------------------------------------------------------------------------------------------------- normalisation


def _same(x):
    return x


class GroupNorm(nn.Module):
    """Group normalisation (arXiv:1803.08494) within each frame, then `activation`.

    Statistics are over space and the group's channels. Those of one frame never mix with another's, so that a causal
    model stays causal, and frames at different noise levels do not disturb each other. For sound [B, N, C], `frames`
    cuts the time axis into that many frames; 0 takes every sample on its own. A video with `frames` = 1 shares its
    statistics over all frames.

    offset [B, frames, C] is added to x before, film = (scale, shift), each [B, frames, C], acts after the
    normalisation: y -> y * (1 + scale) + shift (FiLM, arXiv:1709.07871). `frames` may be 1 in each.
    """

    groups: int = 8
    frames: int = 0
    eps: float = 1e-5
    activation: Callable = _same
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, offset=None, film=None):
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        groups = math.gcd(self.groups, channels)
        shape = x.shape
        frames = self.frames or shape[1]
        x = x.reshape(shape[0], frames, shape[1] // frames, *shape[2:])  # [B, frames, ..., C]
        pixels = math.prod(x.shape[2:-1])

        def coefficients(total, squares, parameters):
            """All of the above as y = x * a + b, from each channel's sums: a, b [B, frames, C]."""
            total, squares = (checkpoint_name(sums, PRODUCT) for sums in (total, squares))  # small: kept
            scale, bias, offset, film = parameters
            if offset is not None:
                squares = squares + offset * (2 * total + pixels * offset)
                total = total + pixels * offset

            def group_mean(sums):
                means = sums.reshape(*sums.shape[:-1], groups, -1).mean(-1, keepdims=True) / pixels
                return jnp.broadcast_to(means, (*means.shape[:-1], channels // groups)).reshape(sums.shape)

            mean = group_mean(total)
            variance = jnp.maximum(group_mean(squares) - jnp.square(mean), 0.0)
            a = jax.lax.rsqrt(variance + self.eps) * scale
            b = bias - mean * a
            if film is not None:
                a, b = a * (1 + film[0]), b * (1 + film[0]) + film[1]
            return a, b if offset is None else b + offset * a

        parameters = jax.tree.map(lambda p: p.astype(jnp.float32), (scale, bias, offset, film))
        if on_cpu():
            x = x.astype(jnp.float32).reshape(shape[0], frames, pixels, channels)
            return cpu.norm_act(coefficients, self.activation, x, parameters).reshape(shape)
        return accelerator.norm_act(coefficients, self.activation, self.dtype, x, parameters).reshape(shape)


class LayerNorm(nn.Module):
    """Layer normalisation (arXiv:1607.06450) of the last dimension."""

    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
        return _affine((x - mean) * jax.lax.rsqrt(variance + self.eps), scale, bias).astype(
            activation_dtype(self.dtype)
        )


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv:1910.07467) of the last dimension; keeps attention logits bounded."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
        return _affine(x * jax.lax.rsqrt(mean_square + 1e-6), scale, None).astype(x.dtype)


def _affine(x, scale, bias):
    """x [..., C] * scale [C] + bias [C]; bias may be None."""
    if on_cpu():
        return cpu.affine(x, scale, bias)
    return x * scale if bias is None else x * scale + bias


# ------------------------------------------------------------------------------------------------------ embeddings


def fourier_features(x, features, max_period):
    """Sinusoidal features of x [...] -> [..., features] (arXiv:1706.03762, section 3.5), periods 2 pi .. max_period."""
    half = features // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half) / half)
    angles = x[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def rotary(x, positions, max_period=100.0):
    """Rotary position embedding (RoPE, arXiv:2104.09864, eq. 34) of x [B, N, heads, d] at positions [N], any unit."""
    half = x.shape[-1] // 2
    frequencies = 2 * math.pi * jnp.exp(-math.log(max_period) * jnp.arange(half) / half)
    angles = positions[:, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


# ------------------------------------------------------------------------------------------------------- attention


ATTENTION_AT_ONCE = 2**16  # scores of one head above which a CPU takes one example after the other


def attention(query, key, value, mask=None, bounded=False):
    """Softmax attention. query [B, N, heads, d], key and value [B, M, heads, d], mask [B, M] True = may be read.

    bounded: queries and keys are normalised, so that scores are small.
    """
    if not on_cpu():
        return _attention_direct(query, key, value, mask)
    if query.shape[1] * key.shape[1] < ATTENTION_AT_ONCE:
        return cpu.attention(query, key, value, mask, bounded)
    # On a CPU the scores of all examples at once go through memory several times; those of one stay in its cache.
    mask = jnp.ones(key.shape[:2], bool) if mask is None else mask
    return jax.lax.map(lambda one: _attention_blocked(*one), (query, key, value, mask))


def _attention_direct(query, key, value, mask):
    scores = jnp.einsum("...nhd,...mhd->...hnm", query, key) / math.sqrt(query.shape[-1])
    scores = scores.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[..., None, None, :], scores, -1e9)
    weights = jax.nn.softmax(scores, -1).astype(value.dtype)
    return jnp.einsum("...hnm,...mhd->...nhd", weights, value)


def _attention_blocked(query, key, value, mask):
    """One example's attention, no more than 1,024 queries at a time; the backward pass computes the scores again."""
    tokens, *heads = query.shape
    parts = next(p for p in range(-(-tokens // 1024), tokens + 1) if tokens % p == 0)
    block = jax.checkpoint(lambda part: _attention_direct(part, key, value, mask))
    return jax.lax.map(block, query.reshape(parts, tokens // parts, *heads)).reshape(query.shape)


class Attention(nn.Module):
    """Multi-head attention of tokens x [B, N, C] to a context [B, M, D] (or to themselves), residual not included.

    With positions (in seconds) given on both sides, queries and keys are rotated by them. `plain` attention, as in
    arXiv:1706.03762, normalises neither queries nor keys, and its queries, keys and values have no bias.
    """

    heads: int
    head_dim: int
    zero: bool = True
    plain: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, context=None, mask=None, positions=None, context_positions=None):
        context = x if context is None else context
        context_positions = positions if context_positions is None else context_positions
        shape = (self.heads, self.head_dim)
        make = functools.partial(Dense, shape, use_bias=not self.plain, dtype=self.dtype)
        query, key, value = make(name="query")(x), make(name="key")(context), make(name="value")(context)
        if not self.plain:
            query, key = RMSNorm(name="query_norm")(query), RMSNorm(name="key_norm")(key)
        if positions is not None:
            query, key = rotary(query, positions), rotary(key, context_positions)
        out = checkpoint_name(attention(query, key, value, mask, bounded=not self.plain), PRODUCT)
        out = Dense(x.shape[-1], axes=2, zero=self.zero, dtype=self.dtype, name="out")(out)
        return constrain_activation(out)


def transformer_layer(x, mask, heads, index, positions=None, zero=False, dtype=jnp.float32):
    """Layer number `index` of a pre-norm transformer over tokens x [B, L, C]; for use inside a compact module.

    mask: bool [B, L], True = may be read. positions: [L], for rotary ones. zero: the layer starts as nothing.
    """
    channels = x.shape[-1]
    attention = Attention(heads, channels // heads, dtype=dtype, name=f"attention_{index}")
    h = LayerNorm(dtype=dtype, name=f"norm_attention_{index}")(x)
    x = x + attention(h, mask=mask, positions=positions)
    h = LayerNorm(dtype=dtype, name=f"norm_mlp_{index}")(x)
    h = nn.gelu(Dense(4 * channels, dtype=dtype, name=f"expand_{index}")(h))
    return x + Dense(channels, zero=zero, dtype=dtype, name=f"contract_{index}")(h)


# ------------------------------------------------------------------------------------------------- residual blocks


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, conv, GroupNorm (scaled and shifted by the embedding), SiLU, conv, plus an identity or 1x1 skip.

    x is [B, T, H, W, C] or [B, K*T, C]; embedding, if any, is [B, T, E]: one vector for every frame (FiLM,
    arXiv:1709.07871), repeated for the K sound tokens of the frame.
    """

    features: int
    factorized: bool = True
    time_padding: str = "same"
    groups: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, embedding=None):
        frames = embedding.shape[1] if embedding is not None else 0
        norm = functools.partial(GroupNorm, self.groups, frames, activation=nn.silu, dtype=self.dtype)
        layer = functools.partial(FactorizedConv, self.features, self.factorized, self.time_padding, dtype=self.dtype)
        h = layer(name="conv_in")(norm(name="norm_in")(x))
        film = None
        if embedding is not None:
            film = Dense(2 * self.features, zero=True, dtype=self.dtype, name="film")(embedding)
            film = jnp.split(film, 2, -1)  # [B, T, C] each
        h = layer(zero=True, name="conv_out")(norm(name="norm_out")(h, film=film))
        if x.shape[-1] != self.features:
            x = Dense(self.features, dtype=self.dtype, name="skip")(x)
        x = x + h
        return constrain_activation(x)


def constrain_activation(x):
    """x [B, T, H, W, C] or [B, N, C] at the end of a block, split over the mesh as activations are."""
    return checkpoint_name(_constrained(x), ACTIVATION)


def _constrained(x):
    if x.ndim == 5:
        return constrain(x, "batch", "time", "height", "width", "channel")
    return constrain(x, "batch", "token", "channel")
