"""Files that clips are written to. Streams of other files stay as they are."""

import wave

import av
import numpy as np
import pytest

from tests import real_files
from tests.real_files import Film
from vdm_jax.data import media, writing
from vdm_jax.errors import UserError


def content(path, kind):
    """Returns the packets of a stream, and their times in s from the first one."""
    with av.open(str(path)) as file:
        stream = file.streams.get(**{kind: 0})[0]
        found = [packet for packet in file.demux(stream) if packet.size]
        shown = sorted(p.dts if p.pts is None else p.pts for p in found)
        return [bytes(p) for p in found], [float((time - shown[0]) * stream.time_base) for time in shown]


@pytest.mark.parametrize("film", [
    Film("h264", "ts", 8, None, None, False, ("aac", 48000, "stereo")),
    Film("h264", "mp4", 10, None, "turned", True, None),
    Film("hevc", "mkv", 10, real_files.color.PQ, None, True, ("flac", 48000, "mono")),
    Film("hevc", "mp4", 8, None, "mirrored", False, ("aac", 44100, "5.1")),
    Film("vp9", "webm", 8, None, None, True, ("libopus", 48000, "mono")),
    Film("av1", "mp4", 10, real_files.color.HLG, None, False, ("libmp3lame", 44100, "stereo")),
    Film("mjpeg", "avi", 8, None, None, False, ("pcm_s16le", 8000, "mono")),
], ids=lambda film: f"{film.codec} {film.ending}")  # fmt: skip
def test_a_copied_picture_and_a_copied_sound_are_read_as_before(tmp_path, film):
    path, out = tmp_path / f"film.{film.ending}", tmp_path / "out.mp4"
    real_files.write_film(path, film)
    writing.write_mp4(out, None, None, None, None, picture_from=path, sound_from=path if film.sound else None)
    real_files.check_film(out, film)
    shape = dict(fps=20, sample_rate=8000, size=(96, 128), frames=28)
    np.testing.assert_array_equal(*(media.read_video(file, **shape)[0] for file in (path, out)))
    if film.sound:
        before, after = (media.read_audio(file, 8000, 1.4) for file in (path, out))
        late = 8 if film.ending == "webm" else 0  # samples in 1 ms, to which WebM rounds times
        assert min(np.abs(before[k:] - after[: len(after) - k]).max() for k in range(late + 1)) < 0.02
    (_, before), (_, after) = content(path, "video"), content(out, "video")
    np.testing.assert_allclose(after, before, atol=2e-3)
    if film.ending != "ts":  # an MP4 stores the packets of a stream without start codes
        assert content(out, "video")[0] == content(path, "video")[0]
    if film.sound and film.sound[0] in ("aac", "libmp3lame", "libopus", "flac") and film.ending != "ts":
        assert content(out, "audio")[0] == content(path, "audio")[0]


def test_new_sound_is_beside_a_copied_picture(tmp_path):
    film = Film("h264", "mkv", 8, None, None, False, ("ac3", 48000, "stereo"))
    real_files.write_film(tmp_path / "film.mkv", film)
    sound = np.zeros(12_000)
    sound[4000:4100] = 0.9
    writing.write_mp4(tmp_path / "out.mp4", None, sound, 8, 8000, picture_from=tmp_path / "film.mkv")
    assert content(tmp_path / "out.mp4", "video")[0] == content(tmp_path / "film.mkv", "video")[0]
    heard = media.read_audio(tmp_path / "out.mp4", 8000, 1.5)
    assert abs(int(np.abs(heard).argmax()) - 4050) < 80


def test_a_picture_that_an_mp4_cannot_hold(tmp_path):
    real_files.write_film(tmp_path / "film.mov", Film("prores", "mov", 8, None, None, False, None))
    with pytest.raises(UserError, match="an MP4 cannot hold a picture in prores: convert .*film.mov to H.264 first"):
        writing.write_mp4(tmp_path / "out.mp4", None, None, 8, 8000, picture_from=tmp_path / "film.mov")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mov"]


@pytest.mark.parametrize("bits, form", [(16, "<i2"), (32, "<i4")])
def test_sound_without_loss(tmp_path, bits, form):
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, (5000, 2)).astype(form) * 2 ** (bits - 16)
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(bits // 8)
        file.setframerate(11_025)
        file.writeframes(samples.tobytes())
    video = np.zeros((4, 16, 16, 3), np.uint8)
    writing.write_mp4(tmp_path / "x.mp4", video, None, 8, 8000, sound_from=tmp_path / "x.wav")
    with av.open(str(tmp_path / "x.mp4")) as file:
        assert file.streams.audio[0].codec_context.name == "flac"
        heard = np.concatenate([frame.to_ndarray().reshape(-1, 2) for frame in file.decode(audio=0)])
    np.testing.assert_array_equal(heard, samples)


def test_a_sound_as_wav_and_frames_as_images(tmp_path):
    sound = np.linspace(-1.2, 1.2, 999)
    writing.write_wav(tmp_path / "x.wav", sound, 8000)
    np.testing.assert_allclose(media.read_audio(tmp_path / "x.wav", 8000, 999 / 8000), sound.clip(-1, 1), atol=1e-4)
    video = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    for path, frame in zip(writing.write_images(tmp_path / "x.png", video), video, strict=True):
        np.testing.assert_array_equal(media.read_image(path), frame)
    with pytest.raises(UserError, match="cannot write"):
        writing.write_wav(tmp_path / "none" / "x.wav", sound, 8000)
