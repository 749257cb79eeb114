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


class WeightNorm(layers.Layer):
    """A layer whose weight is g v / |v| (arXiv:1602.07868, eq. 2)."""

    features: int  # output channels

    def weight(self, shape):
        """Returns the weight, float32 with `shape`. The norm of v is over all dimensions but the first."""
        g = self.param("weight_g", nn.initializers.ones, (shape[0], 1, 1))
        v = self.param("weight_v", nn.initializers.lecun_normal(1, 0), shape)
        square = jnp.square(v).sum((1, 2), keepdims=True)
        return g * v * jax.lax.rsqrt(jnp.maximum(square, 1e-30))  # a row of zeros stays one

    def bias(self):
        return self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None


class Conv1d(WeightNorm):
    """A convolution [B, N, C] -> [B, N / stride, features]; `stride` divides N."""

    window: int
    stride: int = 1
    dilation: int = 1  # distance of the taps

    @nn.compact
    def __call__(self, x):
        b, n, c = x.shape
        kernel = self.weight((self.features, c, self.window)).transpose(2, 1, 0)  # [window, inputs, outputs]
        kernel = kernel[:, None, None]  # [window, 1, 1, inputs, outputs]
        # The taps of a place are in every dilation-th place: these places are a sound of their own.
        x = jnp.pad(x, ((0, 0), (0, -n % self.dilation), (0, 0))).reshape(b, -1, 1, self.dilation, c)
        padding = (((self.window - self.stride) // 2,) * 2, (0, 0), (0, 0))
        x = ops.current().conv(x, kernel, self.bias(), (self.stride, 1, 1), padding, self.dtype)
        return x.reshape(b, -1, self.features)[:, : n // self.stride]


class ConvTranspose1d(WeightNorm):
    """A transposed convolution [B, M, C] -> [B, M * stride, features] with a window of 2 * stride; `stride` is even."""

    stride: int

    @nn.compact
    def __call__(self, x):
        b, _, c = x.shape
        s = self.stride
        # An output gets the first half of the window of one input, and the second half of that of the input before.
        first, second = jnp.split(self.weight((c, self.features, 2 * s)).swapaxes(1, 2), 2, 1)  # [C, s, features] each
        kernel = jnp.stack([second, first]).reshape(2, c, s * self.features)
        bias = jnp.tile(self.bias(), s)
        x = ops.current().conv(x, kernel, bias, (1,), ((1, 1),), self.dtype)  # [B, M + 1, s * features]
        return x.reshape(b, -1, self.features)[:, s // 2 : -(s // 2)]


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
        return Conv1d(self.features, self.window, use_bias=self.last_bias, dtype=self.dtype, name="conv2")(x)


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
        mean, scale = jnp.split(self.encoder(audio).astype(jnp.float32), 2, -1)
        return mean, 2 * jnp.log(nn.softplus(scale) + 1e-4)

    def decode(self, z):
        """Latents [B, M, latent_channels] -> audio [B, M * hop, audio_channels] float32, about [-1, 1]."""
        return self.decoder(z).astype(jnp.float32)

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
