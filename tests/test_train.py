"""Training as a user runs it: from start to end, killed and started again, and with wrong input."""

import hashlib
import json
import shutil
import sys
import time

import jax
import numpy as np
import pytest

from tests import tiny
from tests.helpers import finish, start
from vdm_jax import checkpoint, stages, train, train_state

CONFIG = "--config=tests/tiny.py"
STEPS = 40  # of the denoiser, so that there is time to kill it


def run(workdir, *options, seconds=1200, **environment):
    """-> (exit code, lines on stderr) of `python -m vdm_jax.train`."""
    process = start("-m", "vdm_jax.train", CONFIG, f"--workdir={workdir}", *options, **environment)
    code, out, err = finish(process, seconds)
    assert not out
    return code, err


def lines(workdir, stage):
    return [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]


def files(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def final_state(workdir, stage):
    """The newest train state of a stage, on the host."""
    config = tiny.get_config()
    params = stages.abstract_params(config)[stage]
    abstract = jax.eval_shape(lambda p: train_state.create(p, config[stage]), params)
    with checkpoint.manager(workdir / stage / "checkpoints") as checkpoints:
        return jax.device_get(checkpoint.restore(checkpoints, abstract))


def test_a_run_from_start_to_end_then_killed_and_resumed(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    longer = f"--config.denoiser.steps={STEPS}"

    # ------------------------------------------------------------------------------------------- all four stages
    code, err = run(whole, longer)
    assert code == 0, "\n".join(err)
    begun = [next(i for i, line in enumerate(err) if f"{stage}: " in line) for stage in checkpoint.STAGES]
    assert begun == sorted(begun)
    config = checkpoint.load_config(whole / "config.json")
    assert config.denoiser.steps == STEPS and config.clip.to_dict() == tiny.get_config().clip.to_dict()
    for stage in checkpoint.STAGES:
        steps = config[stage].steps
        kept = lines(whole, stage)
        assert [line["step"] for line in kept] == list(range(1, steps + 1))
        assert all(np.isfinite(line["loss"]) and line["step_seconds"] > 0 for line in kept)
        folders = sorted(int(p.name) for p in (whole / stage / "checkpoints").iterdir())
        assert folders == [steps - 4, steps]
        assert list((whole / stage).glob("events.out.tfevents.*"))
        state = final_state(whole, stage)
        assert state["step"] == steps
        assert not all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state["params"], state["ema"]))))
    previews = {p.relative_to(whole).as_posix() for p in whole.rglob("previews/*")}
    expected = {"video_autoencoder/previews/8.png", "audio_autoencoder/previews/8.png"}
    assert previews == expected | {f"denoiser/previews/{STEPS}.png", f"denoiser/previews/{STEPS}.mp4"}
    assert (whole / "denoiser" / "statistics.json").exists()

    # ------------------------------------------------------------------------------------- a second call does nothing
    before = files(whole)
    code, err = run(whole, longer)
    assert code == 0 and sum(f"{n} of {n} steps done" in line for line in err for n in (8, STEPS)) == 4
    assert files(whole) == before

    # ---------------------------------------------------------------------------------- killed in the middle of a stage
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns("denoiser"))
    process = start("-m", "vdm_jax.train", CONFIG, f"--workdir={killed}", longer)
    log, patience = killed / "denoiser" / "metrics.jsonl", time.monotonic() + 1200
    while not log.exists() or log.read_text().count("\n") < 10:
        assert process.poll() is None and time.monotonic() < patience, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    reached = len(lines(killed, "denoiser"))
    assert process.returncode == -9 and 10 <= reached < STEPS
    with open(log, "a") as file:
        file.write('{"step": 40, "lo')  # a line that was cut off

    code, err = run(killed, longer)
    assert code == 0, "\n".join(err)
    (told,) = [line for line in err if "denoiser: " in line]
    done = int(told.split(", ")[1].split(" of ")[0])
    assert 0 < done <= reached and done % 4 == 0
    assert not any("measuring" in line or "encoding" in line for line in err)  # that was kept
    resumed = lines(killed, "denoiser")
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in resumed] == [line["loss"] for line in lines(whole, "denoiser")]
    states = [final_state(folder, "denoiser") for folder in (killed, whole)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert not list(killed.rglob("*.orbax-checkpoint-tmp"))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    options = "--stage=audio_autoencoder", "--config.audio_autoencoder.learning_rate=1e30"
    code, err = run(tmp_path, *options)
    assert code == 2 and not any("Traceback" in line for line in err)
    assert "error: audio_autoencoder: the loss is nan at step" in err[-1]
    assert "lower audio_autoencoder.learning_rate" in err[-1]
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
    "no steps": ((CONFIG, "--workdir=DIR", "--config.clip.steps=0"), "clip.steps=0 must be at least 1"),
    "no saves": ((CONFIG, "--workdir=DIR", "--config.checkpoint_every=0"), "checkpoint_every=0 must be at least 1"),
    "no clips": ((CONFIG, "--workdir=DIR", "--config.clip.batch_size=0"), "batch_size=0 must be at least 1"),
    "too many devices": ((CONFIG, "--workdir=DIR", "--config.mesh.fsdp=64"), "does not fill"),
    "sizes": ((CONFIG, "--workdir=DIR", "--config.data.size=18"), "data.size=18 is not a multiple of 4: use 16"),
    "no such data": ((CONFIG, "--workdir=DIR", "--config.data.source=wrld"), "use world, files or tfds"),
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


@pytest.mark.parametrize(
    "option, words",
    [
        ("--config.audio_autoencoder.model.latent_channels=8", "begun with another audio_autoencoder.model"),
        ("--config.data.fps=4", "begun with data.fps=8"),
        ("--config.data.text_length=64", "begun with data.text_length=96"),
    ],
)
def test_a_run_goes_on_with_its_own_models_only(command, tiny_run, option, words):
    before = (tiny_run / "config.json").read_text()
    done = command(train, CONFIG, f"--workdir={tiny_run}", option)
    assert done.code == 2 and len(done.err) == 1 and words in done.err[0]
    assert (tiny_run / "config.json").read_text() == before


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
        code, out, err = finish(process, 300)
        assert code == 2 and not out and len(err) == 1 and words in err[0], err
