"""The layers all models share: convolutions, normalisation, embeddings, attention.

Arrays are channels last. A video is [B, T, H, W, C]; a sound is [B, N, C]. Convolution forms are chosen here and only
here: accelerators get XLA's direct convolutions; a CPU gets forms with the same values that measured faster there.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.sharding import constrain

# ---------------------------------------------------------------------------------------------------- convolutions


def conv(x, kernel, strides=None, time_padding="same"):
    """Convolves x [B, *space, C_in] with kernel [*window, C_in, C_out], any number of space dimensions.

    "Same" padding in space; the first dimension is time and may be "causal" (all padding before the first frame).
    """
    window = kernel.shape[:-2]
    strides = strides or (1,) * len(window)
    padding = [((k - 1) // 2, k // 2) for k in window]
    if time_padding == "causal":
        padding[0] = (window[0] - 1, 0)
    if jax.default_backend() == "cpu" and max(strides) == 1:
        return _conv_unit(x, kernel, tuple(padding))
    x = _pad(x, padding)
    if jax.default_backend() == "cpu":
        return _conv_products(x, kernel, strides)
    return _conv_direct(x, kernel, strides)


def _pad(x, padding):
    return jnp.pad(x, [(0, 0), *padding, (0, 0)])


def _conv_direct(x, kernel, strides):
    space = "DHW"[-len(strides) :]
    dims = (f"N{space}C", f"{space}IO", f"N{space}C")
    return jax.lax.conv_general_dilated(x, kernel, strides, "VALID", dimension_numbers=dims)


def _slice(x, tap, window, strides):
    """What the kernel taps `tap` meet of padded x [B, *space, C]; `tap` may name only the leading space dimensions."""
    index = [slice(None)]
    for i, k, s, size in zip(tap, window, strides, x.shape[1:-1]):
        index.append(slice(i, i + (size - k) // s * s + 1, s))
    return x[tuple(index)]


def _side_by_side(x, window, strides):
    """The taps of the last window dimension as channels: [B, ..., W, C] -> [B, ..., W', taps * C]."""
    k, s, size = window[-1], strides[-1], x.shape[-2]
    taps = [x[..., i : i + (size - k) // s * s + 1 : s, :] for i in range(k)]
    return taps[0] if k == 1 else jnp.concatenate(taps, -1)


def _conv_products(x, kernel, strides):
    """VALID convolution as a sum of products of matrices.

    One for each kernel tap of all window dimensions but the last, whose taps lie side by side in the channels.
    """
    *rest, last, c_in, c_out = kernel.shape
    window = kernel.shape[:-2]
    x = _side_by_side(x, window, strides)
    kernel = kernel.reshape(*rest, last * c_in, c_out)
    return sum(_slice(x, tap, window, strides) @ kernel[tap] for tap in np.ndindex(*rest))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_unit(x, kernel, padding):
    """Convolution with unit strides that keeps the size, for XLA's CPU backend.

    Its own convolutions and above all their weight gradients are slow; products of matrices are fast. With few input
    channels such products are too thin, and the direct form with frames folded into the batch is faster. Both
    gradients are sums of products as well.
    """
    window = kernel.shape[:-2]
    x = _pad(x, padding)
    if x.ndim < 5 or x.shape[-1] >= 32 or window[1:] == (1, 1):
        return _conv_products(x, kernel, (1,) * len(window))
    frames, out = x.shape[1] - kernel.shape[0] + 1, 0
    for t in range(kernel.shape[0]):
        folded = x[:, t : t + frames].reshape(-1, *x.shape[2:])  # [B*T, H, W, C]
        y = _conv_direct(folded, kernel[t], (1, 1))
        out = out + y.reshape(x.shape[0], frames, *y.shape[1:])
    return out


def _conv_unit_backward(padding, saved, grad):
    x, kernel = saved
    window = kernel.shape[:-2]
    flipped = jnp.flip(kernel, range(len(window))).swapaxes(-1, -2)
    x_grad = _conv_unit(grad, flipped, tuple(pad[::-1] for pad in padding))
    ones = (1,) * len(window)
    columns = _side_by_side(_pad(x, padding), window, ones)
    flat = grad.reshape(-1, grad.shape[-1])
    taps = [
        _slice(columns, tap, window, ones).reshape(-1, columns.shape[-1]).T @ flat for tap in np.ndindex(*window[:-1])
    ]
    return x_grad, jnp.stack(taps).reshape(kernel.shape)


_conv_unit.defvjp(lambda x, kernel, padding: (_conv_unit(x, kernel, padding), (x, kernel)), _conv_unit_backward)


class Conv(nn.Module):
    """A convolution over [B, *space, C]; `window` has one size per space dimension, time first."""

    features: int
    window: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    time_padding: str = "same"
    zero: bool = False  # zero-initialised: the layer starts as nothing
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (*self.window, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        out = conv(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, self.time_padding)
        return out + bias.astype(self.dtype)


class FactorisedConv(nn.Module):
    """A 3-D convolution, full (3x3x3) or factorised (1x3x3 then 3x1x1); for sound, one 1-D convolution of width 3."""

    features: int
    factorised: bool = True
    time_padding: str = "same"
    zero: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        make = functools.partial(Conv, self.features, time_padding=self.time_padding, dtype=self.dtype)
        if x.ndim == 3:
            return make(window=(3,), zero=self.zero, name="time")(x)
        if not self.factorised:
            return make(window=(3, 3, 3), zero=self.zero, name="full")(x)
        x = make(window=(1, 3, 3), name="space")(x)
        return make(window=(3, 1, 1), zero=self.zero, name="time")(x)


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


class GroupNorm(nn.Module):
    """Group normalisation (arXiv:1803.08494) within each frame: statistics over space and the group's channels.

    Statistics of one frame never mix with another's, so that a causal model stays causal, and frames at different
    noise levels do not disturb each other. For sound [B, N, C], `frames` cuts the time axis into that many frames;
    0 takes every sample on its own. A video with `frames` = 1 shares its statistics over all frames.
    """

    groups: int = 8
    frames: int = 0
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        groups = math.gcd(self.groups, channels)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        frames = self.frames or x.shape[1]
        g = x.astype(jnp.float32).reshape(x.shape[0], frames, -1, groups, channels // groups)
        mean = g.mean((2, 4), keepdims=True)
        variance = jnp.square(g).mean((2, 4), keepdims=True) - jnp.square(mean)
        inverse = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + self.eps)
        # One multiply-add over the array: y = x * a + b with a, b [B, frames, 1, groups, C/groups].
        a = inverse * scale.reshape(groups, -1)
        b = bias.reshape(groups, -1) - mean * a
        return (g * a + b).reshape(x.shape).astype(self.dtype)


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


def attention(query, key, value, mask=None):
    """Softmax attention. query [B, N, heads, d], key and value [B, M, heads, d], mask [B, M] True = may be read."""
    if mask is None:
        mask = jnp.ones(key.shape[:2], bool)
    if jax.default_backend() != "cpu" or query.shape[1] * key.shape[1] < ATTENTION_AT_ONCE:
        return _attention_direct(query, key, value, mask)
    # On a CPU the scores of all examples at once go through memory several times; those of one stay in its cache.
    return jax.lax.map(lambda one: _attention_blocked(*one), (query, key, value, mask))


def _attention_direct(query, key, value, mask):
    scores = jnp.einsum("...nhd,...mhd->...hnm", query, key) / math.sqrt(query.shape[-1])
    scores = jnp.where(mask[..., None, None, :], scores.astype(jnp.float32), -1e9)
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
        dense = functools.partial(nn.DenseGeneral, shape, use_bias=not self.plain, dtype=self.dtype)
        query, key, value = dense(name="query")(x), dense(name="key")(context), dense(name="value")(context)
        if not self.plain:
            query, key = RMSNorm(name="query_norm")(query), RMSNorm(name="key_norm")(key)
        if positions is not None:
            query, key = rotary(query, positions), rotary(key, context_positions)
        out = attention(query, key, value, mask)
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        out = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), kernel_init=init, dtype=self.dtype, name="out")(out)
        return constrain(out, "batch", "token", "channel")


def transformer_layer(x, mask, heads, index, zero=False, dtype=jnp.float32):
    """Layer number `index` of a pre-norm transformer over tokens x [B, L, C]; for use inside a compact module.

    mask: bool [B, L], True = may be read. zero: the layer starts as nothing.
    """
    channels = x.shape[-1]
    h = nn.LayerNorm(dtype=dtype, name=f"norm_attention_{index}")(x)
    x = x + Attention(heads, channels // heads, dtype=dtype, name=f"attention_{index}")(h, mask=mask)
    h = nn.LayerNorm(dtype=dtype, name=f"norm_mlp_{index}")(x)
    h = nn.gelu(nn.Dense(4 * channels, dtype=dtype, name=f"expand_{index}")(h))
    init = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
    return x + nn.Dense(channels, kernel_init=init, dtype=dtype, name=f"contract_{index}")(h)


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv:1910.07467) of the last dimension; keeps attention logits bounded."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + 1e-6) * scale).astype(x.dtype)


# ------------------------------------------------------------------------------------------------- residual blocks


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, conv, GroupNorm (scaled and shifted by the embedding), SiLU, conv, plus an identity or 1x1 skip.

    x is [B, T, H, W, C] or [B, K*T, C]; embedding, if any, is [B, T, E]: one vector for every frame (FiLM,
    arXiv:1709.07871), repeated for the K sound tokens of the frame.
    """

    features: int
    factorised: bool = True
    time_padding: str = "same"
    groups: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, embedding=None):
        frames = embedding.shape[1] if embedding is not None else 0
        norm = functools.partial(GroupNorm, self.groups, frames, dtype=self.dtype)
        layer = functools.partial(FactorisedConv, self.features, self.factorised, self.time_padding, dtype=self.dtype)
        h = layer(name="conv_in")(nn.silu(norm(name="norm_in")(x)))
        h = norm(name="norm_out")(h)
        if embedding is not None:
            film = nn.Dense(2 * self.features, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="film")
            scale, shift = jnp.split(film(embedding), 2, -1)  # [B, T, C] each
            h = h * (1 + _to_frames(scale, h)) + _to_frames(shift, h)
        h = layer(zero=True, name="conv_out")(nn.silu(h))
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=self.dtype, name="skip")(x)
        x = x + h
        return constrain_activation(x)


def _to_frames(per_frame, x):
    """[B, T, C] shaped to broadcast over x [B, T, H, W, C] or [B, K*T, C]."""
    if x.ndim == 5:
        return per_frame[:, :, None, None]
    return jnp.repeat(per_frame, x.shape[1] // per_frame.shape[1], 1)


def constrain_activation(x):
    if x.ndim == 5:
        return constrain(x, "batch", "time", "height", "width", "channel")
    return constrain(x, "batch", "token", "channel")
