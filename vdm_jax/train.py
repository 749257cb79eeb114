"""Trains the four stages of a recipe, one after the other.

    python -m vdm_jax.train --config=configs/world.py --workdir=DIR [--stage=all] [--config.denoiser.steps=500]

A finished stage stays as it is, and an interrupted stage continues from its newest checkpoint. SIGTERM and SIGINT end
the run after the current step, with a checkpoint and exit code 0. A second signal ends it at once. While a stage
is being prepared (its step compiled, its clips encoded) there is nothing to save yet. A signal in this time ends a run
of one process at once. A run of several processes ends after its next step, because the processes must agree on a step.
A stage may have phases with settings of their own: see system/phases.py.
"""

import logging
from typing import Any, NamedTuple

import jax
from absl import flags

from vdm_jax import sharding, train_state, validation
from vdm_jax.data import batches
from vdm_jax.errors import UserError
from vdm_jax.run import boards, checkpoint, cli, folder, hosts, preemption, profiling, storage
from vdm_jax.run.log import RunLog, Stopwatch
from vdm_jax.system import build, latents
from vdm_jax.system.layout import STAGES
from vdm_jax.system.parts import with_hashes
from vdm_jax.system.phases import first_params, phases

logger = logging.getLogger("vdm_jax")


class Run(NamedTuple):
    """What all stages of a run share."""

    workdir: Any  # epath.Path
    number: int  # names the run in its files
    mesh: jax.sharding.Mesh
    plan: dict  # {stage: its Phases}
    sources: dict  # {(System that a phase is trained on, video frames of a clip): data source of its training clips}
    stop: preemption.Stop  # stop.is_due(step) -> whether a signal asks the run to end
    report_progress: Any  # report_progress(what) tells the watchdog what was done last; report_progress(None) stops it
    trace_span: tuple | None  # first and last step to trace


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

    if config.wandb.project:
        boards.package()
    config = with_hashes(config)
    system = build(config)
    validation.check(system)
    names = [name for name in system.stages if options.stage in ("all", name) and name not in system.parts]
    if not names:
        system.check_trained(options.stage)
    # All settings are checked before anything is written. What a stage needs of others is checked when it starts.
    plan = {name: phases(system, name) for name in names}
    mesh = sharding.make_mesh(config.mesh)
    check(mesh, plan)
    sources = {
        (system, frames): batches.source(system.config, in_bucket=system is not phase.system, frames=frames)
        for name, stage in plan.items()
        for phase in stage
        for system in phase.buckets
        for frames in [system.stages[name].clip_frames]
    }
    report_progress = hosts.watchdog(config.watchdog_seconds)
    with folder.exclusive_lock(workdir), jax.set_mesh(mesh), hosts.exit_on_lost_peer(), preemption.watching() as stop:
        number = folder.write_config(workdir, config, names, options.change, options.unverified)
        logger.info("%d device(s) %s, mesh %s", jax.device_count(), jax.devices()[0].device_kind, dict(mesh.shape))
        run = Run(workdir, number, mesh, plan, sources, stop, report_progress, span)
        for name in names:
            with folder.explain_disk_faults(workdir, name):
                if not all(train_phase(run, name, phase) for phase in plan[name]):
                    break


def check(mesh, plan):
    """Raises UserError where a phase does not fit the mesh. plan: {stage: its Phases}."""
    for name, stage_phases in plan.items():
        for phase in stage_phases:
            try:
                for system in phase.buckets:
                    system.check_batch(mesh, name)
                    system.check_mesh(mesh, [name])
            except UserError as error:
                raise UserError(f"{phase.title}: {error}") from None


def train_phase(run, name, phase):
    """Trains one phase of a stage. -> True if the run should go on; False if a signal asks it to end."""
    directory = run.workdir / name / "checkpoints"
    directory.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.quarantine_damaged(directory, run.number)  # before the newest checkpoint is looked for
    with checkpoint.manager(directory, run.number, **phase.system.config.keep) as checkpoints:
        return take_steps(run, name, phase, checkpoints)


def take_steps(run, name, phase, checkpoints):
    """Takes the remaining steps of a phase, those after its newest checkpoint. Returns what `train_phase` returns."""
    system = phase.system
    config, settings, stage = system.config, system.config[name], system.stages[name]
    directory = run.workdir / name
    stopwatch = Stopwatch()

    # ---------------------------------------------------------------------- how training starts; the order matters
    # 1. The functions that make and change the train state, and its shapes. The state itself comes later: a large model
    #    leaves no room for an initialized state beside a restored one.
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    step_key = jax.device_put(step_key, sharding.replicated(run.mesh))
    #    The step skips updates whose loss is more than `loss_over_mean` times the mean of earlier losses.
    programs = [
        train_state.program(bucket.stages[name], settings, init_key, run.mesh, config.skip.loss_over_mean, phase.start)
        for bucket in phase.buckets
    ]
    program = programs[0]  # the programs differ in their step only
    # 2. What earlier calls of this command have done.
    newest = checkpoints.latest_step()  # None: no checkpoint; 0: weights that were imported at step 0
    done = newest or 0
    parameter_count = sum(x.size for x in jax.tree.leaves(stage.param_shapes))
    logger.info("%s: %.2f M parameters, %d of %d steps done", phase.title, parameter_count / 1e6, done, phase.last_step)
    for line in sharding.table(stage.param_shapes, run.mesh.shape) if run.mesh.size > 1 else ():
        logger.info("  %s", line)
    if done >= phase.last_step:
        return True
    # 3. Data: clips. For the denoiser, the models of the earlier stages encode them, now or in each batch.
    examples = [
        batches.Examples(
            run.sources[bucket, bucket.stages[name].clip_frames], system.tokenize, stage.make_hard_negative
        )
        for bucket in phase.buckets
    ]
    weights = [own.weight for own in examples]  # of the buckets
    sources = examples
    encoder_params = {}
    if stage.encoder_shapes:
        encoder_params, examples = latents.prepare(phase.buckets, run.workdir, examples, run.mesh, run.number)
    batch_sharding = sharding.batch_sharding(run.mesh)
    order = dict(batch_size=settings.batch_size, seed=config.seed)  # decides which clip is in which batch
    row_numbers = sharding.local_rows(batch_sharding, settings.batch_size)  # the rows of this process
    data = batches.in_buckets(examples, weights, **order, rows=row_numbers, start=done, data=config.data)
    # 4. The state itself: initialized at random, begun from the phase before, or restored directly onto the mesh.
    begins_phase = done > 0 and done == phase.start  # the newest checkpoint is the last one of the phase before
    if newest is None and system.published and "base" not in encoder_params:
        state = program.begin(system.read_published(run.mesh))
    elif newest is None:
        state = program.init()
    elif begins_phase:
        phase_before = run.plan[name][phase.number - 2]  # phase numbers start at 1
        ema, _ = folder.read_params(run.workdir, name, phase_before.system.stages[name].param_shapes, run.number)
        params = first_params(ema, stage.param_shapes)
        state = program.begin(jax.device_put(params, sharding.state_shardings(params, run.mesh)))
    else:
        state = checkpoint.restore(checkpoints, program.abstract)
    # 5. The step is compiled before the first batch is read. All processes finish compiling before any of them runs it.
    #    The log says how long compiling took last time for a phase of the same title and number of parameters.
    shapes = f" for {len(programs)} shapes" if len(programs) > 1 else ""
    what = f"the training step of {phase.title}{shapes}"
    with stopwatch("compiling"), profiling.compiling(what, key=parameter_count):
        step_fns = []
        for bucket, own in zip(phase.buckets, programs):
            abstract_batch = jax.tree.map(lambda x: x.update(sharding=batch_sharding), bucket.stages[name].batch)
            step_fns.append(hosts.compiled(own.step, state, step_key, abstract_batch, encoder_params))
        finite_fn = hosts.compiled(program.finite, state)
    # Compiling is finished. This first report starts the watchdog. It comes only now, because compiling may take longer
    # than the watchdog allows.
    run.report_progress(f"compiling the step of {phase.title}")

    # --------------------------------------------------------------------------------------------------------- loop
    validate = validation.make(directory, system, name, run.mesh)
    log = RunLog(
        name,
        phase.title,
        phase.number,
        directory,
        stage_steps=run.plan[name][-1].last_step,
        last_step=phase.last_step,
        done=done,
        stopwatch=stopwatch,
        # Steps are counted from 1, batches from 0.
        sample_ids=lambda number: batches.sample_names(examples, sources, weights, **order, step=number - 1),
        stop_after=config.skip.stop_after,  # the run ends after this number of skipped steps in a row
        heartbeat_every=config.heartbeat_every,  # seconds between two writings of heartbeat.json, for other programs
        find_saved=lambda: folder.newest_step(run.workdir, name),
        wait_for_save=lambda: checkpoint.finish(checkpoints),  # RunLog calls it before it raises an error
        wandb=wandb_settings(run, name, config),
    )

    def show(number):
        with stopwatch("validation"):
            log.write_validation(number, *validate(state, encoder_params, number))
        run.report_progress(f"the validation of step {number} of {phase.title}")

    # The first step, or a step that is saved but whose validation was interrupted.
    if validate and hosts.broadcast_from_primary(done % config.validation.every == 0 and not log.is_validated(done)):
        show(done)
    trace = profiling.tracer(run.trace_span, directory)
    trace(done)  # starts the trace now if the next step is the first one to trace
    run.stop.after_step = True  # from now on a signal ends the run after a step, and not at once
    save_due = stopped = False
    stopwatch.start()
    for number in log.remaining_steps:
        with stopwatch("data"):
            bucket, batch = next(data)
            batch = batches.to_devices(batch, batch_sharding, settings.batch_size)
        with jax.transfer_guard("disallow"):  # a hidden copy between host and device would stall every step
            state, metrics = step_fns[bucket](state, step_key, batch, encoder_params)
        log.add(metrics)
        trace(number, metrics)
        run.report_progress(f"the start of step {number} of {phase.title}")
        stopped = run.stop.is_due(number)
        last = stopped or number == phase.last_step
        save_due = save_due or last or number % config.checkpoint_every == 0
        # Log lines are written before a save. A run that resumes from the save does not repeat the steps before it, and
        # lines not yet written would be lost.
        if save_due or number % config.log_every == 0:
            log.write(number, flush=save_due)
        # The step function skips an update that is not finite or whose loss is far above the mean. A skip can
        # mean that an earlier update spoiled the state. So a save waits for a step that is not skipped, or for the end.
        if save_due and (last or not log.skipping):
            with stopwatch("saving"):
                log.check_state(number, finite_fn(state))
                checkpoint.save(checkpoints, state, log.mean_loss())
            save_due = False
        log.heartbeat(number)
        if validate and not stopped and (last or number % config.validation.every == 0):
            show(number)
        if stopped:
            break
    checkpoint.finish(checkpoints)
    run.report_progress(None)
    run.stop.after_step = False
    log.close(number)
    if stopped:
        logger.info("%s: stopped at step %d, saved; the same command continues from there", phase.title, number)
    return not stopped and run.stop.signal is None  # a signal may come after the last step, too


def wandb_settings(run, name, config):
    """Returns the arguments of boards.Wandb for a stage; None without Weights & Biases."""
    if not config.wandb.project:
        return None
    told = dict(id=f"{run.number}-{name}", name=f"{run.workdir.name}-{name}", config=config.to_dict())
    return {**config.wandb, **told}


def define_flags():
    cli.define_config()
    hosts.define_flags()
    flags.DEFINE_string("profile", None, "Steps of each stage to trace for xprof, such as 10:15.")
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_enum("stage", "all", ("all", *STAGES), "Stage to train.")
    flags.DEFINE_bool("change", False, "Go on with other settings of the training than the run has had so far.")
    flags.DEFINE_bool("unverified", False, "Accept files of the run that have no checksums or are of another run.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
