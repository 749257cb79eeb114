"""The kinds of input of tests/fuzz.py. Each function writes an input to a folder, and reads it as a command would."""

import functools
import io
import json
import logging
import struct
import sys
import tarfile
import tempfile
import wave
from fractions import Fraction
from pathlib import Path, PurePath

import av
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors.numpy
from absl import flags
from etils import epath
from PIL import Image

from tests import tiny
from tests.conftest import write_run
from vdm_jax import sharding, train
from vdm_jax.data import batches, caption_files, content, index, listing, media, prepared, text, tfds, whole
from vdm_jax.data.files import Files
from vdm_jax.errors import UserError
from vdm_jax.run import checkpoint, checksums, cli, storage
from vdm_jax.run import folder as run_folder
from vdm_jax.run import log as run_log
from vdm_jax.system import build
from vdm_jax.system.layout import STAGES
from vdm_jax.system.phases import phases

CLIP = dict(fps=8, size=16, sample_rate=2000)
for name in ("vdm_jax", "absl"):
    logging.getLogger(name).setLevel(logging.CRITICAL)

# ------------------------------------------------------------------------------------------------------- mutations


def mutate(draw, data):
    """Returns the bytes with flipped bits, noise, a cut, a repeat, or extreme numbers."""
    data = bytearray(data)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 5))):
        if not data:
            break
        place, kind = draw.randrange(len(data)), draw.randrange(7)
        if kind == 0:
            for _ in range(draw.choice((1, 10, 200))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[place : place + 16] = draw.randbytes(16)
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + draw.choice((1, 4, 100))]
        elif kind == 4:
            data[place:place] = data[place : place + 200]
        elif kind == 5:  # near the start, in the header
            place = draw.randrange(min(len(data), 64))
            data[place : place + 4] = draw.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
        else:
            data[place : place + 4] = draw.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
    return bytes(data)


@functools.cache
def movie(kind):
    """Returns the bytes of a short, valid video file."""
    file, rng = io.BytesIO(), np.random.default_rng(0)
    container = {"webm": "webm", "avi": "avi", "mkv": "matroska"}.get(kind, "mp4")
    codec = {"webm": "libvpx", "avi": "mpeg4"}.get(kind, "libx264")
    width, height = (33, 17) if kind == "odd" else (48, 32)
    pixels = {"odd": "yuv444p", "ten bit": "yuv420p10le", "grey": "gray"}.get(kind, "yuv420p")
    channels = {"stereo": "stereo", "5.1": "5.1"}.get(kind, "mono")
    with av.open(file, "w", format=container) as out:
        picture = sound = None
        if kind != "sound only":
            picture = out.add_stream(codec, rate=10)
            picture.width, picture.height, picture.pix_fmt = width, height, pixels
            picture.time_base = picture.codec_context.time_base = Fraction(1, 100)
        if kind not in ("silent", "webm", "no sound"):
            sound = out.add_stream("mp3" if container == "avi" else "aac", rate=44100, layout=channels)
        times = (0, 3, 50, 52, 200, 210) if kind == "variable" else range(0, 200, 10)
        for time in times if picture else ():
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (height, width, 3), np.uint8), "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            out.mux(picture.encode(frame))
        if picture:
            out.mux(picture.encode(None))
        for i in range(40 if sound else 0):
            samples = rng.normal(size=(len(sound.layout.channels), 1024)).astype(np.float32) / 10
            frame = av.AudioFrame.from_ndarray(samples, "fltp", channels)
            frame.sample_rate, frame.pts = 44100, i * 1024
            out.mux(sound.encode(frame))
        if sound:
            out.mux(sound.encode(None))
    return file.getvalue()


KINDS = ("plain", "variable", "odd", "ten bit", "grey", "stereo", "5.1", "silent", "sound only", "webm", "avi", "mkv")


def turned(data, draw):
    """An MP4 with another rotation and another declared size in its track header, and another in its sample entry."""
    data, at = bytearray(data), data.find(b"tkhd")
    if at > 0 and draw.random() < 0.5:
        cos, sin = draw.choice(((1, 0), (0, 1), (-1, 0), (0, -1), (2**15 - 1, 7), (0, 0)))
        matrix = [cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30]
        data[at + 44 : at + 80] = struct.pack(">9i", *(max(-(2**31), min(2**31 - 1, x)) for x in matrix))
    at = data.find(b"avc1", data.find(b"stsd"))
    if at > 0 and draw.random() < 0.5:
        data[at + 28 : at + 32] = struct.pack(">2H", *(draw.choice((0, 1, 33, 9000, 65535)) for _ in range(2)))
    return bytes(data)


def mp4(draw, folder):
    data = movie(draw.choice(KINDS))
    if draw.random() < 0.3:
        data = turned(data, draw)
    data = mutate(draw, data) if draw.random() < 0.8 else draw.choice((data, b"", data[: draw.randrange(2000)]))
    path = folder / draw.choice(("a.mp4", "a:b.mp4", "-x.mkv", "é%d.mov", "a.m3u8", "x.gif"))
    path.write_bytes(data)
    start, frames = draw.choice((0, 0.5, 1e6, -3)), draw.choice((None, 5, 5, 100))
    reader = draw.randrange(4)
    if reader == 0:
        assert media.kind(path) in ("video", "image", "sound only", None)
        media.probe(path)
    elif reader == 1:
        media.read_audio(path, 2000, draw.choice((0.5, 3, 0)))
    else:
        video, audio = media.read_video(path, **CLIP, start=start, frames=frames)
        assert video.dtype == np.uint8 and video.shape[1:] == (16, 16, 3) and np.isfinite(audio).all()


def playlist(draw, folder):
    """Formats that could make FFmpeg open other files."""
    secret = folder.parent.parent / "outside" / "secret.txt"
    content = draw.choice(
        (
            f"#EXTM3U\n#EXTINF:1,\n{secret}\n",
            f"ffconcat version 1.0\nfile '{secret}'\n",
            f"v=0\nm=video 1 RTP/AVP 96\nc=IN IP4 127.0.0.1\n{secret}",
            f"<?xml version='1.0'?><MPD><BaseURL>file://{secret}</BaseURL></MPD>",
        )
    )
    path = folder / draw.choice(("a.mp4", "a.m3u8", "a.txt", "a.sdp", "a.mpd"))
    path.write_text(content)
    try:
        media.read_video(path, **CLIP)
    except UserError:
        raise
    raise AssertionError("a playlist was read")


# ------------------------------------------------------------------------------------------------- images and sound


@functools.cache
def picture(kind, mode):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (23, 31, 4), np.uint8)
    made = (
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(pixels).convert(mode)
    )
    made.save(file, kind)
    return file.getvalue()


def image(draw, folder):
    kinds = [
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "I;16"),
        ("PNG", "1"),
        ("JPEG", "CMYK"),
        ("JPEG", "RGB"),
        ("GIF", "P"),
    ]
    kinds += [
        ("WEBP", "RGBA"),
        ("BMP", "RGB"),
        ("TIFF", "RGB"),
        ("TIFF", "F"),
        ("TIFF", "LAB"),
        ("PPM", "RGB"),
        ("AVIF", "RGBA"),
    ]
    kind, mode = draw.choice(kinds)
    data = mutate(draw, picture(kind, mode))
    if draw.random() < 0.1:
        data = draw.choice(
            (b"P6 99999999 99999999 255\n", b"P5 8000 8000 65535\n", b"P6 1 1 0\n", b"\x89PNG\r\n\x1a\n")
        )
    (folder / "x.png").write_bytes(data)
    if draw.random() < 0.3:
        return media.read_video(folder / "x.png", **CLIP)  # one frame, or an animation
    out = media.read_image(folder / "x.png", draw.choice((16, (9, 5))))
    assert out.dtype == np.uint8 and out.ndim == 3


def sound(draw, folder):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        width = draw.choice((1, 2, 3, 4))
        out.setnchannels(draw.choice((1, 2, 6)))
        out.setsampwidth(width)
        out.setframerate(draw.choice((1, 8000, 44100, 50_000_000)))
        out.writeframes(draw.randbytes(12 * width * draw.choice((0, 1, 400))))
    (folder / "x.wav").write_bytes(mutate(draw, file.getvalue()))
    audio = media.read_audio(folder / "x.wav", draw.choice((2000, 48000)), draw.choice((0, 0.1, 5.0)))
    assert np.isfinite(audio).all() and np.abs(audio).max(initial=0) <= 1


# --------------------------------------------------------------------------------------------------------- texts


def words(draw):
    """Bytes in place of a text."""
    kind = draw.randrange(9)
    if kind == 0:
        return draw.randbytes(draw.randrange(300))
    if kind == 1:
        return "a red circle".encode(draw.choice(("utf-16", "utf-32", "latin-1", "utf-8-sig")))
    if kind == 2:
        return b"a\0b" * draw.randrange(1, 9)
    if kind == 3:
        return b"x" * draw.choice((10, 999_999, 1_000_001, 5_000_000))
    if kind == 4:
        return "".join(chr(draw.choice((0x301, 0x202E, 0x1F600, 0x2028, 0xFEFF, 65))) for _ in range(400)).encode()
    if kind == 5:
        return b"\n" * draw.randrange(5) + b"# note\r\n" * draw.randrange(3)
    if kind == 6:
        return b"\xed\xa0\x80" + b"surrogate"
    if kind == 7:
        return b"../../x, $(reboot) %s {0} \x1b[2J"
    return b"a blue square moving left\n"


def prompts(draw, folder):
    (folder / "p.txt").write_bytes(words(draw))
    path = draw.choice((folder / "p.txt",) * 8 + (folder / "none", folder, "a\0b"))
    tokens = text.encode(text.read_prompts(path), draw.choice((2, 3, 64)))
    assert ((tokens >= 0) & (tokens < text.VOCAB_SIZE)).all()


def captions(draw, folder):
    (folder / "a.mp4").write_bytes(movie("plain"))
    (folder / "a.txt").write_bytes(words(draw))
    item = Files(folder, frames=5, seed=0, **CLIP)[draw.randrange(9)]
    text.encode([item["caption"]], 64)


def metadata(draw, folder):
    """metadata.csv or .jsonl with paths outside its folder, and rows of any shape."""
    outside = folder.parent.parent / "outside"
    (folder / "a.mp4").write_bytes(movie("silent"))
    (folder / "link.mp4").symlink_to(outside / "secret.txt")
    (folder / "up").symlink_to(outside)
    (folder / "round").symlink_to(folder / "round")
    name = draw.choice(
        ("a.mp4",) * 30
        + ("../outside/secret.txt", str(outside / "secret.txt"), "link.mp4", "up/secret.txt", "none.mp4", "", ".")
        + ("round", "a.mp4\0", "x" * 5000, "a.mp4/b", "C:\\x", "~/x", "file:a.mp4", "http://127.0.0.1/x", "./a.mp4")
    )
    caption = words(draw)[:100_000].decode("utf-8", "replace")
    if draw.random() < 0.5:

        def value(plain):
            return draw.choice((plain,) * 6 + (None, 3, [], {}, True, 1e999))

        row = draw.choice(({"file_name": value(name), "text": value(caption)},) * 6 + ([], 3, {"file_name": name}))
        data = (json.dumps(row) + "\n").encode() * draw.choice((1, 1, 3)) + draw.choice(
            (b"", b"", b"[" * 100_000, b"{")
        )
        path = folder / "metadata.jsonl"
    else:
        columns = draw.choice(
            ("file_name,text", "file_name,text", "text,file_name", "file,text", "", "file_name,text,text")
        )
        quoted = caption.replace('"', '""')
        data = f'{columns}\n"{name}","{quoted}"\n'.encode() + draw.choice((b"", b"a.mp4\n", b'"', b"," * 50_000))
        path = folder / "metadata.csv"
    path.write_bytes(mutate(draw, data) if draw.random() < 0.3 else data)
    item = Files(folder, frames=5, seed=0, **CLIP)[0]
    assert "secret" not in item["caption"]


def table(draw, folder):
    """A table of captions of each form, with columns and values of any kind."""
    (folder / "a.mp4").write_bytes(movie("silent"))

    def odd():
        return draw.choice((None, "", 3, -1, 0.5, "1", "nan", "1e999", [], ["a", None], {}, True, "x" * 200_000))

    names = (*caption_files.NAME_COLUMNS, *caption_files.TEXT_COLUMNS, "start", "end", "", "TEXT", "\0")
    rows = []
    for _ in range(draw.randrange(1, 5)):
        row = {"file_name": draw.choice(("a.mp4",) * 20 + ("A.MP4", "./a.mp4", "none", "..", "/", "//a.mp4", "a.mp4/"))}
        row |= {name: odd() for name in draw.sample(names, draw.randrange(5))}
        rows.append(draw.choice((row,) * 30 + ([row], None)))
    text, columns = json.dumps(rows), {name: [str(odd()), str(odd())] for name in draw.sample(names, 4)}
    lines = "\n".join(map(json.dumps, rows))
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"file_name": ["a.mp4", "b"], **columns}), parquet)
    ending, content = draw.choice(
        (
            ("json", text.encode()),
            ("jsonl", lines.encode()),
            ("parquet", parquet.getvalue()),
            ("csv", f"{','.join(columns)},path\n{lines}\n".encode()),
        )
    )
    (folder / f"Metadata.{ending}").write_bytes(mutate(draw, content) if draw.random() < 0.4 else content)
    if draw.random() < 0.2:
        (folder / "videos.txt").write_bytes(mutate(draw, b"a.mp4\nb.mp4\n"))
        (folder / "prompts.txt").write_bytes(words(draw))
    Files(folder, frames=5, seed=0, **CLIP)[0]


def archive(draw, folder):
    """A tar archive with names, kinds and sizes of any kind."""
    clips, file = [movie("plain"), movie("silent")], io.BytesIO()
    names = (
        "k.mp4",
        "k.txt",
        "k.json",
        "../k.mp4",
        "/etc/k.mp4",
        "d/k.mp4",
        ".k.mp4",
        "k.\x1b.mp4",
        "d" * 300,
        "k.tar",
    )
    with tarfile.open(fileobj=file, mode="w", format=draw.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as tar:
        for name in ("a.mp4", *draw.choices(names, k=4)):
            member = tarfile.TarInfo(name)
            member.type = draw.choice((tarfile.REGTYPE,) * 5 + (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE))
            member.linkname = draw.choice(("/etc/passwd", "a.mp4", "k.mp4"))
            content = words(draw) if "mp4" not in name else draw.choice(clips)
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    data = bytearray(file.getvalue())
    if draw.random() < 0.6:  # a header whose checksum is right all the same
        field, values = draw.choice(
            (
                (124, (b"\xff" * 12, b"\x80" + bytes(10) + b"\x40", b"77777777777\0")),
                (156, (b"x", b"L", b"S", b"g", b"\0")),
            )
        )
        value = draw.choice(values)
        data[field : field + len(value)] = value
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
    (folder / "a.tar").write_bytes(mutate(draw, bytes(data)) if draw.random() < 0.5 else data)
    Files(folder, frames=5, seed=0, **CLIP)[draw.randrange(3)]


def index_of_a_folder(draw, folder):
    """An index that is damaged, or holds rows that nobody wrote: the videos are the same."""
    (folder / "a.mp4").write_bytes(movie("silent"))
    (folder / "b.txt").write_text("x")
    expected, path = listing.read(folder).videos, index.path_of(folder)
    if draw.random() < 0.5:
        path.write_bytes(mutate(draw, path.read_bytes()))
    else:
        stat = (folder / "a.mp4").stat()

        def odd():
            return draw.choice((None, 0, -1, "x", 0.5, True, [], {}, {"a": [1]}, 10**30))

        row = [stat.st_size, stat.st_mtime_ns, *(odd() for _ in range(draw.choice((1, 2, 3, 5))))]
        content = {"reader": draw.choice((index._reader(), "", None)), "rows": draw.choice(({"a.mp4": row}, odd()))}
        storage.write_json(path, content)
    assert listing.read(folder).videos == expected


# --------------------------------------------------------------------------------------- weights, runs, settings

PARAMS = {"a": {"kernel": np.ones((3, 4), np.float32), "bias": np.zeros(4, np.float32)}, "scale": np.float32(2)}


def tensors(draw, folder):
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    flat = {"a/kernel": PARAMS["a"]["kernel"], "a/bias": PARAMS["a"]["bias"], "scale": np.full((), 2, np.float32)}
    if draw.random() < 0.3:
        flat["a/bias"] = draw.choice(
            (np.zeros(5), np.zeros((2, 2)), np.zeros(4, np.int8), np.zeros(4, bool), np.full(4, np.nan))
        )
    data = safetensors.numpy.save(
        flat, metadata={"step": draw.choice(("3",) * 9 + ("x", "-1", "1e9", "9" * 5000, "\0"))}
    )
    if draw.random() < 0.3:
        header = draw.choice(
            (
                b"{" * 100_000,
                b'{"a/bias":{"dtype":"F32","shape":[4],"data_offsets":[0,99999999999]}}',
                b'{"a/bias":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}',
                b'{"a/bias":{"dtype":"F32","shape":[-4],"data_offsets":[16,0]}}',
                b'{"__metadata__":[]}',
                b'{"__metadata__":{"step":3}}',
                b"[]",
                b"null",
            )
        )
        length = draw.choice((len(header), len(header), 2**63, 2**64 - 1, 0))
        data = struct.pack("<Q", length) + header + b"\0" * 64
    (folder / "w.safetensors").write_bytes(mutate(draw, data) if draw.random() < 0.7 else data)
    run_folder.read_safetensors(folder / "w.safetensors", expected)


@functools.cache
def run_files():
    """Returns {path: content} of a run of one stage and of exported weights, and the parameters they should hold."""
    with tempfile.TemporaryDirectory() as folder:
        folder, config = Path(folder), tiny.get_config()
        write_run(folder / "run", config, ("clip",))
        expected = build(config).param_shapes
        out = folder / "out"
        out.mkdir()
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), expected)
        for stage in STAGES:
            run_folder.write_safetensors(out / f"{stage}.safetensors", zeros[stage], 1)
        statistics = {m: {"mean": np.zeros(4), "std": np.ones(4)} for m in ("video", "audio")}
        run_folder.write_statistics(out / "statistics.json", statistics, zeros)
        (out / "config.json").write_text(config.to_json_best_effort())
        return {PurePath(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}, expected


def place(folder, part, draw, seal):
    """Writes a part of run_files with one file mutated. It writes fresh checksums in the folder `seal`, if given."""
    files, expected = run_files()
    files = {path: data for path, data in files.items() if path.parts[0] == part}
    victim = draw.choice(sorted(path for path in files if path.name != checksums.NAME or not seal))
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(mutate(draw, data) if path == victim else data)
    if draw.random() < 0.1:
        (folder / victim).unlink()
    if seal:  # a forged file, with checksums that match
        checksums.write(folder / seal)
    return expected


def stored(draw, folder):
    """A checkpoint with a changed file. Half of the time its checksums are forged to match."""
    seal = draw.choice(("", "run/clip/checkpoints/8"))
    expected = place(folder, "run", draw, seal)
    if draw.random() < 0.3:
        directory = folder / "run" / "clip" / "checkpoints"
        checkpoint.quarantine_damaged(directory)
        return
    run_folder.read_params(folder / "run", "clip", expected["clip"], 0)


def exported(draw, folder):
    """Exported weights with a changed file, and half of the time with a changed value in config.json."""
    seal = draw.choice(("", "out"))
    place(folder, "out", draw, seal)
    if draw.random() < 0.5:
        config = json.loads(run_files()[0][PurePath("out/config.json")])
        spoil(draw, config)
        (folder / "out" / "config.json").write_text(json.dumps(config))
        checksums.write(folder / "out")
    run_folder.load(folder / "out", build, unverified=not seal)


def spoil(draw, settings):
    """Replaces one value of nested settings by a value of any kind."""
    key = draw.choice(sorted(settings))
    if isinstance(settings[key], dict) and settings[key] and draw.random() < 0.9:
        return spoil(draw, settings[key])
    if draw.random() < 0.1:
        del settings[key]
    else:
        settings[key] = draw.choice(
            (None, -1, 0, 1, 2.5, 1e308, 10**30, "", "x", "../..", [], [0], [1, 2, 3], {}, True)
        )


@functools.cache
def prepared_files():
    """Returns {name: bytes} of a data set of two clips, as prepare makes it."""
    with tempfile.TemporaryDirectory() as made:
        made = epath.Path(made)
        (made / "films").mkdir()
        (made / "films" / "a.mp4").write_bytes(movie("plain"))
        (made / "films" / "b.webm").write_bytes(movie("webm"))
        config = data_config(made / "films")
        config.data.source, config.data.path = "files", str(made / "films")
        how = prepared.Settings(config.data.to_dict(), 1.0, 10.0, ())
        chosen, parts, out = [], storage.make_folder(made / "parts"), storage.make_folder(made / "out")
        for video in whole.read(config, {})[0]:
            prepared.write_clips(str(parts), video, how)
            (row,) = prepared.read_rows(parts, how.key(video))["clips"]
            chosen.append((how.key(video), [(0, row["bytes"])]))
        prepared.merge(out, parts, {"train": chosen}, tuple(config.data.size))
        storage.write_json(out / tfds.PREPARED, {"fps": 8, "sample_rate": 2000, "splits": ["train"]})
        return {path.name: path.read_bytes() for path in out.iterdir()}


def data_config(path):
    """Returns a recipe that reads the prepared data set of a folder."""
    config = tiny.get_config()
    config.data.update(source="tfds")
    config.data.tfds.update(name=str(path), held_out="", audio_key="audio", caption_key="caption")
    return config


def prepared_clips(draw, folder):
    """Prepared clips with a changed file, or with a changed value in a file of JSON."""
    files = prepared_files()
    victim = draw.choice(sorted(files))
    for name, data in files.items():
        (folder / name).write_bytes(mutate(draw, data) if name == victim else data)
    if victim.endswith(".json") and draw.random() < 0.5:
        settings = json.loads(files[victim])
        spoil(draw, settings)
        sealed = {name: value for name, value in settings.items() if name != storage.CHECKSUM}
        (folder / victim).write_text(json.dumps(storage.seal(sealed) if victim == tfds.PREPARED else settings))
    elif draw.random() < 0.1:
        (folder / victim).unlink()
    config = data_config(folder)
    content.digest(config)
    source = batches.source(config)
    for number in range(4):
        item = source[number]
        assert item["video"].shape == (5, 16, 24, 3) and np.abs(item["audio"]).max() <= 1
    for video in whole.read(config, {})[0]:
        list(whole.pieces(video, config.data))


def command_line(draw, folder):
    """Flags as a user types them, checked up to the point where a run would begin."""
    config = tiny.get_config().to_dict()

    def keys(tree, above=""):
        for key, value in tree.items():
            yield from keys(value, f"{above}{key}.") if isinstance(value, dict) else [f"{above}{key}"]

    values = (
        "",
        "0",
        "-1",
        "7",
        "1e9",
        "9" * 30,
        "nan",
        "inf",
        "x",
        "(1,)",
        "(1,2)",
        "()",
        "[",
        "None",
        "True",
        "é",
    )
    chosen = [
        f"--config.{draw.choice(sorted(keys(config)))}={draw.choice(values)}" for _ in range(draw.randrange(1, 4))
    ]
    if draw.random() < 0.2:
        odd = (
            "--config.",
            "--config.x=1",
            "--",
            "-",
            "--stage=x",
            "--workdir",
            "clip",
            "--config.clip=3",
            "--nope",
            "--help2",
        )
        chosen.append(draw.choice(odd))
    known, typed = set(flags.FLAGS), sys.argv
    sys.modules.pop("config_config", None)
    sys.argv = ["train", f"--config={tiny.__file__}", f"--workdir={folder}", *chosen]
    try:
        train.define_flags()
        cli._parse(sys.argv)
        options = flags.FLAGS
        if options.config is not None and options.workdir:
            names = STAGES if options.stage == "all" else (options.stage,)
            system = build(options.config)
            plan = {name: phases(system, name) for name in names}
            train.check(sharding.make_mesh(options.config.mesh), plan)
    finally:
        sys.argv = typed
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)


def meshes(draw, folder):
    sharding.make_mesh({axis: draw.choice((-1, 0, 1, 2, 2**40, -5)) for axis in ("data", "fsdp", "sequence", "tensor")})


def metrics(draw, folder):
    lines = [
        json.dumps({"step": i, "loss": 0.1, "skipped": draw.choice((0, 1, None, "x", 1e400))}) for i in range(1, 30)
    ]
    (folder / "metrics.jsonl").write_bytes(mutate(draw, "".join(f"{line}\n" for line in lines).encode()))
    step = draw.choice((0, 10, 29, 100))
    log = run_log.MetricsLog(folder, step)
    log.write(200, "x", {"loss": 1.0, "skipped": 0})
    log.close()
    kept = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert kept == sorted(set(kept)) and all(number <= step for number in kept[:-1])


WAYS = {
    "mp4": mp4, "more mp4": mp4, "playlist": playlist, "image": image, "sound": sound, "prompts": prompts,
    "captions": captions, "metadata": metadata, "table": table,
    "archive": archive, "index": index_of_a_folder, "safetensors": tensors, "checkpoint": stored, "exported": exported,
    "prepared": prepared_clips,
    "command line": command_line, "mesh": meshes, "metrics.jsonl": metrics,
}  # fmt: skip
