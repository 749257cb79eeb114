"""The encoders of T5 (arXiv:1910.10683) and UMT5 (arXiv:2304.09151), with the parameters of transformers' classes.

CogVideoX and LTX-Video use T5 1.1 XXL, and Wan uses UMT5 XXL. Values between layers grow to a size at which float16
overflows, so `dtype` is float32 or bfloat16, and they stay float32.
"""

import functools
import math

import flax.linen as nn
import numpy as np

from vdm_jax.errors import UserError
from vdm_jax.models import layers
from vdm_jax.models.published import text_layers


class T5EncoderModel(text_layers.TextEncoder):
    """Pre-norm transformer with relative positions. Returns (states [B, L, width], pooled [B, width]), float32.

    The states are those after the last normalization. The original has no `pooled`: it is the mean of all states but
    those of padding.

    tokens: int32 [B, L]
    mask: bool [B, L], True = may be read. Wan gives a mask, and sets the states of padding to 0 afterwards. CogVideoX
        and LTX-Video give no mask: for their states all values are True.
    """

    vocab_size: int = 32128  # number of different tokens
    d_model: int = 512  # channels of a token
    d_kv: int = 64  # channels of an attention head
    d_ff: int = 2048  # channels between the two linear layers
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32  # number of different relative positions
    relative_attention_max_distance: int = 128  # from this distance on, in tokens, all are in one bucket
    layer_norm_epsilon: float = 1e-6  # is added to the mean square
    feed_forward_proj: str = "relu"  # an activation function, or "gated-" and one (GEGLU, arXiv:2002.05202)
    is_decoder: bool = False  # True, a causal model, is not supported

    max_length = 512  # tokens in training; the model has no limit
    has_one_bias = True  # whether all layers use the position bias of the first layer

    @property
    def width(self):
        """Channels of a state."""
        return self.d_model

    def from_older(self, tensors):
        """Leaves out a decoder, and the second name of the token embedding. Raises UserError if the two differ."""
        first, second = "shared.weight", "encoder.embed_tokens.weight"
        tensors = {name: x for name, x in tensors.items() if not name.startswith(("decoder.", "lm_head."))}
        if second in tensors:
            embedding = tensors.pop(second)
            known = tensors.setdefault(first, embedding)
            if known is not embedding and not np.array_equal(known[:], embedding[:]):
                raise UserError(f"tensors {first} and {second} differ, but T5 has one embedding: download them again")
        return tensors

    @nn.compact
    def __call__(self, tokens, mask):
        if self.is_decoder:
            raise UserError("is_decoder is not supported: give the folder of an encoder")
        norm = functools.partial(layers.RMSNorm, self.layer_norm_epsilon)
        dense = functools.partial(layers.Dense, dtype=self.dtype, use_bias=False)
        inner = self.num_heads * self.d_kv
        buckets = relative_buckets(
            tokens.shape[1], self.relative_attention_num_buckets, self.relative_attention_max_distance
        )

        x = text_layers.Embed(self.vocab_size, self.d_model, name="shared")(tokens)
        for i in range(self.num_layers):
            names = f"encoder.block.{i}.layer.0"
            if i == 0 or not self.has_one_bias:
                embed = text_layers.Embed(
                    self.relative_attention_num_buckets,
                    self.num_heads,
                    name=f"{names}.SelfAttention.relative_attention_bias",
                )
                bias = embed(buckets).transpose(2, 0, 1)  # [heads, L, L]
            h = norm(name=f"{names}.layer_norm")(x)
            qkv = (dense(inner, name=f"{names}.SelfAttention.{part}")(h) for part in "qkv")
            h = text_layers.attention(*qkv, self.num_heads, mask[:, None, None, :], 1.0, bias)
            x += dense(self.d_model, name=f"{names}.SelfAttention.o")(h)

            names = f"encoder.block.{i}.layer.1"
            h = self.expand(dense, f"{names}.DenseReluDense", norm(name=f"{names}.layer_norm")(x))
            x += dense(self.d_model, name=f"{names}.DenseReluDense.wo")(h)
        states = norm(name="encoder.final_layer_norm")(x)
        return states, text_layers.masked_mean(states, mask)

    def expand(self, dense, names, x):
        """Returns the activations [B, L, d_ff] between the two linear layers."""
        *gated, name = self.feed_forward_proj.split("-")
        if gated not in ([], ["gated"]):
            raise UserError(f"feed_forward_proj {self.feed_forward_proj!r} is unknown: use relu or gated-gelu")
        if not gated:
            return text_layers.activation(name)(dense(self.d_ff, name=f"{names}.wi")(x))
        act = text_layers.activation("gelu_new" if name == "gelu" else name)
        return act(dense(self.d_ff, name=f"{names}.wi_0")(x)) * dense(self.d_ff, name=f"{names}.wi_1")(x)


class UMT5EncoderModel(T5EncoderModel):
    """T5EncoderModel with a position bias in every layer."""

    vocab_size: int = 250112
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    feed_forward_proj: str = "gated-gelu"

    has_one_bias = False


def relative_buckets(length, buckets, max_distance):
    """Returns the bucket [L, L] of the position of a key (last dimension) minus that of a query.

    One half of the buckets is for keys after the query. In each half, the first half has one bucket for each distance;
    the other buckets grow as the logarithm of the distance (arXiv:1910.10683, section 2.1).
    """
    offset = np.arange(length) - np.arange(length)[:, None]
    distance, half = np.abs(offset), buckets // 2
    exact = half // 2
    # float32, as in the original: at a border between buckets the rounding counts
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (half - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, half - 1)) + half * (offset > 0)
