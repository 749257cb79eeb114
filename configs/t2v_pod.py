"""Text to video with sound on a TPU pod: about 2 B parameters, 65 frames at 256 px, 16 kHz. Not yet run.

    python -m vdm_jax.train --config=configs/t2v_pod.py --workdir=gs://BUCKET/t2v --config.data.path=gs://BUCKET/tfds
    python -m vdm_jax.dry_run --config=configs/t2v_pod.py --topology=v5e:16x16,v6e:8x8,v5p:4x4x4

Parameters are split over groups of 16 chips, so that a shard is still wide and a larger slice has more such groups,
with the same memory and traffic a chip; of the forward pass what products give is kept, the rest computed again. The
autoencoder cuts frames into squares of 4 x 4 pixels first: from squares of 2 x 2 its encoder alone was half the bound.

The TPU compiler of v5e:16x16 (6.5 minutes of CPU time): 1,957.8 M parameters, 2 clips a chip. A step is 35.5 TFLOP a
chip, 33.2 as executed, and needs 7.3 of 16 GiB; it receives 7.1 GiB in all-gathers and 7.3 in all-reduces. Bound:
255 ms, 64 % of it compute, 36 % memory. v6e:8x8 and v5p:4x4x4: not yet run.

Latents are [17, 32, 32, 16] for the picture and [17 * 20, 32] for the sound.
"""

from configs import t2v_300m


def get_config():
    config = t2v_300m.get_config()
    config.unlock()
    config.mesh.update(data=-1, fsdp=16)
    config.data.update(frames=65, size=256)

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
    denoiser.update(steps=500_000, batch_size=512, remat="pointwise")
    denoiser.diffusion.shift = 0.5
    denoiser.model.update(channels=(512, 1024, 1792), blocks=(3, 3, 4), embedding=2048)

    config.lock()
    return config
