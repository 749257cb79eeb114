"""The autoencoder of Stable Audio Open (arXiv:2407.14358), with the parameters of diffusers' AutoencoderOobleck."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.errors import UserError
from vdm_jax.models import layers, ops

_WEIGHT_NORM = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


class Snake1d(layers.Layer):
    """x + sin^2(alpha x) / beta for each channel (arXiv:2006.08195, eq. 3). Parameters are logarithms, 0 at first."""

    @nn.compact
    def __call__(self, x):
        shape = (1, x.shape[-1], 1)
        alpha, beta = (jnp.exp(self.param(name, nn.initializers.zeros, shape))[:, :, 0] for name in ("alpha", "beta"))
        x = x.astype(jnp.float32)
        return (x + jnp.square(jnp.sin(alpha * x)) / (beta + 1e-9)).astype(self.activation_dtype)


class Conv1d(layers.Layer):
    """A convolution [B, N, C] -> [B, N / stride, features] with weight normalization (arXiv:1602.07868, eq. 2)."""

    features: int  # output channels
    window: int
    stride: int = 1
    dilation: int = 1  # distance of the taps

    @nn.compact
    def __call__(self, x):
        g = self.param("weight_g", nn.initializers.ones, (self.features, 1, 1))
        v = self.param("weight_v", nn.initializers.lecun_normal(), (self.window, x.shape[-1], self.features))
        padding = (self.window - self.stride) * self.dilation // 2
        # On a CPU these products are float32: XLA's bfloat16 convolutions are slow there.
        x, kernel = x.astype(self.activation_dtype), v.astype(self.activation_dtype)
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride,),
            [(padding, padding)],
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        # The weight is g v / |v|, with a norm for each output. A factor for the outputs takes less time.
        x = x * (g[:, 0, 0] * inverse_norm(v)).astype(x.dtype)
        return x + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype) if self.use_bias else x


class ConvTranspose1d(layers.Layer):
    """A transposed convolution [B, M, C] -> [B, M * stride, features] with weight normalization.

    The window is 2 * stride, and the stride is even.
    """

    features: int  # output channels
    stride: int

    @nn.compact
    def __call__(self, x):
        b, m, c = x.shape
        s = self.stride
        g = self.param("weight_g", nn.initializers.ones, (c, 1, 1))
        v = self.param("weight_v", nn.initializers.lecun_normal(2, 1), (2 * s, self.features, c))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = x * (g[:, 0, 0] * inverse_norm(v)).astype(x.dtype)  # here each input has its norm
        x = ops.current().dense(x, v.reshape(-1, c).T, None, self.dtype)  # [B, M, 2 s * features]
        # Half of an input's window lies in its own hop, and half in the next.
        own, next_hop = jnp.split(x.reshape(b, m, 2 * s, self.features), 2, 2)  # [B, M, s, features] each
        x = jnp.pad(own, ((0, 0), (0, 1), (0, 0), (0, 0))) + jnp.pad(next_hop, ((0, 0), (1, 0), (0, 0), (0, 0)))
        x = x.reshape(b, -1, self.features)[:, s // 2 : -(s // 2)]
        return x + bias.astype(x.dtype)


def inverse_norm(v):
    """1 / |v| for each index of the last dimension. It is finite for zeros, which a folded weight may have."""
    return jax.lax.rsqrt(jnp.maximum(jnp.square(v).sum((0, 1)), 1e-30))


class OobleckResidualUnit(layers.Layer):
    """Residual block of a dilated convolution and one of width 1."""

    dilation: int

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(Conv1d, x.shape[-1], dtype=self.dtype)
        h = Snake1d(dtype=self.dtype, name="snake1")(x)
        h = conv(7, dilation=self.dilation, name="conv1")(h)
        h = Snake1d(dtype=self.dtype, name="snake2")(h)
        return layers.constrain_activation(x + conv(1, name="conv2")(h))


def residual_units(x, dtype):
    """Three residual units; for use inside a compact module."""
    for i, dilation in enumerate((1, 3, 9), 1):
        x = OobleckResidualUnit(dilation, dtype=dtype, name=f"res_unit{i}")(x)
    return x


class OobleckEncoderBlock(layers.Layer):
    """Three residual units, then a strided convolution."""

    features: int  # output channels
    stride: int

    @nn.compact
    def __call__(self, x):
        x = Snake1d(dtype=self.dtype, name="snake1")(residual_units(x, self.dtype))
        return Conv1d(self.features, 2 * self.stride, self.stride, dtype=self.dtype, name="conv1")(x)


class OobleckDecoderBlock(layers.Layer):
    """A transposed convolution, then three residual units."""

    features: int  # output channels
    stride: int

    @nn.compact
    def __call__(self, x):
        x = Snake1d(dtype=self.dtype, name="snake1")(x)
        x = ConvTranspose1d(self.features, self.stride, dtype=self.dtype, name="conv_t1")(x)
        return residual_units(x, self.dtype)


class Half(layers.Layer):
    """The encoder or the decoder: a convolution, the blocks, a convolution. Tuples have one value for each block."""

    features: int  # output channels
    first: int  # channels before the blocks
    block: type  # OobleckEncoderBlock or OobleckDecoderBlock
    channels: tuple[int, ...]  # after each block
    strides: tuple[int, ...]
    window: int  # of the last convolution
    last_bias: bool  # whether the last convolution has a bias

    @nn.compact
    def __call__(self, x):
        x = Conv1d(self.first, 7, dtype=self.dtype, name="conv1")(x)
        for i, (channels, stride) in enumerate(zip(self.channels, self.strides)):
            x = self.block(channels, stride, dtype=self.dtype, name=f"block.{i}")(x)
        x = Snake1d(dtype=self.dtype, name="snake1")(x)
        x = Conv1d(self.features, self.window, use_bias=self.last_bias, dtype=self.dtype, name="conv2")(x)
        return x.astype(jnp.float32)


class AutoencoderOobleck(layers.Autoencoder):
    """Audio [B, N, audio_channels] in [-1, 1] <-> latents [B, N / hop, latent_channels]."""

    encoder_hidden_size: int = 128  # channels of the encoder at full rate, and twice the latent channels
    downsampling_ratios: tuple[int, ...] = (2, 4, 4, 8, 8)  # even numbers, the highest rate first
    channel_multiples: tuple[int, ...] = (1, 2, 4, 8, 16)  # channels after each downsampling, relative to full rate
    decoder_channels: int = 128  # channels of the decoder at full rate
    decoder_input_channels: int = 64  # latent channels
    audio_channels: int = 2
    sampling_rate: int = 44100  # Hz

    @property
    def hop(self):
        """Samples of a latent."""
        return math.prod(self.downsampling_ratios)

    @property
    def latent_channels(self):
        return self.decoder_input_channels

    @property
    def sample_rate(self):
        """In Hz."""
        return self.sampling_rate

    @property
    def latent_statistics(self):
        """(mean, std), float32 [latent_channels] each. A denoiser sees (z - mean) / std."""
        return np.zeros(self.latent_channels, np.float32), np.ones(self.latent_channels, np.float32)

    def setup(self):
        ratios, multiples = self.downsampling_ratios, self.channel_multiples
        if len(ratios) != len(multiples) or any(ratio % 2 for ratio in ratios):
            raise UserError(
                f"AutoencoderOobleck: downsampling_ratios are {ratios} for channel_multiples {multiples}: "
                f"give one even ratio for each multiple"
            )
        if self.encoder_hidden_size != 2 * self.latent_channels:
            raise UserError(
                f"AutoencoderOobleck: encoder_hidden_size is {self.encoder_hidden_size}: "
                f"give {2 * self.latent_channels}, twice decoder_input_channels"
            )
        width = self.encoder_hidden_size
        self.encoder = Half(
            width,
            width,
            OobleckEncoderBlock,
            tuple(width * multiple for multiple in multiples),
            ratios,
            window=3,
            last_bias=True,
            dtype=self.dtype,
        )
        channels = [self.decoder_channels * multiple for multiple in (1, *multiples)]
        self.decoder = Half(
            self.audio_channels,
            channels[-1],
            OobleckDecoderBlock,
            tuple(channels[-2::-1]),
            ratios[::-1],
            window=7,
            last_bias=False,
            dtype=self.dtype,
        )

    def encode(self, audio):
        """Audio [B, N, audio_channels] in [-1, 1] -> (mean, log variance), each [B, N / hop, latent_channels] float32.

        The standard deviation exp(log variance / 2) is the original's softplus(scale) + 1e-4.

        Raises UserError for an N that is no multiple of hop.
        """
        n = audio.shape[1]
        if n % self.hop:
            raise UserError(
                f"AutoencoderOobleck encodes a multiple of {self.hop} samples, not {n}: "
                f"pad the sound to {-(-n // self.hop) * self.hop}"
            )
        mean, scale = jnp.split(self.encoder(audio), 2, -1)
        return mean, 2 * jnp.log(nn.softplus(scale) + 1e-4)

    def decode(self, z):
        """Latents [B, M, latent_channels] -> audio [B, M * hop, audio_channels] float32, about [-1, 1]."""
        return self.decoder(z)

    def example(self):
        return jnp.zeros((1, self.hop, self.audio_channels)), jax.random.key(0)

    def from_older(self, tensors):
        """Returns the tensors with weight_g and weight_v. Other files have other names for them, or their product."""
        today = {}
        for name, tensor in tensors.items():
            parts, _, last = name.rpartition(".")
            if last == "weight" and len(tensor.shape) == 3:
                weight = np.asarray(tensor[:], np.float32)
                today[f"{name}_v"] = weight
                today[f"{name}_g"] = np.sqrt(np.square(weight).sum((1, 2), keepdims=True))
                continue
            for other, ours in _WEIGHT_NORM.items():
                name = name.replace(other, ours)
            today[name] = tensor
        return today
