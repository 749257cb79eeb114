"""The demo: one or two shapes in a plain box, small enough to train on a laptop CPU. Gives the reference weights.

python -m vdm_jax.train --config=configs/world_tiny.py --workdir=runs/world_tiny
"""

from configs import common


def get_config():
    config = common.get_config()
    config.unlock()

    config.data.world = dict(objects=(0.65, 0.35), gravity=0.0, occluder=0.0, leave=0.0, pan=0.0, light=0.0)

    vae = config.video_autoencoder
    vae.update(steps=1000, batch_size=8, learning_rate=4e-3, kl_weight=1e-4)
    vae.model.update(
        channels=(48, 96), space_strides=(1,), time_strides=(2,), blocks=(0, 2), middle_blocks=0, latent_channels=24
    )

    audio = config.audio_autoencoder
    audio.update(steps=800, batch_size=8, learning_rate=4e-3, kl_weight=1e-4)
    audio.model.update(patch=50, channels=(64, 128), strides=(5,), blocks=(1, 1))

    clip = config.clip
    clip.update(steps=600, batch_size=64)
    clip.model.text.update(width=96, layers=2, heads=3)
    clip.model.video.update(channels=(48, 64, 96))
    clip.model.embedding = 96

    denoiser = config.denoiser
    denoiser.update(steps=8000, batch_size=16, learning_rate=3e-3, ema=0.998, cached_clips=8192)
    denoiser.diffusion.loss_weights.audio = 0.5
    denoiser.diffusion.patterns = dict(
        same=0.7,
        per_modality=0.06,
        per_frame=0.04,
        video_given=0.04,
        audio_given=0.04,
        image_given=0.05,
        first_given=0.04,
        ends_given=0.015,
        pyramid=0.015,
    )
    denoiser.model.update(channels=(64, 96), blocks=(1, 1), exchange=(False, False), time_strides=(2,), embedding=128)

    config.lock()
    return config
