"""A command called inside a process, as notebooks do; a machine without its accelerator; output that nobody reads."""

import io
import os
import subprocess
import sys

import jax
import pytest
from absl import flags

from tests.helpers import ROOT, finish, start
from vdm_jax import bench, dry_run, evaluate, load, overview, sample, train, weights
from vdm_jax.errors import UserError
from vdm_jax.run import cli

CONFIG = "--config=tests/tiny.py"


def test_a_script_can_be_called_again_and_again(capsys):
    before = set(flags.FLAGS)
    for chips, told in ((2, "mesh     data=2,"), (8, "mesh     data=8,")):
        cli.call(overview, CONFIG, "--stage=clip", f"--chips={chips}")
        assert told in capsys.readouterr().out
    cli.call(overview, CONFIG, "--stage=clip")
    assert "mesh" not in capsys.readouterr().out  # an option of an earlier call is forgotten
    with pytest.raises(UserError, match="--stage"):
        cli.call(overview, CONFIG, "--stage=all_of_them")
    with pytest.raises(UserError, match="nosuch"):
        cli.call(overview, CONFIG, "--config.nosuch=1")
    assert set(flags.FLAGS) == before


# -------------------------------------------------------------------------------------------------------- the machine

COMMANDS = {
    train: (CONFIG, "--workdir=DIR/run"),
    sample: ("--prompt=x", "--out=DIR/x.mp4"),
    evaluate: ("--out=DIR/report",),
    bench: (CONFIG,),
    weights: ("import", "--weights=reference", "--workdir=DIR/run"),
}


@pytest.mark.parametrize("script", COMMANDS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("error", [RuntimeError("in use by process 7 (set JAX_PLATFORMS='' to x)"), AssertionError()])
def test_an_accelerator_that_is_absent_or_busy_is_named(command, monkeypatch, tmp_path, script, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    done = command(script, *(option.replace("DIR", str(tmp_path)) for option in COMMANDS[script]))
    assert done.code == 2 and len(done.err) == 1
    assert done.err[0].startswith("error: JAX_PLATFORMS=") and "JAX_PLATFORMS=cpu" in done.err[0]
    assert ("(in use by process 7)" if str(error) else "(its package is not installed)") in done.err[0]
    assert not list(tmp_path.iterdir())


def test_jax_names_a_missing_accelerator_as_expected():
    code, _, lines = finish(start("-c", "import vdm_jax.sharding as s; s.find_devices()", JAX_PLATFORMS="rocm"), 120)
    assert code and "UserError: JAX_PLATFORMS=rocm: no device is ready" in lines[-1]


def test_a_name_that_the_terminal_cannot_show_is_no_error():
    shown = io.BytesIO()
    stream = cli._Stream(io.TextIOWrapper(shown, "ascii"))
    assert stream.write("wrote caf\xe9/\udcff\n") == 13
    stream.flush()
    assert shown.getvalue() == b"wrote caf\\xe9/\\udcff\n"


def test_too_little_memory_is_one_line(command, monkeypatch):
    def main(argv):
        raise jax.errors.JaxRuntimeError(fault)

    monkeypatch.setattr(overview, "main", main)
    fault = "RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nand more"
    done = command(overview)
    assert done.code == 2 and len(done.err) == 1 and "too little memory" in done.err[0] and "7 bytes" in done.err[0]
    fault = "INTERNAL: a bug"
    with pytest.raises(jax.errors.JaxRuntimeError):
        overview.main([])


# ---------------------------------------------------------------------------------------------------- numbers and names

HUGE, LONG = "100000000000000000000", "x" * 5000
SILLY = {  # command -> its options, one of them silly
    sample: [
        *(f"--steps={value}" for value in (HUGE, "1e20", "nan", "-1", "0", "")),
        *(f"--guidance={value}" for value in ("1e30", "-1e30", "nan", "inf", "")),
        *(f"--guidance.{key}=1e30" for key in ("history", "modality", "text_continue", "text_cross_modal")),
        *(f"--seconds={value}" for value in ("1e20", "-1", "0", "nan", "inf", "")),
        *(f"--lag={value}" for value in (HUGE, "-1", "nan")),
        *(f"--{key}_noise={value}" for key in ("context", "history") for value in ("1e20", "-1", "nan")),
        *(f"--seed={value}" for value in (HUGE, "-1")),
        *("--processes=" + value for value in (HUGE, "-1")),
        *(f"--image={value}" for value in ("", "/", LONG)),
        "--between=a", "--between=" + ",".join("x" * 10000), "--weights=", f"--weights={LONG}",
    ],
    evaluate: [f"--count={HUGE}", "--count=-1", "--count=nan", "--samplers=ddim:1e5", f"--samplers=ddim:{HUGE}"],
    bench: [f"--steps={HUGE}", "--repeats=-1", f"--repeats={HUGE}"],
    dry_run: ["--mfu=nan", f"--rows={HUGE}", "--rows=0", "--topology="],
    overview: [f"--chips={HUGE}", "--chips=-1"],
    train: ["--profile=", "--profile=1:\u00b2", f"--workdir={LONG}", "--stage="],
}  # fmt: skip
COMMON = {
    sample: ("--prompt=x", "--out=DIR/x.mp4"),
    evaluate: ("--out=DIR/report",),
    bench: (CONFIG, "--part=sample"),
    dry_run: (CONFIG, "--topology=v5e:2x2", "--part=sample"),
    overview: (CONFIG,),
    train: (CONFIG, "--workdir=DIR/run"),
}


@pytest.mark.parametrize("script", SILLY, ids=lambda script: script.__name__)
def test_numbers_and_names_without_sense_are_one_line(command, monkeypatch, tiny_run, tmp_path, script):
    if script is sample:  # the run is read once
        pipe = load(tiny_run)
        settings = pipe.config.sample.copy_and_resolve_references()

        def read_again(*arguments, **options):
            pipe.config.sample.update(settings)
            return pipe if os.path.exists(arguments[0] or "") else load(*arguments, **options)

        monkeypatch.setattr(sample, "load", read_again)
    for silly in SILLY[script]:
        options = [option.replace("DIR", str(tmp_path)) for option in COMMON[script]]
        options += [f"--workdir={tiny_run}"] * (script is sample and "--weights" not in silly)
        done = command(script, *options, silly)
        assert done.code == 2 and done.err[-1].startswith("error: "), (silly, done.err)
        assert not any("Traceback" in line for line in done.err), (silly, done.err)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- the streams

TALK = """
import logging, os, sys
from vdm_jax.errors import UserError
from vdm_jax.run import cli, progress
def main(argv):
    for number in range(3):
        logging.getLogger("vdm_jax").info("a line")
        print("a line", flush=number < 2)
        with progress.progress("steps", 2, "step") as advance:
            advance(1)
    opened = os.open(argv[1], os.O_CREAT | os.O_WRONLY)
    assert opened > 2  # no library writes its messages to this file
    raise UserError("the end")
cli.run(main)
"""


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "2>&1 | true", "2>/dev/full >/dev/full"])
def test_closed_and_broken_streams_end_no_run(tmp_path, streams):
    shell = f'"$0" -c "$1" "$2" {streams}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", shell, sys.executable, TALK, tmp_path / "reached"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 2 and b"Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "reached").exists()
