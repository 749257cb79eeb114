"""The full procedural world: up to three objects, gravity, an occluder, open sides, a moving camera, changing light.

    python -m vdm_jax.train --config=configs/world.py --workdir=runs/world

Not yet trained. The models are those of world_tiny.py, so a run can start from the reference weights:

    python -m vdm_jax.weights import --config=configs/world.py --weights=reference --workdir=runs/world

docs/results.md has the figures of these weights in this world, without a training step.
"""

from configs import world_tiny


def get_config():
    config = world_tiny.get_config()
    config.unlock()

    config.data.world.update(
        objects=(0.4, 0.35, 0.25), gravity=0.2, occluder=0.2, leave=0.2, pan=0.2, light=0.2, undirected=0.25
    )
    config.video_autoencoder.steps = 12000
    config.audio_autoencoder.steps = 4000
    config.clip.steps = 3000
    config.denoiser.update(steps=60000, batch_size=32, cached_clips=65536, ema=0.9995)

    config.lock()
    return config
