"""The layers that all models share: convolutions, normalization, embeddings, attention, residual blocks.

Arrays are channels last. A video is [B, T, H, W, C]; a sound is [B, N, C]. `zero` tells whether the last kernel of a
layer is zero at first, so that the layer adds nothing. `ops.current()` picks the implementations for the device.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vdm_jax.models import ops
from vdm_jax.sharding import constrain

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
    """x, the output of a block, split over the mesh and named for `apply_remat`."""
    return checkpoint_name(constrain(x), ACTIVATION)


class Layer(nn.Module, kw_only=True):
    """A module whose products are computed in `dtype`."""

    dtype: jnp.dtype = jnp.float32
    use_bias: bool = True  # False leaves out biases, and scales and biases of norms before a product or before FiLM

    @property
    def common(self):
        """The settings that a layer passes on to the layers inside it."""
        return dict(dtype=self.dtype, use_bias=self.use_bias)

    @property
    def activation_dtype(self):
        """See ops.activation_dtype."""
        return ops.activation_dtype(self.dtype)


class Dense(Layer):
    """A linear layer from the last `axes` dimensions of x to `features`."""

    features: int | tuple[int, ...]  # size of the output, or one size for each of several dimensions
    axes: int = 1  # number of trailing dimensions of x that are inputs
    zero: bool = False

    @nn.compact
    def __call__(self, x):
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        shape = (*x.shape[-self.axes :], *features)
        draw = nn.initializers.lecun_normal(range(self.axes), range(self.axes, len(shape)))
        kernel = self.param("kernel", nn.initializers.zeros if self.zero else draw, shape)
        kernel = kernel.reshape(-1, math.prod(features))  # [K, N]
        bias = self.param("bias", nn.initializers.zeros, features).reshape(-1) if self.use_bias else None
        x = x.reshape(*x.shape[: -self.axes], -1)  # [..., K]
        out = checkpoint_name(ops.current().dense(x, kernel, bias, self.dtype), PRODUCT)
        return out.reshape(*x.shape[:-1], *features)


class Conv(Layer):
    """A convolution over [B, *space, C]; time is the first space dimension."""

    features: int  # output channels
    window: tuple[int, ...]  # one size for each space dimension; (3, 3) for a video is 3 x 3 in each frame
    strides: tuple[int, ...] | None = None  # one for each size of the window; None is 1 everywhere
    time_padding: str = "same"  # as in all other dimensions, or "causal": the window ends at the current frame
    padding: tuple[tuple[int, int], ...] | None = None  # (before, after) for each size of the window; None keeps sizes
    zero: bool = False

    def is_first_chunk(self):
        """Whether x begins a clip; see `CausalAutoencoder.stream`."""
        return not self.has_variable("cache", "past")

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (*self.window, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        frames = (1,) * (x.ndim - kernel.ndim)  # 1 for each space dimension that the window leaves out
        kernel = kernel.reshape(*frames, *kernel.shape)
        strides = frames + tuple(self.strides or (1,) * len(self.window))
        padding = [(0, 0) for _ in frames] + list(self.padding or [((k - 1) // 2, k // 2) for k in self.window])
        if self.time_padding == "causal":
            before = kernel.shape[0] - 1  # frames of zeros before the first frame of a clip
            padding[0] = (before, 0)
            if before and self.is_mutable_collection("cache") and not self.is_initializing():
                padding[0] = (0, 0)
                x = self._after_past(x, before, before + 1 - strides[0])
        x = checkpoint_name(ops.current().conv(x, kernel, bias, strides, tuple(padding), self.dtype), PRODUCT)
        # Strides make dimensions smaller, so that the mesh may split them over fewer devices.
        return constrain_activation(x) if self.strides else x

    def _after_past(self, x, before, kept):
        """The frames before this chunk, and x. The cache keeps the last `kept` frames for the next chunk.

        before: frames of zeros before the first chunk
        """
        first = self.is_first_chunk()
        past = jnp.zeros((x.shape[0], before, *x.shape[2:]), x.dtype) if first else self.get_variable("cache", "past")
        x = jnp.concatenate([past, x], 1)
        self.put_variable("cache", "past", x[:, x.shape[1] - kept :])
        return x


class FactorizedConv(Layer):
    """A 3-D convolution of a video, full (3x3x3) or factorized (1x3x3, then 3x1x1); of a sound, one of width 3."""

    features: int  # output channels
    factorized: bool = True
    time_padding: str = "same"  # see Conv
    zero: bool = False

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(Conv, self.features, time_padding=self.time_padding, **self.common)
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
    b, t, h, w, _ = x.shape
    x = x.reshape(b, t, h, w, time, patch, patch, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(b, t * time, h * patch, w * patch, -1)


class GroupNorm(Layer):
    """Group normalization (arXiv:1803.08494) of each frame on its own, then `activation`.

    A frame's statistics are over its space and the channels of a group. Frames are never mixed, so that a causal model
    stays causal, and frames at different noise levels do not disturb each other.

    x: [B, T, H, W, C] or [B, N, C]
    offset: [B, frames or 1, C], is added to x before the normalization (used by published/unet3d_condition.py only)
    film: (scale, shift), each [B, frames or 1, C]; y -> y * (1 + scale) + shift afterwards (FiLM, arXiv:1709.07871)
    """

    groups: int = 8  # upper limit: the number of groups is its greatest common divisor with the channels
    frames: int = 0  # equal parts of the time axis, each with statistics of its own; 0 is one part for each time step
    eps: float = 1e-5  # is added to the variance
    activation: Callable = lambda x: x  # a pointwise function

    @nn.compact
    def __call__(self, x, offset=None, film=None):
        shape, channels = x.shape, x.shape[-1]
        scale, bias = 1.0, 0.0
        if self.use_bias or film is None:
            scale = self.param("scale", nn.initializers.ones, (channels,))
            bias = self.param("bias", nn.initializers.zeros, (channels,))
        groups = math.gcd(self.groups, channels)
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

        parameters = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), (scale, bias, offset, film))
        return ops.current().norm_act(coefficients, self.activation, self.dtype, x, parameters).reshape(shape)


class Snake(Layer):
    """x + sin^2(a x) / a with a factor a for each channel, 1 at first (arXiv:2006.08195, eq. 3)."""

    @nn.compact
    def __call__(self, x):
        a = jnp.exp(self.param("log_factor", nn.initializers.zeros, x.shape[-1:]))
        x = x.astype(jnp.float32)
        return (x + jnp.square(jnp.sin(a * x)) / a).astype(self.activation_dtype)


class LayerNorm(Layer):
    """Layer normalization (arXiv:1607.06450) of the last dimension."""

    eps: float = 1e-6  # is added to the variance

    @nn.compact
    def __call__(self, x):
        x = x.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        variance = jnp.maximum(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
        y = (x - mean) * jax.lax.rsqrt(variance + self.eps)
        if self.use_bias:
            scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
            y = ops.current().affine(y, scale, bias)
        return y.astype(self.activation_dtype)


class RMSNorm(nn.Module):
    """Root mean square normalization (arXiv:1910.07467) of the last dimension; it bounds attention scores."""

    eps: float = 1e-6  # is added to the mean square

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
        return ops.current().affine(x * jax.lax.rsqrt(mean_square + self.eps), scale, None).astype(x.dtype)


def fourier_features(x, features, max_period):
    """Sinusoidal features (arXiv:1706.03762, section 3.5) of x [...] -> [..., features].

    max_period: the periods go from 2 pi to 2 pi * max_period
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


class Attention(Layer):
    """Multi-head attention, zero at first; the residual connection is left to the caller.

    x: [B, N, C]
    context: [B, M, D], what x attends to; None is x itself
    mask: bool [B, M], True = may be read
    positions, context_positions: [N] and [M], rotate queries and keys; None rotates nothing
    """

    head_dim: int  # channels of a head
    heads: int = 0  # 0: as many as have room in the channels of x, but at least one

    @nn.compact
    def __call__(self, x, context=None, mask=None, positions=None, context_positions=None):
        context = x if context is None else context
        context_positions = positions if context_positions is None else context_positions
        heads = self.heads or max(1, x.shape[-1] // self.head_dim)
        dense = functools.partial(Dense, (heads, self.head_dim), **self.common)
        query, key, value = dense(name="query")(x), dense(name="key")(context), dense(name="value")(context)
        query, key = RMSNorm(name="query_norm")(query), RMSNorm(name="key_norm")(key)
        if positions is not None:
            query, key = rotary(query, positions), rotary(key, context_positions)
        out = checkpoint_name(ops.current().attention(query, key, value, mask, True), PRODUCT)
        return constrain_activation(Dense(x.shape[-1], axes=2, zero=True, **self.common, name="out")(out))


def transformer_layer(x, mask, heads, index, positions=None, zero=False, **common):
    """One layer of a pre-norm transformer over tokens x [B, L, C]; for use inside a compact module.

    index: number of the layer; it is part of the parameters' names
    positions: [L], for rotary embeddings
    zero: whether the layer changes nothing at first
    common: see Layer.common
    """
    channels = x.shape[-1]
    head_dim = channels // heads
    if positions is not None:
        head_dim += head_dim % 2  # rotary embeddings turn pairs of channels
    attention = Attention(head_dim, heads, **common, name=f"attention_{index}")
    h = LayerNorm(**common, name=f"norm_attention_{index}")(x)
    x = x + attention(h, mask=mask, positions=positions)
    h = LayerNorm(**common, name=f"norm_mlp_{index}")(x)
    h = nn.gelu(Dense(4 * channels, **common, name=f"expand_{index}")(h))
    return x + Dense(channels, zero=zero, **common, name=f"contract_{index}")(h)


class ResidualBlock(Layer):
    """GroupNorm, SiLU, conv, GroupNorm with FiLM, SiLU, conv, plus the input (through a linear layer if sizes differ).

    x: [B, T, H, W, C] or [B, K*T, C]
    embedding: [B, T, E] or None; gives scale and shift (FiLM) of each frame, or of a frame's K sound tokens
    """

    features: int  # output channels
    factorized: bool = True  # see FactorizedConv
    time_padding: str = "same"  # see Conv
    groups: int = 8  # see GroupNorm

    @nn.compact
    def __call__(self, x, embedding=None):
        frames = embedding.shape[1] if embedding is not None else 0
        norm = functools.partial(GroupNorm, self.groups, frames, activation=nn.silu, **self.common)
        conv = functools.partial(FactorizedConv, self.features, self.factorized, self.time_padding, **self.common)
        h = conv(name="conv_in")(norm(name="norm_in")(x))
        film = None
        if embedding is not None:
            film = Dense(2 * self.features, zero=True, dtype=self.dtype, name="film")(embedding)
            film = jnp.split(film, 2, -1)  # scale and shift, [B, T, C] each
        h = conv(zero=True, name="conv_out")(norm(name="norm_out")(h, film=film))
        if x.shape[-1] != self.features:
            x = Dense(self.features, **self.common, name="skip")(x)
        return constrain_activation(x + h)


class Autoencoder(Layer):
    """What both variational autoencoders (arXiv:1312.6114) share. They have the methods `encode` and `decode`."""

    def __call__(self, x, key):
        """-> (reconstruction, mean, log variance); `key` draws the latent."""
        mean, log_variance = self.encode(x)
        noise = jax.random.normal(key, (mean.shape[0], mean[0].size)).reshape(mean.shape)  # flat: compiles faster
        return self.decode(mean + jnp.exp(0.5 * log_variance) * noise), mean, log_variance

    def split_latent(self, x):
        """[..., 2 C] -> (mean, log variance), float32. The log variance starts at -8: training has almost no noise."""
        mean, log_variance = jnp.split(x.astype(jnp.float32), 2, -1)
        return mean, jnp.clip(log_variance + -8.0, -20.0, 10.0)


class CausalAutoencoder(Autoencoder):
    """An autoencoder whose time is causal, so that it can process a clip of any length chunk by chunk.

    Each causal convolution keeps the last frames of its input in Flax's collection `cache`, for the next chunk.
    """

    @nn.nowrap
    def stream(self, params, method, x, cache=None):
        """One chunk of a clip -> (what the method returns for it, cache for the next chunk).

        The outputs of the chunks, one after the other, are the output for the whole clip. The cache is a tree of arrays
        whose shapes stay the same, so that `jax.lax.scan` can carry it from chunk to chunk.

        method: "encode" or "decode"
        x: the argument of the method. To encode a video, the first chunk has 1 + f_t*n frames, and a later one f_t*n.
        cache: None for the first chunk
        """
        variables = {"params": params} if cache is None else {"params": params, "cache": cache}
        out, state = self.apply(variables, x, method=method, mutable="cache")
        return out, state["cache"]
