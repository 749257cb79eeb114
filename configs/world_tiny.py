"""The demo: one or two shapes in a plain box, small enough to train on a laptop CPU. Gives the reference weights.

    python -m vdm_jax.train --config=configs/world_tiny.py --workdir=runs/world_tiny
    python -m vdm_jax.weights export --workdir=runs/world_tiny --out=vdm_jax/reference

The shipped weights have this model, and were not made by one run of this command: docs/reference_run.md tells how. That
one run reaches the same figures has not been shown yet.

Hardware of the shipped weights: two CPU cores, then five minutes of one H200. Figures: docs/results.md, by
`python -m vdm_jax.evaluate --out=report --suite=all`.
"""

from configs import common
from vdm_jax.data import captions


def get_config():
    config = common.get_config()
    config.unlock()

    config.data.world.update(
        objects=(0.4, 0.6), gravity=0.0, occluder=0.0, leave=0.0, pan=0.0, light=0.0, undirected=0.0
    )

    vae = config.video_autoencoder
    vae.update(steps=4000, batch_size=8, learning_rate=4e-3, kl_weight=1e-4)
    vae.model.update(
        channels=(48, 96), space_strides=(1,), time_strides=(2,), blocks=(0, 2), middle_blocks=0, latent_channels=24
    )

    audio = config.audio_autoencoder
    audio.update(steps=3000, batch_size=8, learning_rate=4e-3, kl_weight=1e-4)
    audio.model.update(patch=50, channels=(64, 128), strides=(5,), blocks=(1, 1))

    clip = config.clip
    clip.update(steps=1500, batch_size=64)
    clip.hard_negatives.words = (captions.COLORS, captions.SHAPES, captions.DIRECTIONS)
    clip.model.text.update(width=96, layers=2, heads=3)
    clip.model.video.update(channels=(48, 64, 96))
    clip.model.embedding = 96

    denoiser = config.denoiser
    denoiser.update(steps=40416, batch_size=32, learning_rate=3e-3, ema=0.999, cached_clips=24576)
    denoiser.hard_negatives.words = (captions.DIRECTIONS,)
    # What moves, and which thing is which, shows in all latents of a clip at once: it is settled at far more noise than
    # a single latent would be.
    denoiser.diffusion.update(shift=0.135, sigmoid_bias=-5.0)
    denoiser.diffusion.loss_weights.audio = 0.5
    denoiser.diffusion.patterns = {
        "text": 0.64,
        "per_modality": 0.06,
        "per_frame": 0.04,
        "foley": 0.04,
        "audio": 0.08,
        "image": 0.04,
        "continue": 0.06,
        "between": 0.02,
        "pyramid": 0.02,
    }
    denoiser.model.update(
        channels=(48, 112),
        audio_channels=(32, 64),
        blocks=(1, 2),
        cross_modal=(False, True),
        time_strides=(1,),
        head_dim=28,
        embedding=128,
        text_layers=2,
    )

    config.sample.guidance.update(history=1.5, modality=1.5)
    config.sample.update(context_noise=0.0, first_step_times=(0.09, 0.14))

    config.lock()
    return config
