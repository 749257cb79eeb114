"""Compiles a recipe for a TPU slice, on a machine without one: does it fit, what travels, what bounds a step.

    python -m vdm_jax.dry_run --config=configs/t2v_pod.py --topology=v5p:4x4x4 [--out=plan.json]
        [--part=train|sample|encode] [--stage=denoiser] [--rows=16] [--mfu=0.4] [--try] [--effort=O1]

The real program, partitioned as in training and compiled by libtpu's compiler, which needs no TPU
(pip install "jax[tpu]"). --topology=v5e:4x4,v5e:8x8 compares. Exit code 3: it does not fit one of them; what would
make it fit is printed, and with --try compiled as well. With jaxlib 0.7 a program that is split over chips may take all
memory of this machine, over 20 GB for a tiny one: use a newer one.

train   one optimizer step of --stage
sample  config.sample's sampler on --rows prompts, decoding included
encode  --rows clips and captions to latents and text states

`model_flops_per_chip` are counted from shapes (flops.py), `executed_flops_per_chip` from the compiled program (hlo.py):
the products of both, so that their ratio tells what is computed twice. `hbm_bytes_per_chip` are arguments, results that
are not written over arguments, temporaries and code. `roofline_seconds` is a bound, not a time: for each operation of
the program the larger of its FLOPs at the peak and its bytes at the memory's bandwidth, all added up; or what the
collectives receive at the links' bandwidth, where that is more. `roofline_shares` say which part each kind of operation
has in it, `bound_by` which is the largest: compute, memory or network. `unasked_collectives` are permutes and
all-to-alls in a program whose mesh splits neither `sequence` nor `tensor`: there should be none.
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
import numpy as np
from absl import flags
from jax.experimental import topologies

from vdm_jax import pipeline as generate
from vdm_jax import sample, sharding, train_state
from vdm_jax.errors import UserError
from vdm_jax.models import ops
from vdm_jax.perf import flops, hlo
from vdm_jax.run import checkpoint, cli, storage
from vdm_jax.system import codec as stages

logger = logging.getLogger("vdm_jax")

GIB = 2**30


class Chip(NamedTuple):
    """What a chip has beside its FLOP/s (flops.PEAK_TFLOPS), as Google's pages on each version state it."""

    hbm: float  # bytes
    bandwidth: float  # bytes/s of that memory
    links: float  # bytes/s that all links to other chips receive together


CHIPS = {  # by `device_kind`
    "TPU v4": Chip(32 * GIB, 1228e9, 300e9),
    "TPU v5 lite": Chip(16 * GIB, 819e9, 200e9),
    "TPU v5": Chip(95 * GIB, 2765e9, 600e9),  # v5p
    "TPU v6 lite": Chip(32 * GIB, 1640e9, 448e9),
}
SHOWN = (
    "chips", "mesh", "params", "fits", "batch_per_chip",
    "model_flops_per_chip", "executed_flops_per_chip", "model_share",
    "hbm_bytes_per_chip", "hbm_capacity_bytes", "argument_bytes", "temporary_bytes", "collective_bytes_per_chip",
    "collectives", "unasked_collectives", "roofline_seconds", "roofline_shares", "bound_by", "compile_seconds",
    "days", "chip_hours", "too_much_bytes", "suggestions",
)  # fmt: skip


def main(argv):
    options = flags.FLAGS
    config = options.config
    cli.only_options(argv)
    if config is None or not options.topology:
        raise UserError("give both --config=FILE and --topology=NAME, e.g. --topology=v5e:4x4")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu={options.mfu} must be above 0 and at most 1")
    # All arrays here are on the host: a TPU that this machine may have is left alone.
    jax.config.update("jax_platforms", "cpu")
    if options.effort != "default" and hasattr(jax.config, "jax_optimization_level"):
        jax.config.update("jax_optimization_level", options.effort)
    cli.use_cache(config)
    stages.models(config)  # what does not fit is told first
    out = storage.given(options.out) if options.out else None
    if out:
        sample.make_folder(out.parent)
    slices = {name: devices(name) for name in options.topology.split(",")}
    for found in slices.values():
        check(config, options.part, options.stage, options.rows, found)

    results = []
    for name, found in slices.items():
        result = plan(config, options, name, found)
        if options["try"].value and not result["fits"]:
            tried(result, config, options, name, found)
        results.append(result)
        if out:  # after each: a compile may take long
            out.write_text(json.dumps(results if len(slices) > 1 else result, indent=1) + "\n")
    show(results)
    if not all(result["fits"] for result in results):
        raise SystemExit(3)


def devices(name):
    """The devices of a topology such as v5e:4x4. Raises UserError."""
    # No server is asked which TPU this is; nothing runs on one, so that several processes may compile.
    told = dict(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-1")
    told |= dict(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
    told |= dict(TPU_LOG_DIR="disabled", TPU_STDERR_LOG_LEVEL="3")
    for key, value in told.items():
        os.environ.setdefault(key, value)
    sides = [int(n) for n in re.findall(r"\d+", name.partition(":")[2])]
    few = sides and 0 < math.prod(sides) < 4  # chips; a host has 2 x 2 unless told
    host = {"chips_per_host_bounds": [*sides, 1][:3]} if few else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name.strip(), **host).devices
    except Exception as error:  # of several kinds, by the version of JAX
        told = str(error)
        if isinstance(error, AttributeError | FileNotFoundError | ModuleNotFoundError | TypeError):
            raise UserError('the TPU compiler is missing: pip install "jax[tpu]"') from None
        raise UserError(f"--topology={name}: {told}; name one such as v5e:4x4, v5p:4x4x4 or v6e:8x8") from None
    if found[0].device_kind not in CHIPS:
        raise UserError(f"--topology={name}: {found[0].device_kind} is unknown; known: {', '.join(CHIPS)}")
    return found


def check(config, part, stage, rows, found):
    """Raises UserError where the config's batch or mesh does not fit the devices."""
    mesh = sharding.make_mesh(config.mesh, found)
    stages.check_mesh(config, mesh, [stage])
    if part == "train":
        stages.check_batch(config, stage, mesh)
    else:
        sharding.check_batch(rows, mesh)


# ---------------------------------------------------------------------------------------------------- one topology


def plan(config, options, topology, found):
    """What main's JSON says of one topology."""
    mesh, chip = sharding.make_mesh(config.mesh, found), CHIPS[found[0].device_kind]
    part, stage = options.part, options.stage
    with ops.backend("tpu"):
        work, lower, arguments, params = {"train": train, "sample": sampling, "encode": encode}[part](
            config, stage, mesh, options.rows
        )
        rows = config[stage].batch_size if part == "train" else options.rows
        held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arguments))
        result = {
            "topology": topology,
            "part": part if part != "train" else f"train {stage}",
            "chips": len(found),
            "mesh": {axis: n for axis, n in mesh.shape.items() if n > 1},
            "params": params,
            "batch_per_chip": rows / len(found),
            "model_flops_per_chip": work / len(found),
            "argument_bytes": held,
            "hbm_capacity_bytes": chip.hbm,
        }
        if part == "train":
            days = config[stage].steps * work / len(found) / (flops.peak(found[0]) * options.mfu) / 86400
            result |= {"mfu_assumed": options.mfu, "days": days, "chip_hours": 24 * days * len(found)}
        logger.info("%s: tracing", topology)
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            lowered = lower()
            logger.info("%s: compiling (%.0f s)", topology, time.perf_counter() - began)
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                result |= refused(str(error), result)
                compiled = None
        seconds = time.perf_counter() - began
    result |= {"fits": compiled is not None, "compile_seconds": seconds}
    if compiled is None:
        result["suggestions"] = suggestions(config, stage, result) if part == "train" else []
        return result
    asked = mesh.shape["sequence"] * mesh.shape["tensor"] > 1
    return result | figures(compiled, result["model_flops_per_chip"], found[0], chip, asked)


def train(config, name, mesh, rows):
    """-> (model FLOPs, lower() of the train step, its arguments, number of parameters)."""
    stage = stages.build(config)[name]
    program = train_state.program(stage, config[name], jax.random.key(0), mesh)
    frozen = stages.abstract_frozen(config) if name == "denoiser" else {}
    batch = stages.abstract_batch(config, name)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = program.abstract["params"]
    _, work = flops.count(lambda p, f, k, b: stage.loss(p, k, b, f)[0], params, frozen, key, batch)
    split = sharding.batch_sharding(mesh)
    arguments = (program.abstract, placed(key, sharding.replicated(mesh)), placed(batch, split), on(frozen, mesh))
    return work, lambda: program.step.lower(*arguments), arguments, parameters(params)


def sampling(config, name, mesh, rows):
    frozen = stages.abstract_frozen(config) | {"denoiser": stages.abstract_params(config)["denoiser"]}
    generator = generate.Generator(config, {})
    arrays, static = generator.arguments()
    tokens = np.zeros((rows, config.data.text_length), np.int32)
    arrays |= dict(key=jax.random.key(0), numbers=np.arange(rows), tokens=tokens, frozen=frozen)
    arrays = jax.eval_shape(lambda: {k: v for k, v in arrays.items() if k != "frozen"}) | {"frozen": frozen}
    work, _ = flops.count(lambda _, given: generator.run(**given, **static), (), arrays)
    arguments = placed({**arrays, "frozen": {}}, sharding.replicated(mesh)) | {"frozen": on(frozen, mesh)}
    return work, lambda: generator.run.lower(**arguments, **static), arguments, parameters(frozen["denoiser"])


def encode(config, name, mesh, rows):
    frozen = stages.abstract_frozen(config)
    batch = stages.abstract_batch(config, "clip")
    batch = {k: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for k, x in batch.items()}

    def run(frozen, batch):
        z = stages.encode(config, frozen, batch["video"], batch["audio"])
        return z, stages.encode_text(config, frozen, batch["tokens"])

    work, _ = flops.count(lambda _, f, b: run(f, b), (), frozen, batch)
    arguments = on(frozen, mesh), placed(batch, sharding.batch_sharding(mesh))
    return work, lambda: jax.jit(run).lower(*arguments), arguments, parameters(frozen)


def placed(tree, where):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def on(params, mesh):
    """Shapes of parameters, split over a mesh as in training."""
    return jax.tree.map(placed, params, sharding.state_shardings(params, mesh))


def parameters(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def figures(compiled, model_flops, device, chip, asked):
    """What a compiled program says of one chip; asked: whether the mesh asks for permutes and all-to-alls."""
    need, operations = compiled.memory_analysis(), hlo.operations(compiled.as_text())
    received, number = collections.Counter(), collections.Counter()
    seconds = collections.Counter(compute=0.0, memory=0.0)
    for one in operations:
        own = one.times * one.flops / flops.peak(device), one.times * one.bytes / chip.bandwidth
        seconds["compute" if own[0] >= own[1] else "memory"] += max(own)
        for kind, size in one.collectives.items():
            received[kind] += one.times * size
            number[kind] += one.times
    executed = sum(one.times * one.flops for one in operations)
    network, alone = sum(received.values()) / chip.links, sum(seconds.values())
    bound = max(network, alone) or 1.0
    shares = {name: s / bound for name, s in {**seconds, "network": network}.items()}
    result_bytes = need.output_size_in_bytes - need.alias_size_in_bytes
    arguments, temporary = need.argument_size_in_bytes, need.temp_size_in_bytes
    return {
        "executed_flops_per_chip": executed,
        "model_share": model_flops / executed if executed else None,
        "argument_bytes": arguments,
        "temporary_bytes": temporary,
        "hbm_bytes_per_chip": arguments + result_bytes + temporary + need.generated_code_size_in_bytes,
        "collective_bytes_per_chip": dict(received),
        "collectives": dict(number),
        "unasked_collectives": 0 if asked else number["collective-permute"] + number["all-to-all"],
        "roofline_seconds": bound,
        "roofline_shares": shares,
        "bound_by": max(shares, key=shares.get),
    }


# ---------------------------------------------------------------------------------------------------- does not fit


def refused(error, result):
    """What the compiler's refusal says. Raises RuntimeError for any but that of memory."""
    if "RESOURCE_EXHAUSTED" not in error and "Ran out of memory" not in error:
        raise RuntimeError(error)
    units = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    amount = r"([\d.]+)([KMGT]?)"
    every = re.search(rf"Used {amount} of {amount} hbm", error)
    temporary = re.search(rf"temporaries \({amount}\) exceeds available HBM \({amount}\)", error)
    if not (every or temporary):
        logger.info("the compiler says: %s", error[:1000])
        return {"hbm_bytes_per_chip": None, "too_much_bytes": None}
    said = (every or temporary).groups()
    used, capacity = (float(said[i]) * units[said[i + 1]] for i in (0, 2))
    used += result["argument_bytes"] if temporary and not every else 0
    return {"hbm_bytes_per_chip": used, "hbm_capacity_bytes": capacity, "too_much_bytes": used - capacity}


def suggestions(config, stage, result):
    """Changes of the config, each as {key: value}, that should make a train step fit; the likeliest first."""
    settings, found = config[stage], []
    mesh = {**config.mesh, **{a: n for a, n in result["mesh"].items()}}
    ways = result["mesh"].get("data", 1) * result["mesh"].get("fsdp", 1)
    used, room = result["hbm_bytes_per_chip"], 0.9 * result["hbm_capacity_bytes"]
    held, rows, every = result["argument_bytes"], settings.batch_size // ways, stages.together(config, stage)
    if used and held < room:
        # Temporaries shrink with the clips at once; gradients of parts are added up in float32.
        sums = 4 * result["params"] / result["mesh"].get("fsdp", 1)
        for parts in (n for n in range(2, rows + 1) if rows % (n * every) == 0 and n > settings.accumulate):
            if held + sums + (used - held) * settings.accumulate / parts <= room:
                found.append({f"{stage}.accumulate": parts})
                break
        fewer = int(rows * (room - held) / (used - held))
        least = settings.accumulate * every
        if fewer := fewer // least * least:
            found.append({f"{stage}.batch_size": fewer * ways})
    if settings.remat != "blocks":
        found.append({f"{stage}.remat": "blocks"})
    more = 2 * result["mesh"].get("fsdp", 1)
    if result["chips"] % more == 0 and held > 0.25 * room:
        rest = result["chips"] // more // (mesh["sequence"] * mesh["tensor"])
        if rest >= 1:
            found.append({"mesh.data": rest, "mesh.fsdp": more})
    return [{"change": " ".join(f"--config.{k}={v}" for k, v in one.items()), "keys": one} for one in found]


def tried(result, config, options, topology, found):
    """Compiles with one suggestion after the other, until one fits; notes in the result what came of each."""
    for one in result["suggestions"]:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(one["keys"])
        logger.info("%s: trying %s", topology, one["change"])
        again = plan(changed, options, topology, found)
        one |= {"fits": again["fits"], "hbm_bytes_per_chip": again["hbm_bytes_per_chip"]}
        if again["fits"]:
            return


def show(results):
    """A table: a line for each figure, a column for each topology."""
    columns = [{key: text(key, result[key]) for key in SHOWN if result.get(key) is not None} for result in results]
    names = [f"{result['part']} on {result['topology']}" for result in results]
    widths = [max(len(x) for x in (name, *column.values())) for name, column in zip(names, columns, strict=True)]
    print(f"{'':<26}" + "  ".join(name.ljust(width) for name, width in zip(names, widths)))
    for key in SHOWN:
        if any(key in column for column in columns):
            line = "  ".join(column.get(key, "-").ljust(width) for column, width in zip(columns, widths))
            print(f"{key:<26}{line}".rstrip())


def text(key, value):
    if key == "suggestions":
        told = {True: " (fits)", False: " (does not)", None: ""}
        return "; or ".join(one["change"] + told[one.get("fits")] for one in value) or "a larger slice"
    if isinstance(value, dict):
        return " ".join(f"{k} {text(key, v)}" for k, v in value.items()) or "-"
    if isinstance(value, str | bool):
        return {True: "yes", False: "no"}.get(value, value)
    if key == "collective_bytes_per_chip" or key.endswith("_bytes") or key.startswith("hbm"):
        return f"{value / GIB:.3f} GiB"
    if key in ("roofline_shares", "model_share"):
        return f"{100 * value:.0f} %"
    if key == "roofline_seconds":
        return f"{1e3 * value:.2f} ms, a bound"
    if key.endswith("flops_per_chip"):
        return f"{value / 1e12:.4g} TFLOP"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def define_flags():
    cli.define_config()
    flags.DEFINE_string("topology", None, "TPU slice, such as v5e:4x4; several with commas between.")
    flags.DEFINE_enum("part", "train", ("train", "sample", "encode"), "Program to compile.")
    flags.DEFINE_enum("stage", "denoiser", checkpoint.STAGES, "Stage, with --part=train.")
    flags.DEFINE_integer("rows", generate.BATCH, "Prompts or clips at once, with --part=sample and encode.")
    flags.DEFINE_float("mfu", 0.4, "Share of the chips' peak FLOP/s for days and chip-hours; assumed, not measured.")
    flags.DEFINE_bool("try", False, "Where it does not fit, compile with the changes suggested, until one fits.")
    flags.DEFINE_enum("effort", "O1", ("default", "O0", "O1", "O2", "O3"), "The compiler's optimisation level.")
    flags.DEFINE_string("out", None, "JSON file to write.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
