"""Compiles a recipe for a TPU slice, on a machine without a TPU: whether it fits, and what limits its speed.

    python -m vdm_jax.dry_run --config=configs/t2v_pod.py --topology=v5p:4x4x4 [--out=plan.json]
        [--part=train|sample|encode] [--stage=denoiser] [--rows=8] [--mfu=0.4] [--try] [--effort=O1]

The program is the same as in training, split over the chips in the same way. libtpu's compiler compiles it and needs no
TPU: pip install "jax[tpu]". --topology=v5e:4x4,v5e:8x8 compares two slices. The exit code is 3 if the program does not
fit on a slice; the command then prints changes of the config that should make it fit, and --try compiles them.
--part is one optimizer step of --stage, the sampler on --rows prompts, or the encoders on --rows clips and captions.
Use jaxlib 0.8 or newer: jaxlib 0.7 needs more than 20 GB of this machine's memory, even for a tiny program that is
split over chips.

model_flops_per_chip     matrix products and convolutions of the model, counted from shapes (perf/flops.py)
executed_flops_per_chip  matrix products and convolutions of the compiled program (perf/hlo.py)
model_share              model_flops_per_chip over executed_flops_per_chip; small if a program computes something twice
hbm_bytes_per_chip       arguments, temporaries, code, and results that do not replace an argument
collectives              how often the chips exchange data, by kind; collective_bytes_per_chip is what a chip receives
unasked_collectives      permutes and all-to-alls, if the mesh splits neither `sequence` nor `tensor`: should be 0
roofline_seconds         a lower bound of the time of a step: the sum over operations of FLOPs over peak FLOP/s, or of
                         bytes over memory bandwidth if that takes longer; or the sum over collectives of received
                         bytes over the links' bandwidth, if that sum is larger
roofline_shares          shares of compute, memory and network in roofline_seconds
bound_by                 the largest share: compute, memory or network
days, chip_hours         the training of --stage, if it reaches --mfu of the peak FLOP/s
"""

import collections
import json
import logging
import math
import os
import re
import time
from typing import NamedTuple

import jax
from absl import flags
from jax.experimental import topologies

from vdm_jax import sharding
from vdm_jax.errors import UserError
from vdm_jax.models.ops import backend
from vdm_jax.perf import flops, hlo, programs, table
from vdm_jax.run import cli, storage
from vdm_jax.system import build
from vdm_jax.system.layout import STAGES
from vdm_jax.system.sampling import BATCH, Sampler

logger = logging.getLogger("vdm_jax")


class Chip(NamedTuple):
    """Memory and links of a chip, from Google's page on its version. Its peak FLOP/s are in perf/flops.py."""

    hbm: float  # bytes of memory
    bandwidth: float  # bytes/s of the memory
    links: float  # bytes/s that a chip receives from other chips, over all its links together


CHIPS = {  # by `device_kind`
    "TPU v4": Chip(32 * table.GIB, 1228e9, 300e9),
    "TPU v5 lite": Chip(16 * table.GIB, 819e9, 200e9),
    "TPU v5": Chip(95 * table.GIB, 2765e9, 600e9),  # v5p
    "TPU v6 lite": Chip(32 * table.GIB, 1640e9, 448e9),
}
ENVIRONMENT = {  # of libtpu, for a machine without a TPU
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile, because nothing runs on a TPU
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu does not ask a metadata server for the type of this machine
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def main(argv):
    options = flags.FLAGS
    config = options.config
    cli.only_options(argv)
    if config is None or not options.topology:
        raise UserError("give both --config=FILE and --topology=NAME, e.g. --topology=v5e:4x4")
    if math.isnan(options.mfu):  # the bounds of a flag let it through
        raise UserError("--mfu=nan must be a number from 0.01 to 1")
    jax.config.update("jax_platforms", "cpu")  # this process does not use a TPU that this machine may have
    if options.effort != "default":
        jax.config.update("jax_optimization_level", options.effort)
    cli.use_cache(config)
    system = build(config)
    out = storage.given(options.out) if options.out else None
    if out:
        storage.make_folder(out.parent)
    slices = {name: slice_devices(name) for name in options.topology.split(",")}
    for devices in slices.values():
        mesh = sharding.make_mesh(config.mesh, devices)
        system.check_mesh(mesh, [options.stage])
        if options.part == "train":
            system.check_batch(mesh, options.stage)
        else:
            sharding.check_batch(options.rows, mesh)

    results = []
    for name, devices in slices.items():
        result = plan(system, options, name, devices)
        if options["try"].value and not result["fits"]:
            try_suggestions(result, config, options, name, devices)
        results.append(result)
        if out:  # written after each slice, because a compilation may take long
            storage.replace(out, json.dumps(results if len(slices) > 1 else result, indent=1) + "\n")
    table.show(results)
    if not all(result["fits"] for result in results):
        raise SystemExit(3)


def slice_devices(name):
    """Returns the devices of a topology, such as v5e:4x4. Raises UserError for an unknown topology."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    sides = [int(n) for n in re.findall(r"\d+", name.partition(":")[2])]
    # By default a host has 2 x 2 chips. A slice of fewer chips needs a smaller host.
    small = sides and 0 < math.prod(sides) < 4
    host = {"chips_per_host_bounds": [*sides, 1][:3]} if small else {}
    if name.strip().startswith("v4:"):
        host["chip_config_name"] = "megacore"  # the two cores of a chip are one device, as on a TPU VM
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name.strip(), **host).devices
    except Exception as error:  # its type depends on the version of JAX
        reason = str(error)
        missing = isinstance(error, AttributeError | FileNotFoundError | ModuleNotFoundError | TypeError)
        if missing or "TPU support not installed" in reason:
            raise UserError("the TPU compiler is missing: pip install -e '.[tpu]'") from None
        raise UserError(f"--topology={name}: {reason}; name one such as v5e:4x4, v5p:4x4x4 or v6e:8x8") from None
    if devices[0].device_kind not in CHIPS:
        raise UserError(f"--topology={name}: {devices[0].device_kind} is unknown; known: {', '.join(CHIPS)}")
    return devices


def plan(system, options, topology, devices):
    """Returns the figures of one topology, as they are written to --out."""
    mesh = sharding.make_mesh(system.config.mesh, devices)
    chips, train = len(devices), options.part == "train"
    with backend("tpu"):
        if train:
            program = programs.train_step(system, options.stage, mesh)
        elif options.part == "sample":
            program = programs.sampling(system, Sampler(system), mesh, options.rows)
        else:
            program = programs.encoding(system, mesh, options.rows)
        work = program.count_flops()
        result = {
            "topology": topology,
            "part": f"train {options.stage}" if train else options.part,
            "chips": chips,
            "mesh": {axis: n for axis, n in mesh.shape.items() if n > 1},
            "params": program.params,
            "batch_per_chip": program.rows / chips,
            "model_flops_per_chip": work / chips,
            "argument_bytes": sum(
                math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                for x in jax.tree.leaves(program.arguments)
            ),
            "hbm_capacity_bytes": CHIPS[devices[0].device_kind].hbm,
        }
        if train:
            steps = system.config[options.stage].steps
            days = steps * work / chips / (flops.peak(devices[0]) * options.mfu) / 86400
            result |= {"mfu_assumed": options.mfu, "days": days, "chip_hours": 24 * days * chips}
        logger.info("%s: compiling", topology)
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            lowered = program.lower(*program.arguments)
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                compiled = None
                result |= read_refusal(str(error), result["argument_bytes"])
        result |= {"fits": compiled is not None, "compile_seconds": time.perf_counter() - began}
    if compiled:
        return result | figures(compiled, work / chips, devices[0], mesh)
    return result | {"suggestions": suggestions(system, options.stage, result) if train else []}


def figures(compiled, model_flops, device, mesh):
    """Returns the figures of a compiled program on one chip. model_flops: of the model on one chip."""
    chip = CHIPS[device.device_kind]
    received = collections.Counter()  # {kind of collective: bytes}
    number = collections.Counter()  # {kind of collective: how often it runs}
    seconds = collections.Counter(compute=0.0, memory=0.0)
    executed = 0
    for operation in hlo.operations(compiled.as_text()):
        compute = operation.times * operation.flops / flops.peak(device)
        memory = operation.times * operation.bytes / chip.bandwidth
        seconds["compute" if compute >= memory else "memory"] += max(compute, memory)
        executed += operation.times * operation.flops
        for kind, size in operation.collectives.items():
            received[kind] += operation.times * size
            number[kind] += operation.times
    network = sum(received.values()) / chip.links
    bound = max(network, sum(seconds.values())) or 1.0
    shares = {name: s / bound for name, s in {**seconds, "network": network}.items()}
    splits_activations = mesh.shape["sequence"] * mesh.shape["tensor"] > 1
    need = compiled.memory_analysis()
    held = need.argument_size_in_bytes + need.temp_size_in_bytes + need.generated_code_size_in_bytes
    return {
        "executed_flops_per_chip": executed,
        "model_share": model_flops / executed if executed else None,
        "argument_bytes": need.argument_size_in_bytes,
        "temporary_bytes": need.temp_size_in_bytes,
        "hbm_bytes_per_chip": held + need.output_size_in_bytes - need.alias_size_in_bytes,
        "collective_bytes_per_chip": dict(received),
        "collectives": dict(number),
        "unasked_collectives": 0 if splits_activations else number["collective-permute"] + number["all-to-all"],
        "roofline_seconds": bound,
        "roofline_shares": shares,
        "bound_by": max(shares, key=shares.get),
    }


def read_refusal(error, argument_bytes):
    """Returns the memory that a program needs and has, from the compiler's error message.

    argument_bytes: of the program on one chip; one form of the message counts temporaries only.
    Raises RuntimeError for a message about anything but memory.
    """
    if "RESOURCE_EXHAUSTED" not in error and "Ran out of memory" not in error:
        raise RuntimeError(error)
    amount = r"([\d.]+)([KMGT]?)"
    total = re.search(rf"Used {amount} of {amount} hbm", error)
    found = total or re.search(rf"temporaries \({amount}\) exceeds available HBM \({amount}\)", error)
    if not found:
        logger.info("the compiler's message: %s", error[:1000])
        return {"hbm_bytes_per_chip": None, "too_much_bytes": None}
    units = {"": 1, "K": 2**10, "M": 2**20, "G": table.GIB, "T": 2**40}
    used = float(found[1]) * units[found[2]] + (0 if total else argument_bytes)
    capacity = float(found[3]) * units[found[4]]
    return {"hbm_bytes_per_chip": used, "hbm_capacity_bytes": capacity, "too_much_bytes": used - capacity}


def suggestions(system, name, result):
    """Returns changes of the config that should make the train step of stage `name` fit, the best guess first.

    A change is {'change': flags of the command line, 'keys': {config key: value}}. result: the figures of `plan`.
    """
    settings, group = system.config[name], system.stages[name].clips_per_negative
    fsdp = result["mesh"].get("fsdp", 1)
    batch_shards = result["mesh"].get("data", 1) * fsdp
    rows = settings.batch_size // batch_shards  # on one chip
    used, held = result["hbm_bytes_per_chip"], result["argument_bytes"]
    room = 0.9 * result["hbm_capacity_bytes"]
    changes = []
    if used and held < room:
        # Temporaries shrink with the number of clips at once. Gradients of the parts are added up in float32.
        temporaries = used - held
        gradients = 4 * result["params"] / fsdp
        for parts in range(settings.accumulate + 1, rows + 1):
            divides = rows % (parts * group) == 0
            if divides and held + gradients + temporaries * settings.accumulate / parts <= room:
                changes.append({f"{name}.accumulate": parts})
                break
        fewer_rows = int(rows * (room - held) / temporaries)
        fewer_rows -= fewer_rows % (settings.accumulate * group)
        if fewer_rows:
            changes.append({f"{name}.batch_size": fewer_rows * batch_shards})
    if settings.remat != "blocks":
        changes.append({f"{name}.remat": "blocks"})
    other_chips = result["chips"] // batch_shards  # along the axes `sequence` and `tensor`
    data = result["chips"] // (2 * fsdp) // other_chips
    if result["chips"] % (2 * fsdp) == 0 and held > 0.25 * room and data >= 1:
        changes.append({"mesh.data": data, "mesh.fsdp": 2 * fsdp})
    return [{"change": " ".join(f"--config.{k}={v}" for k, v in keys.items()), "keys": keys} for keys in changes]


def try_suggestions(result, config, options, topology, devices):
    """Compiles with one suggestion after the other until one fits, and adds the outcome to each suggestion."""
    for suggestion in result["suggestions"]:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(suggestion["keys"])
        logger.info("%s: trying %s", topology, suggestion["change"])
        outcome = plan(build(changed), options, topology, devices)
        suggestion |= {"fits": outcome["fits"], "hbm_bytes_per_chip": outcome["hbm_bytes_per_chip"]}
        if outcome["fits"]:
            return


def define_flags():
    cli.define_config()
    flags.DEFINE_string("topology", None, "TPU slice, such as v5e:4x4; or several slices, with commas between them.")
    flags.DEFINE_enum("part", "train", ("train", "sample", "encode"), "Program to compile.")
    flags.DEFINE_enum("stage", "denoiser", STAGES, "Stage, with --part=train.")
    flags.DEFINE_integer("rows", BATCH, "Number of prompts or clips, with --part=sample and --part=encode.", 1, 2**24)
    flags.DEFINE_float("mfu", 0.4, "Assumed share of the peak FLOP/s.", lower_bound=0.01, upper_bound=1)
    flags.DEFINE_bool("try", False, "Compile the suggested changes of a program that does not fit, until one fits.")
    flags.DEFINE_enum("effort", "O1", ("default", "O0", "O1", "O2", "O3"), "Optimization level of the compiler.")
    flags.DEFINE_string("out", None, "JSON file to write.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
