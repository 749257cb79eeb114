"""Long tests of what a run survives. The test suite runs short forms of them.

    python -m tests.soak kill --count=100 [--seed=0]     # SIGKILL at random moments, saves included
    python -m tests.soak flips --count=200 [--seed=0]    # flipped bits in stored checkpoints
    python -m tests.soak damage --count=2000 [--seed=0]  # damage of every kind to every file that is read back
    python -m tests.soak calls --count=300 [--seed=0]    # SIGKILL at the n-th write, rename, fsync or unlink
    python -m tests.soak disk-full --count=300 [--seed=0]    # no space left from the n-th of these calls on

Each prints its counts. It fails when a disturbed run does not end as an undisturbed one.
"""

import argparse
import collections
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

from tests import damage, system_calls, tiny
from tests.helpers import digest, final_state
from vdm_jax import train
from vdm_jax.errors import UserError
from vdm_jax.run import checkpoint, checksums
from vdm_jax.run import folder as run_folder

STAGE = "clip"
PATIENCE = 1200  # seconds for one start; a busy machine takes minutes


def settings(steps, checkpoint_every):
    config = tiny.get_config()
    config.update(checkpoint_every=checkpoint_every, log_every=2)
    config.validation.every = 0
    config[STAGE].steps = steps
    return config


def options(config, workdir):
    changed = {key: config[key] for key in ("checkpoint_every", "log_every")}
    changed["validation.every"] = config.validation.every
    changed[f"{STAGE}.steps"] = config[STAGE].steps
    flags = [f"--config.{key}={value}" for key, value in changed.items()]
    return ["train", "--config=tests/tiny.py", f"--workdir={workdir}", f"--stage={STAGE}", *flags]


def train_here(arguments, output):
    """Trains in a process of its own. That is forked from one that imported all modules and did not start JAX."""
    sys.argv = arguments
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    train.define_flags()
    train.cli.run(train.main)


def begin(config, workdir):
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.soak"])
    process = server.Process(target=train_here, args=(options(config, workdir), f"{workdir}.txt"))
    process.start()
    return process


def finish(process, workdir):
    process.join(PATIENCE)
    output = Path(f"{workdir}.txt").read_text()
    assert process.exitcode == 0, output[-3000:]
    assert "Traceback" not in output, output[-3000:]


def moment(draw, workdir, process):
    """Waits for a random moment of a run. Returns what the run does then: "begin", "steps" or "save"."""
    directory, started = workdir / STAGE, time.monotonic()
    log = directory / "metrics.jsonl"
    size = log.stat().st_size if log.exists() else 0

    def wait(happened):
        while process.is_alive() and not happened():
            assert time.monotonic() - started < PATIENCE
            time.sleep(0.001)

    kind = draw.choices(("begin", "steps", "save"), (1, 3, 4))[0]
    if kind == "begin":
        time.sleep(draw.uniform(0, 6))
        return kind
    wait(lambda: log.exists() and log.stat().st_size > size)
    time.sleep(draw.uniform(0, 0.5))
    if kind == "save":
        wait(lambda: list((directory / "checkpoints").glob("*tmp*")))
        time.sleep(draw.choice((0, 0.002, 0.01, 0.03)))
    return "save" if list((directory / "checkpoints").glob("*tmp*")) else "steps"


def kills(counts):
    return sum(counts[kind] for kind in ("begin", "steps", "save"))


def kill(count, seed, folder, steps=240, checkpoint_every=4):
    """Kills runs, `count` times in all. Returns {moment: kills}. Each must end as an undisturbed run."""
    config, draw, counts = settings(steps, checkpoint_every), random.Random(seed), collections.Counter()
    whole, killed = folder / "whole", folder / "killed"
    finish(begin(config, whole), whole)
    ended, right = True, digest(final_state(whole, STAGE, config))
    while kills(counts) < count or not ended:
        if ended:
            shutil.rmtree(killed, ignore_errors=True)
        process = begin(config, killed)
        if kills(counts) < count:
            kind = moment(draw, killed, process)
            process.kill()
        process.join(PATIENCE)
        assert process.exitcode in (0, -9), Path(f"{killed}.txt").read_text()[-3000:]
        ended = process.exitcode == 0
        if not ended:
            counts[kind] += 1
            print(f"{kills(counts)} of {count}: {kind}, at step {run_folder.newest_step(killed, STAGE)}", flush=True)
            continue
        finish(process, killed)
        counts["runs brought to their right end"] += 1
        logs = [read_log(run / STAGE / "metrics.jsonl") for run in (whole, killed)]
        assert logs[0] == logs[1], "metrics.jsonl differs"
        assert digest(final_state(killed, STAGE, config)) == right, "the final states differ"
        left = [*killed.rglob("*tmp*"), *killed.rglob(checkpoint.SUPERSEDED)]
        assert not left, f"left behind: {left}"
        assert not (killed / STAGE / "damaged").exists()
    return counts


def read_log(path):
    """Returns [(step, loss, gradient norm)] of a metrics.jsonl. Fails for an incomplete line."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def flips(count, seed, folder, steps=8, onward=5):
    """Flips one bit at a random place of the newest checkpoint, `count` times, each time in a fresh copy.

    Returns {outcome: times}. One in `onward` times the run continues, and must end as an undisturbed run.
    """
    config, draw, counts = settings(steps, 4), random.Random(seed), collections.Counter()
    whole = folder / "whole"
    finish(begin(config, whole), whole)
    checkpoints = whole / STAGE / "checkpoints"
    good = digest(final_state(whole, STAGE, config))
    logger = logging.getLogger("vdm_jax")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    for turn in range(count):
        run = folder / "flipped"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        stored = [run / STAGE / "checkpoints" / str(steps) / name for name in checksums.files(checkpoints / str(steps))]
        # Half of the flips are drawn over all bytes, so most are in arrays. The others are drawn over all files.
        weights = [path.stat().st_size if turn % 2 else 1 for path in stored]
        path = draw.choices(stored, weights)[0]
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            checkpoint.quarantine_damaged(run / STAGE / "checkpoints", run_folder.run_number(run))
        except UserError:
            raise AssertionError(f"{path}: the older checkpoint was lost, too") from None
        if run_folder.newest_step(run, STAGE) == steps:  # the damage was not noticed
            counts["NOT DETECTED"] += 1
            continue
        assert len(list((run / STAGE / "damaged").iterdir())) == 1
        counts["detected, set aside"] += 1
        if turn % onward == 0:
            finish(begin(config, run), run)
            assert digest(final_state(run, STAGE, config)) == good, "the run that went on ends otherwise"
            counts["of these, trained on to the right end"] += 1
        if turn % 20 == 19:
            print(turn + 1, dict(counts), flush=True)
    assert not counts["NOT DETECTED"]
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "flips", "damage", "calls", "disk-full"))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--onward", type=int, default=5, help="continue training after one flip in ONWARD")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        arguments = options.count, options.seed, Path(folder)
        if options.what == "kill":
            counts = kill(*arguments)
        elif options.what == "flips":
            counts = flips(*arguments, onward=options.onward)
        elif options.what == "damage":
            counts = damage.trials(*arguments)
        else:
            counts = system_calls.trials(*arguments, full=options.what == "disk-full")
    print(f"{options.what}: {dict(counts)} in {time.monotonic() - began:.0f} s; all as it must be")


if __name__ == "__main__":
    main()
