"""Text to video with sound on a TPU pod: about 2 B parameters, 65 frames at 256 px, 16 kHz. Not yet run.

    python -m vdm_jax.train --config=configs/t2v_pod.py --workdir=gs://BUCKET/t2v --config.data.path=gs://BUCKET/tfds
    python -m vdm_jax.dry_run --config=configs/t2v_pod.py --topology=v5e:16x16,v6e:8x8,v5p:4x4x4

Parameters are split over groups of 16 chips, so that a shard is still wide and a larger slice has more such groups,
with the same memory and traffic a chip. The denoiser cuts latents into squares of 2 x 2 and convolves in three
dimensions at once (configs/choices.py: directions are learnt best so): both are more FLOPs for each byte that norms and
activation functions move. The autoencoder cuts frames into squares of 4 x 4 pixels: from squares of 2 x 2 its encoder
alone was half the bound. Nothing is rematerialised, as all of it fits.

What the TPU compilers say of 1,915.0 M parameters and a batch of 1,024, all three compiled at once on two CPU cores in
576, 951 and 675 s (v5e:16x16 with 512 clips, one other compilation beside it: 288 s):

              clips a chip   executed/model   HBM a chip     all-gather, all-reduce   bound    compute  memory  network
    v5e:16x16            4             0.92  11.0 of 16 GiB        3.7, 7.1 GiB       529 ms     79 %    21 %     11 %
    v6e:8x8             16             0.88  19.0 of 32 GiB        3.7, 7.0 GiB       452 ms     73 %    27 %      6 %
    v5p:4x4x4           16             0.88  16.3 of 95 GiB        3.7, 7.0 GiB       749 ms     92 %     8 %      3 %

Of what is bound by memory on v6e 43 % is the frozen video encoder (of 8 clips a chip).

Weak scaling: v5e:4x4, 8x8 and 16x16 with a batch of 64, 256 and 1,024 take the same 82.4 TFLOP a chip and step; 10.9,
11.0 and 11.0 GiB; an all-gather of 3.7 GiB each, an all-reduce of 6.7, 7.0 and 7.1 GiB; and have the same bound.

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
    denoiser.update(steps=250_000, batch_size=1024, cached_clips=262_144, remat="none")
    denoiser.diffusion.shift = 0.5
    denoiser.model.update(
        patch=2,
        factorised=False,
        channels=(1280, 1280),
        blocks=(3, 3),
        attention=(False, True),
        exchange=(False, True),
        time_strides=(2,),
        embedding=2048,
    )

    config.lock()
    return config
