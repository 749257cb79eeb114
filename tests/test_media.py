import os
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from vdm_jax.data import media
from vdm_jax.errors import UserError

FPS, RATE = 8, 8000
CLICKS = (0.0, 0.3, 0.777, 1.5, 2.0)  # s


def make_video(frames=17, height=32, width=32):
    """A colored blob that moves right over a gray gradient."""
    y, x = np.mgrid[:height, :width]
    clip = []
    for k in range(frames):
        blob = np.exp(-((x - 5 - k) ** 2 + (y - height / 2) ** 2) / 20)[..., None]
        clip.append(200 * blob * [1, 0.3, 0.1] + (40 + x / width * 10)[..., None])
    return np.stack(clip).clip(0, 255).astype(np.uint8)


def make_clicks(samples=17000, rate=RATE):
    audio = np.zeros(samples, np.float32)
    for click in CLICKS:
        first = round(click * rate)
        t = np.arange(min(rate // 10, samples - first)) / rate
        audio[first : first + len(t)] += 0.7 * np.exp(-60 * t) * np.cos(2 * np.pi * 900 * t)
    return audio


def read(path, **settings):
    return media.read_video(path, **{"fps": FPS, "size": 32, "sample_rate": RATE, **settings})


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def write_frames(path, images, stamps, *, codec="libx264", base=1000, format=None, audio=(), turn=0):
    """Frames with free time stamps (in 1 / base s), and sound (codec, layout, [channels, N])."""
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(codec, rate=30)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, base)
        stream.bit_rate = 1_000_000
        stream.codec_context.time_base = Fraction(1, base)
        if turn:
            stream.set_display_rotation(turn)
        for sound_codec, layout, samples in audio:
            sound = out.add_stream(sound_codec, rate=48000, layout=layout)
            sound.bit_rate = 192_000 * len(samples)
            chunk = av.AudioFrame.from_ndarray(samples.astype(np.float32), "fltp", layout)
            chunk.sample_rate, chunk.pts, chunk.time_base = 48000, 0, Fraction(1, 48000)
            out.mux(sound.encode(chunk))
            out.mux(sound.encode(None))
        for image, stamp in zip(images, stamps, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, base)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def gray(value, height=32, width=32):
    return np.full((height, width, 3), value, np.uint8)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# -------------------------------------------------------------------------------------- round trips


def test_round_trip(tmp_path):
    path, video, audio = tmp_path / "clip.mp4", make_video(), make_clicks()
    media.write_mp4(path, video, audio, FPS, RATE)
    assert os.listdir(tmp_path) == ["clip.mp4"]  # no temporary file stays
    with av.open(str(path)) as container:
        assert [s.codec_context.name for s in container.streams] == ["h264", "aac"]
        stream = container.streams.video[0]
        assert (stream.codec_context.pix_fmt, stream.width, stream.height) == ("yuv420p", 256, 256)
        assert stream.average_rate == FPS and stream.frames == 17
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # faststart

    got, sound = read(path)
    assert got.shape == video.shape and got.dtype == np.uint8
    assert sound.shape == audio.shape and sound.dtype == np.float32
    assert psnr(got, video) > 45
    assert abs((got.astype(float) - video).mean()) < 0.3  # not darker, not brighter
    assert media.probe(path) == {"duration": 17 / 8, "has_audio": True, "size": (256, 256), "fps": 8}


def test_sound_keeps_its_time(tmp_path):
    path = tmp_path / "clip.mp4"
    media.write_mp4(path, make_video(), make_clicks(), FPS, RATE)
    for start in (0.0, 0.5, 1.25):
        _, sound = read(path, start=start, frames=6)
        for click in CLICKS:
            at = round((click - start) * RATE)
            if not 0 <= at < len(sound) - 400:
                continue
            near = np.abs(sound[max(0, at - 800) : at + 400])
            onset = np.argmax(near > 0.3) - min(at, 800)  # samples late
            assert near.max() > 0.4 and abs(onset) <= 0.010 * RATE, (start, click, onset)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_every_sample_rate(tmp_path, rate):
    audio = make_clicks(2 * rate, rate)
    media.write_mp4(tmp_path / "clip.mp4", make_video(16), audio, FPS, rate)
    sound = media.read_audio(tmp_path / "clip.mp4", rate, 2.0)
    lag = np.correlate(sound[: rate // 4], audio[: rate // 4], "full").argmax() - (rate // 4 - 1)
    assert abs(lag) <= 0.001 * rate and sound.shape == audio.shape


@pytest.mark.parametrize("fps", [8, 12.5, 24000 / 1001, 30])
def test_every_frame_rate(tmp_path, fps):
    video = make_video(20)
    media.write_mp4(tmp_path / "clip.mp4", video, None, fps, RATE)
    got, _ = read(tmp_path / "clip.mp4", fps=fps)
    assert got.shape == video.shape and psnr(got, video) > 45


def test_odd_sizes_are_padded(tmp_path):
    video = make_video(5, 257, 301)
    media.write_mp4(tmp_path / "clip.mp4", video, None, FPS, RATE)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert (container.streams.video[0].height, container.streams.video[0].width) == (258, 302)
    got, sound = read(tmp_path / "clip.mp4", size=(258, 302))
    assert psnr(got[:, :257, :301], video) > 30 and not media.probe(tmp_path / "clip.mp4")["has_audio"]
    assert sound.shape == (5000,) and not sound.any()


def test_bad_sound_values_do_not_stop_the_writer(tmp_path):
    audio = np.full(17000, 3.0)
    audio[:4000] = np.nan
    media.write_mp4(tmp_path / "clip.mp4", make_video(), audio, FPS, RATE)
    _, sound = read(tmp_path / "clip.mp4")
    assert np.isfinite(sound).all() and np.abs(sound[:3000]).max() < 0.05


def test_sound_shorter_or_longer_than_the_picture(tmp_path):
    for samples in (0, 900, 20000):
        media.write_mp4(tmp_path / "c.mp4", make_video(), np.zeros(samples), FPS, RATE)
        got, sound = read(tmp_path / "c.mp4")
        assert len(got) == 17 and len(sound) == 17000


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError):
        media.write_mp4(path, make_video(), np.zeros((2, 100)), FPS, RATE)
    with pytest.raises(Exception):  # a frame rate that no encoder takes  # noqa: B017
        media.write_mp4(path, make_video(), np.zeros(100), -1, RATE)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["clip.mp4"]
    with pytest.raises(UserError, match="no folder"):
        media.write_mp4(tmp_path / "absent" / "clip.mp4", make_video(), None, FPS, RATE)
    with pytest.raises(ValueError, match="uint8"):
        media.write_mp4(path, make_video().astype(float), None, FPS, RATE)


# ----------------------------------------------------------------------------------- time and place


def test_variable_frame_rate_follows_the_time_stamps(tmp_path):
    # On show: 20 from 0 s, 120 from 0.3 s, 220 from 1.0 s (three frames, unevenly spaced).
    write_frames(tmp_path / "v.mp4", [gray(20), gray(120), gray(220)], [0, 300, 1000])
    got, _ = read(tmp_path / "v.mp4", fps=10, frames=12)
    levels = got.mean((1, 2, 3))
    np.testing.assert_allclose(levels, [20] * 3 + [120] * 7 + [220] * 2, atol=3)


def test_windows_agree_with_the_whole(tmp_path):
    images = [gray(10 + 4 * k) for k in range(50)]
    write_frames(tmp_path / "v.mp4", images, range(0, 2000, 40))  # 25 fps, one key frame
    whole, _ = read(tmp_path / "v.mp4", fps=10)
    assert whole.shape[0] == 20 and media.probe(tmp_path / "v.mp4")["duration"] == pytest.approx(2.0, abs=0.05)
    np.testing.assert_allclose(whole.mean((1, 2, 3)), [10 + 4 * (5 * k // 2) for k in range(20)], atol=2)
    for first in (0, 1, 7, 17):
        window = {"start": first / 10, "frames": 5}
        part, _ = read(tmp_path / "v.mp4", fps=10, **window)
        have = min(5, 20 - first)
        np.testing.assert_array_equal(part[:have], whole[first:][:have])
        assert len(part) == 5
        np.testing.assert_array_equal(part[have:], np.repeat(part[have - 1 : have], 5 - have, axis=0))


def test_start_behind_the_end(tmp_path):
    write_frames(tmp_path / "v.mp4", [gray(10)] * 10, range(0, 400, 40))
    with pytest.raises(UserError, match="v.mp4.*5 s"):
        read(tmp_path / "v.mp4", start=5.0, frames=3)


@pytest.mark.parametrize("turn, corner", [(90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_rotation_is_applied(tmp_path, turn, corner):
    image = gray(20, 32, 64)
    image[:12, :12] = 240  # a bright top left corner
    write_frames(tmp_path / "v.mp4", [image] * 3, [0, 40, 80], turn=turn)
    size = (64, 32) if abs(turn) == 90 else (32, 64)
    got, _ = read(tmp_path / "v.mp4", size=size, frames=1)
    assert got[0][corner].mean() > 200 and got[0].mean() < 80


def test_fit_crops_the_center_and_keeps_the_shape():
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 200  # exactly the center square
    assert (media.fit(image, 20) == 200).all()
    assert media.fit(image, (10, 25)).shape == (10, 25, 3)
    blocks = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    big = blocks.repeat(5, axis=0).repeat(5, axis=1)
    np.testing.assert_array_equal(media.fit(big, 8), blocks)
    squeezed = image[:, ::2]  # pixels twice as wide as high
    assert (media.fit(squeezed, 20, pixel_aspect=2.0)[:, 2:-2] > 190).all()


@pytest.mark.parametrize("name, codec, sound", [("v.webm", "libvpx", "libopus"), ("v.avi", "mpeg4", "libmp3lame")])
def test_other_containers(tmp_path, name, codec, sound):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(96000) / 48000)[None]
    base = 25 if name.endswith("avi") else 1000
    images = [gray(40 + 3 * k) for k in range(50)]
    stamps = [k * base // 25 for k in range(50)]
    write_frames(tmp_path / name, images, stamps, codec=codec, base=base, audio=[(sound, "mono", tone)])
    got, audio = read(tmp_path / name)
    assert media.probe(tmp_path / name)["has_audio"] and abs(len(got) - 16) <= 1
    np.testing.assert_allclose(got[:15].mean((1, 2, 3)), [40 + 3 * (25 * k // 8) for k in range(15)], atol=4)
    assert np.abs(np.fft.rfft(audio[2000:10000])).argmax() == 440
    part, _ = read(tmp_path / name, start=1.0, frames=4)
    np.testing.assert_allclose(part.mean((1, 2, 3)), got[8:12].mean((1, 2, 3)), atol=2)


@pytest.mark.parametrize("layout, channels", [("mono", 1), ("stereo", 2), ("5.1", 6)])
def test_channels_are_mixed_without_overload(tmp_path, layout, channels):
    tone = 0.9 * np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)
    audio = [("aac", layout, np.tile(tone, (channels, 1)))]
    write_frames(tmp_path / "v.mp4", [gray(50)] * 25, range(0, 1000, 40), audio=audio)
    _, sound = read(tmp_path / "v.mp4")
    assert np.abs(np.fft.rfft(sound)).argmax() == 440
    middle, t = sound[1000:7000], np.arange(1000, 7000) / RATE
    assert 0.5 < np.abs(middle).max() <= 1.0
    waves = np.stack([np.sin(2 * np.pi * 440 * t), np.cos(2 * np.pi * 440 * t)], axis=1)
    part, *_ = np.linalg.lstsq(waves, middle, rcond=None)
    assert np.abs(middle - waves @ part).max() < 0.1  # a tone, not a clipped tone
    assert abs(np.arctan2(part[1], part[0])) < 2 * np.pi * 440 * 0.001  # and not late by 1 ms


# ------------------------------------------------------------------------------------------- faults


def test_corrupted_files_raise_only_user_errors(tmp_path):
    media.write_mp4(tmp_path / "good.mp4", make_video(), make_clicks(), FPS, RATE)
    good = np.frombuffer((tmp_path / "good.mp4").read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    path, raised = tmp_path / "bad.mp4", 0
    for trial in range(60):
        data = good.copy()
        if trial % 3 == 0:
            data = data[: rng.integers(1, len(data))]
        else:  # half of them in the header, where most of the structure is
            where = rng.integers(0, 1500 if trial % 3 == 1 else len(data), rng.integers(1, 40))
            data[where] = rng.integers(0, 256, len(where))
        path.write_bytes(data.tobytes())
        for reader in (
            lambda: read(path),
            lambda: media.probe(path),
            lambda: media.read_audio(path, RATE, 1),
        ):
            try:
                reader()
            except UserError as error:
                raised += 1
                assert "bad.mp4" in str(error) and "\n" not in str(error)
    assert raised > 30


@pytest.mark.parametrize(
    "content",
    [
        b"not a video at all",
        b"\0" * 5000,
        b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile good.mp4\n",
    ],
)
def test_files_that_are_no_video(tmp_path, content):
    media.write_mp4(tmp_path / "good.mp4", make_video(3), None, FPS, RATE)
    (tmp_path / "x.mp4").write_bytes(content)
    for reader in (read, media.probe, lambda p: media.read_audio(p, RATE, 1)):
        with pytest.raises(UserError, match="'x.mp4'") as error:
            reader(tmp_path / "x.mp4")
        one_line(error)


def test_missing_empty_folder_and_caps(tmp_path, monkeypatch):
    (tmp_path / "empty.mp4").touch()
    for path, fault in [
        (tmp_path / "absent.mp4", "no such file"),
        (tmp_path / "empty.mp4", "empty"),
        (tmp_path, "not a file"),
        ("a\0b.mp4", "no such file"),
    ]:
        for reader in (read, media.probe, lambda p: media.read_image(p, 8)):
            with pytest.raises(UserError, match=fault):
                reader(path)
    path = tmp_path / "clip.mp4"
    media.write_mp4(path, make_video(), None, FPS, RATE)
    with pytest.raises(UserError, match="ask for fewer"):
        read(path, frames=10**9)
    with pytest.raises(UserError, match="ask for fewer"):
        read(path, size=8192, fps=1000)
    for limit, fault in [
        ("MAX_PIXELS", "256x256"),
        ("MAX_SOURCE_FRAMES", "over 5 frames"),
        ("MAX_FILE_BYTES", "bytes are over the limit"),
    ]:
        monkeypatch.setattr(media, limit, 5)
        with pytest.raises(UserError, match=fault):
            read(path)
        monkeypatch.undo()


def test_one_medium_is_not_the_other(tmp_path):
    with wave.open(str(tmp_path / "s.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(44100)
        tone = 16000 * np.sin(2 * np.pi * 500 * np.arange(44100) / 44100)
        file.writeframes(tone.astype("<i2").repeat(2).tobytes())
    sound = media.read_audio(tmp_path / "s.wav", RATE, 1.5)
    t = np.arange(12000) / RATE
    expected = np.where(t < 1, 16000 / 32768 * np.sin(2 * np.pi * 500 * t), 0)
    assert sound.shape == (12000,) and np.abs(sound - expected)[100:7900].max() < 0.01
    assert not sound[8100:].any()
    with pytest.raises(UserError, match="no video stream"):
        read(tmp_path / "s.wav")
    media.write_mp4(tmp_path / "silent.mp4", make_video(3), None, FPS, RATE)
    with pytest.raises(UserError, match="no sound"):
        media.read_audio(tmp_path / "silent.mp4", RATE, 1)


def test_resample():
    for low, high in [(8000, 16000), (16000, 8000), (44100, 8000), (8000, 8000)]:
        tone = np.sin(2 * np.pi * 440 * np.arange(low) / low)
        got = media.resample(tone, low, high)
        expected = np.sin(2 * np.pi * 440 * np.arange(high) / high)
        assert got.dtype == np.float32 and got.shape == expected.shape
        assert np.abs(got - expected)[200:-200].max() < 1e-3
    assert media.resample(np.zeros(0), 8000, 16000).shape == (0,)


# ------------------------------------------------------------------------------------------- images


def test_read_image(tmp_path, monkeypatch):
    image = make_video(1, 32, 64)[0]
    Image.fromarray(image).save(tmp_path / "i.png")
    np.testing.assert_array_equal(media.read_image(tmp_path / "i.png", 32), image[:, 16:48])
    np.testing.assert_array_equal(media.read_image(tmp_path / "i.png", (32, 64)), image)
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned by 90 degrees
    Image.fromarray(image).save(tmp_path / "t.png", exif=turned)
    shown = media.read_image(tmp_path / "t.png", (64, 32))
    np.testing.assert_array_equal(shown, np.rot90(image, -1))
    deep = Image.fromarray((image[..., 0].astype(np.uint16) << 8) + 7)
    deep.save(tmp_path / "d.png")
    np.testing.assert_array_equal(media.read_image(tmp_path / "d.png", (32, 64))[..., 1], image[..., 0])
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        Image.fromarray(image).convert(mode).save(tmp_path / "m.tiff")
        assert media.read_image(tmp_path / "m.tiff", 16).shape == (16, 16, 3)

    data = (tmp_path / "i.png").read_bytes()
    for content in (data[: len(data) // 2], b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(UserError, match="bad.png") as error:
            media.read_image(tmp_path / "bad.png", 8)
        one_line(error)
    monkeypatch.setattr(media, "MAX_PIXELS", 100)
    with pytest.raises(UserError, match="64x32"):
        media.read_image(tmp_path / "i.png", 8)
