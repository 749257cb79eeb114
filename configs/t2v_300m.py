"""Text to video with sound on one TPU host: 321 M parameters, 33 frames at 128 px, 16 kHz. Not yet trained.

    python -m vdm_jax.train --config=configs/t2v_300m.py --workdir=gs://BUCKET/run \\
        --config.data.path=gs://BUCKET/tfds --config.data.tfds.name=NAME --config.data.tfds.audio_key=audio

Hardware: the eight chips of a v5e or v6e host. One chip, as a free Colab TPU has: --config.denoiser.batch_size=4.
Latents: video [9, 16, 16, 16], audio [9 * 20, 32].
Compiled for v5e:2x4, 8 clips a chip: 2.66 of 16 GiB, and at least 63.0 ms a step
(`python -m vdm_jax.dry_run --config=configs/t2v_300m.py --topology=v5e:2x4`). All steps take 103 chip-hours at an
assumed 40 % of the peak.
Timed on one H200, 64 clips a step: 201 ms, 484 TFLOP/s, 48.9 % of the peak
(`python -m vdm_jax.bench --config=configs/t2v_300m.py`).
docs/performance.md has other batch sizes, other designs and the cost of encoding.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.unlock()
    config.compute_dtype = "bfloat16"
    config.checkpoint_every = 1000
    config.mesh.update(data=1, fsdp=-1)
    config.data.update(
        source="tfds", frames=33, size=(128, 128), fps=16, sample_rate=16000, text_length=256, threads=16
    )

    for stage in ("video_autoencoder", "audio_autoencoder", "clip", "denoiser"):
        config[stage].update(optimizer="adamw", remat="blocks")
    vae = config.video_autoencoder
    vae.update(steps=100_000, batch_size=64, learning_rate=2e-4)
    vae.model.update(
        patch=4, channels=(256, 384, 512), space_strides=(2, 1), blocks=(1, 2, 2), middle_blocks=2, groups=32
    )
    audio = config.audio_autoencoder
    audio.update(steps=100_000, batch_size=64, learning_rate=2e-4)
    audio.model.update(patch=8, channels=(128, 256, 512), blocks=(2, 2, 2), latent_channels=32, groups=32)
    clip = config.clip
    clip.update(steps=50_000, batch_size=1024, learning_rate=5e-4, weight_decay=0.1)
    clip.model.text.update(width=512, layers=8, heads=8)
    clip.model.video.update(patch=8, channels=(128, 256, 512), groups=32)
    clip.model.embedding = 512

    denoiser = config.denoiser
    denoiser.update(steps=300_000, batch_size=64, learning_rate=1e-4, warmup_steps=5000, ema=0.9999, remat="none")
    denoiser.cached_clips = 262_144
    denoiser.model.update(
        factorized=False,
        channels=(512, 640),
        blocks=(2, 2),
        attention=(False, True),
        cross_modal=(False, True),
        time_strides=(2,),
        head_dim=128,
        embedding=1024,
        groups=32,
    )
    config.lock()
    return config
