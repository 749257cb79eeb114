"""Several processes on this machine: they compute what one process does, and end when one of them is lost."""

import http.server
import json
import os
import shutil
import signal
import socket
import threading
import time

import numpy as np
import pytest

from tests import tiny
from tests.conftest import write_run
from tests.helpers import finish, start
from vdm_jax import sample, train
from vdm_jax.data import media
from vdm_jax.run import hosts
from vdm_jax.system.layout import STAGES

CONFIG, SMALL, STEPS = "--config=tests/tiny.py", "--config=tests/tiny.py:small", 20
LIMIT = 900  # seconds for all processes of a test together; most of it is compilation
SOON = 170  # seconds for a process to end after another one is lost


class Deadline:
    """What is left of LIMIT. At its end it kills the processes that still run; JAX would make them survive SIGTERM."""

    def __init__(self):
        self.end, self.processes = time.monotonic() + LIMIT, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def left(self):
        return max(1, self.end - time.monotonic())

    def start(self, count, module, *options, devices):
        """Starts `count` processes of one job, with `devices` virtual devices each."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            several = [f"--coordinator=localhost:{free.getsockname()[1]}", f"--processes={count}"]
        made = []
        for i in range(count):
            own = [*several, f"--process={i}", *options]
            made.append(start("-m", f"vdm_jax.{module}", *own, JAX_NUM_CPU_DEVICES=str(devices)))
        self.processes += made
        return made

    def finish(self, processes):
        """Waits for processes. Returns [(exit code, lines of stderr)]."""
        ended = [finish(process, self.left()) for process in processes]
        return [(code, err) for code, _, err in ended]


def losses(workdir, stage):
    rows = [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def options(workdir, stage, steps, *more, config=CONFIG):
    return [config, f"--workdir={workdir}", f"--stage={stage}", f"--config.{stage}.steps={steps}",
            "--config.checkpoint_every=20", *more]  # fmt: skip


SPLIT = ["--config.mesh.data=2", "--config.mesh.fsdp=-1"]


def test_two_processes_train_as_one_and_others_go_on(command, tmp_path):
    stage, one, two = "clip", tmp_path / "one", tmp_path / "two"
    with Deadline() as deadline:
        # This process without a mesh, and two processes with a mesh of 2 x 2 devices.
        pair = deadline.start(2, "train", *options(two, stage, STEPS, *SPLIT), devices=2)
        alone = command(train, *options(one, stage, STEPS))
        assert alone.code == 0, alone.err
        for code, err in deadline.finish(pair):
            assert code == 0, "\n".join(err)
        assert set(losses(two, stage)) == set(range(1, STEPS + 1))
        np.testing.assert_allclose([*losses(two, stage).values()], [*losses(one, stage).values()], rtol=1e-5, atol=1e-5)

        # This process and four processes continue from the checkpoint of the two.
        runs = {count: tmp_path / f"by_{count}" for count in (1, 4)}
        for folder in runs.values():
            shutil.copytree(two, folder)
        mesh = ["--config.mesh.fsdp=-1", "--config.mesh.data=1"]
        four = deadline.start(4, "train", *options(runs[4], stage, STEPS + 3, *mesh), devices=1)
        alone = command(train, *options(runs[1], stage, STEPS + 3))
        assert alone.code == 0, alone.err
        for code, err in deadline.finish(four):
            assert code == 0, "\n".join(err)
    after = {count: [losses(folder, stage)[STEPS + i] for i in (1, 2, 3)] for count, folder in runs.items()}
    np.testing.assert_allclose(after[4], after[1], rtol=1e-5, atol=1e-5)


def test_two_processes_encode_as_one(command, tmp_path):
    """Latent statistics, the cache of clips and previews. Only one process writes them."""
    folders = [tmp_path / n for n in ("one", "two")]
    shutil.copytree(write_run(folders[0], tiny.get_config("small"), STAGES[:3]), folders[1])
    more = ["--config.validation.every=2", *SPLIT]
    with Deadline() as deadline:
        pair = deadline.start(2, "train", *options(folders[1], "denoiser", 2, *more, config=SMALL), devices=1)
        alone = command(train, *options(folders[0], "denoiser", 2, "--config.validation.every=0", config=SMALL))
        assert alone.code == 0, alone.err
        for code, err in deadline.finish(pair):
            assert code == 0, "\n".join(err)
    one, two = (losses(folder, "denoiser") for folder in folders)
    np.testing.assert_allclose([*two.values()], [*one.values()], rtol=1e-5)
    cached = [np.load(folder / "denoiser" / "latents" / "clips_00000.npy")["z/video"] for folder in folders]
    cached = [z.astype(np.float32) for z in cached]
    assert cached[0].shape == cached[1].shape
    np.testing.assert_allclose(*cached, atol=2e-3 * np.abs(cached[0]).max())  # stored in half precision
    shown = folders[1] / "denoiser" / "previews"
    assert {f"{step}/contact_sheet.png" for step in (0, 2)} <= {f"{p.parent.name}/{p.name}" for p in shown.glob("*/*")}


def test_two_processes_sample_the_same_clips(command, tmp_path, tiny_run):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    clips = {count: tmp_path / f"clips_{count}" for count in (1, 2)}
    given = [f"--workdir={tiny_run}", f"--prompts={tmp_path / 'prompts.txt'}"]
    with Deadline() as deadline:
        pair = deadline.start(2, "sample", *given, f"--out={clips[2]}", devices=1)
        alone = command(sample, *given, f"--out={clips[1]}")
        assert alone.code == 0, alone.err
        for code, err in deadline.finish(pair):
            assert code == 0, "\n".join(err)
    # MP4 is lossy, so equal clips may differ by a few of 256 levels.
    data = tiny.get_config().data
    sizes = dict(fps=data.fps, size=data.size, sample_rate=data.sample_rate)
    for name in ("000.mp4", "001.mp4"):
        one, two = (media.read_video(folder / name, **sizes)[0].astype(int) for folder in clips.values())
        assert one.shape == two.shape and np.abs(one - two).max() <= 3
    assert sorted(p.name for p in clips[2].iterdir()) == ["000.mp4", "001.mp4", "contact_sheet.png"]


@pytest.mark.parametrize("how", ["stuck", "dead"])
def test_nobody_waits_for_a_process_that_is(tmp_path, how):
    run, stage = tmp_path / "run", "clip"
    with Deadline() as deadline:
        given = options(run, stage, 100_000, *SPLIT, "--config.watchdog_seconds=15")
        first, second = deadline.start(2, "train", *given, devices=1)
        while not (run / stage / "metrics.jsonl").exists() or not losses(run, stage):
            assert first.poll() is None, "\n".join(finish(first, 1)[2])
            assert deadline.left() > 1, "no step in time"
            time.sleep(0.5)
        os.kill(second.pid, signal.SIGSTOP if how == "stuck" else signal.SIGKILL)
        code, _, err = finish(first, SOON)
    told = "nothing has happened for 15 s after the start of step" if how == "stuck" else "another process is lost"
    assert code == hosts.TRY_AGAIN
    assert any(told in line and "exit code 75" in line for line in err), "\n".join(err[-20:])


# ------------------------------------------------------------------------------------------------- finding the others


@pytest.mark.parametrize("environment, told", [
    ({}, False),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, True),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False),  # in an allocation, but not started with srun
    ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a"}, False),
    ({"MEGASCALE_NUM_SLICES": "2"}, True),
])  # fmt: skip
def test_a_scheduler_is_recognized(environment, told):
    assert hosts.has_peers(environment) == told


@pytest.mark.parametrize("answer, told", [("a:b:10.0.0.1,c:d:10.0.0.2", True), ("a:b:10.0.0.1", False), (None, False)])
def test_a_tpu_vm_asks_its_metadata(answer, told):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = answer is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write((answer or "").encode() if found else b"")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert hosts.has_peers({"GCE_METADATA_HOST": f"localhost:{server.server_port}"}) == told
        server.shutdown()


@pytest.mark.parametrize("script, needs", [(train, [CONFIG, "--workdir=x"]), (sample, ["--prompt=x", "--out=x.mp4"])])
@pytest.mark.parametrize("options, told", [
    (["--processes=2"], "--coordinator is missing"),
    (["--coordinator=localhost:1", "--processes=2"], "--process is missing"),
    (["--coordinator=localhost:1", "--processes=2", "--process=2"], "--process=2 must be below --processes=2"),
])  # fmt: skip
def test_flags_that_do_not_fit_are_told(command, script, needs, options, told):
    done = command(script, *needs, *options)
    assert done.code == 2 and len(done.err) == 1 and told in done.err[0]


def test_one_process_is_alone():
    assert hosts.is_primary() and hosts.broadcast_from_primary(3) == 3
    alive = hosts.watchdog(1e-3)
    alive("a step")
    time.sleep(0.2)  # and is not ended
