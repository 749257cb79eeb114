"""Prompts, and what is given, to frames and sound: the one way to sample a trained model."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax import conditioning, samplers, stages, text
from vdm_jax.errors import UserError

BATCH = 8  # prompts sampled at once


class Generator:
    """A trained model, ready to sample: one compiled program for each (shape, method, number of steps).

    config, frozen: as in checkpoint.Trained. Call it with prompts; see `__call__`. `run` is the program: text in,
    frames and sound out.
    """

    def __init__(self, config, frozen):
        self.config, self.frozen = config, jax.device_put(frozen)
        self.run = jax.jit(self._sample, static_argnames=("method", "interval"))
        self._encode = jax.jit(lambda frozen, v, a: stages.encode(self.config, frozen, v, a))

    def __call__(self, prompts, *, seed=0, frames=None, steps=None, method=None, guidance=None, given=None):
        """-> (video uint8 [P, F, H, W, 3], audio float32 [P, N]) for P prompts, as NumPy arrays.

        frames: video frames, 1 + f_t * n (default: as trained). Prompt i draws its noise from (seed, i), whatever the
        batch. given: {'video': uint8 [n, H, W, 3] the first n frames, 'audio': float32 [N]}, either may be left out;
        what is given comes back as the autoencoder sees it, and the rest is made to fit. Unset options are the
        config's.
        """
        arrays, static = self.arguments(frames=frames, steps=steps, method=method, guidance=guidance, given=given)
        tokens = text.encode(prompts, self.config.data.text_length)
        key, batch = jax.random.key(seed), min(BATCH, len(prompts))
        made = []
        for start in range(0, len(prompts), batch):
            numbers = np.minimum(np.arange(start, start + batch), len(prompts) - 1)  # the last batch is filled up
            video, audio = self.run(key=key, numbers=numbers, tokens=tokens[numbers], **arrays, **static)
            keep = min(batch, len(prompts) - start)
            made.append((np.asarray(video)[:keep], np.asarray(audio)[:keep]))
        return tuple(np.concatenate(parts) for parts in zip(*made, strict=True))

    def arguments(self, *, frames=None, steps=None, method=None, guidance=None, given=None):
        """The options of `__call__` as arguments of `run`: -> (arrays, static ones). Raises UserError."""
        options, size = self.config.sample, stages.layout(self.config, frames)
        guidance = options.guidance if guidance is None else guidance
        if not math.isfinite(guidance):
            raise UserError(f"guidance={guidance} must be a finite number")
        masks, clean = self._given(given or {}, size)
        levels = samplers.schedule_matrix(
            steps or options.steps, size.latent_frames, self.config.denoiser.diffusion, masks, spacing=options.spacing
        )
        arrays = dict(frozen=self.frozen, clean=clean, masks=masks, levels=levels)
        arrays |= dict(guidance=float(guidance), rescale=options.rescale)
        return arrays, dict(method=method or options.method, interval=tuple(options.interval))

    def _given(self, given, size):
        """-> (masks {modality: bool [T]}, clean latents of batch 1) of what is given; the rest is zeros."""
        shapes = stages.latent_shapes(size)
        masks = {m: np.zeros(size.latent_frames, bool) for m in shapes}
        clean = {m: np.zeros((1, *shape), np.float32) for m, shape in shapes.items()}
        if not given:
            return masks, clean
        video = np.zeros((1, size.frames, self.config.data.size, self.config.data.size, 3), np.uint8)
        audio = np.zeros((1, size.samples), np.float32)
        if "video" in given:
            frames = len(given["video"])
            video[0] = given["video"][np.minimum(np.arange(size.frames), frames - 1)]
            masks["video"][: 1 + (frames - 1) // size.f_t] = True
        if "audio" in given:
            audio[0] = given["audio"]
            masks["audio"][:] = True
        z = jax.device_get(self._encode(self.frozen, video, audio))
        return masks, {m: np.asarray(z[m]) if m in given else clean[m] for m in z}

    def _sample(self, frozen, key, numbers, tokens, clean, masks, levels, guidance, rescale, method, interval):
        noise_key, sampler_key = jax.random.split(key)

        def noise(number, index, shape):
            key = jax.random.fold_in(jax.random.fold_in(noise_key, number), index)
            # Drawn flat: the same numbers, and XLA takes half a minute to compile a draw of this shape for a CPU.
            return jax.random.normal(key, (math.prod(shape),)).reshape(shape)

        z = {}
        for index, (name, x) in enumerate(sorted(clean.items())):
            drawn = jax.vmap(lambda n, i=index, s=x.shape[1:]: noise(n, i, s))(numbers)  # [B, ...]
            per_token = jnp.repeat(masks[name], x.shape[1] // len(masks[name]))  # the K tokens of a sound frame
            z[name] = jnp.where(per_token.reshape(1, -1, *(1,) * (x.ndim - 2)), x, drawn)
        model = stages.models(self.config)["denoiser"]
        denoise = conditioning.denoise_fn(model, frozen["denoiser"])
        cond = stages.encode_text(self.config, frozen, tokens)
        null = stages.encode_text(self.config, frozen, text.encode([text.NULL_TEXT], tokens.shape[1]))
        denoise = samplers.guided(denoise, null, guidance, rescale, interval)
        # Batches begin at multiples of BATCH: the noise that ddpm adds is drawn from (seed, i), too.
        sampler_key = jax.random.fold_in(sampler_key, numbers[0])
        z = samplers.sample(denoise, sampler_key, z, cond, levels, method, self.config.denoiser.diffusion)
        return stages.decode(self.config, frozen, z)
