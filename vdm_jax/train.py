"""Trains the four stages of a recipe, one after the other.

    python -m vdm_jax.train --config=configs/world.py --workdir=DIR [--stage=all] [--config.denoiser.steps=500]

A finished stage is skipped, an interrupted one goes on from its newest checkpoint.
"""

import json
import logging
import time

import jax
import numpy as np
from absl import flags
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from vdm_jax import checkpoint, cli, hosts, latents, preview, profiling, sharding, stages, train_state
from vdm_jax.data import pipeline
from vdm_jax.errors import UserError

logger = logging.getLogger("vdm_jax")


def main(argv):
    options = flags.FLAGS
    config = options.config
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: options are given as --name=value")
    if config is None or not options.workdir:
        raise UserError("give both --config=FILE and --workdir=DIR, e.g. --config=configs/world_tiny.py --workdir=run")
    workdir = epath.Path(options.workdir)
    span = profiling.span(options.profile)
    hosts.initialize(options)
    cli.use_cache(config)

    # ------------------------------------------------------------------------------------------------ run folder
    # What does not fit is told before anything is written.
    stages.models(config)
    mesh = sharding.make_mesh(config.mesh)
    names = checkpoint.STAGES if options.stage == "all" else (options.stage,)
    counts = {f"{name}.steps": config[name].steps for name in names}
    counts |= {key: config[key] for key in ("checkpoint_every", "log_every")}
    for key, value in counts.items():
        if value < 1:
            raise UserError(f"{key}={value} must be at least 1")
    for name in names:
        sharding.check_batch(config[name].batch_size, mesh, config[name].accumulate)
    stages.check_mesh(config, mesh, names)
    source = pipeline.source(config)
    write_config(workdir, config)
    logger.info("%d device(s) %s, mesh %s", jax.device_count(), jax.devices()[0].device_kind, dict(mesh.shape))

    alive = hosts.watchdog(config.watchdog_seconds)
    with jax.set_mesh(mesh), hosts.together_to_the_end():
        for name in names:
            train_stage(name, config, workdir, mesh, source, alive, span)


def write_config(workdir, config):
    """Stores the config with the run, which goes on only with the sizes, and the models of begun stages, it has."""
    path = workdir / "config.json"
    stored = config.to_json_best_effort(indent=1, sort_keys=True) + "\n"
    if path.exists():
        before = checkpoint.load_config(path)
        for part in checkpoint.STAGES:
            if checkpoint.newest_step(workdir, part) is None:
                continue
            if part in before and json.loads(before[part].model.to_json()) != json.loads(config[part].model.to_json()):
                raise UserError(f"{workdir} was begun with another {part}.model: use another --workdir, or its config")
        for key in ("size", "fps", "sample_rate", "text_length"):
            if key in before.data and before.data[key] != config.data[key]:
                raise UserError(f"{workdir} was begun with data.{key}={before.data[key]}: use another --workdir")
    hosts.agreed(True)  # that all have looked
    if not hosts.lead():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(stored)
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from None


def train_stage(name, config, workdir, mesh, source, alive, span):
    settings = config[name]
    directory = workdir / name
    directory.mkdir(parents=True, exist_ok=True)
    lead = hosts.lead()

    # ---------------------------------------------------------------------------- state, abstract first, then restored
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    program = train_state.program(stages.build(config)[name], settings, init_key, mesh)
    checkpoints = checkpoint.manager(directory / "checkpoints")
    newest = checkpoints.latest_step()  # 0 where imported weights are to be trained from the start
    done = newest or 0
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(program.abstract["params"]))
    logger.info("%s: %.2f M parameters, %d of %d steps done", name, parameters / 1e6, done, settings.steps)
    for line in sharding.table(program.abstract["params"], mesh.shape) if mesh.size > 1 else ():
        logger.info("  %s", line)
    if done >= settings.steps:
        checkpoints.close()
        return

    # --------------------------------------------------------------------------------- earlier stages, frozen, and data
    frozen, items, to_example = {}, source, None
    if name == "denoiser":
        frozen, items = latents.prepare(config, workdir, source, mesh)
    if items is source:
        length = config.data.text_length

        def to_example(item):
            return pipeline.example(item, length)

    batch_sharding = sharding.batch_sharding(mesh)
    batches = pipeline.batches(
        items,
        batch_size=settings.batch_size,
        rows=sharding.local_rows(batch_sharding, settings.batch_size),
        seed=config.seed,
        start=done,
        data=config.data,
        to_example=to_example,
    )
    state = program.init() if newest is None else checkpoint.restore(checkpoints, program.abstract)

    # ----------------------------------------------------------------------------------------------------------- loop
    writer = SummaryWriter(str(directory)) if lead else None
    show = preview.make(name, config, directory / "previews") if config.preview_every else None
    log = MetricsLog(directory / "metrics.jsonl", done) if lead else None
    steps = tqdm(range(done, settings.steps), name, settings.steps, initial=done, disable=None, unit="step")
    history, waited, began, take = [], 0.0, time.perf_counter(), None
    trace = profiling.tracer(span, directory)
    trace(done)
    alive("the start of a stage")
    for step in steps:
        asked = time.perf_counter()
        batch = pipeline.to_devices(next(batches), batch_sharding, settings.batch_size)
        waited += time.perf_counter() - asked
        take = take or hosts.compiled(program.step, state, step_key, batch, frozen)
        state, metrics = take(state, step_key, batch, frozen)
        history.append(metrics)
        number = step + 1
        trace(number, metrics)
        alive(f"step {number} of {name}")
        last = number == settings.steps

        if number % config.log_every == 0 or last:
            means = average(history)
            seconds = (time.perf_counter() - began) / len(history)
            means |= {"step_seconds": seconds, "data_wait_share": waited / len(history) / seconds}
            history, waited, began = [], 0.0, time.perf_counter()
            if lead:
                log.write(number, means)
                for key, value in means.items():
                    writer.add_scalar(f"{name}/{key}", value, number)
                steps.set_postfix(loss=f"{means['loss']:.4f}")
                if steps.disable:  # no terminal: plain lines
                    left = (settings.steps - number) * seconds
                    logger.info(
                        "%s %d/%d loss %.4f  %.0f ms/step  %s left",
                        name, number, settings.steps, means["loss"], 1e3 * seconds, clock(left),
                    )  # fmt: skip
            if not np.isfinite(means["loss"]):
                raise UserError(f"{name}: the loss is {means['loss']} at step {number}; lower {name}.learning_rate")
        if number % config.checkpoint_every == 0 or last:
            checkpoint.save(checkpoints, state)
        if show and (number % config.preview_every == 0 or last):
            show(state["ema"], frozen, number)
    checkpoints.wait_until_finished()
    checkpoints.close()
    alive(None)
    if lead:
        log.close()
        writer.close()


def average(history):
    """Means over the steps since the last line; a part of the loss that a step did not measure (nan) is left out."""
    values = jax.device_get(history)
    series = {key: np.array([v[key] for v in values], np.float64) for key in values[0]}
    measured = {k: v if k == "loss" else v[~np.isnan(v)] for k, v in series.items()}
    return {k: float(v.mean()) for k, v in measured.items() if len(v)}


class MetricsLog:
    """metrics.jsonl: one object a line. Lines past the restored step, and a torn last line, are dropped on resume."""

    def __init__(self, path, step):
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue
            path.write_text("".join(f"{line}\n" for line in kept))
        self.file = open(path, "a", buffering=1)

    def write(self, step, metrics):
        finite = {k: (v if np.isfinite(v) else None) for k, v in metrics.items()}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self):
        self.file.close()


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def define_flags():
    cli.define_config()
    hosts.define_flags()
    flags.DEFINE_string("profile", None, "Steps of each stage to trace for xprof, such as 10:15.")
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_enum("stage", "all", ("all", *checkpoint.STAGES), "Stage to train.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
