"""Pictures: their pixels are compared with what they are to show."""

import numpy as np
import pytest
from PIL import Image

from tests.test_media import RATE, make_video
from vdm_jax.errors import UserError
from vdm_jax.metrics import figures


def test_contact_sheet_shows_first_and_last_frames(tmp_path):
    first, second = make_video(17), make_video(3, 16, 24)
    captions = ["a red blob moves right", "a caption that goes on " * 20]
    figures.contact_sheet(tmp_path / "s.png", [first, second], captions)
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape[1] == 8 * (128 + 4)
    tall = {frame: first[frame].repeat(4, 0).repeat(4, 1) for frame in (0, 16)}
    np.testing.assert_array_equal(sheet[20:148, :128], tall[0])
    np.testing.assert_array_equal(sheet[20:148, 924:1052], tall[16])
    assert sheet[:20].max() == 255  # the caption is there
    bottom = second[2].repeat(4, 0).repeat(4, 1)
    np.testing.assert_array_equal(sheet[-68:-4, 200:296], bottom)
    with pytest.raises(UserError, match="no folder"):
        figures.contact_sheet(tmp_path / "absent" / "s.png", [first], ["a"])


def test_spectrogram_is_bright_where_the_sound_is(tmp_path):
    t = np.arange(16000) / RATE
    audio = np.where(t >= 1, np.sin(2 * np.pi * 1000 * t), 0)
    figures.spectrogram(tmp_path / "s.png", audio, RATE)
    sheet = np.asarray(Image.open(tmp_path / "s.png")).sum(-1).astype(int)
    plot = sheet[12 : 12 + 256, 48:-16]
    row, column = np.unravel_index(plot.argmax(), plot.shape)
    assert abs(row - 256 * 3 / 4) < 6 and column > plot.shape[1] / 2  # 1 of 4 kHz, second half
    assert plot[:, : plot.shape[1] // 3].max() == 0
    for short in (0, 1, 50):
        figures.spectrogram(tmp_path / "short.png", np.zeros(short), RATE)


def shades(image, modality, shape, cell=(22, 10)):
    """[N+1, T] brightness in the middle of each cell; modality: 0 or 1, the panel."""
    rows, frames = shape
    left = 40 + modality * (frames * cell[0] + 28)
    gray = np.asarray(image.convert("L")).astype(int)
    return gray[22 + 5 :: cell[1]][:rows, left + 11 :: cell[0]][:, :frames]


def test_a_scheduling_matrix_shows_context_light_and_noise_dark():
    steps, frames = np.mgrid[:13, :4]
    pyramid = np.clip(-12 + 20 * (steps - 2 * frames) / 6, -12, 8)  # log SNR: each frame two steps after the one before
    levels = {"video": np.where(frames == 0, 8, pyramid), "audio": pyramid}
    image = figures.scheduling_matrix(levels, (22, 10))
    shape = levels["video"].shape
    for modality, name in enumerate(("video", "audio")):
        shade = shades(image, modality, shape)
        flat, level = shade.ravel(), levels[name].ravel()
        assert (np.diff(flat[np.argsort(level, kind="stable")]) >= 0).all()  # the higher the level, the lighter
        assert (shade[-1] == shade.max()).all() and shade.max() - shade.min() > 150
    video = shades(image, 0, shape)
    assert (video[:, 0] == video.max()).all() and (video[0, 1:] == video.min()).all()
    assert (shades(image, 1, shape)[0] == video.min()).all()
