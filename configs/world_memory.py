"""A memory for the reference weights: what a scene has shown comes back as itself, also after a cut.

    python -m vdm_jax.weights import --weights=reference --config=configs/world_memory.py --workdir=runs/memory
    python -m vdm_jax.train --config=configs/world_memory.py --workdir=runs/memory --stage=denoiser

Only the memory is trained. The rest of the denoiser stays as it is, so the first window of a clip is that of the
reference weights, bit for bit. A training clip has four windows of 17 frames, which overlap by 7 frames.

Not yet run.
"""

from configs import world_tiny


def get_config():
    config = world_tiny.get_config()
    config.unlock()

    denoiser = config.denoiser
    denoiser.trained = "memory"
    denoiser.model.update(memory=16, memory_width=96, memory_past=2)
    denoiser.memory.update(windows=4, cuts=0.3)
    denoiser.hard_negatives.words = ()
    # With its caption a window needs no memory, so most windows are trained without.
    denoiser.update(steps=4000, batch_size=8, cached_clips=8192, text_dropout=0.7)
    denoiser.diffusion.patterns = {"text": 0.6, "continue": 0.3, "per_modality": 0.1}

    config.lock()
    return config
