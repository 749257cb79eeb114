"""Paths on a disk or in a bucket (gs://...). A file in a bucket can be replaced, but not appended to, cut or locked."""

import os

import fsspec
from etils import epath

from vdm_jax.errors import UserError


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


def make_folder(path):
    """Returns the epath.Path of a folder for results, made if it is missing. Raises UserError where it cannot be."""
    path = given(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from None
    return path


def absolute(path):
    """Returns an absolute epath.Path. A path in a bucket is absolute already."""
    return epath.Path(path) if in_bucket(path) else epath.Path(path).absolute()


def reader(path):
    """Opens a binary file to read pieces of it. From a bucket only these pieces are fetched."""
    return fsspec.open(os.fspath(path), "rb", cache_type="none").open() if in_bucket(path) else open(path, "rb")


def replace(path, text):
    """Writes a text file as a whole. A reader sees the old file or the new one, even after a kill."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(text)
    part.replace(path)


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
