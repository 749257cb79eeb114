"""A folder of real videos with captions as an endless random-access source of clips.

Which files are videos follows from data/listing.py, and their captions from data/caption_files.py.
"""

import dataclasses
import functools
import hashlib
import logging
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vdm_jax.data import buckets, caption_files, listing, media, summary
from vdm_jax.data.rates import rational, sample_count
from vdm_jax.data.shards import Part, open_file
from vdm_jax.errors import UserError, one_of
from vdm_jax.run import checksums

logger = logging.getLogger("vdm_jax")

MAX_CACHED_SECONDS = 300  # of a longer video only windows are decoded: the whole would take minutes
SIDES = re.compile(r"left|right|clockwise|\beast|\bwest", re.IGNORECASE)  # such a caption is wrong of a mirrored clip
HELD_OUT_FILES = 8  # whole files are held out where about this number or more are on each side


@functools.lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Returns the order of the items in an epoch: a permutation, int [count]."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def held_out_files(names, share: float) -> set[str]:
    """Returns which of the named files are held out: about a share in 0..1, or none where these would be few.

    Each name decides for itself, so a file stays on its side when other files are added.
    """
    if min(share, 1 - share) * len(names) < HELD_OUT_FILES:
        return set()
    limit = share * 2**32
    return {name for name in names if int(hashlib.sha256(os.fsencode(name)).hexdigest()[:8], 16) < limit}


class Video(NamedTuple):
    """A video of a folder, and the part of it that a split uses: frames [first, end) at the source's `fps`."""

    name: str  # relative to the folder
    captions: list  # each a text or a caption_files.Timed
    first: int
    end: int
    total: int  # frames of the whole video
    part: Part | None  # where it is in an archive
    cached: bool  # whether the decoded video is kept in memory


@dataclasses.dataclass(eq=False)
class Files:
    """Random windows of the videos in a folder, without end. Item i follows from (seed, i).

    An item is {'video': uint8 [F, h, w, 3], 'audio': float32 [F * sample_rate // fps], 'caption': str}. In each epoch
    every video comes once, in an order that is drawn for the epoch, with a random window and one of its captions.
    Items n * k to n * (k + 1) - 1 are epoch k of n videos.

    The split "held_out" is a share `held_out` of the files. Which ones follows from their names, so more files change
    nothing for these. Where that share is fewer than HELD_OUT_FILES files, it is the end of every video: the same share
    of it, or one window where that is more and the video lasts at least two windows. Where a split's part of a
    video is shorter than a window, its last frame is repeated in silence; "held_out" leaves such a video out, if it
    then still has any. An image is a video of one frame, and is never held out. A video without sound is silent. A
    missing caption is the empty text. `summary` says what was found and what is left out; it is logged.

    Raises UserError if the folder or its captions cannot be used.
    """

    in_epochs = True  # see batches.Examples

    path: str | os.PathLike  # of the folder
    _: dataclasses.KW_ONLY
    frames: int  # F, of a window
    size: int | tuple[int, int]  # h = w, or (h, w), in pixels
    fps: float  # frames per second of a window; windows begin on whole frames
    sample_rate: int  # of the sound, in Hz
    seed: int  # of the order of videos and of the windows
    split: str = "train"  # or "held_out"
    held_out: float = 0.2  # share of the videos, in 0..1, that is kept from training
    buckets: tuple = ()  # of buckets.Bucket: only videos for which (frames, *size) is the nearest one are used
    flip: bool = False  # mirror half of the training windows, except where the caption has a word of SIDES
    cache_bytes: int = 2 << 30  # for decoded videos; of videos that do not fit, only the window is decoded

    def __post_init__(self):
        one_of("split", self.split, ("train", "held_out"))
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out={self.held_out} must be a share of at least 0 and less than 1")
        self.root = Path(self.path)
        if not self.root.is_dir():
            raise UserError(f"data path {os.fspath(self.path)!r} is not a folder: name the folder of videos")
        self.rate = rational(self.fps)
        self.samples = sample_count(self.frames, self.fps, self.sample_rate)
        self._cache = {}
        self._warned = set()
        self._locks = {}  # name: a lock
        self._load(listing.read(self.root))

    def _load(self, found: listing.Listing) -> None:
        """Fills self.videos and self.summary, and warns of faults."""
        captions = caption_files.read(found)
        images = {name for name in captions.of if found.videos[name][1].is_image}
        held_files = held_out_files(captions.of.keys() - images, self.held_out)
        height, width = media.pair(self.size)
        frame_bytes = height * width * 3 + 4 * self.samples // self.frames
        free_bytes = self.cache_bytes
        self.videos, short, holding = [], [], 0
        for name, texts in captions.of.items():
            part, info = found.videos[name]
            total = max(1, int(Fraction(info.duration + 1e-6) * self.rate))  # frames at `fps`
            held = int(total * self.held_out)
            if held and total >= 2 * self.frames:
                held = max(held, self.frames)
            if held_files:
                held = total if name in held_files else 0
            holding += held > 0
            first, end = (0, total - held) if self.split == "train" else (total - held, total)
            if first == end or not self._is_mine(end - first, info):
                continue
            need = total * frame_bytes
            cached = need <= free_bytes and info.duration <= MAX_CACHED_SECONDS
            free_bytes -= need * cached
            self.videos.append(Video(name, texts, first, end, total, part, cached))
            short += [name] if end - first < self.frames else []
        if held_files:
            held_out = f"{len(held_files)} of {len(captions.of)} videos"
        elif holding:
            held_out = f"the end of {holding} of {len(captions.of)} videos, which are too few to hold out whole ones"
        else:
            held_out = "nothing, so validation and evaluate have no clips"
        held_out += f" (data.files.held_out={self.held_out:g})"
        self.summary = summary.make(found, captions, held_out)
        self.summary.log()
        fate = "its last frame is repeated"
        if self.split == "held_out" and len(short) < len(self.videos):
            self.videos = [video for video in self.videos if video.end - video.first >= self.frames]
            fate = "it is left out"
        if short:
            logger.warning(
                "data: %d of %d videos: its %s part is shorter than a window, %s: %s",
                *(len(short), len(captions.of), self.split, fate, summary.first_names(summary.group(short))),
            )
        mine = buckets.Bucket(self.frames, height, width)
        if not self.videos:
            what = f"no usable {self.split} video in {os.fspath(self.root)!r}"
            if captions.of and self.buckets:
                raise UserError(f"{what} belongs to {mine} of data.buckets: leave this bucket out")
            if captions.of:
                raise UserError(f"{what}: raise held_out ({self.held_out:g}) or add longer videos")
            faults = [(reason, files) for reason, files in self.summary.left_out.items()]
            faults += self.summary.caption_faults.items()
            told = "; ".join(f"{reason}: {summary.first_names(files)}" for reason, files in faults)
            raise UserError(f"{what}: {told or 'it holds no video'}")
        if self.buckets:
            logger.info("data: %d of %d videos are of the shape %s", len(self.videos), len(captions.of), mine)

    def _is_mine(self, frames: int, info: listing.Info) -> bool:
        """Returns whether a video of `frames` frames belongs to the bucket of this source."""
        mine = (self.frames, *media.pair(self.size))
        return mine not in self.buckets or buckets.nearest(self.buckets, frames, info.height, info.width) == mine

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, i: int) -> dict:
        epoch, place = divmod(i, len(self.videos))
        order = epoch_order(self.seed, epoch, len(self.videos))
        where, which, side = np.random.default_rng([self.seed, i]).random(3)
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
            if count < self.frames:
                frames = np.concatenate([frames, frames[-1:].repeat(self.frames - count, axis=0)])
            audio = np.pad(audio[: self.samples], (0, max(0, self.samples - len(audio))))
            caption = caption_files.choose(video.captions, start / self.fps, (start + count) / self.fps, which)
            if self.flip and self.split == "train" and side < 0.5 and not SIDES.search(caption):
                frames = frames[:, :, ::-1]
            return {"video": frames, "audio": audio, "caption": caption}
        raise UserError(f"none of the videos in {os.fspath(self.root)!r} can be read any more")

    def name_of(self, i: int) -> str:
        """Returns the name of the video that item i is drawn from. A video that fails is replaced by another one."""
        epoch, place = divmod(i, len(self.videos))
        return self.videos[epoch_order(self.seed, epoch, len(self.videos))[place]].name

    def fingerprint(self, known: dict) -> dict:
        """Returns {name: [size in bytes, time in ns, CRC-32 of the content, captions]} of all videos.

        known: an earlier result; a file of the same size and time is not read again
        Raises UserError if a video cannot be read.
        """

        def look(video):
            path = self.root / video.name if video.part is None else video.part
            try:
                stat = os.stat(path if video.part is None else path.archive)
                bytes_now = stat.st_size if video.part is None else path.size
                size, time, crc, _ = known.get(video.name, [None] * 4)
                if (size, time) != (bytes_now, stat.st_mtime_ns):
                    with open_file(path) as file:
                        crc, _ = checksums.crc32_of(file)
            except OSError as error:
                raise UserError(f"cannot read {str(self.root / video.name)!r}: {error.strerror or error}") from error
            return video.name, [bytes_now, stat.st_mtime_ns, crc, video.captions]

        with ThreadPoolExecutor() as threads:
            return dict(threads.map(look, self.videos))

    def _window(self, video: Video, start: int, frames: int):
        """Returns frames [start, start + frames) of a video with their sound; a cached video is decoded as a whole."""
        path = self.root / video.name if video.part is None else video.part
        settings = {"fps": self.fps, "size": self.size, "sample_rate": self.sample_rate}
        if not video.cached:
            return media.read_video(path, start=start / self.rate, frames=frames, **settings)
        with self._locks.setdefault(video.name, threading.Lock()):  # threads that want the same video decode it once
            if path not in self._cache:
                self._cache[path] = media.read_video(path, frames=video.total, **settings)
            images, audio = self._cache[path]
        low = round(start * self.sample_rate / self.rate)
        samples = sample_count(frames, self.fps, self.sample_rate)
        return images[start : start + frames].copy(), audio[low : low + samples]  # a caller may change its clip
