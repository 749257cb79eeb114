"""Prompts, and what is given, to frames and sound: the one way to sample a trained model."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax import conditioning, samplers, sharding, tasks
from vdm_jax.data import text
from vdm_jax.diffusion import add_noise, broadcast_to_latent
from vdm_jax.errors import UserError, one_of
from vdm_jax.sharding import constrain
from vdm_jax.system import codec as stages

BATCH = 8  # prompts sampled at once
FADE = 0.005  # s, over which the sound of one window of a roll-out gives way to the next one's


class Generator:
    """A trained model, ready to sample: one compiled program for each (shape, method, number of steps).

    config, frozen: as in checkpoint.Trained. Call it with prompts; see `__call__`. `run` is the program: text in,
    frames and sound out. Weights are put on `mesh`, if one is given, or stay where they are; with that mesh set, clips
    are split over `data` and `fsdp`, and every process gets them all.
    """

    def __init__(self, config, frozen, mesh=None):
        self.config = config
        self.frozen = jax.device_put(frozen, mesh and sharding.state_shardings(frozen, mesh))
        self.run = jax.jit(self._sample, static_argnames=("method", "interval", "guides", "fraction"))
        self._encode = jax.jit(lambda frozen, v, a: sharding.replicate(stages.encode(self.config, frozen, v, a)))

    def __call__(self, prompts, *, seed=0, window=0, frames=None, given=None, **options):
        """-> (video uint8 [P, F, H, W, 3], audio float32 [P, N]) for P prompts, as NumPy arrays.

        frames: video frames, 1 + f_t * n (default: as trained). Prompt i draws its noise from (seed, window, i),
        whatever the batch. given: a tasks.Context for clips of that length; what is given comes back as the autoencoder
        sees it, and the rest is made to fit. options: any of config.sample (steps, method, guidance, ...). Raises
        UserError where they do not fit.
        """
        arrays, static = self.arguments(frames=frames, given=given, **options)
        clean = arrays.pop("clean")
        tokens = text.encode(prompts, self.config.data.text_length)
        key, batch = jax.random.fold_in(jax.random.key(seed), window), min(BATCH, len(prompts))
        made = []
        for start in range(0, len(prompts), batch):
            numbers = np.minimum(np.arange(start, start + batch), len(prompts) - 1)  # the last batch is filled up
            own = {name: x[numbers] if len(x) > 1 else x for name, x in clean.items()}
            video, audio = self.run(key=key, numbers=numbers, tokens=tokens[numbers], clean=own, **arrays, **static)
            keep = min(batch, len(prompts) - start)
            made.append((np.asarray(video)[:keep], np.asarray(audio)[:keep]))
        return tuple(np.concatenate(parts) for parts in zip(*made, strict=True))

    def rollout(self, prompts, frames, *, seed=0, given=None, start=None, **options):
        """Like `__call__` for clips of any length, window after window, each given the end of the one before.

        start: (video uint8 [P, n, H, W, 3], audio float32 [P, n * samples_per_frame]) that the clips begin with;
        without it the first window is made from the prompts and `given`. What a window is given of the one before is
        config.sample.context_frames latent frames, or as many as there are.
        """
        size = stages.layout(self.config)
        per_frame, wanted = size.samples_per_frame, options.get("context_frames", self.config.sample.context_frames)
        if not 0 < wanted < size.latent_frames:
            raise UserError(f"sample.context_frames={wanted} must be from 1 to {size.latent_frames - 1} latent frames")
        video, audio = self(prompts, seed=seed, given=given, **options) if start is None else start
        window = 0
        while video.shape[1] < frames:
            window += 1
            past = min(1 + size.f_t * (wanted - 1), 1 + (video.shape[1] - 1) // size.f_t * size.f_t)
            given = tasks.continue_(video[:, -past:], audio[:, -past * per_frame :], size)
            more, sound = self(prompts, seed=seed, window=window, given=given, **options)
            video = np.concatenate([video, more[:, past:]], 1)
            audio = joined(audio, sound, past * per_frame, round(FADE * self.config.data.sample_rate))
        return video[:, :frames], audio[:, : frames * per_frame]

    def arguments(self, *, frames=None, given=None, **options):
        """What `__call__` is given as arguments of `run`: -> (arrays, static ones). Raises UserError."""
        size = stages.layout(self.config, frames)
        known = self.config.sample
        for name in options:
            one_of("option", name, tuple(known))
        o = {**known, **{name: value for name, value in options.items() if value is not None}}
        given_weights = dict(o["guidance"])
        for name in given_weights:
            one_of("guidance", name, tuple(known.guidance))
        weights = {**known.guidance, **{name: value for name, value in given_weights.items() if value is not None}}
        for name, value in weights.items():
            if not math.isfinite(value):
                raise UserError(f"guidance.{name}={value} must be a finite number")
        for name in ("context_noise", "history_noise", "rescale"):
            if not 0 <= o[name] <= 1:
                raise UserError(f"{name}={o[name]} must be from 0 to 1")
        if not all(0 <= t <= 1 for t in o["first_step_times"]):
            raise UserError(f"first_step_times={o['first_step_times']} must be times from 0 to 1")
        masks, clean = self._given(given or tasks.text(size), size)
        some = any(mask.any() for mask in masks.values())
        onward = all(mask[:2].all() for mask in masks.values())  # two frames show what moves, and how
        if onward:
            weights["text"] = weights["text_continue"]
        elif any(mask.all() for mask in masks.values()):
            weights["text"] = weights["text_cross_modal"]
        levels = tasks.scheduling_matrix(
            o["steps"],
            size.latent_frames,
            self.config.denoiser.diffusion,
            masks,
            lag=o["lag"],
            spacing=o["spacing"],
            context_noise=o["context_noise"],
            first_step_times=o["first_step_times"] if onward else (),
        )
        numbers = {name: float(weights[name]) for name in ("text", "history", "modality")} | {
            "rescale": float(o["rescale"])
        }
        arrays = dict(frozen=self.frozen, clean=clean, masks=masks, levels=levels, weights=numbers)
        # Those that take more of each network call.
        guides = (weights["text"] != 1, some and weights["history"] != 1, weights["modality"] != 1)
        return arrays, dict(
            method=o["method"], interval=tuple(o["interval"]), guides=guides, fraction=float(o["history_noise"])
        )

    def _given(self, given, size):
        """-> (masks {modality: bool [T]}, clean latents [P or 1, ...] of what is given; the rest is zeros)."""
        clean = {m: np.zeros((1, *shape), np.float32) for m, shape in stages.latent_shapes(size).items()}
        if given.video is None and given.audio is None:
            return given.masks, clean
        rows, side = max(len(x) for x in given[:2] if x is not None), self.config.data.size
        video = np.zeros((rows, size.frames, side, side, 3), np.uint8) if given.video is None else given.video
        audio = np.zeros((rows, size.samples), np.float32) if given.audio is None else given.audio
        if video.shape[1:] != (size.frames, side, side, 3) or audio.shape[1:] != (size.samples,):
            raise UserError(f"given clips of shape {video.shape} and {audio.shape} do not fit {size.frames} frames")
        z = jax.device_get(self._encode(self.frozen, video, audio))
        return given.masks, {m: np.asarray(z[m]) if given.masks[m].any() else clean[m] for m in z}

    def _sample(self, frozen, key, numbers, tokens, clean, masks, levels, weights, method, interval, guides, fraction):
        noise_key, sampler_key = jax.random.split(key)
        settings = self.config.denoiser.diffusion
        shapes = {name: x.shape[1:] for name, x in clean.items()}

        clean = {name: jnp.broadcast_to(x, (len(numbers), *x.shape[1:])) for name, x in clean.items()}
        known = {name: broadcast_to_latent(masks[name][None], x) for name, x in clean.items()}
        noise, other = (draw(noise_key, numbers, shapes, which) for which in (0, 1))
        first = {name: levels[name][:1] for name in shapes}  # [1, T]
        exact = {name: broadcast_to_latent(first[name] >= settings.log_snr_max, clean[name]) for name in shapes}
        noised = add_noise(
            clean, other, {name: jnp.broadcast_to(x, (len(numbers), x.shape[1])) for name, x in first.items()}
        )
        shown = {name: jnp.where(exact[name], clean[name], noised[name]) for name in shapes}
        z = {name: jnp.where(known[name], shown[name], noise[name]) for name in shapes}
        z = {"video": constrain(z["video"], *stages.VIDEO), "audio": constrain(z["audio"], *stages.SOUND)}

        model = stages.models(self.config)["denoiser"]
        denoise = conditioning.denoise_fn(model, sharding.all_gather_params(frozen["denoiser"], model.dtype))
        cond = stages.encode_text(self.config, frozen, tokens)
        terms = []
        if guides[0]:
            null = stages.encode_text(self.config, frozen, text.encode([text.NULL_TEXT], tokens.shape[1]))
            terms += samplers.text_guidance(weights["text"], null)
        if guides[1]:
            terms += samplers.history_guidance(weights["history"], masks, other, settings, fraction)
        if guides[2]:
            terms += samplers.modality_guidance(weights["modality"], other, settings)
        denoise = samplers.guided(denoise, terms, weights["rescale"], interval)
        # Batches begin at multiples of BATCH: the noise that ddpm adds is drawn from (seed, i), too.
        sampler_key = jax.random.fold_in(sampler_key, numbers[0])
        z = samplers.sample(denoise, sampler_key, z, cond, levels, method, settings)
        z = {name: jnp.where(known[name], clean[name], z[name]) for name in z}
        return sharding.replicate(stages.decode(self.config, frozen, z))


def draw(key, numbers, shapes, which):
    """Noise for clips `numbers` [B] -> {name: [B, *shapes[name]]}; `which` tells draws of one clip apart."""

    def one(number, name):
        place = 2 * which + sorted(shapes).index(name)
        own = jax.random.fold_in(jax.random.fold_in(key, number), place)
        # Drawn flat: the same numbers, and XLA takes half a minute to compile a draw of this shape for a CPU.
        return jax.random.normal(own, (math.prod(shapes[name]),)).reshape(shapes[name])

    return {name: jax.vmap(lambda n, name=name: one(n, name))(numbers) for name in shapes}


def joined(audio, more, overlap, fade):
    """Sounds [P, N] and [P, M], of which the first `overlap` samples of `more` are the last of `audio`: one sound.

    Over the last `fade` samples of the overlap the one gives way to the other, so that no seam clicks.
    """
    fade = min(fade, overlap)
    share = np.linspace(0, 1, fade + 2, dtype=np.float32)[1:-1]
    blend = audio[:, audio.shape[1] - fade :] * (1 - share) + more[:, overlap - fade : overlap] * share
    return np.concatenate([audio[:, : audio.shape[1] - fade], blend, more[:, overlap:]], 1)
