"""Training as a user runs it: from start to end, killed and started again, and with wrong input."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from tests import tiny
from tests.helpers import digest, final_state, finish, start
from vdm_jax import train, train_state
from vdm_jax.data import batches, world
from vdm_jax.run import folder as run_folder
from vdm_jax.run import preemption
from vdm_jax.system import latents
from vdm_jax.system.layout import STAGES

CONFIG = "--config=tests/tiny.py"
STEPS = dict.fromkeys(STAGES, 8) | {"denoiser": 40}  # so that there is time to kill it
WHOLE = (f"{CONFIG}:hard_negatives", f"--config.denoiser.steps={STEPS['denoiser']}")


def lines(workdir, stage):
    return [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]


def files(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """(folder, lines on stderr) of a run of all four stages that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = finish(start("-m", "vdm_jax.train", *WHOLE, f"--workdir={workdir}"))
    assert code == 0 and not out, "\n".join(err)
    return workdir, err


def test_a_run_from_start_to_end_then_killed_and_resumed(command, whole_run, tmp_path):
    (whole, err), killed = whole_run, tmp_path / "killed"

    # ------------------------------------------------------------------------------------------- all four stages
    begun = [next(i for i, line in enumerate(err) if f"{stage}: " in line) for stage in STAGES]
    assert begun == sorted(begun)
    kept = run_folder.read_config(whole)
    assert kept.denoiser.steps == STEPS["denoiser"] and kept.clip.to_dict() == tiny.get_config().clip.to_dict()
    for stage in STAGES:
        steps = STEPS[stage]
        told = lines(whole, stage)
        assert [line["step"] for line in told] == list(range(1, steps + 1))
        assert all(np.isfinite(line["loss"]) and line["step_seconds"] > 0 for line in told)
        folders = sorted(int(p.name) for p in (whole / stage / "checkpoints").iterdir())
        assert folders == [steps - 4, steps]
        assert list((whole / stage).glob("events.out.tfevents.*"))
        state = final_state(whole, stage, tiny.get_config())
        assert state["step"] == steps
        assert not all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state["params"], state["ema"]))))
    shown = {
        "video_autoencoder": {"contact_sheet.png", *(f"{i:03d}.mp4" for i in range(8))},
        "audio_autoencoder": {"spectrogram.png", *(f"{i:03d}.wav" for i in range(8))},
        "clip": set(),
        "denoiser": {"contact_sheet.png", "spectrogram.png", *(f"{i:03d}.mp4" for i in range(4))},
    }
    for stage, names in shown.items():
        files_of = {p.relative_to(whole / stage).as_posix() for p in (whole / stage).rglob("previews/*/*")}
        assert files_of == {f"previews/{step}/{name}" for step in (0, STEPS[stage]) for name in names}
        validated = [json.loads(line) for line in (whole / stage / "validation.jsonl").read_text().splitlines()]
        assert [line["step"] for line in validated] == [0, STEPS[stage]]
        first, last = ({key: line[key] for key in line if key != "step"} for line in validated)
        assert first and first != last and all(np.isfinite([*first.values(), *last.values()]))
    assert (whole / "denoiser" / "statistics.json").exists()

    # ---------------------------------------------------------------------- a second call does nothing, and is recorded
    before = files(whole)
    done = command(train, *WHOLE, f"--workdir={whole}")
    assert done.code == 0 and sum(f"{n} of {n} steps done" in line for line in done.err for n in (8, 40)) == 4
    told = json.loads((whole / "starts.jsonl").read_text())
    assert told["changed"] == {} and told["steps"] == STEPS
    record = {whole / name for name in ("starts.jsonl", "config.json")}
    assert {path: content for path, content in files(whole).items() if path not in record} == {
        path: content for path, content in before.items() if path not in record
    }

    # ---------------------------------------------------------------------------------- killed in the middle of a stage
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns("denoiser"))
    process = start("-m", "vdm_jax.train", *WHOLE, f"--workdir={killed}")
    log, patience = killed / "denoiser" / "metrics.jsonl", time.monotonic() + 1200
    while not log.exists() or log.read_text().count("\n") < 10:
        assert process.poll() is None and time.monotonic() < patience, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    reached = len(lines(killed, "denoiser"))
    assert process.returncode == -9 and 10 <= reached < STEPS["denoiser"]
    with open(log, "a") as file:
        file.write('{"step": 40, "lo')  # a line that was cut off

    resumed = command(train, *WHOLE, f"--workdir={killed}")
    assert resumed.code == 0, resumed.err
    (told,) = [line for line in resumed.err if "denoiser: " in line]
    done = int(told.split(", ")[1].split(" of ")[0])
    assert 0 < done <= reached and done % 4 == 0
    assert not any("measuring" in line or "encoding" in line for line in resumed.err)  # that was kept
    logged = lines(killed, "denoiser")
    assert [line["step"] for line in logged] == list(range(1, 41))
    assert [line["loss"] for line in logged] == [line["loss"] for line in lines(whole, "denoiser")]
    states = [final_state(folder, "denoiser", tiny.get_config()) for folder in (killed, whole)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert not list(killed.rglob("*.orbax-checkpoint-tmp"))


@pytest.fixture
def reading(monkeypatch):
    """call(function): training data, encoded or not, is from now on function(item) of what it was."""
    originals = [(world.World, "__getitem__"), (latents.Encoded, "take")]
    originals = [(kind, name, getattr(kind, name)) for kind, name in originals]

    def call(function):
        for kind, name, original in originals:
            monkeypatch.setattr(kind, name, lambda self, i, get=original: function(get(self, i)))

    return call


OPTIONS = (CONFIG, "--config.validation.every=0", "--config.log_every=3")


def without(whole, stage, workdir):
    """A copy of a run in which a stage has not begun; what the denoiser prepares is kept."""
    keep = ("latents", "statistics.json")
    shutil.copytree(whole, workdir, ignore=lambda folder, names: [stage] if folder == str(whole) else [])
    for path in [p for p in (whole / stage).iterdir() if p.name in keep]:
        (workdir / stage).mkdir(exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, workdir / stage / path.name)
    return workdir


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_ends_a_run_and_the_next_goes_on_from_there(command, reading, whole_run, tmp_path, stage):
    (whole, _), number, steps = whole_run, preemption.SIGNALS[STAGES.index(stage) % 2], STEPS[stage]
    workdir = without(whole, stage, tmp_path / "run")
    options = (*WHOLE, *OPTIONS[1:], "--config.checkpoint_every=20", f"--workdir={workdir}")
    handlers = [signal.getsignal(n) for n in preemption.SIGNALS]
    read, seventh = itertools.count(), 6 if stage == "denoiser" else 25  # encoded clips are read by the batch

    def send(item):
        if next(read) == seventh:  # of the batches, which may be read ahead
            os.kill(os.getpid(), number)
        return item

    reading(send)
    done = command(train, *options, f"--stage={stage}")
    assert done.code == 0 and not any("error" in line for line in done.err), done.err
    assert any(signal.Signals(number).name in line for line in done.err)
    (told,) = [line for line in done.err if "stopped at step" in line]
    step = int(told.split("stopped at step ")[1].split(",")[0])
    assert 1 <= step <= 7 and run_folder.newest_step(workdir, stage) == step
    assert lines(workdir, stage)[-1]["step"] == step
    assert json.loads((workdir / "heartbeat.json").read_text())["step"] == step

    reading(lambda item: item)
    done = command(train, *options)
    assert done.code == 0
    assert any(f"{stage}: " in line and f"{step} of {steps} steps done" in line for line in done.err)
    numbers = [line["step"] for line in lines(workdir, stage)]
    assert numbers == sorted(set(numbers)) and numbers[-1] == steps and step in numbers
    config = tiny.get_config()
    assert digest(final_state(workdir, stage, config)) == digest(final_state(whole, stage, config))
    assert [signal.getsignal(n) for n in preemption.SIGNALS] == handlers


def test_bad_steps_are_skipped_counted_and_named(command, reading, tmp_path):
    stage, config, workdir = "audio_autoencoder", tiny.get_config(), tmp_path / "run"
    ids = batches.sample_ids([batches.source(config)], [1], batch_size=4, seed=config.seed, step=4)
    bad = batches.source(config)[ids[1]]["video"]

    def spoil(item):
        return {**item, "audio": item["audio"] * np.nan} if np.array_equal(item["video"], bad) else item

    reading(spoil)
    done = command(train, *OPTIONS, f"--workdir={workdir}", f"--stage={stage}")
    assert done.code == 0
    (told,) = [line for line in done.err if "is skipped" in line]
    assert f"step 5 is skipped (loss nan, gradient norm nan), its samples are {ids}" in told
    kept = lines(workdir, stage)
    assert [line["skipped"] for line in kept] == [0, 0, 1, 0] and [line["step"] for line in kept] == [3, 4, 6, 8]
    assert all(np.isfinite(line["loss"]) for line in kept)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(final_state(workdir, stage, config)))

    # ------------------------------------------------------------------------ too many in a row, from the fifth step on
    shutil.rmtree(workdir / stage)
    read = itertools.count()
    reading(lambda item: {**item, "audio": item["audio"] * (np.nan if next(read) >= 16 else 1)})
    options = (*OPTIONS, "--config.skip.stop_after=3", "--config.data.threads=1", "--config.checkpoint_every=2")
    done = command(train, *options, f"--workdir={workdir}", f"--stage={stage}")
    assert done.code == 2 and done.err[-1].startswith("error: ")
    assert "audio_autoencoder: 3 steps in a row were skipped, from step 5 on (loss nan" in done.err[-1]
    assert "the newest checkpoint is of step 4" in done.err[-1]
    assert run_folder.newest_step(workdir, stage) == 4  # the saves of step 6 and 8 were not made


@pytest.mark.parametrize("fault", ["state", "folder"])
def test_a_spoiled_state_and_a_lost_folder_end_the_run(command, reading, monkeypatch, tmp_path, fault):
    stage, workdir, read = "audio_autoencoder", tmp_path / "run", itertools.count()
    if fault == "state":
        monkeypatch.setattr(train_state, "finite", lambda state: {"params": state["step"] < 3, "ema": True})
        every, expected = 2, "step 4 is not saved, because numbers in params are not finite; the newest checkpoint is"
    else:
        every, expected = 8, f"cannot write in {workdir}: it, or a part of it, was deleted, moved or replaced; there is"

    def lose(item):
        if next(read) == 8 and fault == "folder":
            workdir.rename(tmp_path / "elsewhere")
        return item

    reading(lose)
    options = (*OPTIONS, "--config.data.threads=1", f"--config.checkpoint_every={every}")
    done = command(train, *options, f"--workdir={workdir}", f"--stage={stage}")
    assert done.code == 2 and expected in done.err[-1] and done.err[-1].startswith("error: ")
    assert not any("Traceback" in line for line in done.err), "\n".join(done.err)
    assert run_folder.newest_step(workdir, stage) == (2 if fault == "state" else None)
    assert workdir.exists() == (fault == "state")


def test_a_loss_that_is_not_finite_ends_the_run(command, tmp_path):
    options = "--stage=audio_autoencoder", "--config.audio_autoencoder.learning_rate=1e30", "--config.skip.stop_after=3"
    done = command(train, CONFIG, f"--workdir={tmp_path}", *options)
    assert done.code == 2 and not done.out and not any("Traceback" in line for line in done.err)
    assert "error: audio_autoencoder: 3 steps in a row were skipped, from step" in done.err[-1]
    assert "lower audio_autoencoder.learning_rate" in done.err[-1]
    json.loads((tmp_path / "audio_autoencoder" / "metrics.jsonl").read_text().splitlines()[-1])  # nan is no JSON


# ---------------------------------------------------------------------------------------------------- wrong input


WRONG = {  # options -> what the line says
    "no workdir": ((CONFIG,), "give both --config=FILE and --workdir=DIR"),
    "no recipe": (("--workdir=DIR",), "give both --config=FILE and --workdir=DIR"),
    "a recipe that is not there": (("--config=tests/none.py", "--workdir=DIR"), "cannot read the recipe"),
    "a recipe with a slip of the pen": (("--config=SLIP", "--workdir=DIR"), "SyntaxError"),
    "a recipe that raises": (("--config=RAISES", "--workdir=DIR"), "the recipe is broken: ValueError: no good"),
    "a recipe without settings": (("--config=EMPTY", "--workdir=DIR"), "get_config"),
    "a mistyped key": ((CONFIG, "--workdir=DIR", "--config.denoiser.stps=5"), 'Did you mean "steps"'),
    "a mistyped part": ((CONFIG, "--workdir=DIR", "--config.denoyser.steps=5"), 'Did you mean "denoiser"'),
    "a word for a number": ((CONFIG, "--workdir=DIR", "--config.denoiser.steps=many"), "--config.denoiser.steps=many"),
    "a mistyped option": ((CONFIG, "--wrkdir=DIR"), "Did you mean: workdir"),
    "a stage that is none": ((CONFIG, "--workdir=DIR", "--stage=clop"), "video_autoencoder|audio_autoencoder|clip"),
    "a loose word": ((CONFIG, "--workdir=DIR", "clip"), "unexpected argument 'clip'"),
    "no steps": (
        (CONFIG, "--workdir=DIR", "--config.clip.steps=0"),
        "clip.steps=0 must be a whole number from 1 to 2147483647",
    ),
    "no saves": (
        (CONFIG, "--workdir=DIR", "--config.checkpoint_every=0"),
        "checkpoint_every=0 must be a whole number of at least 1",
    ),
    "no clips": (
        (CONFIG, "--workdir=DIR", "--config.clip.batch_size=0"),
        "clip.batch_size=0 must be a whole number of at least 1",
    ),
    "too many devices": ((CONFIG, "--workdir=DIR", "--config.mesh.fsdp=64"), "does not fill"),
    "sizes": (
        (CONFIG, "--workdir=DIR", "--config.data.size=18,16"),
        "data.size=(18, 16) is not a multiple of 4: use (16, 16)",
    ),
    "too many layers": ((CONFIG, "--workdir=DIR", "--config.clip.model.text.layers=9999"), "from 0 to 1000"),
    "no stride": ((CONFIG, "--workdir=DIR", "--config.video_autoencoder.model.time_strides=(0,)"), "from 1 to 1000000"),
    "no such data": ((CONFIG, "--workdir=DIR", "--config.data.source=wrld"), "must be world, files, tfds or doom"),
    "a file for a folder": ((CONFIG, "--workdir=EMPTY"), "cannot write to --workdir"),
    "denoiser first": ((CONFIG, "--workdir=DIR", "--stage=denoiser"), "stage video_autoencoder has no checkpoint"),
}


@pytest.mark.parametrize("options, words", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line(command, monkeypatch, tmp_path, options, words):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the recipe of the test before
    recipes = {
        "SLIP": "def get_config(:\n",
        "RAISES": "def get_config():\n    raise ValueError('no good')\n",
        "EMPTY": "",
    }
    for name, content in recipes.items():
        (tmp_path / name).write_text(content)
    for name in ("DIR", *recipes):
        options = [option.replace(name, str(tmp_path / name)) for option in options]
    done = command(train, *options)
    (line,) = [line for line in done.err if line.startswith("error: ")]
    assert done.code == 2 and words in line and line == done.err[-1]
    if "--stage=denoiser" not in options:
        assert len(done.err) == 1 and not (tmp_path / "DIR").exists()  # told before anything is written


def test_a_folder_is_for_one_training_at_a_time(command, tiny_run):
    with run_folder.exclusive_lock(epath.Path(tiny_run)):
        before = files(tiny_run)
        done = command(train, CONFIG, f"--workdir={tiny_run}", "--stage=clip")
        assert files(tiny_run) == before
    assert done.code == 2 and len(done.err) == 1 and "another training is running" in done.err[0]
    with run_folder.exclusive_lock(epath.Path(tiny_run)):  # and free again
        pass


def test_one_line_and_exit_code_2_from_a_shell(tmp_path):
    cases = {
        ("--config.denoiser.stps=5",): 'Did you mean "steps" instead of "stps"?',
        ("--config.clip.batch_size=3",): "batch_size=3 does not divide over 2 device groups (data x fsdp): use 2 or 4",
    }
    started = [
        start("-m", "vdm_jax.train", CONFIG, f"--workdir={tmp_path / 'run'}", *options, JAX_NUM_CPU_DEVICES="2")
        for options in cases
    ]
    for process, words in zip(started, cases.values()):
        code, out, err = finish(process)
        assert code == 2 and not out and len(err) == 1 and words in err[0], err
