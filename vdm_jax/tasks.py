"""A task: which latent frames are context, and in which order and in how many steps the other frames are denoised.

The autoencoders are causal: later frames do not change earlier latents. So when a context is encoded, the frames and
the sound after it may hold anything. They are called filler. In `between`, filler also lies before the last context
frames and changes their latents a little. So there the filler repeats the nearest frames, without sound.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from vdm_jax.diffusion import MODALITIES, log_snr_at
from vdm_jax.errors import UserError, one_of

SPACINGS = ("time", "log_snr", "karras")
MAX_STEPS = 10_000  # of sampling; also the largest lag


# --------------------------------------------------------------------------------- context: one function per task
# A long clip, the task `rollout`, is a series of windows of the task `continue`. The layout is a system.layout.Layout.


class Context(NamedTuple):
    """The context of P clips, or of one clip for all prompts (P = 1)."""

    video: np.ndarray | None  # uint8 [P, F, H, W, 3], filler included; None: no video frame is context
    audio: np.ndarray | None  # float32 [P, N], filler included; None: no audio is context
    masks: dict  # {'video', 'audio'}: bool [T], True in context frames


def text(layout):
    """Returns the Context of text to video and sound: no context frame."""
    return Context(None, None, _first_frames(layout, video=0, audio=0))


def image(picture, layout):
    """Returns the Context for a picture, uint8 [H, W, 3], that starts to move: the first video frame is context."""
    return foley(picture[None], layout)  # a video of one frame, which fills exactly the first latent frame


def foley(frames, layout):
    """Returns the Context for a video, uint8 [n, H, W, 3], that gets a sound: what it fills is context."""
    count = _latent_frames(len(frames), layout)
    return Context(_fit(frames[None], layout.frames, "edge"), None, _first_frames(layout, video=count, audio=0))


def audio(samples, layout):
    """Returns the Context for a sound, float32 [n], that gets a video: it and silence after it are context."""
    masks = _first_frames(layout, video=0, audio=layout.latent_frames)
    return Context(None, _fit(samples[None], layout.samples), masks)


def continue_(frames, samples, layout):
    """Returns the Context for clips that continue others: the last frames of the others are their first frames.

    frames: the others, uint8 [P, n, H, W, 3]. Only the last 1 + f_t * m are used, with the largest m that n and the new
        clip allow.
    samples: float32 [P, n * samples_per_frame].
    """
    used = 1 + layout.f_t * (_latent_frames(frames.shape[1], layout) - 1)
    return begun(frames[:, -used:], samples[:, -used * layout.samples_per_frame :], layout)


def begun(frames, samples, layout):
    """Returns the Context for clips whose beginnings are there. The video may be there for longer than the sound.

    frames: uint8 [P, n, H, W, 3], n above 0.
    samples: float32 [P, m * samples_per_frame], m above 0.
    """
    filled = {
        "video": _latent_frames(frames.shape[1], layout),
        "audio": _latent_frames(samples.shape[1] // layout.samples_per_frame, layout),
    }
    samples = _fit(samples, layout.samples)
    return Context(_fit(frames, layout.frames, "edge"), samples, _first_frames(layout, **filled))


def between(start, end, layout, context_frames):
    """Returns the Context for a clip that leads from the end of one clip to the beginning of another.

    start, end: the two clips, (frames uint8 [n, H, W, 3], samples float32 [n * samples_per_frame]).
    context_frames: latent frames of context at each end: the last 1 + f_t * (context_frames - 1) video frames of
        `start`, and the first f_t * context_frames of `end`.
    """
    head = 1 + layout.f_t * (context_frames - 1)
    tail = layout.f_t * context_frames
    gap = layout.frames - head - tail
    # The filler repeats the last frame of the head in its first half and the first frame of the tail in its second.
    first = np.pad(start[0][-head:], ((0, gap // 2), (0, 0), (0, 0), (0, 0)), "edge")
    last = np.pad(end[0][:tail], ((gap - gap // 2, 0), (0, 0), (0, 0), (0, 0)), "edge")
    per_frame = layout.samples_per_frame
    sounds = [start[1][-head * per_frame :], np.zeros(gap * per_frame, np.float32), end[1][: tail * per_frame]]
    frame = np.arange(layout.latent_frames)
    mask = (frame < context_frames) | (frame >= layout.latent_frames - context_frames)
    return Context(np.concatenate([first, last])[None], np.concatenate(sounds)[None], {"video": mask, "audio": mask})


def restored(context, video, audio, layout, fade):
    """Returns (video, audio) of clips in which the frames and the sound that are context are as they were given.

    context: of clips of this layout, or None.
    video, audio: the clips, as sampled: uint8 [P, F, H, W, 3], float32 [P, N].
    fade: samples, inside the given sound, over which the given and the made sound blend.
    """
    if context is None:
        return video, audio
    shown, heard = (np.repeat(context.masks[name], layout.f_t)[layout.f_t - 1 :] for name in MODALITIES)  # bool [F]
    if shown.any():
        video = np.where(shown[:, None, None, None], context.video, video)
    if heard.any():
        share = np.pad(np.repeat(heard, layout.samples_per_frame).astype(np.float32), fade, "edge")
        share = np.convolve(share, np.ones(2 * fade + 1, np.float32) / (2 * fade + 1), "valid")
        share = np.clip(2 * share - 1, 0, 1)  # 0 up to the border, 1 from `fade` samples behind it on
        audio = share * context.audio + (1 - share) * audio
    return video, audio


def _first_frames(layout, video, audio):
    """Masks: the first `video` latent frames of the video are context, and the first `audio` of the audio."""
    frame = np.arange(layout.latent_frames)
    return {"video": frame < video, "audio": frame < audio}


def _latent_frames(frames, layout):
    """The number of latent frames that `frames` video frames fill, at most the clip's."""
    return min(1 + (frames - 1) // layout.f_t, layout.latent_frames)


def _fit(x, count, mode="constant"):
    """[P, n, ...] -> [P, count, ...]: cut, or padded at the end as np.pad does in this mode."""
    missing = max(count - x.shape[1], 0)
    return np.pad(x[:, :count], ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)), mode)


# --------------------------------------------- the scheduling matrix: the noise level of each frame after each step


def scheduling_matrix(steps, frames, config, masks=None, lag=0, spacing="time", context_noise=0.0, first_step_times=()):
    """Returns the noise levels of sampling, {"video", "audio"}: log_snr [S+1, T], from pure noise to clean.

    Row 0 is the start, and row S = steps + lag * (generated frames - 1) the end. Raises UserError for wrong settings.

    steps: denoising steps of each frame.
    frames: T, latent frames.
    masks: {"video", "audio"}: bool [T], True in context frames. A modality that is left out has none.
    lag: steps by which each generated frame is behind the one before; more than 0 is a pyramid.
    spacing: what is evenly spaced over the steps: 'time' t, 'log_snr', or (sigma / alpha)^(1 / 7) with 'karras'.
    context_noise: time t in [0, 1] to which context frames are noised (arXiv:2502.06764). A modality that is context as
        a whole always stays clean.
    first_step_times: times t in [0, 1] that the first generated frame, the second, and so on reach in their first step.
        A small time puts a frame near the mean of all possible next frames, which has half the expected squared error
        of a random sample. Use it if the context leaves little open: the mean of different futures is blurred.
    """
    one_of("spacing", spacing, SPACINGS)
    if not (1 <= steps <= MAX_STEPS and 0 <= lag <= MAX_STEPS):
        raise UserError(f"steps={steps} must be from 1 to {MAX_STEPS}, and lag={lag} from 0 to {MAX_STEPS}")
    masks = {name: np.asarray((masks or {}).get(name, np.zeros(frames)), bool) for name in MODALITIES}
    for name, mask in masks.items():
        if mask.shape != (frames,):
            raise UserError(f"masks[{name!r}] has shape {mask.shape}: it must be ({frames},), one value per frame")

    # Video and audio of one frame start together, even if one of them is context.
    # `order` [T] is the place of a frame among the generated frames.
    order = np.maximum(np.cumsum(~(masks["video"] & masks["audio"])) - 1, 0)
    levels = np.tile(_frame_levels(steps, 1.0, config, spacing), (order[-1] + 1, 1))  # [generated, steps + 1]
    if steps > 1:
        for frame_levels, time in zip(levels, first_step_times):  # writes into `levels`
            frame_levels[1:] = _frame_levels(steps - 1, time, config, spacing)
    row = np.arange(steps + lag * order[-1] + 1)[:, None]  # [S+1, 1]
    generated = levels[order, np.clip(row - lag * order, 0, steps)]  # [S+1, T]

    clean = config["log_snr_max"]
    context = float(log_snr_at(context_noise, config)) if context_noise else clean
    return {
        name: jnp.asarray(np.where(mask, clean if mask.all() else context, generated)) for name, mask in masks.items()
    }


def _frame_levels(steps, start, config, spacing):
    """log_snr [steps + 1] of one frame, from time `start` to clean."""
    low = float(log_snr_at(start, config))
    high = config["log_snr_max"]
    part = np.arange(steps + 1) / steps
    if spacing == "time":
        levels = np.array(log_snr_at(start * (1 - part), config), np.float64)
    elif spacing == "log_snr":
        levels = low + part * (high - low)
    else:
        rho = 7  # arXiv:2206.00364, eq. 5, with sigma / alpha = exp(-log_snr / 2) as its sigma
        noisiest = np.exp(-low / 2 / rho)
        cleanest = np.exp(-high / 2 / rho)
        levels = -2 * rho * np.log(noisiest + part * (cleanest - noisiest))
    # The sampler and guidance compare levels with their bounds. Rounding must not put a level past them.
    levels = np.clip(levels, config["log_snr_min"], high)
    levels[-1] = high
    return levels
