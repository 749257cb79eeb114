"""Measures the speed of a recipe on this machine: time and FLOPs of a step, compile time, peak memory.

    python -m vdm_jax.bench --config=configs/world.py [--part=train|sample|encode|data|rollout]
        [--stage=denoiser] [--repeats=10] [--steps=N] [--method=NAME] [--windows=64] [--out=bench.json]

--part is one optimizer step of --stage, the sampler on 8 prompts, the encoders of clips and captions, the data pipeline
of --stage on the host, or a scene that goes on for --windows windows. If examples_per_s of --part=data are fewer than
those of --part=train, the device waits for data. The other parts load no clips: weights and clips are random, and
prompts are empty.

step_ms            median time of --repeats calls in milliseconds; the program waits for the end of each call
step_ms_range      the shortest and the longest call
step_flops         model FLOPs of a call on all devices, counted from shapes; recomputation does not count
mfu                step_flops a second over the peak bfloat16 FLOP/s of the devices; null for an unknown device
peak_memory_bytes  the most memory that the device had in use; a device that does not count it (a CPU) shows what the
                   compiled program needs
examples_per_s     training examples, prompts or clips a second
denoise_ms         with --part=sample: step_ms over the number of denoising steps
early_ms, late_ms  with --part=rollout: median time of the windows 2 to 9, and of the last eight
early_bytes, late_bytes   with --part=rollout: the most memory that the process had after the same windows, medians
compilations       with --part=rollout: programs that were compiled after the first two windows
"""

import json
import resource
import statistics
import time

import jax
from absl import flags

from vdm_jax import samplers, sharding
from vdm_jax.data import batches
from vdm_jax.models.ops import backend
from vdm_jax.perf import programs, table
from vdm_jax.perf.flops import peak
from vdm_jax.pipeline import Pipeline
from vdm_jax.run import cli, storage
from vdm_jax.system import build, memory
from vdm_jax.system.layout import STAGES
from vdm_jax.system.sampling import BATCH, Sampler

MEASURED = (
    "params", "step_ms", "step_ms_range", "step_flops", "gflops_per_s", "mfu",
    "peak_memory_bytes", "compile_seconds", "examples_per_s",
)  # fmt: skip
DATA_SECONDS = 3.0  # how long the data pipeline is measured, at least


def main(argv):
    options = flags.FLAGS
    config = cli.recipe(argv)
    config.sample.update({key: options[key].value for key in ("steps", "method") if options[key].value is not None})
    cli.use_cache(config)
    system = build(config)
    system.check_stage(options.stage)
    out = storage.given(options.out) if options.out else None
    if out:
        storage.make_folder(out.parent)
    mesh = sharding.make_mesh(config.mesh)
    if options.part == "train":
        system.check_batch(mesh, options.stage)
        result = measure(programs.train_step(system, options.stage, mesh), mesh, options.repeats)
    elif options.part == "sample":
        result = measure(programs.sampling(system, Sampler(system), mesh, BATCH), mesh, options.repeats)
        result |= {"method": config.sample.method, "denoise_ms": result["step_ms"] / config.sample.steps}
    elif options.part == "encode":
        system.check_batch(mesh, "denoiser")
        result = measure(programs.encoding(system, mesh, config.denoiser.batch_size), mesh, options.repeats)
    elif options.part == "rollout":
        result = rollout(system, mesh, options.windows)
    else:
        result = data(system, options.stage)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    result = {"part": options.part, "device": device, **dict.fromkeys(MEASURED), **result}
    table.show([result])
    if out:
        storage.replace(out, json.dumps(result, indent=1) + "\n")


def data(system, name):
    """Returns the figures of the pipeline that loads clips for stage `name`. The batches stay on the host."""
    config = system.config
    rows = config[name].batch_size
    stage = system.stages[name]
    source = batches.source(config, frames=stage.clip_frames)
    examples = batches.Examples(source, system.tokenize, stage.make_hard_negative)
    loaded = batches.batches(examples, batch_size=rows, seed=config.seed, start=0, data=config.data)
    for _ in range(1 + config.data.prefetch):  # the first starts the threads, which load the others meanwhile
        next(loaded)
    steps, began = 0, time.perf_counter()
    while steps < config.data.prefetch or time.perf_counter() - began < DATA_SECONDS:
        next(loaded)
        steps += 1
    seconds = (time.perf_counter() - began) / steps
    return {"step_ms": 1e3 * seconds, "examples_per_s": rows / seconds}


def rollout(system, mesh, windows):
    """Returns the figures of a scene that goes on, window after window, from its state alone. Weights are random."""
    shapes = system.param_shapes | {"statistics": system.stages["denoiser"].encoder_shapes["statistics"]}
    pipe = Pipeline(system, *programs.fill((shapes,), (sharding.replicated(mesh),)), mesh)
    _, _, scene = pipe.rollout([""], system.layout.frames)
    pipe.rollout([""], _next(scene, pipe), start=(scene.video, scene.audio), scene=scene)  # compiles
    compiled, times, sizes = pipe.sampler.compilations, [], []
    for _ in range(windows):
        began = time.perf_counter()
        *_, scene = pipe.rollout([""], _next(scene, pipe), start=(scene.video, scene.audio), scene=scene)
        times.append(time.perf_counter() - began)
        sizes.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # Linux counts KiB
    figures = {"step_ms": 1e3 * statistics.median(times), "compilations": pipe.sampler.compilations - compiled}
    for name, part in (("early", slice(1, 9)), ("late", slice(-8, None))):
        figures |= {f"{name}_ms": 1e3 * statistics.median(times[part]), f"{name}_bytes": statistics.median(sizes[part])}
    return figures


def _next(scene, pipe):
    """Video frames of a scene's context and of one window after it."""
    return scene.video.shape[1] + memory.window_step(pipe.config, pipe.system.layout)


def measure(program, mesh, repeats):
    """Returns the figures of a perf.programs.Program, over `repeats` calls after one that warms up."""
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
    times = times[1:]
    seconds = statistics.median(times)
    flops_per_device = peak(jax.devices()[0])
    need, stats = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
    held = need.argument_size_in_bytes + need.output_size_in_bytes + need.temp_size_in_bytes - need.alias_size_in_bytes
    return {
        "params": program.params,
        "step_ms": 1e3 * seconds,
        "step_ms_range": [1e3 * min(times), 1e3 * max(times)],
        "step_flops": work,
        "gflops_per_s": work / seconds / 1e9,
        "mfu": work / seconds / (flops_per_device * jax.device_count()) if flops_per_device else None,
        "peak_memory_bytes": stats.get("peak_bytes_in_use", held),
        "compile_seconds": compile_seconds,
        "examples_per_s": program.rows / seconds,
    }


def define_flags():
    cli.define_config()
    flags.DEFINE_enum("part", "train", ("train", "sample", "encode", "data", "rollout"), "What to measure.")
    flags.DEFINE_integer("windows", 64, "Windows of a scene, with --part=rollout.", 9, 10**6)
    flags.DEFINE_enum("stage", "denoiser", STAGES, "Stage, with --part=train and --part=data.")
    flags.DEFINE_integer("repeats", 10, "Number of calls; the figures are of the median.", 1, 10**6)
    flags.DEFINE_integer("steps", None, "Number of denoising steps, with --part=sample.", lower_bound=1)
    flags.DEFINE_enum("method", None, tuple(samplers.METHODS), "Sampling method, with --part=sample.")
    flags.DEFINE_string("out", None, "JSON file to write.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
