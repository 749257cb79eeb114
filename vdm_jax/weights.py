"""Exports, imports and verifies the weights of a run.

    python -m vdm_jax.weights export --workdir=DIR --out=FOLDER        # EMA weights of all stages, half precision
        [--license=apache-2.0] [--report=FOLDER/metrics.json]          # for the model card beside them, README.md
    python -m vdm_jax.weights export --workdir=DIR --out=FOLDER --adapters     # the adapters alone, for `peft`
    python -m vdm_jax.weights import --weights=FOLDER --workdir=DIR    # a new run that starts from these weights
    python -m vdm_jax.weights verify DIR                               # checks all files that a run reads back

A run with a denoiser.source is exported as the folder of a pipeline, which diffusers and `sample --weights` read.

Import restores weights and step counts, not the optimizer state. To train a stage further, raise its steps, or give
--restart=STAGE, which sets its step count to 0. --weights=reference names the weights that ship with the package.

With --config=FILE the new run has that config, and each setting that changes the training is told. Parameters that are
missing from the weights are freshly initialized, and their stage restarts at step 0. Zero-initialized layers do not
change the output.

A run whose codecs or text encoder come from folders reads them. --video_codec.source=FOLDER, --audio_codec.source and
--text_encoder.source tell where they are, if they have moved since; --denoiser.source does so for a published model.
"""

import contextlib
import functools
import time

import jax
import numpy as np
from absl import flags
from etils import epath

from vdm_jax import lora, settings, train_state
from vdm_jax.errors import UserError
from vdm_jax.metrics import report
from vdm_jax.run import card, checkpoint, checksums, cli, folder, huggingface, record, storage
from vdm_jax.sharding import named_leaves, path_name
from vdm_jax.system import adapters, build, finetuned, latents
from vdm_jax.system.layout import STAGES, layout
from vdm_jax.system.parts import is_finetuned, with_hashes

# Names of files and folders that need no check.
UNCHECKED = ("lock", "heartbeat.json", "starts.jsonl", "metrics.jsonl", "validation.jsonl", "events.out.tfevents.*")
UNCHECKED += ("previews", "plugins", "wandb")


def main(argv):
    options = flags.FLAGS
    moved = cli.parts(options)
    if argv[1:] == ["export"] and options.workdir and options.out and options.adapters:
        if options.license or options.report:
            raise UserError("adapters alone get no model card: leave out --license and --report")
        export_adapters(storage.given(options.workdir), storage.given(options.out), moved)
    elif argv[1:] == ["export"] and options.workdir and options.out:
        if options.license:
            card.check_license(options.license)
        if finetuned.is_run(options.workdir):
            if options.report:
                raise UserError("evaluate makes no report of a run with a denoiser.source: leave out --report")
            size = finetuned.export(options.workdir, options.out, options.license, moved)
            print(f"wrote {options.out}: {size / 1e6:.2f} MB, in the layout of diffusers")
            return
        outcomes = report.read_outcomes(storage.given(options.report)) if options.report else None
        weights, out = folder.load(options.workdir, build, parts=moved), storage.given(options.out)
        folder.write_exported(out, weights, options.workdir, outcomes, options.license)
        size = sum((out / f"{stage}.safetensors").stat().length for stage in weights.steps)
        print(f"wrote {out}: {size / 1e6:.2f} MB of weights")
    elif argv[1:2] == ["verify"] and len(argv) == 3:
        verify(storage.given(argv[2]), options.unverified, moved)
    elif argv[1:] == ["import"] and options.weights and options.workdir:
        source = None if options.weights == "reference" else options.weights
        weights = folder.load(source, build, unverified=options.unverified, parts=moved)
        trained_with, encoders = weights.system.config, folder.encoders_hash(weights.params, weights.system.parts)
        if options.config is not None:
            if is_finetuned(options.config):
                raise UserError("denoiser.source needs no import: train begins with its weights")
            weights = add_missing_params(weights, with_hashes(options.config))
        weights = weights._replace(steps=weights.steps | dict.fromkeys(options.restart, 0))
        check_changes(trained_with, weights)
        import_weights(weights, storage.given(options.workdir), encoders)
    else:
        raise UserError(
            "usage: python -m vdm_jax.weights export --workdir=DIR --out=FOLDER [--adapters], "
            "or import --weights=FOLDER --workdir=DIR [--config=FILE] [--restart=STAGE], or verify DIR"
        )


def export_adapters(workdir, out, moved):
    """Writes the EMA of the adapters of a run as files of `peft`. Raises UserError when the run has none.

    moved: see folder.read_system, here and below
    """
    system = folder.read_system(workdir, build, moved)
    chosen = lora.active(system.config.denoiser)
    if not chosen:
        raise UserError(f"{workdir} has no adapters (denoiser.lora.rank=0): leave out --adapters")
    shapes, run = system.stages["denoiser"].param_shapes, folder.run_number(workdir)
    trained, step = folder.read_params(workdir, "denoiser", shapes, run)
    adapters.write(out, trained, chosen.alpha)
    print(f"wrote {out / adapters.FILE}: adapters of rank {chosen.rank} at step {step}")


def verify(directory, unverified=False, moved=None):
    """Checks every file in `directory` that a run reads back, and prints a line for each part.

    A part is a checkpoint, a folder of exported weights, the encoded clips, a config.json or a statistics.json. A line
    also names what is not checked: a save under way, what was set aside, and unknown files.

    Raises UserError when a part is damaged or, unless `unverified`, has no checksums, or when there is no part.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a folder: give a run, a checkpoint or exported weights")
    faults, checked, read = [], 0, 0  # read: in bytes
    began = time.perf_counter()
    for path, check in _parts(directory, moved):
        if isinstance(check, str):
            print(f"{path}: {check}")
            continue
        checked += 1
        try:
            read += check()
            print(f"{path}: good")
        except UserError as error:
            if path.parent.name == "checkpoints" and not path.exists():
                print(f"{path}: superseded while it was read")
            elif isinstance(error, checksums.Unverified):
                faults += [] if unverified else [f"{error}, or accept this with --unverified"]
                print(f"{path}: unverified")
            else:
                faults.append(error)
                print(f"{path}: DAMAGED")
    if not checked:
        raise UserError(f"{directory} holds neither checkpoints nor exported weights")
    seconds = time.perf_counter() - began
    print(f"read {read / 1e9:.3f} GB at {read / 1e9 / seconds:.2f} GB/s")
    if faults:
        raise UserError(f"{faults[0]}" + (f", and {len(faults) - 1} more are damaged" if len(faults) > 1 else ""))


def _parts(directory, moved):
    """Yields (path, check) for what is in a folder and its subfolders.

    check: a function that returns how many bytes it read and raises UserError; or a text, where nothing is checked
    """
    names = {path.name for path in directory.iterdir()}
    names = sorted(names | {"config.json"} if names & {*STAGES} else names)  # a run without it is told
    exported = [name for name in names if name.endswith(".safetensors")]
    if "_CHECKPOINT_METADATA" in names:  # the user named a checkpoint
        yield directory, functools.partial(_check_checkpoint, directory)
        return
    if huggingface.PIPELINE in names:  # of a published model, or of a run that has trained one further
        yield directory, functools.partial(checksums.check, directory)
        return
    covered = checksums.listed(directory)
    if exported or checksums.NAME in names:
        yield directory, functools.partial(checksums.check, directory, exported)
    for name in names:
        path = directory / name
        if name == "config.json":
            yield path, functools.partial(_check_config, path, moved)
        elif name == "statistics.json":
            yield path, functools.partial(_check_statistics, path, moved)
        elif name == epath.Path(folder.BASE).name:
            yield path, functools.partial(_check_base, path)
        elif name.startswith("latents") and path.is_dir():
            yield path, functools.partial(latents.check, path)
        elif name.endswith(".orbax-checkpoint-tmp"):
            training = folder.is_training(directory.parent.parent)
            yield path, "a save under way" if training else "the rest of a save; the next start deletes it"
        elif name in ("damaged", checkpoint.SUPERSEDED):
            yield path, "set aside, not checked"
        elif directory.name == "checkpoints" and path.is_dir():
            is_step = checkpoint.is_step(name)
            yield path, functools.partial(_check_checkpoint, path) if is_step else "no name of a step, not checked"
        elif path.is_dir():
            yield from () if name in UNCHECKED else _parts(path, moved)
        elif name not in covered and not any(map(path.match, (*UNCHECKED, *exported, checksums.NAME))):
            yield path, "unknown, not checked"


def _check_config(path, moved):
    folder.read_system(path.parent, layout, moved)
    return path.stat().length


def _check_checkpoint(path):
    """Compares also the step and the run, where the config.json of the run is there and whole."""
    run = _run_number(storage.absolute(path).parents[2])
    return checksums.check(path) if run is None else checkpoint.check(path, run)


def _run_number(workdir):
    with contextlib.suppress(UserError):  # the line of config.json tells its fault
        return folder.run_number(workdir)


def _check_statistics(path, moved):
    owner = path.parent if (path.parent / "config.json").exists() else path.parent.parent
    sizes = folder.read_system(owner, layout, moved).latent_shapes
    channels = {m: jax.ShapeDtypeStruct(shape[-1:], np.float32) for m, shape in sizes.items()}
    run = None if folder.is_exported(owner) else folder.run_number(owner)
    folder.read_statistics(path, {m: {"mean": x, "std": x} for m, x in channels.items()}, run)
    return path.stat().length


def _check_base(path):
    storage.read_json(path, "restore it from a copy")
    return path.stat().length


def add_missing_params(weights, config):
    """Returns the Weights for a config whose models may have more parameters. The added ones are freshly initialized.

    The weights hold no adapters. A config with adapters begins with fresh ones, for the base denoiser.lora.base.
    Raises UserError when a model of the config lacks a parameter, or has it in another shape.
    """
    system = build(config)
    params, steps = dict(weights.params), dict(weights.steps)
    for name, stage in system.stages.items():
        if name in system.parts:
            steps.pop(name, None)
            continue
        fresh = jax.jit(stage.init)(jax.random.key(config.seed))
        if "base" in stage.encoder_shapes:
            params[name], steps[name] = fresh, 0
            print(f"{name} restarts at step 0: its adapters are freshly initialized")
            continue
        stored, wanted = named_leaves(weights.params[name]), named_leaves(fresh)
        known = {path: x for path, x in wanted.items() if path in stored}
        checkpoint.check_arrays(f"the weights of {name}", stored, known, dtypes=False)
        if added := sorted(set(wanted) - set(stored)):
            params[name] = jax.tree_util.tree_map_with_path(lambda p, x, have=stored: have.get(path_name(p), x), fresh)
            steps[name] = 0
            print(f"{name} restarts at step 0: {len(added)} parameters are freshly initialized, first {added[0]}")
    return folder.Weights(system, params, steps)


def check_changes(trained_with, weights):
    """Prints the settings in which the new run differs from the training of the weights. trained_with: its config.

    Raises UserError for a setting without which the weights of a stage that goes on have no meaning.
    """
    now = record.of(weights.system.config)
    settings.check_steps(weights.steps, now, "done in the weights", "--restart=STAGE")
    before = record.of(trained_with)
    if weights.steps["denoiser"]:
        settings.check_diffusion(before, now, "give the old value, or --restart=denoiser")
    for key, (old, new) in settings.differences(before, now).items():
        row = settings.setting(key)
        if row is None or row.rule != settings.FREE:
            print(f"{key}: {old!r} for the weights, {new!r} in the new run")


def import_weights(weights, workdir, encoders):
    """Makes the run `workdir`, whose stages have these weights and step counts, and fresh optimizers.

    encoders: `folder.encoders_hash` of the encoders that the statistics of the latents are of. With others the
        statistics are left out, and training measures them.
    """
    if any((workdir / name).exists() for name in ("config.json", *STAGES)):
        raise UserError(f"{workdir} holds a run already: give a new --workdir")
    run = record.new_number()
    for stage, step in weights.steps.items():
        state = train_state.create(weights.params[stage], weights.system.config[stage])
        with checkpoint.manager(workdir / stage / "checkpoints", run) as checkpoints:
            checkpoint.save(checkpoints, state | {"step": state["step"] + step})
            checkpoint.finish(checkpoints)
    statistics, parts = weights.params["statistics"], weights.system.parts
    if not parts or encoders == folder.encoders_hash(weights.params, parts):
        folder.write_statistics(workdir / folder.STATISTICS, statistics, weights.params, run, parts)
    record.begin(workdir, run, weights.system.config)  # last: without config.json a folder is no run
    print(f"made {workdir}: " + ", ".join(f"{stage} at step {step}" for stage, step in weights.steps.items()))


def define_flags():
    cli.define_config()
    cli.define_parts()
    flags.DEFINE_string("workdir", None, "Folder of the run: export reads it, import makes it.")
    flags.DEFINE_string("out", None, "Folder that export writes the weights to.")
    flags.DEFINE_string("weights", None, "Folder of exported weights that import reads, or 'reference'.")
    flags.DEFINE_string("license", "", "Identifier of the license, which export writes into the model card.")
    flags.DEFINE_string("report", None, "metrics.json of evaluate, whose outcomes export writes into the model card.")
    flags.DEFINE_multi_enum("restart", [], STAGES, "Stage that import sets to step 0, to train it from its weights.")
    flags.DEFINE_bool("adapters", False, "Export the adapters of a run alone (config.denoiser.lora), not merged.")
    flags.DEFINE_bool("unverified", False, "Accept weights without checksums.txt; verify accepts checkpoints, too.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
