"""Which files of a folder are videos, which hold captions, and why the others are left out.

An image is a video of one frame. What a file is follows from its content, not from its name. An archive `a.tar` is
taken for a folder `a.tar/`.
"""

import collections
import dataclasses
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from vdm_jax.data import index, media, shards
from vdm_jax.data.shards import HIDDEN, OUTSIDE, Part
from vdm_jax.errors import UserError

logger = logging.getLogger("vdm_jax")

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.json", "metadata.parquet", "prompts.txt", "videos.txt")
NOTES = (".txt", ".caption", ".json")  # endings of captions beside a video; an earlier one counts before a later one
UNFINISHED = (".part", ".partial", ".tmp", ".download", ".crdownload")
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
# A file with one of these endings that cannot be read is a broken video; another file is no video.
SUFFIXES = (".mp4", ".webm", ".avi", ".mov", ".mkv", ".m4v", ".mpg", ".mpeg", ".mts", ".m2ts", ".wmv", ".flv", ".3gp")
AT_ONCE = 2000  # files that wait for the threads that look at them

BROKEN = "cannot be read"
NO_VIDEO, SOUND = "no video", "sound only"
NOWHERE = "a link that leads nowhere, or no plain file"
LISTED = "a link to a folder whose files are listed under their own names"


class Info(NamedTuple):
    """What is known of a video before it is decoded."""

    duration: float  # s; 0 for an image
    has_audio: bool
    height: int  # in pixels, as it is shown
    width: int
    fps: float  # of the file; 0 for an image

    @property
    def is_image(self) -> bool:
        return self.duration == 0


@dataclasses.dataclass
class Listing:
    """The files of a folder. A name is the path relative to `root`, with slashes."""

    root: Path
    videos: dict[str, tuple[Part | None, Info]]  # in the order of their names; None for a file that is in no archive
    notes: dict[str, Part | None]  # what may be the caption of a video beside it
    tables: list[str]  # what may name videos with their captions
    left_out: dict[str, dict[str, str]]  # {reason: {name: more about this file, or ""}}

    def open(self, name: str, part: Part | None):
        """Returns what a reader takes for the file: its path, or the part of an archive."""
        return self.root / name if part is None else part


def shown(name: str) -> str:
    """Returns a name for a message of one line."""
    name = name if len(name) <= 200 else name[:200] + "..."
    return name if name.isprintable() else ascii(name)


def by_folders(name: str) -> list[str]:
    """Returns the key that sorts names as a file browser does: folder by folder."""
    return name.split("/")


def read(root: str | os.PathLike) -> Listing:
    """Returns the files of a folder. A file that an earlier call has seen is not opened again, see data/index.py."""
    listing = Listing(Path(root), {}, {}, [], collections.defaultdict(dict))
    known, rows, found, new = index.read(root), {}, {}, []

    def add(name, size, time, part=None):
        base = os.path.basename(name).lower()
        ending = os.path.splitext(base)[1]
        if base in TABLES and part is None:
            listing.tables.append(name)
        if ending in NOTES:
            listing.notes[name] = part
        elif ending in UNFINISHED:
            listing.left_out["an unfinished download"][name] = ""
        elif ending in PACKED:
            listing.left_out["packed, unpack it first"][name] = ""
        elif ending == ".tar" and part is None:
            add_archive(name, size, time)
        elif base not in TABLES or part is not None:
            found[name] = part
            if _is_file_row(known.get(name), size, time):
                rows[name] = known[name]
            else:
                new.append((name, size, time))

    def add_archive(name, size, time):
        path, row = os.path.join(root, name), known.get(name)
        if not _is_archive_row(row, size, time):
            try:
                row = [size, time, *shards.members(path)]
            except UserError as error:
                listing.left_out[BROKEN][name] = str(error)
                return
        rows[name] = row
        for member, (start, length) in row[2].items():
            add(f"{name}/{member}", length, time, Part(path, f"{name}/{member}", start, length))
        for member, reason in row[3].items():
            listing.left_out[reason][f"{name}/{member}"] = ""

    for name, stat in _walk(listing.root, listing.left_out):
        add(name, stat.st_size, stat.st_mtime_ns)

    def look(task):
        name, size, time = task
        try:
            return [size, time, *_look(listing.open(name, found[name]))]
        except UserError as error:
            return str(error).removeprefix(f"cannot read {(name if found[name] else os.path.basename(name))!r}: ")

    with ThreadPoolExecutor() as threads:
        for done in range(0, len(new), AT_ONCE):
            if len(new) > AT_ONCE:
                logger.info("data: looked at %d of %d new files", done, len(new))
            for (name, *_), row in zip(new[done:], threads.map(look, new[done : done + AT_ONCE])):
                if isinstance(row, str):
                    listing.left_out[BROKEN][name] = row
                else:
                    rows[name] = row
    if rows != known:
        index.write(root, rows)
    known = {}
    for name in sorted(found, key=by_folders):
        row = rows.pop(name, ())
        if len(row) == 3:
            listing.left_out[row[2]][name] = ""
        elif row:
            listing.videos[name] = found[name], Info(*row[2:])
    moving = {_stem(name) for name, (_, info) in listing.videos.items() if not info.is_image}
    for name in [name for name, (_, info) in listing.videos.items() if info.is_image and _stem(name) in moving]:
        listing.left_out["a picture with the name of a video"][name] = ""
        del listing.videos[name]
    return listing


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _look(source) -> list:
    """Returns the values of an Info, or [why a file is left out]. Raises UserError for a broken video or image."""
    try:
        found = media.probe(source)
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # such as a missing permission, which tells nothing of the content
            raise
        kind = media.kind(source)
        if kind == "sound only":
            return [SOUND]
        if kind is None and os.path.splitext(source.name)[1].lower() not in SUFFIXES:
            return [NO_VIDEO]
        raise
    return [found["duration"], found["has_audio"], *found["size"], found["fps"]]


def _is_file_row(row, size, time) -> bool:
    """Returns whether a row of the index is of a file, other than an archive, of this size and time."""
    match row:
        case [int() as a, int() as b, str() as reason]:
            return (a, b) == (size, time) and reason in (NO_VIDEO, SOUND)
        case [int() as a, int() as b, float(), bool(), int() as height, int() as width, float()]:
            return (a, b) == (size, time) and min(height, width) > 0
    return False


def _is_archive_row(row, size, time) -> bool:
    """Returns whether a row of the index is of an archive of this size and time."""
    match row:
        case [int() as a, int() as b, dict() as members, dict() as left_out]:
            spans = all(isinstance(x, list) and len(x) == 2 and all(map(_is_position, x)) for x in members.values())
            return (a, b) == (size, time) and spans and all(isinstance(x, str) for x in left_out.values())
    return False


def _is_position(x) -> bool:
    return isinstance(x, int) and x >= 0


def _walk(root: Path, left_out: dict) -> Iterator[tuple[str, os.stat_result]]:
    """Yields (name, status) of the plain files in a folder and its subfolders, and fills `left_out`.

    Links to files and folders inside the folder are followed. No folder is visited twice, so loops of links end.
    """
    top = os.path.realpath(root)
    folders, links, seen = [""], [], set()
    while folders or links:
        # Links come last: a folder is listed under its own name, where it has one.
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:
                left_out[LISTED][folder] = ""
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, folder)) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            left_out[BROKEN][folder] = error.strerror or str(error)
            continue
        for entry in entries:
            name = folder + entry.name
            if entry.name.startswith("."):
                left_out[HIDDEN][name] = ""
                continue
            try:
                link = entry.is_symlink()
                if link and os.path.commonpath([top, os.path.realpath(entry.path)]) != top:
                    left_out[OUTSIDE][name] = ""
                elif entry.is_dir():
                    (links if link else folders).append(name + "/")
                elif entry.is_file():
                    yield name, entry.stat()
                else:
                    left_out[NOWHERE][name] = ""
            except OSError as error:  # such as a link to itself
                left_out[NOWHERE][name] = error.strerror or str(error)
