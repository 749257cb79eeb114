"""What a stage shows while it trains: reconstructions of held-out clips, or clips made from their captions."""

from typing import Any, NamedTuple

import jax
import numpy as np

from vdm_jax import sharding
from vdm_jax.system import sampling


class Preview(NamedTuple):
    """R clips. `video` or `audio` is None where the stage makes none."""

    captions: list[str]
    video: Any = None  # uint8 [R, F, H, W, 3]
    audio: Any = None  # float32 [R, N]


def reconstruction(system, modality):
    """Returns preview(params, encoder_params, clips, captions) of an autoencoder: clips and their reconstructions."""
    name = f"{modality}_autoencoder"
    reconstruct = jax.jit(lambda params, x: sharding.replicate(system.reconstruct(name, {name: params}, x)))

    def preview(params, encoder_params, clips, captions):
        truth = clips[modality]
        remade = np.asarray(reconstruct(params, truth))
        rows = np.stack([truth, remade], 1).reshape(-1, *truth.shape[1:])  # [clips, 2, ...] -> [2 * clips, ...]
        labels = [label for caption in captions for label in (caption, "reconstruction")]
        return Preview(labels, **{modality: rows})

    return preview


def samples(system):
    """Returns preview(params, encoder_params, clips, captions) of the denoiser: a generated clip for each caption."""
    sampler, merged = sampling.Sampler(system), jax.jit(system.denoiser_params)

    def preview(params, encoder_params, clips, captions):
        if "base" in encoder_params:
            params = merged(params, encoder_params)
        return Preview(captions, *sampler(encoder_params | {"denoiser": params}, captions))

    return preview
