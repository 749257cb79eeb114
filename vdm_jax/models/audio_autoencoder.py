"""A causal 1-D convolutional VAE for sound, with K tokens for each latent frame of the video."""

import functools
import math

import flax.linen as nn
import jax.numpy as jnp

from vdm_jax.models import layers


class AudioAutoencoder(layers.CausalAutoencoder):
    """Waveform autoencoder like SoundStream (arXiv:2107.03312), but variational and without quantization.

    Audio [B, N] in [-1, 1] <-> latents [B, N / hop, latent_channels], where hop = patch * product of strides. A token
    depends on the samples of its own hop and on earlier ones.

    Tuples have one value for each resolution i, the highest first; strides have one value fewer.
    """

    patch: int  # samples that become the channels of one place
    channels: tuple[int, ...]
    strides: tuple[int, ...]  # how time shrinks from resolution i to i + 1
    blocks: tuple[int, ...]  # residual blocks in the encoder, and as many in the decoder
    latent_channels: int
    groups: int = 8  # of GroupNorm; 0: no normalization, so that loudness passes, and snake activations
    overlap: bool = False  # whether the windows of resampling are two strides long, or one

    def setup(self):
        conv = functools.partial(layers.Conv, time_padding="causal", dtype=self.dtype)
        self.stem = conv(self.channels[0], (3,))
        self.down = [[self._block(c) for _ in range(n)] for c, n in zip(self.channels, self.blocks)]
        self.downsample = [self._resampling(c) for c in self.channels[1:]]
        self.norm_latent = self._activation()
        self.to_latent = layers.Dense(2 * self.latent_channels, dtype=self.dtype)
        self.from_latent = conv(self.channels[-1], (3,))
        self.up = [[self._block(c) for _ in range(n)] for c, n in zip(self.channels, self.blocks)]
        self.upsample = [self._resampling(c * s) for c, s in zip(self.channels, self.strides)]
        self.norm_samples = self._activation()
        self.to_samples = conv(self.patch, (3,))

    def _block(self, channels):
        if self.groups:
            return layers.ResidualBlock(channels, time_padding="causal", groups=self.groups, dtype=self.dtype)
        return SoundBlock(channels, dtype=self.dtype)

    def _activation(self):
        if self.groups:
            return layers.GroupNorm(self.groups, activation=nn.silu, dtype=self.dtype)
        return layers.Snake(dtype=self.dtype)

    def _resampling(self, features):
        if self.overlap:
            return layers.Conv(features, (2,), time_padding="causal", dtype=self.dtype)
        return layers.Dense(features, dtype=self.dtype)

    @property
    def hop(self):
        """Samples of a token."""
        return self.patch * math.prod(self.strides)

    def encode(self, audio):
        """Audio [B, N] -> (mean, log variance), each [B, N / hop, latent_channels] float32."""
        x = self.stem(audio.reshape(audio.shape[0], -1, self.patch))
        for i, blocks in enumerate(self.down):
            for block in blocks:
                x = block(x)
            if i < len(self.downsample):  # a convolution whose window is one stride or two
                x = self.downsample[i](x.reshape(x.shape[0], x.shape[1] // self.strides[i], -1))
        return self.split_latent(self.to_latent(self.norm_latent(x)))

    def decode(self, z):
        """Latents [B, M, latent_channels] -> audio [B, M * hop] float32, about [-1, 1]."""
        x = self.from_latent(z)
        for i in reversed(range(len(self.channels))):
            if i < len(self.upsample):  # a transposed convolution whose window is one stride or two
                x = self.upsample[i](x)
                x = x.reshape(x.shape[0], x.shape[1] * self.strides[i], -1)
            for block in self.up[i]:
                x = block(x)
        x = self.to_samples(self.norm_samples(x))
        return x.reshape(x.shape[0], -1).astype(jnp.float32)


class SoundBlock(layers.Layer):
    """Snake, conv, snake, conv, plus the input [B, N, C]. Nothing is normalized."""

    features: int  # C

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(layers.Conv, self.features, (3,), time_padding="causal", **self.common)
        h = conv(name="conv_in")(layers.Snake(dtype=self.dtype, name="snake_in")(x))
        h = conv(zero=True, name="conv_out")(layers.Snake(dtype=self.dtype, name="snake_out")(h))
        return layers.constrain_activation(x + h)
