"""What the defaults of training rest on: one small model and budget, one thing changed at a time.

    python -m vdm_jax.checkpoint import --weights=reference --workdir=runs/noise
    rm -r runs/noise/denoiser/checkpoints
    python -m vdm_jax.train --config=configs/choices.py:noise --workdir=runs/noise --stage=denoiser
    python -m vdm_jax.evaluate --workdir=runs/noise --out=reports/noise
"""

from configs import world_tiny

DIFFUSION = {
    "noise": dict(target="noise"),
    "x0": dict(target="x0"),
    "uniform": dict(weighting="uniform"),
    "min_snr": dict(weighting="min_snr"),
    "bias_-1": dict(sigmoid_bias=-1.0),
    "shift_1": dict(shift=1.0),
    "sigmoid": dict(schedule="sigmoid"),
    "linear_beta": dict(schedule="linear_beta"),
}
OTHERS = {
    "default": {},
    "full": dict(model=dict(factorised=False)),
    "ema_0.9": dict(ema=0.9),
    "ema_0.999": dict(ema=0.999),
    "adamw": dict(optimiser="adamw"),
}


def get_config(choice="default"):
    config = world_tiny.get_config()
    config.unlock()

    config.data.world.objects = (1.0,)
    denoiser = config.denoiser
    denoiser.update(steps=400, batch_size=16, ema=0.99, cached_clips=4096)
    denoiser.model.update(channels=(48, 64), audio_channels=(32, 48), blocks=(1, 1), head_dim=32, text_layers=1)
    denoiser.diffusion.patterns = dict(same=1.0)
    if choice in DIFFUSION:
        denoiser.diffusion.update(DIFFUSION[choice])
    elif choice in OTHERS:
        denoiser.update(OTHERS[choice])
    else:
        raise ValueError(f"no choice {choice!r}: use one of {', '.join([*OTHERS, *DIFFUSION])}")
    config.evaluate.update(clips=64, prompts=96)
    config.sample.steps = 16
    config.preview_every = 0

    config.lock()
    return config
