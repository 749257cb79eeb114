"""Text to video with sound on a TPU pod: 2,039 M parameters, 65 frames at 256 px, 16 kHz. Not yet run.

    python -m vdm_jax.train --config=configs/t2v_pod.py --workdir=gs://BUCKET/t2v \\
        --config.data.path=gs://BUCKET/tfds --config.data.tfds.name=NAME --config.data.tfds.audio_key=audio
    python -m vdm_jax.dry_run --config=configs/t2v_pod.py --topology=v5e:16x16,v6e:8x8,v5p:4x4x4

Hardware: 64 to 256 chips. Parameters are split over groups of 16 chips. A larger slice has more groups, with the same
memory and traffic a chip. The denoiser cuts latents into squares of 2 x 2 and has few wide blocks of full 3-D
convolutions: all three raise the FLOPs for each byte that norms and activation functions move. Nothing is recomputed in
the backward pass, because everything fits.
Latents: video [17, 32, 32, 16], audio [17 * 20, 32].
Compiled with a batch of 2,048: 11.7 of 16 GiB on v5e:16x16, 25.7 of 32 GiB on v6e:8x8, 26.2 of 95 GiB on v5p:4x4x4.
docs/performance.md has the table.
"""

from configs import t2v_300m


def get_config():
    config = t2v_300m.get_config()
    config.unlock()
    config.mesh.update(data=-1, fsdp=16)
    config.data.update(frames=65, size=(256, 256))

    vae = config.video_autoencoder
    vae.update(steps=200_000, batch_size=256)
    vae.model.update(channels=(256, 512, 512))
    config.audio_autoencoder.update(steps=200_000, batch_size=256)
    clip = config.clip
    clip.update(steps=100_000, batch_size=4096)
    clip.model.text.update(width=1024, layers=12, heads=16)
    clip.model.video.update(channels=(256, 512, 1024))
    clip.model.embedding = 768

    denoiser = config.denoiser
    denoiser.update(steps=125_000, batch_size=2048, cached_clips=2_097_152, remat="none")
    denoiser.diffusion.shift = 0.5
    denoiser.model.update(
        patch=2,
        channels=(1280, 1280),
        blocks=(3, 3),
        embedding=2048,
    )

    config.lock()
    return config
