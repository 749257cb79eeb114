"""The reference recipe: the full procedural world, for a GPU or a patient CPU. Not yet run.

    python -m vdm_jax.train --config=configs/world.py --workdir=runs/world

One to three shapes, some with gravity, an occluder, open sides, a moving camera or drifting light; 32 px, 17 frames.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.unlock()

    vae = config.video_autoencoder
    vae.update(steps=20000, batch_size=16, learning_rate=1e-3, kl_weight=1e-3)
    vae.model.update(
        channels=(64, 128), space_strides=(1,), time_strides=(4,), blocks=(0, 2), middle_blocks=1, latent_channels=16
    )
    audio = config.audio_autoencoder
    audio.update(steps=10000, batch_size=16)
    audio.model.update(patch=50, channels=(64, 128), strides=(5,), blocks=(1, 1))

    config.clip.update(steps=10000, batch_size=128)
    config.denoiser.update(steps=60000, batch_size=64, cached_clips=65536)

    config.lock()
    return config
