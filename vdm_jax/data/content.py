"""A hash of the videos or the data set that a recipe names, so that a run notices when they have changed."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from vdm_jax.data import caption_files, listing, shards
from vdm_jax.run import checksums
from vdm_jax.settings import STAGES, flat


def digest(config):
    """Returns a hash of the data that a config and its phases name; "" where they name no folder that exists.

    It covers the captions of each video, and the name, the size, and the first and the last 64 KiB of each file that
    is used. So a start takes no longer with large files, and a copy of the folder is the same data.
    Raises UserError where the captions cannot be read.
    """
    settings = flat({"data": config.data.to_dict()})
    phases = [part for stage in STAGES for part in config[stage].phases if hasattr(part, "items")]
    keys = ("data.source", "data.path", "data.tfds.name")
    chosen = {tuple((settings | dict(part)).get(key) for key in keys) for part in ({}, *phases)}
    found = sorted(filter(None, (_content(*each) for each in chosen)))
    return hashlib.sha256("".join(found).encode()).hexdigest() if found else ""


def _content(source, path, name):
    """Returns a text that tells the content of a source; "" for one without files, or that training cannot open."""
    if source == "files" and path and Path(path).is_dir():
        found = listing.read(path)
        captions = caption_files.read(found).of

        def open_file(name):
            return shards.open_file(found.open(name, found.videos[name][0]))

    elif source == "tfds" and name:
        from vdm_jax.data import tfds  # see batches.source

        try:
            folder = epath.Path(tfds.open_builder(name, path).data_dir)
        except Exception:
            return ""
        captions = dict.fromkeys(sorted(checksums.files(folder)))

        def open_file(name):
            return (folder / name).open("rb")

    else:
        return ""

    def look(item):
        try:
            with open_file(item[0]) as file:
                return item, checksums.crc32_of_ends(file)
        except OSError:  # gone by now, or not to be read
            return item, None

    with ThreadPoolExecutor() as threads:
        return json.dumps(list(threads.map(look, captions.items())))
