"""A run that is killed, or whose disk is full, from its n-th write to a disk on.

`python -m tests.soak calls --count=300` and `python -m tests.soak disk-full --count=300` run it. A small library in C
counts the calls. It is compiled with gcc, and loaded before the C library.
"""

import collections
import ctypes
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from etils import epath

from tests import damage
from tests.helpers import digest
from vdm_jax.run import checkpoint, cli, record, storage
from vdm_jax.run import folder as run_folder
from vdm_jax.system import latents

LIBRARY = "system_calls.so"
SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls, limit;
static int full;

void arm(long n, int disk_full) { full = disk_full; atomic_store(&calls, 0); atomic_store(&limit, n); }
long counted(void) { return atomic_load(&calls); }

/* Counts a call. From the n-th on: kills this process, or returns 1 where the disk is full and the call needs space. */
static int due(int needs_space) {
    if (!atomic_load(&limit) || atomic_fetch_add(&calls, 1) + 1 < atomic_load(&limit)) return 0;
    if (!full) kill(getpid(), SIGKILL);
    errno = ENOSPC;
    return needs_space;
}
static int on_disk(int fd) {
    struct stat found;
    return fd > 2 && !fstat(fd, &found) && S_ISREG(found.st_mode);
}

#define REPLACED(type, name, parameters, arguments, counts, needs_space) \
    type name parameters { \
        static type (*real) parameters; \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        return (counts) && due(needs_space) ? -1 : real arguments; \
    }
REPLACED(ssize_t, write, (int fd, const void *data, size_t n), (fd, data, n), on_disk(fd), 1)
REPLACED(ssize_t, pwrite64, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at), on_disk(fd), 1)
REPLACED(ssize_t, writev, (int fd, const struct iovec *data, int n), (fd, data, n), on_disk(fd), 1)
REPLACED(int, fsync, (int fd), (fd), on_disk(fd), 0)
REPLACED(int, fdatasync, (int fd), (fd), on_disk(fd), 0)
REPLACED(int, mkdir, (const char *path, mode_t mode), (path, mode), 1, 1)
REPLACED(int, rename, (const char *from, const char *to), (from, to), 1, 0)
REPLACED(int, unlink, (const char *path), (path), 1, 0)
REPLACED(int, unlinkat, (int folder, const char *path, int flags), (folder, path, flags), 1, 0)
REPLACED(int, rmdir, (const char *path), (path), 1, 0)
"""


def build(folder):
    """Compiles the library, for processes that start from now on."""
    command = ["gcc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", folder / LIBRARY, "-ldl"]
    subprocess.run(command, input=SOURCE.encode(), check=True)
    os.environ["LD_PRELOAD"] = str(folder / LIBRARY)


def live(run):
    """What a run does with a disk: it starts, continues from its newest checkpoint, saves, and encodes clips."""
    run, first = epath.Path(run), damage.state(0, 1)
    record.new_number = lambda: 1
    latents.measure = lambda *arguments: damage.values(damage.STATISTICS, 1)
    with run_folder.exclusive_lock(run), run_folder.explain_disk_faults(run, "clip"):
        number = run_folder.write_config(run, damage.config_of(1), ())
        directory = run / "clip" / "checkpoints"
        directory.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.quarantine_damaged(directory, number)
        with checkpoint.manager(directory, number, newest=1, best=1) as checkpoints:
            state = checkpoint.restore(checkpoints, damage.abstract(first)) or first
            for step in range(int(state["step"]) + 4, 17, 4):
                state = damage.doubled(state, step)
                checkpoint.save(checkpoints, state, loss=-step)
            checkpoint.finish(checkpoints)
        params = damage.values(damage.SYSTEM.param_shapes, 1)
        (run / "denoiser").mkdir(exist_ok=True)
        latents._statistics(damage.SYSTEM, params, None, run / run_folder.STATISTICS, number)
        clips = run / "denoiser" / "latents"
        latents._make_current(clips, damage.fingerprint(1), None)
        mark, kind = latents._mark(storage.read_json(clips / latents.FINGERPRINT, "")), latents._record(damage.CLIPS)
        path = clips / "clips_00000.npy"
        if not path.exists():
            latents._write(path, [damage.values(damage.CLIPS, 1)], kind, 0, 4, mark)


def live_here(run, output, n, full):
    """Lives in this process, and prints how many calls were counted. From the n-th on the calls fail; 0: none does."""
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])

    def main(argv):
        library.arm(ctypes.c_long(n or 1 << 40), full)
        live(run)
        print("calls", library.counted())

    sys.argv = ["live"]
    cli.run(main)


def start(run, n=0, full=False):
    """Returns (exit code, output) of a process that lives."""
    server, output = multiprocessing.get_context("forkserver"), f"{run}.txt"
    server.set_forkserver_preload(["tests.soak"])
    Path(output).write_text("")
    process = server.Process(target=live_here, args=(run, output, n, full))
    process.start()
    process.join(300)
    return process.exitcode, Path(output).read_text()


def content(run):
    """Returns {file: content} of a run, with its settings and its newest state in place of record and checkpoints."""
    names = [path for path in sorted(run.rglob("*")) if path.is_file() and "checkpoints" not in path.parts]
    names = [path for path in names if path.name not in (record.NAME, "config.json")]  # how often the run was started
    left = [path for path in run.rglob("*") if "tmp" in path.name or path.name in (checkpoint.SUPERSEDED, "damaged")]
    assert not left, f"left behind: {left}"
    with checkpoint.manager(run / "clip" / "checkpoints") as checkpoints:
        state = checkpoint.restore(checkpoints, damage.abstract(damage.state(0, 0)))
    config = run_folder.read_config(run).to_json_best_effort()
    files = {str(path.relative_to(run)): path.read_bytes() for path in names}
    return files | {"config": config, "state": digest(state)}


def trials(count, seed, folder, full=False):
    """Ends a run at a random call, `count` times, and starts it again. Returns {outcome: times}.

    full: the disk is full from this call on; else the run is killed.
    """
    build(folder)
    draw, counts = random.Random(seed), collections.Counter()
    code, output = start(folder / "whole")
    assert code == 0, output
    right, calls = content(folder / "whole"), int(output.split()[-1])
    print(f"an undisturbed run makes {calls} calls", flush=True)
    for turn in range(count):
        run, n = folder / "ended", draw.randint(1, calls)
        shutil.rmtree(run, ignore_errors=True)
        code, output = start(run, n, full)
        where = f"trial {turn}, call {n}: {output[-3000:]}"
        assert code in ((0, 2) if full else (0, -9)), where
        # After a failed save TensorStore may print that asyncio's event loop is closed. No setting silences it.
        told = "base_events.py" in output
        assert "Traceback" not in output or full and told, where
        if code == 2:
            assert sum(line.startswith("error: ") for line in output.splitlines()) == 1, where
        counts["ended undisturbed" if code == 0 else "refused in one line" if full else "killed"] += 1
        counts["of these, with lines of TensorStore"] += told
        for _ in range(2):  # the second start finds nothing to do
            code, output = start(run)
            assert code == 0 and "Traceback" not in output, f"{where}\n then {output[-3000:]}"
        found = content(run)
        assert found == right, f"{where}\n other: {[name for name in right if found.get(name) != right[name]]}"
        counts["went on to the right end"] += 1
        if turn % 20 == 19:
            print(turn + 1, dict(counts), flush=True)
    return counts
