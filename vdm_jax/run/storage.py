"""Paths on a disk or in a bucket (gs://...), and the one way to write a file and to read a small file back.

A file in a bucket can be replaced, but not appended to, cut or locked.
"""

import contextlib
import json
import os
import zlib
from pathlib import Path

import fsspec
from etils import epath

from vdm_jax.errors import UserError

MAX_BYTES = 1 << 26  # of a small file
CHECKSUM = "crc32"  # key of a JSON file: the CRC-32 of all other keys and values


def in_bucket(path):
    return "://" in os.fspath(path)


def given(path):
    """Returns the epath.Path of a path that the user typed. Raises UserError for a bucket that no package can read."""
    if in_bucket(path):
        try:
            fsspec.get_filesystem_class(fsspec.utils.get_protocol(os.fspath(path)))
        except (ImportError, ValueError) as error:
            raise UserError(f'{path}: {error} (for Google Cloud Storage: pip install -e ".[gcs]")') from None
    return epath.Path(path)


def is_file(path):
    """Returns whether a path is a regular file, or an object in a bucket. To open a pipe would wait for ever."""
    return epath.Path(path).is_file() if in_bucket(path) else os.path.isfile(path)  # epath takes a pipe for a file


def make_folder(path):
    """Returns the epath.Path of a folder for results, made if it is missing. Raises UserError where it cannot be."""
    path = given(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from None
    return path


def user_cache():
    """Returns the folder for what this machine remembers between runs, which may be missing."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vdm_jax"


def remember(path, values):
    """Writes {name: value} to a JSON file in `user_cache`. Where it cannot be written, it is left out."""
    if path.is_absolute():  # without a home the folder would be ./~
        with contextlib.suppress(OSError, UserError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, values)


def absolute(path):
    """Returns an absolute epath.Path. A path in a bucket is absolute already."""
    return epath.Path(path) if in_bucket(path) else epath.Path(path).absolute()


def reader(path):
    """Opens a binary file to read pieces of it. From a bucket only these pieces are fetched."""
    if not is_file(path):
        raise FileNotFoundError(f"{path} is no file")
    return fsspec.open(os.fspath(path), "rb", cache_type="none").open() if in_bucket(path) else open(path, "rb")


@contextlib.contextmanager
def writing(path):
    """Yields a binary file that becomes `path` when the block ends. A reader sees the old file or the complete new one.

    This also holds after a kill or a power failure. Raises UserError when the file cannot be written.
    """
    path = epath.Path(path)
    part = path.with_name(path.name + ".tmp")
    try:
        for taken in (path, part):
            if taken.is_dir():
                raise UserError(f"{taken} is a folder, where a file belongs: move it away")
        with part.open("wb") as file:
            yield file
            if not in_bucket(path):
                file.flush()
                os.fsync(file.fileno())  # the content is on the disk before the name
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def replace(path, text):
    """Writes a text file as `writing` does."""
    with writing(path) as file:
        file.write(text.encode())


def read_text(path, fix, most=MAX_BYTES):
    """Returns the text of a small file.

    fix: what the user can do, as the end of the error message
    most: bytes that it may have
    Raises UserError when the file is missing, too large, not UTF-8, or no file.
    """
    path = epath.Path(path)
    try:
        if not is_file(path):
            fault = "is no file" if path.exists() else "is missing"
        elif path.stat().length > most:
            fault = f"is damaged (over {most} bytes)"
        else:
            return path.read_bytes().decode()
    except UnicodeDecodeError:
        fault = "is damaged (no UTF-8 text)"
    except OSError as error:
        fault = f"cannot be read ({error.strerror or error})"
    raise UserError(f"{path} {fault}: {fix}")


def write_json(path, values):
    """Writes {name: value} as a JSON file with a checksum. Raises UserError for a number that is not finite."""
    try:
        text = json.dumps(seal(values), indent=1) + "\n"
    except ValueError:
        raise UserError(f"cannot write {path}: a number is not finite") from None
    replace(path, text)


def read_json(path, fix, sealed=True):
    """Returns {name: value} of a JSON file, which is compared with its checksum.

    fix: what the user can do, as the end of the error message
    sealed: whether a file without a checksum is damaged, too
    Raises UserError as `read_text` does, and when the file is no JSON object, differs from its checksum, or holds a
    number that is not finite.
    """
    try:
        return unseal(read_text(path, fix), sealed)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {fix}") from None


def seal(values):
    """Returns {name: value} with a checksum as its last value. Raises ValueError for a number that is not finite."""
    return values | {CHECKSUM: f"{zlib.crc32(json.dumps(values, sort_keys=True, allow_nan=False).encode()):08x}"}


def unseal(text, sealed=True):
    """Returns {name: value} of the JSON text of `seal`. Raises ValueError for damage.

    sealed: whether a text without a checksum is damaged, too
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("it holds no mapping of names to values")
    stored = values.pop(CHECKSUM, None)
    right = seal(values)[CHECKSUM]
    if sealed and stored is None:
        raise ValueError("it has no checksum")
    if stored not in (None, right):
        raise ValueError("it differs from its checksum")
    return values


def growing(path, stored, kept):
    """Opens a text file to append lines. First it is cut or rewritten, so that it holds the bytes `kept`.

    stored: the bytes that it holds now; b"" for a new file. When they begin with `kept`, the file is cut in place.
    """
    if in_bucket(path):
        return _Lines(path, kept.decode())
    if not stored.startswith(kept):
        replace(path, kept.decode())
    elif len(kept) < len(stored):
        os.truncate(path, len(kept))
    return open(path, "a", buffering=1)


class _Lines:
    """A text file in a bucket. Each flush writes the whole object."""

    def __init__(self, path, text):
        self.path, self.text = path, text

    def write(self, line):
        self.text += line

    def flush(self):
        self.path.write_text(self.text)

    close = flush
