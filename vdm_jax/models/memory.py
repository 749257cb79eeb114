"""The memory of a scene: what a denoiser knows of windows that are no longer its context.

It has two parts. Memory tokens are written from each finished window (implicit memory). The last windows are also kept
as latents, each coarser than the one after it (explicit memory, as in arXiv:2504.12626). Where nothing is remembered
yet, all arrays are zero, and reading them adds exactly nothing: a first window is as without a memory.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

from vdm_jax.models import layers


class WindowTokens(layers.Layer):
    """Latents of a window as tokens [B, N, D], with the place of each: time, height and width from 0 to 1.

    z: {'video': [B, T, h, w, C], 'audio': [B, K*T, C]}
    """

    features: int  # D

    @nn.compact
    def __call__(self, z):
        dense = functools.partial(layers.Dense, self.features, **self.common)
        tokens = []
        for modality, x in sorted(z.items()):
            axes = x.shape[1:-1]  # (T, h, w) or (K*T,)
            embedded = dense(name=f"latents_{modality}")(x)
            for axis, (size, name) in enumerate(zip(axes, ("time", "height", "width"))):
                places = (jnp.arange(size) + 0.5) / size
                places = layers.fourier_features(places * 20.0, self.features, max_period=20.0)  # [size, D]
                places = dense(name=f"{name}_{modality}")(places)
                embedded = embedded + places.reshape(size, *(1,) * (len(axes) - axis - 1), -1)
            tokens.append(embedded.reshape(len(x), -1, self.features))
        return jnp.concatenate(tokens, 1)


class MemoryWriter(layers.Layer):
    """The memory tokens after a window, [B, M, D]: each token attends to the window, and a gate tells what it keeps.

    tokens: [B, M, D], the memory tokens before the window
    z: clean latents of the window, see WindowTokens
    """

    head_dim: int  # channels of a head

    @nn.compact
    def __call__(self, tokens, z):
        features = tokens.shape[-1]
        norm = functools.partial(layers.LayerNorm, **self.common)
        window = norm(name="norm_window")(WindowTokens(features, **self.common, name="window")(z))
        # Each token has a bias of its own, so that different tokens remember different things.
        x = tokens + self.param("slots", nn.initializers.normal(1.0), tokens.shape[1:])
        x = x + layers.Attention(self.head_dim, **self.common, name="read")(norm(name="norm_read")(x), window)
        everywhere = jnp.ones(x.shape[:2], bool)
        x = layers.transformer_layer(x, everywhere, max(1, features // self.head_dim), 0, **self.common)
        new = norm(name="norm_new")(x)
        gate = nn.sigmoid(layers.Dense(features, **self.common, name="gate")(jnp.concatenate([tokens, new], -1)))
        return tokens + gate * (new - tokens)


class MemoryContext(layers.Layer):
    """What the denoiser reads of a memory, [B, N, D]: its tokens, and the tokens of the past windows.

    memory: {'tokens': [B, M, D], 'past': one z for each past window, the latest first, 'windows': int [B], how many
        windows are remembered}
    """

    @nn.compact
    def __call__(self, memory):
        tokens = [memory["tokens"].astype(self.activation_dtype)]
        for age, z in enumerate(memory["past"]):
            window = WindowTokens(tokens[0].shape[-1], **self.common, name=f"past_{age}")(z)
            there = memory["windows"] > age  # [B]
            tokens.append(jnp.where(there[:, None, None], window, 0))
        return jnp.concatenate(tokens, 1)


class MemoryReader(layers.Layer):
    """Cross-attention from a stream to the memory; residual, and zero at first.

    It has no biases, so zeros in the memory add exactly zero.

    x: [B, T, h, w, C] or [B, K*T, C]
    context: [B, N, D], see MemoryContext
    """

    head_dim: int  # channels of a head

    @nn.compact
    def __call__(self, x, context):
        tokens = x.reshape(len(x), -1, x.shape[-1])
        attention = layers.Attention(self.head_dim, dtype=self.dtype, use_bias=False, name="read")
        tokens = tokens + attention(layers.LayerNorm(**self.common, name="norm")(tokens), context)
        return layers.constrain_activation(tokens.reshape(x.shape))
