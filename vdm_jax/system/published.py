"""Published text-to-video pipelines: the folders of diffusers' TextToVideoSDPipeline, such as ModelScope and ZeroScope.

    model_index.json                       names the pipeline
    unet/, vae/, text_encoder/             a config.json and safetensors files, see run/huggingface.py
    tokenizer/                             see data/tokenizers.py
    scheduler/scheduler_config.json        the noise schedule

The denoiser has the interface of ours, with video alone and one noise level a clip, so that the samplers and the
guidance of vdm_jax.samplers work with it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vdm_jax import samplers, sharding
from vdm_jax.data import tokenizers
from vdm_jax.errors import UserError, one_of
from vdm_jax.models.published import naming
from vdm_jax.models.published.autoencoder_kl import AutoencoderKL
from vdm_jax.models.published.clip_text_model import CLIPTextModel
from vdm_jax.models.published.unet3d_condition import UNet3DConditionModel
from vdm_jax.run import huggingface
from vdm_jax.run.progress import progress
from vdm_jax.system import adapters
from vdm_jax.system.networks import to_uint8
from vdm_jax.system.sampling import draw_noise

PIPELINES = ("TextToVideoSDPipeline", "TextToVideoMSPipeline")
MODULES = {"unet": UNet3DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
METHODS = {"DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpmpp_2m"}  # our name for the sampler of a class
FPS = 8  # frames a second of the clips that ModelScope was trained with
SECONDS = 2.0
MAX_SECONDS = 60  # all frames of a clip are in memory together
STEPS = 50
GUIDANCE = 9.0
CLEAN = 60.0  # log_snr of latents without noise


# -------------------------------------------------------------------------------------------------- the noise schedule


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


# ---------------------------------------------------------------------------------------------------------- the models


def is_pipeline(folder):
    """Returns whether a folder is that of a published pipeline."""
    return (epath.Path(folder) / huggingface.PIPELINE).exists()


def read_model(folder, module, dtype=jnp.float32):
    """Returns the module with the settings of a folder. Raises UserError, also where the folder holds another class."""
    name, config = huggingface.read_config(folder)
    if name != module.__name__:
        raise UserError(f"{folder} holds a {name}, where a {module.__name__} belongs: give the folder of another model")
    if config.get("use_attention_mask"):
        raise UserError(f"{folder}: use_attention_mask is not supported: use weights with another config")
    return naming.from_config(module, config, source=folder, dtype=dtype)


def read_params(folder, model, mesh=None):
    """Returns the parameters of a module from a folder, split over the mesh, see naming.to_params. Raises UserError."""
    return naming.to_params(huggingface.read_tensors(folder), model, mesh, source=folder)


def load(folder, dtype="float32", lora=()):
    """Returns the TextToVideo of a published folder. Raises UserError where a part is missing, damaged or of no use.

    dtype: the type of products, "float32" or "bfloat16"
    lora: adapters that are merged into the unet, texts as in adapters.merge_files
    """
    folder = epath.Path(folder)
    name = huggingface.read_json(folder / huggingface.PIPELINE).get("_class_name")
    one_of("published pipeline", name, PIPELINES)
    schedule = read_schedule(folder / "scheduler" / "scheduler_config.json")
    tokenizer = tokenizers.read(folder / "text_encoder")
    models = {part: read_model(folder / part, module, jnp.dtype(dtype)) for part, module in MODULES.items()}
    pairs = {
        "unet.cross_attention_dim": (models["unet"].cross_attention_dim, models["text_encoder"].hidden_size),
        "unet.in_channels": (models["unet"].in_channels, models["vae"].latent_channels),
        "unet.out_channels": (models["unet"].out_channels, models["vae"].latent_channels),
        "vae.out_channels": (models["vae"].out_channels, 3),
    }
    for what, (value, wanted) in pairs.items():
        if value != wanted:
            raise UserError(f"{folder}: {what} is {value}, but the other parts need {wanted}: {huggingface.FIX}")
    if tokenizer.size > models["text_encoder"].vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.size} tokens, the text encoder only "
            f"{models['text_encoder'].vocab_size}: {huggingface.FIX}"
        )
    mesh = sharding.make_mesh(dict(data=1, fsdp=-1, sequence=1, tensor=1))
    params = {part: read_params(folder / part, model, mesh) for part, model in models.items()}
    params["unet"] = adapters.merge_files(params["unet"], lora)
    return TextToVideo(schedule, tokenizer, models, params, mesh)


@dataclasses.dataclass(frozen=True, eq=False)
class TextToVideo:
    """A published pipeline, ready to sample. Each number of frames and of steps compiles once."""

    schedule: Schedule
    tokenizer: Any
    models: dict  # {"unet", "vae" and "text_encoder": Flax module}
    params: dict  # {the same: parameters}
    mesh: jax.sharding.Mesh

    def denoise_fn(self, params, z, log_snr, cond):
        """Returns the prediction of schedule.target, {"video": [B, T, h, w, C]}, for one noise level a clip.

        z: {"video": [B, T, h, w, C]}
        log_snr: {"video": [B, T]}, the same for all frames of a clip
        cond: {"states": [B, L, D]}, of `encode_text`
        """
        timesteps = self.schedule.timestep_of(log_snr["video"][:, 0])
        return {"video": self.models["unet"].apply({"params": params}, z["video"], timesteps, cond["states"])}

    def encode_text(self, params, tokens):
        """Tokens int32 [B, L] -> {"states": [B, L, D]}. The padding is read, too, as in diffusers."""
        mask = jnp.ones(tokens.shape, bool)
        return {"states": self.models["text_encoder"].apply({"params": params}, tokens, mask)[0]}

    def decode(self, params, z):
        """Latents [B, T, h, w, C] -> video uint8 [B, T, H, W, 3]. One frame after the other: it takes less memory."""
        vae = self.models["vae"]
        mean, std = vae.latent_statistics
        frames = (z * std + mean).reshape(-1, 1, 1, *z.shape[2:])
        video = jax.lax.map(lambda frame: to_uint8(vae.apply({"params": params}, frame, method="decode")), frames)
        return video.reshape(*z.shape[:2], *video.shape[3:])

    def clips(self, prompts, *, seed=0, seconds=None, size=None, steps=None, method=None, guidance=None, noise=None):
        """Returns videos, uint8 [P, F, H, W, 3], of P prompts.

        seed: the noise of clip i is drawn from (seed, i)
        seconds: length of a clip, at 8 frames a second; None: 2
        size: (height, width) in pixels; None: as in training
        steps: None: 50
        method: of samplers.METHODS; None: that of the folder
        guidance: weight of the text, against the empty prompt; None: 9; 1: no guidance
        noise: float [P, F, h, w, C] in place of that of the seed, or None

        Raises UserError where these do not fit.
        """
        unet, vae = self.models["unet"], self.models["vae"]
        seconds = SECONDS if seconds is None else seconds
        if not 0 < seconds <= MAX_SECONDS:
            raise UserError(f"seconds={seconds}: give a length above 0 and up to {MAX_SECONDS}")
        frames = max(1, round(seconds * FPS))
        steps, guidance = STEPS if steps is None else steps, GUIDANCE if guidance is None else guidance
        method = one_of("method", method or self.schedule.method, samplers.METHODS)
        if not np.isfinite(guidance):
            raise UserError(f"guidance={guidance} must be a finite number")
        if size is None and unet.sample_size is None:
            raise UserError("the config.json of the unet has no sample_size: give a size")
        latents = np.broadcast_to(unet.sample_size, 2) if size is None else np.array(size) // vae.f_s
        if not (latents > 0).all() or (size is not None and any(np.array(size) % vae.f_s)):
            raise UserError(f"size={size} must be multiples of {vae.f_s} pixels, above 0")
        shape = (frames, *map(int, latents), unet.in_channels)
        levels = self.schedule.levels(steps, method, frames)
        null = self.tokenizer.encode([""])[0]
        tokens = self.tokenizer.encode(list(prompts))[0]
        key, made = jax.random.key(seed), []
        with jax.set_mesh(self.mesh), progress("sampling", len(prompts), "clip") as advance:
            for number in range(len(prompts)):
                given = None if noise is None else {"video": jnp.asarray(noise[number : number + 1], jnp.float32)}
                z = given or draw_noise(key, np.array([number]), {"video": shape}, 0)
                video = self._program(
                    self.params, key, z, tokens[number : number + 1], null, levels, guidance, method, guidance != 1
                )
                made.append(np.asarray(video))
                advance(1)
        return np.concatenate(made)

    @functools.cached_property
    def _program(self):
        return jax.jit(self._sample, static_argnums=(7, 8))

    def _sample(self, params, key, z, tokens, null, levels, weight, method, is_guided):
        """Returns the video, uint8 [B, F, H, W, 3], of noise z; guided by the text where is_guided."""
        params = {name: sharding.all_gather_params(tree, self.models[name].dtype) for name, tree in params.items()}
        cond = self.encode_text(params["text_encoder"], tokens)
        terms = []
        if is_guided:
            terms = samplers.text_guidance(weight, self.encode_text(params["text_encoder"], null))
        denoise_fn = samplers.guided(functools.partial(self.denoise_fn, params["unet"]), terms)
        config = {"target": self.schedule.target, "log_snr_max": CLEAN}
        z = samplers.sample(denoise_fn, key, z, cond, levels, method, config)
        return sharding.replicate(self.decode(params["vae"], z["video"]))
