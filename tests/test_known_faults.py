"""Known faults, each with its smallest input and the right result. A test that begins to pass is no longer a fault.

The reason of a test names the fault, and the planned work that mends it.
"""

import io
import logging
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from tests.test_media import gray, write_frames
from vdm_jax.data import media
from vdm_jax.data.files import Files
from vdm_jax.errors import UserError

CLIP = {"frames": 17, "size": 32, "fps": 8, "sample_rate": 8000, "seed": 0}
READ = {"fps": 8, "size": 32, "sample_rate": 8000}


def fault(sentence, planned="Real data", raises=AssertionError):
    """Marks a test that fails with `raises` alone: an error of another kind fails the test run."""
    return pytest.mark.xfail(strict=True, raises=raises, reason=f"{sentence} Planned: {planned}")


def tone(seconds, channels=1):
    return np.tile(0.5 * np.sin(np.arange(48000 * seconds) * 0.0576), (channels, 1))


def small_video(path, shade=0, sound=True):
    """60 frames of one shade at 8 frames per second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = np.zeros(60000, np.float32) if sound else None
    media.write_mp4(path, np.full((60, 32, 32, 3), shade, np.uint8), audio, 8, 8000)


def boxes(data, start, end):
    """Yields (kind, start, length) of the boxes of an MP4 file."""
    while start < end:
        (length,) = struct.unpack(">I", data[start : start + 4])
        yield data[start + 4 : start + 8], start, length
        start += length


def box(kind, *parts):
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + kind + body


# ------------------------------------------------------------------------------------------ reading files


@fault("A clip whose sound cannot be decoded loses its picture.", raises=UserError)
@pytest.mark.parametrize("damage", ["unknown codec", "one packet"])
def test_a_clip_without_readable_sound_keeps_its_picture(tmp_path, damage):
    path = tmp_path / "x.mp4"
    write_frames(path, [gray(k) for k in range(120)], range(120), base=30, audio=[("aac", "stereo", tone(4, 2))])
    data = bytearray(path.read_bytes())
    if damage == "unknown codec":  # as FFmpeg meets the spatial sound of some phones
        data = data.replace(b"mp4a", b"apac", 1).replace(b"esds", b"dapa", 1)
    else:
        with av.open(str(path)) as container:
            packet = [p for p in container.demux(container.streams.audio[0]) if p.size][100]
        data[packet.pos : packet.pos + packet.size] = np.random.default_rng(0).bytes(packet.size)
    path.write_bytes(data)
    video, audio = media.read_video(path, **READ)
    assert video.shape == (32, 32, 32, 3) and audio.shape == (32000,)
    assert Files(tmp_path, **CLIP)[0]["video"].shape == (17, 32, 32, 3)


@fault("One damaged video packet loses the whole clip.", raises=UserError)
@pytest.mark.parametrize("name, codec", [("x.mp4", "libx264"), ("x.avi", "mpeg4")])
def test_one_damaged_packet_costs_no_more_than_its_frames(tmp_path, name, codec):
    path = tmp_path / name
    write_frames(path, [gray(2 * k) for k in range(120)], range(120), base=30, codec=codec)
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(container.streams.video[0]) if p.size][80]
    data = bytearray(path.read_bytes())
    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    video, _ = media.read_video(path, **READ)
    assert video.shape == (32, 32, 32, 3)
    expected = [2 * (30 * k // 8) for k in range(20)]  # before the damage
    np.testing.assert_allclose(video[:20].mean((1, 2, 3)), expected, atol=4)


@fault("A cover picture that comes before the video is taken for the video.")
def test_a_cover_picture_is_not_the_video(tmp_path):
    path = tmp_path / "x.mp4"
    frames = [gray(k, 64, 96) for k in range(180)]
    write_frames(path, frames, range(180), base=30, audio=[("aac", "mono", tone(6))])
    data, jpeg = path.read_bytes(), io.BytesIO()
    Image.fromarray(np.full((48, 48, 3), (250, 0, 0), np.uint8)).save(jpeg, "JPEG")
    cover = box(b"covr", box(b"data", struct.pack(">II", 13, 0), jpeg.getvalue()))
    handler = box(b"hdlr", struct.pack(">II", 0, 0), b"mdir", b"appl", bytes(8), b"\0")
    tags = box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", cover)))
    at, length = next((at, length) for kind, at, length in boxes(data, 0, len(data)) if kind == b"moov")
    parts = [data[a : a + n] for kind, a, n in boxes(data, at + 8, at + length) if kind != b"udta"]
    movie = box(b"moov", parts[0], tags, *parts[1:])  # the tags come before the tracks, so the cover is stream 0
    path.write_bytes(data[:at] + movie + data[at + length :])
    video, _ = media.read_video(path, fps=8, size=(64, 96), sample_rate=8000)
    assert np.ptp(video.mean((1, 2, 3))) > 20
    item = Files(tmp_path, **CLIP)[0]
    assert np.ptp(item["video"].mean((1, 2, 3))) > 20  # a brightening video, not a still


@fault("Of a film whose sound is longer than its picture, most windows are one frozen frame.")
def test_a_film_ends_with_its_picture(tmp_path):
    path = tmp_path / "x.mkv"
    write_frames(path, [gray(2 * k) for k in range(90)], range(90), base=30, audio=[("aac", "mono", tone(15))])
    source = Files(tmp_path, **CLIP)
    still = sum(np.ptp(source[i]["video"].mean((1, 2, 3))) < 1 for i in range(8))
    assert media.probe(path)["duration"] == pytest.approx(3, abs=0.1) and still == 0


ONE, UNIT = 1 << 16, 1 << 30
WIDTH, HEIGHT = 96 << 16, 64 << 16


@fault("A display matrix that mirrors is read as a rotation by 180 degrees.")
@pytest.mark.parametrize(
    "matrix, corners",
    [
        pytest.param((-ONE, 0, 0, 0, ONE, 0, WIDTH, 0, UNIT), ["GR", ".."], id="left and right"),
        pytest.param((ONE, 0, 0, 0, -ONE, 0, 0, HEIGHT, UNIT), ["..", "RG"], id="up and down"),
        pytest.param((0, ONE, 0, ONE, 0, 0, 0, 0, UNIT), ["R.", "G."], id="portrait"),
    ],
)
def test_a_mirrored_video_is_mirrored(tmp_path, matrix, corners):
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
    frame = media.read_video(path, fps=8, size=size, sample_rate=8000)[0][0]

    def color(patch):
        return "R" if patch[..., 0].mean() > 120 else "G" if patch[..., 1].mean() > 120 else "."

    rows = (slice(0, 8), slice(-8, None))
    assert ["".join(color(frame[y, x]) for x in rows) for y in rows] == corners


PQ, HLG = 16, 18  # numbers of the transfer functions in H.273


def pq(light):
    """SMPTE ST 2084; light: 1 is diffuse white, 203 cd/m^2."""
    y = (light * 203 / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(light):
    """ITU-R BT.2100; light: 1 is diffuse white, 75 % of the signal."""
    light = light * 0.265
    log = 0.17883277 * np.log(np.maximum(12 * light - 0.28466892, 1e-9)) + 0.55991073
    return np.where(light <= 1 / 12, np.sqrt(3 * light), log)


@fault("HDR values are taken for SDR values, without a warning.")
@pytest.mark.parametrize("transfer, signal", [(PQ, pq), (HLG, hlg)], ids=["PQ", "HLG"])
@pytest.mark.parametrize("color", [(1, 1, 1), (1, 0, 0)], ids=["white", "red"])
def test_hdr_becomes_sdr_or_is_named(tmp_path, caplog, transfer, signal, color):
    bt2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])  # from BT.709
    red, green, blue = np.clip(signal(bt2020 @ np.array(color, float)), 0, 1)
    luma = 0.2627 * red + 0.678 * green + 0.0593 * blue
    planes = (16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8814, 128 + 224 * (red - luma) / 1.4746)
    with av.open(str(tmp_path / "x.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"qp": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le"
        context = stream.codec_context
        context.colorspace = context.color_primaries = 9  # BT.2020
        context.color_trc = transfer
        context.color_range = 1  # limited
        for k in range(4):
            frame = av.VideoFrame(64, 64, "yuv420p10le")
            for plane, value in zip(frame.planes, planes):
                plane.update(np.full(plane.buffer_size // 2, round(4 * value), np.uint16).tobytes())
            frame.pts, frame.time_base = k, Fraction(1, 30)
            frame.colorspace, frame.color_range = 9, 1
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with caplog.at_level(logging.WARNING):
        pixel = Files(tmp_path, **{**CLIP, "frames": 1}, held_out=0.0)[0]["video"][0, 16, 16]
    error = np.abs(pixel - 255.0 * np.array(color)).max()
    assert error < 40 or any("HDR" in line and "x.mp4" in line for line in caplog.messages)


# ------------------------------------------------------------------------------------------ threads


@fault("All threads wait for one lock while any of them decodes a video.")
def test_two_threads_decode_two_videos_at_the_same_time(tmp_path, monkeypatch):
    for number in range(2):
        small_video(tmp_path / f"{number}.mp4")
    read_video, both, met = media.read_video, threading.Barrier(2), []

    def wait_for_the_other(path, **settings):
        try:
            both.wait(timeout=2)
            met.append(True)
        except threading.BrokenBarrierError:
            met.append(False)
        return read_video(path, **settings)

    monkeypatch.setattr(media, "read_video", wait_for_the_other)
    source = Files(tmp_path, **CLIP)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(source.__getitem__, range(2)))  # the two videos of the first epoch
    assert met == [True, True]
