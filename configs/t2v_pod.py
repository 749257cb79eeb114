"""Text to video with sound on a TPU pod: about 2 B parameters, 65 frames at 256 px, 16 kHz. Not yet run.

    python -m vdm_jax.train --config=configs/t2v_pod.py --workdir=gs://BUCKET/t2v --config.data.path=gs://BUCKET/tfds
    python -m vdm_jax.dry_run --config=configs/t2v_pod.py --topology=v5e:16x16,v6e:8x8,v5p:4x4x4

Parameters are split over groups of 16 chips, so that a shard is still wide and a larger slice has more such groups,
with the same memory and traffic a chip; each block's inside is computed again in the backward pass. What the TPU
compiler says of it: not yet run.

Latents are [17, 32, 32, 16] for the picture and [17 * 20, 32] for the sound.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.unlock()
    config.compute_dtype = "bfloat16"
    config.checkpoint_every = 1000
    config.mesh.update(data=-1, fsdp=16)
    config.data.update(source="tfds", frames=65, size=256, fps=16, sample_rate=16000, text_length=256, threads=16)

    for stage in ("video_autoencoder", "audio_autoencoder", "clip", "denoiser"):
        config[stage].update(optimiser="adamw", remat="blocks")
    vae = config.video_autoencoder
    vae.update(steps=200_000, batch_size=256, learning_rate=2e-4)
    vae.model.update(
        patch=2,
        channels=(128, 256, 512),
        space_strides=(2, 2),
        time_strides=(2, 2),
        blocks=(2, 2, 2),
        middle_blocks=2,
        latent_channels=16,
        groups=32,
    )
    audio = config.audio_autoencoder
    audio.update(steps=200_000, batch_size=256, learning_rate=2e-4)
    audio.model.update(
        patch=8, channels=(128, 256, 512), strides=(5, 5), blocks=(2, 2, 2), latent_channels=32, groups=32
    )
    clip = config.clip
    clip.update(steps=100_000, batch_size=4096, learning_rate=5e-4, weight_decay=0.1)
    clip.model.text.update(width=1024, layers=12, heads=16)
    clip.model.video.update(patch=8, channels=(256, 512, 1024), groups=32)
    clip.model.embedding = 768

    denoiser = config.denoiser
    denoiser.update(steps=500_000, batch_size=512, learning_rate=1e-4, warmup_steps=5000, ema=0.9999)
    denoiser.diffusion.shift = 0.5
    denoiser.model.update(
        channels=(512, 1024, 1792),
        blocks=(3, 3, 4),
        attention=(False, False, True),
        exchange=(False, False, True),
        time_strides=(1, 2),
        head_dim=128,
        embedding=2048,
        groups=32,
    )
    config.lock()
    return config
