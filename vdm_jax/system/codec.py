"""Converts clips and text to what the denoiser reads, and latents back to clips."""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vdm_jax import sharding
from vdm_jax.data import text
from vdm_jax.errors import UserError, one_of
from vdm_jax.models.audio_autoencoder import AudioAutoencoder
from vdm_jax.models.clip import Clip
from vdm_jax.models.layers import REMAT, apply_remat
from vdm_jax.models.unet import UNet
from vdm_jax.models.video_autoencoder import VideoAutoencoder
from vdm_jax.system.layout import Layout


def make_models(config, layout):
    """{stage: Flax module} of a config, and the "teacher" of a student. Raises UserError for wrong settings."""
    dtype = jnp.dtype(config.compute_dtype)
    clip = config.clip.model
    text_encoder = dict(clip.text, vocabulary=text.VOCAB_SIZE, length=config.data.text_length)
    modes = remat_modes(config, "denoiser")
    # The U-Net applies the remat modes itself if each resolution has one. Codec.apply_fn applies a single mode.
    unet = dict(config.denoiser.model, remat=modes if len(modes) > 1 else (), latent_fps=layout.latent_fps)
    models = {
        "video_autoencoder": VideoAutoencoder(**config.video_autoencoder.model, dtype=dtype),
        "audio_autoencoder": AudioAutoencoder(**config.audio_autoencoder.model, dtype=dtype),
        "clip": Clip(text_encoder, clip.video.to_dict(), clip.embedding, dtype=dtype),
        "denoiser": UNet(**unet, dtype=dtype),
    }
    if models["denoiser"].student:
        models["teacher"] = UNet(**{**unet, "student": False}, dtype=dtype)
    return models


def remat_modes(config, stage):
    """(mode,), or one mode for each resolution. It says what the backward pass computes again. Raises UserError."""
    modes = tuple(one_of(f"{stage}.remat", mode, REMAT) for mode in config[stage].remat.split(","))
    is_unet = "cross_modal" in config[stage].model
    resolutions = len(config[stage].model.channels) if is_unet else 1
    if len(modes) not in (1, resolutions):
        takes = "one value" + (f", or one for each of {resolutions} resolutions" if resolutions > 1 else "")
        raise UserError(f"{stage}.remat={config[stage].remat!r} has {len(modes)} values: it takes {takes}")
    return modes


def init_fns(models, config, layout):
    """{name: init(key) -> params} of the models. Under eval_shape or jit the forward pass is not computed."""
    side, text_length, text_width = config.data.size, config.data.text_length, config.clip.model.text.width
    tokens = jnp.zeros((1, text_length), jnp.int32)
    video = jnp.zeros((1, layout.frames, side, side, 3))
    sound = jnp.zeros((1, layout.latent_frames * layout.f_t * layout.samples_per_frame))
    latents = {name: jnp.zeros((1, *shape)) for name, shape in layout.latent_shapes.items()}
    log_snr = {name: jnp.zeros((1, layout.latent_frames)) for name in latents}
    states, pooled = jnp.zeros((1, text_length, text_width)), jnp.zeros((1, text_width))
    cond = {"states": states, "mask": jnp.ones((1, text_length), bool), "pooled": pooled, "next_log_snr": log_snr}
    arguments = {
        "video_autoencoder": (video, jax.random.key(0)),
        "audio_autoencoder": (sound, jax.random.key(0)),
        "clip": (tokens, cond["mask"], video),
        "denoiser": (latents, log_snr, cond),
        "teacher": (latents, log_snr, cond),
    }
    return {name: lambda key, name=name: models[name].init(key, *arguments[name])["params"] for name in models}


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """All models of a config, the denoiser too, with the conversions between clips, latents and text.

    `params` in the methods is {stage: tree of parameters}. It may have one more key, 'statistics', for the latents:
    {modality: {'mean' [C], 'std' [C]}}. A method reads only the entries that it needs.
    """

    config: ConfigDict
    layout: Layout
    models: dict  # {stage: Flax module}; a student has a "teacher", too

    def apply(self, stage, params, *arguments, method=None):
        """The output of a stage's model. method: of the module; None: __call__."""
        with jax.named_scope(f"{stage}_{method}" if method else stage):
            gathered = sharding.all_gather_params(params[stage], self.models[stage].dtype)
            return self.models[stage].apply({"params": gathered}, *arguments, method=method)

    def apply_fn(self, stage, method=None):
        """Returns call(params of the stage, *arguments), which does what `apply` does, with config.<stage>.remat."""

        def call(params, *arguments):
            return self.apply(stage, {stage: params}, *arguments, method=method)

        modes = remat_modes(self.config, stage)
        return apply_remat(call, modes[0]) if len(modes) == 1 else call  # else by resolution, inside the model

    def encode(self, params, video, audio):
        """Clips, uint8 [B, F, H, W, 3] and float32 [B, N] -> latents {'video': [B, T, h, w, C], 'audio': [B, K*T, D]}.

        With 'statistics', every channel gets mean 0 and variance 1.
        """
        z = {
            "video": self.apply("video_autoencoder", params, to_float(video), method="encode")[0],
            "audio": self.apply("audio_autoencoder", params, self.pad_audio(audio), method="encode")[0],
        }
        if "statistics" not in params:
            return z
        statistics = params["statistics"]
        return {name: (z[name] - statistics[name]["mean"]) / statistics[name]["std"] for name in z}

    def decode(self, params, z):
        """Latents, as `encode` gives them with 'statistics' -> (video uint8 [B, F, H, W, 3], audio float32 [B, N])."""
        statistics = params["statistics"]
        z = {name: z[name] * statistics[name]["std"] + statistics[name]["mean"] for name in z}
        video = self.apply("video_autoencoder", params, z["video"], method="decode")
        audio = self.apply("audio_autoencoder", params, z["audio"], method="decode")
        return to_uint8(video), self.trim_audio(audio)

    def reconstruct(self, stage, params, x):
        """x encoded and decoded by one autoencoder, without noise in the latents: video uint8 or audio float32."""
        is_video = stage == "video_autoencoder"
        z = self.apply(stage, params, to_float(x) if is_video else self.pad_audio(x), method="encode")[0]
        out = self.apply(stage, params, z, method="decode")
        return to_uint8(out) if is_video else self.trim_audio(out)

    def encode_text(self, params, tokens):
        """Tokens int32 [B, L] -> text {'states': [B, L, D_text], 'mask': bool [B, L], 'pooled': [B, D_text]}."""
        mask = text.mask(tokens)
        return self.apply("clip", params, tokens, mask, method="encode_text") | {"mask": mask}

    def encode_null_text(self, params):
        """The encoded null text, of batch size 1, as `encode_text` gives it."""
        return self.encode_text(params, text.encode([text.NULL_TEXT], self.config.data.text_length))

    def pad_audio(self, audio):
        """[B, N] -> [B, T * f_t * samples_per_frame], with f_t - 1 video frames of silence before frame 0.

        The first latent frame holds one video frame, but its sound tokens cover the length of f_t frames.
        """
        return jnp.pad(audio, ((0, 0), ((self.layout.f_t - 1) * self.layout.samples_per_frame, 0)))

    def trim_audio(self, audio):
        """Undoes `pad_audio`, and limits the sound to [-1, 1]."""
        return jnp.clip(audio[:, (self.layout.f_t - 1) * self.layout.samples_per_frame :], -1.0, 1.0)


def to_float(video):
    """uint8 0..255 -> float32 in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video):
    """float in [-1, 1] -> uint8 0..255."""
    return jnp.clip(jnp.round((video + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
