"""Folders in the layout of Hugging Face: a config.json, and tensors in safetensors files.

The tensors are in one file, or in several with an index, `*.safetensors.index.json`: {"weight_map": {tensor: file}}.
Nothing is unpickled: a folder with pickled weights alone is refused.
"""

import functools
import hashlib
import json
import os
import re
import shlex
from typing import NamedTuple

import ml_dtypes  # noqa: F401, with it NumPy has bfloat16
import safetensors
import safetensors.numpy
from etils import epath

from vdm_jax.errors import UserError
from vdm_jax.run import storage

FIX = "download the folder again"
CONFIG = "config.json"
PIPELINE = "model_index.json"
WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")  # usual names of one file, or before .index.json
PART = re.compile(r"-\d+-of-\d+\.\w+$")  # the end of the name of one file of several
MAX_BYTES = 1 << 22  # of a JSON text, which takes many times its size in memory; 1,000 tensors take about 1 << 17
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class Tensor(NamedTuple):
    """A tensor in a file. tensor[index] reads a part of it."""

    path: epath.Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as in the file: "F32", "BF16", ...

    def __getitem__(self, index):
        if self.dtype not in FLOATS:
            raise UserError(f"{self.path}: tensor {self.name} has type {self.dtype}: give one of {', '.join(FLOATS)}")
        try:
            with safetensors.safe_open(self.path, "numpy") as file:
                return file.get_slice(self.name)[index]
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{self.path} has changed while it was read ({error}): {FIX}") from None


def read_json(path):
    """Returns {name: value} of a JSON file. Raises UserError."""
    text = storage.read_text(path, FIX, MAX_BYTES)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {FIX}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (it holds no mapping of names to values): {FIX}")
    return values


def read_config(folder):
    """Returns (the name of the model's class, its settings) from the config.json in a folder. Raises UserError."""
    folder = epath.Path(folder)
    if storage.in_bucket(folder):
        raise UserError(f"{folder} is in a bucket: copy the published model to a folder on a disk, and give its path")
    if not (folder / CONFIG).exists():
        kept = " (is it one of its subfolders?)" if (folder / PIPELINE).exists() else ""
        raise UserError(f"{folder} has no {CONFIG}{kept}: give the folder of a published model")
    config = read_json(folder / CONFIG)
    architectures = config.get("architectures")
    name = config.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else "")
    if not isinstance(name, str) or not re.fullmatch(r"\w{1,100}", name):
        raise UserError(f"{folder / CONFIG} names no class: {FIX}")
    return name, config


def read_tensors(folder):
    """Returns {name: Tensor} of all tensors in a folder. Only headers are read. Raises UserError.

    Of several files, that with a usual name counts: one in half precision may be beside it.
    """
    folder = epath.Path(folder)
    names = sorted(path.name for path in folder.iterdir())
    files = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    whole = [name for name in files if not PART.search(name)]
    usual = [name for name in whole if name.removesuffix(".index.json") in WHOLE]
    if not files:
        raise UserError(f"{folder} has no safetensors file: {_conversion(names)}")
    if not whole:
        raise UserError(f"{folder} has {files[0]}, but no *.safetensors.index.json: {FIX}")
    if len(whole) > 1 and len(usual) != 1:
        raise UserError(f"{folder} has several files of weights ({', '.join(whole[:4])}): keep one of them")
    name = (usual or whole)[0]
    return _read_indexed(folder, folder / name) if name.endswith(".json") else read_file(folder / name)


def _conversion(names):
    pickled = [name for name in names if name.endswith(PICKLED)]
    if not pickled:
        return FIX
    parts = [name for name in pickled if PART.search(name)] or pickled[:1]
    return (
        f"{parts[0]} is a pickle, which can run code when it is read. If you trust it, convert it in its folder, where "
        'PyTorch is: python -c "import sys, torch, safetensors.torch as s; '
        "w = {k: v.clone(memory_format=torch.contiguous_format) for f in sys.argv[1:] "
        "for k, v in torch.load(f, weights_only=True).items()}; s.save_file(w, 'model.safetensors')\" "
        f"{' '.join(map(shlex.quote, parts))}"
    )


def _read_indexed(folder, index):
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index} is damaged (it has no weight_map of file names): {FIX}")
    tensors = {}
    for name in sorted(set(files.values())):
        if name != epath.Path(name).name or not name.endswith(".safetensors") or not name.isprintable():
            raise UserError(f"{index} names {name!r}, which is no safetensors file in this folder: {FIX}")
        found = read_file(folder / name)
        listed = {tensor for tensor, file in files.items() if file == name}
        if found.keys() != listed:
            tensor = min(found.keys() ^ listed)
            where = "only in the index" if tensor in listed else "only in the file"
            raise UserError(f"{index} and {name} differ: tensor {tensor} is {where}: {FIX}")
        tensors |= found
    return tensors


def read_file(path):
    """Returns {name: Tensor} of the tensors in a safetensors file. Only its header is read. Raises UserError."""
    if not storage.is_file(path):
        raise UserError(f"{path} is missing or no file: {FIX}")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_BYTES:
            raise ValueError(f"its header has {length} bytes")
        with safetensors.safe_open(path, "numpy") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            found = {name: Tensor(path, name, tuple(x.get_shape()), x.get_dtype()) for name, x in parts.items()}
        if not all(name.isprintable() and len(name) < 500 and len(x.shape) < 10 for name, x in found.items()):
            raise ValueError("a tensor has control characters in its name, a long name or many dimensions")
        return found
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no readable safetensors file ({str(error)[:200]}): {FIX}") from None


def fingerprint(folder, others=()):
    """Returns the SHA-256 of the config.json and of the safetensors files in a folder. Raises UserError.

    others: paths of further files that count
    """
    digest = hashlib.sha256()
    own = [path for path in epath.Path(folder).iterdir() if path.name == CONFIG or path.suffix == ".safetensors"]
    for path in [*sorted(own), *others]:
        if not storage.is_file(path):
            raise UserError(f"{path} is missing or no file: {FIX}")
        status = os.stat(path)
        digest.update(f"{path.name} {_sha256(os.fspath(path), status.st_size, status.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1024)  # a start asks several times for the hash of files that may have 23 GB
def _sha256(path, size, time):
    """Returns the SHA-256 of a file that has this size and this time."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder, config, tensors, name="diffusion_pytorch_model.safetensors"):
    """Writes a folder that `read_config` and `read_tensors` can read. tensors: {name: array}"""
    folder = storage.make_folder(folder)
    with storage.writing(folder / name) as file:
        file.write(safetensors.numpy.save(tensors))
    storage.replace(folder / CONFIG, json.dumps(config, indent=2) + "\n")
