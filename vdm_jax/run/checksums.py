"""Checksums of the files in a folder: a changed or missing file is found before it is used.

Each line of `checksums.txt` is `crc32 bytes path` for one file of the folder. The first line is the CRC-32 of all later
lines. A CRC-32 detects every change of a single bit, and misses one in 4 billion other changes.
"""

import re
import zlib
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from vdm_jax.errors import UserError
from vdm_jax.run import storage

NAME = "checksums.txt"
CHUNK = 1 << 22  # bytes read at once
# Orbax writes these two files after `checksums.txt`. They hold no arrays.
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Damaged(UserError):
    """The files of a folder differ from its checksums."""


class Missing(Damaged):
    """A folder has no checksums."""


def write(folder):
    """Writes the checksums of all files in `folder` and its subfolders, except for the files in LATER."""
    folder = epath.Path(folder)
    paths = [p for p in sorted(files(folder)) if p not in (NAME, *LATER)]
    with ThreadPoolExecutor() as threads:
        lines = "".join(threads.map(lambda path: _line(folder, path), paths))
    storage.replace(folder / NAME, _sealed(lines))


def add_later(folder):
    """Adds the checksums of the files in LATER, where they are missing. Raises Damaged when `checksums.txt` is."""
    folder = epath.Path(folder)
    lines = _read_lines(folder)
    known = {line.split(" ", 2)[2] for line in lines.split("\n")[:-1]}
    more = [name for name in LATER if name not in known and (folder / name).exists()]
    if more:
        storage.replace(folder / NAME, _sealed(lines + "".join(_line(folder, name) for name in more)))


def check(folder, needed=()):
    """Compares the files in `folder` with their checksums, and returns how many bytes it read.

    needed: names of files that must have a checksum
    Raises Damaged, which names the first file that differs, or Missing when the folder has no `checksums.txt`.
    """
    folder = epath.Path(folder)
    lines = _read_lines(folder).split("\n")[:-1]
    present = set(files(folder))  # a line may name no other file
    for name in set(needed) - {line.split(" ", 2)[2] for line in lines}:
        raise Missing(f"{folder / name} is not listed in {NAME}, so damage would not be noticed: restore this file")

    def read(line):
        _, size, path = line.split(" ", 2)
        if path not in present:
            raise Damaged(f"{folder / path} is {'no file' if (folder / path).exists() else 'missing'}")
        try:
            found = _line(folder, path)
        except OSError as error:
            raise Damaged(f"{folder / path} cannot be read: {error.strerror or error}") from None
        if found != line + "\n":
            raise Damaged(f"{folder / path} is damaged: it differs from its checksum")
        return int(size)

    with ThreadPoolExecutor() as threads:
        return sum(threads.map(read, lines))


def _sealed(lines):
    return f"{zlib.crc32(lines.encode()):08x}\n{lines}"


def _read_lines(folder):
    if not (folder / NAME).exists():
        raise Missing(f"{folder} has no {NAME}, so damage would not be noticed: restore this file")
    try:
        content = storage.read_text(folder / NAME, "restore this file")
    except UserError as error:
        raise Damaged(str(error)) from None
    lines = content.partition("\n")[2]
    if content != _sealed(lines) or not re.fullmatch(r"([0-9a-f]{8} \d+ .+\n)*", lines):
        raise Damaged(f"{folder / NAME} is damaged")
    return lines


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
    crc, count = 0, 0
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
            count += len(chunk)
    return crc, count
