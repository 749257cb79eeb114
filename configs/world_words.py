"""The tiny world in the words people use: the recipe that is to follow world_tiny.py as that of the shipped weights.

    python -m vdm_jax.train --config=configs/world_words.py --workdir=runs/world_words

The denoiser learns from single frames first, then twice from short clips, then twice from whole ones. Not yet run to
its end: configs/world_words_begun holds the weights at the end of the third phase. docs/reference_run.md tells the run.
"""

from configs import world_tiny
from vdm_jax.data import captions

LOOKS = (captions.COLOR_WORDS, captions.SHAPE_WORDS)
STEPS = (2500, 3000, 4000, 5000, 5000)  # of the five phases of the denoiser


def get_config():
    config = world_tiny.get_config()
    config.unlock()

    config.data.world.update(wordings=0.7, undirected=0.3)
    config.clip.steps = 3000
    config.clip.hard_negatives.words = (*LOOKS, *captions.DIRECTION_WORDS)

    denoiser = config.denoiser
    denoiser.update(steps=sum(STEPS), learning_rate=5e-3)
    denoiser.model.use_bias = False
    denoiser.hard_negatives.words = ()
    frames = {
        "data.frames": 1,
        "denoiser.batch_size": 96,
        "denoiser.cached_clips": 32768,
        "denoiser.learning_rate": 6e-3,
        "denoiser.ema": 0.998,
        "denoiser.diffusion.shift": 0.4,
        "denoiser.diffusion.sigmoid_bias": -2.0,
        "denoiser.diffusion.patterns": {"text": 0.9, "per_modality": 0.1},
    }
    short = {
        "data.frames": 9,
        "denoiser.batch_size": 48,
        "denoiser.diffusion.patterns": {"text": 0.8, "per_modality": 0.1, "per_frame": 0.05, "image": 0.05},
    }
    # After the second phase the denoiser preferred the right caption of two objects in only 75 % of clips at log SNR 0.
    # At these levels objects are visible, so there it learns first which object has which look.
    visible = {
        **short,
        "denoiser.cached_clips": 49152,
        "denoiser.diffusion.shift": 0.4,
        "denoiser.diffusion.sigmoid_bias": -2.0,
    }
    # More clips whose sound is given, and more that go on, than world_tiny.py has: these were the weakest.
    whole = {
        "denoiser.cached_clips": 49152,
        "denoiser.diffusion.patterns": {
            "text": 0.46,
            "per_modality": 0.06,
            "per_frame": 0.05,
            "foley": 0.06,
            "audio": 0.14,
            "image": 0.05,
            "continue": 0.14,
            "between": 0.02,
            "pyramid": 0.02,
        },
    }
    phases = zip(STEPS, (frames, short, visible, whole, whole))
    denoiser.phases = tuple({"share": steps / sum(STEPS), **settings} for steps, settings in phases)

    config.lock()
    return config
