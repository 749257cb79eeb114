"""How fast clips are read, beside PyAV's bare decoding: `python -m tests.prepared_clips [--size=64] [--threads=2]`.

Three readers take the same films of 32 frames in turns, in this process: the prepared clips and the folder of films, as
training reads them for windows of 17 frames, and PyAV, which gives all frames of a film at its own size in RGB. A film
has the size of a prepared clip, or with --source=1920x1080 the one given. Each thread reads films of its own.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np

from vdm_jax.data.files import Files
from vdm_jax.data.tfds import Tfds

FRAMES, FPS, RATE = 32, 8, 8000


def write(path, width, height, seed):
    """Writes a film in H.264 of colored noise of large grains that drifts."""
    rng = np.random.default_rng(seed)
    grain = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(-(-height // 8), 0).repeat(-(-width // 8), 1)
    grain = (grain[:height, :width] // 2 + rng.integers(0, 64, (height, width, 3), np.uint8)).astype(np.uint8)
    with av.open(path, "w") as out:
        picture = out.add_stream("libx264", rate=FPS, options={"crf": "20"})
        picture.width, picture.height = width, height
        picture.pix_fmt = "yuv420p"
        picture.codec_context.thread_count = 1
        for number in range(FRAMES):
            out.mux(picture.encode(av.VideoFrame.from_ndarray(np.roll(grain, number, 1).copy(), format="rgb24")))
        out.mux(picture.encode(None))


def decode(path):
    """Decodes all frames of a film to RGB."""
    with av.open(path) as file:
        file.streams.video[0].codec_context.thread_count = 1
        count = sum(frame.to_ndarray(format="rgb24").ndim == 3 for frame in file.decode(video=0))
    assert count == FRAMES


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="of the prepared clips, in pixels")
    parser.add_argument("--source", help="width x height of the films, in pixels, such as 1920x1080")
    parser.add_argument("--films", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    width, height = map(int, options.source.split("x")) if options.source else (options.size, options.size)
    with tempfile.TemporaryDirectory() as scratch:
        films = [Path(scratch) / "films" / f"{number:04}.mp4" for number in range(options.films)]
        films[0].parent.mkdir()
        for seed, path in enumerate(films):
            write(path, width, height, seed)
        out = Path(scratch) / "out"
        command = [sys.executable, "-m", "vdm_jax.prepare", "--config=configs/files.py", f"--out={out}"]
        more = [f"--source={films[0].parent}", f"--config.data.size={options.size},{options.size}"]
        subprocess.run([*command, *more, "--config.data.files.held_out=0", "--scene_threshold=1"], check=True)
        window = dict(frames=17, size=options.size, fps=FPS, sample_rate=RATE, seed=0, split="train")
        prepared = Tfds(str(out), audio_key="audio", caption_key="caption", held_out="", **window)
        files = Files(films[0].parent, held_out=0, cache_bytes=0, **window)
        assert prepared.count == len(files.videos) == len(films)
        readers = {"prepared": prepared.__getitem__, "files": files.__getitem__, "PyAV": lambda i: decode(films[i])}
        rates = {name: [] for name in readers}
        with ThreadPoolExecutor(options.threads) as threads:
            for _ in range(options.rounds):
                for name, read in readers.items():
                    began = time.perf_counter(), time.process_time()
                    assert len(list(threads.map(read, range(len(films))))) == len(films)
                    spent = time.perf_counter() - began[0], time.process_time() - began[1]
                    rates[name].append([len(films) / seconds for seconds in spent])
    for name, found in rates.items():
        for unit, own, bare in zip(("s", "s of processor time"), zip(*found), zip(*rates["PyAV"])):
            low, middle, high = (value(own) for value in (min, statistics.median, max))
            ratio = statistics.median(x / y for x, y in zip(own, bare))
            told = f"{name}: {middle:.1f} clips per {unit} ({low:.1f} to {high:.1f})"
            print(f"{told}, {ratio:.2f} of PyAV's in the same turn")


if __name__ == "__main__":
    main()
