"""Checksums of the files in a folder: a changed or missing file is found before it is used.

Each line of `checksums.txt` is `crc32 bytes path` for one file of the folder. The first line is the CRC-32 of all later
lines. The second line may be `is MARK`, which says what the folder is. A CRC-32 detects every change of a single bit,
and misses one in 4 billion other changes.
"""

import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from vdm_jax.errors import UserError
from vdm_jax.run import storage

NAME = "checksums.txt"
CHUNK = 1 << 22  # bytes read at once
END = 1 << 16  # bytes at an end of a file
# Orbax writes these two files after `checksums.txt`. They hold no arrays.
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Damaged(UserError):
    """The files of a folder differ from its checksums."""


class Unverified(Damaged):
    """A folder has no checksums, or is not what it should be."""


def write(folder, mark="", names=None):
    """Writes the checksums of files in `folder`.

    mark: what the folder is, a text for `check`
    names: of the files; None for all in `folder` and its subfolders, except for those in LATER
    """
    folder = epath.Path(folder)
    paths = [p for p in sorted(files(folder) if names is None else names) if p not in (NAME, *LATER)]
    with ThreadPoolExecutor() as threads:
        lines = "".join(threads.map(lambda path: _line(folder, path), paths))
    storage.replace(folder / NAME, _sealed(f"is {mark}\n{lines}" if mark else lines))


def add_later(folder):
    """Adds the checksums of the files in LATER, where they are missing. Raises Damaged when `checksums.txt` is."""
    folder = epath.Path(folder)
    content, _, known = _read(folder)
    more = [name for name in LATER if name not in known and (folder / name).exists()]
    if more:
        storage.replace(folder / NAME, _sealed(content + "".join(_line(folder, name) for name in more)))


def check(folder, needed=(), mark=""):
    """Compares the files in `folder` with their checksums, and returns how many bytes it read.

    needed: names of files that must have a checksum
    mark: what the folder should be; "" for anything
    Raises Damaged, which names the first file that differs. Raises Unverified when the folder has no `checksums.txt`,
    when a needed file is not in it, or when its mark is another one.
    """
    folder = epath.Path(folder)
    _, stored, lines = _read(folder)
    present = set(files(folder))  # a line may name no other file
    for name in set(needed) - set(lines):
        raise Unverified(f"{folder / name} is not listed in {NAME}, so damage would not be noticed: restore this file")

    def read(line):
        _, size, path = line.split(" ", 2)
        if path not in present or not storage.is_file(folder / path):
            raise Damaged(f"{folder / path} is {'no file' if (folder / path).exists() else 'missing'}")
        try:
            found = _line(folder, path)
        except OSError as error:
            raise Damaged(f"{folder / path} cannot be read: {error.strerror or error}") from None
        if found != line + "\n":
            raise Damaged(f"{folder / path} is damaged: it differs from its checksum")
        return int(size)

    with ThreadPoolExecutor() as threads:
        count = sum(threads.map(read, lines.values()))
    if mark and stored != mark:
        raise Unverified(f"{folder} is {stored or 'of an unknown run'}, where {mark} belongs")
    return count


def listed(folder):
    """Returns {path: its line} of the files with a checksum; {} where `checksums.txt` is missing or damaged."""
    try:
        return _read(folder)[2]
    except Damaged:
        return {}


def is_unchanged(folder, path):
    """Returns whether a file is the one that `checksums.txt` was written for."""
    return listed(folder).get(path) == _line(folder, path).rstrip("\n")


def read_mark(folder):
    """Returns the mark of a folder, or "". Raises Damaged."""
    return _read(folder)[1]


def _sealed(lines):
    return f"{zlib.crc32(lines.encode()):08x}\n{lines}"


def _read(folder):
    """Returns (all of `checksums.txt` after its first line, the mark or "", {path: its line}). Raises Damaged."""
    if not (folder / NAME).exists():
        raise Unverified(f"{folder} has no {NAME}, so damage would not be noticed: restore this file")
    try:
        content = storage.read_text(folder / NAME, "restore this file")
    except UserError as error:
        raise Damaged(str(error)) from None
    content, stored = content.partition("\n")[2], content
    parts = re.fullmatch(r"(?:is (.+)\n)?((?:[0-9a-f]{8} \d+ .+\n)*)", content)
    if stored != _sealed(content) or not parts:
        raise Damaged(f"{folder / NAME} is damaged")
    return content, parts[1] or "", {line.split(" ", 2)[2]: line for line in parts[2].split("\n")[:-1]}


def files(folder, above=""):
    """Yields the paths of all files in `folder` and its subfolders, relative to `folder`."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files(path, f"{above}{path.name}/")
        else:
            yield above + path.name


def _line(folder, path):
    """Returns the line of `checksums.txt` for one file."""
    crc, count = crc32(folder / path)
    return f"{crc:08x} {count} {path}\n"


def crc32(path):
    """Returns (CRC-32, size in bytes) of the content of a file. Raises OSError."""
    with epath.Path(path).open("rb") as file:
        return crc32_of(file)


def crc32_of(file):
    """Returns (CRC-32, size in bytes) of what can be read from an open binary file. Raises OSError."""
    crc, count = 0, 0
    while chunk := file.read(CHUNK):
        crc = zlib.crc32(chunk, crc)
        count += len(chunk)
    return crc, count


def crc32_of_ends(file):
    """Returns (CRC-32 of the first and the last 64 KiB, size in bytes) of an open binary file. Raises OSError."""
    count = file.seek(0, os.SEEK_END)
    crc = 0
    for start in (0, max(0, count - END)):
        file.seek(start)
        crc = zlib.crc32(file.read(END), crc)
    return crc, count
