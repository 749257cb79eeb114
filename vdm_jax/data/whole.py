"""All videos of a data source from their first frame to their last one, for `prepare`."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from vdm_jax.data import caption_files, content, listing, media, summary
from vdm_jax.data.files import held_out_files
from vdm_jax.data.rates import rational
from vdm_jax.data.shards import Part, open_file
from vdm_jax.errors import UserError

PIECE_SECONDS = 16  # of a film that are in memory at a time
HASH_BYTES = 1 << 20  # that are read at a time


class Video(NamedTuple):
    """A video, or an example of a data set."""

    name: str
    split: str  # "train" or "held_out"
    sha256: str  # of the content
    captions: list  # each a text or a caption_files.Timed
    place: object  # path or Part; the number of an example
    frames: int  # at the rate of the clips; 0 where it is not known before the video is read
    shape: tuple  # height and width in pixels, as it is shown; () where it is not known
    fps: float  # of the video itself; 0 for an image, or where it is not known
    is_image: bool


def read(config, known: dict) -> tuple[list[Video], dict, dict]:
    """Returns (videos, what was found and left out, {name: [size in bytes, time in ns, SHA-256]}) of config.data.

    known: an earlier third result; a file of the same size and time is not read again

    Raises UserError if the source cannot be opened.
    """
    if config.data.source == "files":
        return _files(config, known)
    if config.data.source == "tfds":
        return _examples(config)
    raise UserError(f"prepare reads videos, and data.source={config.data.source!r} has none: give --source=FOLDER")


def _files(config, known):
    path, share = config.data.path, config.data.files.held_out
    if not path or not os.path.isdir(path):
        raise UserError(f"data path {path!r} is not a folder: name the folder of videos, --source=FOLDER")
    found = listing.read(path)
    captions = caption_files.read(found)
    held = held_out_files([name for name in captions.of if not found.videos[name][1].is_image], share)
    told = f"{len(held)} of {len(captions.of)} videos" if held else "no whole videos, as they are too few"
    numbers = summary.make(found, captions, f"{told} (data.files.held_out={share:g})")
    numbers.log()

    def look(name):
        part, info = found.videos[name]
        place = os.path.join(os.path.abspath(path), name) if part is None else part
        try:
            stat = os.stat(place.archive if part else place)
            size = part.size if part else stat.st_size
            row = known.get(name, ())
            if list(row[:2]) != [size, stat.st_mtime_ns]:
                row = [size, stat.st_mtime_ns, _sha256(place)]
        except OSError as error:
            raise UserError(f"cannot read {name!r}: {error.strerror or error}") from error
        place = Part(os.path.abspath(part.archive), *part[1:]) if part else place
        frames = max(1, int(info.duration * config.data.fps + 1e-6))
        split = "held_out" if name in held else "train"
        shape = int(info.height), int(info.width)
        return row, Video(name, split, row[2], captions.of[name], place, frames, shape, info.fps, info.is_image)

    with ThreadPoolExecutor() as threads:
        rows, videos = zip(*threads.map(look, captions.of)) if captions.of else ((), ())
    return list(videos), dataclasses.asdict(numbers), dict(zip(captions.of, rows))


def _sha256(place) -> str:
    digest = hashlib.sha256()
    with open_file(place) as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


@functools.lru_cache(maxsize=2)
def _open(settings: str, part: str):
    from vdm_jax.data.tfds import Tfds  # imports tensorflow_datasets

    return Tfds(**json.loads(settings), part=part)


def _tfds_settings(data) -> str:
    clip = dict(frames=1, size=tuple(data.size), fps=data.fps, sample_rate=data.sample_rate, seed=0)
    return json.dumps({**clip, "data_dir": data.path or None, **data.tfds.to_dict()})


def _examples(config):
    settings, of, videos = _tfds_settings(config.data), content.digest(config), []
    for part in ("train", "held_out") if config.data.tfds.held_out else ("train",):
        for number in range(_open(settings, part).count):
            sha256 = hashlib.sha256(f"{of} {settings} {part} {number}".encode()).hexdigest()
            videos.append(Video(f"{part}/{number:09}", part, sha256, [], number, 0, (), 0.0, False))
    return videos, {"path": config.data.tfds.name, "found": len(videos), "used": len(videos), "left_out": {}}, {}


def pieces(video: Video, data) -> Iterator[tuple[np.ndarray, np.ndarray, list]]:
    """Yields (frames uint8 [F, h, w, 3], sound float32 [N], captions) of a video, from its start to its end.

    data: config.data, which has the size and the rates
    Raises UserError if the video cannot be read.
    """
    if data.source == "tfds":
        source = _open(_tfds_settings(data), video.split)
        film, audio, captions = source.read(video.place)
        yield *source.window(film, audio, 0.0, source.frames_at_fps(film)), captions
        return
    for frames, audio in read_film(video.place, video.frames, data.fps, tuple(data.size), data.sample_rate):
        yield frames, audio, video.captions


def read_film(place, frames: int, fps: float, size, sample_rate: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (frames uint8 [F, h, w, 3], sound float32 [N]) of a file, PIECE_SECONDS at a time.

    place: path or Part
    frames: of the whole, at `fps`
    Raises UserError if the file cannot be read.
    """
    rate = rational(fps)
    piece = max(1, round(PIECE_SECONDS * rate))
    for done in range(0, frames, piece):
        count = min(piece, frames - done)
        yield media.read_video(place, start=done / rate, frames=count, fps=fps, size=size, sample_rate=sample_rate)


def captions_of(captions: list, start: float, end: float) -> list[str]:
    """Returns the captions of the clip from `start` to `end`, in s."""
    if any(isinstance(caption, caption_files.Timed) for caption in captions):
        return [caption_files.choose(captions, start, end, 0.0)]
    return list(captions) or [""]
