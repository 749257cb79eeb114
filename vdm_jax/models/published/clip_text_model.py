"""The text encoders of CLIP (arXiv:2103.00020), with the parameters of transformers' classes of the same names.

Stable Diffusion 1 uses the encoder of ViT-L/14 (`quick_gelu`, 12 layers). ModelScope and ZeroScope use the first 23
layers of ViT-H/14 (`gelu`).
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

from vdm_jax.models import layers
from vdm_jax.models.published import text_layers


class CLIPTextModel(text_layers.TextEncoder):
    """Causal pre-norm transformer. Returns (states [B, L, width], pooled [B, width]), float32.

    The states are those after the last layer normalization. `pooled` is the state of the first end token.

    tokens: int32 [B, L], at most `max_length`
    mask: bool [B, L], True = may be read. The pipelines of Stable Diffusion and ModelScope give no mask: for their
        states all values are True. A token reads only earlier tokens, so the mask of a padded text changes the states
        of its padding alone; but these denoisers read all 77 states.
    """

    vocab_size: int = 49408  # number of different tokens
    hidden_size: int = 512  # channels of a token
    intermediate_size: int = 2048  # channels between the two linear layers
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77  # learned positions
    hidden_act: str = "quick_gelu"  # see text_layers.ACTIVATIONS
    layer_norm_eps: float = 1e-5  # is added to the variance
    eos_token_id: int = 49407  # the end token; 2 is a mistake in old files and means the largest token of a text

    reads_padding = True

    @property
    def width(self):
        """Channels of a state."""
        return self.hidden_size

    @property
    def max_length(self):
        """Largest number of tokens."""
        return self.max_position_embeddings

    def from_older(self, tensors):
        """Puts `text_model` before the names of files that leave it out (those of transformers 5)."""
        return {name if name.startswith("text_") else f"text_model.{name}": x for name, x in tensors.items()}

    @nn.compact
    def __call__(self, tokens, mask):
        norm = functools.partial(layers.LayerNorm, eps=self.layer_norm_eps, dtype=self.dtype)
        dense = functools.partial(layers.Dense, self.hidden_size, dtype=self.dtype)
        act = text_layers.activation(self.hidden_act)
        length = tokens.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool)) & mask[:, None, None, :]
        scale = (self.hidden_size // self.num_attention_heads) ** -0.5

        names = "text_model.embeddings"
        x = text_layers.Embed(self.vocab_size, self.hidden_size, name=f"{names}.token_embedding")(tokens)
        position = text_layers.positions(tokens, self.max_length)
        x += text_layers.Embed(self.max_length, self.hidden_size, name=f"{names}.position_embedding")(position)
        for i in range(self.num_hidden_layers):
            names = f"text_model.encoder.layers.{i}"
            h = norm(name=f"{names}.layer_norm1")(x)
            qkv = (dense(name=f"{names}.self_attn.{part}_proj")(h) for part in "qkv")
            h = text_layers.attention(*qkv, self.num_attention_heads, causal, scale)
            x += dense(name=f"{names}.self_attn.out_proj")(h)
            h = norm(name=f"{names}.layer_norm2")(x)
            h = act(layers.Dense(self.intermediate_size, dtype=self.dtype, name=f"{names}.mlp.fc1")(h))
            x += dense(name=f"{names}.mlp.fc2")(h)
        states = norm(name="text_model.final_layer_norm")(x).astype(jnp.float32)
        end = tokens if self.eos_token_id == 2 else tokens == self.eos_token_id
        pooled = jnp.take_along_axis(states, end.argmax(1)[:, None, None], 1)[:, 0]
        return states, self.project(pooled)

    def project(self, pooled):
        return pooled


class CLIPTextModelWithProjection(CLIPTextModel):
    """CLIPTextModel whose `pooled` is the embedding [B, projection_dim] that CLIP compares with an image's."""

    projection_dim: int = 512

    def project(self, pooled):
        dense = layers.Dense(self.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")
        return dense(pooled).astype(jnp.float32)
