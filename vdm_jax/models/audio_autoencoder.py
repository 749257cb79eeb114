"""Causal 1-D convolutional audio VAE whose tokens lie on the video latents' time axis, K to a latent frame."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdm_jax.models.layers import Conv, Dense, GroupNorm, ResidualBlock

INITIAL_LOG_VARIANCE = -8.0  # learning starts with little noise in the way


class AudioAutoencoder(nn.Module):
    """Waveform VAE in the manner of SoundStream (arXiv:2107.03312), without quantisation.

    Audio [B, N] in [-1, 1] <-> latents [B, N / hop, latent_channels], hop = patch * product of strides. Samples are
    cut into patches of `patch`; level i has blocks[i] residual blocks, and after it time shrinks by `strides[i]`.
    Every token reads only its own span and earlier ones.
    """

    patch: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    blocks: tuple[int, ...]
    latent_channels: int
    groups: int = 8
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        block = functools.partial(ResidualBlock, time_padding="causal", groups=self.groups, dtype=self.dtype)
        conv = functools.partial(Conv, time_padding="causal", dtype=self.dtype)
        levels = range(len(self.channels))
        self.stem = conv(self.channels[0], (3,))
        self.down = [[block(self.channels[i]) for _ in range(self.blocks[i])] for i in levels]
        self.shrink = [Dense(self.channels[i + 1], dtype=self.dtype) for i in levels[:-1]]
        self.norm_latent = GroupNorm(self.groups, activation=nn.silu, dtype=self.dtype)
        self.to_latent = Dense(2 * self.latent_channels, dtype=self.dtype)
        self.from_latent = conv(self.channels[-1], (3,))
        self.up = [[block(self.channels[i]) for _ in range(self.blocks[i])] for i in levels]
        self.grow = [Dense(self.channels[i] * self.strides[i], dtype=self.dtype) for i in levels[:-1]]
        self.norm_samples = GroupNorm(self.groups, activation=nn.silu, dtype=self.dtype)
        self.to_samples = conv(self.patch, (3,))

    def encode(self, audio):
        """Audio [B, N] -> (mean, log variance), each [B, N / hop, latent_channels] float32."""
        x = self.stem(audio.reshape(audio.shape[0], -1, self.patch))
        for i, blocks in enumerate(self.down):
            for block in blocks:
                x = block(x)
            if i < len(self.shrink):  # a strided convolution whose window is its stride
                x = self.shrink[i](x.reshape(x.shape[0], x.shape[1] // self.strides[i], -1))
        x = self.to_latent(self.norm_latent(x)).astype(jnp.float32)
        mean, log_variance = jnp.split(x, 2, -1)
        log_variance = log_variance + INITIAL_LOG_VARIANCE
        return mean, jnp.clip(log_variance, -20.0, 10.0)

    def decode(self, z):
        """Latents [B, M, latent_channels] -> audio [B, M * hop] float32, about [-1, 1]."""
        x = self.from_latent(z)
        for i in reversed(range(len(self.channels))):
            if i < len(self.grow):  # a transposed convolution whose window is its stride
                x = self.grow[i](x)
                x = x.reshape(x.shape[0], x.shape[1] * self.strides[i], -1)
            for block in self.up[i]:
                x = block(x)
        x = self.to_samples(self.norm_samples(x))
        return x.reshape(x.shape[0], -1).astype(jnp.float32)

    def __call__(self, audio, key):
        """-> (reconstruction, mean, log variance), the latent sampled with `key`."""
        mean, log_variance = self.encode(audio)
        noise = jax.random.normal(key, (mean.shape[0], mean[0].size)).reshape(mean.shape)  # compiles sooner if flat
        return self.decode(mean + jnp.exp(0.5 * log_variance) * noise), mean, log_variance
