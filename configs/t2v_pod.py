"""Text to video with sound on a TPU pod: about 2 B parameters, 65 frames at 256 px, 16 kHz. Not yet run.

    python -m vdm_jax.train --config=configs/t2v_pod.py --workdir=gs://BUCKET/t2v --config.data.path=gs://BUCKET/tfds
    python -m vdm_jax.dry_run --config=configs/t2v_pod.py --topology=v5e:16x16,v6e:8x8,v5p:4x4x4

Parameters are split over groups of 16 chips, so that a shard is still wide and a larger slice has more such groups,
with the same memory and traffic a chip; of the forward pass what products give is kept, the rest computed again. The
autoencoder cuts frames into squares of 4 x 4 pixels first: from squares of 2 x 2 its encoder alone was half the bound.

What the TPU compilers say of 1,957.8 M parameters and a batch of 512, at the lowest priority beside other work for the
last two, so that their compile times say little (v5e:16x16: 6.5 minutes of CPU time):

              clips a chip   executed/model   HBM a chip     all-gather, all-reduce   bound    compute  memory  network
    v5e:16x16            2             0.94   7.3 of 16 GiB        7.1, 7.3 GiB       255 ms     64 %    36 %     30 %
    v6e:8x8              8             0.93  21.6 of 32 GiB        7.1, 7.2 GiB       257 ms     52 %    48 %     13 %
    v5p:4x4x4            8             0.93  18.7 of 95 GiB        7.1, 7.2 GiB       352 ms     81 %    19 %      7 %

Weak scaling: v5e:4x4, 8x8 and 16x16 with a batch of 32, 128 and 512 take the same 33.2 TFLOP a chip and step; 7.2, 7.5
and 7.3 GiB; an all-gather of 7.1 GiB each, an all-reduce of 6.8, 7.2 and 7.3 GiB; and have the same bound. The first
compiles in 324 s on two CPU cores beside other work.

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
    denoiser.update(steps=250_000, batch_size=1024, remat="none")
    denoiser.diffusion.shift = 0.5
    denoiser.model.update(
        patch=2,
        factorised=False,
        channels=(1024, 1280),
        blocks=(4, 3),
        attention=(False, True),
        exchange=(False, True),
        time_strides=(2,),
        embedding=2048,
    )

    config.lock()
    return config
