"""The denoiser of a published text-to-video pipeline, with the interface of ours, and its noise schedule.

A clip has video alone, and one noise level for all its frames. The schedule is in scheduler/scheduler_config.json.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vdm_jax import diffusion
from vdm_jax.errors import UserError, one_of
from vdm_jax.run import huggingface

METHODS = {"DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpmpp_2m"}  # our name for the sampler of a class
CLEAN = 60.0  # log_snr of latents without noise


class Schedule(NamedTuple):
    """The discrete noise levels of a scheduler_config.json. Timestep n = 0..N-1 has the log_snr table[n]."""

    table: np.ndarray  # float64 [N], falling
    target: str  # of diffusion.TARGETS
    method: str  # the sampler that the file names, of samplers.METHODS
    spacing: str | None  # "leading", "trailing" or "linspace" (arXiv:2305.08891, table 2); None: that of the method
    offset: int  # is added to timesteps with the spacing "leading"
    end: float  # log_snr after the last step of ddim

    def timesteps(self, steps, method):
        """Returns the timesteps, int [steps], falling, at which diffusers' scheduler of this method calls the network.

        Raises UserError for too many steps.
        """
        number = len(self.table)
        multistep = method == "dpmpp_2m"
        count = steps + multistep  # timestep 0 is the end of the multistep scheduler, unless the spacing is "trailing"
        if not 0 < count <= number:
            raise UserError(f"steps={steps}: this noise schedule has {number} levels: give fewer steps")
        spacing = self.spacing or ("linspace" if multistep else "leading")
        if spacing == "trailing":
            return np.round(np.arange(number, 0, -number / steps))[:steps].astype(int) - 1
        if spacing == "linspace":
            return np.linspace(0, number - 1, count).round().astype(int)[::-1][:steps]
        return np.minimum((np.arange(count) * (number // count))[::-1][:steps] + self.offset, number - 1)

    def levels(self, steps, method, frames):
        """Returns the scheduling matrix of samplers.sample, {"video": log_snr float32 [steps+1, frames]}."""
        end = CLEAN if method == "dpmpp_2m" else self.end
        rows = np.append(self.table[self.timesteps(steps, method)], end)
        return {"video": np.repeat(rows[:, None], frames, 1).astype(np.float32)}

    def timestep_of(self, log_snr):
        """Returns the timestep of a log_snr [B], float32; between two timesteps it is interpolated."""
        return jnp.interp(
            -log_snr, jnp.asarray(-self.table, jnp.float32), jnp.arange(len(self.table), dtype=jnp.float32)
        )


def read_schedule(path):
    """Returns the Schedule of a scheduler_config.json. Raises UserError for a setting that is not supported."""
    config = huggingface.read_json(path)
    kind = one_of("scheduler", config.get("_class_name"), METHODS)
    # What a missing key means, and values of other keys that change nothing.
    defaults = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", steps_offset=0)
    defaults |= dict(prediction_type="epsilon", timestep_spacing=None, set_alpha_to_one=True)
    plain = dict(trained_betas=None, rescale_betas_zero_snr=False, thresholding=False, variance_type=None)
    plain |= {f"use_{name}": False for name in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")}
    plain |= dict(use_flow_sigmas=False, use_dynamic_shifting=False, final_sigmas_type="zero", solver_order=2)
    plain |= dict(
        algorithm_type="dpmsolver++", solver_type="midpoint", lambda_min_clipped=-np.inf, euler_at_final=False
    )
    for name, value in plain.items():
        if config.get(name, value) != value:
            raise UserError(f"{path}: {name}={config[name]!r} is not supported, only {value!r}: set it so")
    if config.get("clip_sample", kind == "DDIMScheduler"):
        raise UserError(f"{path}: clip_sample is not supported, for latents go beyond [-1, 1]: set it to false")
    values = {name: config.get(name, default) for name, default in defaults.items()}
    number, first, last = (values[name] for name in ("num_train_timesteps", "beta_start", "beta_end"))
    numbers = all(type(value) in (int, float) for value in (first, last))
    if not numbers or not 0 < first <= last < 1 or type(number) is not int or not 1 <= number <= 100_000:
        raise UserError(f"{path}: num_train_timesteps={number}, beta_start={first} and beta_end={last} have no sense")
    if type(values["steps_offset"]) is not int or not 0 <= values["steps_offset"] < number:
        raise UserError(f"{path}: steps_offset={values['steps_offset']} must be from 0 to {number - 1}")
    betas = {
        "linear": np.linspace(first, last, number),
        "scaled_linear": np.linspace(first**0.5, last**0.5, number) ** 2,
    }[one_of("beta_schedule", values["beta_schedule"], ("linear", "scaled_linear"))]
    targets = {"epsilon": "noise", "sample": "x0", "v_prediction": "v"}
    if values["timestep_spacing"] is not None:
        one_of("timestep_spacing", values["timestep_spacing"], ("leading", "trailing", "linspace"))
    alpha_bar = np.cumprod(1 - betas)  # arXiv:2006.11239, eq. 4
    table = np.log(alpha_bar) - np.log1p(-alpha_bar)
    return Schedule(
        table,
        targets[one_of("prediction_type", values["prediction_type"], targets)],
        METHODS[kind],
        values["timestep_spacing"],
        values["steps_offset"],
        CLEAN if values["set_alpha_to_one"] else float(table[0]),
    )


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A published network as System.models has our own: a function (z, log_snr, cond) -> prediction like z.

    z: {"video": [B, T, h, w, C]}
    log_snr: {"video": [B, T]}, the same for all frames of a clip
    cond: {"states": [B, L, D]}, the text
    """

    unet: Any  # Flax module
    schedule: Schedule
    student = False

    @property
    def dtype(self):
        return self.unet.dtype

    def init(self, key, z, log_snr, cond):
        return self.unet.init(key, z["video"], log_snr["video"][:, 0], cond["states"])

    def apply(self, variables, z, log_snr, cond, method=None):
        timesteps = self.schedule.timestep_of(log_snr["video"][:, 0])
        return {"video": self.unet.apply(variables, z["video"], timesteps, cond["states"])}


def check(config, schedule):
    """Raises UserError where a config has settings that the denoiser of config.denoiser.source does not take."""
    denoiser, settings = config.denoiser, config.denoiser.diffusion
    wanted = {
        "denoiser.diffusion.schedule": (settings.schedule, diffusion.PUBLISHED),
        "denoiser.diffusion.shift": (settings.shift, 1.0),
        "denoiser.diffusion.target": (settings.target, schedule.target),
        "denoiser.diffusion.patterns": (sorted(name for name, x in settings.patterns.items() if x), ["text"]),
        "denoiser.hard_negatives.words": (denoiser.hard_negatives.words, ()),
        "denoiser.distillation.teacher": (denoiser.distillation.teacher, ""),
        "denoiser.model.student": (denoiser.model.student, False),
        "denoiser.lora.base": (denoiser.lora.base, ""),  # the base is the source
        **{f"{part}.source": (config[part].source, "") for part in ("video_codec", "audio_codec", "text_encoder")},
    }
    for key, (value, only) in wanted.items():
        if value != only:
            raise UserError(f"{key}={value!r}: the denoiser of denoiser.source needs {only!r}: set it so")
    if settings.weighting == "sigmoid":
        raise UserError(
            "denoiser.diffusion.weighting='sigmoid' needs a schedule with a slope, but that of denoiser.source has "
            "steps: use 'uniform' or 'min_snr'"
        )
