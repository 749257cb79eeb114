"""Tar archives of clips, as WebDataset has them: the files in them are read where they lie, nothing is unpacked."""

import io
import tarfile
from typing import NamedTuple

from vdm_jax.errors import UserError

MAX_MEMBERS = 1_000_000  # of an archive
# Of one read of a header. Paths have at most 4096 characters, and long headers keep some versions of tarfile busy for
# minutes.
MAX_HEADER_BYTES = 1 << 14
# Why a file is left out of a listing.
OUTSIDE = "points out of the folder"
HIDDEN = "hidden"


class Part(NamedTuple):
    """A file inside another file."""

    archive: str  # path of the other file
    name: str  # as messages show it
    start: int  # in bytes
    size: int  # in bytes

    def open(self) -> io.RawIOBase:
        """Returns a binary file that reads the part alone. Raises OSError."""
        return _OpenPart(self)


def open_file(path):
    """Returns a binary file that reads a path or a Part. Raises OSError."""
    return path.open() if isinstance(path, Part) else open(path, "rb")


class _OpenPart(io.RawIOBase):
    def __init__(self, part: Part):
        self.part, self.position = part, 0
        self.file = open(part.archive, "rb")

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        self.position = max(0, offset + (0, self.position, self.part.size)[whence])
        return self.position

    def readinto(self, buffer):
        self.file.seek(self.part.start + self.position)
        left = max(0, self.part.size - self.position)
        count = self.file.readinto(memoryview(buffer)[:left])
        self.position += count
        return count

    def close(self):
        self.file.close()
        super().close()


class _ShortReads(io.BufferedReader):
    """A file for tarfile, which would read a header of any length."""

    def read(self, size=-1):
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header is too long")
        return super().read(size)


def members(path: str) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Returns {name: [first byte, size]} of the files in a tar archive, and {name: why it is left out} of others.

    Raises UserError if the archive cannot be read.
    """
    found, left_out, offset = {}, {}, -1
    try:
        with _ShortReads(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:", errorlevel=2) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # tarfile would keep all of them
                if archive.offset <= offset or member.size < 0 or len(found) >= MAX_MEMBERS:
                    raise tarfile.ReadError(f"a size that cannot be, or over {MAX_MEMBERS} files")
                offset = archive.offset
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                name = "/".join(parts)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    left_out[name] = "a link, or no plain file, in an archive"
                elif member.name.startswith("/") or ".." in parts:
                    left_out[name] = OUTSIDE
                elif any(part.startswith(".") for part in parts):
                    left_out[name] = HIDDEN
                else:
                    found[name] = [member.offset_data, member.size]
    except (OSError, tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"no whole tar archive: {' '.join(str(error).split())[:200]}") from error
    return found, left_out
