"""How long a folder of many clips takes to open: `python -m tests.many_files [--count=5000] [--new=5000]`.

The clips are hard links of small clips, each with a text file. The first start looks at --new of them. For more clips
than these the index is filled with the row of the first clip, because looking at 100,000 clips takes minutes. On a
machine that others use, compare the seconds of processor time, not those of the clock.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.fuzz import peak_memory
from vdm_jax.data import index, writing
from vdm_jax.data.files import Files

LINKS = 20_000  # to one file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--new", type=int, default=5000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        folder = Path(scratch) / "clips"
        write(folder, 0, options.new)
        in_a_new_process(folder, "first start", options.new)
        write(folder, options.new, options.count)
        if options.count > options.new:
            rows = index.read(folder)
            info = rows["0000/0000000.mp4"][2:]
            for path in folder.rglob("*.mp4"):
                stat = path.stat()
                rows[path.relative_to(folder).as_posix()] = [stat.st_size, stat.st_mtime_ns, *info]
            index.write(folder, rows)
        in_a_new_process(folder, "later start", options.count)


def write(folder, first, count):
    """Writes clips `first` to `count` - 1."""
    for number in range(first, count):
        path, original = (folder / f"{n // 1000:04}" / f"{n:07}.mp4" for n in (number, number - number % LINKS))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path == original:
            writing.write_mp4(path, np.zeros((10, 16, 16, 3), np.uint8), np.zeros(10_000, np.float32), 8, 8000)
        else:
            os.link(original, path)
        path.with_suffix(".txt").write_text(f"the caption of clip {number}")


def in_a_new_process(*arguments):
    """Calls `start`. Its memory is not that which this process had before."""
    process = multiprocessing.get_context("spawn").Process(target=start, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def start(folder, title, count):
    """Opens the folder once, and prints what that took."""
    memory, began, work = peak_memory(), time.perf_counter(), time.process_time()
    source = Files(folder, frames=5, size=16, fps=8, sample_rate=8000, seed=0)
    seconds, work = time.perf_counter() - began, time.process_time() - work
    assert source.summary.used == count, source.summary
    more = (peak_memory() - memory) / count
    print(
        f"{title}, {count} clips: {seconds:.1f} s, processor {work:.1f} s, {more:.0f} bytes of memory a clip",
        flush=True,
    )


if __name__ == "__main__":
    main()
