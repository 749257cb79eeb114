"""Folders in the layout of Hugging Face: a config.json, and tensors in safetensors files.

The tensors are in one file, or in several with an index, `*.safetensors.index.json`: {"weight_map": {tensor: file}}.
Nothing is unpickled: a folder with pickled weights alone is refused.
"""

import hashlib
import json
from typing import NamedTuple

import safetensors
import safetensors.numpy
from etils import epath

from vdm_jax.errors import UserError
from vdm_jax.run import storage

FIX = "download the folder again"
CONFIG = "config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class Tensor(NamedTuple):
    """A tensor in a file. tensor[index] reads a part of it."""

    path: epath.Path
    name: str
    shape: tuple[int, ...]

    def __getitem__(self, index):
        with safetensors.safe_open(self.path, "numpy") as file:
            return file.get_slice(self.name)[index]


def read_config(folder):
    """Returns (the name of the model's class, its settings) from the config.json in a folder. Raises UserError."""
    folder = epath.Path(folder)
    if storage.in_bucket(folder):
        raise UserError(f"{folder} is in a bucket: copy the published model to a folder on a disk, and give its path")
    if not (folder / CONFIG).exists():
        kept = " (is it one of its subfolders?)" if (folder / "model_index.json").exists() else ""
        raise UserError(f"{folder} has no {CONFIG}{kept}: give the folder of a published model")
    config = storage.read_json(folder / CONFIG, FIX, sealed=False)
    architectures = config.get("architectures")
    name = config.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else "")
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder / CONFIG} names no class: {FIX}")
    return name, config


def read_tensors(folder):
    """Returns {name: Tensor} of all tensors in a folder. Only headers are read. Raises UserError."""
    folder = epath.Path(folder)
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        return _read_indexed(folder, _only(folder, indexes))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no safetensors file: {_conversion(folder)}")
    return read_file(_only(folder, files))


def _only(folder, paths):
    """Returns the single path, or the one with a usual name. Raises UserError."""
    usual = [path for path in paths if path.name.startswith(("diffusion_pytorch_model.safe", "model.safe"))]
    if len(paths) > 1 and len(usual) != 1:
        names = ", ".join(path.name for path in paths[:4])
        raise UserError(f"{folder} has several files of weights ({names}): keep one of them")
    return (usual or paths)[0]


def _conversion(folder):
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if not pickled:
        return FIX
    return (
        f"{pickled[0]} is a pickle, which can run code when it is read. If you trust it, convert it where PyTorch is: "
        f"python -c \"import torch, safetensors.torch as s; w = torch.load('{pickled[0]}', weights_only=True); "
        "s.save_file({k: v.contiguous() for k, v in w.items()}, 'model.safetensors')\""
    )


def _read_indexed(folder, index):
    files = storage.read_json(index, FIX, sealed=False).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index} is damaged (it has no weight_map of file names): {FIX}")
    tensors = {}
    for name in sorted(set(files.values())):
        if name != epath.Path(name).name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is no safetensors file in this folder: {FIX}")
        tensors |= read_file(folder / name)
    if tensors.keys() != files.keys():
        name = min(tensors.keys() ^ files.keys())
        where = "the index names it only" if name in files else "the index does not name it"
        raise UserError(f"{index} and its files differ in tensor {name} ({where}): {FIX}")
    return tensors


def read_file(path):
    """Returns {name: Tensor} of the tensors in a safetensors file. Only its header is read. Raises UserError."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return {name: Tensor(path, name, tuple(file.get_slice(name).get_shape())) for name in file.keys()}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {FIX}") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no readable safetensors file ({error}): {FIX}") from None


def fingerprint(folder):
    """Returns the SHA-256 of the config.json and of the safetensors files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(epath.Path(folder).iterdir()):
        if path.name == CONFIG or path.suffix == ".safetensors":
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def write(folder, config, tensors, name="diffusion_pytorch_model.safetensors"):
    """Writes a folder that `read_config` and `read_tensors` can read. tensors: {name: array}"""
    folder = storage.make_folder(folder)
    with storage.writing(folder / name) as file:
        file.write(safetensors.numpy.save(tensors))
    storage.replace(folder / CONFIG, json.dumps(config, indent=2) + "\n")
