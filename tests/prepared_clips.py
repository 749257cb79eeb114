"""How fast prepared clips are read, beside PyAV's bare decoding: `python -m tests.prepared_clips [--size=64]`.

Both read the same films of 32 frames in this process, on one thread, in turns. A prepared clip is read as training does
it, for a window of 17 frames. Bare decoding gives all frames of a film at its own size in RGB. A film has the size of a
prepared clip, or with --source the one given.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

from vdm_jax.data.tfds import Tfds

FRAMES, FPS, RATE = 32, 8, 8000


def write(path, size, seed):
    """Writes a film in H.264 of colored noise of large grains that drifts."""
    rng = np.random.default_rng(seed)
    grain = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(-(-size // 8), 0).repeat(-(-size // 8), 1)
    grain = (grain[:size, :size] // 2 + rng.integers(0, 64, (size, size, 3), np.uint8)).astype(np.uint8)
    with av.open(path, "w") as out:
        picture = out.add_stream("libx264", rate=FPS, options={"crf": "20"})
        picture.width = picture.height = size
        picture.pix_fmt = "yuv420p"
        picture.codec_context.thread_count = 1
        for number in range(FRAMES):
            out.mux(picture.encode(av.VideoFrame.from_ndarray(np.roll(grain, number, 1).copy(), format="rgb24")))
        out.mux(picture.encode(None))


def decode(path):
    """Returns the number of frames that PyAV decodes to RGB."""
    with av.open(path) as file:
        file.streams.video[0].codec_context.thread_count = 1
        return sum(frame.to_ndarray(format="rgb24").ndim == 3 for frame in file.decode(video=0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="of the prepared clips, in pixels")
    parser.add_argument("--source", type=int, help="size of the films, in pixels")
    parser.add_argument("--films", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        films = [Path(scratch) / "films" / f"{number:04}.mp4" for number in range(options.films)]
        films[0].parent.mkdir()
        for seed, path in enumerate(films):
            write(path, options.source or options.size, seed)
        out = Path(scratch) / "out"
        command = [sys.executable, "-m", "vdm_jax.prepare", "--config=configs/files.py", f"--out={out}"]
        more = [f"--source={films[0].parent}", f"--config.data.size={options.size},{options.size}"]
        subprocess.run([*command, *more, "--config.data.files.held_out=0", "--scene_threshold=1"], check=True)
        settings = dict(frames=17, size=options.size, fps=FPS, sample_rate=RATE, seed=0, split="train", held_out="")
        source = Tfds(str(out), audio_key="audio", caption_key="caption", **settings)
        assert source.count == len(films)
        rates = {"prepared": [], "PyAV": []}
        for turn in range(options.rounds):
            began = time.process_time()
            for number in range(turn * len(films), (turn + 1) * len(films)):
                source[number]
            rates["prepared"].append(len(films) / (time.process_time() - began))
            began = time.process_time()
            assert all(decode(path) == FRAMES for path in films)
            rates["PyAV"].append(len(films) / (time.process_time() - began))
    for name, found in rates.items():
        low, middle, high = (value(found) for value in (min, statistics.median, max))
        print(f"{name}: {middle:.0f} clips a second of processor time ({low:.0f} to {high:.0f})")


if __name__ == "__main__":
    main()
