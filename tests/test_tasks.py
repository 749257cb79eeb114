"""Which latent frames each task gives, and that the clips hold what was given at those places."""

import numpy as np
import pytest

from tests import tiny
from vdm_jax import tasks
from vdm_jax.system import codec as stages

FRAMES, PER_FRAME = 9, 250
SIZE = stages.layout(tiny.get_config(), FRAMES)  # f_t = 2, so T = 5


def clip(frames, first=0):
    """Frame k shows k, and sounds as k."""
    numbers = first + np.arange(frames)
    return numbers[:, None, None, None].astype(np.uint8) + np.zeros((4, 4, 3), np.uint8), np.repeat(
        numbers, PER_FRAME
    ).astype(np.float32)


def shown(given):
    return given.video[0, :, 0, 0, 0].tolist()


def heard(given):
    return given.audio[0, ::PER_FRAME].tolist()


def given_frames(given):
    return "".join("x" if v else "." for v in given.masks["video"]), "".join(
        "x" if a else "." for a in given.masks["audio"]
    )


def test_nothing():
    given = tasks.nothing(SIZE)
    assert given.video is None and given.audio is None and given_frames(given) == (".....", ".....")


def test_an_image_is_the_first_frame():
    given = tasks.image(clip(1, 7)[0][0], SIZE)
    assert given_frames(given) == ("x....", ".....") and shown(given) == [7] * FRAMES and given.audio is None


@pytest.mark.parametrize("frames, mask", [(9, "xxxxx"), (12, "xxxxx"), (5, "xxx.."), (4, "xx..."), (1, "x....")])
def test_a_video_gives_the_latent_frames_it_fills(frames, mask):
    given = tasks.video(clip(frames)[0], SIZE)
    assert given_frames(given) == (mask, ".....")
    assert shown(given) == [min(k, frames - 1) for k in range(FRAMES)]


@pytest.mark.parametrize("frames", [4, 9, 12])
def test_a_sound_is_given_whole(frames):
    given = tasks.sound(clip(frames)[1], SIZE)
    assert given_frames(given) == (".....", "xxxxx") and given.video is None
    assert heard(given) == [k if k < frames else 0 for k in range(FRAMES)]


def test_history_keeps_what_fills_latent_frames():
    frames, samples = clip(6)
    given = tasks.history(frames[None], samples[None], SIZE)
    assert given_frames(given) == ("xxx..", "xxx..")
    assert shown(given) == [1, 2, 3, 4, 5, 5, 5, 5, 5] and heard(given) == [1, 2, 3, 4, 5, 0, 0, 0, 0]


def test_between_two_clips():
    given = tasks.between(clip(9), clip(9, 100), SIZE, 2)
    assert given_frames(given) == ("xx.xx", "xx.xx")
    assert shown(given) == [6, 7, 8, 8, 100, 100, 101, 102, 103]
    assert heard(given) == [6, 7, 8, 0, 0, 100, 101, 102, 103]
