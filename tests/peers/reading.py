"""Times reading clips of a video file. Both sides take turns, so that a change of the machine affects both.

    python -m tests.peers.reading [FILE --size=64 --rounds=5]

`ours` lets swscale scale each frame before it becomes RGB. `full size` makes RGB at the file's size and scales it by
Pillow. Without FILE the file is 2 s of 1920 x 1080 in H.264, at 8 frames a
second. A clip has 17 frames at 8 frames a second.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from vdm_jax.data import media, writing


def full_size(frame, size, pixel_aspect, scaler):
    image = frame.to_ndarray(format="rgb24", interpolation=media.Interpolation.POINT | media.TO_RGB)
    return media.fit(image, size, pixel_aspect)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or Path(folder) / "clip.mp4"
        if not options.file:
            y, x = np.mgrid[:1080, :1920]
            pattern = np.stack([x % 256, y % 256, (x + y) // 8 % 256], -1).astype(np.uint8)
            writing.write_mp4(file, [np.roll(pattern, 8 * k, 1) for k in range(16)], None, 8, 8000)
        sides, clips, times = {"ours": media._picture, "full size": full_size}, {}, {"ours": [], "full size": []}
        for _ in range(options.rounds):
            for name, picture in sides.items():
                media._picture = picture
                began = time.process_time()
                clips[name], _ = media.read_video(file, fps=8, size=options.size, sample_rate=8000, frames=17)
                times[name].append(1000 * (time.process_time() - began))
    for name, values in times.items():
        print(
            f"{name:10} {statistics.median(values):.0f} ms of processor time ({min(values):.0f} to {max(values):.0f})"
        )
    error = np.mean((clips["ours"].astype(float) - clips["full size"]) ** 2)
    print(f"PSNR of the two: {10 * np.log10(255**2 / max(error, 1e-9)):.1f} dB")


if __name__ == "__main__":
    main()
