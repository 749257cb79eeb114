"""Trains the four stages of a recipe, one after the other.

    python -m vdm_jax.train --config=configs/world.py --workdir=DIR [--stage=all] [--config.denoiser.steps=500]

A finished stage is skipped, an interrupted one goes on from its newest checkpoint. SIGTERM and SIGINT end the run after
the current step, which is saved, with exit code 0. A second signal ends it at once.
"""

import logging
import time

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from vdm_jax import preview, sharding, train_state
from vdm_jax.data import batches as pipeline
from vdm_jax.errors import UserError
from vdm_jax.run import checkpoint, cli, folder, hosts, preemption, profiling, storage
from vdm_jax.run import log as run_log
from vdm_jax.system import codec as stages
from vdm_jax.system import latents
from vdm_jax.system.layout import STAGES

logger = logging.getLogger("vdm_jax")


def main(argv):
    options = flags.FLAGS
    config = options.config
    cli.only_options(argv)
    if config is None or not options.workdir:
        raise UserError("give both --config=FILE and --workdir=DIR, e.g. --config=configs/world_tiny.py --workdir=run")
    workdir = storage.given(options.workdir)
    span = profiling.span(options.profile)
    hosts.initialize(options)
    cli.use_cache(config)

    # ------------------------------------------------------------------------------------------------ run folder
    names = STAGES if options.stage == "all" else (options.stage,)
    mesh, source = check(config, names)  # before anything is written
    alive = hosts.watchdog(config.watchdog_seconds)
    with folder.exclusive_lock(workdir), jax.set_mesh(mesh), hosts.exit_on_lost_peer(), preemption.watching() as stop:
        folder.write_config(workdir, config, STAGES)
        logger.info("%d device(s) %s, mesh %s", jax.device_count(), jax.devices()[0].device_kind, dict(mesh.shape))
        for name in names:
            with folder.explain_disk_faults(workdir, name):
                if not train_stage(name, config, workdir, mesh, source, stop, alive, span):
                    break


def check(config, names):
    """-> (mesh, data source) for training the stages `names`. Raises UserError where settings do not fit."""
    stages.models(config)
    mesh = sharding.make_mesh(config.mesh)
    counts = {f"{name}.steps": config[name].steps for name in names}
    counts |= {key: config[key] for key in ("checkpoint_every", "log_every")}
    counts["skip.stop_after"] = config.skip.stop_after
    for key, value in counts.items():
        if value < 1:
            raise UserError(f"{key}={value} must be at least 1")
    for name in names:
        stages.check_batch(config, name, mesh)
    stages.check_mesh(config, mesh, names)
    return mesh, pipeline.source(config)


def train_stage(name, config, workdir, mesh, source, stop, alive, span):
    """-> whether the stage is finished, rather than stopped by a signal."""
    watch, settings = run_log.Watch(), config[name]
    directory = workdir / name
    directory.mkdir(parents=True, exist_ok=True)
    lead = hosts.is_primary()

    # ---------------------------------------------------------------------------- state, abstract first, then restored
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    step_key = jax.device_put(step_key, sharding.replicated(mesh))
    program = train_state.program(stages.build(config)[name], settings, init_key, mesh, config.skip.loss_over_mean)
    checkpoint.quarantine_damaged(directory / "checkpoints")
    checkpoints = checkpoint.manager(directory / "checkpoints", **config.keep)
    newest = checkpoints.latest_step()  # 0 where imported weights are to be trained from the start
    done = newest or 0
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(program.abstract["params"]))
    logger.info("%s: %.2f M parameters, %d of %d steps done", name, parameters / 1e6, done, settings.steps)
    for line in sharding.table(program.abstract["params"], mesh.shape) if mesh.size > 1 else ():
        logger.info("  %s", line)
    if done >= settings.steps:
        checkpoints.close()
        return True

    # --------------------------------------------------------------------------------- earlier stages, frozen, and data
    frozen, items, to_example = {}, source, None
    if name == "denoiser":
        frozen, items = latents.prepare(config, workdir, source, mesh)
    if items is source:
        length = config.data.text_length

        kinds = stages.hard_negative_words(config, name)

        def to_example(item):
            return pipeline.example(item, length, kinds)

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
    show = preview.make(name, config, directory / "previews", mesh) if config.preview_every else None
    log = run_log.MetricsLog(directory, done) if lead else None
    steps = tqdm(range(done, settings.steps), name, settings.steps, initial=done, disable=None, unit="step")
    history, losses, row, saved, due, stopped = [], [], run_log.Streak(), newest, False, False
    take = None
    trace = profiling.tracer(span, directory)
    trace(done)
    stop.stepping, beat = True, 0.0
    watch.start()
    for step in steps:
        with watch("data"):
            batch = pipeline.to_devices(next(batches), batch_sharding, settings.batch_size)
        if take is None:
            with watch("compiling"):
                take = hosts.compiled(program.step, state, step_key, batch, frozen)
            alive(f"compiling the step of {name}")  # not before: that takes as long as it takes
        with jax.transfer_guard("disallow"):  # all of it is where it is needed
            state, metrics = take(state, step_key, batch, frozen)
        history.append(metrics)
        number = step + 1
        trace(number, metrics)
        alive(f"step {number} of {name}")
        stopped = stop(number)
        last = number == settings.steps or stopped
        due = due or number % config.checkpoint_every == 0 or last

        if number % config.log_every == 0 or due:  # before each save: what a later start goes on from is logged
            means, skipped = run_log.summarize(history, number + 1 - len(history))
            losses.append((means["loss"], len(history) - len(skipped)))
            means |= watch.lap(len(history))
            means["goodput"] = watch.goodput()
            history = []
            if lead:
                log.write(number, name, means)
                if due:
                    log.flush()
                left = run_log.clock((settings.steps - number) * means["step_seconds"])
                shown = dict(loss=f"{means['loss']:.4f}", data=f"{means['data_wait_share']:.0%}")
                shown |= dict(skipped=log.skipped, saved="-" if saved is None else saved)
                steps.set_postfix(shown)
                if steps.disable:  # no terminal: plain lines
                    logger.info(
                        "%s %d/%d loss %s  %.0f ms/step, %s of it waiting for data  %d skipped  saved %s  %s left",
                        name, number, settings.steps, shown["loss"], 1e3 * means["step_seconds"], shown["data"],
                        shown["skipped"], shown["saved"], left,
                    )  # fmt: skip
            for one in skipped if lead else ():
                ids = pipeline.sample_ids(items, batch_size=settings.batch_size, seed=config.seed, step=one.number - 1)
                logger.warning("%s: step %d is skipped (%s), its samples are %s", name, one.number, one.why(), ids)
            if row.add(skipped, number, config.skip.stop_after):
                checkpoint.finish(checkpoints)
                raise UserError(
                    f"{name}: {len(row.steps)} steps in a row were skipped, from step {row.steps[0].number} on "
                    f"({row.steps[0].why()}); the newest checkpoint is of step {saved}; lower {name}.learning_rate, "
                    f"or look at these samples"
                )
        if due and (last or not row.steps):  # not in a row of bad steps, which the state may be to blame for
            with watch("saving"):
                checkpoint.save(checkpoints, state, run_log.mean(losses))
            saved, losses, due = number, [], False
        if lead and (time.monotonic() - beat > config.heartbeat_every or last):
            beat = time.monotonic()
            run_log.write_heartbeat(
                workdir / "heartbeat.json", stage=name, step=number, steps=settings.steps, saved=saved,
                skipped=log.skipped, goodput=watch.goodput(),
            )  # fmt: skip
        if show and not stopped and (number % config.preview_every == 0 or last):
            with watch("preview"):
                show(state["ema"], frozen, number)
        if stopped:
            break
    checkpoint.finish(checkpoints)
    checkpoints.close()
    alive(None)
    stop.stepping = False
    if lead:
        log.close()
    if stopped:
        logger.info("%s: stopped at step %d, saved; the same command goes on from there", name, number)
    return not stopped and stop.signal is None


def define_flags():
    cli.define_config()
    hosts.define_flags()
    flags.DEFINE_string("profile", None, "Steps of each stage to trace for xprof, such as 10:15.")
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_enum("stage", "all", ("all", *STAGES), "Stage to train.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
