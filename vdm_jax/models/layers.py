"""The layers that all models share: convolutions, normalization, embeddings, attention, residual blocks.

Arrays are channels last. A video is [B, T, H, W, C]; a sound is [B, N, C].

`dtype` of a layer is the type in which its products are computed. On accelerators the arrays between layers have that
type too; on a CPU they are float32. `ops/` holds the implementations for both, and `ops.current()` picks one.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vdm_jax.models import ops
from vdm_jax.models.ops.placement import constrain_clips


def activation_dtype(dtype):
    """The type of the arrays between layers, in a model whose products are computed in `dtype`."""
    return ops.current().activation_dtype(dtype)


# ---------------------------------------------------------------------------------------------------------------- remat


# Names of arrays that the backward pass may keep: outputs of blocks, and outputs of products and attention.
ACTIVATION, PRODUCT = "activation", "product"
REMAT = ("none", "pointwise", "blocks")


def apply_remat(call, mode):
    """Returns `call` with a backward pass that keeps less of the forward pass, and computes the rest again.

    call: a function of arrays (in a loss: the whole model), or a class of modules (in the U-Net: one resolution)
    mode: "none"       keeps everything that the gradient needs
          "pointwise"  keeps outputs of convolutions, linear layers, attention and blocks. It computes norms, activation
                       functions and attention weights again.
          "blocks"     keeps the outputs of blocks only, for about 1.3 times the FLOPs
    """
    if mode == "none":
        return call
    names = (ACTIVATION,) if mode == "blocks" else (ACTIVATION, PRODUCT)
    transform = nn.remat if isinstance(call, type) else jax.checkpoint
    return transform(call, policy=jax.checkpoint_policies.save_only_these_names(*names))


def constrain_activation(x):
    """x [B, T, H, W, C] or [B, N, C], the output of a block, split over the mesh and named for `apply_remat`."""
    return checkpoint_name(constrain_clips(x), ACTIVATION)


# ------------------------------------------------------------------------------------------------------------- products


def dense(x, kernel, bias, dtype):
    """x [..., K] @ kernel [K, N] + bias [N]; bias may be None."""
    return checkpoint_name(ops.current().dense(x, kernel, bias, dtype), PRODUCT)


class Dense(nn.Module):
    """A linear layer from the last `axes` dimensions of x to `features`."""

    features: int | tuple[int, ...]  # size of the output, or one size for each of several dimensions
    axes: int = 1  # number of trailing dimensions of x that are inputs
    use_bias: bool = True
    zero: bool = False  # whether the kernel is zero at first, so that the layer adds nothing
    dtype: jnp.dtype = jnp.float32  # of the products

    @nn.compact
    def __call__(self, x):
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        inputs = x.shape[-self.axes :]
        outputs = math.prod(features)

        def init(key, shape):
            draw = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
            return draw(key, (math.prod(inputs), outputs)).reshape(shape)

        kernel = self.param("kernel", init, (*inputs, *features)).reshape(-1, outputs)
        bias = self.param("bias", nn.initializers.zeros, features).reshape(-1) if self.use_bias else None
        x = x.reshape(*x.shape[: -self.axes], -1)  # [..., K]
        return dense(x, kernel, bias, self.dtype).reshape(*x.shape[:-1], *features)


# ---------------------------------------------------------------------------------------------------- convolutions


def conv(x, kernel, bias, strides=None, time_padding="same", dtype=jnp.float32):
    """Convolves x [B, *space, C_in] with kernel [*window, C_in, C_out] and adds the bias [C_out].

    The number of space dimensions is free, and time is the first of them.

    strides: one for each space dimension; None is 1 everywhere
    time_padding: "same", as in all other dimensions, or "causal", with all padding before the first frame
    dtype: the type in which products are computed
    """
    window = kernel.shape[:-2]
    strides = tuple(strides or (1,) * len(window))
    padding = [((k - 1) // 2, k // 2) for k in window]
    if time_padding == "causal":
        padding[0] = (window[0] - 1, 0)
    return checkpoint_name(ops.current().conv(x, kernel, bias, strides, tuple(padding), dtype), PRODUCT)


class Conv(nn.Module):
    """A convolution over [B, *space, C], after nearest-neighbor upsampling where `upsample` is given."""

    features: int  # output channels
    window: tuple[int, ...]  # one size for each space dimension, time first
    strides: tuple[int, ...] | None = None  # one for each space dimension
    time_padding: str = "same"  # or "causal"
    upsample: tuple[int, ...] | None = None  # one factor for each space dimension
    zero: bool = False  # whether the kernel is zero at first, so that the layer adds nothing
    dtype: jnp.dtype = jnp.float32  # of the products

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (*self.window, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = upsample(x, self.upsample) if self.upsample else x
        x = conv(x, kernel, bias, self.strides, self.time_padding, self.dtype)
        # Strides make dimensions smaller, so that the mesh may split them over fewer devices.
        return constrain_activation(x) if self.strides else x


class FactorizedConv(nn.Module):
    """A 3-D convolution of a video, full (3x3x3) or factorized (1x3x3, then 3x1x1); of a sound, one of width 3."""

    features: int  # output channels
    factorized: bool = True
    time_padding: str = "same"  # or "causal"
    zero: bool = False  # whether the last kernel is zero at first, so that the layer adds nothing
    dtype: jnp.dtype = jnp.float32  # of the products

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(Conv, self.features, time_padding=self.time_padding, dtype=self.dtype)
        if x.ndim == 3:
            return conv(window=(3,), zero=self.zero, name="time")(x)
        if not self.factorized:
            return conv(window=(3, 3, 3), zero=self.zero, name="full")(x)
        x = conv(window=(1, 3, 3), name="space")(x)
        return conv(window=(3, 1, 1), zero=self.zero, name="time")(x)


def upsample(x, factors):
    """Nearest-neighbor upsampling of x [B, *space, C] by one factor for each space dimension."""
    return ops.current().upsample(x, tuple(factors))


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


# -------------------------------------------------------------------------------------------------------- normalization


def _identity(x):
    return x


class GroupNorm(nn.Module):
    """Group normalization (arXiv:1803.08494) of each frame on its own, then `activation`.

    A frame's statistics are over its space and the channels of a group. Frames are never mixed, so that a causal model
    stays causal, and frames at different noise levels do not disturb each other.

    x: [B, T, H, W, C] or [B, N, C]
    offset: [B, frames or 1, C], is added to x before the normalization (used by published/unet3d_condition.py only)
    film: (scale, shift), each [B, frames or 1, C]: y -> y * (1 + scale) + shift after the normalization
        (FiLM, arXiv:1709.07871)
    """

    groups: int = 8  # upper limit: the number of groups is its greatest common divisor with the channels
    frames: int = 0  # equal parts of the time axis, each with statistics of its own; 0 is one part for each time step
    eps: float = 1e-5  # is added to the variance
    activation: Callable = _identity  # a pointwise function
    dtype: jnp.dtype = jnp.float32  # of the result, on accelerators

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
            """The whole layer as y = x * a + b: a and b [B, frames, C], from the sums of x and x^2 of each channel."""
            total, squares = (checkpoint_name(sums, PRODUCT) for sums in (total, squares))  # small, so they are kept
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
        return ops.current().norm_act(coefficients, self.activation, self.dtype, x, parameters).reshape(shape)


class LayerNorm(nn.Module):
    """Layer normalization (arXiv:1607.06450) of the last dimension."""

    eps: float = 1e-6  # is added to the variance
    dtype: jnp.dtype = jnp.float32  # of the result, on accelerators

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
        y = (x - mean) * jax.lax.rsqrt(variance + self.eps)
        return ops.current().affine(y, scale, bias).astype(activation_dtype(self.dtype))


class RMSNorm(nn.Module):
    """Root mean square normalization (arXiv:1910.07467) of the last dimension; it bounds attention scores."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
        return ops.current().affine(x * jax.lax.rsqrt(mean_square + 1e-6), scale, None).astype(x.dtype)


# ------------------------------------------------------------------------------------------------------ embeddings


def fourier_features(x, features, max_period):
    """Sinusoidal features of x [...] -> [..., features], with periods from 2 pi to 2 pi * max_period.

    Source: arXiv:1706.03762, section 3.5.
    """
    half = features // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half) / half)
    angles = x[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def rotary(x, positions, max_period=100.0):
    """Rotary position embedding (RoPE, arXiv:2104.09864, eq. 34) of x [B, N, heads, d].

    positions: [N], in any unit; the periods go from 1 to max_period of that unit
    """
    half = x.shape[-1] // 2
    frequencies = 2 * math.pi * jnp.exp(-math.log(max_period) * jnp.arange(half) / half)
    angles = positions[:, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


# ------------------------------------------------------------------------------------------------------- attention


def attention(query, key, value, mask=None, bounded=False):
    """Softmax attention of query [B, N, heads, d] to key and value [B, M, heads, d].

    mask: bool [B, M], True = may be read
    bounded: whether queries and keys are normalized, so that no score is large
    """
    return checkpoint_name(ops.current().attention(query, key, value, mask, bounded), PRODUCT)


class Attention(nn.Module):
    """Multi-head attention with normalized queries and keys; the residual connection is left to the caller.

    x: [B, N, C]
    context: [B, M, D], what x attends to; None is x itself
    mask: bool [B, M], True = may be read
    positions, context_positions: [N] and [M], in seconds, rotate queries and keys; None rotates nothing
    """

    heads: int
    head_dim: int  # channels of a head
    zero: bool = True  # whether the output is zero at first
    dtype: jnp.dtype = jnp.float32  # of the products

    @nn.compact
    def __call__(self, x, context=None, mask=None, positions=None, context_positions=None):
        context = x if context is None else context
        context_positions = positions if context_positions is None else context_positions
        dense = functools.partial(Dense, (self.heads, self.head_dim), dtype=self.dtype)
        query, key, value = dense(name="query")(x), dense(name="key")(context), dense(name="value")(context)
        query, key = RMSNorm(name="query_norm")(query), RMSNorm(name="key_norm")(key)
        if positions is not None:
            query, key = rotary(query, positions), rotary(key, context_positions)
        out = attention(query, key, value, mask, bounded=True)
        out = Dense(x.shape[-1], axes=2, zero=self.zero, dtype=self.dtype, name="out")(out)
        return constrain_activation(out)


def transformer_layer(x, mask, heads, index, positions=None, zero=False, dtype=jnp.float32):
    """One layer of a pre-norm transformer over tokens x [B, L, C]; for use inside a compact module.

    mask: bool [B, L], True = may be read
    index: number of the layer; it is part of the parameters' names
    positions: [L], for rotary embeddings
    zero: whether the layer adds nothing at first
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
    """GroupNorm, SiLU, conv, GroupNorm with FiLM, SiLU, conv, plus the input (through a linear layer if sizes differ).

    x: [B, T, H, W, C] or [B, K*T, C]
    embedding: [B, T, E] or None. Each frame's vector gives the scale and shift (FiLM, arXiv:1709.07871) of that frame,
        or of the frame's K sound tokens.
    """

    features: int  # output channels
    factorized: bool = True  # see FactorizedConv
    time_padding: str = "same"  # or "causal"
    groups: int = 8  # see GroupNorm
    dtype: jnp.dtype = jnp.float32  # of the products

    @nn.compact
    def __call__(self, x, embedding=None):
        frames = embedding.shape[1] if embedding is not None else 0
        norm = functools.partial(GroupNorm, self.groups, frames, activation=nn.silu, dtype=self.dtype)
        conv = functools.partial(FactorizedConv, self.features, self.factorized, self.time_padding, dtype=self.dtype)
        h = conv(name="conv_in")(norm(name="norm_in")(x))
        film = None
        if embedding is not None:
            film = Dense(2 * self.features, zero=True, dtype=self.dtype, name="film")(embedding)
            film = jnp.split(film, 2, -1)  # scale and shift, [B, T, C] each
        h = conv(zero=True, name="conv_out")(norm(name="norm_out")(h, film=film))
        if x.shape[-1] != self.features:
            x = Dense(self.features, dtype=self.dtype, name="skip")(x)
        return constrain_activation(x + h)
