"""What a run shows of itself while it trains: reconstructions of held-out clips, then samples."""

import jax
import numpy as np

from vdm_jax import pipeline as generate
from vdm_jax import sharding
from vdm_jax.data import batches as pipeline
from vdm_jax.data import media
from vdm_jax.metrics import figures
from vdm_jax.run import hosts
from vdm_jax.system import codec as stages

CLIPS = 4


def make(name, config, folder, mesh):
    """-> write(params, frozen, step), which leaves <step>.png (and .mp4) of stage `name` in `folder`; compiles once.

    For all processes: they compute together, and the first one writes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held_out = pipeline.source(config, "held_out")
    items = [held_out[i] for i in range(CLIPS)]
    captions = [item["caption"] for item in items]
    rate = config.data.sample_rate
    if name == "clip":
        return lambda params, frozen, step: None  # nothing to see
    if name == "denoiser":
        generators = []

        def write(params, frozen, step):
            parts = {**frozen, name: params}
            if not generators:
                generators.append(generate.Generator(config, parts, mesh))
            generators[0].frozen = parts
            video, audio = generators[0](captions)
            if not hosts.is_primary():
                return
            figures.contact_sheet(folder / f"{step}.png", list(video), captions)
            media.write_mp4(folder / f"{step}.mp4", video[0], audio[0], config.data.fps, rate)

        return write

    part = name.removesuffix("_autoencoder")  # "video" or "audio"
    truth = np.stack([item[part] for item in items])
    reconstruct = jax.jit(lambda params, x: sharding.replicate(stages.reconstruct(config, name, params, x)))

    def write(params, frozen, step):
        out = np.asarray(reconstruct(params, truth))
        if not hosts.is_primary():
            return None
        if part == "audio":
            return figures.spectrogram(folder / f"{step}.png", np.stack([truth, out], 1).reshape(-1), rate)
        rows = [clip for pair in zip(truth, out, strict=True) for clip in pair]
        labels = [label for caption in captions for label in (caption, "reconstruction")]
        figures.contact_sheet(folder / f"{step}.png", rows, labels)

    return write
