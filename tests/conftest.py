"""A run of tests/tiny.py with random weights in its checkpoints, and a way to call a script as a user does."""

import gc
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# Most of a test's time is compilation. Compiled programs are kept between runs and processes, and are little optimised;
# XLA's older emitters take a quarter to a third less processor time over them, and one part with narrow vectors a sixth
# less than many parts with wide ones. Read when jax is imported, and by the processes that tests start.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_prefer_vector_width=128",
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")
# How long programs took to compile is remembered here, and not among the user's files.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".cache" / "user")

import numpy as np
import pytest
from absl import flags

from tests import tiny
from tests.bucket import environment
from tests.helpers import weights
from vdm_jax import system as system_package
from vdm_jax import train_state
from vdm_jax.data import writing
from vdm_jax.run import checkpoint, cli, record
from vdm_jax.run import folder as run_folder
from vdm_jax.system import build
from vdm_jax.system.layout import STAGES

# A trace of a model makes so many objects that Python would look for garbage all the time.
gc.set_threshold(50_000, 20, 100)


def write_run(workdir, config, names=STAGES, run=0):
    """A run folder whose stages `names` have a checkpoint: random weights, none zero, so that every input counts."""
    workdir.mkdir(parents=True, exist_ok=True)
    record.begin(workdir, run, config)
    system = build(config)
    params = {name: weights(system.param_shapes[name]) for name in names}
    for name in names:
        state = train_state.create(params[name], config[name])
        with checkpoint.manager(workdir / name / "checkpoints", run) as checkpoints:
            checkpoint.save(checkpoints, state | {"step": state["step"] + config[name].steps})
    if "denoiser" in names:
        channels = {"video": system.layout.video[-1], "audio": system.layout.audio[-1]}
        statistics = {m: {"mean": [0.1] * n, "std": [0.8] * n} for m, n in channels.items()}
        run_folder.write_statistics(workdir / "denoiser" / "statistics.json", statistics, params, run)
    return workdir


@pytest.fixture(scope="session", autouse=True)
def stages_made_once():
    """Within a process the stages of equal configs are made once: it takes a second, and most tests have the same."""
    original, made = system_package.make_stages, {}

    def remembered(of):
        key = of.config.to_json_best_effort()
        if key not in made or made[key][0].config.to_json_best_effort() != key:  # a test may change its config later
            made[key] = of, original(of)
        return made[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system_package, "make_stages", remembered)
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a tiny run with all four stages."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", tiny.get_config())


@pytest.fixture
def command(monkeypatch, capfd):
    """call(script, *options) -> (code, out, lines on stderr): what `python -m vdm_jax.<script> *options` does."""

    def call(script, *options):
        known, logger = set(flags.FLAGS), logging.getLogger("vdm_jax")
        script.define_flags()
        capfd.readouterr()
        try:
            with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
                patch.setattr(os, "_exit", sys.exit)  # a run that cannot write would end this process
                patch.setattr(sys, "argv", [script.__name__, *map(str, options)])
                patch.setattr(logger, "handlers", [])  # the script adds its own, and keeps messages to itself
                patch.setattr(logger, "propagate", True)
                patch.setattr(logging.root, "handlers", [logging.StreamHandler()])  # what libraries say counts, too
                cli.run(script.main)
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
        out, err = capfd.readouterr()
        return SimpleNamespace(code=left.value.code or 0, out=out, err=err.splitlines())

    return call


@pytest.fixture(scope="session")
def bucket():
    """What makes a process see gs://bucket, of a stand-in for Google Cloud Storage."""
    pytest.importorskip("gcp_storage_emulator")
    pytest.importorskip("gcsfs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, Path(__file__).with_name("bucket.py"), str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout.readline() == b"ready\n"
        yield environment(port)
        server.kill()


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """The path of a small video without sound."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    writing.write_mp4(path, np.zeros((2, 16, 16, 3), np.uint8), None, 8, 8000)
    return path


@pytest.fixture
def put(clip, tmp_path, monkeypatch):
    """put(*names): the same clip under these names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def link(*names):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(clip, path)
        return tmp_path / "data"

    return link
