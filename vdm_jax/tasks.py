"""Tasks as patterns: which latent frames of picture and sound are given, and clips that hold them.

A given frame is an input at a clean level; all others are made. Causal autoencoders let a clip be given in part: what
comes after a latent frame does not change it, so unknown frames are filled with anything.
"""

from typing import NamedTuple

import numpy as np


class Context(NamedTuple):
    """What a task gives, for P clips or for one that all share. Unused parts of a clip are filler."""

    video: np.ndarray | None  # uint8 [P or 1, F, H, W, 3]; None: nothing of the picture is given
    audio: np.ndarray | None  # float32 [P or 1, N]; None: nothing of the sound is given
    masks: dict  # {'video', 'audio'}: bool [T], True where given


def nothing(size):
    """Text to video and sound: all is made. size: a stages.Layout, here and below."""
    return Context(None, None, _masks(size, 0, 0))


def image(picture, size):
    """A picture [H, W, 3] set in motion: the first frame is given, sound is made."""
    return video(picture[None], size)


def video(frames, size):
    """Frames [n, H, W, 3] get a sound; with fewer frames than a clip has, the picture goes on, too."""
    return Context(_held(frames[None], size.frames), None, _masks(size, _latents(len(frames), size), 0))


def sound(samples, size):
    """A sound [n] gets a picture; silence follows one that is shorter than the clip."""
    return Context(None, _padded(samples[None], size.samples), _masks(size, 0, size.latent_frames))


def history(frames, samples, size):
    """Clips go on: the first frames [P, n, H, W, 3] and their sound [P, n * samples_per_frame] are given.

    n is 1 + f_t * m: what does not fill a latent frame is cut off at the beginning.
    """
    count = _latents(frames.shape[1], size)
    n = 1 + size.f_t * (count - 1)
    frames, samples = frames[:, -n:], samples[:, -n * size.samples_per_frame :]
    return Context(_held(frames, size.frames), _padded(samples, size.samples), _masks(size, count, count))


def between(start, end, size, latents):
    """A clip that leads from the end of one clip to the beginning of another.

    start, end: (frames [n, H, W, 3], samples [n * samples_per_frame]); the last frames of start that fill `latents`
    latent frames become the clip's first, the first f_t * latents frames of end its last.
    """
    head, tail, per_frame = 1 + size.f_t * (latents - 1), size.f_t * latents, size.samples_per_frame
    first, last = start[0][-head:], end[0][:tail]
    rest = size.frames - head - tail
    # The unknown part stands still, half of it as the beginning ends, half as the end begins.
    frames = np.concatenate([_held(first[None], head + rest // 2)[0], np.repeat(last[:1], rest - rest // 2, 0), last])
    sounds = start[1][-head * per_frame :], np.zeros(rest * per_frame, np.float32), end[1][: tail * per_frame]
    at = np.arange(size.latent_frames)
    mask = (at < latents) | (at >= size.latent_frames - latents)
    return Context(frames[None], np.concatenate(sounds)[None], {"video": mask, "audio": mask})


def _masks(size, video, audio):
    at = np.arange(size.latent_frames)
    return {"video": at < video, "audio": at < audio}


def _latents(frames, size):
    """Latent frames that `frames` video frames fill, no more than a clip has."""
    return min(1 + (frames - 1) // size.f_t, size.latent_frames)


def _held(frames, count):
    """[P, n, ...] -> [P, count, ...]: cut, or the last frame repeated."""
    return frames[:, np.minimum(np.arange(count), frames.shape[1] - 1)]


def _padded(samples, count):
    """[P, n] -> [P, count]: cut, or followed by silence."""
    out = np.zeros((len(samples), count), np.float32)
    n = min(count, samples.shape[1])
    out[:, :n] = samples[:, :n]
    return out
