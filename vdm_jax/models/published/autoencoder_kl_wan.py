"""The video autoencoder of Wan 2.1 and 2.2 (arXiv:2503.20314), with the parameters of diffusers' AutoencoderKLWan.

Time is causal. The first latent frame holds frame 0 alone, and each later one holds f_t = 4 frames. `encode` and
`decode` process a clip at once. `AutoencoderKLWan.in_chunks` and `stream` process one part after the other and give the
same values. A long clip needs them, because their memory does not grow with its length.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.errors import UserError
from vdm_jax.models import layers, ops


def causal_conv(features, window=(3, 3, 3), **settings):
    """A layers.Conv which keeps height and width, and whose window ends at the current frame."""
    return layers.Conv(features, window, time_padding="causal", **settings)


class Norm(layers.Layer):
    """Root mean square normalization (arXiv:1910.07467) of the last dimension of x, then `activation`."""

    dims: int = 4  # dimensions of the original's parameter [C, 1, ...]
    activation: Callable = lambda x: x  # a pointwise function

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        gamma = self.param("gamma", nn.initializers.ones, (channels,) + (1,) * (self.dims - 1)).reshape(-1)
        x = x.astype(jnp.float32)
        squares = jnp.square(x).sum(-1, keepdims=True)
        y = x * (math.sqrt(channels) * jax.lax.rsqrt(jnp.maximum(squares, 1e-24)))
        return self.activation(ops.current().affine(y, gamma, None)).astype(self.activation_dtype)


class ResidualBlock(layers.Layer):
    """Norm, SiLU, convolution, twice, plus the input (through a convolution of one place if sizes differ)."""

    features: int  # output channels

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(Norm, activation=nn.silu, dtype=self.dtype)
        conv = functools.partial(causal_conv, self.features, dtype=self.dtype)
        h = conv(name="conv1")(norm(name="norm1")(x))
        h = conv(name="conv2")(norm(name="norm2")(h))
        if x.shape[-1] != self.features:
            x = layers.Conv(self.features, (1, 1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return layers.constrain_activation(x + h)


class AttentionBlock(layers.Layer):
    """Self-attention with one head over the places of each frame, residual."""

    @nn.compact
    def __call__(self, x):
        b, t, h, w, c = x.shape
        conv = functools.partial(layers.Conv, window=(1, 1), dtype=self.dtype)
        qkv = conv(3 * c, name="to_qkv")(Norm(dims=3, dtype=self.dtype, name="norm")(x))
        qkv = qkv.reshape(b * t, h * w, 1, 3 * c)  # [B*T, places, heads, ...]
        out = ops.current().attention(*jnp.split(qkv, 3, -1), None)
        return layers.constrain_activation(x + conv(c, name="proj")(out.reshape(x.shape)))


class MidBlock(layers.Layer):
    """Residual block, attention, residual block."""

    @nn.compact
    def __call__(self, x):
        x = ResidualBlock(x.shape[-1], dtype=self.dtype, name="resnets.0")(x)
        x = AttentionBlock(dtype=self.dtype, name="attentions.0")(x)
        return ResidualBlock(x.shape[-1], dtype=self.dtype, name="resnets.1")(x)


class Downsample(layers.Layer):
    """Halves height and width, and with `time` the frames of a clip but the first one."""

    time: bool

    @nn.compact
    def __call__(self, x):
        channels, padding = x.shape[-1], ((0, 1), (0, 1))
        x = layers.Conv(channels, (3, 3), (2, 2), padding=padding, dtype=self.dtype, name="resample.1")(x)
        if not self.time:
            return x
        conv = causal_conv(channels, (3, 1, 1), strides=(2, 1, 1), dtype=self.dtype, name="time_conv")
        is_first = conv.is_first_chunk()
        halved = conv(x)
        return jnp.concatenate([x[:, :1], halved[:, 1:]], 1) if is_first else halved


class Upsample(layers.Layer):
    """Doubles height and width, and with `time` the frames of a clip but the first one."""

    features: int  # output channels
    time: bool

    @nn.compact
    def __call__(self, x):
        if self.time:
            conv = causal_conv(2 * x.shape[-1], (3, 1, 1), dtype=self.dtype, name="time_conv")
            if conv.is_first_chunk():  # the convolution never sees the first frame
                first, x = x[:, :1], jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, 1:]], 1)
                x = jnp.concatenate([first, layers.depth_to_space(conv(x), 1, time=2)[:, 2:]], 1)
            else:
                x = layers.depth_to_space(conv(x), 1, time=2)
        return layers.Conv(self.features, (3, 3), dtype=self.dtype, name="resample.1")(layers.upsample(x, (1, 2, 2)))


def average_down(x, features, time, space):
    """[B, T, H, W, C] -> [B, T/time, H/space, W/space, features]: means of neighbors."""
    # An odd number of frames starts with the first frame of a clip: there is a frame of zeros before it.
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    b, t, h, w, c = x.shape
    x = x.reshape(b, t // time, time, h // space, space, w // space, space, c)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)  # [B, T/time, H/space, W/space, C, time, space, space]
    return x.reshape(*x.shape[:4], features, -1).mean(-1)


def duplicate_up(x, features, time):
    """[B, T, H, W, C] -> [B, time*T, 2*H, 2*W, features]: each value is repeated."""
    b, t, h, w, c = x.shape
    x = jnp.repeat(x, 4 * time * features // c, -1).reshape(b, t, h, w, features, time, 2, 2)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)  # [B, T, time, H, 2, W, 2, features]
    return x.reshape(b, time * t, 2 * h, 2 * w, features)


class DownBlock(layers.Layer):
    """Residual blocks and a Downsample, with a path around them all. Wan 2.2 has it."""

    features: int  # output channels
    blocks: int
    down: bool  # whether there is a Downsample
    time: bool  # see Downsample

    @nn.compact
    def __call__(self, x):
        around = average_down(x, self.features, 1 + self.time, 1 + self.down)
        for i in range(self.blocks):
            x = ResidualBlock(self.features, dtype=self.dtype, name=f"resnets.{i}")(x)
        if self.down:
            x = Downsample(self.time, dtype=self.dtype, name="downsampler")(x)
        return x + around


class UpBlock(layers.Layer):
    """Residual blocks and an Upsample. With `residual`, as in Wan 2.2, there is a path around them all."""

    features: int  # channels of the residual blocks
    blocks: int
    up: bool  # whether there is an Upsample
    time: bool  # see Upsample
    residual: bool

    @nn.compact
    def __call__(self, x):
        start = x
        for i in range(self.blocks):
            x = ResidualBlock(self.features, dtype=self.dtype, name=f"resnets.{i}")(x)
        if not self.up:
            return x
        if not self.residual:
            return Upsample(self.features // 2, self.time, dtype=self.dtype, name="upsamplers.0")(x)
        x = Upsample(self.features, self.time, dtype=self.dtype, name="upsampler")(x)
        around = duplicate_up(start, self.features, 1 + self.time)
        return x + around[:, around.shape[1] - x.shape[1] :]  # the first frame of a clip stays one frame


class Encoder(layers.Layer):
    """Patches [B, F, H, W, in_channels] -> [B, T, h, w, features]."""

    features: int  # output channels
    channels: tuple[int, ...]  # at each resolution, the highest first
    blocks: int
    time: tuple[bool, ...]  # whether time halves after a resolution, but the last
    residual: bool  # see AutoencoderKLWan.is_residual

    @nn.compact
    def __call__(self, x):
        x = causal_conv(self.channels[0], dtype=self.dtype, name="conv_in")(x)
        last, parts = len(self.channels) - 1, []
        for i, features in enumerate(self.channels):
            time = i < last and self.time[i]
            if self.residual:
                parts.append(functools.partial(DownBlock, features, self.blocks, i < last, time))
                continue
            parts += [functools.partial(ResidualBlock, features)] * self.blocks
            parts += [functools.partial(Downsample, time)] * (i < last)
        for i, part in enumerate(parts):
            x = part(dtype=self.dtype, name=f"down_blocks.{i}")(x)
        x = MidBlock(dtype=self.dtype, name="mid_block")(x)
        x = Norm(activation=nn.silu, dtype=self.dtype, name="norm_out")(x)
        return causal_conv(self.features, dtype=self.dtype, name="conv_out")(x)


class Decoder(layers.Layer):
    """[B, T, h, w, z_dim] -> patches [B, F, H, W, features]."""

    features: int  # output channels
    channels: tuple[int, ...]  # at each resolution, the lowest first
    blocks: int
    time: tuple[bool, ...]  # whether time doubles after a resolution, but the last
    residual: bool  # see AutoencoderKLWan.is_residual

    @nn.compact
    def __call__(self, x):
        x = causal_conv(self.channels[0], dtype=self.dtype, name="conv_in")(x)
        x = MidBlock(dtype=self.dtype, name="mid_block")(x)
        last = len(self.channels) - 1
        for i, features in enumerate(self.channels):
            block = functools.partial(UpBlock, features, self.blocks + 1, i < last, i < last and self.time[i])
            x = block(self.residual, dtype=self.dtype, name=f"up_blocks.{i}")(x)
        x = Norm(activation=nn.silu, dtype=self.dtype, name="norm_out")(x)
        return causal_conv(self.features, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKLWan(layers.CausalAutoencoder):
    """Video [B, 1 + f_t*n, H, W, 3] in [-1, 1] <-> latents [B, 1 + n, H/f_s, W/f_s, z_dim].

    f_t = 4 and f_s = 8 with the default settings, which are those of Wan 2.1. Denoisers see the latents normalized, as
    (z - mean) / std with `latent_statistics`.
    """

    base_dim: int = 96  # channels of the encoder at the highest resolution
    decoder_base_dim: int | None = None  # the same of the decoder; None is base_dim
    z_dim: int = 16  # channels of the latents
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)  # factors of the channels at each resolution, the highest first
    num_res_blocks: int = 2  # residual blocks at each resolution of the encoder; the decoder has one more
    attn_scales: tuple[float, ...] = ()  # diffusers cannot run any other value
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # whether time halves after a resolution, but the last
    # Mean and standard deviation of each channel of the latents
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )
    is_residual: bool = False  # whether a path without parameters leads around the blocks of a resolution (Wan 2.2)
    in_channels: int = 3  # channels of the encoder's input: 3 * patch_size^2
    out_channels: int = 3  # channels of the decoder's output: 3 * patch_size^2
    patch_size: int | None = None  # patch_size x patch_size pixels become the channels of one place; None is 1

    def setup(self):
        if self.attn_scales:
            raise UserError(f"attn_scales={self.attn_scales} is not supported: give weights whose attn_scales is empty")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise UserError(
                f"temperal_downsample has {len(self.temperal_downsample)} values, but dim_mult has "
                f"{len(self.dim_mult)}: give temperal_downsample one value fewer than dim_mult"
            )
        common = dict(blocks=self.num_res_blocks, residual=self.is_residual, dtype=self.dtype)
        channels = [self.base_dim * factor for factor in self.dim_mult]
        self.encoder = Encoder(2 * self.z_dim, channels, time=self.temperal_downsample, **common)
        self.quant_conv = layers.Conv(2 * self.z_dim, (1, 1, 1), dtype=self.dtype)
        self.post_quant_conv = layers.Conv(self.z_dim, (1, 1, 1), dtype=self.dtype)
        channels = [(self.decoder_base_dim or self.base_dim) * factor for factor in self.dim_mult[::-1]]
        self.decoder = Decoder(self.out_channels, channels, time=self.temperal_downsample[::-1], **common)

    @property
    def factors(self):
        """(f_t, f_s): the factors by which `encode` makes time, and height and width, smaller."""
        return 2 ** sum(self.temperal_downsample), 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)

    @property
    def f_t(self):
        """Frames of a latent frame."""
        return self.factors[0]

    @property
    def f_s(self):
        """Pixels of a latent, along the height and along the width."""
        return self.factors[1]

    @property
    def latent_channels(self):
        return self.z_dim

    @property
    def latent_statistics(self):
        """(mean, std) of the latents that the model was trained to give, each float32 [z_dim]. Raises UserError."""
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise UserError(f"{name} has {len(getattr(self, name))} values, but z_dim is {self.z_dim}: give {name}")
        return np.array(self.latents_mean, np.float32), np.array(self.latents_std, np.float32)

    @nn.nowrap
    def example(self):
        channels = self.in_channels // (self.patch_size or 1) ** 2
        return jnp.zeros((1, 1, self.factors[1], self.factors[1], channels)), jax.random.key(0)

    def encode(self, video):
        """Video [B, F, H, W, 3] in [-1, 1] -> (mean, log variance), each [B, T, h, w, z_dim] float32.

        Raises UserError where F is not 1 + f_t*n, or H or W is not a multiple of f_s.
        """
        self._check_size(video, "encoder" not in self.variables.get("cache", {}))
        x = self.quant_conv(self.encoder(_to_patches(video, self.patch_size or 1)))
        mean, log_variance = jnp.split(x.astype(jnp.float32), 2, -1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, z):
        """Latents [B, T, h, w, z_dim] -> video [B, F, H, W, 3] float32 in [-1, 1]."""
        x = self.decoder(self.post_quant_conv(z)).astype(jnp.float32)
        return jnp.clip(_from_patches(x, self.patch_size or 1), -1.0, 1.0)

    @nn.nowrap
    def in_chunks(self, params, method, x):
        """What the method returns for a whole clip, computed by `stream` for one latent frame after the other.

        The memory for it does not grow with the length of the clip. See `stream` for the arguments.
        """
        frames = 1
        if method == "encode":
            self._check_size(x, is_first=True)
            frames = self.factors[0]
        first, cache = self.stream(params, method, x[:, :1])
        chunks = x[:, 1:].reshape(len(x), -1, frames, *x.shape[2:]).swapaxes(0, 1)  # [n, B, frames, ...]
        _, rest = jax.lax.scan(lambda cache, chunk: self.stream(params, method, chunk, cache)[::-1], cache, chunks)

        def join(first, rest):
            rest = rest.swapaxes(0, 1)  # [B, n, frames, ...]
            return jnp.concatenate([first, rest.reshape(len(x), -1, *first.shape[2:])], 1)

        return jax.tree.map(join, first, rest)

    @nn.nowrap
    def _check_size(self, video, is_first):
        frames, height, width = video.shape[1:4]
        f_t, f_s = self.factors
        first = int(is_first)  # frames that do not count
        if (frames - first) % f_t or frames < 1:
            below = max((frames - first) // f_t * f_t, 0 if first else f_t) + first
            what = f"1 + {f_t}*n" if first else f"{f_t}*n"
            raise UserError(f"{frames} frames do not fit: give {what} frames, such as {below} or {below + f_t}")
        if height % f_s or width % f_s:
            fit_height, fit_width = (max(1, size // f_s) * f_s for size in (height, width))
            raise UserError(
                f"frames of {height} x {width} do not fit: give multiples of {f_s}, such as {fit_height} x {fit_width}"
            )


def _to_patches(x, p):
    """[B, T, H, W, C] -> [B, T, H/p, W/p, C*p*p]; in a patch, width comes before height."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h // p, p, w // p, p, c).transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(b, t, h // p, w // p, c * p * p)


def _from_patches(x, p):
    """[B, T, h, w, C*p*p] -> [B, T, h*p, w*p, C]"""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h, w, c // p**2, p, p).transpose(0, 1, 2, 6, 3, 5, 4)  # [B, T, h, p, w, p, C]
    return x.reshape(b, t, h * p, w * p, c // p**2)
