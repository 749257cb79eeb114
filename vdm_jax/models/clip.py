"""A text encoder over bytes and a video encoder, trained to agree on matching pairs (CLIP, arXiv:2103.00020)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdm_jax.models import layers


class TextEncoder(layers.Layer):
    """Pre-norm transformer over byte tokens.

    Returns (states [B, L, width], pooled [B, width]). `pooled` is the mean of all states but those of padding.

    tokens: int32 [B, L]
    mask: bool [B, L], False = padding
    """

    vocabulary: int  # number of different tokens
    length: int  # largest L
    width: int  # channels of a token
    layers: int
    heads: int

    @nn.compact
    def __call__(self, tokens, mask):
        embed = functools.partial(nn.Embed, features=self.width, dtype=self.activation_dtype)
        x = embed(self.vocabulary, name="tokens")(tokens)
        x = x + embed(self.length, name="positions")(jnp.arange(tokens.shape[1]))
        for i in range(self.layers):
            x = layers.transformer_layer(x, mask, self.heads, i, dtype=self.dtype)
        states = layers.LayerNorm(dtype=self.dtype, name="norm_out")(x)
        weights = mask[..., None].astype(states.dtype)
        return states, (states * weights).sum(1) / weights.sum(1)


class VideoTower(layers.Layer):
    """Residual convolutions: video [B, F, H, W, 3] in [-1, 1] -> [B, channels[-1]]."""

    patch: int  # patch x patch pixels become the channels of one place
    channels: tuple[int, ...]  # one value for each resolution, the highest first; space and time halve in between
    groups: int = 8  # of GroupNorm

    @nn.compact
    def __call__(self, video):
        conv = functools.partial(layers.Conv, dtype=self.dtype)
        x = conv(self.channels[0], (1, 3, 3), name="stem")(layers.space_to_depth(video, self.patch))
        for i, channels in enumerate(self.channels):
            x = layers.ResidualBlock(channels, groups=self.groups, dtype=self.dtype, name=f"block_{i}")(x)
            if i < len(self.channels) - 1:
                stride = tuple(2 if size > 1 else 1 for size in x.shape[1:4])
                x = conv(channels, (3, 2, 2), strides=stride, name=f"downsample_{i}")(x)
        x = layers.GroupNorm(self.groups, activation=nn.silu, dtype=self.dtype, name="norm")(x)
        b, _, h, w, c = x.shape
        # Words of direction need positions, so the mean is over time only. A linear layer summarizes space.
        return layers.Dense(c, dtype=self.dtype, name="summary")(x.mean(1).reshape(b, h * w * c))


class Clip(layers.Layer):
    """Both encoders and the learned temperature. Embeddings are unit vectors [B, embedding]."""

    text: dict  # settings of the TextEncoder
    video: dict  # settings of the VideoTower
    embedding: int  # size of the embeddings of texts and videos

    def setup(self):
        self.text_encoder = TextEncoder(**self.text, dtype=self.dtype)
        self.video_tower = VideoTower(**self.video, dtype=self.dtype)
        self.text_out = layers.Dense(self.embedding, use_bias=False, dtype=self.dtype)
        self.video_out = layers.Dense(self.embedding, use_bias=False, dtype=self.dtype)
        self.log_temperature = self.param("log_temperature", nn.initializers.constant(jnp.log(1 / 0.07)), ())

    @property
    def width(self):
        """Channels of a text state."""
        return self.text["width"]

    def encode_text(self, tokens, mask):
        """-> {'states': [B, L, width], 'pooled': [B, width]}, float32: the denoiser's view of the text."""
        states, pooled = self.text_encoder(tokens, mask)
        return {"states": states.astype(jnp.float32), "pooled": pooled.astype(jnp.float32)}

    def embed_text(self, tokens, mask):
        """-> unit vectors [B, embedding]."""
        return _unit(self.text_out(self.text_encoder(tokens, mask)[1]))

    def embed_video(self, video):
        """Video [B, F, H, W, 3] in [-1, 1] -> unit vectors [B, embedding]."""
        return _unit(self.video_out(nn.silu(self.video_tower(video))))

    def __call__(self, tokens, mask, video):
        """-> (text embeddings [B, E], video embeddings [B, E], factor of their products; at most 100, as in CLIP)."""
        scale = jnp.exp(jnp.minimum(self.log_temperature, jnp.log(100.0)))
        return self.embed_text(tokens, mask), self.embed_video(video), scale


def _unit(x):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-12)
