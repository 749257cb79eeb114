import io
import os
import struct
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from vdm_jax.data import color, media, writing
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
        stream.pix_fmt, stream.time_base = "yuvj420p" if codec == "mjpeg" else "yuv420p", Fraction(1, base)
        stream.bit_rate = 1_000_000
        stream.codec_context.time_base = Fraction(1, base)
        if turn:
            stream.set_display_rotation(turn)
        sounds = [out.add_stream(sound_codec, rate=48000, layout=layout) for sound_codec, layout, _ in audio]
        for sound, (_, layout, samples) in zip(sounds, audio):
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
    writing.write_mp4(path, video, audio, FPS, RATE)
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
    writing.write_mp4(path, make_video(), make_clicks(), FPS, RATE)
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
    writing.write_mp4(tmp_path / "clip.mp4", make_video(16), audio, FPS, rate)
    sound = media.read_audio(tmp_path / "clip.mp4", rate, 2.0)
    lag = np.correlate(sound[: rate // 4], audio[: rate // 4], "full").argmax() - (rate // 4 - 1)
    assert abs(lag) <= 0.001 * rate and sound.shape == audio.shape


@pytest.mark.parametrize("fps", [8, 12.5, 24000 / 1001, 30])
def test_every_frame_rate(tmp_path, fps):
    video = make_video(20)
    writing.write_mp4(tmp_path / "clip.mp4", video, None, fps, RATE)
    got, _ = read(tmp_path / "clip.mp4", fps=fps)
    assert got.shape == video.shape and psnr(got, video) > 45


def test_odd_sizes_are_padded(tmp_path):
    video = make_video(5, 257, 301)
    writing.write_mp4(tmp_path / "clip.mp4", video, None, FPS, RATE)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert (container.streams.video[0].height, container.streams.video[0].width) == (258, 302)
    got, sound = read(tmp_path / "clip.mp4", size=(258, 302))
    assert psnr(got[:, :257, :301], video) > 30 and not media.probe(tmp_path / "clip.mp4")["has_audio"]
    assert sound.shape == (5000,) and not sound.any()


def test_bad_sound_values_do_not_stop_the_writer(tmp_path):
    audio = np.full(17000, 3.0)
    audio[:4000] = np.nan
    writing.write_mp4(tmp_path / "clip.mp4", make_video(), audio, FPS, RATE)
    _, sound = read(tmp_path / "clip.mp4")
    assert np.isfinite(sound).all() and np.abs(sound[:3000]).max() < 0.05


def test_sound_shorter_or_longer_than_the_picture(tmp_path):
    for samples in (0, 900, 20000):
        writing.write_mp4(tmp_path / "c.mp4", make_video(), np.zeros(samples), FPS, RATE)
        got, sound = read(tmp_path / "c.mp4")
        assert len(got) == 17 and len(sound) == 17000


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError):
        writing.write_mp4(path, make_video(), np.zeros((2, 100)), FPS, RATE)
    with pytest.raises(Exception):  # a frame rate that no encoder takes  # noqa: B017
        writing.write_mp4(path, make_video(), np.zeros(100), -1, RATE)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["clip.mp4"]
    with pytest.raises(UserError, match="no folder"):
        writing.write_mp4(tmp_path / "absent" / "clip.mp4", make_video(), None, FPS, RATE)
    with pytest.raises(ValueError, match="uint8"):
        writing.write_mp4(path, make_video().astype(float), None, FPS, RATE)


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
    writing.write_mp4(tmp_path / "good.mp4", make_video(), make_clicks(), FPS, RATE)
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
    writing.write_mp4(tmp_path / "good.mp4", make_video(3), None, FPS, RATE)
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
    writing.write_mp4(path, make_video(), None, FPS, RATE)
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
    writing.write_mp4(tmp_path / "silent.mp4", make_video(3), None, FPS, RATE)
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


# ---------------------------------------------------------------------------------- real files: damage and streams


def tone(seconds, channels=1, hertz=440):
    return np.tile(0.5 * np.sin(2 * np.pi * hertz * np.arange(48000 * seconds) / 48000), (channels, 1))


def frequency(sound):
    return np.abs(np.fft.rfft(sound)).argmax() * RATE / len(sound)


@pytest.fixture
def told(monkeypatch):
    """The warnings of media."""
    lines = []
    monkeypatch.setattr(media.logger, "warning", lambda message, *args: lines.append(message % args))
    return lines


def overwrite_packet(path, kind, number, content=bytes):
    """Overwrites a packet of a file's first stream of a kind."""
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[0]
        packet = [p for p in container.demux(stream) if p.size][number]
    data = bytearray(path.read_bytes())
    data[packet.pos : packet.pos + packet.size] = content(packet.size)
    path.write_bytes(data)


def test_damaged_sound_costs_neither_the_picture_nor_the_other_sound(tmp_path, told):
    path = tmp_path / "x.mp4"
    write_frames(path, [gray(k) for k in range(60)], range(60), base=30, audio=[("aac", "stereo", tone(2, 2))])
    overwrite_packet(path, "audio", 50, np.random.default_rng(0).bytes)  # at about 1.1 s
    for _ in range(2):
        video, sound = read(path)
    assert video.shape == (16, 32, 32, 3) and frequency(sound[:8000]) == frequency(sound[10000:]) == 440
    assert media.probe(path)["has_audio"] and media.read_audio(path, RATE, 2).any()
    assert [line for line in told if "x.mp4" in line and "damaged" in line and "sound" in line] == told[:1] == told


def test_the_first_sound_that_can_be_decoded_is_used(tmp_path):
    path = tmp_path / "x.mp4"
    tracks = [("aac", "mono", tone(1)), ("aac", "mono", tone(1, hertz=1000))]
    write_frames(path, [gray(k) for k in range(30)], range(30), base=30, audio=tracks)
    data = path.read_bytes()
    for known in (1, 0):  # spatial sound of a phone is a codec that FFmpeg does not decode
        data = data.replace(b"mp4a", b"apac", 1).replace(b"esds", b"dapa", 1)
        path.write_bytes(data)
        video, sound = read(path)
        assert video.shape == (8, 32, 32, 3) and media.probe(path)["has_audio"] == bool(known)
        assert frequency(sound) == 1000 if known else not sound.any()
    with pytest.raises(UserError, match="sound cannot be decoded"):
        media.read_audio(path, RATE, 1)


def test_sound_goes_on_where_its_channels_change(tmp_path):
    parts = []
    for layout, channels in (("stereo", 2), ("mono", 1)):
        write_frames(tmp_path / "x.ts", [gray(9)], [0], format="mpegts", audio=[("aac", layout, tone(1, channels))])
        with av.open(str(tmp_path / "x.ts")) as container:
            parts += [bytes(packet) for packet in container.demux(audio=0)]
    (tmp_path / "x.aac").write_bytes(b"".join(parts))
    sound = media.read_audio(tmp_path / "x.aac", RATE, 2.0)
    assert frequency(sound[:6000]) == pytest.approx(440, abs=2) == frequency(sound[10000:16000])


@pytest.mark.parametrize("name, codec", [("x.mp4", "libx264"), ("x.avi", "mpeg4"), ("x.mov", "mjpeg")])
def test_a_damaged_packet_costs_no_more_than_its_frames(tmp_path, told, name, codec):
    path = tmp_path / name
    write_frames(path, [gray(2 * k) for k in range(120)], range(120), base=30, codec=codec)
    overwrite_packet(path, "video", 80)
    video, _ = read(path)
    assert video.shape == (32, 32, 32, 3)
    expected = [2 * (30 * k // 8) for k in range(20)]  # before the damage
    np.testing.assert_allclose(video[:20].mean((1, 2, 3)), expected, atol=4)
    assert len(told) == 1 and name in told[0] and "picture" in told[0]


@pytest.mark.parametrize("name, codec", [("x.mkv", "libx264"), ("x.mp4", "libx264"), ("x.ts", "mpeg2video")])
def test_a_file_that_is_cut_off_has_the_length_of_the_rest(tmp_path, name, codec):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    write_frames(path, [np.roll(noise, k, 1) for k in range(90)], range(90), base=30, codec=codec)
    data = path.read_bytes()
    if name == "x.mp4":  # the index comes first, as on a web page
        writing.write_mp4(path, np.stack([np.roll(noise, k, 1) for k in range(90)]), None, 30, RATE)
        data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    length = media.probe(path)["duration"]
    assert 1.2 < length < 2.6 and len(read(path, fps=30)[0]) == pytest.approx(30 * length, abs=2)


def test_the_length_is_that_of_the_picture(tmp_path):
    for name, codec, sound in (("x.mkv", "libx264", "aac"), ("x.webm", "libvpx", "libopus")):
        path, frames = tmp_path / name, [gray(k) for k in range(25)]
        write_frames(path, frames, range(0, 1000, 40), codec=codec, audio=[(sound, "mono", tone(4))])
        assert media.probe(path)["duration"] == pytest.approx(1, abs=0.1)
        video, audio = read(path)
        assert len(audio) == 1000 * len(video) and frequency(audio[:6000]) == pytest.approx(440, abs=2)


def boxes(data, start, end):
    """Yields (kind, start, length) of the boxes of an MP4 file."""
    while start < end:
        (length,) = struct.unpack(">I", data[start : start + 4])
        yield data[start + 4 : start + 8], start, length
        start += length


def box(kind, *parts):
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + kind + body


def test_a_cover_picture_is_not_the_video(tmp_path):
    path = tmp_path / "x.mp4"
    write_frames(path, [gray(4 * k) for k in range(30)], range(30), base=30, audio=[("aac", "mono", tone(1))])
    data, jpeg = path.read_bytes(), io.BytesIO()
    Image.fromarray(np.full((48, 48, 3), (250, 0, 0), np.uint8)).save(jpeg, "JPEG")
    cover = box(b"covr", box(b"data", struct.pack(">II", 13, 0), jpeg.getvalue()))
    handler = box(b"hdlr", struct.pack(">II", 0, 0), b"mdir", b"appl", bytes(8), b"\0")
    tags = box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", cover)))
    at, length = next((at, length) for kind, at, length in boxes(data, 0, len(data)) if kind == b"moov")
    parts = [data[a : a + n] for kind, a, n in boxes(data, at + 8, at + length) if kind != b"udta"]
    movie = box(b"moov", parts[0], tags, *parts[1:])  # the tags come before the tracks, so the cover is stream 0
    path.write_bytes(data[:at] + movie + data[at + length :])
    assert media.probe(path)["size"] == (32, 32) and np.ptp(read(path)[0].mean((1, 2, 3))) > 50
    path.write_bytes(data[:at] + box(b"moov", parts[0], tags, *parts[2:]) + data[at + length :])
    with pytest.raises(UserError, match="no video stream"):  # a song with a cover
        read(path)
    assert media.kind(path) == "sound only"


@pytest.mark.parametrize("name", ["x.mov", "x.mkv"])
def test_a_still_beside_the_video_is_not_the_video(tmp_path, name):
    with av.open(str(tmp_path / name), "w") as out:
        streams = [out.add_stream("mjpeg", rate=30), out.add_stream("libx264", rate=30)]
        for stream, form in zip(streams, ("yuvj420p", "yuv420p")):
            stream.width, stream.height, stream.pix_fmt = 32, 32, form
        for stream, count in zip(streams, (1, 30)):
            for k in range(count):
                frame = av.VideoFrame.from_ndarray(gray(4 * k), format="rgb24")
                frame.pts, frame.time_base = k, Fraction(1, 30)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    assert np.ptp(read(tmp_path / name)[0].mean((1, 2, 3))) > 50


ONE, UNIT = 1 << 16, 1 << 30
WIDTH, HEIGHT = 96 << 16, 64 << 16


@pytest.mark.parametrize(
    "matrix, corners",
    [
        pytest.param((ONE, 0, 0, 0, ONE, 0, 0, 0, UNIT), ["RG", ".."], id="as it is"),
        pytest.param((-ONE, 0, 0, 0, -ONE, 0, WIDTH, HEIGHT, UNIT), ["..", "GR"], id="by 180 degrees"),
        pytest.param((0, ONE, 0, -ONE, 0, 0, HEIGHT, 0, UNIT), [".R", ".G"], id="to the right"),
        pytest.param((0, -ONE, 0, ONE, 0, 0, 0, WIDTH, UNIT), ["G.", "R."], id="to the left"),
        pytest.param((-ONE, 0, 0, 0, ONE, 0, WIDTH, 0, UNIT), ["GR", ".."], id="left and right"),
        pytest.param((ONE, 0, 0, 0, -ONE, 0, 0, HEIGHT, UNIT), ["..", "RG"], id="up and down"),
        pytest.param((0, ONE, 0, ONE, 0, 0, 0, 0, UNIT), ["R.", "G."], id="portrait"),
        pytest.param((0, -ONE, 0, -ONE, 0, 0, HEIGHT, WIDTH, UNIT), [".G", ".R"], id="portrait by 180 degrees"),
    ],
)
def test_a_display_matrix_turns_and_mirrors(tmp_path, matrix, corners):
    path, image = tmp_path / "x.mp4", gray(20, 64, 96)
    image[:20, :30] = (250, 20, 20)  # red at the top left, green at the top right
    image[:20, -30:] = (20, 250, 20)
    write_frames(path, [image] * 4, range(4), base=30)
    data = path.read_bytes()
    movie = next((a, n) for kind, a, n in boxes(data, 0, len(data)) if kind == b"moov")
    track = next((a, n) for kind, a, n in boxes(data, movie[0] + 8, sum(movie)) if kind == b"trak")
    header = next(a for kind, a, n in boxes(data, track[0] + 8, sum(track)) if kind == b"tkhd")
    data = bytearray(data)
    data[header + 48 : header + 84] = struct.pack(">9i", *matrix)
    path.write_bytes(data)
    size = (96, 64) if matrix[0] == 0 else (64, 96)

    def letter(patch):
        return "R" if patch[..., 0].mean() > 120 else "G" if patch[..., 1].mean() > 120 else "."

    ends = (slice(0, 4), slice(-4, None))
    assert media.probe(path)["size"] == size
    for shape in (size, (size[0] // 3, size[1] // 3)):
        frame = read(path, size=shape)[0][0]
        assert ["".join(letter(frame[y, x]) for x in ends) for y in ends] == corners


# --------------------------------------------------------------------------------------- real files: colors and sizes


def write_flat(path, planes, *, bits=8, matrix=2, limited=True, primaries=2, transfer=2, size=(64, 64)):
    """Two frames of one color without loss: (Y, Cb, Cr) in units of 8 bits, and numbers of H.273."""
    form = "yuv420p" if bits == 8 else "yuv420p10le"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=8)
        stream.height, stream.width = size
        stream.pix_fmt, context = form, stream.codec_context
        context.colorspace, context.color_range = matrix, 1 if limited else 2
        context.color_primaries, context.color_trc = primaries, transfer
        for k in range(2):
            frame = av.VideoFrame(*size[::-1], form)
            for plane, value in zip(frame.planes, planes):
                values = np.full(plane.buffer_size * 8 // (16 if bits > 8 else 8), round(value * 2 ** (bits - 8)))
                plane.update(values.astype(np.uint16 if bits > 8 else np.uint8).tobytes())
            frame.pts, frame.time_base = k, Fraction(1, 8)
            frame.colorspace, frame.color_range = matrix, 1 if limited else 2
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def encode(rgb, kr, kb, limited=True):
    """ITU-R BT.601, BT.709 and BT.2020: R'G'B' in [0, 1] as (Y, Cb, Cr) in units of 8 bits."""
    r, g, b = rgb
    y = kr * r + (1 - kr - kb) * g + kb * b
    luma, chroma = (219, 224) if limited else (255, 255)
    cb, cr = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    return 16 * limited + luma * y, 128 + chroma * cb, 128 + chroma * cr


BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)


@pytest.mark.parametrize("limited", [True, False], ids=["limited", "full"])
@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize(
    "matrix, weights, size",
    [
        pytest.param(1, BT709, (64, 64), id="BT.709"),
        pytest.param(5, BT601, (64, 64), id="BT.601, PAL"),
        pytest.param(6, BT601, (64, 64), id="BT.601, NTSC"),
        pytest.param(9, BT2020, (64, 64), id="BT.2020"),
        pytest.param(2, BT601, (64, 64), id="unmarked"),
        pytest.param(2, BT709, (64, 1280), id="unmarked, HD"),
    ],
)
def test_matrices_and_ranges(tmp_path, matrix, weights, size, bits, limited):
    rgb = np.array([0.8, 0.3, 0.1])
    write_flat(tmp_path / "x.mkv", encode(rgb, *weights, limited), bits=bits, matrix=matrix, limited=limited, size=size)
    for shape in (64, 24):  # as it is, and scaled
        np.testing.assert_allclose(read(tmp_path / "x.mkv", size=shape)[0][0, 9, 9], 255 * rgb, atol=2)


@pytest.mark.parametrize("transfer, signal", [(color.PQ, color.pq_signal(50.0)), (color.HLG, 0.75)], ids=["PQ", "HLG"])
@pytest.mark.parametrize("primaries", [9, 2])
def test_hdr_becomes_sdr(tmp_path, transfer, signal, primaries):
    write_flat(
        tmp_path / "x.mkv", encode([signal] * 3, *BT2020), bits=10, matrix=9, primaries=primaries, transfer=transfer
    )
    expected = color.to_sdr(np.full(3, signal), 9, transfer)  # see test_color.py
    for shape in (64, 24):
        np.testing.assert_allclose(read(tmp_path / "x.mkv", size=shape)[0][0, 9, 9], expected, atol=1)


def test_frames_are_scaled_as_images_are(tmp_path):
    y, x = np.mgrid[:96, :180]
    waves = 128 + 100 * np.stack([np.sin(x / 9), np.cos((x + y) / 11), np.sin(y / 8 + x / 30)], -1)
    write_frames(tmp_path / "x.mkv", [waves.astype(np.uint8)], [0], codec="ffv1")
    for size in (96, 40, (24, 45), (150, 200), (90, 10)):
        expected = media.fit(waves.astype(np.uint8), size)
        assert psnr(read(tmp_path / "x.mkv", size=size)[0][0], expected) > 30


def test_transparent_frames_are_over_white(tmp_path):
    frames = [Image.fromarray(np.full((32, 32, 4), (200, 20, 20, alpha), np.uint8)) for alpha in (255, 128, 0)]
    frames[0].save(tmp_path / "x.png", save_all=True, append_images=frames[1:], duration=500)
    video, _ = read(tmp_path / "x.png")
    assert media.kind(tmp_path / "x.png") == "video" and len(video) >= 9
    np.testing.assert_allclose(video[[0, 4, 8], 9, 9], [[200, 20, 20], [227, 137, 137], [255, 255, 255]], atol=2)


@pytest.mark.parametrize("fps, rate", [(24, 22050), (30, 22050), (12.5, 8000), (Fraction(30000, 1001), 44100)])
def test_rates_that_do_not_divide(tmp_path, fps, rate):
    writing.write_mp4(tmp_path / "x.mp4", make_video(32), make_clicks(), FPS, RATE)
    video, sound = read(tmp_path / "x.mp4", fps=fps, sample_rate=rate, start=0.5, frames=20)
    assert len(video) == 20 and len(sound) == int(20 * rate / fps)
    if fps < 20:  # of the clicks, the one at 0.777 s
        assert np.abs(sound).argmax() == pytest.approx(0.277 * rate, abs=0.01 * rate)


# ----------------------------------------------------------------------------------------------- content of files


CODECS = {
    "mpegts": "mpeg2video",
    "mpeg": "mpeg1video",
    "flv": "flv",
    "asf": "wmv2",
    "mxf": "mpeg2video",
    "h264": "libx264",
    "nut": "ffv1",
}


@pytest.mark.parametrize("form, codec", CODECS.items())
def test_containers_are_told_by_their_content(tmp_path, form, codec):
    path = tmp_path / "x"
    levels = [30 + 4 * k for k in range(30)]
    write_frames(path, [gray(level, 48, 64) for level in levels], range(30), base=30, codec=codec, format=form)
    assert media.kind(path) == "video"
    length = media.probe(path)["duration"]
    video, _ = read(path, fps=5)
    rate = 25 if form == "h264" else 30  # the bare stream states no rate
    assert length == pytest.approx(30 / rate, abs=0.1) and len(video) == pytest.approx(150 / rate, abs=1)
    np.testing.assert_allclose(video.mean((1, 2, 3))[:5], levels[:: rate // 5][: len(video)][:5], atol=9)


def test_kinds_of_files(tmp_path):
    image = Image.fromarray(make_video(1)[0])
    for name in ("x.png", "x.gif", "x.webp", "x.avif"):
        image.save(tmp_path / name)
        assert media.kind(tmp_path / name) == "image"
    write_frames(tmp_path / "x.mka", [gray(9)], [0], format="matroska", audio=[("flac", "mono", tone(1))])
    assert media.kind(tmp_path / "x.mka") == "video"
    for name, content in (("x.txt", b"a red ball"), ("x.json", b"{}"), ("empty", b""), ("x.mp4", bytes(999))):
        (tmp_path / name).write_bytes(content)
        assert media.kind(tmp_path / name) is None
    assert media.kind(tmp_path) is None and media.kind(tmp_path / "absent") is None


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


def test_an_image_is_a_video_of_one_frame(tmp_path):
    image = make_video(1, 32, 64)[0]
    Image.fromarray(image).save(tmp_path / "i.png")
    assert media.probe(tmp_path / "i.png") == {"duration": 0, "has_audio": False, "size": (32, 64), "fps": 0}
    video, sound = read(tmp_path / "i.png", size=(32, 64), frames=3)
    np.testing.assert_array_equal(video, image[None].repeat(3, 0))
    assert sound.shape == (3000,) and not sound.any() and len(read(tmp_path / "i.png")[0]) == 1


def test_values_of_images(tmp_path):
    half = np.full((8, 8, 4), (200, 0, 0, 128), np.uint8)
    for name in ("x.png", "x.webp", "x.avif"):  # over white: 200 * 0.5 + 255 * 0.5
        Image.fromarray(half).save(tmp_path / name, quality=100)
        np.testing.assert_allclose(media.read_image(tmp_path / name)[4, 4], [227, 127, 127], atol=3)
    palette = Image.fromarray(half[..., :3]).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "x.png", transparency=palette.getpixel((0, 0)))
    assert (media.read_image(tmp_path / "x.png") == 255).all()
    levels = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for image, name in (
        (Image.fromarray(levels), "x.tiff"),  # floating point
        (Image.fromarray((levels * 65535).astype(np.uint16)), "x.png"),
        (Image.fromarray((levels * 65535).astype(np.uint16)), "x.tiff"),
        (Image.fromarray((levels * 65535).astype(np.int32)), "x.tiff"),
    ):
        image.save(tmp_path / name)
        np.testing.assert_allclose(media.read_image(tmp_path / name)[..., 0], 255 * levels, atol=1)


def test_heic_is_refused_in_one_line(tmp_path):
    Image.fromarray(make_video(1)[0]).save(tmp_path / "x.avif")
    data = (tmp_path / "x.avif").read_bytes()
    (tmp_path / "x.heic").write_bytes(data.replace(b"avif", b"heic", 1))
    assert media.kind(tmp_path / "x.heic") == "image"
    for reader in (media.read_image, media.probe, read):
        with pytest.raises(UserError, match="'x.heic': it is a HEIC image.*convert"):
            reader(tmp_path / "x.heic")
