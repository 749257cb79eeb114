"""Cuts videos into clips once, so that training reads them without decoding: a data set of TFDS, without TensorFlow.

    python -m vdm_jax.prepare --config=configs/files.py --source=FOLDER --out=DIR [--drop=still,black,silent]
    python -m vdm_jax.prepare --config=configs/files.py --source=tfds:NAME --out=DIR
    python -m vdm_jax.prepare --config=configs/files.py --source=FOLDER --out=DIR -- --direct_num_workers=2 \\
        --direct_running_mode=multi_processing
    python -m vdm_jax.prepare --config=configs/files.py --latents --workdir=RUN --out=DIR [--source=FOLDER]

The recipe's data.size, data.fps and data.sample_rate are those of the clips. A new clip begins where the scene changes.
Clips that come twice are left out. What was done with each file is told by DIR/report.json and DIR/report.html. A run
that was interrupted goes on, and a finished one is not done again.

With --latents the clips of a training are encoded instead: denoiser.cached_clips windows of the source, with the codecs
and the text encoder of the run. Train with --config.denoiser.latents=DIR. A training refuses latents of other encoders,
of other data or of other settings, and says which.

Flags after a lone -- are Apache Beam's: --runner=DataflowRunner, FlinkRunner, SparkRunner and their own.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import re

import jax
from absl import flags

from vdm_jax import settings, sharding
from vdm_jax.data import batches, prepared, summary, tfds, whole
from vdm_jax.errors import UserError, one_of
from vdm_jax.metrics import report
from vdm_jax.run import cli, folder, storage
from vdm_jax.system import build, latents
from vdm_jax.system.parts import with_hashes

logger = logging.getLogger("vdm_jax")

PARTS = "parts"  # folder in DIR of what is done, until all is
HASHES = "sources.json"  # in DIR: the videos' hashes, with their sizes and times
LOCAL = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
REPORTS = ("report.json", "report.html")
FIX = "give another --out, or remove this folder"


def main(argv):
    options = flags.FLAGS
    config = _recipe(options, argv)
    if options.latents:
        store_latents(options, config)
        return
    beam, beam_options = _beam(argv[1:])
    how = prepared.Settings(config.data.to_dict(), options.scene_threshold, options.max_seconds, tuple(options.drop))
    out = storage.make_folder(options.out)
    known = _known(out)
    videos, found, hashes = whole.read(config, known)
    keys = [how.key(video) for video in videos]
    facts = {
        "fps": config.data.fps,
        "sample_rate": config.data.sample_rate,
        "settings": how.facts(),
        "sources": hashlib.sha256(json.dumps([video[:4] for video in videos]).encode()).hexdigest(),
    }
    if _is_done(out, facts):
        print(f"{out} is this data set already: nothing is done. {_usage(out)}")
        return
    if hashes != known:
        storage.replace(out / HASHES, json.dumps(storage.seal({"files": hashes})) + "\n")

    first = {}  # {SHA-256: number of the first video that has it}
    for number, video in enumerate(videos):
        first.setdefault(video.sha256, number)
    unique = sorted(first.values())
    parts = storage.make_folder(out / PARTS)
    todo = [videos[n] for n in unique if prepared.read_rows(parts, keys[n]) is None]
    if len(todo) < len(unique):
        logger.info("%d of %d videos were done before", len(unique) - len(todo), len(unique))
    if todo:
        with _told_in_a_line(), beam.Pipeline(options=beam_options) as pipeline:
            write = functools.partial(prepared.write_clips_of, folder=os.fspath(parts), settings=tuple(how))
            (
                pipeline
                | beam.Create([tuple(video) for video in todo])
                | beam.Reshuffle()
                | "WriteClips" >> beam.Map(write)
            )

    chosen, numbers = _choose(videos, keys, unique, parts)
    numbers = {"found": found, **numbers, "settings": how.facts()}
    _write_report(out, numbers)
    if not any(chosen.values()):
        raise UserError(f"no clip is left of {len(videos)} videos, see {out / REPORTS[0]}: drop less, or add videos")
    prepared.merge(out, parts, chosen, tuple(config.data.size))
    storage.write_json(out / tfds.PREPARED, {**facts, "splits": [name for name, clips in chosen.items() if clips]})
    parts.rmtree()
    print(f"{numbers['clips']['kept']} clips of {len(videos)} videos are in {out}. {_usage(out)}")


def store_latents(options, config):
    """Encodes the clips on which the denoiser of a run will be trained. Goes on where it was ended."""
    if not options.workdir:
        raise UserError("--workdir=RUN is missing: name the run whose codecs and text encoder encode the clips")
    if config.denoiser.phases or not config.denoiser.cached_clips:
        raise UserError(
            "--latents wants a recipe without denoiser.phases, and a number of clips, such as "
            "--config.denoiser.cached_clips=4096"
        )
    config.denoiser.latents = options.out
    cli.use_cache(config)
    system = build(with_hashes(config))
    systems, workdir = system.in_buckets("denoiser"), storage.given(options.workdir)
    mesh = sharding.make_mesh(config.mesh)
    examples = []
    for own in systems:
        stage = own.stages["denoiser"]
        source = batches.source(own.config, in_bucket=own is not system, frames=stage.clip_frames)
        examples.append(batches.Examples(source, own.tokenize, stage.make_hard_negative))
    with folder.exclusive_lock(workdir), jax.set_mesh(mesh):
        run = folder.write_config(workdir, system.config, ["denoiser"], False, False)
        latents.prepare(systems, workdir, examples, mesh, run, store=True)
    print(
        f"{config.denoiser.cached_clips} clips are in {options.out}. Train with --config.denoiser.latents={options.out}"
    )


def _recipe(options, argv):
    """Returns the config with the source of the flag --source. Raises UserError."""
    config = cli.recipe(argv[:1])
    if options.out is None:
        raise UserError("--out=DIR is missing: name the folder of the data set")
    for name in options.drop:
        one_of("--drop", name, tuple(prepared.DROPS))
    if options.source in ("world", "doom"):
        config.data.source = options.source
    elif options.source and options.source.startswith("tfds:"):
        config.data.source, config.data.tfds.name = "tfds", options.source.removeprefix("tfds:")
    elif options.source:
        config.data.source, config.data.path = "files", options.source
    settings.check(config.to_dict())
    if config.data.source == "files" and storage.in_bucket(config.data.path):
        raise UserError(
            f"{config.data.path} is in a bucket, and videos are read from a disk: mount it, e.g. by gcsfuse"
        )
    return config


def _beam(words):
    """Returns (the package, its options of the words after --). Raises UserError."""
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: flags of Beam follow a lone --, as --name=value")
    try:
        import apache_beam
    except ImportError:
        raise UserError('prepare runs on Apache Beam: pip install -e ".[prepare]"') from None
    logging.getLogger("apache_beam").setLevel(logging.ERROR)  # it tells about each worker
    # Beam's own default may look for a runner in Go, and download it.
    words = words if any(word.startswith("--runner") for word in words) else [*words, f"--runner={LOCAL}"]
    options, told = apache_beam.options.pipeline_options.PipelineOptions(words), io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            options.get_all_options()
    except SystemExit:
        raise UserError(f"Beam cannot use its flags: {told.getvalue().strip().splitlines()[-1]}") from None
    return apache_beam, options


@contextlib.contextmanager
def _told_in_a_line():
    """Turns Beam's error for a UserError in one of its workers into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = re.search(r"UserError: ([^\n]*?)(?: \[while running|\\n|\n|$)", str(error))
        if not told:
            raise
        raise UserError(told[1]) from error


def _known(out):
    """Returns the hashes of an earlier run. Raises UserError where the folder holds something else."""
    path = out / HASHES
    if not path.exists():
        files = out.iterdir() if out.exists() else ()  # a bucket has no empty folders
        if other := next((each.name for each in files if not each.name.endswith(".tmp")), None):
            raise UserError(f"{out} holds {other!r}, which is no data set of prepare: give another --out")
        return {}
    try:
        return storage.unseal(storage.read_text(path, "it is made again", most=1 << 40))["files"]
    except (KeyError, ValueError, RecursionError):
        return {}


def _is_done(out, facts):
    """Returns whether the data set of these facts is complete. Raises UserError where it is another one."""
    path = out / tfds.PREPARED
    if not path.exists():
        return False
    stored = storage.read_json(path, FIX)
    before, now = ({**each.get("settings", {}), "videos or captions": each.get("sources")} for each in (stored, facts))
    if changed := [name for name in now if before.get(name) != now[name]]:
        raise UserError(f"{out} is a data set of other {', '.join(changed)}: {FIX}")
    return True


def _choose(videos, keys, unique, parts):
    """Returns (what prepared.merge takes as `chosen`, numbers for the report)."""
    chosen, seen, dropped, faults = {"train": [], "held_out": []}, set(), {}, {"unreadable": [], "ended early": []}
    cut, seconds, kept = 0, 0.0, dict.fromkeys(chosen, 0)
    for number in unique:
        video, rows, numbers, stored = videos[number], prepared.read_rows(parts, keys[number]), [], 0
        if rows["fault"]:
            fault = "ended early" if rows["clips"] else "unreadable"
            faults[fault].append(f"{video.name} ({rows['fault']})")
        for row in rows["clips"]:
            reason = prepared.DROPS.get(row["dropped"], "")
            if not reason and row["sha256"] in seen:
                reason = prepared.DUPLICATE
            elif not reason:
                numbers.append((stored, row["bytes"]))
                seconds += row["end"] - row["start"]
            stored += not row["dropped"]
            seen |= set() if row["dropped"] else {row["sha256"]}
            if reason:
                dropped.setdefault(reason, []).append(f"{video.name} {row['start']:.2f}-{row['end']:.2f} s")
        cut += len(rows["clips"])
        kept[video.split] += len(numbers)
        chosen[video.split] += [(keys[number], numbers)] if numbers else []
    repeated = sorted(set(range(len(videos))) - set(unique))
    return chosen, {
        "videos": {
            "used": len(videos),
            "cut into clips": len(unique) - len(faults["unreadable"]),
            "the same content as an earlier file": summary.group([videos[number].name for number in repeated]),
            "unreadable": summary.group(faults["unreadable"]),
            "of these clips, ended early": summary.group(faults["ended early"]),
        },
        "clips": {
            "cut": cut,
            "kept": sum(kept.values()),
            "splits": kept,
            "hours": seconds / 3600,
            "dropped": {reason: summary.group(clips) for reason, clips in sorted(dropped.items())},
        },
    }


def _write_report(out, numbers):
    """Writes report.json and report.html."""

    def told(group):
        return [str(group["count"]), summary.first_names(group)] if isinstance(group, dict) else [str(group), ""]

    found, videos, clips = numbers["found"], numbers["videos"], numbers["clips"]
    columns = ["number", "names"]
    files = [("files found", told(found["found"])), ("used", told(found["used"]))]
    files += [(f"left out, {reason}", told(group)) for reason, group in found["left_out"].items()]
    rows = [("cut at scene changes", told(clips["cut"])), ("kept", told(clips["kept"]))]
    rows += [(f"kept, split {split}", told(count)) for split, count in clips["splits"].items()]
    rows += [(f"dropped, {reason}", told(group)) for reason, group in clips["dropped"].items()]
    facts = [(name, [str(value)]) for name, value in numbers["settings"].items()]
    tables = [
        report.html_table("Files", columns, files, "groups"),
        report.html_table("Videos", columns, [(name, told(group)) for name, group in videos.items()], "groups"),
        report.html_table("Clips", columns, rows, "groups"),
        report.html_table("How this was made", [""], facts, "settings"),
    ]
    above = "<p>Each file, video and clip is counted once: it is used or kept, or it is not, for the reason given.</p>"
    storage.replace(out / REPORTS[0], json.dumps(numbers, indent=2) + "\n")
    storage.replace(out / REPORTS[1], report.page("Prepared clips", above, tables))


def _usage(out):
    """Returns the flags with which training reads the data set."""
    splits = storage.read_json(out / tfds.PREPARED, FIX)["splits"]
    parts = {"split": "train", "held_out": "held_out"} if "held_out" in splits else {}
    chosen = {"source": "tfds", "tfds.name": out, "tfds.audio_key": "audio"}
    chosen |= {f"tfds.{name}": split for name, split in parts.items()}
    return "Train on it with " + " ".join(f"--config.data.{key}={value}" for key, value in chosen.items())


def define_flags():
    cli.define_config()
    flags.DEFINE_string("source", None, "Folder of videos, or tfds:NAME; default: that of the recipe.")
    flags.DEFINE_string("out", None, "Folder of the data set, on a disk or in a bucket.")
    flags.DEFINE_bool("latents", False, "Encode the clips of a training, with the encoders of --workdir.")
    flags.DEFINE_string("workdir", None, "Folder of the run whose encoders encode, with --latents.")
    flags.DEFINE_list("drop", [], f"What to leave out: some of {','.join(prepared.DROPS)}.")
    flags.DEFINE_float("scene_threshold", 0.08, "Change from frame to frame that begins a clip, in 0..1.", 0, 1)
    flags.DEFINE_float("max_seconds", 10.0, "Longest clip; a longer scene becomes several.", 0.01, 3600)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
