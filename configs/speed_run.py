"""How fast the denoiser learns: single frames of the tiny world in many words, one setting changed at a time.

    python -m vdm_jax.train --config=configs/speed_run.py:NAME --workdir=runs/NAME

All names share the stages before the denoiser (copy them from the first run). Mean of `loss_video` in metrics.jsonl
over steps 151 to 200 of the denoiser, one seed, 0.8 to 1.1 s a step on two CPU cores:

    name             loss_video   accuracy of hard negatives
    heavy            0.187        62 %
    base             0.138        63 %
    rate_6           0.115        60 %
    rate_12          0.115        62 %
    rate_6_none      0.108        62 %

`heavy` has the weights of hard negatives that fine-tuning had. Its loss is 1.13 at step 50, of which the denoising is
0.30. It needs 500 steps for the loss that `base` has after 200.
"""

from configs import world_words
from vdm_jax.errors import UserError

CHANGES = {
    "base": {},
    "heavy": {"weight": 0.1, "anchor": 0.02},
    "rate_6": {"learning_rate": 6e-3},
    "rate_12": {"learning_rate": 12e-3},
    "rate_6_none": {"learning_rate": 6e-3, "weight": 0.0},
}


def get_config(name="base"):
    if name not in CHANGES:
        raise UserError(f"no speed run {name!r}: use one of {', '.join(CHANGES)}")
    changes = {"learning_rate": 3e-3, "weight": 0.01, "anchor": 0.0, **CHANGES[name]}
    config = world_words.get_config()
    config.unlock()

    denoiser = config.denoiser
    denoiser.update(steps=2000, ema=0.998, learning_rate=changes["learning_rate"])
    denoiser.diffusion.update(shift=0.4, sigmoid_bias=-2.0)
    denoiser.diffusion.patterns = {"text": 0.9, "per_modality": 0.1}
    denoiser.hard_negatives.update(
        words=world_words.LOOKS, log_snr=(-7.0, -2.0), weight=changes["weight"], anchor=changes["anchor"]
    )
    # Only the denoiser sees single frames.
    frames = {"data.frames": 1, "denoiser.batch_size": 96, "denoiser.cached_clips": 32768}
    denoiser.phases = ({"share": 1.0, **frames},)
    config.validation.every = 0

    config.lock()
    return config
