"""Text to video with sound on one TPU host: about 300 M parameters, 33 frames at 128 px, 16 kHz. Not yet trained.

    python -m vdm_jax.train --config=configs/t2v_300m.py --workdir=gs://BUCKET/run \\
        --config.data.path=gs://BUCKET/tfds --config.data.tfds.name=NAME --config.data.tfds.audio_key=audio
    python -m vdm_jax.dry_run --config=configs/t2v_300m.py --topology=v5e:2x4

For the eight chips of a v5e or v6e host. On a single chip, as a free Colab TPU: --config.denoiser.batch_size=4, which
--topology=v5e:1x1 says fits in 6.6 of 16 GiB (bound 59 ms, 46 % of it compute).
Latents are [9, 16, 16, 16] for the picture and [9 * 20, 32] for the sound.

The second command: 321.3 M parameters, 8 clips a chip. A step is 12.1 TFLOP a chip, 84 % of those executed, and needs
2.66 of 16 GiB; it receives 0.57 GiB in all-gathers, 0.06 in all-reduces, 0.49 in reduce-scatters. Bound: 63.0 ms, 80 %
of it compute, 20 % memory; 103 chip-hours for all steps at an assumed 40 % of the peak. It had compiled after 218 s.

Clips are encoded once, before the denoiser trains: 262,144 of them, each of which is then seen 73 times, take 91 GB in
the run's folder. Encoded afresh for every batch (--config.denoiser.cached_clips=0) the bound is 84.0 ms, 73 % compute.
A TFDS data set (a cartoon at 128 px, zlib) is read at 62 clips/s by one thread, 82 by two, on two CPU cores, says
`python -m vdm_jax.bench --config=configs/t2v_300m.py --part=data`.

With 32 clips a chip (--config.denoiser.batch_size=256), remat none, "blocks,none" and blocks: 6.05, 5.44 and 5.33 GiB,
bounds of 243, 275 and 296 ms. With 512 (4096 in all) it does not fit, by 42 GiB; --try found that accumulate=8 does.

Few wide blocks that convolve in three dimensions at once: a shape of before, factorized, channels=(256, 512, 768),
blocks=(2, 3, 3), time_strides=(1, 2), of 335.9 M parameters, had a bound of 28.9 ms, 49 % compute, and directions are
learnt best in three dimensions (configs/choices.py). On one H200 (jax 0.11.2) that shape reached 204 TFLOP/s with 32
clips, 20.6 % of the peak; the present one, `python -m vdm_jax.bench --config=configs/t2v_300m.py`, 484 TFLOP/s with 64,
48.9 %: 201 ms a step (183 to 205), 319 clips a second, in 16.4 GiB. Two thirds of that time are cuDNN's convolutions.
In two dimensions, with the frames before and after as channels, they took 192 ms (180 to 203) in 19.8 GiB; so, but with
the kernel's gradient as one product for each of its 27 places, 219 (208 to 230): neither is used.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.unlock()
    config.compute_dtype = "bfloat16"
    config.checkpoint_every = 1000
    config.mesh.update(data=1, fsdp=-1)
    config.data.update(source="tfds", frames=33, size=128, fps=16, sample_rate=16000, text_length=256, threads=16)

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
