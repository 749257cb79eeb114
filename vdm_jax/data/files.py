"""A folder of real videos with captions as an endless random-access source of clips.

Captions come from `metadata.csv` or `metadata.jsonl` in the folder. Column `file_name` is relative to the folder,
column `text` is the caption, other columns are ignored. A file in several rows has several captions. In a folder
without metadata, the text file `name.txt` beside `name.mp4` is one caption.
"""

import csv
import dataclasses
import functools
import io
import json
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vdm_jax.data import buckets, media
from vdm_jax.data.text import read_text
from vdm_jax.errors import UserError, one_of
from vdm_jax.run import checksums

logger = logging.getLogger("vdm_jax")

SUFFIXES = (".mp4", ".webm", ".avi", ".mov", ".mkv", ".m4v")
MAX_METADATA_BYTES = 1 << 30
MAX_CACHED_SECONDS = 300  # of a longer video only windows are decoded: the whole would take minutes


@functools.lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Returns the order of the items in an epoch: a permutation, int [count]."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def _first_names(names: list[str]) -> str:
    """Returns the first five names, and the number of the others, as a text."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_metadata(path: Path) -> list[tuple[str, str]]:
    """Returns the (file_name, text) pairs of a metadata.csv or metadata.jsonl."""
    lines = io.StringIO(read_text(path, MAX_METADATA_BYTES), newline="")
    pairs = []
    try:
        if path.suffix == ".csv":
            rows = csv.DictReader(lines, strict=True)
            missing = {"file_name", "text"} - set(rows.fieldnames or ())
            if missing:
                raise UserError(f"{path.name} has no column {' or '.join(map(repr, sorted(missing)))}")
        else:
            rows = (json.loads(line) for line in lines if line.strip())
        for number, row in enumerate(rows, 1):
            match row:
                case {"file_name": str(name), "text": str(text)} if name:
                    pairs.append((name, text))
                case _:
                    raise UserError(f"{path.name}: row {number} lacks a file_name or a text, add it")
    except (csv.Error, json.JSONDecodeError, RecursionError) as error:
        fault = f"cannot read {path.name} after row {len(pairs)}: {error}"
        raise UserError(" ".join(fault.split())) from error
    return pairs


def _check_inside(root: Path, name) -> None:
    """Raises UserError if a name leads out of the folder `root`, by itself or through a link."""
    path = Path(name)
    try:
        inside = (root / path).resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{str(name)!r} is no usable file name: {error}") from error
    if path.is_absolute() or ".." in path.parts or not inside:
        raise UserError(f"{str(name)!r} points out of {root}: keep the videos inside the folder")


def listing(root: Path) -> dict[str, list[str]]:
    """Returns {file name relative to `root`: captions}, in the order of the metadata or else of the names."""
    metadata = [p for p in (root / "metadata.csv", root / "metadata.jsonl") if p.exists()]
    captions: dict[str, list[str]] = {}
    if len(metadata) > 1:
        raise UserError(f"{root} holds both metadata.csv and metadata.jsonl: keep one of them")
    if metadata:
        _check_inside(root, metadata[0].name)
        for name, text in _read_metadata(metadata[0]):
            captions.setdefault(name, []).append(text)
    else:
        for path in sorted(root.rglob("[!.]*")):
            if path.suffix.lower() in SUFFIXES:
                note = path.with_suffix(".txt")
                _check_inside(root, note.relative_to(root))
                text = " ".join(read_text(note).split()) if note.exists() else ""
                captions[path.relative_to(root).as_posix()] = [text]
    for name in captions:
        _check_inside(root, name)
    return captions


class Video(NamedTuple):
    """A video of a folder, and the part of it that a split uses: frames [first, end) at the source's `fps`."""

    name: str  # relative to the folder
    captions: list[str]
    first: int
    end: int
    total: int  # frames of the whole video
    cached: bool  # whether the decoded video is kept in memory


@dataclasses.dataclass(eq=False)
class Files:
    """Random windows of the videos in a folder, without end. Item i follows from (seed, i).

    An item is {'video': uint8 [F, h, w, 3], 'audio': float32 [F * sample_rate // fps], 'caption': str}. In each epoch
    every video comes once, in an order that is drawn for the epoch, with a random window and one of its captions.

    The end of every video is the split "held_out": a share of `held_out`, or one window where that is more and the
    video lasts at least two windows. Where a split's part of a video is shorter than a window, its last frame is
    repeated in silence; "held_out" leaves such a video out, if it then still has any. A video without sound is silent.
    A broken video is left out. A missing caption is the empty text. One warning for each fault names the videos.

    Raises UserError if the folder or its metadata cannot be used.
    """

    path: str | os.PathLike  # of the folder
    _: dataclasses.KW_ONLY
    frames: int  # F, of a window
    size: int | tuple[int, int]  # h = w, or (h, w), in pixels
    fps: float  # frames per second of a window; windows begin on whole frames
    sample_rate: int  # of the sound, in Hz
    seed: int  # of the order of videos and of the windows
    split: str = "train"  # or "held_out"
    held_out: float = 0.2  # share of every video, in 0..1, that is kept from training
    buckets: tuple = ()  # of buckets.Bucket: only videos for which (frames, *size) is the nearest one are used
    cache_bytes: int = 2 << 30  # for decoded videos; of videos that do not fit, only the window is decoded

    def __post_init__(self):
        one_of("split", self.split, ("train", "held_out"))
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out={self.held_out} must be a share of at least 0 and less than 1")
        self.root = Path(self.path)
        if not self.root.is_dir():
            raise UserError(f"data path {os.fspath(self.path)!r} is not a folder: name the folder of videos")
        self.samples = int(self.frames * self.sample_rate // self.fps)
        self._cache = {}
        self._warned = set()
        self._locks = {}  # name: a lock
        self._load(listing(self.root))

    def _load(self, listing: dict[str, list[str]]) -> None:
        """Probes every file, fills self.videos and warns of faults."""
        height, width = media.pair(self.size)
        frame_bytes = height * width * 3 + 4 * self.samples // self.frames
        free_bytes = self.cache_bytes
        self.videos, broken, silent, short = [], [], [], []
        for name, captions in listing.items():
            try:
                info = media.probe(self.root / name)
            except UserError as error:
                broken.append(str(error).removeprefix("cannot read "))
                continue
            total = max(1, int(info["duration"] * self.fps + 1e-6))  # frames at `fps`
            held = int(total * self.held_out)
            if held and total >= 2 * self.frames:
                held = max(held, self.frames)
            first, end = (0, total - held) if self.split == "train" else (total - held, total)
            if first == end or not self._is_mine(end - first, info):
                continue
            need = total * frame_bytes
            cached = need <= free_bytes and info["duration"] <= MAX_CACHED_SECONDS
            free_bytes -= need * cached
            self.videos.append(Video(name, captions, first, end, total, cached))
            silent += [] if info["has_audio"] else [name]
            short += [name] if end - first < self.frames else []
        fate = "its last frame is repeated"
        if self.split == "held_out" and len(short) < len(self.videos):
            self.videos = [video for video in self.videos if video.name not in short]
            fate = "it is left out"
        unnamed = [video.name for video in self.videos if not any(video.captions)]
        for names, text in (
            (broken, "broken, it is left out"),
            (short, f"its {self.split} part is shorter than a window, {fate}"),
            (silent, "no sound, it is silent"),
            (unnamed, "no caption, it has the empty text"),
        ):
            if names:
                logger.warning("%d of %d videos: %s: %s", len(names), len(listing), text, _first_names(names))
        mine = buckets.Bucket(self.frames, height, width)
        if not self.videos:
            what = f"no usable {self.split} video in {os.fspath(self.root)!r}"
            if broken:
                raise UserError(f"{what}: {_first_names(broken)}")
            if listing and self.buckets:
                raise UserError(f"{what} belongs to {mine} of data.buckets: leave this bucket out")
            if listing:
                raise UserError(f"{what}: raise held_out ({self.held_out:g}) or add longer videos")
            raise UserError(f"{what}: it holds no {', '.join(SUFFIXES)} file")
        if self.buckets:
            logger.info("%d of %d videos are of the shape %s", len(self.videos), len(listing), mine)

    def _is_mine(self, frames: int, info: dict) -> bool:
        """Returns whether a video of `frames` frames belongs to the bucket of this source."""
        mine = (self.frames, *media.pair(self.size))
        return mine not in self.buckets or buckets.nearest(self.buckets, frames, *info["size"]) == mine

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, i: int) -> dict:
        epoch, place = divmod(i, len(self.videos))
        order = epoch_order(self.seed, epoch, len(self.videos))
        where, which = np.random.default_rng([self.seed, i]).random(2)
        for turn in range(len(order)):  # a file that fails is replaced by another video
            video = self.videos[order[place - turn]]
            start = video.first + int(where * (max(0, video.end - video.first - self.frames) + 1))
            count = min(self.frames, video.end - start)
            try:
                frames, audio = self._window(video, start, count)
            except UserError as error:
                if video.name not in self._warned:
                    self._warned.add(video.name)
                    logger.warning("%s; another video is used in its place", error)
                continue
            frames = np.concatenate([frames, frames[-1:].repeat(self.frames - count, axis=0)])
            audio = np.pad(audio[: self.samples], (0, max(0, self.samples - len(audio))))
            caption = video.captions[int(which * len(video.captions))]
            return {"video": frames, "audio": audio, "caption": caption}
        raise UserError(f"none of the videos in {os.fspath(self.root)!r} can be read any more")

    def fingerprint(self, known: dict) -> dict:
        """Returns {name: [size in bytes, time in ns, CRC-32 of the content, captions]} of all videos.

        known: an earlier result; a file of the same size and time is not read again
        Raises UserError if a video cannot be read.
        """

        def look(video):
            try:
                stat = (self.root / video.name).stat()
                size, time, crc, _ = known.get(video.name, [None] * 4)
                if (size, time) != (stat.st_size, stat.st_mtime_ns):
                    crc, _ = checksums.crc32(self.root / video.name)
            except OSError as error:
                raise UserError(f"cannot read {str(self.root / video.name)!r}: {error.strerror or error}") from error
            return video.name, [stat.st_size, stat.st_mtime_ns, crc, video.captions]

        with ThreadPoolExecutor() as threads:
            return dict(threads.map(look, self.videos))

    def _window(self, video: Video, start: int, frames: int):
        """Returns frames [start, start + frames) of a video with their sound; a cached video is decoded as a whole."""
        path = self.root / video.name
        settings = {"fps": self.fps, "size": self.size, "sample_rate": self.sample_rate}
        if not video.cached:
            return media.read_video(path, start=start / self.fps, frames=frames, **settings)
        with self._locks.setdefault(video.name, threading.Lock()):  # threads that want the same video decode it once
            if path not in self._cache:
                self._cache[path] = media.read_video(path, frames=video.total, **settings)
            images, audio = self._cache[path]
        rate = self.sample_rate / self.fps  # samples per frame
        low = round(start * rate)
        return images[start : start + frames], audio[low : low + int(frames * rate)]
