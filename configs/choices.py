"""Why training has its defaults: one small model, one budget, one choice changed at a time.

    python -m vdm_jax.weights import --weights=reference --workdir=runs/noise
    rm -r runs/noise/denoiser/checkpoints
    python -m vdm_jax.train --config=configs/choices.py:noise --workdir=runs/noise --stage=denoiser --change
    python -m vdm_jax.evaluate --workdir=runs/noise --out=reports/noise

Each choice has 400 steps of 16 clips with one object, about two minutes on two CPU cores. docs/results.md has the table
and what it says.
"""

from configs import world_tiny
from vdm_jax.errors import UserError

CHOICES = {
    "default": {},
    "noise": dict(diffusion=dict(target="noise")),
    "x0": dict(diffusion=dict(target="x0")),
    "uniform": dict(diffusion=dict(weighting="uniform")),
    "min_snr": dict(diffusion=dict(weighting="min_snr")),
    "bias_-1": dict(diffusion=dict(sigmoid_bias=-1.0)),
    "shift_1": dict(diffusion=dict(shift=1.0)),
    "sigmoid": dict(diffusion=dict(schedule="sigmoid")),
    "linear_beta": dict(diffusion=dict(schedule="linear_beta")),
    "full": dict(model=dict(factorized=False)),
    "ema_0.9": dict(ema=0.9),
    "ema_0.999": dict(ema=0.999),
    "adamw": dict(optimizer="adamw"),
}


def get_config(choice="default"):
    config = world_tiny.get_config()
    config.unlock()

    config.data.world.objects = (1.0,)
    denoiser = config.denoiser
    denoiser.update(steps=400, batch_size=16, ema=0.99, cached_clips=4096)
    denoiser.model.update(channels=(48, 64), audio_channels=(32, 48), blocks=(1, 1), head_dim=32, text_layers=1)
    denoiser.diffusion.patterns = dict(text=1.0)
    if choice not in CHOICES:
        raise UserError(f"no choice {choice!r}: use one of {', '.join(CHOICES)}")
    denoiser.update(CHOICES[choice])
    config.evaluate.update(clips=64, prompts=96)
    config.sample.steps = 16
    config.validation.every = 0

    config.lock()
    return config
