"""The denoiser: a 3-D U-Net over video latents with a 1-D stream over sound latents beside it.

Both streams share one time axis. Each latent frame of each modality has its own noise level; at the low-resolution
levels the streams read each other. Nothing here knows the noise schedule or what the output stands for.
"""

import functools
import math

import flax.linen as nn
import jax.numpy as jnp

from vdm_jax.models.layers import (
    Attention,
    Conv,
    Dense,
    GroupNorm,
    LayerNorm,
    ResidualBlock,
    activation_dtype,
    apply_remat,
    constrain_activation,
    depth_to_space,
    fourier_features,
    space_to_depth,
    transformer_layer,
)


class NoiseEmbedding(nn.Module):
    """Noise level [B, T], frame time and pooled text [B, D] -> embedding [B, T, E] of one modality."""

    features: int
    latent_fps: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, log_snr, pooled):
        dense = functools.partial(Dense, self.features, dtype=self.dtype)
        # Levels span about [-12, 12]; a step of 0.01 should be seen, so they are stretched before the sinusoids.
        level = fourier_features(log_snr * 10.0, self.features, max_period=1000.0)
        seconds = jnp.arange(log_snr.shape[1]) / self.latent_fps
        place = fourier_features(seconds * 10.0, self.features, max_period=1000.0)
        x = dense(name="level_in")(level)
        x = dense(name="level_out")(nn.silu(x)) + dense(name="place")(place)[None]
        x = x + dense(name="text")(pooled)[:, None]
        return nn.silu(x)


class SpaceTimeAttention(nn.Module):
    """Self-attention over all tokens of one stream, then cross-attention to the text; both residual.

    x is [B, T, h, w, C] or [B, K*T, C]; seconds [tokens] places each on the time axis; text states [B, L, D].
    """

    head_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, seconds, cond):
        channels = x.shape[-1]
        tokens = x.reshape(x.shape[0], -1, channels)
        if x.ndim == 5:  # where a token lies in its frame; time is told by the rotary positions
            shape = (1, *x.shape[2:4], channels)
            place = self.param("place", nn.initializers.normal(0.02), shape)
            place = jnp.broadcast_to(place, (x.shape[1], *shape[1:])).reshape(1, -1, channels)
        else:
            place = 0.0
        attention = functools.partial(Attention, max(1, channels // self.head_dim), self.head_dim, dtype=self.dtype)
        norm = functools.partial(LayerNorm, dtype=self.dtype)
        tokens = tokens + attention(name="self")(norm(name="norm_self")(tokens) + place, positions=seconds)
        words = cond["states"].astype(activation_dtype(self.dtype))
        tokens = tokens + attention(name="cross")(norm(name="norm_cross")(tokens), words, cond["mask"])
        return constrain_activation(tokens.reshape(x.shape))


class CrossModalAttention(nn.Module):
    """Video and sound tokens attend to each other, both reading the other's state from before the exchange.

    Rotary positions are in seconds on both sides; outputs are zero-initialised, so streams start out independent.
    """

    head_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, video, audio, video_seconds, audio_seconds):
        v = video.reshape(video.shape[0], -1, video.shape[-1])
        norm = functools.partial(LayerNorm, dtype=self.dtype)
        v_in, a_in = norm(name="norm_video")(v), norm(name="norm_audio")(audio)
        heads = lambda x: max(1, x.shape[-1] // self.head_dim)  # noqa: E731
        attention = functools.partial(Attention, head_dim=self.head_dim, dtype=self.dtype)
        to_video = attention(heads(v), name="to_video")(
            v_in, a_in, positions=video_seconds, context_positions=audio_seconds
        )
        to_audio = attention(heads(audio), name="to_audio")(
            a_in, v_in, positions=audio_seconds, context_positions=video_seconds
        )
        return (v + to_video).reshape(video.shape), audio + to_audio


class TextRefiner(nn.Module):
    """Transformer layers on the text states [B, L, D], trained with the denoiser.

    A contrastive text encoder names what is there, and hardly tells which color goes with which shape
    (arXiv:2210.01936): what it leaves out can be learnt here. Which words belong together shows in how far apart they
    are, hence the rotary positions. The layers start as nothing.
    """

    layers: int
    head_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, states, mask):
        x = states.astype(activation_dtype(self.dtype))
        heads = max(1, x.shape[-1] // self.head_dim)
        positions = jnp.arange(x.shape[1]) / 20  # bytes to rotary periods of 20 bytes, some three words, to 2,000
        for i in range(self.layers):
            x = transformer_layer(x, mask, heads, i, positions, zero=True, dtype=self.dtype)
        return x


class UNet(nn.Module):
    """Audio-video 3-D U-Net (video: arXiv:2204.03458; levels per frame: arXiv:2407.01392).

    z = {'video': [B, T, h, w, C], 'audio': [B, K*T, D]}, log_snr = {'video': [B, T], 'audio': [B, T]},
    cond = {'states': [B, L, D_text], 'mask': bool [B, L], 'pooled': [B, D_text]} -> a tree like z, float32.

    The picture is cut into squares of patch x patch latents first. Level i has channels[i], for sound
    audio_channels[i] (or the same where that is empty), and blocks[i] residual blocks on the way down and again on the
    way up; space halves between levels, time by time_strides[i] (1 or 2), sound always by 2. attention[i] puts a
    SpaceTimeAttention, cross_modal[i] a CrossModalAttention after its blocks; the bottleneck has both. text_layers
    transformer layers refine the text. remat[i], where given, says what the backward pass of the level's blocks and
    mixers computes again (see layers.apply_remat); the bottleneck is of the last level.
    """

    patch: int
    channels: tuple[int, ...]
    audio_channels: tuple[int, ...]
    blocks: tuple[int, ...]
    attention: tuple[bool, ...]
    cross_modal: tuple[bool, ...]
    time_strides: tuple[int, ...]
    factorized: bool
    head_dim: int
    embedding: int
    text_layers: int
    groups: int
    latent_fps: float
    remat: tuple[str, ...] = ()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, z, log_snr, cond):
        asked = z["video"].shape[1], z["audio"].shape[1]
        z, log_snr = _pad_frames(z, log_snr, math.prod(self.time_strides))
        frames = z["video"].shape[1]
        channels = {"video": self.channels, "audio": self.audio_channels or self.channels}
        refine = TextRefiner(self.text_layers, self.head_dim, self.dtype, name="text")
        cond = {**cond, "states": refine(cond["states"], cond["mask"])}
        embed = functools.partial(NoiseEmbedding, self.embedding, self.latent_fps, dtype=self.dtype)
        embedding = {m: embed(name=f"embedding_{m}")(log_snr[m], cond["pooled"]) for m in ("video", "audio")}
        block = dict(factorized=self.factorized, groups=self.groups, dtype=self.dtype)
        conv = functools.partial(Conv, dtype=self.dtype)

        def seconds(x):
            """Centre of every token of x on the time axis, in seconds; latent frame t is centred on t / latent_fps."""
            steps = x["video"].shape[1]
            t = ((jnp.arange(steps) + 0.5) * (frames / steps) - 0.5) / self.latent_fps
            n = x["audio"].shape[1]
            a = ((jnp.arange(n) + 0.5) * (frames / n) - 0.5) / self.latent_fps
            return {"video": jnp.repeat(t, x["video"].shape[2] * x["video"].shape[3]), "audio": a}

        def at(level, module):
            return apply_remat(module, self.remat[level]) if self.remat else module

        def residual(x, level, name):
            pooled = {m: _to_length(e, x["video"].shape[1]) for m, e in embedding.items()}
            made = at(level, ResidualBlock)
            return {m: made(channels[m][level], **block, name=f"{name}_{m}")(x[m], pooled[m]) for m in x}

        def mix(x, level, name, attend, cross_modal):
            where = seconds(x)
            if attend:
                made = functools.partial(at(level, SpaceTimeAttention), self.head_dim, self.dtype)
                x = {m: made(name=f"{name}_attention_{m}")(x[m], where[m], cond) for m in x}
            if cross_modal:
                swap = at(level, CrossModalAttention)(self.head_dim, self.dtype, name=f"{name}_exchange")
                video, audio = swap(x["video"], x["audio"], where["video"], where["audio"])
                x = {"video": constrain_activation(video), "audio": constrain_activation(audio)}
            return x

        # Down
        x = {
            "video": conv(channels["video"][0], (1, 3, 3), name="stem_video")(space_to_depth(z["video"], self.patch)),
            "audio": conv(channels["audio"][0], (3,), name="stem_audio")(z["audio"]),
        }
        skips = []
        levels = range(len(self.channels))
        for i in levels:
            for j in range(self.blocks[i]):
                x = residual(x, i, f"down_{i}_{j}")
                if j == self.blocks[i] - 1:
                    x = mix(x, i, f"down_{i}", self.attention[i], self.cross_modal[i])
                skips.append(x)
            if i < len(self.channels) - 1:
                strides = {"video": (self.time_strides[i], 2, 2), "audio": (2,)}
                x = {m: conv(channels[m][i], s, strides=s, name=f"shrink_{i}_{m}")(x[m]) for m, s in strides.items()}

        # Bottleneck
        x = residual(x, -1, "middle_in")
        x = mix(x, -1, "middle", attend=True, cross_modal=True)
        x = residual(x, -1, "middle_out")

        # Up
        for i in reversed(levels):
            for j in range(self.blocks[i]):
                skip = skips.pop()
                x = {m: jnp.concatenate([x[m], skip[m]], -1) for m in x}
                x = residual(x, i, f"up_{i}_{j}")
            x = mix(x, i, f"up_{i}", self.attention[i], self.cross_modal[i])
            if i:
                grow = {"video": ((1, 3, 3), (self.time_strides[i - 1], 2, 2)), "audio": ((3,), (2,))}
                x = {
                    m: conv(channels[m][i - 1], window, upsample=factors, name=f"grow_{i}_{m}")(x[m])
                    for m, (window, factors) in grow.items()
                }

        # Head
        norm = functools.partial(GroupNorm, self.groups, activation=nn.silu, dtype=self.dtype)
        video = norm(name="norm_video")(x["video"])
        audio = norm(frames=frames, name="norm_audio")(x["audio"])
        video = conv(z["video"].shape[-1] * self.patch**2, (1, 3, 3), zero=True, name="head_video")(video)
        video = depth_to_space(video, self.patch)
        audio = conv(z["audio"].shape[-1], (3,), zero=True, name="head_audio")(audio)
        return {
            "video": video[:, : asked[0]].astype(jnp.float32),
            "audio": audio[:, : asked[1]].astype(jnp.float32),
        }


def _pad_frames(z, log_snr, multiple):
    """Repeats the last latent frame, with its noise level, until the number of frames is a multiple."""
    frames = z["video"].shape[1]
    extra = -frames % multiple
    if not extra:
        return z, log_snr
    per_frame = z["audio"].shape[1] // frames  # K
    last = z["audio"][:, -per_frame:]
    z = {
        "video": jnp.concatenate([z["video"]] + [z["video"][:, -1:]] * extra, 1),
        "audio": jnp.concatenate([z["audio"]] + [last] * extra, 1),
    }
    return z, {m: jnp.concatenate([level] + [level[:, -1:]] * extra, 1) for m, level in log_snr.items()}


def _to_length(embedding, frames):
    """Per-frame embedding [B, T, E] at a level with fewer frames: the mean of the frames merged."""
    b, t, e = embedding.shape
    return embedding if t == frames else embedding.reshape(b, frames, t // frames, e).mean(2)
