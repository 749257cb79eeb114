"""Tasks: their context frames, what the clips hold in them, and the scheduling matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vdm_jax import diffusion, tasks
from vdm_jax.errors import UserError
from vdm_jax.system.layout import layout

FRAMES = 9  # video frames a clip
PER_FRAME = 250  # audio samples a video frame
LAYOUT = layout(tiny.get_config()).with_frames(FRAMES)  # f_t = 2, so T = 5
CONFIG = dict(schedule="cosine", log_snr_min=-12.0, log_snr_max=12.0, shift=1.0)


# --------------------------------------------------------------------------------------------------
# Context


def clip(frames, first=0):
    """Every pixel of video frame k is k, and so is every audio sample."""
    numbers = first + np.arange(frames)
    video = numbers[:, None, None, None].astype(np.uint8) + np.zeros((4, 4, 3), np.uint8)
    return video, np.repeat(numbers, PER_FRAME).astype(np.float32)


def shown(context):
    return context.video[0, :, 0, 0, 0].tolist()


def heard(context):
    return context.audio[0, ::PER_FRAME].tolist()


def context_frames(context):
    return tuple("".join("x" if known else "." for known in context.masks[name]) for name in ("video", "audio"))


def test_text_has_no_context():
    context = tasks.text(LAYOUT)
    assert context.video is None and context.audio is None and context_frames(context) == (".....", ".....")


def test_an_image_is_the_first_frame():
    context = tasks.image(clip(1, 7)[0][0], LAYOUT)
    assert context_frames(context) == ("x....", ".....") and shown(context) == [7] * FRAMES and context.audio is None


@pytest.mark.parametrize("frames, mask", [(9, "xxxxx"), (12, "xxxxx"), (5, "xxx.."), (4, "xx..."), (1, "x....")])
def test_the_context_of_foley_is_the_latent_frames_that_the_video_fills(frames, mask):
    context = tasks.foley(clip(frames)[0], LAYOUT)
    assert context_frames(context) == (mask, ".....")
    assert shown(context) == [min(k, frames - 1) for k in range(FRAMES)]


@pytest.mark.parametrize("frames", [4, 9, 12])
def test_the_context_of_audio_is_all_of_the_sound(frames):
    context = tasks.audio(clip(frames)[1], LAYOUT)
    assert context_frames(context) == (".....", "xxxxx") and context.video is None
    assert heard(context) == [k if k < frames else 0 for k in range(FRAMES)]


def test_continue_keeps_what_fills_latent_frames():
    frames, samples = clip(6)
    context = tasks.continue_(frames[None], samples[None], LAYOUT)
    assert context_frames(context) == ("xxx..", "xxx..")
    assert shown(context) == [1, 2, 3, 4, 5, 5, 5, 5, 5] and heard(context) == [1, 2, 3, 4, 5, 0, 0, 0, 0]


def test_between_two_clips():
    context = tasks.between(clip(9), clip(9, 100), LAYOUT, 2)
    assert context_frames(context) == ("xx.xx", "xx.xx")
    assert shown(context) == [6, 7, 8, 8, 100, 100, 101, 102, 103]
    assert heard(context) == [6, 7, 8, 0, 0, 100, 101, 102, 103]


# --------------------------------------------------------------------------------------------------
# Scheduling matrix


MASKS = {"video": [True, False, False, False], "audio": [True, False, False, True]}
FRAME_LEVELS = [-12, *np.array(diffusion.log_snr_at(jnp.array([0.75, 0.5, 0.25]), CONFIG)), 12]  # of 4 steps


def test_all_frames_take_the_same_steps_and_context_stays_clean():
    levels = tasks.scheduling_matrix(4, 4, CONFIG, MASKS)
    for name in ("video", "audio"):
        assert levels[name].shape == (5, 4) and levels[name].dtype == jnp.float32
        for frame in range(4):
            expected = [12] * 5 if MASKS[name][frame] else FRAME_LEVELS
            np.testing.assert_allclose(levels[name][:, frame], expected, atol=1e-4)


def test_in_a_pyramid_each_frame_starts_after_the_one_before():
    levels = tasks.scheduling_matrix(4, 4, CONFIG, MASKS, lag=3)
    for name in ("video", "audio"):  # frames 1, 2, 3 are generated, each 3 rows after the one before
        assert levels[name].shape == (4 + 3 * 2 + 1, 4)
        for frame in range(1, 4):
            if not MASKS[name][frame]:
                start = 3 * (frame - 1)
                np.testing.assert_allclose(levels[name][start : start + 5, frame], FRAME_LEVELS, atol=1e-4)
                assert (levels[name][:start, frame] == levels[name][0, frame]).all()
                assert (levels[name][start + 4 :, frame] == 12).all()


def test_the_first_step_of_a_frame_reaches_its_time():
    plain = tasks.scheduling_matrix(4, 4, CONFIG, MASKS, lag=3)
    levels = tasks.scheduling_matrix(4, 4, CONFIG, MASKS, lag=3, first_step_times=(0.3, 0.6))
    for name in ("video", "audio"):
        for frame, start in ((1, 0.3), (2, 0.6)):
            rest = np.array(diffusion.log_snr_at(start * jnp.array([1, 2 / 3, 1 / 3]), CONFIG))
            column = levels[name][3 * (frame - 1) :, frame]
            np.testing.assert_allclose(column[:5], [-12, *rest, 12], atol=1e-4)
        np.testing.assert_array_equal(levels[name][:, [0, 3]], plain[name][:, [0, 3]])
    single = tasks.scheduling_matrix(1, 4, CONFIG, MASKS, first_step_times=(0.3,))  # its only step ends clean
    np.testing.assert_array_equal(single["video"], tasks.scheduling_matrix(1, 4, CONFIG, MASKS)["video"])


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_levels_rise_and_stay_within_their_bounds(schedule):
    for low, high in ((-12.0, 12.0), (-9.7, 11.3)):
        config = {**CONFIG, "schedule": schedule, "log_snr_min": low, "log_snr_max": high}
        for spacing in tasks.SPACINGS:
            levels = tasks.scheduling_matrix(7, 1, config, spacing=spacing)["video"][:, 0]
            assert levels[0] >= low and levels[-1] == high and (jnp.diff(levels) > 0).all()


def test_spacings_are_even_in_what_they_name():
    even = tasks.scheduling_matrix(6, 2, CONFIG, spacing="log_snr")["audio"][:, 1]
    np.testing.assert_allclose(even, np.linspace(-12, 12, 7), atol=1e-4)
    karras = tasks.scheduling_matrix(6, 2, CONFIG, spacing="karras")["video"][:, 0]
    root = np.exp(-np.array(karras) / 14)  # (sigma / alpha)^(1/7) is even
    np.testing.assert_allclose(np.diff(root), (root[-1] - root[0]) / 6, rtol=1e-3)


def test_context_noise_leaves_a_modality_without_generated_frames_clean():
    masks = {"video": np.array([True, False, False]), "audio": np.ones(3, bool)}
    levels = tasks.scheduling_matrix(4, 3, CONFIG, masks, context_noise=0.02)
    np.testing.assert_allclose(levels["video"][:, 0], diffusion.log_snr_at(0.02, CONFIG), rtol=1e-6)
    assert levels["video"][0, 0] < 12 and (levels["video"][-1, 1:] == 12).all()
    assert (levels["audio"] == 12).all()


@pytest.mark.parametrize(
    "steps, different, message",
    [
        (0, {}, "steps"),
        (4, dict(lag=-1), "lag"),
        (4, dict(spacing="times"), "'time'"),
        (4, dict(masks={"video": [True]}), "shape"),
    ],
)
def test_wrong_settings_are_one_clear_line(steps, different, message):
    with pytest.raises(UserError, match=message) as error:
        tasks.scheduling_matrix(steps, 3, CONFIG, **different)
    assert "\n" not in str(error.value)
