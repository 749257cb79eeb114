"""Samples a published text-to-video pipeline, such as ModelScope and ZeroScope; its folder is explained in parts.py."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vdm_jax import samplers, sharding
from vdm_jax.errors import UserError, one_of
from vdm_jax.run import huggingface
from vdm_jax.run.progress import progress
from vdm_jax.system import adapters
from vdm_jax.system.networks import to_uint8
from vdm_jax.system.parts import open_pipeline
from vdm_jax.system.published_denoiser import CLEAN, Denoiser
from vdm_jax.system.sampling import draw_noise

FPS = 8  # frames a second of the clips that ModelScope was trained with
SECONDS = 2.0
MAX_SECONDS = 60  # all frames of a clip are in memory together
STEPS = 50
GUIDANCE = 9.0


def is_pipeline(folder):
    """Returns whether a folder is that of a published pipeline."""
    return (epath.Path(folder) / huggingface.PIPELINE).exists()


def load(folder, dtype="float32", lora=()):
    """Returns the TextToVideo of a published folder. Raises UserError where a part is missing, damaged or of no use.

    dtype: the type of products, "float32" or "bfloat16"
    lora: adapters that are merged into the unet, texts as in adapters.merge_files
    """
    parts, schedule = open_pipeline(folder, jnp.dtype(dtype))
    mesh = sharding.make_mesh(dict(data=1, fsdp=-1, sequence=1, tensor=1))
    tokenizer = parts["text_encoder"].tokenizer
    params = {name: part.read(mesh) for name, part in parts.items()}
    params["unet"] = adapters.merge_files(params["unet"], lora)
    unet, vae, text_encoder = (part.module for part in parts.values())
    return TextToVideo(Denoiser(unet, schedule), vae, text_encoder, tokenizer, params, mesh)


@dataclasses.dataclass(frozen=True, eq=False)
class TextToVideo:
    """A published pipeline, ready to sample. Each number of frames and of steps compiles once."""

    denoiser: Denoiser
    vae: Any  # Flax module
    text_encoder: Any  # Flax module
    tokenizer: Any
    params: dict  # {"unet", "vae" and "text_encoder": parameters}
    mesh: jax.sharding.Mesh
    fps: int = FPS  # frames a second of the clips
    seconds: float = SECONDS  # default length of a clip
    size: tuple[int, int] | None = None  # default height and width in pixels; None: what the unet names

    def encode_text(self, params, tokens):
        """Tokens int32 [B, L] -> {"states": [B, L, D]}. The padding is read, too, as in diffusers."""
        mask = jnp.ones(tokens.shape, bool)
        return {"states": self.text_encoder.apply({"params": params}, tokens, mask)[0]}

    def decode(self, params, z):
        """Latents [B, T, h, w, C] -> video uint8 [B, T, H, W, 3]. One frame after the other: it takes less memory."""
        vae = self.vae
        mean, std = vae.latent_statistics
        frames = (z * std + mean).reshape(-1, 1, 1, *z.shape[2:])
        video = jax.lax.map(lambda frame: to_uint8(vae.apply({"params": params}, frame, method="decode")), frames)
        return video.reshape(*z.shape[:2], *video.shape[3:])

    def clips(self, prompts, *, seed=0, seconds=None, size=None, steps=None, method=None, guidance=None, noise=None):
        """Returns videos, uint8 [P, F, H, W, 3], of P prompts.

        seed: the noise of clip i is drawn from (seed, i)
        seconds: length of a clip; None: the default
        size: (height, width) in pixels; None: the default
        steps: None: 50
        method: of samplers.METHODS; None: that of the folder
        guidance: weight of the text, against the empty prompt; None: 9; 1: no guidance
        noise: float [P, F, h, w, C] in place of that of the seed, or None

        Raises UserError where these do not fit.
        """
        unet, vae, schedule = self.denoiser.unet, self.vae, self.denoiser.schedule
        seconds = self.seconds if seconds is None else seconds
        size = self.size if size is None else size
        if not 0 < seconds <= MAX_SECONDS:
            raise UserError(f"seconds={seconds}: give a length above 0 and up to {MAX_SECONDS}")
        frames = max(1, round(seconds * self.fps))
        steps, guidance = STEPS if steps is None else steps, GUIDANCE if guidance is None else guidance
        method = one_of("method", method or schedule.method, samplers.METHODS)
        if not np.isfinite(guidance):
            raise UserError(f"guidance={guidance} must be a finite number")
        if size is None and unet.sample_size is None:
            raise UserError("the config.json of the unet has no sample_size: give a size")
        latents = np.broadcast_to(unet.sample_size, 2) if size is None else np.array(size) // vae.f_s
        if not (latents > 0).all() or (size is not None and any(np.array(size) % vae.f_s)):
            raise UserError(f"size={size} must be multiples of {vae.f_s} pixels, above 0")
        shape = (frames, *map(int, latents), unet.in_channels)
        levels = schedule.levels(steps, method, frames)
        null = self.tokenizer.encode([""])[0]
        tokens = self.tokenizer.encode(list(prompts))[0]
        key, made = jax.random.key(seed), []
        with jax.set_mesh(self.mesh), progress("sampling", len(prompts), "clip") as advance:
            for number in range(len(prompts)):
                given = None if noise is None else {"video": jnp.asarray(noise[number : number + 1], jnp.float32)}
                z = given or draw_noise(key, np.array([number]), {"video": shape}, 0)
                video = self._program(
                    self.params, key, z, tokens[number : number + 1], null, levels, guidance, method, guidance != 1
                )
                made.append(np.asarray(video))
                advance(1)
        return np.concatenate(made)

    @functools.cached_property
    def _program(self):
        return jax.jit(self._sample, static_argnums=(7, 8))

    def _sample(self, params, key, z, tokens, null, levels, weight, method, is_guided):
        """Returns the video, uint8 [B, F, H, W, 3], of noise z; guided by the text where is_guided."""
        params = {name: sharding.all_gather_params(tree, self.vae.dtype) for name, tree in params.items()}
        cond = self.encode_text(params["text_encoder"], tokens)
        terms = []
        if is_guided:
            terms = samplers.text_guidance(weight, self.encode_text(params["text_encoder"], null))
        denoise_fn = samplers.guided(functools.partial(self.denoiser.apply, {"params": params["unet"]}), terms)
        config = {"target": self.denoiser.schedule.target, "log_snr_max": CLEAN}
        z = samplers.sample(denoise_fn, key, z, cond, levels, method, config)
        return sharding.replicate(self.decode(params["vae"], z["video"]))
