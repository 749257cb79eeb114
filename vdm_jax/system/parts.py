"""Parts that a run does not train: a codec or a text encoder from the folder of a published model, or of another run.

config.video_codec.source, config.audio_codec.source and config.text_encoder.source name the folders. "reference" names
the weights of this package. A part takes the place of a stage: the stage is not trained, and its parameters are read
from the part's folder, whenever they are used.

config.denoiser.source names the folder of a published pipeline (diffusers' TextToVideoSDPipeline, such as ModelScope
and ZeroScope). Its autoencoder and its text encoder are parts, and its denoiser is trained further.

    model_index.json                       names the pipeline
    unet/, vae/, text_encoder/             a config.json and safetensors files, see run/huggingface.py
    tokenizer/                             see data/tokenizers.py
    scheduler/scheduler_config.json        the noise schedule, see published_denoiser.py
"""

import dataclasses
import functools
import hashlib
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax import sharding
from vdm_jax.data import content, text, tokenizers
from vdm_jax.errors import UserError, one_of
from vdm_jax.models.audio_autoencoder import AudioAutoencoder
from vdm_jax.models.clip import Clip
from vdm_jax.models.published import naming
from vdm_jax.models.published.autoencoder_kl import AutoencoderKL
from vdm_jax.models.published.autoencoder_kl_wan import AutoencoderKLWan
from vdm_jax.models.published.autoencoder_oobleck import AutoencoderOobleck
from vdm_jax.models.published.bert_model import BertModel
from vdm_jax.models.published.clip_text_model import CLIPTextModel
from vdm_jax.models.published.t5_encoder_model import T5EncoderModel, UMT5EncoderModel
from vdm_jax.models.published.text_layers import TextEncoder
from vdm_jax.models.published.unet3d_condition import UNet3DConditionModel
from vdm_jax.models.video_autoencoder import VideoAutoencoder
from vdm_jax.run import folder, huggingface, storage
from vdm_jax.settings import PARTS, STAGES
from vdm_jax.system import published_denoiser

STAGE_OF = dict(zip(PARTS, STAGES))
PUBLISHED = {
    "video_codec": (AutoencoderKLWan, AutoencoderKL),
    "audio_codec": (AutoencoderOobleck,),
    "text_encoder": (CLIPTextModel, T5EncoderModel, UMT5EncoderModel, BertModel),
}
PIPELINES = ("TextToVideoSDPipeline", "TextToVideoMSPipeline")
IN_PIPELINE = {"unet": UNet3DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


@dataclasses.dataclass(frozen=True)
class Published:
    """A part from the folder of a published model."""

    folder: Any  # epath.Path
    module: Any  # Flax module
    beside: tuple = ()  # further files that its hash covers
    is_trained: bool = False  # whether it is only where a training starts from

    @functools.cached_property
    def has_weights(self):
        """Whether there are weights. Without any, the folder tells the sizes alone, which is enough for dry_run."""
        return any(path.suffix == ".safetensors" for path in self.folder.iterdir())

    @property
    def param_dtype(self):
        """The type of kernels and embeddings: that of the products, unless they are trained."""
        return jnp.float32 if self.is_trained else self.module.dtype

    def param_shapes(self):
        most = len(huggingface.read_tensors(self.folder)) if self.has_weights else None
        return naming.param_shapes(self.module, most, self.folder, self.param_dtype)

    def read(self, mesh=None):
        """Returns the parameters, split over a mesh; None gives NumPy arrays. Raises UserError."""
        tensors = huggingface.read_tensors(self.folder)
        return naming.to_params(tensors, self.module, mesh, self.folder, self.param_dtype)

    @functools.cached_property
    def fingerprint(self):
        """A hash of the config, the weights and the tokenizer. Raises UserError."""
        huggingface.read_tensors(self.folder)
        is_text = isinstance(self.module, TextEncoder)
        tokenizer = tokenizers.files(self.folder) if is_text and self.tokenizer else ()
        return huggingface.fingerprint(self.folder, (*self.beside, *tokenizer))

    @functools.cached_property
    def tokenizer(self):
        """The tokenizers.Tokenizer of a text encoder. Raises UserError."""
        tokenizer = tokenizers.read(self.folder)
        if tokenizer.size > self.module.vocab_size:
            raise UserError(
                f"{self.folder}: the tokenizer has {tokenizer.size} tokens, but the text encoder only "
                f"{self.module.vocab_size}: give the tokenizer of these weights"
            )
        return tokenizer

    def tokenize(self, texts, length):
        if not self.has_weights:
            return np.zeros((len(texts), length), np.int32)
        return self.tokenizer.encode(texts, length)[0]

    def mask(self, tokens):
        """Which tokens [B, L] the text encoder and the denoiser read, bool [B, L]."""
        if self.module.reads_padding or not self.has_weights:
            return jnp.ones(tokens.shape, bool)
        return tokens != self.tokenizer.pad


@dataclasses.dataclass(frozen=True)
class Trained:
    """A part that another run has trained, in the run's folder or in a folder of exported weights."""

    folder: Any  # epath.Path
    module: Any  # Flax module
    stage: str
    inputs: tuple  # small inputs of the module

    def param_shapes(self):
        return jax.eval_shape(self.module.init, jax.random.key(0), *self.inputs)["params"]

    def read(self, mesh=None):
        """Returns the parameters, as `Published.read` does."""
        expected = self.param_shapes()
        exported = self.folder / f"{self.stage}.safetensors"
        if exported.exists():
            params = folder.read_exported(self.folder, self.stage, expected)
        else:
            params, _ = folder.read_params(self.folder, self.stage, expected, folder.run_number(self.folder))
        params = folder.as_exported(params)
        return params if mesh is None else jax.device_put(params, sharding.state_shardings(params, mesh))

    @functools.cached_property
    def fingerprint(self):
        """A hash of the weights."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self.read()):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()

    def tokenize(self, texts, length):
        return text.encode(texts, length)

    def mask(self, tokens):
        return text.mask(tokens)


def open_parts(config):
    """Returns {stage: Published or Trained} of a config. Only config files are read.

    Raises UserError where a source is no such part, or is not what the run began with.
    """
    parts = {}
    if is_finetuned(config):
        pipeline, _ = _pipeline_of(config)
        parts = {"video_autoencoder": pipeline["vae"], "clip": pipeline["text_encoder"]}
    for key, stage in STAGE_OF.items():
        if key in config and config[key].source:  # the config.json of older weights has no parts
            parts[stage] = _open(key, folder.given(config[key].source), config)
        if stage in parts:
            _check_hash(key, parts[stage], config)
    return parts


def is_finetuned(config):
    """Returns whether a config trains the denoiser of a published pipeline. It has no sound."""
    return bool(config.denoiser.get("source"))  # the config.json of older weights has no such key


def open_denoiser(config):
    """Returns (Published, published_denoiser.Denoiser) of config.denoiser.source. Only config files are read.

    Raises UserError as `open_parts` does, and for settings that this denoiser does not take.
    """
    pipeline, schedule = _pipeline_of(config)
    published_denoiser.check(config, schedule)
    text_encoder, length = pipeline["text_encoder"], config.data.text_length
    if text_encoder.has_weights and text_encoder.tokenizer.length != length:
        raise UserError(
            f"data.text_length={length}: the texts of denoiser.source={config.denoiser.source} have "
            f"{text_encoder.tokenizer.length} tokens: set it so"
        )
    _check_hash("denoiser", pipeline["unet"], config)
    return pipeline["unet"], published_denoiser.Denoiser(pipeline["unet"].module, schedule)


def _pipeline_of(config):
    return open_pipeline(config.denoiser.source, jnp.dtype(config.compute_dtype))


def open_pipeline(source, dtype):
    """Returns ({name in IN_PIPELINE: Published}, published_denoiser.Schedule) of the folder of a published pipeline.

    Only config files are read. Raises UserError where a part is missing, is of another class, or does not fit the
    others.
    """
    source = storage.given(source)
    if not source.is_dir():
        raise UserError(f"denoiser.source={source} is no folder: give its folder of today, --denoiser.source=FOLDER")
    if storage.in_bucket(source):
        raise UserError(f"{source} is in a bucket: copy the published model to a folder on a disk, and give its path")
    one_of("published pipeline", huggingface.read_json(source / huggingface.PIPELINE).get("_class_name"), PIPELINES)
    scheduler = source / "scheduler" / "scheduler_config.json"
    schedule, parts = published_denoiser.read_schedule(scheduler), {}
    for key, module in IN_PIPELINE.items():
        name, settings = huggingface.read_config(source / key)
        if name != module.__name__:
            raise UserError(
                f"{source / key} holds a {name}, where a {module.__name__} belongs: give the folder of another model"
            )
        if settings.get("use_attention_mask"):
            raise UserError(f"{source / key}: use_attention_mask is not supported: use weights with another config")
        made = naming.from_config(module, settings, source / key, dtype=dtype)
        is_denoiser = key == "unet"
        parts[key] = Published(source / key, made, (scheduler,) if is_denoiser else (), is_trained=is_denoiser)
    unet, vae, text_encoder = (part.module for part in parts.values())
    for what, value, wanted in (
        ("unet.cross_attention_dim", unet.cross_attention_dim, text_encoder.hidden_size),
        ("unet.in_channels", unet.in_channels, vae.latent_channels),
        ("unet.out_channels", unet.out_channels, vae.latent_channels),
        ("vae.out_channels", vae.out_channels, 3),
    ):
        if value != wanted:
            raise UserError(f"{source}: {what} is {value}, but the other parts need {wanted}: {huggingface.FIX}")
    for part in parts.values():
        part.param_shapes()  # raises for settings without sense
    return parts, schedule


def _check_hash(key, part, config):
    """Raises UserError where a part has other weights than config.<key>.hash says."""
    if config[key].hash and part.fingerprint != config[key].hash:
        raise UserError(
            f"{key}.source={part.folder} has other weights than those that the denoiser was trained with: give the "
            "folder that has them"
        )


def with_hashes(config):
    """Returns a copy of the config that names the hash of each part, of the data and of a teacher."""
    config = config.copy_and_resolve_references().unlock()
    for stage, part in open_parts(config).items():
        key = next(key for key in STAGE_OF if STAGE_OF[key] == stage)
        config[key].hash = part.fingerprint
    if is_finetuned(config):
        config.denoiser.hash = open_denoiser(config)[0].fingerprint
    config.data.hash = content.digest(config)
    if teacher := config.denoiser.distillation.teacher:
        config.denoiser.distillation.hash = folder.exported_hash(teacher, "denoiser")
    return config.lock()


def _open(key, source, config):
    dtype, stage = jnp.dtype(config.compute_dtype), STAGE_OF[key]
    if not source.is_dir():
        seen = "" if source.is_absolute() else f" in {os.getcwd()}"
        fix = f"give the part's folder of today, --{key}.source=FOLDER, or in Python parts={{{key!r}: FOLDER}}"
        fix = fix if config[key].hash else "name the folder of a published model or of a run"
        raise UserError(f"{key}.source={source} is no folder{seen}: {fix}")
    if (source / stage).is_dir() or (source / f"{stage}.safetensors").exists():
        return folder.read_system(source, lambda theirs: _trained(source, theirs, stage, config, dtype))
    if folder.is_exported(source) or any((source / name).exists() for name in ("lock", *STAGES)):
        raise UserError(f"{key}.source={source} has no {stage}: name the folder that it uses, or another one")
    name, settings = huggingface.read_config(source)
    known = {module.__name__: module for module in PUBLISHED[key]}
    if name not in known:
        raise UserError(f"{key}.source={source} holds a {name}: it must be one of {', '.join(known)}")
    part = Published(source, naming.from_config(known[name], settings, source / huggingface.CONFIG, dtype=dtype))
    length, most = config.data.text_length, getattr(part.module, "max_position_embeddings", math.inf)
    if length > most:
        raise UserError(
            f"text_encoder.source={source} takes {most} tokens: set data.text_length={length} to that or less"
        )
    part.param_shapes()  # raises for settings without sense, before sizes are derived from them
    return part


def _trained(source, theirs, stage, config, dtype):
    settings, data = theirs[stage].model, theirs.data
    frame = jnp.zeros((1, 1, *data.size, 3))
    if stage == "video_autoencoder":
        return Trained(source, VideoAutoencoder(**settings, dtype=dtype), stage, (frame, jax.random.key(0)))
    if stage == "audio_autoencoder":
        module = AudioAutoencoder(**settings, dtype=dtype)
        return Trained(source, module, stage, (jnp.zeros((1, module.hop)), jax.random.key(0)))
    if data.text_length != config.data.text_length:
        raise UserError(
            f"text_encoder.source={source} has texts of {data.text_length} tokens: set data.text_length to that"
        )
    text_settings = dict(settings.text, vocabulary=text.VOCAB_SIZE, length=data.text_length)
    module = Clip(text_settings, settings.video.to_dict(), settings.embedding, dtype=dtype)
    tokens = jnp.zeros((1, data.text_length), jnp.int32)
    clip = jnp.zeros((1, data.frames, *data.size, 3))
    return Trained(source, module, stage, (tokens, jnp.ones(tokens.shape, bool), clip))
