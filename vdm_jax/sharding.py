"""The one place that knows mesh axes: the mesh, the parameter table, activation constraints.

Parameters carry no metadata. `PARAMETER_RULES` maps a regular expression over a parameter's path to mesh axes,
counted from the last dimension, and serves parameters, optimiser moments and EMA alike, because all three repeat
the same paths. Activations name their dimensions: `constrain(x, "batch", "time", ...)`.
"""

import math
import re

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vdm_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

# Name of an activation dimension -> mesh axes that split it.
ACTIVATION_AXES = {
    "batch": ("data", "fsdp"),
    "time": ("sequence",),
    "height": None,
    "width": None,
    "token": ("sequence",),
    "channel": None,
}

# First match wins; axes are for the trailing dimensions, earlier ones stay whole.
PARAMETER_RULES = (
    (r"/(query|key|value)/kernel$", ("fsdp", "tensor", None)),  # [C, heads, d]
    (r"/out/kernel$", ("tensor", None, "fsdp")),  # [heads, d, C]
    (r"/expand_\d+/kernel$", ("fsdp", "tensor")),  # [C, 4 C]
    (r"/contract_\d+/kernel$", ("tensor", "fsdp")),  # [4 C, C]
    (r"/kernel$", (None, "fsdp")),  # [..., input, output]
    (r"/embedding$", (None, "fsdp")),  # [vocabulary, C]
    (r".*", ()),
)


def make_mesh(sizes):
    """A mesh over all devices. sizes: {axis: size}; one size may be -1 and takes what is left. Raises UserError."""
    devices = jax.device_count()
    shape = [sizes[axis] for axis in MESH_AXES]
    fixed = math.prod(size for size in shape if size != -1)
    sound = all(size > 0 or size == -1 for size in shape)
    if sound and shape.count(-1) == 1 and devices % fixed == 0:
        shape[shape.index(-1)] = devices // fixed
    elif not sound or shape.count(-1) > 0 or fixed != devices:
        asked = ", ".join(f"{a}={sizes[a]}" for a in MESH_AXES)
        raise UserError(
            f"mesh {asked} does not fill {devices} device(s): "
            f"the sizes must multiply to {devices}, and at most one may be -1"
        )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def constrain(x, *names):
    """Constrains activation x [one name a dimension] to the current mesh; the identity when no mesh is set."""
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} names {names} for an array of shape {x.shape}")
    unknown = [n for n in names if n is not None and n not in ACTIVATION_AXES]
    if unknown:
        raise ValueError(f"unknown activation dimension {unknown[0]!r}; known: {', '.join(ACTIVATION_AXES)}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    axes = [ACTIVATION_AXES[n] if n is not None else None for n in names]
    spec = [_dividing(a, size, mesh.shape) for a, size in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, P(*spec))


def _dividing(axes, size, mesh_shape):
    """The leading ones of `axes` whose product divides `size` (a smaller array is left whole on the rest)."""
    kept, product = [], 1
    for axis in axes or ():
        product *= mesh_shape[axis]
        if size % product:
            break
        if mesh_shape[axis] > 1:
            kept.append(axis)
    return tuple(kept) or None


def path_name(path):
    """A key path of jax.tree_util as 'a/b/c'."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def parameter_spec(name, shape, mesh_shape):
    """PartitionSpec of the parameter at path `name`: the first matching rule, less axes that do not divide."""
    axes = next(axes for pattern, axes in PARAMETER_RULES if re.search(pattern, name))
    axes = axes[max(0, len(axes) - len(shape)) :]
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
    return P(*(_dividing((a,) if a else None, s, mesh_shape) for a, s in zip(axes, shape, strict=True)))


def state_shardings(abstract_state, mesh):
    """A NamedSharding for every leaf of a train state (parameters, optimiser, EMA), by path."""

    def one(path, leaf):
        return NamedSharding(mesh, parameter_spec(path_name(path), leaf.shape, dict(mesh.shape)))

    return jax.tree_util.tree_map_with_path(one, abstract_state)


def batch_sharding(mesh):
    """Batches are split over the data and fsdp axes along their first dimension."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh):
    return NamedSharding(mesh, P())


def check_batch(batch_size, mesh):
    """Raises UserError when a global batch does not divide over the mesh's batch axes."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if batch_size % ways:
        below = batch_size // ways * ways
        sizes = f"{below} or {below + ways}" if below else f"{ways}"
        raise UserError(f"batch_size={batch_size} does not divide over {ways} device groups (data x fsdp): use {sizes}")
