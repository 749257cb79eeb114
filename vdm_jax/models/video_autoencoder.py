"""A causal 3-D convolutional VAE for video.

The first latent frame holds frame 0 alone, and each later one holds f_t frames. An image is a video of one frame.
"""

import functools
import math

import jax.numpy as jnp

from vdm_jax.models import layers


class VideoAutoencoder(layers.CausalAutoencoder):
    """Variational autoencoder (arXiv:1312.6114) with causal time, as in MAGVIT-v2 (arXiv:2310.05737).

    Video [B, 1 + f_t*(T-1), H, W, 3] in [-1, 1] <-> latents [B, T, h, w, latent_channels], where f_t is the product of
    time_strides, h = H / f_s, w = W / f_s, and f_s = patch * product of space_strides.

    Residual branches are zero at first, and the path around them has no normalization. Training therefore starts from a
    linear autoencoder, which is learned quickly, and the branches add to it.

    Tuples have one value for each resolution i, the highest first; strides have one value fewer.
    """

    patch: int  # patch x patch pixels become the channels of one place
    channels: tuple[int, ...]
    space_strides: tuple[int, ...]  # how height and width shrink from resolution i to i + 1
    time_strides: tuple[int, ...]  # how time shrinks from resolution i to i + 1
    blocks: tuple[int, ...]  # residual blocks in the encoder, and as many in the decoder
    middle_blocks: int  # residual blocks between the lowest resolution and the latents, in each direction
    latent_channels: int
    groups: int = 8  # of GroupNorm

    def setup(self):
        block = functools.partial(layers.ResidualBlock, time_padding="causal", groups=self.groups, dtype=self.dtype)
        conv = functools.partial(layers.Conv, time_padding="causal", dtype=self.dtype)
        self.stem = conv(self.channels[0], (1, 3, 3))
        self.down = [[block(c) for _ in range(n)] for c, n in zip(self.channels, self.blocks)]
        strides = list(zip(self.channels, self.time_strides, self.space_strides))  # no stride for the last channels
        self.downsample = [conv(c, (2 * t - 1, s, s), strides=(t, s, s)) for c, t, s in strides]
        self.middle = [block(self.channels[-1]) for _ in range(self.middle_blocks)]
        self.to_latent = conv(2 * self.latent_channels, (1, 1, 1))
        self.from_latent = layers.FactorizedConv(self.channels[-1], time_padding="causal", dtype=self.dtype)
        self.middle_up = [block(self.channels[-1]) for _ in range(self.middle_blocks)]
        self.up = [[block(c) for _ in range(n)] for c, n in zip(self.channels, self.blocks)]
        self.upsample = [conv(t * s * s * c, (1, 3, 3)) for c, t, s in strides]
        self.to_pixels = conv(3 * self.patch**2, (1, 3, 3))

    @property
    def f_t(self):
        """Frames of a latent frame."""
        return math.prod(self.time_strides)

    @property
    def f_s(self):
        """Pixels of a latent, along the height and along the width."""
        return self.patch * math.prod(self.space_strides)

    def encode(self, video):
        """Video [B, F, H, W, 3] in [-1, 1] -> (mean, log variance), each [B, T, h, w, latent_channels] float32."""
        x = self.stem(layers.space_to_depth(video, self.patch))
        for i, blocks in enumerate(self.down):
            for block in blocks:
                x = block(x)
            if i < len(self.downsample):
                x = self.downsample[i](x)
        for block in self.middle:
            x = block(x)
        return self.split_latent(self.to_latent(x))

    def decode(self, z):
        """Latents [B, T, h, w, latent_channels] -> video [B, 1 + f_t*(T-1), H, W, 3] float32, about [-1, 1]."""
        is_first = "from_latent" not in self.variables.get("cache", {})  # whether z begins a clip, see `stream`
        x = self.from_latent(z)
        for block in self.middle_up:
            x = block(x)
        for i in reversed(range(len(self.channels))):
            for block in self.up[i]:
                x = block(x)
            if i:
                t, s = self.time_strides[i - 1], self.space_strides[i - 1]
                x = layers.depth_to_space(self.upsample[i - 1](x), s, t)
                x = x[:, t - 1 :] if is_first else x  # the first latent frame holds one frame, not t
                x = layers.constrain_activation(x)
        return layers.depth_to_space(self.to_pixels(x), self.patch).astype(jnp.float32)
