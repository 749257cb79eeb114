"""UNet3DConditionModel of diffusers: the text-to-video denoiser of ModelScope and ZeroScope (arXiv:2308.06571).

It is a 2-D U-Net on each frame, with convolutions and attention over time between its layers. A clip has one noise
level and no sound.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vdm_jax.errors import UserError, one_of
from vdm_jax.models import layers, ops
from vdm_jax.models.published import naming

ATTEND = {"CrossAttnDownBlock3D": True, "DownBlock3D": False, "CrossAttnUpBlock3D": True, "UpBlock3D": False}


class ResnetBlock2D(layers.Layer):
    """Residual block of two 3x3 convolutions in each frame; the noise level's embedding [B, E] is added between."""

    features: int  # output channels
    groups: int  # of GroupNorm
    eps: float  # of GroupNorm

    @nn.compact
    def __call__(self, x, embedding):
        norm = functools.partial(layers.GroupNorm, self.groups, eps=self.eps, activation=nn.silu, dtype=self.dtype)
        conv = functools.partial(layers.Conv, self.features, dtype=self.dtype)
        h = conv((3, 3), name="conv1")(norm(name="norm1")(x))
        offset = layers.Dense(self.features, dtype=self.dtype, name="time_emb_proj")(embedding)[:, None]
        h = conv((3, 3), name="conv2")(norm(name="norm2")(h, offset=offset))
        if x.shape[-1] != self.features:
            x = conv((1, 1), name="conv_shortcut")(x)
        return x + h


class TemporalConvLayer(layers.Layer):
    """Residual block of four convolutions over time; the statistics of GroupNorm are over all frames."""

    groups: int  # of GroupNorm

    @nn.compact
    def __call__(self, x):
        h = x
        for i in range(1, 5):
            conv = 2 if i == 1 else 3  # a dropout is before the others
            norm = layers.GroupNorm(self.groups, 1, activation=nn.silu, dtype=self.dtype, name=f"conv{i}.0")
            h = layers.Conv(x.shape[-1], (3, 1, 1), zero=i == 4, dtype=self.dtype, name=f"conv{i}.{conv}")(norm(h))
        return x + h


class Attention(layers.Layer):
    """Multi-head attention (arXiv:1706.03762) of x [B, N, C] to context [B, M, D]."""

    heads: int
    head_dim: int  # channels of a head

    @nn.compact
    def __call__(self, x, context):
        dense = functools.partial(layers.Dense, self.heads * self.head_dim, dtype=self.dtype, use_bias=False)
        arrays = dense(name="to_q")(x), dense(name="to_k")(context), dense(name="to_v")(context)
        by_head = (array.reshape(*array.shape[:-1], self.heads, self.head_dim) for array in arrays)  # [B, N, heads, d]
        out = checkpoint_name(ops.current().attention(*by_head, None), layers.PRODUCT)
        out = out.reshape(*x.shape[:-1], -1)  # [B, N, heads * d]
        return layers.constrain_activation(layers.Dense(x.shape[-1], dtype=self.dtype, name="to_out.0")(out))


class Transformer(layers.Layer):
    """One pre-norm transformer block, residual: Transformer2DModel, or TransformerTemporalModel without a text.

    x: [B, T, h, w, C]
    text: [B, L, D]: the tokens of a frame attend to each other, then to it; or None: the T tokens of a pixel attend to
        each other twice
    """

    heads: int
    head_dim: int  # channels of a head
    groups: int  # of GroupNorm

    @nn.compact
    def __call__(self, x, text=None):
        b, t, h, w, c = x.shape
        width = self.heads * self.head_dim
        dense = functools.partial(layers.Dense, dtype=self.dtype)
        over_time = text is None

        def block(kind, name, *arguments, **settings):
            return kind(*arguments, **settings, dtype=self.dtype, name=f"transformer_blocks.0.{name}")

        def norm(tokens, number):
            return block(layers.LayerNorm, f"norm{number}", eps=1e-5)(tokens)

        def attention(tokens, context, number):
            return block(Attention, f"attn{number}", self.heads, self.head_dim)(tokens, context)

        tokens = layers.GroupNorm(self.groups, frames=1 if over_time else t, eps=1e-6, dtype=self.dtype, name="norm")(x)
        if over_time:
            tokens = tokens.reshape(b, t, h * w, c).swapaxes(1, 2)  # [B, h*w, T, C]
        tokens = tokens.reshape(-1, t if over_time else h * w, c)  # [B*h*w, T, C] or [B*T, h*w, C]
        tokens = dense(width, name="proj_in")(tokens)
        normed = norm(tokens, 1)
        tokens = tokens + attention(normed, normed, 1)
        if not over_time:
            tokens = tokens.reshape(b, -1, width)  # [B, T*h*w, width]: all frames of a clip attend to one text
        normed = norm(tokens, 2)
        tokens = tokens + attention(normed, normed if over_time else text, 2)
        hidden, gate = jnp.split(block(layers.Dense, "ff.net.0.proj", 8 * width)(norm(tokens, 3)), 2, -1)
        hidden = hidden * nn.gelu(gate, approximate=False)  # GEGLU, arXiv:2002.05202, eq. 6
        tokens = tokens + block(layers.Dense, "ff.net.2", width)(hidden)
        tokens = dense(c, name="proj_out")(tokens)
        if over_time:
            tokens = tokens.reshape(b, h * w, t, c).swapaxes(1, 2)
        return x + tokens.reshape(x.shape)


class UNet3DConditionModel(layers.Layer):
    """Returns a prediction [B, T, h, w, out_channels], float32. The defaults are the settings of ModelScope.

    sample: [B, T, h, w, in_channels]
    timestep: [B], noise levels from 0 to 999
    encoder_hidden_states: the text, [B, L, cross_attention_dim]

    Tuples have one value for each resolution: the highest first, but in up_block_types the lowest. Space halves between
    resolutions, and time stays. Raises UserError for settings that are not supported.
    """

    sample_size: int | tuple[int, ...] | None = None  # height and width of the latents in training; no layer reads it
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",)
    up_block_types: tuple[str, ...] = ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2  # on the way down; the way up has one more
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    act_fn: str = "silu"
    norm_num_groups: int | None = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1024  # channels of the text
    attention_head_dim: int | tuple[int, ...] = 64  # channels of a head, whatever the block's channels
    num_attention_heads: int | None = None
    time_cond_proj_dim: int | None = None

    def example(self):
        return jnp.zeros((1, 1, 1, 1, self.in_channels)), jnp.zeros(1), jnp.zeros((1, 1, self.cross_attention_dim))

    def check(self):
        """Raises UserError for settings that are not supported."""
        naming.supports(
            self,
            downsample_padding=(1,),
            mid_block_scale_factor=(1,),
            act_fn=("silu", "swish"),
            num_attention_heads=(None,),
            time_cond_proj_dim=(None,),
        )
        for name in ("down_block_types", "up_block_types", "block_out_channels"):
            if len(getattr(self, name)) != len(self.block_out_channels):
                raise UserError(f"{name} has another length than block_out_channels: give the config of the weights")
        for kind in (*self.down_block_types, *self.up_block_types):
            one_of("type of block", kind, ATTEND)
        if not isinstance(self.attention_head_dim, int) or not self.norm_num_groups:
            raise UserError("attention_head_dim and norm_num_groups must each be one number above 0")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise UserError(f"block_out_channels={self.block_out_channels}: they must be multiples of norm_num_groups")

    @nn.compact
    def __call__(self, sample, timestep, encoder_hidden_states):
        self.check()
        channels, groups, head_dim = self.block_out_channels, self.norm_num_groups, self.attention_head_dim
        first, last = channels[0], len(channels) - 1
        conv = functools.partial(layers.Conv, window=(3, 3), dtype=self.dtype)
        dense = functools.partial(layers.Dense, 4 * first, dtype=self.dtype)
        transformer = functools.partial(Transformer, head_dim=head_dim, groups=groups, dtype=self.dtype)

        noise_level = layers.fourier_features(timestep, first, max_period=10000.0)
        embedding = dense(name="time_embedding.linear_1")(noise_level)
        embedding = nn.silu(dense(name="time_embedding.linear_2")(nn.silu(embedding)))  # [B, E]
        text = encoder_hidden_states.astype(self.activation_dtype)

        def layer(x, features, block, number, attend):
            """Layer `number` of a block, in which frames and time take turns."""
            x = ResnetBlock2D(features, groups, self.norm_eps, dtype=self.dtype, name=f"{block}.resnets.{number}")(
                x, embedding
            )
            x = TemporalConvLayer(groups, dtype=self.dtype, name=f"{block}.temp_convs.{number}")(x)
            if attend:
                heads = features // head_dim
                x = transformer(heads, name=f"{block}.attentions.{number}")(x, text)
                x = transformer(heads, name=f"{block}.temp_attentions.{number}")(x)
            return layers.constrain_activation(x)

        x = conv(first, name="conv_in")(sample)
        x = transformer(8, name="transformer_in")(x)

        # Down
        skips = [x]
        for i, (features, kind) in enumerate(zip(channels, self.down_block_types)):
            block = f"down_blocks.{i}"
            for j in range(self.layers_per_block):
                x = layer(x, features, block, j, ATTEND[kind])
                skips.append(x)
            if i < last:
                x = conv(features, strides=(2, 2), name=f"{block}.downsamplers.0.conv")(x)
                skips.append(x)

        # Bottleneck
        x = layer(x, channels[-1], "mid_block", 0, True)
        x = layer(x, channels[-1], "mid_block", 1, False)

        # Up
        for i, (features, kind) in enumerate(zip(channels[::-1], self.up_block_types)):
            block = f"up_blocks.{i}"
            for j in range(self.layers_per_block + 1):
                x = jnp.concatenate([x, skips.pop()], -1)
                x = layer(x, features, block, j, ATTEND[kind])
            if i < last:
                h, w = skips[-1].shape[2:4]  # an odd size was rounded up when it was halved
                x = layers.upsample(x, (1, 2, 2))[:, :, :h, :w]
                x = conv(features, name=f"{block}.upsamplers.0.conv")(x)

        norm = layers.GroupNorm(groups, eps=self.norm_eps, activation=nn.silu, dtype=self.dtype, name="conv_norm_out")
        return conv(self.out_channels, name="conv_out")(norm(x)).astype(jnp.float32)
