"""A student of the reference weights: clips in 4 steps, with one network evaluation in a step.

    python -m vdm_jax.weights import --weights=reference --config=configs/world_tiny_4step.py --workdir=runs/student
    python -m vdm_jax.train --config=configs/world_tiny_4step.py --workdir=runs/student --stage=denoiser
    python -m vdm_jax.weights export --workdir=runs/student --out=vdm_jax/reference/student

Then `python -m vdm_jax.sample --steps=4` uses the student. The training was not yet run to its end.
"""

from configs import world_tiny


def get_config():
    config = world_tiny.get_config()
    config.unlock()

    denoiser = config.denoiser
    denoiser.update(steps=4000, learning_rate=5e-4)
    denoiser.hard_negatives.words = ()
    denoiser.distillation.teacher = "reference"
    denoiser.distillation.guidance.update(config.sample.guidance)
    denoiser.model.student = True

    config.sample.update(method="ddim", steps=4, first_step_times=())
    for name in config.sample.guidance:
        config.sample.guidance[name] = 1.0

    config.lock()
    return config
