"""Checksums of the files in a folder: what a disk or a copy changed is found before it is used.

`checksums.txt` has a line `crc32 bytes path` for each file of its folder, and first the CRC-32 of these lines. A CRC-32
finds every change of a single bit and all but one in four billion others; it is no defence against forgery.
"""

import zlib
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from vdm_jax.errors import UserError

NAME = "checksums.txt"
CHUNK = 1 << 22  # bytes
# Orbax writes these when all else in a checkpoint is complete, its checksums too; no array is read by them.
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Damaged(UserError):
    """Files are not what they were when their checksums were written."""


def write(folder):
    """Writes the checksums of all files in `folder`, those in folders below included."""
    folder = epath.Path(folder)
    paths = [p for p in sorted(files(folder)) if p not in (NAME, *LATER)]
    with ThreadPoolExecutor() as threads:
        lines = "".join(threads.map(lambda path: _line(folder, path)[0] + "\n", paths))
    (folder / NAME).write_text(_sealed(lines))


def add_later(folder):
    """Adds the checksums of the files named in LATER to those in `folder`, if any, where they are missing."""
    folder = epath.Path(folder)
    if not (folder / NAME).exists():
        return
    lines = _read_lines(folder)
    known = {line.split(" ", 2)[2] for line in lines.split("\n")[:-1]}
    more = [name for name in LATER if name not in known and (folder / name).exists()]
    if more:
        lines += "".join(_line(folder, name)[0] + "\n" for name in more)
        (folder / f"{NAME}.new").write_text(_sealed(lines))
        (folder / f"{NAME}.new").replace(folder / NAME)  # a run killed here leaves the one or the other


def check(folder):
    """-> bytes read, or None where `folder` has no checksums. Raises Damaged, which names the first such file."""
    folder = epath.Path(folder)
    if not (folder / NAME).exists():
        return None
    lines = _read_lines(folder)

    def read(line):
        path = line.split(" ", 2)[2]
        try:
            found, count = _line(folder, path)
        except FileNotFoundError:
            raise Damaged(f"{folder / path} is missing") from None
        except OSError as error:
            raise Damaged(f"{folder / path} cannot be read: {error.strerror or error}") from None
        if found != line:
            raise Damaged(f"{folder / path} is damaged: its checksum is another than when it was written")
        return count

    with ThreadPoolExecutor() as threads:
        return sum(threads.map(read, lines.split("\n")[:-1]))


def _sealed(lines):
    return f"{zlib.crc32(lines.encode()):08x}\n{lines}"


def _read_lines(folder):
    content = (folder / NAME).read_bytes().decode("utf-8", "replace")
    lines = content.partition("\n")[2]
    if content != _sealed(lines):
        raise Damaged(f"{folder / NAME} is damaged")
    return lines


def files(folder, above=""):
    """Paths of files relative to the topmost folder."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files(path, f"{above}{path.name}/")
        else:
            yield above + path.name


def _line(folder, path):
    """-> (line of a file, its bytes)."""
    crc, count = 0, 0
    with (folder / path).open("rb") as file:
        while chunk := file.read(CHUNK):
            crc, count = zlib.crc32(chunk, crc), count + len(chunk)
    return f"{crc:08x} {count} {path}", count
