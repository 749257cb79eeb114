"""The full procedural world: one to three objects, gravity, occluder, open sides, camera, light. Not yet run.

    python -m vdm_jax.train --config=configs/world.py --workdir=runs/world

The models are those of world_tiny.py, so that a run can go on from the reference weights, which saves most of the time:

    python -m vdm_jax.checkpoint import --weights=reference --workdir=runs/world

(imported stages count as trained as far as world_tiny.py trained them; here they have more steps).
"""

from configs import world_tiny


def get_config():
    config = world_tiny.get_config()
    config.unlock()

    config.data.world = dict(
        objects=(0.4, 0.35, 0.25), gravity=0.2, occluder=0.2, leave=0.2, pan=0.2, light=0.2, undirected=0.25
    )
    config.video_autoencoder.steps = 4000
    config.audio_autoencoder.steps = 2000
    config.clip.steps = 3000
    config.denoiser.update(steps=60000, batch_size=32, cached_clips=65536, ema=0.9995)

    config.lock()
    return config
