"""The denoiser: a 3-D U-Net for video latents, and a 1-D U-Net beside it for sound latents.

Both streams share one time axis. Each latent frame of each modality has its own noise level. At the lower resolutions
the streams attend to each other. This file knows neither the noise schedule nor what the output predicts.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdm_jax.models import layers
from vdm_jax.models.memory import MemoryContext, MemoryReader

KERNEL_SIZE = {"video": (1, 3, 3), "audio": (3,)}  # of the first and last convolutions, and of those after upsampling


class NoiseEmbedding(layers.Layer):
    """The embedding of noise level, seconds since the start, text and control: [B, T, E], for one modality's frames.

    Every residual block reads it.

    log_snr: [B, T]
    pooled: [B, D_text], the text in one vector
    next_log_snr: [B, T], the noise level that a step goes to; None for a network that does not read it
    control: [B, T, A], the buttons held in each frame; None for a network without control
    """

    features: int  # E
    latent_fps: float  # latent frames per second

    @nn.compact
    def __call__(self, log_snr, pooled, next_log_snr=None, control=None):
        dense = functools.partial(layers.Dense, self.features, **self.common)
        # log_snr is in about [-12, 12]; times are in seconds. With the factor 10 a difference of 0.01 turns the fastest
        # sinusoid by 0.1 radians, enough for the network to notice.
        features = functools.partial(layers.fourier_features, features=self.features, max_period=1000.0)
        seconds = jnp.arange(log_snr.shape[1]) / self.latent_fps
        x = nn.silu(dense(name="noise_in")(features(log_snr * 10.0)))
        # This pos_embed embeds the time of a frame, [T, E]. The one in SpaceTimeAttention embeds places in a frame.
        time = dense(name="pos_embed")(features(seconds * 10.0))
        x = dense(name="noise_out")(x) + time[None]
        if next_log_snr is not None:
            x = x + dense(name="next_noise", zero=True)(features(next_log_snr * 10.0))
        if control is not None:
            x = x + dense(name="control_out", zero=True)(nn.silu(dense(name="control_in")(control)))
        return nn.silu(x + dense(name="text")(pooled)[:, None])


class SpaceTimeAttention(layers.Layer):
    """Self-attention over all tokens of one stream, then cross-attention to the text; both are residual.

    x: [B, T, h, w, C] or [B, K*T, C]
    seconds: [tokens], the time of each token
    cond: {'states': [B, L, D_text], 'mask': bool [B, L]}, the text
    """

    head_dim: int  # channels of a head
    places: tuple[int, int]  # h, w of the learned embedding of places; for another size it is interpolated

    @nn.compact
    def __call__(self, x, seconds, cond):
        channels = x.shape[-1]
        tokens = x.reshape(x.shape[0], -1, channels)  # [B, T*h*w or K*T, C]
        pos_embed = 0.0
        if x.ndim == 5:  # the position within a frame; the rotary embeddings hold the time
            shape = (1, *x.shape[2:4], channels)
            pos_embed = self.param("pos_embed", nn.initializers.normal(0.02), (1, *self.places, channels))
            if pos_embed.shape != shape:  # arXiv:2010.11929, section 3.2
                pos_embed = jax.image.resize(pos_embed, shape, "linear")
            pos_embed = jnp.broadcast_to(pos_embed, (x.shape[1], *shape[1:])).reshape(1, -1, channels)  # [1, T*h*w, C]
        attention = functools.partial(layers.Attention, self.head_dim, **self.common)
        norm = functools.partial(layers.LayerNorm, **self.common)
        tokens = tokens + attention(name="self")(norm(name="norm_self")(tokens) + pos_embed, positions=seconds)
        states = cond["states"].astype(self.activation_dtype)
        tokens = tokens + attention(name="cross")(norm(name="norm_cross")(tokens), states, cond["mask"])
        return layers.constrain_activation(tokens.reshape(x.shape))


class CrossModalAttention(layers.Layer):
    """Video tokens attend to sound tokens, and sound tokens to video tokens; neither sees the result of the other.

    The rotary positions of both are in seconds. What attention adds is zero at first, so the streams start independent.

    video: [B, T, h, w, C]
    audio: [B, K*T, D]
    video_seconds, audio_seconds: [T*h*w] and [K*T], the time of each token
    """

    head_dim: int  # channels of a head

    @nn.compact
    def __call__(self, video, audio, video_seconds, audio_seconds):
        tokens = video.reshape(video.shape[0], -1, video.shape[-1])  # [B, T*h*w, C]
        norm = functools.partial(layers.LayerNorm, **self.common)
        v, a = norm(name="norm_video")(tokens), norm(name="norm_audio")(audio)
        attention = functools.partial(layers.Attention, self.head_dim, **self.common)
        to_video = attention(name="to_video")(v, a, positions=video_seconds, context_positions=audio_seconds)
        to_audio = attention(name="to_audio")(a, v, positions=audio_seconds, context_positions=video_seconds)
        return (tokens + to_video).reshape(video.shape), audio + to_audio


class TextRefiner(layers.Layer):
    """Transformer layers on the text states [B, L, D], trained with the denoiser.

    A contrastive text encoder represents which words a text has, but hardly which color belongs to which shape
    (arXiv:2210.01936). These layers can learn the rest. Words that belong together stand close together, therefore the
    layers have rotary positions. At first the layers change nothing.
    """

    depth: int  # number of layers
    head_dim: int  # channels of a head

    @nn.compact
    def __call__(self, states, mask):
        x = states.astype(self.activation_dtype)
        heads = max(1, x.shape[-1] // self.head_dim)
        # A token is a byte. Positions are divided by 20, so the rotary periods of 1 to 100 become 20 to 2,000 bytes.
        positions = jnp.arange(x.shape[1]) / 20
        for i in range(self.depth):
            x = layers.transformer_layer(x, mask, heads, i, positions, zero=True, **self.common)
        return x


class UNet(layers.Layer):
    """Audio-video 3-D U-Net (video: arXiv:2204.03458; one noise level per frame: arXiv:2407.01392).

    Returns a prediction like z, float32.

    z: {'video': [B, T, h, w, C], 'audio': [B, K*T, D]}
    log_snr: {'video': [B, T], 'audio': [B, T]}, noise levels
    cond: {'states': [B, L, D_text], 'mask': bool [B, L], 'pooled': [B, D_text]}, the text; with `student` also
        'next_log_snr', a dict like log_snr: the noise level that the step goes to; with `control` also 'control'
        [B, T, A], the buttons held in each latent frame, in 0..1, or -1 where they are not known; with `memory` it may
        have 'memory', see MemoryContext

    Tuples have one value for each resolution i, the highest first; time_strides has one value fewer. From one
    resolution to the next, height, width and the number of sound tokens halve. The lowest resolution has a bottleneck,
    with SpaceTimeAttention and CrossModalAttention.
    """

    patch: int  # patch x patch places of a latent frame become one place, with their channels stacked
    channels: tuple[int, ...]  # of the video stream
    audio_channels: tuple[int, ...]  # of the sound stream; () is `channels`
    blocks: tuple[int, ...]  # residual blocks on the way down, and as many on the way up
    attention: tuple[bool, ...]  # whether a SpaceTimeAttention follows the blocks
    cross_modal: tuple[bool, ...]  # whether a CrossModalAttention follows the blocks
    time_strides: tuple[int, ...]  # 1 or 2: how time shrinks from resolution i to i + 1
    factorized: bool  # convolutions 1x3x3 then 3x1x1, or else 3x3x3
    head_dim: int  # channels of an attention head
    embedding: int  # size of the embedding of noise level, seconds and text
    text_layers: int  # layers of the TextRefiner
    groups: int  # of GroupNorm
    latent_fps: float  # latent frames per second
    places: tuple[int, int]  # h, w of the latents that the parameters are made for; others may be given
    student: bool = False  # whether cond has 'next_log_snr', see system/distillation.py
    control: int = 0  # A, buttons of cond['control']; 0: cond has no control
    memory: int = 0  # M, memory tokens of cond['memory']; 0: the network has no memory
    memory_width: int = 0  # D, channels of a memory token
    memory_past: int = 0  # windows before the context that the memory keeps as latents
    remat: tuple[str, ...] = ()  # a mode of layers.apply_remat per resolution, or (); the bottleneck has the last one

    @nn.compact
    def __call__(self, z, log_snr, cond):
        output_length = {m: z[m].shape[1] for m in z}  # T, and K*T
        after = cond["next_log_snr"] if self.student else {m: None for m in z}
        control = cond["control"] if self.control else None
        z, log_snr, after, control = _pad_frames((z, log_snr, after, control), math.prod(self.time_strides))
        frames = z["video"].shape[1]
        channels = {"video": self.channels, "audio": self.audio_channels or self.channels}
        refine = TextRefiner(self.text_layers, self.head_dim, **self.common, name="text")
        cond = {**cond, "states": refine(cond["states"], cond["mask"])}
        memory = cond.get("memory") if self.memory else None
        if memory is not None:
            memory = MemoryContext(**self.common, name="memory")(memory)
        embed = functools.partial(NoiseEmbedding, self.embedding, self.latent_fps, **self.common)
        embedding = {
            m: embed(name=f"embedding_{m}")(log_snr[m], cond["pooled"], after[m], control) for m in ("video", "audio")
        }
        block = dict(factorized=self.factorized, groups=self.groups, **self.common)
        conv = functools.partial(layers.Conv, **self.common)

        def seconds(x):
            """The time of the centre of every token of x, in seconds. Latent frame t is centred on t / latent_fps."""
            lengths = {m: x[m].shape[1] for m in x}
            times = {m: ((jnp.arange(n) + 0.5) * (frames / n) - 0.5) / self.latent_fps for m, n in lengths.items()}
            return {**times, "video": jnp.repeat(times["video"], math.prod(x["video"].shape[2:4]))}

        def with_remat(module, resolution):
            return layers.apply_remat(module, self.remat[resolution]) if self.remat else module

        def residual(x, resolution, name):
            # A frame of this resolution merges one or more latent frames. Its embedding is their mean.
            merged_frames = x["video"].shape[1]
            merged = {m: e.reshape(e.shape[0], merged_frames, -1, e.shape[-1]).mean(2) for m, e in embedding.items()}
            module = with_remat(layers.ResidualBlock, resolution)
            return {m: module(channels[m][resolution], **block, name=f"{name}_{m}")(x[m], merged[m]) for m in x}

        def attend(x, resolution, name, attention, cross_modal):
            time = seconds(x)
            if attention:
                halvings = resolution % len(self.channels)
                places = tuple(n // (self.patch * 2**halvings) for n in self.places)
                module = with_remat(SpaceTimeAttention, resolution)
                module = functools.partial(module, self.head_dim, places, **self.common)
                x = {m: module(name=f"{name}_attention_{m}")(x[m], time[m], cond) for m in x}
                if memory is not None:
                    reader = functools.partial(MemoryReader, self.head_dim, **self.common)
                    x = {m: reader(name=f"{name}_memory_{m}")(x[m], memory) for m in x}
            if cross_modal:
                module = functools.partial(with_remat(CrossModalAttention, resolution), self.head_dim, **self.common)
                video, audio = module(name=f"{name}_cross_modal")(x["video"], x["audio"], time["video"], time["audio"])
                x = {"video": layers.constrain_activation(video), "audio": layers.constrain_activation(audio)}
            return x

        # Down
        x = {"video": layers.space_to_depth(z["video"], self.patch), "audio": z["audio"]}
        x = {m: conv(channels[m][0], KERNEL_SIZE[m], name=f"stem_{m}")(x[m]) for m in x}
        skips = []
        resolutions = range(len(self.channels))
        for i in resolutions:
            for j in range(self.blocks[i]):
                x = residual(x, i, f"down_{i}_{j}")
                if j == self.blocks[i] - 1:
                    x = attend(x, i, f"down_{i}", self.attention[i], self.cross_modal[i])
                skips.append(x)
            if i < len(self.channels) - 1:
                s = {"video": (self.time_strides[i], 2, 2), "audio": (2,)}
                x = {m: conv(channels[m][i], s[m], strides=s[m], name=f"downsample_{i}_{m}")(x[m]) for m in x}

        # Bottleneck
        x = residual(x, -1, "middle_in")
        x = attend(x, -1, "middle", attention=True, cross_modal=True)
        x = residual(x, -1, "middle_out")

        # Up
        for i in reversed(resolutions):
            for j in range(self.blocks[i]):
                skip = skips.pop()
                x = residual({m: jnp.concatenate([x[m], skip[m]], -1) for m in x}, i, f"up_{i}_{j}")
            x = attend(x, i, f"up_{i}", self.attention[i], self.cross_modal[i])
            if i:
                factors = {"video": (self.time_strides[i - 1], 2, 2), "audio": (2,)}
                x = {m: layers.upsample(x[m], factors[m]) for m in x}
                x = {m: conv(channels[m][i - 1], KERNEL_SIZE[m], name=f"upsample_{i}_{m}")(x[m]) for m in x}

        # Head
        norm = functools.partial(layers.GroupNorm, self.groups, frames=frames, activation=nn.silu, **self.common)
        x = {m: norm(name=f"norm_{m}")(x[m]) for m in x}  # every latent frame by its own mean and variance
        features = {"video": z["video"].shape[-1] * self.patch**2, "audio": z["audio"].shape[-1]}
        x = {m: conv(features[m], KERNEL_SIZE[m], zero=True, name=f"head_{m}")(x[m]) for m in x}
        x = {**x, "video": layers.depth_to_space(x["video"], self.patch)}
        return {m: x[m][:, : output_length[m]].astype(jnp.float32) for m in x}


def _pad_frames(inputs, multiple):
    """Repeats the last latent frame, with its noise levels, until the number of frames is a multiple of `multiple`.

    inputs: a tuple of trees, z first. Axis 1 of every array holds latent frames, or their sound tokens.
    """
    frames = inputs[0]["video"].shape[1]
    extra = -frames % multiple

    def pad(x):
        last = x[:, -(x.shape[1] // frames) :]  # one latent frame, or its K sound tokens
        return jnp.concatenate([x] + [last] * extra, 1)

    return jax.tree.map(pad, inputs) if extra else inputs
