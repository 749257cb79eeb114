"""What earlier starts learned of the files in a folder, so that a later start need not open them.

The index of a folder is a JSON file among the caches of the user, not in the folder itself: {path: row}. A row begins
with the size in bytes and the time in ns of the file, and holds only for a file that still has both.
"""

import functools
import hashlib
import inspect
import logging
import os
from pathlib import Path

import av
import PIL

from vdm_jax.data import color, media
from vdm_jax.errors import UserError
from vdm_jax.run import storage

logger = logging.getLogger("vdm_jax")


def path_of(root: str | os.PathLike) -> Path:
    """Returns where the index of a folder is."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:16]
    return storage.user_cache() / "folders" / f"{name}.json"


@functools.cache
def _reader() -> str:
    """Returns a text that changes with the code that reads files: what another reader found may be wrong."""
    source = f"{inspect.getsource(media)} {inspect.getsource(color)} {av.__version__} {PIL.__version__}"
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def read(root: str | os.PathLike) -> dict[str, list]:
    """Returns {path: row}; {} where the folder has no index, or one by another reader. Damage is logged."""
    path = path_of(root)
    if not path.exists():
        return {}
    try:
        content = storage.read_json(path, "it is made anew")
    except UserError as error:
        logger.warning("the index of the folder: %s", error)
        return {}
    rows = content.get("rows")
    return rows if content.get("reader") == _reader() and isinstance(rows, dict) else {}


def write(root: str | os.PathLike, rows: dict[str, list]) -> None:
    """Replaces the index of a folder. Where it cannot be written, the next start looks at all files again."""
    storage.remember(path_of(root), {"reader": _reader(), "rows": rows})
