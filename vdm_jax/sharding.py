"""How arrays are split over devices: the mesh, the table of parameters, the constraints on activations.

A mesh arranges the devices in a grid with four axes. The axes differ in what they cut:

    data        the batch. Each device holds all parameters.
    fsdp        the batch and the parameters. A device gathers the parameters of a layer just before it uses them.
    sequence    the frames of a clip, or their height, when one clip is too large for a device.
    tensor      attention heads and MLP channels, when one layer is too large for a device.

With data=2 and fsdp=4 each device computes an eighth of the clips. XLA adds the communication.

ACTIVATION_AXES has the mesh axes for each dimension of a video or a sound. PARAMETER_RULES maps a regular expression
over a parameter's path, such as 'text/out/kernel', to the mesh axes of its last dimensions. The optimizer's moments and
the EMA have the same paths and the same rules.
"""

import math
import re

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vdm_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

BATCH = ("data", "fsdp")  # the axes that cut the batch

# Number of dimensions -> the mesh axes that may cut each one. An axis cuts the first dimension that it divides, so
# `sequence` cuts time where it divides the number of frames, and height elsewhere.
ACTIVATION_AXES = {
    5: (BATCH, ("sequence",), ("sequence",), (), ()),  # video [B, T, H, W, C]
    3: (BATCH, ("sequence",), ()),  # sound [B, N, C]
}

# The smallest part along `sequence` that one device may hold. XLA computes a split convolution wrongly when a part is
# not larger than the border that it needs from its neighbors.
MIN_SHARD = 2

# The first rule that matches counts. Its axes belong to the last dimensions; earlier dimensions are not cut.
PARAMETER_RULES = (
    (r"/(query|key|value)/kernel$", ("fsdp", "tensor", None)),  # [C, heads, d]
    (r"/out/kernel$", ("tensor", None, "fsdp")),  # [heads, d, C]
    (r"/expand_\d+/kernel$", ("fsdp", "tensor")),  # [C, 4 C]
    (r"/contract_\d+/kernel$", ("tensor", "fsdp")),  # [4 C, C]
    (r"/(kernel|weight_v)$", (None, "fsdp")),  # [..., input, output]
    (r"/embedding$", (None, "fsdp")),  # [vocabulary, C]
    (r".*", ()),
)


def make_mesh(sizes, devices=None):
    """Returns a mesh of all devices, or of `devices`, for {axis: size}; see `mesh_shape`. Raises UserError."""
    devices = find_devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    # Allows an axis that is only a part of one side of a TPU slice, such as 16 devices in a slice of 8 x 8.
    grid = mesh_utils.create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def find_devices():
    """Returns all devices of all processes. Raises UserError if those that JAX_PLATFORMS names are absent or busy."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that the package for CUDA is installed
        reason = " ".join(str(error).partition(" (set JAX_PLATFORMS")[0].split()) or "its package is not installed"
        raise UserError(
            f"JAX_PLATFORMS={jax.config.jax_platforms or ''}: no device is ready to use ({reason}): free it, or set "
            f"JAX_PLATFORMS=cpu for the processor, or JAX_PLATFORMS= for what JAX finds"
        ) from None


def _current_mesh():
    """Returns the current mesh; None where there is none, or where it has a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def mesh_shape(sizes, count):
    """Returns {axis: size} for `count` devices. One of `sizes` may be -1: it becomes what fills the devices.

    Raises UserError when the sizes do not fill the devices.
    """
    shape = [sizes[axis] for axis in MESH_AXES]
    fixed = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and fixed > 0:
        shape[shape.index(-1)] = count // fixed
    if min(shape) < 1 or math.prod(shape) != count:
        given = ", ".join(f"{a}={sizes[a]}" for a in MESH_AXES)
        raise UserError(
            f"mesh {given} does not fill {count} device(s): the sizes must multiply to {count}, "
            f"each one of {_divisors(count)}, and at most one may be -1"
        )
    return dict(zip(MESH_AXES, shape))


def _divisors(*sizes):
    """Returns the divisors of any of `sizes`, listed as '1, 2 or 4'."""
    found = [str(i) for i in range(1, max(sizes) + 1) if any(n % i == 0 for n in sizes)]
    return " or ".join(filter(None, [", ".join(found[:-1]), found[-1]]))


def constrain(x):
    """Returns a video [B, T, H, W, C] or a sound [B, N, C], split over the current mesh; x itself without a mesh."""
    mesh = _current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, activation_spec(x.shape, mesh.shape))


def split(axis):
    """Returns whether the current mesh has more than one device along an axis."""
    mesh = _current_mesh()
    return mesh is not None and mesh.shape[axis] > 1


def shard_map_batch(f, x, *shared):
    """Returns f(x, *shared). Each device calls f with its own rows of x [B, ...], and with all of `shared`.

    So f may merge the batch dimension with others, which XLA could not split by itself.
    """
    mesh = _current_mesh()
    axes = None if mesh is None else _dividing(BATCH, x.shape[0], mesh.shape)
    if axes is None:
        return f(x, *shared)
    specs = (P(axes), *(P() for _ in shared))
    return jax.shard_map(f, in_specs=specs, out_specs=P(axes), axis_names=set(axes))(x, *shared)


def activation_spec(shape, mesh_shape):
    """Returns the PartitionSpec of a video or a sound with this shape. A mesh axis cuts at most one dimension."""
    spec, used = [], set()
    for size, axes in zip(shape, ACTIVATION_AXES[len(shape)]):
        taken = _dividing([axis for axis in axes if axis not in used], size, mesh_shape)
        spec.append(taken)
        used.update(taken or ())
    return P(*spec)


def _dividing(axes, size, mesh_shape):
    """Returns the first of `axes` that together cut `size` into equal parts that are large enough, or None for none."""
    kept, product = [], 1
    for axis in axes:
        product *= mesh_shape[axis]
        if size % product or size < product * (MIN_SHARD if axis == "sequence" else 1):
            break
        if mesh_shape[axis] > 1:
            kept.append(axis)
    return tuple(kept) or None


def all_gather_params(params, dtype):
    """Returns a layer's parameters, gathered along `fsdp`. On one device it returns `params` itself.

    Kernels and embeddings are cast to `dtype` first, so that bfloat16 sends half the bytes of float32. Without this XLA
    would send activations to the devices that hold the parts of a kernel, which is more traffic.
    """
    mesh = _current_mesh()
    if mesh is None:
        return params

    def gather(path, x):
        name = path_name(path)
        split = parameter_spec(name, x.shape, mesh.shape)
        whole = P(*(None if axes in ("fsdp", ("fsdp",)) else axes for axes in split))
        if re.search(r"/(kernel|embedding)$", name):
            x = x.astype(dtype)
        # The gradient gets both constraints in reverse order, and needs both. From the split one alone XLA would make a
        # product in parts, with permutes between them.
        x = jax.lax.with_sharding_constraint(x, split)
        return jax.lax.with_sharding_constraint(x, whole)

    return jax.tree_util.tree_map_with_path(gather, params)


def path_name(path):
    """Returns a key path of jax.tree_util as 'a/b/c'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree):
    """Returns {'a/b/c': leaf} of a tree."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def parameter_spec(name, shape, mesh_shape):
    """Returns the PartitionSpec of the parameter at path `name`, without axes that do not divide their dimension."""
    _, axes = _rule(name, shape)
    return P(*(_dividing((a,) if a else (), s, mesh_shape) for a, s in zip(axes, shape)))


def _rule(name, shape):
    """Returns (pattern of the rule for a parameter, its mesh axis or None for each dimension)."""
    pattern, axes = next(rule for rule in PARAMETER_RULES if re.search(rule[0], name))
    padded = (None,) * len(shape) + axes
    return pattern, padded[len(padded) - len(shape) :]


def table(params, mesh_shape):
    """Returns a line for each rule of PARAMETER_RULES: its arrays, their axes and the number of their parameters."""
    found = {}
    for name, x in named_leaves(params).items():
        spec = parameter_spec(name, x.shape, mesh_shape)
        kept = " ".join(axis or "-" for axis in spec) or "-"
        found.setdefault((_rule(name, x.shape)[0], kept), []).append(math.prod(x.shape))
    rows = sorted(found.items(), key=lambda row: -sum(row[1]))
    return [f"{len(n):>5} x {kept:<24} {sum(n) / 1e6:>10.3f} M  {rule}" for (rule, kept), n in rows]


def state_shardings(abstract_state, mesh):
    """Returns a NamedSharding for every leaf of a train state: parameters, optimizer and EMA."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, parameter_spec(path_name(path), x.shape, mesh.shape)), abstract_state
    )


def batch_sharding(mesh):
    """Returns the sharding of a batch: its first dimension is cut along data and fsdp."""
    return NamedSharding(mesh, P(BATCH))


def local_rows(batch_sharding, batch_size):
    """Returns the numbers of the rows of a batch that this process holds, ascending."""
    held = batch_sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in held for row in range(*index[0].indices(batch_size))})


def replicated(mesh):
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def replicate(tree):
    """Copies arrays to every device of the current mesh, so that each process can read them."""
    if _current_mesh() is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), tree)


def microbatches(batch, parts):
    """Returns a batch [B, ...] as [parts, B / parts, ...]. Part i holds the rows i, i + parts, i + 2 parts, ...

    So each device has rows of every part, and no row moves to another device.
    """

    def divide(x):
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        return x if _current_mesh() is None else jax.lax.with_sharding_constraint(x, P(None, BATCH))

    return jax.tree.map(divide, batch)


def check_batch(batch_size, mesh, parts=1, group=1, group_key="group"):
    """Raises UserError when the `parts` microbatches of a batch do not divide over the devices.

    group: clips that stay together on a device. A device's share of a microbatch must be a multiple of it.
    group_key: the config key that sets `group`, for the message.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    ways = devices * parts * group
    if batch_size % ways:
        below = batch_size // ways * ways
        sizes = f"{below} or {below + ways}" if below else f"{ways}"
        over = f"{devices} device groups (data x fsdp)"
        over += f" x {parts} parts (accumulate)" if parts > 1 else ""
        over += f" x {group} clips ({group_key})" if group > 1 else ""
        raise UserError(f"batch_size={batch_size} does not divide over {over}: use {sizes}")


def check_axes(mesh, params, stage, sequence_sizes):
    """Raises UserError when `tensor` does not divide parameters, or `sequence` divides none of `sequence_sizes`.

    stage: name of the stage, for the message.
    sequence_sizes: (frames, height) of a video, or (tokens,) of a sound.
    """
    ways = mesh.shape["tensor"]
    cuts = {name: dict(zip(_rule(name, leaf.shape)[1], leaf.shape)) for name, leaf in named_leaves(params).items()}
    sizes = {name: cut["tensor"] for name, cut in cuts.items() if "tensor" in cut}
    if bad := [name for name, size in sizes.items() if size % ways]:
        fits = _divisors(math.gcd(*sizes.values()))
        raise UserError(f"mesh.tensor={ways} does not divide the {sizes[bad[0]]} of {bad[0]}: use {fits}")
    ways = mesh.shape["sequence"]
    if ways > 1 and not any(_dividing(("sequence",), size, mesh.shape) for size in sequence_sizes):
        clips = f"the clips of {stage} {sequence_sizes}"
        fits = _divisors(*sequence_sizes)
        raise UserError(f"mesh.sequence={ways} does not divide time or height of {clips}: use {fits}")
