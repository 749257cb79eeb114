"""Draws docs/noise_levels.png: the noise level of every latent frame while a clip is sampled, one panel a task.

    python docs/noise_levels.py [FILE]

The levels are those of `vdm_jax.tasks.scheduling_matrix`, which the sampler walks through row by row.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs import world_tiny  # noqa: E402
from vdm_jax import tasks  # noqa: E402

FRAMES = 9  # latent frames of a clip, as in the reference weights
STEPS = 14
MARK = "#e8710a"  # color of context frames


def panels():
    """[(title, context mask of the video [T], of the sound [T], options of scheduling_matrix)]."""
    frame = np.arange(FRAMES)
    none, whole, start = frame < 0, frame >= 0, frame < 4
    ends = (frame < 2) | (frame >= FRAMES - 2)
    return [
        ("text", none, none, {}),
        ("image", frame < 1, none, {}),
        ("continue", start, start, {}),
        ("between", ends, ends, {}),
        ("foley (audio: reverse)", whole, none, {}),
        ("rollout (--lag=2)", frame < 2, frame < 2, dict(lag=2)),
    ]


def draw(path):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 17, "font.family": "DejaVu Sans"})
    diffusion = world_tiny.get_config().denoiser.diffusion
    low, high = diffusion.log_snr_min, diffusion.log_snr_max
    figure = plt.figure(figsize=(14, 10.5))
    outer = figure.add_gridspec(2, 3, hspace=0.3, wspace=0.17, left=0.08, right=0.985, top=0.95, bottom=0.17)
    for place, (title, video, sound, options) in enumerate(panels()):
        levels = tasks.scheduling_matrix(STEPS, FRAMES, diffusion, {"video": video, "audio": sound}, **options)
        inner = outer[place // 3, place % 3].subgridspec(2, 1, hspace=0.08)
        for row, (name, label, context) in enumerate((("video", "video", video), ("audio", "sound", sound))):
            axes = figure.add_subplot(inner[row])
            matrix = np.asarray(levels[name])  # [N+1, T]
            image = axes.imshow(matrix, cmap="Blues_r", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
            axes.set_xticks(np.arange(FRAMES + 1) - 0.5, minor=True)
            axes.grid(which="minor", axis="x", color="white", linewidth=2)
            axes.tick_params(which="minor", length=0)
            axes.set_xticks([0, FRAMES - 1] if row else [])
            axes.set_yticks([0, len(matrix) - 1], ["0", str(len(matrix) - 1)])
            for at in np.flatnonzero(context):
                corner = (at - 0.42, -0.35)
                axes.add_patch(
                    plt.Rectangle(corner, 0.84, len(matrix) - 0.3, fill=False, edgecolor=MARK, linewidth=2.5)
                )
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(title, fontsize=20, loc="left", fontweight="bold")
            elif place >= 3:
                axes.set_xlabel("latent frame")
            if place % 3 == 0:
                axes.set_ylabel(f"{label}\nstep", linespacing=1.3)
    bar = figure.colorbar(image, cax=figure.add_axes([0.08, 0.075, 0.46, 0.022]), orientation="horizontal")
    bar.set_ticks([low, high], labels=["pure noise", "clean"])
    for text, side in zip(bar.ax.get_xticklabels(), ("left", "right")):
        text.set_horizontalalignment(side)
    bar.outline.set_visible(False)
    figure.patches.append(
        plt.Rectangle(
            (0.66, 0.062), 0.02, 0.04, fill=False, edgecolor=MARK, linewidth=2.5, transform=figure.transFigure
        )
    )
    figure.text(0.69, 0.082, "context: clean from the first step", va="center")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "noise_levels.png")
