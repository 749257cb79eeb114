"""A System: the four models of a config, and what each stage trains. `build(config)` makes one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vdm_jax import lora, sharding
from vdm_jax.data import buckets, text
from vdm_jax.errors import UserError
from vdm_jax.models.layers import apply_remat
from vdm_jax.system.layout import Layout, layout
from vdm_jax.system.losses import make_stages
from vdm_jax.system.networks import make_models, remat_modes, to_float, to_uint8
from vdm_jax.system.parts import is_finetuned, open_denoiser, open_parts


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """All models of a config, the conversions between clips, latents and text, and the stages that train the models.

    `params` in the methods is {stage: tree of parameters}. It may have one more key, 'statistics', for the latents:
    {modality: {'mean' [C], 'std' [C]}}. A method reads only the entries that it needs.
    """

    config: ConfigDict
    layout: Layout
    models: dict  # {stage: Flax module}, and "teacher" if the denoiser is a student (see distillation.py)
    parts: dict  # {stage that is not trained here: where its model comes from}, see parts.py
    published: Any = None  # the parts.Published of denoiser.source, whose denoiser is trained further
    stages: dict = dataclasses.field(default_factory=dict)  # {name: losses.Stage}; `build` makes them last

    @property
    def param_shapes(self):
        """The shapes of the parameters of every model, {stage: tree of ShapeDtypeStruct}.

        A stage trains these parameters, or adapters of them.
        """
        return {name: stage.encoder_shapes.get("base", stage.param_shapes) for name, stage in self.stages.items()}

    @property
    def diffusion(self):
        """config.denoiser.diffusion, with the noise levels of a published denoiser as `table`."""
        settings = self.config.denoiser.diffusion
        return {**settings, "table": self.models["denoiser"].schedule.table} if self.published else settings

    @property
    def known_statistics(self):
        """The statistics of the latents that a published denoiser was trained with; None for our own denoiser."""
        if not self.published:
            return None
        mean, std = self.models["video_autoencoder"].latent_statistics
        return {"video": {"mean": mean, "std": std}}

    def read_published(self, mesh=None):
        """The parameters of the published denoiser, as training starts from them; mesh: see parts.Published.read.

        The base of adapters takes half of the memory: it has the precision of exported weights. Raises UserError.
        """
        params = self.published.read(mesh)
        base = self.stages["denoiser"].encoder_shapes.get("base")
        return params if base is None else jax.tree.map(lambda x, of: x.astype(of.dtype), params, base)

    def denoiser_params(self, params, encoder_params):
        """The denoiser's parameters: `params`, or what the adapters `params` make of encoder_params["base"]."""
        adapters = lora.active(self.config.denoiser)
        if not adapters:
            return params
        base = jax.tree.map(lambda x: x.astype(jnp.float32), encoder_params["base"])
        return lora.merge(base, sharding.all_gather_params(params, jnp.float32), adapters.alpha)

    def apply(self, stage, params, *arguments, method=None):
        """The output of a stage's model. method: of the module; None: __call__."""
        with jax.named_scope(f"{stage}_{method}" if method else stage):
            module = self.models[stage]
            gathered = sharding.all_gather_params(params[stage], module.dtype)
            if hasattr(module, "in_chunks"):  # in memory that does not grow with the length of the clip
                return module.in_chunks(gathered, method, *arguments)
            return module.apply({"params": gathered}, *arguments, method=method)

    def apply_fn(self, stage, method=None):
        """Returns call(params of the stage, *arguments), which does what `apply` does, with config.<stage>.remat."""
        return self._with_remat(stage, lambda params, *rest: self.apply(stage, {stage: params}, *rest, method=method))

    def denoise_fn(self, params, encoder_params):
        """Returns the denoiser as a function (z, log_snr, cond) -> prediction, with config.denoiser.remat.

        Adapters are merged inside what remat computes again: merged weights would take as much memory as their base.
        """

        def call(params, base, *rest):
            return self.apply("denoiser", {"denoiser": self.denoiser_params(params, base)}, *rest)

        base = {name: encoder_params[name] for name in ("base",) if name in encoder_params}
        return functools.partial(self._with_remat("denoiser", call), params, base)

    def _with_remat(self, stage, call):
        modes = remat_modes(self.config, stage)
        return apply_remat(call, modes[0]) if len(modes) == 1 else call  # the U-Net applies several modes

    def encode(self, params, video, audio):
        """Clips, uint8 [B, F, H, W, 3] and float32 [B, N] -> latents {'video': [B, T, h, w, C], 'audio': [B, K*T, D]}.

        With 'statistics', every channel gets mean 0 and variance 1. The sound is left out where no model has it.
        """
        z = {"video": self.apply("video_autoencoder", params, to_float(video), method="encode")[0]}
        if self.layout.audio:
            z["audio"] = self.apply("audio_autoencoder", params, self.codec_audio(audio), method="encode")[0]
        if "statistics" not in params:
            return z
        statistics = params["statistics"]
        return {name: (z[name] - statistics[name]["mean"]) / statistics[name]["std"] for name in z}

    def decode(self, params, z):
        """Latents, as `encode` gives them with 'statistics' -> (video uint8 [B, F, H, W, 3], audio float32 [B, N])."""
        statistics = params["statistics"]
        z = {name: z[name] * statistics[name]["std"] + statistics[name]["mean"] for name in z}
        video = self.apply("video_autoencoder", params, z["video"], method="decode")
        audio = self.apply("audio_autoencoder", params, z["audio"], method="decode")
        return to_uint8(video), self.trim_audio(audio)

    def reconstruct(self, stage, params, x):
        """x encoded and decoded by one autoencoder, which decodes the mean latents: video uint8 or audio float32."""
        is_video = stage == "video_autoencoder"
        z = self.apply(stage, params, to_float(x) if is_video else self.codec_audio(x), method="encode")[0]
        out = self.apply(stage, params, z, method="decode")
        return to_uint8(out) if is_video else self.trim_audio(out)

    def tokenize(self, texts):
        """Texts -> tokens int32 [B, L]. A warning tells which text is cut."""
        encode = self.parts["clip"].tokenize if "clip" in self.parts else text.encode
        return encode(texts, self.config.data.text_length)

    def encode_text(self, params, tokens):
        """Tokens int32 [B, L] -> text {'states': [B, L, D_text], 'mask': bool [B, L], 'pooled': [B, D_text]}."""
        mask = self.parts["clip"].mask(tokens) if "clip" in self.parts else text.mask(tokens)
        return self.apply("clip", params, tokens, mask, method="encode_text") | {"mask": mask}

    def encode_null_text(self, params):
        """The encoded null text, of batch size 1, as `encode_text` gives it."""
        return self.encode_text(params, self.tokenize([text.NULL_TEXT]))

    def pool_control(self, control):
        """Control of video frames [B, F, A] -> of latent frames [B, T, A]: the mean over the frames of each.

        The first latent frame holds one video frame.
        """
        f_t = self.layout.f_t
        control = jnp.concatenate([jnp.repeat(control[:, :1], f_t - 1, 1), control], 1)  # [B, T * f_t, A]
        return control.reshape(len(control), -1, f_t, control.shape[-1]).mean(2)

    def unknown_control(self, latent_frames, clips=1):
        """The control of clips whose buttons are not known, {'control': [B, T, A]}; {} for a denoiser without control.

        It is part of `cond`, see models/unet.py. Training drops the control of some clips to it.
        """
        return {"control": jnp.full((clips, latent_frames, self.layout.control), -1.0)} if self.layout.control else {}

    def write_memory(self, params, tokens, z):
        """The memory tokens [B, M, D] after a window with clean latents z; see system/memory.py.

        params: the denoiser's.
        """
        writer = self.models["memory_writer"]
        gathered = sharding.all_gather_params(params["memory_writer"], writer.dtype)
        return writer.apply({"params": gathered}, tokens, z)

    def codec_audio(self, audio):
        """[B, N] -> what the audio codec encodes: padded, and as [B, N, channels] for a codec of several channels."""
        channels, audio = getattr(self.models["audio_autoencoder"], "audio_channels", None), self.pad_audio(audio)
        return audio if channels is None else jnp.repeat(audio[..., None], channels, -1)

    def pad_audio(self, audio):
        """[B, N] -> [B, T * f_t * samples_per_frame], with f_t - 1 video frames of silence before frame 0.

        The first latent frame holds one video frame, but its sound tokens cover the length of f_t frames.
        """
        return jnp.pad(audio, ((0, 0), ((self.layout.f_t - 1) * self.layout.samples_per_frame, 0)))

    def trim_audio(self, audio):
        """Undoes `codec_audio`, and limits the sound to [-1, 1]. Several channels become their mean."""
        audio = audio if audio.ndim == 2 else audio.mean(-1)
        return jnp.clip(audio[:, (self.layout.f_t - 1) * self.layout.samples_per_frame :], -1.0, 1.0)

    def with_shape(self, frames, size):
        """This System for clips of `frames` frames and `size` (height, width) pixels, with the same parameters.

        Raises UserError where the models do not take such clips.
        """
        config = self.config.copy_and_resolve_references()
        config.data.update(frames=frames, size=tuple(size))
        system = dataclasses.replace(self, config=config.lock(), layout=layout(config, self.parts))
        stages = make_stages(system)
        kept = ("init", "param_shapes", "encoder_shapes")
        stages = {
            name: stage._replace(**{key: getattr(self.stages[name], key) for key in kept})
            for name, stage in stages.items()
        }
        return dataclasses.replace(system, stages=stages)

    def in_buckets(self, name):
        """The Systems that stage `name` is trained on, one for each bucket; this System alone where there are none."""
        if not self.config.data.get("buckets") or not self.stages[name].any_shape:
            return [self]
        return [self.of_bucket(bucket) for bucket in buckets.parse_all(self.config.data.buckets)]

    def of_bucket(self, bucket):
        """This System for clips of a data/buckets.py Bucket. Raises UserError."""
        try:
            return self.with_shape(bucket.frames, (bucket.height, bucket.width))
        except UserError as error:
            raise UserError(f"data.buckets, {bucket}: {error}") from None

    def check_trained(self, name):
        """Raises UserError where a folder has the model of stage `name`, or where there is no such stage."""
        self.check_stage(name)
        if name in self.parts:
            raise UserError(f"--stage={name} is not trained here: {self.parts[name].folder} has it")

    def check_stage(self, name):
        """Raises UserError where there is no stage `name`: a published denoiser has none for sound."""
        if name not in self.stages:
            raise UserError(f"there is no --stage={name}, because the model of denoiser.source has no sound")

    def check_mesh(self, mesh, names):
        """Raises UserError where the mesh cannot evenly split the models or activations of the stages `names`."""
        for name in names:
            self.check_stage(name)
            stage = self.stages[name]
            sharding.check_axes(mesh, self.param_shapes[name], name, stage.sequence_sizes)

    def check_batch(self, mesh, name):
        """Raises UserError where stage `name` is not trained, or where the mesh cannot evenly split its batch."""
        self.check_trained(name)
        settings = self.config[name]
        sharding.check_batch(
            settings.batch_size,
            mesh,
            settings.accumulate,
            self.stages[name].clips_per_negative,
            f"{name}.hard_negatives.every",
        )


def build(config):
    """The System of a config. Raises UserError where settings do not fit together, or where there is no device."""
    sharding.find_devices()
    parts = open_parts(config)
    sizes = layout(config, parts)
    published, denoiser = open_denoiser(config) if is_finetuned(config) else (None, None)
    system = System(config, sizes, make_models(config, sizes, parts, denoiser), parts, published)
    return dataclasses.replace(system, stages=make_stages(system))
