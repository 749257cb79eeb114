"""The text-to-video denoiser of ModelScope and ZeroScope, with the parameters of diffusers' UNet3DConditionModel.

It is a 2-D U-Net on each frame, with convolutions and attention over time between its layers (arXiv:2308.06571). A clip
has one noise level and no sound. `load_diffusers` converts the weights that diffusers saves.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.errors import UserError
from vdm_jax.models import layers

MODELSCOPE = dict(  # damo-vilab/text-to-video-ms-1.7b and cerspense/zeroscope_v2_576w, 1.41 B parameters
    channels=(320, 640, 1280, 1280),
    blocks=2,
    attention=(True, True, True, False),
    head_dim=64,
    groups=32,
    in_channels=4,
    out_channels=4,
    text_width=1024,
)


class FrameBlock(layers.Layer):
    """Residual block of two 3x3 convolutions in each frame; the noise level's embedding [B, E] is added between."""

    features: int  # output channels
    groups: int  # of GroupNorm

    @nn.compact
    def __call__(self, x, embedding):
        norm = functools.partial(layers.GroupNorm, self.groups, activation=nn.silu, dtype=self.dtype)
        conv = functools.partial(layers.Conv, self.features, (1, 3, 3), dtype=self.dtype)
        dense = functools.partial(layers.Dense, self.features, dtype=self.dtype)
        h = conv(name="conv_in")(norm(name="norm_in")(x))
        h = norm(name="norm_out")(h, offset=dense(name="embedding")(embedding)[:, None])
        h = conv(name="conv_out")(h)
        if x.shape[-1] != self.features:
            x = dense(name="skip")(x)
        return x + h


class TimeBlock(layers.Layer):
    """Residual block of four convolutions over time; the statistics of GroupNorm are over all frames."""

    groups: int  # of GroupNorm

    @nn.compact
    def __call__(self, x):
        h = x
        for i in range(1, 5):
            h = layers.GroupNorm(self.groups, frames=1, activation=nn.silu, dtype=self.dtype, name=f"norm_{i}")(h)
            h = layers.Conv(x.shape[-1], (3, 1, 1), zero=i == 4, dtype=self.dtype, name=f"conv_{i}")(h)
        return x + h


class Transformer(layers.Layer):
    """One pre-norm transformer block, residual.

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
        norm = functools.partial(layers.LayerNorm, eps=1e-5, dtype=self.dtype)
        attention = functools.partial(layers.Attention, self.head_dim, self.heads, plain=True, dtype=self.dtype)
        over_time = text is None

        tokens = layers.GroupNorm(self.groups, frames=1 if over_time else t, eps=1e-6, dtype=self.dtype, name="norm")(x)
        if over_time:
            tokens = tokens.reshape(b, t, h * w, c).swapaxes(1, 2)  # [B, h*w, T, C]
        tokens = tokens.reshape(-1, t if over_time else h * w, c)  # [B*h*w, T, C] or [B*T, h*w, C]
        tokens = dense(width, name="project_in")(tokens)
        tokens = tokens + attention(name="self")(norm(name="norm_self")(tokens))
        if not over_time:
            tokens = tokens.reshape(b, -1, width)  # [B, T*h*w, width]: all frames of a clip attend to one text
        tokens = tokens + attention(name="cross")(norm(name="norm_cross")(tokens), text)
        hidden, gate = jnp.split(dense(8 * width, name="expand_0")(norm(name="norm_mlp")(tokens)), 2, -1)
        hidden = hidden * nn.gelu(gate, approximate=False)  # GEGLU, arXiv:2002.05202, eq. 6
        tokens = tokens + dense(width, name="contract_0")(hidden)
        tokens = dense(c, name="project_out")(tokens)
        if over_time:
            tokens = tokens.reshape(b, h * w, t, c).swapaxes(1, 2)
        return x + tokens.reshape(x.shape)


class Block(layers.Layer):
    """FrameBlock, TimeBlock and, with `attend`, a Transformer over each frame and one over time."""

    features: int  # output channels
    attend: bool
    head_dim: int  # channels of an attention head
    groups: int  # of GroupNorm

    @nn.compact
    def __call__(self, x, embedding, text):
        x = FrameBlock(self.features, self.groups, dtype=self.dtype, name="frame")(x, embedding)
        x = TimeBlock(self.groups, dtype=self.dtype, name="time")(x)
        if self.attend:
            heads = self.features // self.head_dim
            transformer = functools.partial(Transformer, heads, self.head_dim, self.groups, dtype=self.dtype)
            x = transformer(name="attend_frame")(x, text)
            x = transformer(name="attend_time")(x)
        return layers.constrain_activation(x)


class UNet3DCondition(layers.Layer):
    """Returns a prediction [B, T, h, w, out_channels], float32.

    video: [B, T, h, w, in_channels]
    timesteps: [B], noise levels from 0 to 999
    text: [B, L, text_width]

    Tuples have one value for each resolution, the highest first. Space halves between resolutions, and time stays.
    In the names of parameters `down_0` is the highest resolution, and `up_0` is the lowest.
    """

    channels: tuple[int, ...]
    blocks: int  # at each resolution on the way down; the way up has one more
    attention: tuple[bool, ...]  # whether the blocks attend
    head_dim: int  # channels of an attention head
    groups: int  # of GroupNorm
    in_channels: int
    out_channels: int
    text_width: int  # channels of the text states

    @nn.compact
    def __call__(self, video, timesteps, text):
        first = self.channels[0]
        last = len(self.channels) - 1
        conv = functools.partial(layers.Conv, window=(1, 3, 3), dtype=self.dtype)
        dense = functools.partial(layers.Dense, 4 * first, dtype=self.dtype)
        block = functools.partial(Block, head_dim=self.head_dim, groups=self.groups, dtype=self.dtype)

        noise_level = layers.fourier_features(timesteps, first, max_period=10000.0)
        embedding = nn.silu(dense(name="noise_out")(nn.silu(dense(name="noise_in")(noise_level))))  # [B, E]
        text = text.astype(self.activation_dtype)

        x = conv(first, name="stem")(video)
        x = Transformer(8, self.head_dim, self.groups, dtype=self.dtype, name="attend_stem")(x)

        # Down
        skips = [x]
        for i, features in enumerate(self.channels):
            for j in range(self.blocks):
                x = block(features, self.attention[i], name=f"down_{i}_{j}")(x, embedding, text)
                skips.append(x)
            if i < last:
                x = conv(features, strides=(1, 2, 2), name=f"downsample_{i}")(x)
                skips.append(x)

        # Bottleneck
        for j in range(2):
            x = block(self.channels[-1], j == 0, name=f"middle_{j}")(x, embedding, text)

        # Up
        for i, (features, attend) in enumerate(zip(self.channels[::-1], self.attention[::-1])):
            for j in range(self.blocks + 1):
                x = jnp.concatenate([x, skips.pop()], -1)
                x = block(features, attend, name=f"up_{i}_{j}")(x, embedding, text)
            if i < last:
                h, w = skips[-1].shape[2:4]  # an odd size was rounded up when it was halved
                x = layers.upsample(x, (1, 2, 2))[:, :, :h, :w]
                x = conv(features, name=f"upsample_{i}")(x)

        x = layers.GroupNorm(self.groups, activation=nn.silu, dtype=self.dtype, name="norm_out")(x)
        return conv(self.out_channels, name="head")(x).astype(jnp.float32)


def param_shapes(model):
    """The parameters of a UNet3DCondition as a tree of ShapeDtypeStructs; nothing is allocated."""
    inputs = jnp.zeros((1, 1, 1, 1, model.in_channels)), jnp.zeros(1), jnp.zeros((1, 1, model.text_width))
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


# From our path, with dots for slashes, to the name in diffusers: all rules are applied, one after the other.
_NAMES = (
    (r"^stem\b", "conv_in"),
    (r"^noise_in\b", "time_embedding.linear_1"),
    (r"^noise_out\b", "time_embedding.linear_2"),
    (r"^attend_stem\b", "transformer_in"),
    (r"^norm_out\b", "conv_norm_out"),
    (r"^head\b", "conv_out"),
    (r"^(down|up)sample_(\d+)", r"\1_blocks.\2.\1samplers.0.conv"),
    (r"^(down|up)_(\d+)_(\d+)\.(\w+)", r"\1_blocks.\2.\4.\3"),
    (r"^middle_(\d)\.(\w+)", r"mid_block.\2.\1"),
    (r"\.frame\.(\d+)", r".resnets.\1"),
    (r"\.time\.(\d+)", r".temp_convs.\1"),
    (r"\.attend_frame\.(\d+)", r".attentions.\1"),
    (r"\.attend_time\.(\d+)", r".temp_attentions.\1"),
    (r"\.norm_in\b", ".norm1"),
    (r"\.norm_out\b", ".norm2"),
    (r"(resnets\.\d+)\.conv_in\b", r"\1.conv1"),
    (r"(resnets\.\d+)\.conv_out\b", r"\1.conv2"),
    (r"\.embedding\b", ".time_emb_proj"),
    (r"\.skip\b", ".conv_shortcut"),
    (r"\.norm_(\d)", r".conv\1.0"),
    (r"\.conv_1\b", ".conv1.2"),
    (r"\.conv_(\d)", r".conv\1.3"),  # after a dropout
    (r"\.project_", ".proj_"),
    (r"\.norm_self\b", ".transformer_blocks.0.norm1"),
    (r"\.norm_cross\b", ".transformer_blocks.0.norm2"),
    (r"\.norm_mlp\b", ".transformer_blocks.0.norm3"),
    (r"\.self\b", ".transformer_blocks.0.attn1"),
    (r"\.cross\b", ".transformer_blocks.0.attn2"),
    (r"\.expand_0\b", ".transformer_blocks.0.ff.net.0.proj"),
    (r"\.contract_0\b", ".transformer_blocks.0.ff.net.2"),
    (r"\.(q|k|v)(uery|ey|alue)\b", r".to_\1"),
    (r"\.out\b", ".to_out.0"),
    (r"\.(kernel|scale)$", ".weight"),
)


def diffusers_shapes(model):
    """{name: shape} of the tensors that diffusers saves for a UNet3DCondition."""
    leaves = jax.tree_util.tree_leaves_with_path(param_shapes(model))
    return {_name(path): _shape(path, leaf.shape) for path, leaf in leaves}


def load_diffusers(flat, model):
    """Converts the weights of diffusers' UNet3DConditionModel. Returns a tree of float32 arrays.

    flat: {name: array}, from safetensors.numpy.load_file("diffusion_pytorch_model.safetensors")

    Raises UserError for a missing tensor, an unknown tensor, or a wrong shape.
    """
    shapes = diffusers_shapes(model)
    for name in flat:
        if name not in shapes:
            raise UserError(f"tensor {name} has no place in this model: give the model the settings of the weights")
    for name, shape in shapes.items():
        if name not in flat:
            raise UserError(f"tensor {name} is missing: give all tensors of a UNet3DConditionModel with these settings")
        if flat[name].shape != shape:
            has = f"tensor {name} has shape {flat[name].shape}, but this model needs {shape}"
            raise UserError(f"{has}: give the model the settings of the weights")

    def load(path, leaf):
        tensor = flat[_name(path)]
        if tensor.ndim > 1:
            tensor = np.moveaxis(tensor, (1, 0), (-2, -1))  # [*window, input, output]
        return np.ascontiguousarray(tensor.reshape(leaf.shape), np.float32)

    return jax.tree_util.tree_map_with_path(load, param_shapes(model))


def _name(path):
    name = ".".join(key.key for key in path)
    return functools.reduce(lambda name, rule: re.sub(rule[0], rule[1], name), _NAMES, name)


def _shape(path, shape):
    """The shape in diffusers, [output, input, *window], of our parameter with `shape`."""
    layer, kind = path[-2].key, path[-1].key
    if kind != "kernel":
        return shape
    if layer in ("query", "key", "value"):  # [C, heads, d]
        return (shape[1] * shape[2], shape[0])
    if layer == "out":  # [heads, d, C]
        return (shape[2], shape[0] * shape[1])
    *window, inputs, outputs = (1, 1, *shape) if layer == "skip" else shape  # a skip is a convolution of one pixel
    in_a_frame = len(window) == 3 and window[0] == 1
    return (outputs, inputs, *(window[1:] if in_a_frame else window))
