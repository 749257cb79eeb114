"""Measures the speed of a recipe on this machine: time and FLOPs of a step, compile time, peak memory.

    python -m vdm_jax.bench --config=configs/world.py [--part=train|sample|encode|data] [--stage=denoiser]
        [--repeats=10] [--steps=N] [--method=NAME] [--out=bench.json]

--part=train   one optimizer step of --stage, on a batch that is already on the device
--part=sample  the sampler on 8 prompts, decoding included; --steps and --method replace settings of config.sample
--part=encode  the encoding of clips and captions into the latents and the text that the denoiser trains on
--part=data    the data pipeline of --stage alone, on the host

Weights and clips are random, and prompts are empty; only --part=data loads the clips of config.data.

step_ms              median time of --repeats calls in milliseconds; the program waits for the end of each call
step_ms_range        the shortest and the longest call
step_flops           model FLOPs of a call on all devices, counted from shapes; recomputation does not count
mfu                  step_flops a second over the peak bfloat16 FLOP/s of the devices; null for an unknown device
peak_memory_bytes    the most memory that the device had in use; a device that does not count it (a CPU) shows what the
                     compiled program needs
examples_per_s       training examples, prompts or clips a second
data_examples_per_s  with --part=train: the same of the data pipeline alone, null without data. If it is less than
                     examples_per_s, the device waits for data.
denoise_ms           with --part=sample: step_ms over the number of denoising steps
"""

import json
import logging
import statistics
import time

import jax
from absl import flags

from vdm_jax import samplers, sharding
from vdm_jax.data import batches
from vdm_jax.errors import UserError
from vdm_jax.models.ops import backend
from vdm_jax.perf import programs, table
from vdm_jax.perf.flops import peak
from vdm_jax.run import cli, storage
from vdm_jax.system import build
from vdm_jax.system.layout import STAGES
from vdm_jax.system.sampling import BATCH, Sampler

logger = logging.getLogger("vdm_jax")

MEASURED = (
    "params", "step_ms", "step_ms_range", "step_flops", "gflops_per_s", "mfu",
    "peak_memory_bytes", "compile_seconds", "examples_per_s",
)  # fmt: skip
DATA_SECONDS = 3.0  # how long the data pipeline is measured, at least


def main(argv):
    options = flags.FLAGS
    config = options.config
    cli.only_options(argv)
    if config is None:
        raise UserError("--config=FILE is missing: name a recipe, such as configs/world_tiny.py")
    config.sample.update({key: options[key].value for key in ("steps", "method") if options[key].value is not None})
    cli.use_cache(config)
    system = build(config)
    out = storage.given(options.out) if options.out else None
    if out:
        storage.make_folder(out.parent)
    mesh = sharding.make_mesh(config.mesh)
    if options.part == "train":
        result = train(system, options.stage, mesh, options.repeats)
    elif options.part == "sample":
        result = measure(programs.sampling(system, Sampler(system), mesh, BATCH), mesh, options.repeats)
        result |= {"method": config.sample.method, "denoise_ms": result["step_ms"] / config.sample.steps}
    elif options.part == "encode":
        system.check_batch(mesh, "denoiser")
        result = measure(programs.encoding(system, mesh, config.denoiser.batch_size), mesh, options.repeats)
    else:
        result = data(system, options.stage)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    result = {"part": options.part, "device": device, **dict.fromkeys(MEASURED), **result}
    table.show([result])
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


def train(system, name, mesh, repeats):
    """Returns the figures of one optimizer step of stage `name`, and of the data pipeline beside it."""
    system.check_batch(mesh, name)
    result = measure(programs.train_step(system, name, mesh), mesh, repeats) | {"data_examples_per_s": None}
    try:
        result["data_examples_per_s"] = data(system, name)["examples_per_s"]
    except UserError as error:  # the step itself needs no data
        logger.info("the data pipeline is not timed: %s", error)
    return result


def data(system, name):
    """Returns the figures of the pipeline that loads clips for stage `name`. The batches stay on the host."""
    config = system.config
    rows = config[name].batch_size
    examples = batches.Examples(batches.source(config), config.data.text_length, system.stages[name].make_hard_negative)
    loaded = batches.batches(examples, batch_size=rows, seed=config.seed, start=0, data=config.data)
    next(loaded)  # starts the threads
    times = []
    began = time.perf_counter()
    while len(times) < 2 * config.data.prefetch or time.perf_counter() - began < DATA_SECONDS:
        asked = time.perf_counter()
        next(loaded)
        times.append(time.perf_counter() - asked)
    times = times[config.data.prefetch :]  # the threads had loaded the first batches already
    seconds = sum(times) / len(times)
    return {"step_ms": 1e3 * seconds, "examples_per_s": rows / seconds}


def measure(program, mesh, repeats):
    """Returns the figures of a perf.programs.Program: compiles it, calls it `repeats` times, and takes the median."""
    # The forms that layers have on accelerators do the products of the model, and no more. This device may have others.
    with backend("tpu"):
        work = program.count_flops()
    with jax.set_mesh(mesh):
        began = time.perf_counter()
        compiled = program.lower(*program.arguments).compile()
        compile_seconds = time.perf_counter() - began
        arguments = program.init()
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            results = jax.block_until_ready(compiled(*arguments))
            times.append(time.perf_counter() - began)
            if program.stateful:
                arguments = (results[0], *arguments[1:])
    times = times[1:]  # the first call warms up
    seconds = statistics.median(times)
    flops_per_device = peak(jax.devices()[0])
    return {
        "params": program.params,
        "step_ms": 1e3 * seconds,
        "step_ms_range": [1e3 * min(times), 1e3 * max(times)],
        "step_flops": work,
        "gflops_per_s": work / seconds / 1e9,
        "mfu": work / seconds / (flops_per_device * jax.device_count()) if flops_per_device else None,
        "peak_memory_bytes": peak_memory(compiled),
        "compile_seconds": compile_seconds,
        "examples_per_s": program.rows / seconds,
    }


def peak_memory(compiled):
    """Returns the bytes that the first device had in use at most, or else the bytes that the program needs."""
    need = compiled.memory_analysis()
    total = need.argument_size_in_bytes + need.output_size_in_bytes + need.temp_size_in_bytes
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", total - need.alias_size_in_bytes)


def define_flags():
    cli.define_config()
    flags.DEFINE_enum("part", "train", ("train", "sample", "encode", "data"), "What to measure.")
    flags.DEFINE_enum("stage", "denoiser", STAGES, "Stage, with --part=train and --part=data.")
    flags.DEFINE_integer("repeats", 10, "Number of calls; the figures are of the median.", lower_bound=1)
    flags.DEFINE_integer("steps", None, "Number of denoising steps, with --part=sample.", lower_bound=1)
    flags.DEFINE_enum("method", None, tuple(samplers.METHODS), "Sampling method, with --part=sample.")
    flags.DEFINE_string("out", None, "JSON file to write.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
