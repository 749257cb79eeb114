"""The encoder BERT (arXiv:1810.04805), with the parameters of transformers' BertModel.

all-MiniLM-L6-v2 of sentence-transformers is such a model. Its sentence embedding is `pooled`, divided by its length.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

from vdm_jax.errors import UserError
from vdm_jax.models import layers
from vdm_jax.models.published import text_layers


class BertModel(text_layers.TextEncoder):
    """Post-norm transformer. Returns (states [B, L, width], pooled [B, width]), float32.

    All tokens are of the first text (token type 0). `pooled` is the mean of all states but those of padding, as in
    sentence-transformers. The pooling layer of the original, which only classification uses, is left out.

    tokens: int32 [B, L], at most `max_length`
    mask: bool [B, L], True = may be read; the original's users let no token read padding
    """

    vocab_size: int = 30522  # number of different tokens
    hidden_size: int = 768  # channels of a token
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072  # channels between the two linear layers
    hidden_act: str = "gelu"  # see text_layers.ACTIVATIONS
    max_position_embeddings: int = 512  # learned positions
    type_vocab_size: int = 2  # number of token types
    layer_norm_eps: float = 1e-12  # is added to the variance
    position_embedding_type: str = "absolute"  # no other is supported
    is_decoder: bool = False  # True, a causal model, is not supported

    @property
    def width(self):
        """Channels of a state."""
        return self.hidden_size

    @property
    def max_length(self):
        """Largest number of tokens."""
        return self.max_position_embeddings

    def from_older(self, tensors):
        """Leaves out the pooling layer."""
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}

    @nn.compact
    def __call__(self, tokens, mask):
        if self.position_embedding_type != "absolute":
            raise UserError(f"position_embedding_type {self.position_embedding_type!r} is not supported: use absolute")
        if self.is_decoder:
            raise UserError("is_decoder is not supported: give the folder of an encoder")
        norm = functools.partial(layers.LayerNorm, eps=self.layer_norm_eps, dtype=self.dtype)
        dense = functools.partial(layers.Dense, self.hidden_size, dtype=self.dtype)
        act = text_layers.activation(self.hidden_act)
        scale = (self.hidden_size // self.num_attention_heads) ** -0.5

        x = self.embed("word", self.vocab_size, tokens)
        x += self.embed("position", self.max_length, text_layers.positions(tokens, self.max_length))
        x += self.embed("token_type", self.type_vocab_size, jnp.zeros_like(tokens))
        x = norm(name="embeddings.LayerNorm")(x)
        for i in range(self.num_hidden_layers):
            names = f"encoder.layer.{i}"
            qkv = (dense(name=f"{names}.attention.self.{part}")(x) for part in ("query", "key", "value"))
            h = text_layers.attention(*qkv, self.num_attention_heads, mask[:, None, None, :], scale)
            h = dense(name=f"{names}.attention.output.dense")(h)
            x = norm(name=f"{names}.attention.output.LayerNorm")(x + h)
            h = act(layers.Dense(self.intermediate_size, dtype=self.dtype, name=f"{names}.intermediate.dense")(x))
            x = norm(name=f"{names}.output.LayerNorm")(x + dense(name=f"{names}.output.dense")(h))
        states = x.astype(jnp.float32)
        return states, text_layers.masked_mean(states, mask)

    def embed(self, what, size, indices):
        return text_layers.Embed(size, self.hidden_size, name=f"embeddings.{what}_embeddings")(indices)
