"""What a signal does to a run of one process and of two, and how one process ends when the other is lost."""

import json
import shutil
import signal
import socket
import time

import pytest

from tests.helpers import finish, start
from vdm_jax.run import checkpoint
from vdm_jax.run import folder as run_folder


def test_a_second_signal_ends_a_run_at_once_and_one_before_there_is_a_step_too(tmp_path):
    processes = {}
    for name, signals in {"second": 2, "early": 1}.items():
        process = start("-c", STUCK, name)
        assert process.stdout.readline() == "ready\n"
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            if signals == 2:
                assert "SIGTERM" in process.stderr.readline()
                signals = 0
        processes[name] = finish(process, 60)
    assert processes["second"][0] == -signal.SIGTERM
    assert processes["early"][0] == 0 and "nothing to save" in processes["early"][2][-1]


STUCK = """
import logging, sys, time
from vdm_jax.run import preemption
logging.getLogger("vdm_jax").addHandler(logging.StreamHandler())
logging.getLogger("vdm_jax").setLevel("INFO")
with preemption.watching() as stop:
    stop.after_step = sys.argv[1] == "second"
    print("ready", flush=True)
    while True:
        time.sleep(0.1)
"""


def test_a_signal_during_a_compilation_ends_the_run(tmp_path):
    options = ["--config=tests/tiny.py", f"--workdir={tmp_path / 'run'}", "--stage=video_autoencoder"]
    process = start("-m", "vdm_jax.train", *options, JAX_ENABLE_COMPILATION_CACHE="false", XLA_FLAGS="")
    while "compiling" not in (line := process.stderr.readline()):
        assert line
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process, 300)
    assert code == 0 and "SIGINT" in err[0], err


# ------------------------------------------------------------------------------------------------------ two processes

STAGE, STEPS, HEARTBEAT = "clip", 400, 10  # s

RANK = f"""
import sys
import jax
address, rank = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.distributed.initialize(address, 2, rank, heartbeat_timeout_seconds={HEARTBEAT})
from vdm_jax.run import cli
from vdm_jax import train
train.define_flags()
cli.run(train.main)
"""


def pair(workdir):
    """Starts a run of two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    options = (
        f"--config=tests/tiny.py --stage={STAGE} --config.validation.every=0 --config.{STAGE}.steps={STEPS}".split()
    )
    options += [f"--workdir={workdir}", "--config.checkpoint_every=50"]
    return [start("-c", RANK, address, rank, *options) for rank in range(2)]


def lines(workdir):
    log = workdir / STAGE / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for_steps(workdir, processes, more):
    """Waits until the run's log has `more` lines, so that it is in the middle of its steps."""
    until = time.monotonic() + 300
    while len(lines(workdir)) < more:
        assert all(process.poll() is None for process in processes), [finish(p, 60) for p in processes]
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Returns (folder, ends of its processes) of a run that ended after SIGTERM to its second process."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    processes = pair(workdir)
    wait_for_steps(workdir, processes, 20)
    processes[1].send_signal(signal.SIGTERM)
    return workdir, [finish(process, 60) for process in processes]


def test_sigterm_to_one_of_two_ends_both_at_the_same_step_saved(stopped):
    workdir, ends = stopped
    assert [code for code, _, _ in ends] == [0, 0], ends
    steps = [
        line.split("stopped at step ")[1].split(",")[0] for _, _, err in ends for line in err if "stopped at" in line
    ]
    assert len(steps) == 2 and steps[0] == steps[1]
    assert run_folder.newest_step(workdir, STAGE) == int(steps[0]) == lines(workdir)[-1]["step"] < STEPS


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_where_the_coordinator_is_gone_or_stuck_the_other_ends(stopped, tmp_path, number):
    """test_hosts.py has the opposite case."""
    workdir = tmp_path / "run"
    shutil.copytree(stopped[0], workdir)
    before, newest = len(lines(workdir)), run_folder.newest_step(workdir, STAGE)
    processes = pair(workdir)
    wait_for_steps(workdir, processes, before + 3)
    first, second = processes
    first.send_signal(number)
    code, _, _ = finish(second, 60)
    assert code != 0
    first.kill()  # as a scheduler does
    first.communicate()
    assert run_folder.newest_step(workdir, STAGE) >= newest
    checkpoint.quarantine_damaged(workdir / STAGE / "checkpoints", run_folder.run_number(workdir))
    assert not (workdir / STAGE / "damaged").exists()
