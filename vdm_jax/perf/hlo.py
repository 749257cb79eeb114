"""Reads the text of a compiled XLA program: FLOPs, bytes and collectives of one device.

XLA's own cost analysis counts the body of a loop once. This module counts the body once for each iteration. It does not
see the work inside a custom call, such as a Pallas kernel.
"""

import collections
import math
import re
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
SLICES = ("dynamic-slice", "slice", "gather")
# These move no bytes themselves. Their arrays count in the instructions that write or read the arrays.
SILENT = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "async-update",
)  # fmt: skip
# These call a computation for each element. Its work is not counted.
ELEMENTWISE_CALLERS = ("reduce", "all-reduce", "reduce-scatter", "scatter", "sort", "reduce-window")

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][\w-]*)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation|called_computations)"
    r"=(\{[^}]*\}|%?[\w.-]+)"
)


class Instruction(NamedTuple):
    """One line of the program's text."""

    name: str
    shape: str  # as written, with its layout
    opcode: str
    operands: tuple[str, ...]  # names of instructions; of a parameter, its number
    attributes: str  # everything after the operands
    root: bool  # the result of its computation


class Operation(NamedTuple):
    """One operation of the program on one device."""

    opcode: str
    name: str
    times: int  # how often it runs
    flops: float  # of matrix products and convolutions, each time
    bytes: float  # read from and written to the main memory of the device, each time, at least
    collectives: dict  # {kind: bytes that the device receives}, each time


def parse(text):
    """Returns ({computation: {name: Instruction}}, name of the entry computation). text: from compiled.as_text()."""
    computations = {}
    entry = current = None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")) and " = " not in line.split("(")[0]:
            name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            current = computations[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif (match := _INSTRUCTION.match(line)) and current is not None:
            name, rest = match.groups()
            opcode = _OPCODE.search(" " + rest)
            if not opcode:
                continue
            shape, rest = rest[: max(0, opcode.start() - 1)], rest[opcode.end() - 1 :]
            inside, attributes = _split_at_closing_bracket(rest)
            operands = (inside,) if opcode[1] == "parameter" else tuple(re.findall(r"%([\w.-]+)", inside))
            root = line.lstrip().startswith("ROOT")
            current[name] = Instruction(name, shape, opcode[1], operands, attributes, root)
    return computations, entry


def _split_at_closing_bracket(text):
    """Returns (text inside a bracket, text after the bracket). text: begins after the opening bracket."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:i], text[i + 1 :]
    return text, ""


def arrays(shape):
    """Returns [(type, dimensions, whether the array is in main memory)] for a shape as written."""
    return [
        (kind, [int(n) for n in dims.split(",") if n], not re.search(r"S\([1-9]", layout))
        for kind, dims, layout in _ARRAY.findall(shape)
    ]


def _array_bytes(kind, dims):
    if kind == "token":
        return 0
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])  # f32, bf16, s8 and c64 name their bits
    return bits / 8 * math.prod(dims)


def size(shape, everywhere=False):
    """Returns the bytes of a shape as written: in main memory, or in any memory of the device with everywhere=True."""
    return sum(_array_bytes(kind, dims) for kind, dims, main in arrays(shape) if main or everywhere)


def operations(text):
    """Returns the Operations of one run of a compiled program. text: from compiled.as_text()."""
    computations, entry = parse(text)
    result = []

    def walk(name, times):
        body = computations[name]
        for instruction in body.values():
            opcode = instruction.opcode
            called = _called(instruction)
            if opcode == "while":
                trips = re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"?(\d+)', instruction.attributes)
                for inner in called:
                    walk(inner, times * (int(trips[1]) if trips else 1))
            elif opcode in ("call", "conditional"):
                for inner in called:
                    walk(inner, times)
            elif opcode not in SILENT and not opcode.endswith("-done"):
                parts = [(name, instruction)]
                parts += [part for inner in called for part in _walk_computation(computations, inner)]
                flops = sum(_flops(part, computations[computation]) for computation, part in parts)
                received = _received(parts, computations)
                moved = 0 if received else _moved_bytes(instruction, body, computations)
                if flops or moved or received:
                    result.append(Operation(opcode, instruction.name, times, flops, moved, received))

    walk(entry, 1)
    return result


def _called(instruction):
    """Returns the names of the computations that an instruction calls."""
    if instruction.opcode in ELEMENTWISE_CALLERS:
        return []
    groups = _CALLED.findall(instruction.attributes)
    return [name.strip(" {}%") for group in groups for name in group.split(",")]


def _walk_computation(computations, name):
    """Yields (computation, Instruction) for a computation, and for every computation that it calls."""
    for instruction in computations[name].values():
        yield name, instruction
        for inner in _called(instruction):
            yield from _walk_computation(computations, inner)


def _moved_bytes(instruction, body, computations):
    """Returns the bytes that an instruction reads and writes in main memory.

    Where a fusion only reads a slice of an operand, the slice counts. A slice that is written in place counts twice.

    body: the computation of the instruction.
    """
    written = size(instruction.shape)
    if instruction.opcode in ("copy-start", "slice-start"):  # the shape holds the source, the target and a flag
        return written / 2
    called = _called(instruction)
    inner = computations[called[0]] if instruction.opcode == "fusion" and called else {}
    users = {}  # {number of a parameter of the fusion: the instructions that read it}
    for name, part in inner.items():
        if part.opcode == "parameter":
            users[int(part.operands[0])] = [other for other in inner.values() if name in other.operands]
    for part in inner.values():
        if _updates_in_place(part):
            update = inner.get(part.operands[1])
            if update and size(update.shape) < written:
                written = 2 * size(update.shape)
    read = 0
    for number, operand in enumerate(instruction.operands):
        if operand in body:
            whole = size(body[operand].shape)
            read += _read_bytes(whole, users.get(number, []), instruction)
    return read + written


def _updates_in_place(instruction):
    return instruction.root and instruction.opcode == "dynamic-update-slice"


def _read_bytes(whole, users, instruction):
    """Returns the bytes that an instruction reads of one operand.

    whole: bytes of the operand.
    users: the instructions inside a fusion that read the operand; [] for other instructions.
    """
    if instruction.opcode in SLICES:
        whole = min(whole, size(instruction.shape))
    if users and all(user.opcode in SLICES for user in users):
        whole = min(whole, sum(size(user.shape, everywhere=True) for user in users))
    if users and all(_updates_in_place(user) for user in users):
        return 0
    return whole


def _received(parts, computations):
    """Returns {kind of collective: bytes that one device receives, at least}.

    The factors are of algorithms that send as few bytes as possible, such as a ring (arXiv:1802.05799).

    parts: [(computation, Instruction)].
    """
    received = collections.Counter()
    for computation, part in parts:
        kind = part.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            if "all-reduce-scatter" in computation:  # the name that a TPU program gives to a reduce-scatter
                kind = "reduce-scatter"
            received[kind] += _collective_bytes(kind, part, computations[computation])
    return dict(received)


def _collective_bytes(kind, instruction, body):
    """Returns the bytes that one device receives in a collective."""
    inputs = sum(size(body[operand].shape, everywhere=True) for operand in instruction.operands if operand in body)
    group = group_size(instruction.attributes)
    share = (group - 1) / group
    if kind == "all-gather":
        return inputs * (group - 1)
    if kind == "all-reduce":
        return 2 * share * inputs
    if kind in ("reduce-scatter", "all-to-all"):
        return share * inputs
    return inputs


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


def _flops(instruction, body):
    """Returns 2 FLOPs for each multiply-add of a product or a convolution. Multiply-adds with padding do not count."""
    if instruction.opcode not in ("dot", "convolution") or any(name not in body for name in instruction.operands[:2]):
        return 0
    shapes = (*(body[name].shape for name in instruction.operands[:2]), instruction.shape)
    left, right, out = (arrays(shape)[0][1] for shape in shapes)
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
        return 2 * math.prod(out) * math.prod(left[int(i)] for i in contracted.split(",") if i)
    return _convolution_flops(instruction.attributes, left, right, out)


def _convolution_flops(attributes, left, right, out):
    """Returns the FLOPs of a convolution. left, right, out: dimensions of the input, the kernel and the output."""
    left_labels, right_labels, out_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in window[1].split(" ")) if window else {}
    spatial = [label for label in left_labels if label.isdigit()]

    def per_dimension(name, default):
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    pairs = 1  # of an output position and a tap of the kernel that reads an input there
    for label, taps, stride, pad, input_dilation, kernel_dilation in zip(
        spatial,
        per_dimension("size", "1"),
        per_dimension("stride", "1"),
        per_dimension("pad", "0_0"),
        per_dimension("lhs_dilate", "1"),
        per_dimension("rhs_dilate", "1"),
    ):
        inputs = left[left_labels.index(label)]
        outputs = out[out_labels.index(label)]
        low = int(pad.split("_")[0])
        firsts = (tap * int(kernel_dilation) - low for tap in range(int(taps)))
        pairs *= sum(_count_hits(first, int(stride), outputs, inputs, int(input_dilation)) for first in firsts)
    groups = {name: int(n) for name, n in re.findall(r"(feature|batch)_group_count=(\d+)", attributes)}
    batch = left[left_labels.index("b")] // groups.get("batch", 1)
    features = left[left_labels.index("f")] // groups.get("feature", 1)
    return 2 * batch * features * right[right_labels.index("o")] * pairs


def _count_hits(first, stride, outputs, inputs, input_dilation):
    """Returns how many output positions read an input, and not padding, at one tap of the kernel.

    Output i reads place first + i * stride. The inputs are at places 0, input_dilation, 2 * input_dilation, ...
    """
    places = (first + i * stride for i in range(outputs))
    return sum(0 <= p < (inputs - 1) * input_dilation + 1 and p % input_dilation == 0 for p in places)
