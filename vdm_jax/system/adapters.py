"""Adapters in the two files of the package `peft`: adapter_config.json, and adapter_model.safetensors beside it.

The factors A and B of the kernel `x/y/kernel` are the tensors base_model.model.x.y.lora_A.weight and ...lora_B.weight.
"""

import difflib
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from vdm_jax import lora
from vdm_jax.errors import UserError
from vdm_jax.models.published import naming
from vdm_jax.run import huggingface, storage

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
FIX = "give a file of plain LoRA adapters, beside its adapter_config.json"
# Settings that change what tensors mean, and the values with which they mean what lora.py computes. () is any value
# that is empty or False.
PLAIN = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others begin from another base
    **dict.fromkeys(("use_dora", "use_rslora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias"), ()),
    **dict.fromkeys(("alpha_pattern", "layer_replication", "arrow_config", "kasa_config", "monteclora_config"), ()),
}


def write(folder, adapters, alpha):
    """Writes adapters, float32, in a folder. `peft` reads it with PeftModel.from_pretrained(model, folder).

    adapters: a tree, see vdm_jax/lora.py
    alpha: with it they were trained
    """
    folder = storage.make_folder(folder)
    tensors = {PREFIX + name: x for name, x in naming.to_tensors(adapters).items()}
    layers = sorted({name.removeprefix(PREFIX).rsplit(".", 2)[0] for name in tensors})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "r": next(x.shape[0] for name, x in tensors.items() if name.endswith(".lora_A.weight")),
        "lora_alpha": alpha,
        # A regular expression for the whole name. In a list "conv_in" would also stand for "x.conv_in".
        "target_modules": "|".join(map(re.escape, layers)),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    with storage.writing(folder / FILE) as file:
        file.write(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    storage.replace(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def merge_files(params, files):
    """Returns the parameters of a network with adapters merged in, one file after the other.

    files: texts "FILE" or "FILE:SCALE"
    Raises UserError as `read` does, and for a scale that is no finite number.
    """
    for text in files:
        path, colon, scale = text.rpartition(":")
        if not colon or "/" in scale:  # gs://...
            path, scale = text, "1"
        try:
            factor = float(scale)
        except ValueError:
            factor = math.nan
        if not abs(factor) <= np.finfo(np.float32).max:
            raise UserError(f"lora={text}: the scale {scale!r} is no finite number: write FILE:0.5")
        adapters, alpha = read(path, params)
        params = lora.merge(params, adapters, alpha * factor)
        if not all(jnp.isfinite(x).all() for x in jax.tree.leaves(params)):
            raise UserError(f"lora={text}: the merged weights are not finite: use a smaller scale, or other adapters")
    return params


def read(path, params):
    """Returns (a tree of adapters for some kernels of `params`, NumPy float32; their alpha).

    path: a safetensors file, with an adapter_config.json in the same folder
    params: a tree of arrays or ShapeDtypeStructs of the network that they change
    Raises UserError for a file that cannot be read, is of another network, or is of another kind than lora.py has.
    """
    path = storage.given(path)
    if storage.in_bucket(path):
        raise UserError(f"{path} is in a bucket: copy it and its {CONFIG} to a folder on a disk, and give its path")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the file, {path / FILE}")
    tensors = huggingface.read_file(path)
    alpha = _read_alpha(path.parent / CONFIG)
    kernels = jax.tree_util.tree_leaves_with_path(params)
    kernels = [(naming.tensor_name(p).removesuffix(".weight"), p, x) for p, x in kernels if p[-1].key == "kernel"]
    tree = {}
    for layer, where, kernel in kernels:
        names = [f"{PREFIX}{layer}.lora_{factor}.weight" for factor in "AB"]
        pair = {name: tensors.pop(name) for name in names if name in tensors}
        if not pair:
            continue
        for name in names:
            if name not in pair:
                raise UserError(f"{path} has no tensor {name}, the other half of an adapter: {FIX}")
        rank = (*pair[names[0]].shape, 0)[0]
        node = tree
        for key in where[:-1]:
            node = node.setdefault(key.key, {})
        for name, shape in zip(names, lora.factor_shapes(where, kernel.shape, rank)):
            node[name.split(".")[-2]] = {"kernel": _read_factor(path, pair[name], shape)}
    for name in tensors:
        layer = name.removeprefix(PREFIX).rsplit(".", 2)[0]
        nearest = difflib.get_close_matches(layer, [other for other, _, _ in kernels], n=1, cutoff=0.0)
        raise UserError(
            f"{path} has a tensor {name[:200]}, which is of no adapter of this network (its nearest layer: "
            f"{nearest[0]}): give adapters of this network"
        )
    if not tree:
        raise UserError(f"{path} holds no adapter: {FIX}")
    return tree, alpha


def _read_factor(path, tensor, shape):
    """Returns a factor in our order of dimensions, float32. shape: which it must have in our order."""
    *window, inputs, outputs = shape
    if tensor.shape != (outputs, inputs, *window) or not outputs:
        raise UserError(
            f"{path}: tensor {tensor.name} has shape {tensor.shape}, but this network needs "
            f"{(outputs, inputs, *window)}: give adapters of this network"
        )
    x = np.asarray(tensor[:], np.float32)
    if not np.isfinite(x).all():
        raise UserError(f"{path}: tensor {tensor.name} has numbers that are not finite: {FIX}")
    return np.ascontiguousarray(np.moveaxis(x, (1, 0), (-2, -1)))


def _read_alpha(path):
    config = storage.read_json(path, FIX, sealed=False)
    for key, plain in PLAIN.items():
        value = config.get(key)
        if value not in plain if plain and key in config else value and not plain:
            raise UserError(f"{path}: {key}={str(value)[:100]} is not supported: {FIX}")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError(f"{path}: lora_alpha={str(alpha)[:100]} is no number: {FIX}")
    return float(alpha)
