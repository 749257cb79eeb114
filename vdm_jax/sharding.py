"""The one place that knows mesh axes: the mesh, the parameter table, activation constraints.

Parameters carry no metadata. `PARAMETER_RULES` maps a regular expression over a parameter's path to mesh axes,
counted from the last dimension, and serves parameters, optimizer moments and EMA alike, because all three repeat
the same paths. Activations name their dimensions: `constrain(x, "batch", "time", ...)`.
"""

import functools
import math
import re

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vdm_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

# Name of an activation dimension -> mesh axes that split it. An axis splits the first dimension that it divides, so
# `sequence` takes time where the frames divide, and height where they do not.
ACTIVATION_AXES = {
    "batch": ("data", "fsdp"),
    "time": ("sequence",),
    "height": ("sequence",),
    "width": None,
    "token": ("sequence",),
    "channel": None,
}

# Least part of a dimension on one device. XLA's partitioner of convolutions computes wrong values where a part is no
# larger than the halo that it needs of its neighbours.
MIN_SHARD = {"time": 2, "height": 2, "token": 2}

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


def make_mesh(sizes, devices=None):
    """A mesh over `devices` (default: all there are).

    sizes: {axis: size}; one size may be -1 and takes what is left. Raises UserError.
    """
    shape = mesh_shape(sizes, jax.device_count() if devices is None else len(devices))
    types = (AxisType.Auto,) * len(MESH_AXES)
    devices = jax.devices() if devices is None else devices
    # An axis may take part of a side of the slice: 16 devices of an 8 x 8 one.
    placed = mesh_utils.create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=types)


def mesh_shape(sizes, count):
    """{axis: size} for `count` devices, from sizes of which one may be -1. Raises UserError."""
    shape = [sizes[axis] for axis in MESH_AXES]
    fixed = math.prod(size for size in shape if size != -1)
    sound = all(size > 0 or size == -1 for size in shape)
    if sound and shape.count(-1) == 1 and count % fixed == 0:
        shape[shape.index(-1)] = count // fixed
    elif not sound or shape.count(-1) > 0 or fixed != count:
        asked = ", ".join(f"{a}={sizes[a]}" for a in MESH_AXES)
        raise UserError(
            f"mesh {asked} does not fill {count} device(s): the sizes must multiply to {count}, "
            f"each one of {_listed(_divisors(count))}, and at most one may be -1"
        )
    return dict(zip(MESH_AXES, shape, strict=True))


def _divisors(n):
    return [i for i in range(1, n + 1) if n % i == 0]


def _listed(sizes):
    return " or ".join(filter(None, [", ".join(map(str, sizes[:-1])), str(sizes[-1])]))


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
    return jax.lax.with_sharding_constraint(x, activation_spec(names, x.shape, mesh.shape))


def split(axis):
    """Whether the current mesh splits anything along an axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape[axis] > 1


def shard_map_batch(f, x, *whole):
    """f(x, *whole), in which each device sees its own rows of x [B, ...] alone and all of the others.

    f may then merge rows with other dimensions, which a partitioner could not follow. Along other axes of the mesh
    arrays are split as they were.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = None if mesh.empty else _dividing(ACTIVATION_AXES["batch"], x.shape[0], mesh.shape)
    if axes is None:
        return f(x, *whole)
    specs = (P(axes), *(P() for _ in whole))
    return jax.shard_map(f, in_specs=specs, out_specs=P(axes), axis_names=set(axes))(x, *whole)


def activation_spec(names, shape, mesh_shape):
    """PartitionSpec of an activation whose dimensions have these names; an axis is used once."""
    spec, free = [], set(MESH_AXES)
    for name, size in zip(names, shape, strict=True):
        axes = ACTIVATION_AXES[name] if name is not None else None
        taken = _dividing([a for a in axes or () if a in free], size, mesh_shape, MIN_SHARD.get(name, 1))
        spec.append(taken)
        free -= set(taken or ())
    return P(*spec)


def _dividing(axes, size, mesh_shape, least=1):
    """The leading ones of `axes` whose product divides `size` into parts of `least` or more; others leave it whole."""
    kept, product = [], 1
    for axis in axes or ():
        product *= mesh_shape[axis]
        if size % product or size < least * product:
            break
        if mesh_shape[axis] > 1:
            kept.append(axis)
    return tuple(kept) or None


def all_gather_params(params, dtype):
    """Parameters as a layer wants them: whole along `fsdp`, kernels and embeddings in `dtype`, before they are used.

    Left to itself XLA moves activations to where the parts of a weight lie, by permutes and all-to-alls. Gradients go
    straight back to the parts. The cast comes first: half the bytes travel. The identity on one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return params

    def one(path, x):
        name = path_name(path)
        split = parameter_spec(name, x.shape, mesh.shape)
        whole = P(*(None if axes in ("fsdp", ("fsdp",)) else axes for axes in split))
        if re.search(r"/(kernel|embedding)$", name):
            x = x.astype(dtype)
        return _gather(x, split, whole)

    return jax.tree_util.tree_map_with_path(one, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, split, whole):
    x = jax.lax.with_sharding_constraint(x, split)
    return jax.lax.with_sharding_constraint(x, whole)


def _gather_backward(split, whole, _, grad):
    # Said of both: from the split form alone XLA makes a product by parts, with permutes between them.
    grad = jax.lax.with_sharding_constraint(grad, whole)
    return (jax.lax.with_sharding_constraint(grad, split),)


_gather.defvjp(lambda x, split, whole: (_gather(x, split, whole), None), _gather_backward)


def path_name(path):
    """A key path of jax.tree_util as 'a/b/c'."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def parameter_spec(name, shape, mesh_shape):
    """PartitionSpec of the parameter at path `name`: the first matching rule, less axes that do not divide."""
    axes = _axes(name, shape)
    return P(*(_dividing((a,) if a else None, s, mesh_shape) for a, s in zip(axes, shape, strict=True)))


def _axes(name, shape):
    """The mesh axis, or None, that PARAMETER_RULES give each dimension of a parameter."""
    axes = _rule(name)[1]
    axes = axes[max(0, len(axes) - len(shape)) :]
    return (None,) * (len(shape) - len(axes)) + tuple(axes)


def _rule(name):
    return next(rule for rule in PARAMETER_RULES if re.search(rule[0], name))


def table(params, mesh_shape):
    """What PARAMETER_RULES come to: a line for each rule and way of splitting, with the numbers it holds."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        split = [a or "-" for a in _axes(name, x.shape)]
        spec = parameter_spec(name, x.shape, mesh_shape)
        kept = " ".join(a if s else "-" for a, s in zip(split, spec)) or "-"
        found.setdefault((_rule(name)[0], kept), []).append(math.prod(x.shape))
    rows = sorted(found.items(), key=lambda row: -sum(row[1]))
    return [f"{len(n):>5} x {kept:<24} {sum(n) / 1e6:>10.3f} M  {rule}" for (rule, kept), n in rows]


def state_shardings(abstract_state, mesh):
    """A NamedSharding for every leaf of a train state (parameters, optimizer, EMA), by path."""

    def one(path, leaf):
        return NamedSharding(mesh, parameter_spec(path_name(path), leaf.shape, dict(mesh.shape)))

    return jax.tree_util.tree_map_with_path(one, abstract_state)


def batch_sharding(mesh):
    """Batches are split over the data and fsdp axes along their first dimension."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def local_rows(batch_sharding, batch_size):
    """Which rows of a global batch the devices of this process hold, in order."""
    held = batch_sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in held for row in range(*index[0].indices(batch_size))})


def replicated(mesh):
    return NamedSharding(mesh, P())


def replicate(tree):
    """Constrains arrays to be whole on every device of the current mesh, so that each process can read them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), tree)


def microbatches(batch, parts):
    """Rows [B, ...] -> [parts, B / parts, ...]: part i is rows i, i + parts, ...: each device keeps its own."""
    mesh = jax.sharding.get_abstract_mesh()

    def one(x):
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        if mesh.empty or mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, P(None, ("data", "fsdp")))

    return jax.tree.map(one, batch)


def check_batch(batch_size, mesh, parts=1, every=1):
    """Raises UserError when a global batch, or each of `parts` of it, does not divide over the mesh's batch axes.

    every: each device's share of a part must hold a multiple of so many (hard_negative.every).
    """
    for name, value in (("batch_size", batch_size), ("accumulate", parts), ("hard_negative.every", every)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    ways = devices * parts * every
    if batch_size % ways:
        below = batch_size // ways * ways
        sizes = f"{below} or {below + ways}" if below else f"{ways}"
        groups = "device groups (data x fsdp)" + (f" x {parts} parts (accumulate)" if parts > 1 else "")
        groups += f" x {every} clips (hard_negative.every)" if every > 1 else ""
        raise UserError(f"batch_size={batch_size} does not divide over {devices} {groups}: use {sizes}")


def check_axes(mesh, params, activations):
    """Raises UserError where `tensor` or `sequence` splits nothing that it should.

    params: tree of shapes. activations: {name: (shape, dimension names)}, each to be split by `sequence`.
    """
    ways = mesh.shape["tensor"]
    sizes = {}  # of the dimensions that `tensor` is to split, by path
    for path, leaf in jax.tree_util.tree_leaves_with_path(params) if ways > 1 else ():
        axes = _axes(path_name(path), leaf.shape)
        if "tensor" in axes:
            sizes[path_name(path)] = leaf.shape[axes.index("tensor")]
    if bad := [name for name, size in sizes.items() if size % ways]:
        fits = _listed(_divisors(math.gcd(*sizes.values())))
        raise UserError(f"mesh.tensor={ways} does not divide the {sizes[bad[0]]} of {bad[0]}: use {fits}")
    ways = mesh.shape["sequence"]
    for name, (shape, names) in activations.items() if ways > 1 else ():
        if "sequence" not in str(activation_spec(names, shape, mesh.shape)):
            mine = [size for n, size in zip(names, shape) if "sequence" in (ACTIVATION_AXES[n] or ())]
            fits = _listed(sorted({d for size in mine for d in _divisors(size)}))
            raise UserError(f"mesh.sequence={ways} does not divide time or height of {name} {shape}: use {fits}")
