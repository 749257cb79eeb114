"""Thousands of wrong inputs of every kind: `python -m tests.fuzz --count=2000 [--seed=0] [--only=mp4]`.

Each input must be read, or refused with a UserError. Faults are: another exception, a crash, more than 20 s, a file
outside the input's folder, and more memory than CAP. The test suite runs a short form.
"""

import argparse
import collections
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 20  # seconds of processor time for an input. A busy machine does not count as a hang.
PATIENCE = 300  # seconds of wall time for an input
CAP = 2 << 30  # bytes of memory for the process


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="one kind of input, such as mp4")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(Path(options.worker), options.seed, options.only)
    began = time.monotonic()
    counts, faults, peak = fuzz(options.count, options.seed, options.only)
    for way in sorted({way for way, _ in counts}):
        print(f"{way:12}", {outcome: n for (w, outcome), n in sorted(counts.items()) if w == way})
    print(
        f"{counts.total()} inputs in {time.monotonic() - began:.0f} s: {len(faults)} faults; "
        f"peak memory {peak / 2**20:.0f} MiB of {CAP / 2**20:.0f}"
    )
    for fault in faults[:20]:
        print(fault)
    sys.exit(bool(faults))


def fuzz(count, seed=0, only=""):
    """Returns ({(kind of input, outcome): times}, faults, peak memory in bytes)."""
    counts, faults, peak, worker = collections.Counter(), [], 0, None
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in ("inside", "outside"):
            (folder / name).mkdir()
        (folder / "outside" / "secret.txt").write_text("secret")
        before = listing(folder)
        for case in range(count):
            if worker is None:
                command = [sys.executable, "-m", "tests.fuzz", f"--worker={folder}", f"--seed={seed}", f"--only={only}"]
                environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
                environment["XDG_CACHE_HOME"] = str(folder / "inside" / "cache")
                with open(folder.with_suffix(".err"), "w") as err:  # messages of C libraries
                    worker = subprocess.Popen(
                        command, cwd=folder / "inside", env=environment, stdin=-1, stdout=-1, stderr=err, text=True
                    )
                assert worker.stdout.readline() == "ready\n", folder.with_suffix(".err").read_text()[-3000:]
            worker.stdin.write(f"{case}\n")
            worker.stdin.flush()
            answered = select.select([worker.stdout], [], [], PATIENCE)[0]
            line = worker.stdout.readline() if answered else ""
            if line:
                answer = json.loads(line)
            else:
                if not answered:
                    worker.kill()
                code = worker.wait()
                hung = not answered or code == -signal.SIGPROF
                answer = {"way": f"case {case}", "outcome": "hung" if hung else "died", "memory": 0}
                answer["fault"] = f"exit code {code}"
                worker = None
            counts[answer["way"], answer["outcome"]] += 1
            peak = max(peak, answer["memory"])
            if answer["memory"] > CAP:
                answer["fault"] = f"{answer['memory'] >> 20} MiB"
                worker = worker and worker.kill()
            if listing(folder) != before:
                answer["fault"] = f"wrote {sorted(set(listing(folder).items()) ^ set(before.items()))[:3]}"
                before = listing(folder)
            if "fault" in answer:
                faults.append(f"case {case}, {answer['way']}: {answer['fault']}")
            if case % 100 == 99 or "fault" in answer:
                print(f"{case + 1} inputs, {len(faults)} faults {answer.get('fault', '')}", flush=True)
        if worker is not None:
            worker.stdin.close()
            worker.wait()
        folder.with_suffix(".err").unlink(missing_ok=True)
    return counts, faults, peak


def listing(folder):
    """Returns {path: content} of `folder` without inside/, which holds the inputs."""
    paths = [p for p in folder.rglob("*") if "inside" not in p.relative_to(folder).parts]
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in paths}


def work(folder, seed, only):
    """Reads case numbers from stdin, and answers each with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from tests import fuzz_ways  # it imports JAX
    from vdm_jax.errors import UserError

    ways = {only: fuzz_ways.WAYS[only]} if only else fuzz_ways.WAYS
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        draw = random.Random(f"{seed} {line}")
        way = draw.choice(list(ways))
        inside = folder / "inside" / "case"
        shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir()
        answer = {"way": way}
        signal.setitimer(signal.ITIMER_PROF, LIMIT)  # its signal ends the process
        try:
            ways[way](draw, inside)
            answer["outcome"] = "read"
        except UserError as error:
            answer["outcome"] = "refused"
            if not str(error) or len(str(error)) > 2000:
                answer["fault"] = f"no clear line: {str(error)[:200]!r}"
        except BaseException:
            answer |= {"outcome": "traceback", "fault": traceback.format_exc()[-1500:]}
        answer["memory"] = peak_memory()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def peak_memory():
    """Returns the peak memory of this process in bytes. getrusage would also count the parent process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
