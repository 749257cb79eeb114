"""The autoencoder of Stable Diffusion (arXiv:2112.10752, section 3.1), with the parameters of diffusers' AutoencoderKL.

It is an autoencoder of images. Here it encodes and decodes each frame of a video on its own.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.errors import UserError
from vdm_jax.models import layers, ops

_ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": jax.nn.mish,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
}
_OLDER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = re.compile(rf"(.*\.attentions\.\d+\.)({'|'.join((*_OLDER_NAMES, *_OLDER_NAMES.values()))})\.(weight|bias)")


class ResnetBlock2D(layers.Layer):
    """Residual block of two 3x3 convolutions in each frame."""

    features: int  # output channels
    act_fn: str
    groups: int  # of GroupNorm

    @nn.compact
    def __call__(self, x):
        activation = _ACTIVATIONS[self.act_fn]
        norm = functools.partial(layers.GroupNorm, self.groups, eps=1e-6, activation=activation, dtype=self.dtype)
        conv = functools.partial(layers.Conv, self.features, dtype=self.dtype)
        h = conv((3, 3), name="conv1")(norm(name="norm1")(x))
        h = conv((3, 3), name="conv2")(norm(name="norm2")(h))
        if x.shape[-1] != self.features:
            x = conv((1, 1), name="conv_shortcut")(x)
        return layers.constrain_activation(x + h)


class Attention(layers.Layer):
    """Residual attention of the places of a frame to each other, with one head."""

    groups: int  # of GroupNorm

    @nn.compact
    def __call__(self, x):
        b, t, h, w, c = x.shape
        dense = functools.partial(layers.Dense, dtype=self.dtype)
        tokens = layers.GroupNorm(self.groups, eps=1e-6, dtype=self.dtype, name="group_norm")(x)
        tokens = tokens.reshape(b * t, h * w, c)
        query, key, value = (dense(c, name=name)(tokens)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        out = ops.current().attention(query, key, value, None)[:, :, 0]  # of the one head
        out = dense(c, name="to_out.0")(out)
        return layers.constrain_activation(x + out.reshape(x.shape))


class Half(layers.Layer):
    """The encoder, which goes down to lower resolutions, or the decoder, which goes up. [B, T, *space, C] -> the same.

    Tuples have one value for each resolution, in the order of the computation.
    """

    direction: str  # "down" or "up"
    features: int  # output channels
    channels: tuple[int, ...]
    attend: tuple[bool, ...]  # whether an Attention follows each residual block
    mid_attend: bool  # whether an Attention is between the two residual blocks at the lowest resolution
    number: int  # of residual blocks at each resolution
    act_fn: str
    groups: int  # of GroupNorm

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(layers.Conv, window=(3, 3), dtype=self.dtype)
        block = functools.partial(ResnetBlock2D, act_fn=self.act_fn, groups=self.groups, dtype=self.dtype)
        attention = functools.partial(Attention, self.groups, dtype=self.dtype)

        def middle(x):
            x = block(x.shape[-1], name="mid_block.resnets.0")(x)
            if self.mid_attend:
                x = attention(name="mid_block.attentions.0")(x)
            return block(x.shape[-1], name="mid_block.resnets.1")(x)

        x = conv(self.channels[0], name="conv_in")(x)
        if self.direction == "up":
            x = middle(x)
        for i, (channels, attend) in enumerate(zip(self.channels, self.attend)):
            name = f"{self.direction}_blocks.{i}"
            for j in range(self.number):
                x = block(channels, name=f"{name}.resnets.{j}")(x)
                if attend:
                    x = attention(name=f"{name}.attentions.{j}")(x)
            if i == len(self.channels) - 1:
                continue
            if self.direction == "up":
                x = conv(channels, name=f"{name}.upsamplers.0.conv")(layers.upsample(x, (1, 2, 2)))
            else:
                downsample = conv(
                    channels, strides=(2, 2), padding=((0, 1), (0, 1)), name=f"{name}.downsamplers.0.conv"
                )
                x = downsample(x)
        if self.direction == "down":
            x = middle(x)
        x = layers.GroupNorm(self.groups, eps=1e-6, activation=nn.silu, dtype=self.dtype, name="conv_norm_out")(x)
        return conv(self.features, name="conv_out")(x)


class AutoencoderKL(layers.Autoencoder):
    """Video [B, T, H, W, in_channels] in [-1, 1] <-> latents [B, T, H / f_s, W / f_s, latent_channels]."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)  # or "AttnDownEncoderBlock2D"; highest resolution first
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)  # or "AttnUpDecoderBlock2D"; lowest resolution first
    block_out_channels: tuple[int, ...] = (64,)  # of each resolution, the highest first
    layers_per_block: int = 1  # residual blocks at each resolution; the decoder has one more
    act_fn: str = "silu"  # of the residual blocks
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # see latent_statistics, also for the three below
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None  # one for each latent channel
    latents_std: tuple[float, ...] | None = None  # one for each latent channel
    use_quant_conv: bool = True  # whether the encoder ends with a convolution of one pixel
    use_post_quant_conv: bool = True  # whether the decoder starts with a convolution of one pixel
    mid_block_add_attention: bool = True

    f_t = 1  # frames of a latent frame

    @property
    def f_s(self):
        """Pixels of a latent, along the height and along the width."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def latent_statistics(self):
        """(mean, std), float32 [latent_channels] each. A denoiser sees (z - mean) / std."""
        ones = np.ones(self.latent_channels, np.float32)
        mean = (self.shift_factor or 0.0) if self.latents_mean is None else np.array(self.latents_mean, np.float32)
        std = 1.0 if self.latents_std is None else np.array(self.latents_std, np.float32)
        return mean * ones, std / self.scaling_factor * ones

    def setup(self):
        down = self._attend("down_block_types", "DownEncoderBlock2D")
        up = self._attend("up_block_types", "UpDecoderBlock2D")
        if self.act_fn not in _ACTIVATIONS:
            raise UserError(f"AutoencoderKL has no act_fn {self.act_fn!r}: give one of {', '.join(_ACTIVATIONS)}")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise UserError(
                f"AutoencoderKL: block_out_channels {self.block_out_channels} do not divide into norm_num_groups "
                f"{self.norm_num_groups}: give multiples of it"
            )
        half = functools.partial(
            Half,
            mid_attend=self.mid_block_add_attention,
            act_fn=self.act_fn,
            groups=self.norm_num_groups,
            dtype=self.dtype,
        )
        channels, number, latents = self.block_out_channels, self.layers_per_block, self.latent_channels
        self.encoder = half("down", 2 * latents, channels, down, number=number)
        self.decoder = half("up", self.out_channels, channels[::-1], up, number=number + 1)
        if self.use_quant_conv:
            self.quant_conv = layers.Conv(2 * latents, (1, 1), dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = layers.Conv(latents, (1, 1), dtype=self.dtype)

    def _attend(self, key, plain):
        """Returns whether the blocks of each resolution attend, by their types. plain: the type of those that do not"""
        types, number = getattr(self, key), len(self.block_out_channels)
        if len(types) != number or not {*types} <= {plain, f"Attn{plain}"}:
            raise UserError(f"AutoencoderKL: {key} is {types}: give {number} of {plain} or Attn{plain}")
        return tuple(kind != plain for kind in types)

    def encode(self, video):
        """Video [B, T, H, W, in_channels] in [-1, 1] -> (mean, log variance), each [B, T, h, w, channels] float32.

        Raises UserError for a height or width that is no multiple of f_s.
        """
        f = self.f_s
        h, w = video.shape[2:4]
        if h % f or w % f:
            raise UserError(
                f"AutoencoderKL encodes frames whose height and width are multiples of {f}, not {h} x {w}: "
                f"scale or pad them to {-(-h // f) * f} x {-(-w // f) * f}"
            )
        x = self.encoder(video)
        x = self.quant_conv(x) if self.use_quant_conv else x
        mean, log_variance = jnp.split(x.astype(jnp.float32), 2, -1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, z):
        """Latents [B, T, h, w, latent_channels] -> video [B, T, H, W, out_channels] float32, about [-1, 1]."""
        z = self.post_quant_conv(z) if self.use_post_quant_conv else z
        return self.decoder(z).astype(jnp.float32)

    def example(self):
        return jnp.zeros((1, 1, self.f_s, self.f_s, self.in_channels)), jax.random.key(0)

    def from_older(self, tensors):
        """Returns the tensors under today's names. Older attention has other names, or kernels [C, C, 1, 1]."""
        return dict(_today(name, tensor) for name, tensor in tensors.items())


def _today(name, tensor):
    attention = _ATTENTION.fullmatch(name)
    if not attention:
        return name, tensor
    parts, layer, kind = attention.groups()
    is_conv = len(tensor.shape) == 4 and tuple(tensor.shape[2:]) == (1, 1)
    return f"{parts}{_OLDER_NAMES.get(layer, layer)}.{kind}", tensor[:][:, :, 0, 0] if is_conv else tensor
