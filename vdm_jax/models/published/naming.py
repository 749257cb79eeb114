"""How a module in this folder is made from a config.json, and how its parameters correspond to the original's tensors.

A module here has the settings of the original class, and its parts have the names of the original's parts. So the name
of a tensor is the path of our parameter, with dots. Only the last part and the order of dimensions differ:

    ours                                   original
    kernel     [*window, inputs, outputs]  weight  [outputs, inputs, *window]
    scale      [C]                         weight  [C]
    embedding  [vocabulary, C]             weight  [vocabulary, C]
    weight_v   [*window, inputs, outputs]  weight_v  [outputs, inputs, *window], of weight normalization
    any other                              the same

A module has a method `example()`, which returns small inputs of its `__call__`, made by jax.numpy. It may have a method
`from_older(tensors)`, which returns the tensors of an older file under today's names and in today's shapes.
"""

import dataclasses
import functools
import re
import types

import flax.linen as nn
import jax
import numpy as np

from vdm_jax import sharding
from vdm_jax.errors import UserError
from vdm_jax.models import layers

_WEIGHTS = ("kernel", "scale", "embedding")  # the names that the original calls `weight`
_KERNELS = ("kernel", "weight_v")  # their dimensions have another order
_UNUSED = r"(^|\.)position_ids$"  # numbers from 0 on, which old files carry


def from_config(module, config, source="config.json", **settings):
    """Returns module(...) with the settings of a config.json. Raises UserError for a value of another type.

    config: keys that the module does not have are ignored; a missing key has the module's default
    source: where the settings are from, for messages
    settings: further settings of the module, such as dtype
    """
    ours = {field.name for field in dataclasses.fields(layers.Layer)}  # a file's dtype is that of its tensors
    values = {}
    for field in dataclasses.fields(module):
        if field.name not in config or field.name in ours:
            continue
        values[field.name] = value = _as_tuple(config[field.name])
        if not _is_of(value, field.type):
            raise UserError(
                f"{source}: {field.name}={str(value)[:40]} is no value for {module.__name__}, which takes "
                f"{getattr(field.type, '__name__', field.type)}: give the config of the weights"
            )
    return module(**{**values, **settings})


def _as_tuple(value, depth=8):  # no setting has so many lists in each other
    return tuple(_as_tuple(each, depth - 1) for each in value) if depth and isinstance(value, list) else value


def _is_of(value, kind):
    """Returns whether a value has a type such as int, float | None or tuple[int, ...]. An int is a float, too."""
    if isinstance(kind, types.UnionType):
        return any(_is_of(value, each) for each in kind.__args__)
    if isinstance(kind, types.GenericAlias):
        return isinstance(value, kind.__origin__) and all(_is_of(each, kind.__args__[0]) for each in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def supports(model, **known):
    """Raises UserError where a setting of a module is none of its `known` values, {setting: tuple of values}."""
    for name, values in known.items():
        value = getattr(model, name)
        if value not in values:
            raise UserError(
                f"{type(model).__name__} with {name}={value!r} is not supported, only with "
                f"{' or '.join(map(repr, values))}: use weights with another config"
            )


def param_shapes(model, most=None, source="config.json", dtype=np.float32):
    """Returns the parameters of a module as a tree of ShapeDtypeStructs; nothing is allocated.

    most: number of tensors of the weights. None: no limit.
    source: where the settings are from, for messages
    dtype: of kernels and embeddings; any other parameter is float32

    Raises UserError for settings without sense, and for a module that has many more layers than `most`, before it is
    traced to its end: a config.json may ask for any number.
    """
    try:
        shapes = _param_shapes(model, most)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # numbers without sense
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{source}: {type(model).__name__} cannot have these settings ({reason[0]}): give the config of the weights"
        ) from error
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.update(dtype=dtype) if path[-1].key in ("kernel", "embedding") else x, shapes
    )


@functools.lru_cache(maxsize=8)  # a large model takes seconds
def _param_shapes(model, most):
    paths = set()

    def count(call, arguments, keywords, context):
        if context.module.scope is not None:
            paths.add(context.module.path)
        # A layer has at least one tensor. Some modules only hold layers.
        if most is not None and len(paths) > 2 * most + 100:
            raise UserError(f"{type(model).__name__} has more layers in its config than in its {most} tensors")
        return call(*arguments, **keywords)

    with nn.intercept_methods(count):
        return jax.eval_shape(lambda key: model.init(key, *model.example()), jax.random.key(0))["params"]


def tensor_name(path):
    """Returns the original's name of the parameter at a path of jax.tree_util."""
    *parts, leaf = (key.key for key in path)
    return ".".join([*parts, "weight" if leaf in _WEIGHTS else leaf])


def tensor_shapes(model):
    """Returns {name: shape} of the tensors of the original."""
    return _of_original(param_shapes(model))


def _of_original(shapes):
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {tensor_name(path): _to_original_order(path, leaf.shape) for path, leaf in leaves}


def to_tensors(params):
    """Returns {name: array} of the original from a tree of parameters."""
    tensors = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        x = np.asarray(x)
        x = np.moveaxis(x, (-2, -1), (1, 0)) if path[-1].key in _KERNELS else x
        tensors[tensor_name(path)] = np.ascontiguousarray(x)
    return tensors


def to_params(tensors, model, mesh=None, source="the weights", dtype=np.float32):
    """Returns the parameters of a module from the tensors of the original.

    tensors: {name: tensor}, where a tensor has a `shape`, and tensor[index] gives an array
    mesh: the parameters are split over it; each process reads only what its devices hold. None: the result has NumPy
        arrays.
    source: where the tensors are from, for messages
    dtype: as in `param_shapes`

    Raises UserError for a missing tensor, an unknown tensor, a wrong shape, or settings without sense.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not re.search(_UNUSED, name)}
    if hasattr(model, "from_older"):
        tensors = model.from_older(tensors)
    what = type(model).__name__
    shapes = param_shapes(model, len(tensors), source, dtype)
    expected = _of_original(shapes)
    for name in expected:
        if name not in tensors:
            raise UserError(f"{source}: tensor {name} is missing: give all tensors of {what} with these settings")
    for name, tensor in tensors.items():
        if name not in expected:
            raise UserError(
                f"{source}: {what} with these settings has no tensor {name}: give the config of the weights"
            )
        if tuple(tensor.shape) != expected[name]:
            raise UserError(
                f"{source}: tensor {name} has shape {tuple(tensor.shape)}, but {what} with these settings needs "
                f"{expected[name]}: give the config of the weights"
            )

    def load(path, leaf, split=None):
        tensor, is_kernel = tensors[tensor_name(path)], path[-1].key in _KERNELS

        def read(index):  # of a part of our parameter
            x = np.asarray(tensor[_to_original_order(path, index)], leaf.dtype)
            return np.ascontiguousarray(np.moveaxis(x, (1, 0), (-2, -1)) if is_kernel else x)

        if split is None:
            return read((slice(None),) * leaf.ndim)
        return jax.make_array_from_callback(leaf.shape, split, read)

    trees = (shapes,) if mesh is None else (shapes, sharding.state_shardings(shapes, mesh))
    return jax.tree_util.tree_map_with_path(load, *trees)


def _to_original_order(path, dimensions):
    """Returns one value for each dimension, in the order of the original."""
    if path[-1].key not in _KERNELS:
        return tuple(dimensions)
    *window, inputs, outputs = dimensions
    return (outputs, inputs, *window)
