"""Reads the text of a compiled XLA program: the FLOPs, bytes and collectives of one device, loops counted as they run.

XLA's own cost analysis counts the body of a loop once. What a custom call (a Pallas kernel) does inside is not seen.
"""

import collections
import math
import re
from typing import NamedTuple

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}  # of others the name tells: f32, s8, u64, f8e4m3fn
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# These move nothing of their own: what they stand for is counted where it is made or read.
SILENT = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "async-update",
)  # fmt: skip

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][\w-]*)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation|called_computations)"
    r"=(\{[^}]*\}|%?[\w.-]+)"
)


class Instruction(NamedTuple):
    name: str
    shape: str  # as written, layout and all
    opcode: str
    operands: tuple[str, ...]  # names; of a parameter its number
    attributes: str
    root: bool


class Operation(NamedTuple):
    """One step of the program on one device, `times` times a run."""

    opcode: str
    name: str
    times: int
    flops: float  # of products and convolutions
    bytes: float  # read from and written to the memory of the device, at least
    collectives: dict  # {kind: bytes that the device receives}


def parse(text):
    """-> ({computation: {instruction name: Instruction}}, name of the entry)."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")) and " = " not in line.split("(")[0]:
            name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            current = computations[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif (found := _INSTRUCTION.match(line)) and current is not None:
            name, rest = found.groups()
            opcode = _OPCODE.search(" " + rest)
            if not opcode:
                continue
            shape, rest = rest[: max(0, opcode.start() - 1)], rest[opcode.end() - 1 :]
            inside, attributes = _closed(rest)
            operands = (inside,) if opcode[1] == "parameter" else tuple(re.findall(r"%([\w.-]+)", inside))
            root = line.lstrip().startswith("ROOT")
            current[name] = Instruction(name, shape, opcode[1], operands, attributes, root)
    return computations, entry


def _closed(rest):
    """Splits what follows an opening bracket at the bracket that closes it."""
    depth = 1
    for i, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return rest[:i], rest[i + 1 :]
    return rest, ""


def arrays(shape):
    """[(type, dimensions, in the device's main memory)] of a shape as written."""
    return [
        (kind, [int(n) for n in dims.split(",") if n], not re.search(r"S\([1-9]", layout))
        for kind, dims, layout in _ARRAY.findall(shape)
    ]


def _bytes(kind, dims):
    width = BYTES.get(kind) or int(re.search(r"\d+", kind)[0]) / 8 if kind != "token" else 0
    return width * math.prod(dims)


def size(shape, everywhere=False):
    """Bytes of a shape in the device's main memory, or in any with everywhere=True."""
    return sum(_bytes(kind, dims) for kind, dims, main in arrays(shape) if main or everywhere)


def operations(text):
    """The Operations of one run of a compiled program, from compiled.as_text()."""
    computations, entry = parse(text)
    found = []

    def walk(name, times):
        body = computations[name]
        for one in body.values():
            called = _called(one)
            if one.opcode == "while":
                trips = re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"?(\d+)', one.attributes)
                for inner in called:
                    walk(inner, times * (int(trips[1]) if trips else 1))
            elif one.opcode in ("call", "conditional"):
                for inner in called:
                    walk(inner, times)
            elif one.opcode not in SILENT and not one.opcode.endswith("-done"):
                inside = [i for c in called for i in _all(computations, c)]
                flops = sum(_flops(i, computations[c]) for c, i in [(name, one), *inside])
                received = collections.Counter()
                for c, i in [(name, one), *inside]:
                    kind = i.opcode.removesuffix("-start")
                    if kind in COLLECTIVES:
                        if "all-reduce-scatter" in c:  # how a TPU program writes one
                            kind = "reduce-scatter"
                        received[kind] += _received(kind, i, computations[c])
                moved = 0 if received else _moved(one, body, computations)
                if flops or moved or received:
                    found.append(Operation(one.opcode, one.name, times, flops, moved, dict(received)))

    walk(entry, 1)
    return found


def _called(instruction):
    return [
        c.strip(" {}%")
        for group in _CALLED.findall(instruction.attributes)
        for c in group.split(",")
        if instruction.opcode not in ("reduce", "all-reduce", "reduce-scatter", "scatter", "sort", "reduce-window")
    ]


def _all(computations, name):
    """(computation, instruction) of a fusion's body, and of what that calls."""
    for one in computations[name].values():
        yield name, one
        for inner in _called(one):
            yield from _all(computations, inner)


def _moved(one, body, computations):
    """Bytes an instruction reads and writes in main memory; of what a fusion only reads a slice of, the slice."""
    written = size(one.shape)
    if one.opcode in ("copy-start", "slice-start"):  # the shape names source, target and a flag
        return written / 2
    inner = computations[_called(one)[0]] if one.opcode == "fusion" and _called(one) else {}
    slices = ("dynamic-slice", "slice", "gather")
    parameters = {}
    for name, i in inner.items():
        if i.opcode == "parameter":
            parameters[int(i.operands[0])] = [j for j in inner.values() if name in j.operands]
    for i in inner.values():
        if i.root and i.opcode == "dynamic-update-slice":  # written in place
            update = inner.get(i.operands[1])
            written = 2 * size(update.shape) if update and size(update.shape) < written else written
    read = 0
    for place, operand in enumerate(one.operands):
        if operand not in body:
            continue
        whole = size(body[operand].shape)
        users = parameters.get(place, [])
        if one.opcode in slices:
            whole = min(whole, size(one.shape))
        if users and all(u.opcode in slices for u in users):
            whole = min(whole, sum(size(u.shape, everywhere=True) for u in users))
        if users and all(u.root and u.opcode == "dynamic-update-slice" for u in users):
            whole = 0
        read += whole
    return read + written


def _received(kind, one, body):
    """Bytes that one device receives in a collective, at least; see the factors of a ring (arXiv:1802.05799)."""
    inputs = sum(size(body[o].shape, everywhere=True) for o in one.operands if o in body)
    group = group_size(one.attributes)
    share = (group - 1) / group
    if kind == "all-gather":
        return inputs * (group - 1)
    if kind == "all-reduce":
        return 2 * share * inputs
    if kind in ("reduce-scatter", "all-to-all"):
        return share * inputs
    return inputs


def group_size(attributes):
    """How many devices take part in one group of a collective."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return 2  # as a permute has


def _flops(one, body):
    """2 * multiply-adds of a product or convolution, those with padding left out."""
    if one.opcode not in ("dot", "convolution") or one.operands[0] not in body or one.operands[1] not in body:
        return 0
    left, right, out = (arrays(s)[0][1] for s in (body[one.operands[0]].shape, body[one.operands[1]].shape, one.shape))
    if one.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)[1]
        return 2 * math.prod(out) * math.prod(left[int(i)] for i in contracted.split(",") if i)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    fields = dict(f.split("=") for f in window[1].split(" ")) if window else {}
    spatial = [c for c in labels[1] if c.isdigit()]

    def per_dimension(name, default):
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    valid = 1
    settings = [per_dimension(n, d) for n, d in (("size", "1"), ("stride", "1"), ("pad", "0_0"))]
    settings += [per_dimension(n, "1") for n in ("lhs_dilate", "rhs_dilate")]
    for label, k, stride, pad, spread, gap in zip(spatial, *settings):
        n, m, low = left[labels[1].index(label)], out[labels[3].index(label)], int(pad.split("_")[0])
        k, stride, spread, gap = int(k), int(stride), int(spread), int(gap)
        valid *= sum(_meets(j * gap - low, m, stride, n, spread) for j in range(k))
    groups = {n: int(v) for n, v in re.findall(r"(feature|batch)_group_count=(\d+)", one.attributes)}
    batch = left[labels[1].index("b")] // groups.get("batch", 1)
    features = left[labels[1].index("f")] // groups.get("feature", 1)
    return 2 * batch * features * right[labels[2].index("o")] * valid


def _meets(first, outputs, stride, inputs, spread):
    """How many output positions meet an input at one tap: indices first + i * stride that are 0, spread, ..."""
    places = (first + i * stride for i in range(outputs))
    return sum(0 <= p < (inputs - 1) * spread + 1 and p % spread == 0 for p in places)
