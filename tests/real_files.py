"""A folder of files as people have them, whose truth is known: `python -m tests.real_files [--count=600] [--seed=0]`.

The films have four colored quarters, are dark for half a second and then bright, and hum at 440 Hz. They differ in
codec, container, bits, transfer, orientation, frame times and sound. Some are broken in one of twelve ways, and some
files are no films. Each film is read back, and the summary of the folder must be what was made.
"""

import argparse
import collections
import os
import random
import shutil
import struct
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from vdm_jax.data import color, listing, media
from vdm_jax.data.files import Files
from vdm_jax.data.shards import HIDDEN, OUTSIDE
from vdm_jax.errors import UserError

os.environ["SVT_LOG"] = "1"  # else the encoder of AV1 tells its settings for each film

HEIGHT, WIDTH = 96, 128
SECONDS, RATE, HERTZ = 1.5, 20, 440
QUARTERS = np.array([[[200, 60, 60], [60, 200, 60]], [[60, 60, 200], [200, 200, 60]]])  # top left, top right, ...
LIGHT = np.array([[30.0, 80.0], [150.0, 10.0]])  # cd/m^2 of the gray quarters of an HDR film
BT2020_LUMA = 219 * 4, 64  # scale and offset of limited range in 10 bits
READ = dict(fps=8, sample_rate=8000, size=(48, 64))


class Codec(NamedTuple):
    encoder: str
    endings: tuple  # of containers that hold it
    formats: tuple  # of pixels, 8 bits first
    options: dict


CODECS = {
    "h264": Codec("libx264", ("mp4", "mov", "mkv", "ts"), ("yuv420p", "yuv420p10le"), {"crf": "18"}),
    "hevc": Codec("libx265", ("mp4", "mkv"), ("yuv420p", "yuv420p10le"), {"x265-params": "log-level=none:crf=18"}),
    "vp9": Codec("libvpx-vp9", ("webm", "mkv"), ("yuv420p",), {"crf": "20", "b": "0", "cpu-used": "8"}),
    "av1": Codec("libsvtav1", ("mp4", "webm"), ("yuv420p", "yuv420p10le"), {"crf": "20", "preset": "12"}),
    "prores": Codec("prores_ks", ("mov",), ("yuv422p10le",), {}),
    "mjpeg": Codec("mjpeg", ("avi", "mov"), ("yuvj420p",), {"q": "2"}),
}
SOUNDS = {  # {container: {encoder: sample rates}}
    "mp4": {"aac": (8000, 22050, 44100, 48000, 96000), "libmp3lame": (32000, 44100)},
    "mov": {"pcm_s16le": (8000, 48000, 96000), "aac": (44100,)},
    "mkv": {"flac": (11025, 48000), "libopus": (48000,), "ac3": (48000,)},
    "webm": {"libopus": (48000,)},
    "ts": {"aac": (44100, 48000)},
    "avi": {"pcm_s16le": (8000, 44100), "libmp3lame": (44100,)},
}
MATRICES = {  # (a, b, c, d): what a display matrix does to the picture
    "turned": (0, 1, -1, 0),
    "turned back": (0, -1, 1, 0),
    "upside down": (-1, 0, 0, -1),
    "mirrored": (-1, 0, 0, 1),
}


class Film(NamedTuple):
    """What a film is."""

    codec: str
    ending: str
    bits: int
    transfer: int | None  # color.PQ, color.HLG, or None for SDR
    matrix: str | None
    variable: bool
    sound: tuple | None  # (encoder, sample rate, channel layout)


def draw_film(rng):
    codec = rng.choice(list(CODECS))
    ending = rng.choice(CODECS[codec].endings)
    bits = rng.choice((8, 10)) if len(CODECS[codec].formats) > 1 else 8
    hdr = bits == 10 and codec in ("hevc", "av1") and rng.random() < 0.6
    encoder = rng.choice(list(SOUNDS[ending]))
    layouts = ("mono", "stereo") if encoder == "libmp3lame" else ("mono", "stereo", "5.1")
    sound = (encoder, rng.choice(SOUNDS[ending][encoder]), rng.choice(layouts)) if rng.random() < 0.7 else None
    return Film(
        codec,
        ending,
        bits,
        rng.choice((color.PQ, color.HLG)) if hdr else None,
        rng.choice(list(MATRICES)) if ending in ("mp4", "mov") and rng.random() < 0.4 else None,
        ending in ("mp4", "mkv", "webm") and rng.random() < 0.3,
        sound,
    )


def write_film(path, film, sound_seconds=SECONDS):
    """Writes a film, whose frames are those of `picture` before its display matrix."""
    codec = CODECS[film.codec]
    base = Fraction(1, 1000)
    times = [round(1000 * k / RATE) for k in range(int(SECONDS * RATE))]
    if film.variable:  # every fifth frame is missing, but those around the change of light are there
        times = [t for k, t in enumerate(times) if k % 5 != 3]
    form = {"mkv": "matroska", "ts": "mpegts"}.get(film.ending, film.ending)
    with av.open(str(path), "w", format=form) as out:
        stream = out.add_stream(codec.encoder, rate=RATE, options=codec.options)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = codec.formats[film.bits == 10]
        context = stream.codec_context
        context.gop_size = 10
        if film.ending != "avi":
            stream.time_base = context.time_base = base
        if film.transfer:
            context.color_trc, context.color_primaries, context.colorspace = film.transfer, 9, 9
            context.color_range = 1
        if film.sound:
            encoder, rate, layout = film.sound
            track = out.add_stream(encoder, rate=rate, layout=layout)
        for number, time in enumerate(times):
            frame = frame_of(film, stream.pix_fmt, bright=time >= 500)
            frame.pts = number if film.ending == "avi" else time
            frame.time_base = Fraction(1, RATE) if film.ending == "avi" else base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if film.sound:
            write_sound(out, track, rate, layout, sound_seconds)
    if film.matrix:
        set_matrix(path, MATRICES[film.matrix])


def frame_of(film, pixel_format, bright):
    """Returns the frame of a film before its display matrix."""
    if film.transfer is None:
        rgb = grown(QUARTERS if bright else QUARTERS // 2).astype(np.uint8)
        return av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format=pixel_format)
    light = LIGHT if bright else LIGHT / 2
    signal = color.pq_signal(light) if film.transfer == color.PQ else hlg_signal(light)
    scale, offset = BT2020_LUMA
    luma = grown(np.round(signal * scale + offset)).astype("<u2")
    frame = av.VideoFrame(WIDTH, HEIGHT, "yuv420p10le")
    for plane, values in zip(frame.planes, (luma, *[np.full((HEIGHT // 2, WIDTH // 2), 512, "<u2")] * 2)):
        rows = np.zeros((plane.height, plane.line_size // 2), "<u2")
        rows[:, : values.shape[1]] = values
        plane.update(rows.tobytes())
    frame.colorspace, frame.color_range = 9, 1
    return frame


def hlg_signal(light):
    """Returns the HLG signal of the light in cd/m^2 of a gray, by bisection of the package's own curve."""
    low, high = np.zeros_like(light), np.ones_like(light)
    for _ in range(40):
        middle = (low + high) / 2
        too_dark = color.hlg_light(np.stack([middle] * 3, -1))[..., 0] < light
        low, high = np.where(too_dark, middle, low), np.where(too_dark, high, middle)
    return low


def grown(quarters):
    return quarters.repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1)


def write_sound(out, track, rate, layout, seconds):
    channels, size = len(track.layout.channels), track.codec_context.frame_size or 1024
    form = track.codec_context.format.name
    for start in range(0, int(seconds * rate), size):
        wave = 0.4 * np.sin(2 * np.pi * HERTZ * np.arange(start, min(start + size, int(seconds * rate))) / rate)
        frame = av.AudioFrame.from_ndarray(np.tile(wave, (channels, 1)).astype(np.float32), "fltp", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        for part in av.AudioResampler(form, layout, rate).resample(frame):
            out.mux(track.encode(part))
    out.mux(track.encode(None))


def set_matrix(path, turn):
    """Writes a display matrix into the track header of the picture, which comes first."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4
    at += 52 if data[at] == 1 else 40  # the header's version 1 has longer times
    a, b, c, d = (x << 16 for x in turn)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def shown(quarters, matrix):
    """Returns quarters [2, 2, ...] as a display matrix shows them: the pixel (x, y) is at (a x + c y, b x + d y)."""
    if matrix is None:
        return quarters
    a, b, c, d = MATRICES[matrix]
    result = np.empty_like(quarters)
    for y, x in np.ndindex(2, 2):
        u, v = 2 * x - 1, 2 * y - 1  # from the middle
        result[(b * u + d * v + 1) // 2, (a * u + c * v + 1) // 2] = quarters[y, x]
    return result


def is_turned(film):
    return film.matrix is not None and MATRICES[film.matrix][0] == 0


def check_film(path, film):
    """Reads a film, and raises AssertionError where picture, time or sound are not those that were written."""
    size = READ["size"][::-1] if is_turned(film) else READ["size"]
    video, sound = media.read_video(path, **READ | {"size": size}, frames=8)
    for frame, bright in ((2, False), (6, True)):
        if film.transfer is None:
            expected = QUARTERS if bright else QUARTERS // 2
        else:
            light = LIGHT if bright else LIGHT / 2
            expected = np.stack([255 * np.minimum(light / 203, 1) ** (1 / 2.4)] * 3, -1)
        seen = video[frame][size[0] // 4 :: size[0] // 2, size[1] // 4 :: size[1] // 2].astype(float)
        worst = np.abs(seen - shown(expected, film.matrix)).max()
        assert worst < 14, f"frame {frame} is off by {worst:.0f}: {seen.tolist()}"
    middle = sound[800:7200]
    if film.sound is None:
        assert not sound.any(), "sound out of nothing"
        return
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    hertz = spectrum.argmax() * 8000 / len(middle)
    loud = float(np.sqrt(np.mean(middle**2)))
    assert abs(hertz - HERTZ) < 3, f"the tone is at {hertz:.0f} Hz"
    assert 0.2 < loud < 0.36, f"the loudness is {loud:.2f}"


# --------------------------------------------------------------------------------------------------- what is broken


def broken_files(folder, good, rng):
    """Writes twelve broken files; returns {name: the reason why it is left out, or None where it is used}."""
    data, sounding = good["silent mp4"].read_bytes(), good["sounding mkv"].read_bytes()
    late = good["late mp4"].read_bytes()  # its index is behind its pictures
    noise = rng.randbytes(20_000)
    made = {
        "empty.mp4": (b"", listing.BROKEN),
        "noise.mp4": (noise, listing.BROKEN),
        "noise.dat": (noise, listing.NO_VIDEO),
        "text.mov": (b"this is no film\n" * 99, listing.BROKEN),
        "headless.mp4": (late[2000:], listing.BROKEN),
        "cut.mp4": (late[: len(late) // 2], listing.BROKEN),
        "cut.mkv": (sounding[: len(sounding) * 2 // 3], None),
        "zeros.mp4": (bytes(len(data)), listing.BROKEN),
        "going.mp4.part": (data[:5000], "an unfinished download"),
        "page.mp4": (b"<!DOCTYPE html><html><body>404 not found</body></html>", listing.BROKEN),
        "packet.mp4": (with_bad_packet(good["silent mp4"]), None),
        "hum.mp4": (good["sound only"].read_bytes(), listing.SOUND),
    }
    for name, (content, _) in made.items():
        (folder / name).write_bytes(content)
    return {name: reason for name, (_, reason) in made.items()}


def with_bad_packet(path):
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][15]
    data = bytearray(path.read_bytes())
    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    return bytes(data)


def others(folder, good):
    """Writes files that are no films, and pictures; returns {name: reason or None}."""
    picture = Image.fromarray(grown(QUARTERS).astype(np.uint8))
    made = {}
    for form in ("png", "jpg", "webp", "bmp", "tiff", "avif"):
        picture.save(folder / f"still_{form}.{form}")
        made[f"still_{form}.{form}"] = None
    (folder / "notes.pdf").write_bytes(b"%PDF-1.4 no film")
    (folder / "clips.zip").write_bytes(b"PK\3\4")
    (folder / ".hidden.mp4").write_bytes(b"")
    os.symlink("nowhere.mp4", folder / "dangling.mp4")
    os.symlink("/etc/hostname", folder / "outside.mp4")
    shutil.copy(good["silent mp4"], folder / "thumbed.mp4")
    picture.save(folder / "thumbed.jpg")
    return made | {
        "notes.pdf": listing.NO_VIDEO,
        "clips.zip": "packed, unpack it first",
        ".hidden.mp4": HIDDEN,
        "dangling.mp4": listing.NOWHERE,
        "outside.mp4": OUTSIDE,
        "thumbed.mp4": None,
        "thumbed.jpg": "a picture with the name of a video",
    }


def sound_alone(path):
    with av.open(str(path), "w", format="mp4") as out:
        write_sound(out, out.add_stream("aac", rate=44100, layout="mono"), 44100, "mono", SECONDS)


def make(folder, count, seed):
    """Writes the folder. Returns ({name: Film}, {name: the reason why it is left out, or None}) of all its files."""
    rng, films, truth = random.Random(seed), {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        plain = Film("h264", "mp4", 8, None, None, False, None)
        good = {name: Path(scratch) / name for name in ("silent mp4", "sounding mkv", "late mp4", "sound only")}
        write_film(good["silent mp4"], plain)
        write_film(good["late mp4"], plain)
        write_film(good["sounding mkv"], plain._replace(ending="mkv", sound=("flac", 48000, "mono")))
        sound_alone(good["sound only"])
        number = 0
        while len(truth) < count:
            place = folder / f"part_{number % 7}" / f"deep_{number % 3}"
            place.mkdir(parents=True, exist_ok=True)
            if number % 60 == 5:
                found = broken_files(place, good, rng) | others(place, good)
                truth |= {(place / name).relative_to(folder).as_posix(): reason for name, reason in found.items()}
            film = draw_film(rng)
            path = place / f"{number:04}.{film.ending}"
            write_film(path, film, SECONDS * rng.choice((1, 1, 2)))
            name = path.relative_to(folder).as_posix()
            films[name], truth[name] = film, None
            if number % 20 == 7:  # a double
                shutil.copy(path, path.with_name(f"double_{path.name}"))
                name = path.with_name(f"double_{path.name}").relative_to(folder).as_posix()
                films[name], truth[name] = film, None
            number += 1
    return films, truth


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="a folder that is to hold the files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        folder = Path(options.keep or f"{scratch}/clips")
        folder.mkdir(parents=True)
        films, truth = make(folder, options.count, options.seed)
        faults = differences(folder, films, truth)
    print(f"{len(truth)} files, {len(films)} films: {len(faults)} faults")
    print(*faults, sep="\n")
    raise SystemExit(bool(faults))


def differences(folder, films, truth):
    """Returns a line for each film that is read otherwise than it was written, and for each count that is wrong."""
    faults = []
    for name, film in films.items():
        try:
            check_film(folder / name, film)
        except (AssertionError, UserError) as error:
            faults.append(f"{name}: {film}: {error}")
    summary = Files(folder, frames=8, seed=0, **READ).summary
    wrong = collections.Counter(reason for reason in truth.values() if reason)
    counts = {reason: group["count"] for reason, group in summary.left_out.items()}
    silent = [name for name, reason in truth.items() if reason is None and has_no_sound(name, films)]
    for what, seen, expected in (
        ("left out", counts, dict(wrong)),
        ("used", summary.used, sum(reason is None for reason in truth.values())),
        ("found", summary.found, len(truth)),
        ("without sound", summary.without_sound["count"], len(silent)),
        ("turned", summary.shapes.get(f"{WIDTH}x{HEIGHT}", 0), sum(map(is_turned, films.values()))),
    ):
        if seen != expected:
            faults.append(f"{what}: {seen}, but {expected} were made")
    return faults


def has_no_sound(name, films):
    return films[name].sound is None if name in films else not name.endswith("cut.mkv")


if __name__ == "__main__":
    main()
