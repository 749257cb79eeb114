"""The full procedural world: one to three objects, gravity, occluder, open sides, camera, light. Not yet trained.

    python -m vdm_jax.train --config=configs/world.py --workdir=runs/world

The models are those of world_tiny.py, so that a run can go on from the reference weights, which saves most of the time:

    python -m vdm_jax.weights import --config=configs/world.py --weights=reference --workdir=runs/world

Imported stages stand where world_tiny.py ended, and have more steps here. As imported, without a step in this world
(`python -m vdm_jax.evaluate --workdir=runs/world --out=report --clips=32 --prompts=64`): 100 % of one object, 92 % of
two, 97 % of directions, there in 98 % of frames, 95 % of impacts sound, 84 % of onsets have an impact; but this asks
for nothing that world_tiny.py lacks. Clips of this world it knows less well: the autoencoders reach PSNR 26.9 dB, SSIM
0.940 and 92 % of onsets within half a frame (35.6, 0.983 and 97 % in world_tiny.py's), text finds its video among 64
for 81 % (100 %), and at log SNR 4.5 the denoiser's loss is 1.35 for the picture (0.46).
"""

from configs import world_tiny


def get_config():
    config = world_tiny.get_config()
    config.unlock()

    config.data.world = dict(
        objects=(0.4, 0.35, 0.25), gravity=0.2, occluder=0.2, leave=0.2, pan=0.2, light=0.2, undirected=0.25
    )
    config.video_autoencoder.steps = 12000
    config.audio_autoencoder.steps = 4000
    config.clip.steps = 3000
    config.denoiser.update(steps=60000, batch_size=32, cached_clips=65536, ema=0.9995)

    config.lock()
    return config
