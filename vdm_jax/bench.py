"""How fast a recipe runs on this machine: compile seconds, ms a step, FLOPs, MFU, peak memory, examples/s.

    python -m vdm_jax.bench --config=configs/world.py [--part=train|sample|encode|data] [--stage=denoiser]
        [--repeats=10] [--out=bench.json]

train   one optimizer step of --stage on one batch that is on the device already; random weights and data
sample  config.sample's sampler on a batch of prompts, decoding included; --steps and --method change it
encode  clips and captions to latents and text states, as the denoiser's training needs them
data    the input pipeline alone, on the host

`step_ms` is the median of --repeats calls, each waited for. `step_flops` are model FLOPs over all devices, counted from
shapes, recomputation left out (flops.py). `mfu` is their rate over the devices' bfloat16 peak, null where the peak is
not known. `peak_memory_bytes` is what the device says it held at most, or where it says nothing what the compiled
program needs. With --part=train, `data_examples_per_s` stands beside `examples_per_s`: a pipeline that is the
slower of the two starves the device; null where there is no data yet.
"""

import functools
import json
import logging
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from vdm_jax import pipeline as generate
from vdm_jax import sample, samplers, sharding, train_state
from vdm_jax.data import batches as pipeline
from vdm_jax.data import text
from vdm_jax.errors import UserError
from vdm_jax.models import ops
from vdm_jax.perf import flops
from vdm_jax.run import checkpoint, cli, storage
from vdm_jax.system import codec as stages

logger = logging.getLogger("vdm_jax")

PROMPT = "a red circle moving right"
MEASURED = (
    "params", "step_ms", "step_ms_range", "step_flops", "gflops_per_s", "mfu",
    "peak_memory_bytes", "compile_seconds", "examples_per_s",
)  # fmt: skip
DATA_SECONDS = 3.0  # how long the pipeline is watched


def main(argv):
    options = flags.FLAGS
    config = options.config
    cli.only_options(argv)
    if config is None:
        raise UserError("--config=FILE is missing")
    config.sample.update({key: options[key].value for key in ("steps", "method") if options[key].value is not None})
    cli.use_cache(config)
    stages.models(config)  # what does not fit is told first
    out = None
    if options.out:
        out = storage.given(options.out)
        sample.make_folder(out.parent)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        if options.part == "train":
            result = train(config, options.stage, mesh, options.repeats)
        elif options.part == "data":
            result = data(config, options.stage)
        else:
            result = {"sample": sampling, "encode": encode}[options.part](config, options.repeats)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    result = {"part": options.part, "device": device, **dict.fromkeys(MEASURED), **result}
    for key, value in result.items():
        print(f"{key:<20} {show(key, value)}")
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


def show(key, value):
    if value is None:
        return "-"
    if key.endswith("_bytes"):
        return f"{value / 2**20:,.0f} MiB"
    if isinstance(value, list):
        return " to ".join(show(key, x) for x in value)
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


# ------------------------------------------------------------------------------------------------------------- parts


def train(config, name, mesh, repeats):
    """One train step of stage `name`; the state is moved on, as in training."""
    settings = config[name]
    stages.check_batch(config, name, mesh)
    stage = stages.build(config)[name]
    program = train_state.program(stage, settings, jax.random.key(0), mesh)
    frozen = stages.abstract_frozen(config) if name == "denoiser" else {}
    batch = stages.abstract_batch(config, name)
    key = jax.random.key(1)
    _, work = count(lambda p, f, k, b: stage.loss(p, k, b, f)[0], program.abstract["params"], frozen, key, batch)

    state = program.init()
    frozen = jax.device_put(noise(frozen), sharding.state_shardings(frozen, mesh))
    batch = jax.device_put(noise(batch), sharding.batch_sharding(mesh))
    step, seconds = compiled(program.step.lower, state, key, batch, frozen)

    def call():
        nonlocal state
        state, metrics = step(state, key, batch, frozen)
        return metrics

    result = measured(call, step, seconds, work, settings.batch_size, repeats)
    try:
        result["data_examples_per_s"] = data(config, name)["examples_per_s"]
    except UserError as error:  # no data is needed but for this
        logger.info("the data pipeline is not timed: %s", error)
        result["data_examples_per_s"] = None
    return {"params": parameters(program.abstract["params"]), **result}


def sampling(config, repeats):
    """The whole sampler: prompts to frames and sound."""
    rows = generate.BATCH
    frozen = stages.abstract_frozen(config) | {"denoiser": stages.abstract_params(config)["denoiser"]}
    generator = generate.Generator(config, noise(frozen))
    arrays, static = generator.arguments()
    arrays |= dict(key=jax.random.key(0), numbers=np.arange(rows))
    arrays["tokens"] = text.encode([PROMPT] * rows, config.data.text_length)
    work, _ = count(lambda _, given: generator.run.__wrapped__(**given, **static), (), arrays)
    program, seconds = compiled(functools.partial(generator.run.lower, **static), **arrays)
    result = measured(lambda: program(**arrays), program, seconds, work, rows, repeats)
    result["denoise_ms"] = result["step_ms"] / config.sample.steps
    return {"params": parameters(frozen["denoiser"]), "method": config.sample.method, **result}


def encode(config, repeats):
    """Clips and captions to what the denoiser trains on."""
    frozen = stages.abstract_frozen(config)
    batch = {**stages.abstract_batch(config, "clip")}
    rows = config.denoiser.batch_size
    batch = {k: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for k, x in batch.items()}

    def run(frozen, batch):
        z = stages.encode(config, frozen, batch["video"], batch["audio"])
        return z, stages.encode_text(config, frozen, batch["tokens"])

    work, _ = count(lambda _, f, b: run(f, b), (), frozen, batch)
    arguments = jax.device_put((noise(frozen), noise(batch)))
    program, seconds = compiled(jax.jit(run).lower, *arguments)
    result = measured(lambda: program(*arguments), program, seconds, work, rows, repeats)
    return {"params": parameters(frozen), **result}


def data(config, name):
    """Batches of stage `name` from the pipeline for DATA_SECONDS; nothing of it is on the device."""
    rows = config[name].batch_size
    batches = pipeline.batches(
        pipeline.source(config),
        batch_size=rows,
        seed=config.seed,
        start=0,
        data=config.data,
        to_example=lambda item: pipeline.example(item, config.data.text_length),
    )
    next(batches)  # starts the threads
    times, began = [], time.perf_counter()
    while len(times) < 2 * config.data.prefetch or time.perf_counter() - began < DATA_SECONDS:
        asked = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - asked)
    seconds = sum(times[config.data.prefetch :]) / len(times[config.data.prefetch :])  # the first were made already
    return {"step_ms": 1e3 * seconds, "examples_per_s": rows / seconds}


# ----------------------------------------------------------------------------------------------------------- measuring


def count(function, trained, *arguments):
    """flops.count of the forms that accelerators get: their products are the model's, whatever this device is given.

    Not of jitted functions, which keep the form that they were first traced in.
    """
    with ops.backend("tpu"):
        return flops.count(function, trained, *arguments)


def compiled(lower, *arguments, **options):
    """-> (the program that a jitted function's `lower` makes, compiled; the seconds that took, tracing included)."""
    began = time.perf_counter()
    program = lower(*arguments, **options).compile()
    return program, time.perf_counter() - began


def measured(call, program, compile_seconds, work, rows, repeats):
    """What every part reports, from `repeats` calls; work: FLOPs of a call; rows: examples in it."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[1:])  # the first warms up
    peak = flops.peak(jax.devices()[0])
    return {
        "step_ms": 1e3 * seconds,
        "step_ms_range": [1e3 * min(times[1:]), 1e3 * max(times[1:])],
        "step_flops": work,
        "gflops_per_s": work / seconds / 1e9,
        "mfu": work / seconds / (peak * jax.device_count()) if peak else None,
        "peak_memory_bytes": peak_memory(program),
        "compile_seconds": compile_seconds,
        "examples_per_s": rows / seconds,
    }


def peak_memory(program):
    told = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in told:
        return told["peak_bytes_in_use"]
    need = program and program.memory_analysis()
    if not need:
        return None
    held = need.argument_size_in_bytes + need.output_size_in_bytes + need.temp_size_in_bytes
    return held - need.alias_size_in_bytes


def noise(tree):
    """Arrays for ShapeDtypeStructs: small normal floats, zeros of other types."""
    rng = np.random.default_rng(0)

    def one(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return (0.1 * rng.standard_normal(x.shape, np.float32)).astype(x.dtype)
        return np.ones(x.shape, x.dtype) if x.dtype == bool else np.zeros(x.shape, x.dtype)

    return jax.tree.map(one, tree)


def parameters(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def define_flags():
    cli.define_config()
    flags.DEFINE_enum("part", "train", ("train", "sample", "encode", "data"), "What to time.")
    flags.DEFINE_enum("stage", "denoiser", checkpoint.STAGES, "Stage, with --part=train and data.")
    flags.DEFINE_integer("repeats", 10, "Calls to take the median of.", lower_bound=1)
    flags.DEFINE_integer("steps", None, "Denoising steps, with --part=sample.", lower_bound=1)
    flags.DEFINE_enum("method", None, samplers.METHODS, "Sampler, with --part=sample.")
    flags.DEFINE_string("out", None, "JSON file to write.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
