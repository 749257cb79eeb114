"""A film that goes on: its packets stay, and new frames and sound follow in the same streams."""

import av
import numpy as np
import pytest

from tests import real_files
from tests.real_files import Film
from vdm_jax import sample
from vdm_jax.data import append, media, writing

NEW = np.zeros((6, 24, 24, 3), np.uint8)  # a square picture at the end of a film of 96 x 128: black at the sides
NEW[:, :12] = (200, 60, 60)
NEW[:, 12:] = (60, 60, 200)


def packets(path, kind):
    with av.open(str(path)) as file:
        return [bytes(packet) for packet in file.demux(**{kind: 0}) if packet.size]


def frames(path):
    """[(time in s, frame as it is coded)]"""
    with av.open(str(path)) as file:
        return [(float(frame.time), frame.to_ndarray()) for frame in file.decode(video=0)]


@pytest.mark.parametrize("film", [
    Film("h264", "mp4", 8, None, None, False, ("aac", 48000, "stereo")),
    Film("h264", "mov", 8, None, "turned", True, ("aac", 44100, "mono")),
    Film("h264", "mkv", 8, None, None, False, ("flac", 48000, "stereo")),
    Film("h264", "mp4", 8, None, "mirrored", False, None),
], ids=lambda film: f"{film.ending} {film.matrix}")  # fmt: skip
def test_new_frames_and_new_sound_follow_the_packets_of_a_film(tmp_path, film):
    path, out = tmp_path / f"film.{film.ending}", tmp_path / "out.mp4"
    real_files.write_film(path, film)
    new_sound = 0.5 * np.sin(np.arange(6000) * 2 * np.pi * 1000 / 8000).astype(np.float32)
    append.write_mp4(out, path, NEW, new_sound, 8, 8000)
    old = packets(path, "video")
    assert packets(out, "video")[: len(old)] == old and len(packets(out, "video")) == len(old) + 6
    before, after = frames(path), frames(out)
    for (time, frame), (new_time, copied) in zip(before, after, strict=False):
        np.testing.assert_array_equal(frame, copied)
        assert new_time == pytest.approx(time - before[0][0], abs=2e-3)
    end = media.probe(path)["duration"]
    times = [time for time, _ in after[len(before) :]]
    np.testing.assert_allclose(times, end + np.arange(6) / 8, atol=2e-3)
    probed = media.probe(out)
    assert probed["size"] == media.probe(path)["size"] and probed["duration"] == pytest.approx(end + 6 / 8, abs=2e-3)

    shown, sound = media.read_video(out, fps=8, size=probed["size"], sample_rate=8000, start=end + 0.1, frames=5)
    height, width = probed["size"]
    for frame in shown[:4].astype(int):  # upright, whatever the matrix of the film
        quarter = min(height, width) // 4
        for row, color in ((height // 2 - quarter, (200, 60, 60)), (height // 2 + quarter, (60, 60, 200))):
            assert np.abs(frame[row, width // 2] - color).max() < 16
        assert frame[2 if height > width else height // 2, 2 if width > height else width // 2].max() < 16
    part = sound[1000:4000] * np.hanning(3000)
    assert np.argmax(np.abs(np.fft.rfft(part))) * 8000 / 3000 == pytest.approx(1000, abs=10)
    assert np.abs(sound[800:4000]).max() == pytest.approx(0.5, abs=0.1)
    if film.sound and film.sound[0] == "aac":
        heard = packets(path, "audio")[:40]
        assert packets(out, "audio")[:40] == heard
    if film.sound:
        hum = media.read_audio(out, 8000, end - 0.1), media.read_audio(path, 8000, end - 0.1)
        assert np.abs(hum[0] - hum[1]).max() < 0.05
    else:
        assert np.abs(media.read_audio(out, 8000, end - 0.1)).max() < 1e-3


def test_a_player_may_jump_back_to_the_old_part(tmp_path):
    """The new frames have other parameter sets, and must not take the place of the old ones."""
    path, out = tmp_path / "film.mp4", tmp_path / "out.mp4"
    real_files.write_film(path, Film("h264", "mp4", 8, None, None, False, None))
    append.write_mp4(out, path, NEW, np.zeros(6000, np.float32), 8, 8000)
    with av.open(str(out)) as file:
        first = next(file.decode(video=0)).to_ndarray()
        assert len(list(file.decode(video=0))) > 10  # to the end
        file.seek(0)
        np.testing.assert_array_equal(next(file.decode(video=0)).to_ndarray(), first)


@pytest.mark.parametrize("film, words", [
    (Film("vp9", "webm", 8, None, None, False, None), "it is vp9 in yuv420p, and not H.264"),
    (Film("h264", "mp4", 10, None, None, False, None), "it is h264 in yuv420p10le"),
    (Film("h264", "ts", 8, None, None, False, None), "in no MP4, MOV or MKV"),
], ids=lambda x: getattr(x, "ending", ""))  # fmt: skip
def test_a_film_that_cannot_go_on_tells_why(tmp_path, film, words):
    real_files.write_film(tmp_path / f"film.{film.ending}", film)
    assert words in append.fault(tmp_path / f"film.{film.ending}")


def test_the_command_keeps_the_packets_of_the_clip(tiny_run, tmp_path, command):
    video = np.random.default_rng(0).integers(0, 256, (9, 16, 24, 3), np.uint8)
    writing.write_mp4(tmp_path / "a.mp4", video, np.sin(np.arange(9 * 250) / 3), 8, 2000)
    out = tmp_path / "out.mp4"
    options = [f"--workdir={tiny_run}", "--prompt=a red circle", "--steps=2", "--seconds=0.625", f"--out={out}"]
    assert command(sample, *options, f"--continue={tmp_path / 'a.mp4'}").code == 0
    old = packets(tmp_path / "a.mp4", "video")
    assert packets(out, "video")[:9] == old and len(packets(out, "video")) == 9 + 5

    film = Film("vp9", "webm", 8, None, None, False, None)
    real_files.write_film(tmp_path / "b.webm", film)
    done = command(sample, *options, f"--continue={tmp_path / 'b.webm'}")
    assert done.code == 0
    assert any("is encoded anew, at the model's size: it is vp9" in line for line in done.err)
