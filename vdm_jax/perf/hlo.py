"""Reads the text of a compiled XLA program: FLOPs, bytes and collectives of one device.

XLA's own cost analysis counts the body of a loop once. This module counts the body once for each iteration. It does not
see the work inside a custom call, such as a Pallas kernel.
"""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

import numpy as np

SLICES = ("dynamic-slice", "slice", "gather")
# These move no bytes themselves. Their arrays count in the instructions that write or read the arrays.
SILENT = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "async-update",
)  # fmt: skip
# Bytes that a device receives for each byte that it puts in, in a group of n devices. The algorithms are the ones that
# send as few bytes as possible, such as a ring (arXiv:1802.05799).
COLLECTIVES = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}
WINDOW = {"size": 1, "stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}  # of a convolution, with the defaults

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r", (?:calls|to_apply|body|condition|[a-z]+_computations?)=(\{[^}]*\}|[^,]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(eq=False, repr=False)
class Instruction:
    """One line of the program's text."""

    name: str
    computation: str  # name of the computation that it belongs to
    shape: str  # as written, with its layout
    opcode: str
    attributes: str  # everything after the opcode
    operands: list  # of Instructions
    called: list  # of computations; a computation is a list of Instructions, its result last


class Operation(NamedTuple):
    """One operation of the program on one device."""

    name: str
    times: int  # how often it runs
    flops: float  # of matrix products and convolutions, each time
    bytes: float  # read from and written to the main memory of the device, each time, at least
    collectives: dict  # {kind: bytes that the device receives, at least}, each time


def operations(text):
    """Returns an iterator over the Operations of one run of a compiled program. text: from compiled.as_text()."""
    return _run(_parse(text), 1)


def _parse(text):
    """Returns the entry computation. XLA writes a computation before its callers, and operands before their users."""
    computations = {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation, found = match[1], {}
            body = computations[computation] = []
            if line.startswith("ENTRY"):
                entry = body
        elif match := _INSTRUCTION.match(line):
            name, shape, opcode, attributes = match.groups()
            operands = [found[x] for x in re.findall(r"%([\w.-]+)", attributes.partition(")")[0])]
            called = re.findall(r"%([\w.-]+)", " ".join(_CALLED.findall(attributes)))
            called = [computations[x] for x in called]
            found[name] = Instruction(name, computation, shape, opcode, attributes, operands, called)
            body.append(found[name])
    return entry


def _run(body, times):
    """Yields the Operations of a computation that runs a number of times."""
    for instruction in body:
        opcode = instruction.opcode
        if opcode in ("while", "call", "conditional"):
            trips = re.search(r'known_trip_count":\{"n":"(\d+)', instruction.attributes)
            for called in instruction.called:
                yield from _run(called, times * int(trips[1]) if trips else times)
        elif opcode not in SILENT and not opcode.endswith("-done"):
            parts = list(_parts(instruction))
            flops = sum(_flops(part) for part in parts)
            received = _received(parts)
            moved = 0 if received else _moved_bytes(instruction)
            if flops or moved or received:
                yield Operation(instruction.name, times, flops, moved, received)


def _parts(instruction):
    """Yields an instruction, and every instruction in the computations that it calls."""
    yield instruction
    for body in instruction.called:
        for part in body:
            yield from _parts(part)


def _numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def _size(instruction, everywhere=False):
    """Returns the bytes of the result in main memory, or in any memory of the device with everywhere=True."""
    total = 0
    for kind, dims, layout in _ARRAY.findall(instruction.shape):
        if kind != "token" and (everywhere or not re.search(r"S\([1-9]", layout)):
            bits = 8 if kind == "pred" else _numbers(kind)[0]  # f32, bf16, s8 and c64 name their bits
            total += bits / 8 * math.prod(_numbers(dims))
    return total


def _moved_bytes(instruction):
    """Returns the bytes that an instruction reads and writes in main memory.

    Where a fusion only reads a slice of an operand, the slice counts. A slice that is written in place counts twice.
    """
    written = _size(instruction)
    if instruction.opcode in ("copy-start", "slice-start"):  # the shape holds the source, the target and a flag
        return written / 2
    inner = instruction.called[0] if instruction.opcode == "fusion" else []
    in_place = inner[-1] if inner and inner[-1].opcode == "dynamic-update-slice" else None
    if in_place and _size(in_place.operands[1]) < written:
        written = 2 * _size(in_place.operands[1])
    parameters = {_numbers(part.attributes)[0]: part for part in inner if part.opcode == "parameter"}
    moved = written
    for number, operand in enumerate(instruction.operands):
        read = _size(operand)
        if instruction.opcode in SLICES:
            read = min(read, _size(instruction))
        users = [part for part in inner if parameters[number] in part.operands]
        if users and all(user.opcode in SLICES for user in users):
            read = min(read, sum(_size(user, everywhere=True) for user in users))
        if users != [in_place]:
            moved += read
    return moved


def _received(parts):
    """Returns {kind of collective: bytes that one device receives, at least}."""
    received = collections.Counter()
    for part in parts:
        kind = part.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            if "all-reduce-scatter" in part.computation:  # the name that a TPU program gives to a reduce-scatter
                kind = "reduce-scatter"
            sent = sum(_size(operand, everywhere=True) for operand in part.operands)
            received[kind] += COLLECTIVES[kind](group_size(part.attributes)) * sent
    return dict(received)


def group_size(attributes):
    """Returns the number of devices in one group of a collective. attributes: of its Instruction."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 2  # a permute has pairs of devices and no groups


def _flops(instruction):
    """Returns 2 FLOPs for each multiply-add of a product or a convolution. Multiply-adds with padding do not count."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    attributes = instruction.attributes
    left, right, out = (_numbers(_ARRAY.search(x.shape)[2]) for x in (*instruction.operands[:2], instruction))
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)[1]
        return 2 * math.prod(out) * math.prod(left[i] for i in _numbers(contracted))
    left_labels, right_labels, out_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in window[1].split(" ")) if window else {}
    pairs = 1  # of an output position and a tap of the kernel that reads an input there
    for i, label in enumerate(filter(str.isdigit, left_labels)):
        taps, stride, low, input_dilation, kernel_dilation = (
            int(fields[name].split("x")[i].split("_")[0]) if name in fields else default  # pad is written low_high
            for name, default in WINDOW.items()
        )
        outputs = np.arange(out[out_labels.index(label)])[:, None]
        places = outputs * stride + np.arange(taps) * kernel_dilation - low  # [outputs, taps]
        last = (left[left_labels.index(label)] - 1) * input_dilation
        pairs *= int(np.sum((places >= 0) & (places <= last) & (places % input_dilation == 0)))
    groups = {name: int(n) for name, n in re.findall(r"(feature|batch)_group_count=(\d+)", attributes)}
    batch = left[left_labels.index("b")] // groups.get("batch", 1)
    features = left[left_labels.index("f")] // groups.get("feature", 1)
    return 2 * batch * features * right[right_labels.index("o")] * pairs
