"""What the published text encoders share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdm_jax.errors import UserError, one_of
from vdm_jax.models import layers

_tanh_gelu = functools.partial(nn.gelu, approximate=True)
ACTIVATIONS = {  # the names in a config.json
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
}


class TextEncoder(layers.Layer):
    """A text encoder. `__call__(tokens, mask)` returns (states [B, L, width], pooled [B, width]), float32."""

    reads_padding = False  # whether a denoiser reads the states of padding, too

    example = staticmethod(lambda: (jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)))

    def encode_text(self, tokens, mask):
        """-> {'states': [B, L, width], 'pooled': [B, width]}."""
        states, pooled = self(tokens, mask)
        return {"states": states, "pooled": pooled}


class Embed(nn.Embed):
    """nn.Embed with a result in float32, whatever the type of its table."""

    def __call__(self, indices):
        return super().__call__(indices).astype(jnp.float32)


def activation(name):
    """Returns a pointwise function by its name in a config.json. Raises UserError for an unknown name."""
    return ACTIVATIONS[one_of("activation function", name, list(ACTIVATIONS))]


def positions(tokens, limit):
    """Returns 0, 1, ... for tokens [B, L]. Raises UserError if L is over `limit`, the number of learned positions."""
    length = tokens.shape[1]
    if length > limit:
        raise UserError(f"{length} tokens are more than the {limit} positions of this text encoder: give fewer tokens")
    return jnp.arange(length)


def attention(query, key, value, heads, mask, scale, bias=0.0):
    """Softmax attention (arXiv:1706.03762, eq. 1) of tokens to each other. Returns [B, L, heads * d].

    query, key, value: [B, L, heads * d]
    mask: bool, broadcast to [B, heads, L, L], True = may be read
    scale: factor of the products of queries and keys
    bias: broadcast to [B, heads, L, L], is added to the scores
    """
    if query.shape[-1] % heads:
        raise UserError(
            f"{query.shape[-1]} channels are no multiple of {heads} attention heads: correct the config.json"
        )
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))  # [B, L, heads, d]
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32) * scale + bias
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), -1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v).reshape(query.shape)


def masked_mean(states, mask):
    """Returns the mean [B, D] of the states [B, L, D] where mask [B, L] is True."""
    weights = mask[..., None].astype(states.dtype)
    return (states * weights).sum(1) / jnp.maximum(weights.sum(1), 1.0)
