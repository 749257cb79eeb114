"""The networks of a config, how their parameters are initialized, and pixels as the networks read them."""

import functools

import jax
import jax.numpy as jnp

from vdm_jax.data import text
from vdm_jax.errors import UserError, one_of
from vdm_jax.models.audio_autoencoder import AudioAutoencoder
from vdm_jax.models.clip import Clip
from vdm_jax.models.layers import REMAT
from vdm_jax.models.memory import MemoryWriter
from vdm_jax.models.unet import UNet
from vdm_jax.models.video_autoencoder import VideoAutoencoder
from vdm_jax.system import memory
from vdm_jax.system.parts import is_finetuned


def make_encoders(config, parts=None):
    """{stage: Flax module} of the stages before the denoiser. A published denoiser has no stage for sound.

    parts: those that are not trained here, see parts.open_parts
    """
    dtype = jnp.dtype(config.compute_dtype)
    clip = config.clip.model
    text_encoder = dict(clip.text, vocabulary=text.VOCAB_SIZE, length=config.data.text_length)
    trained = {
        "video_autoencoder": VideoAutoencoder(**config.video_autoencoder.model, dtype=dtype),
        "audio_autoencoder": AudioAutoencoder(**config.audio_autoencoder.model, dtype=dtype),
        "clip": Clip(text_encoder, clip.video.to_dict(), clip.embedding, dtype=dtype),
    }
    if is_finetuned(config):
        del trained["audio_autoencoder"]
    return trained | {stage: part.module for stage, part in (parts or {}).items()}


def make_models(config, layout, parts=None, denoiser=None):
    """{stage: Flax module} of a config; maybe a "teacher" and a "memory_writer". Raises UserError for wrong settings.

    denoiser: a published one, see parts.open_denoiser; None for our own
    """
    dtype = jnp.dtype(config.compute_dtype)
    if denoiser:
        return make_encoders(config, parts) | {"denoiser": denoiser}
    modes = remat_modes(config, "denoiser")
    # A single remat mode is for the whole model: System.apply_fn applies it. If there are several, each is for one
    # resolution, and the U-Net applies it.
    sizes = dict(latent_fps=layout.latent_fps, places=layout.video[:2], control=layout.control)
    unet = dict(config.denoiser.model, remat=modes if len(modes) > 1 else (), **sizes)
    models = make_encoders(config, parts) | {"denoiser": UNet(**unet, dtype=dtype)}
    if models["denoiser"].student:
        models["teacher"] = UNet(**{**unet, "student": False}, dtype=dtype)
    if models["denoiser"].memory:
        models["memory_writer"] = MemoryWriter(config.denoiser.model.head_dim, dtype=dtype)
    return models


def remat_modes(config, stage):
    """(mode,), or one mode for each resolution. A mode of layers.apply_remat says what is computed again in training.

    Raises UserError.
    """
    modes = tuple(one_of(f"{stage}.remat", mode, REMAT) for mode in config[stage].remat.split(","))
    is_unet = stage == "denoiser" and not is_finetuned(config)
    resolutions = len(config[stage].model.channels) if is_unet else 1
    if len(modes) not in (1, resolutions):
        takes = "one value" + (f", or one for each of {resolutions} resolutions" if resolutions > 1 else "")
        raise UserError(f"{stage}.remat={config[stage].remat!r} has {len(modes)} values: it takes {takes}")
    return modes


def init_fns(models, config, layout):
    """{name: init(key) -> params} of the models. Call them under eval_shape or jit: else Flax also runs the model."""
    text_length, text_width = config.data.text_length, models["clip"].width
    tokens = jnp.zeros((1, text_length), jnp.int32)
    video = jnp.zeros((1, layout.frames, *config.data.size, 3))
    sound = jnp.zeros((1, layout.latent_frames * layout.f_t * layout.samples_per_frame))
    latents = {name: jnp.zeros((1, *shape)) for name, shape in layout.latent_shapes.items()}
    log_snr = {name: jnp.zeros((1, layout.latent_frames)) for name in latents}
    states, pooled = jnp.zeros((1, text_length, text_width)), jnp.zeros((1, text_width))
    cond = {"states": states, "mask": jnp.ones((1, text_length), bool), "pooled": pooled, "next_log_snr": log_snr}
    cond["control"] = jnp.zeros((1, layout.latent_frames, layout.control))
    if "memory_writer" in models:
        cond["memory"] = memory.empty(config.denoiser.model, layout, 1)
    arguments = {
        "video_autoencoder": (video, jax.random.key(0)),
        "audio_autoencoder": (sound, jax.random.key(0)),
        "clip": (tokens, cond["mask"], video),
        "denoiser": (latents, log_snr, cond),
        "teacher": (latents, log_snr, cond),
    }

    def init(name, key):
        params = models[name].init(key, *arguments[name])["params"]
        if name == "denoiser" and "memory_writer" in models:
            key, tokens = jax.random.fold_in(key, 1), cond["memory"]["tokens"]
            params["memory_writer"] = models["memory_writer"].init(key, tokens, latents)["params"]
        return params

    return {name: functools.partial(init, name) for name in arguments if name in models}


def to_float(video):
    """uint8 0..255 -> float32 in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video):
    """float in [-1, 1] -> uint8 0..255."""
    return jnp.clip(jnp.round((video + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
