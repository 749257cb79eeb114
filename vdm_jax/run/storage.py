"""Paths of runs, on a disk or in a bucket (gs://...): there no file can be appended to, cut or locked."""

import os

import fsspec
from etils import epath

from vdm_jax.errors import UserError


def in_bucket(path):
    return "://" in os.fspath(path)


def given(path):
    """The epath.Path of an option. Raises UserError where what reads such a bucket is not installed."""
    if in_bucket(path):
        try:
            fsspec.get_filesystem_class(fsspec.utils.get_protocol(os.fspath(path)))
        except (ImportError, ValueError) as error:
            raise UserError(f'{path}: {error} (of Google Cloud Storage: pip install -e ".[gcs]")') from None
    return epath.Path(path)


def make_folder(path):
    """-> path of a folder for results, made if it is not there: before the work, so that no result is lost.

    Raises UserError where it cannot be made.
    """
    path = given(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from None
    return path


def absolute(path):
    """From the root."""
    return epath.Path(path) if in_bucket(path) else epath.Path(path).absolute()


def reader(path):
    """A binary file, for pieces here and there: of an object in a bucket no more is fetched than what is read."""
    return _Pieces(path) if in_bucket(path) else open(path, "rb")


class _Pieces:
    def __init__(self, path):
        self.files, self.path = fsspec.url_to_fs(os.fspath(path))
        self.at, self.size = 0, self.files.size(self.path)

    def seek(self, at):
        self.at = at

    def tell(self):
        return self.at

    def read(self, size):
        until = min(self.at + size, self.size)
        piece = self.files.cat_file(self.path, self.at, until) if self.at < until else b""  # a bucket refuses no bytes
        self.at += len(piece)
        return piece


def growing(path, stored, kept):
    """A text file to write more to, after the bytes `kept` of those `stored` in it: cut in place where that will do."""
    if in_bucket(path):
        return _Lines(path, kept.decode())
    if not stored.startswith(kept):
        part = path.with_name(path.name + ".tmp")
        part.write_bytes(kept)
        part.replace(path)
    elif len(kept) < len(stored):
        os.truncate(path, len(kept))
    return open(path, "a", buffering=1)


class _Lines:
    """Each flush writes the object anew."""

    def __init__(self, path, text):
        self.path, self.text, self.stored = path, text, None

    def write(self, line):
        self.text += line

    def flush(self):
        if self.text != self.stored:
            self.path.write_text(self.text)
            self.stored = self.text

    close = flush
