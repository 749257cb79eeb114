"""Text to video with sound on a TPU pod: about 2 B parameters, 65 frames at 256 px, 16 kHz. Not yet run.

    python -m vdm_jax.train --config=configs/t2v_pod.py --workdir=gs://BUCKET/t2v \\
        --config.data.path=gs://BUCKET/tfds --config.data.tfds.name=NAME --config.data.tfds.audio_key=audio
    python -m vdm_jax.dry_run --config=configs/t2v_pod.py --topology=v5e:16x16,v6e:8x8,v5p:4x4x4

Parameters are split over groups of 16 chips, so that a shard is still wide and a larger slice has more such groups,
with the same memory and traffic a chip. The denoiser cuts latents into squares of 2 x 2 and convolves in three
dimensions at once (configs/choices.py: directions are learnt best so), in few wide blocks: all three are more FLOPs for
each byte that norms and activation functions move. Nothing is apply_remat, as all of it fits.

Clips are encoded once, before the denoiser trains: 2,097,152 of them, each of which is then seen 122 times, take 2.3 TB
in the run's folder, 1.1 MB each, half of that the text's states. Every process encodes files of its own: the four chips
of a v5e host have a bound of 158 ms for 32 clips (--topology=v5e:2x2 --part=encode --rows=32 --config.mesh.fsdp=1);
how fast videos are read has not been timed. Encoded afresh for every batch (--config.denoiser.cached_clips=0) clips
took a quarter of a step on v6e:8x8 (of 1,915 M parameters, channels=(1024, 1280), blocks=(4, 3): 452 instead of 349 ms,
and 73 instead of 84 % of that compute).

What the TPU compilers say of 2,039.2 M parameters and a batch of 2,048, each compiled on two CPU cores beside other
work, in 247, 775 and 422 s:

              clips a chip   executed/model   HBM a chip     all-gather, all-reduce   bound    compute  memory  network
    v5e:16x16            8             0.87  11.7 of 16 GiB        3.8, 7.6 GiB       850 ms     94 %     6 %      7 %
    v6e:8x8             32             0.87  25.7 of 32 GiB        3.8, 7.5 GiB       775 ms     88 %    12 %      3 %
    v5p:4x4x4           32             0.87  26.2 of 95 GiB        3.8, 7.5 GiB     1,439 ms     96 %     4 %      1 %

All steps are 20,400, 4,400 and 8,800 chip-hours at an assumed 40 % of the peak. With 4 clips a chip, a batch of 1,024,
v5e:16x16 has a bound of 498 ms, 84 % of it compute.

Weak scaling: v5e:4x4, 8x8 and 16x16 with a batch of 128, 512 and 2,048 execute the same 158.3 TFLOP a chip and step, in
11.3, 11.8 and 11.7 GiB; an all-gather of 3.8 GiB each, an all-reduce of 7.1, 7.5 and 7.6 GiB; and have the same bound.

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
