"""The memory of a scene over the windows of a long clip: how it begins, how it goes on, how it is trained.

A memory is {'tokens': [B, M, D], 'past': (z, ...), 'windows': int32 [B]}, see models/memory.py. Training unrolls it
over consecutive windows of a long clip. Window w is denoised with the memory of the windows before it. Gradients go
through all writes of a clip. A roll-out has more windows than that, so the gradients are truncated.
"""

import math

import jax
import jax.numpy as jnp

from vdm_jax.errors import UserError


def window_step(config, layout):
    """Video frames from the start of one window to the start of the next."""
    return layout.frames - 1 - layout.f_t * (config.sample.context_frames - 1)


def check(config, layout):
    """Raises UserError where the settings of a memory do not fit together."""
    settings, model = config.denoiser.get("memory"), config.denoiser.model  # older weights have no such settings
    windows = settings.windows if settings else 1
    if windows == 1:
        return
    if not model.memory:
        raise UserError(f"denoiser.memory.windows={windows} trains a memory: give denoiser.model.memory tokens, say 16")
    if window_step(config, layout) < 1:
        raise UserError(f"sample.context_frames={config.sample.context_frames} leaves nothing of a window to generate")
    for key, given in (
        ("denoiser.hard_negatives.words", config.denoiser.hard_negatives.words),
        ("denoiser.model.student", model.student),
        ("data.buckets", config.data.get("buckets")),
    ):
        if given:
            raise UserError(f"denoiser.memory.windows={windows} cannot be trained with {key}: leave it out")


def clip_frames(config, layout):
    """Video frames of a training clip of the denoiser: denoiser.memory.windows windows, which overlap."""
    windows = config.denoiser.memory.windows if "memory" in config.denoiser else 1
    return layout.frames + (windows - 1) * window_step(config, layout)


def windows(system, clips):
    """The windows of long clips -> {name: [B * W, ...]}, the windows of a clip one after the other.

    clips: {'video': [B, n, H, W, 3], 'audio': [B, n * samples_per_frame], maybe 'control': [B, n, A]}.
    """
    layout, step = system.layout, window_step(system.config, system.layout)
    starts = range(0, clips["video"].shape[1] - layout.frames + 1, step)

    def split(name, x):
        per_frame = layout.samples_per_frame if name == "audio" else 1
        parts = [x[:, start * per_frame : (start + layout.frames) * per_frame] for start in starts]
        return jnp.stack(parts, 1).reshape(-1, *parts[0].shape[1:])

    return {name: split(name, x) for name, x in clips.items()}


def empty(model, layout, clips):
    """The memory of `clips` scenes that have no window yet. model: config.denoiser.model."""
    z = {name: jnp.zeros((clips, *shape)) for name, shape in layout.latent_shapes.items()}
    return {
        "tokens": jnp.zeros((clips, model.memory, model.memory_width)),
        "past": tuple(_coarser(z, layout, age) for age in range(1, model.memory_past + 1)),
        "windows": jnp.zeros(clips, jnp.int32),
    }


def write(system, params, memory, z):
    """The memory after a window.

    params: of the denoiser.
    z: clean latents of the window, {modality: [B, ...]}.
    """
    tokens = system.write_memory(params, memory["tokens"], z)
    ages = range(1, len(memory["past"]) + 1)
    past = tuple(_coarser(own, system.layout, age) for age, own in zip(ages, (z, *memory["past"])))
    return {"tokens": tokens, "past": past, "windows": memory["windows"] + 1}


def _coarser(z, layout, age):
    """Latents of a window that is `age` windows old, at 1 / 2^age of the size in time, height and width."""

    def resized(size, x):
        shape = [x.shape[0], *(math.ceil(n / 2**age) for n in size), x.shape[-1]]
        return jax.image.resize(x, shape, "linear")

    shapes = layout.latent_shapes
    return {name: resized(shapes[name][:-1], x) for name, x in z.items()}


def training_rows(system, params, key, z, cond):
    """Windows of clips -> (z, cond) of the rows of a batch for the denoising loss, each with its memory in cond.

    In a share denoiser.memory.cuts of the clips one window in the middle is that of another clip, with its text. So the
    memory learns to keep a scene over a cut. A clip's first window has no memory. Where the rest of the denoiser is not
    trained, it would teach nothing, and is left out.

    z: {modality: [B, W, ...]}.
    cond: text [B, ...], and control [B, W, T, A] where the clips have any.
    """
    settings = system.config.denoiser.memory
    clips, windows = z["video"].shape[:2]
    number = jnp.arange(windows)
    cut_key, place_key = jax.random.split(key)
    cut = jax.random.uniform(cut_key, (clips, 1)) < settings.cuts
    place = jax.random.randint(place_key, (clips, 1), 1, max(2, windows - 1))
    own = jnp.arange(clips)[:, None]
    whose = jnp.where(cut & (number == place), (own + 1) % clips, own)  # [B, W], the clip that a window is of

    def of_windows(x):
        return x[whose, number]

    z = jax.tree.map(of_windows, z)
    cond = {name: of_windows(x) if name == "control" else x[whose] for name, x in cond.items()}  # [B, W, ...]
    memory, memories = empty(system.config.denoiser.model, system.layout, clips), []
    for window in range(windows):
        memories.append(memory)
        memory = write(system, params, memory, {name: x[:, window] for name, x in z.items()})
    cond["memory"] = jax.tree.map(lambda *x: jnp.stack(x, 1), *memories)  # [B, W, ...]
    first = 1 if system.config.denoiser.trained else 0
    return jax.tree.map(lambda x: x[:, first:].reshape(-1, *x.shape[2:]), (z, cond))
