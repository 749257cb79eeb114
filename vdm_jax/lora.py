"""Adapters of low rank (LoRA, arXiv:2106.09685): a few parameters that are trained instead of all.

An adapter changes one kernel of a trained network, its base. It has two factors, A and B:

    kernel + alpha / rank * A @ B

In a tree of adapters, `x/lora_A/kernel` and `x/lora_B/kernel` belong to the parameter `x/kernel`:

    kernel                                A                          B
    [*window, inputs, outputs]            [*window, inputs, rank]    [1, ..., 1, rank, outputs]
    [C, heads, d], of queries             [C, rank]                  [rank, heads * d]
    [heads, d, C], of attention's output  [heads * d, rank]          [rank, C]

So A and B are layers, as the package `peft` has them: a convolution with the same window, then one of a single pixel.
"""

import difflib
import math
import re

import jax
import jax.numpy as jnp

from vdm_jax import optim
from vdm_jax.errors import UserError
from vdm_jax.sharding import named_leaves, path_name

HEADS = ("query", "key", "value", "out")  # layers whose kernels have the heads of an attention as a dimension


def active(denoiser):
    """Returns denoiser.lora, or None if its rank is 0. Raises UserError if there are layers, but no rank.

    denoiser: config.denoiser, whose `lora` may be missing: weights of an earlier version have no such settings
    """
    settings = denoiser.get("lora")
    if settings and settings.layers and not settings.rank:
        raise UserError(
            f"denoiser.lora.layers={settings.layers!r} get no adapters with denoiser.lora.rank=0: give a rank such as "
            "8, or leave out the layers"
        )
    return settings if settings and settings.rank else None


def without(config):
    """Returns a copy of a config without adapters: the config of merged weights."""
    config = config.copy_and_resolve_references()
    config.denoiser.lora.update(rank=0, layers="", base="")
    return config


def shapes(params, rank, layers):
    """Returns the adapters of parameters as a tree of ShapeDtypeStructs, float32.

    params: a tree of arrays or ShapeDtypeStructs
    layers: a regular expression. The kernels in whose paths it is found get an adapter. "" is found in all.
    Raises UserError if it is no regular expression, or if it is found in no path.
    """
    kernels = {path_name(path): (path, x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    kernels = {name: kernel for name, kernel in kernels.items() if name.endswith("/kernel")}
    try:
        chosen = [kernel for name, kernel in kernels.items() if re.search(layers, name)]
    except re.error as error:
        raise UserError(f"denoiser.lora.layers={layers!r} is no regular expression: {error}") from None
    if not chosen:
        nearest = ", ".join(difflib.get_close_matches(layers, kernels, n=3, cutoff=0.0))
        raise UserError(f"denoiser.lora.layers={layers!r} is found in no path of a kernel; the nearest are {nearest}")
    tree = {}
    for path, kernel in chosen:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key.key, {})
        for factor, shape in zip(("lora_A", "lora_B"), factor_shapes(path, kernel.shape, rank)):
            node[factor] = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return tree


def factor_shapes(path, shape, rank):
    """Returns the shapes of A and B for the kernel at a path of jax.tree_util; see the table at the top."""
    if path[-2].key in HEADS and len(shape) == 3:
        inputs = optim.input_dimensions(path, len(shape))
        return (math.prod(shape[:inputs]), rank), (rank, math.prod(shape[inputs:]))
    return (*shape[:-1], rank), (*[1] * (len(shape) - 2), rank, shape[-1])


def init(key, params, rank, layers):
    """Returns new adapters, which change nothing: A is normal, and B is zero (section 4.1). See `shapes`."""
    abstract = shapes(params, rank, layers)
    keys = iter(jax.random.split(key, len(jax.tree.leaves(abstract))))

    def draw(path, x):
        normal = jax.random.normal(next(keys), x.shape) / math.sqrt(math.prod(x.shape[:-1]))
        return normal if path[-2].key == "lora_A" else jnp.zeros(x.shape)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def merge(params, adapters, alpha):
    """Returns parameters with their adapters merged in (section 4.1). Parameters without an adapter stay as they are.

    params: a tree of arrays
    adapters: a tree of arrays, see the top
    alpha: over rank it is the scale with which the adapters count
    """
    factors = named_leaves(adapters)

    def add(path, x):
        layer = path_name(path[:-1])
        if path[-1].key != "kernel" or f"{layer}/lora_A/kernel" not in factors:
            return x
        a, b = factors[f"{layer}/lora_A/kernel"], factors[f"{layer}/lora_B/kernel"]
        rank = a.shape[-1]
        with jax.default_matmul_precision("highest"):
            product = a.reshape(-1, rank) @ b.reshape(rank, -1)  # [inputs, outputs]
        return x + (alpha / rank) * product.reshape(x.shape)

    return jax.tree_util.tree_map_with_path(add, params)
