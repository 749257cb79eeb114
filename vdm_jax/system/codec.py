"""What each of the four stages trains: its parameters, its loss, and how clips become latents and come back."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vdm_jax import conditioning, diffusion, sharding
from vdm_jax.data import text
from vdm_jax.errors import UserError
from vdm_jax.models.audio_autoencoder import AudioAutoencoder
from vdm_jax.models.clip import Clip
from vdm_jax.models.layers import REMAT, apply_remat
from vdm_jax.models.unet import UNet
from vdm_jax.models.video_autoencoder import VideoAutoencoder
from vdm_jax.system.layout import STAGES

VIDEO = ("batch", "time", "height", "width", "channel")  # dimensions of pictures, and of their latents
SOUND = ("batch", "token", "channel")


class Stage(NamedTuple):
    """init(key) -> params; loss(params, key, batch, frozen) -> (scalar, metrics).

    batch: {'video' uint8 [B, F, H, W, 3], 'audio' float32 [B, N], 'tokens' int32 [B, L]}, of stages with hard negatives
    'hard_negative' int32 [B, L] too; the denoiser also takes encoded batches, {'z', 'text'[, 'hard_negative']}
    (see `encode`, `encode_text`). frozen: {stage: params} of earlier stages and 'statistics', empty for all but the
    denoiser.
    """

    init: Callable
    loss: Callable


class Layout(NamedTuple):
    """Sizes that follow from the config."""

    frames: int  # F, video frames a clip
    samples: int  # N, audio samples a clip
    samples_per_frame: int
    f_t: int  # video frames a latent frame
    latent_frames: int  # T
    latent_fps: float  # latent frames a second
    video: tuple[int, int, int]  # h, w, C of a video latent frame
    audio: tuple[int, int]  # K tokens a latent frame, D channels


def layout(config, frames=None):
    """The Layout of clips of `frames` video frames (default: the config's). Raises UserError where sizes do not fit."""
    data, video, audio = config.data, config.video_autoencoder.model, config.audio_autoencoder.model
    frames = data.frames if frames is None else frames
    for name, value in dict(frames=frames, size=data.size, fps=data.fps, sample_rate=data.sample_rate).items():
        if value < 1:
            raise UserError(f"data.{name}={value} must be at least 1")
    _check_depths(config)
    f_t, f_s = math.prod(video.time_strides), video.patch * math.prod(video.space_strides)
    hop = audio.patch * math.prod(audio.strides)
    if (frames - 1) % f_t:
        low = (frames - 1) // f_t * f_t + 1
        raise UserError(f"{frames} frames do not fill latent frames of {f_t}: use {low} or {low + f_t} (1 + {f_t} * n)")
    if data.size % f_s:
        raise UserError(f"data.size={data.size} is not a multiple of {f_s}: use {data.size // f_s * f_s or f_s}")
    if data.sample_rate % data.fps:
        raise UserError(f"data.sample_rate={data.sample_rate} is not a multiple of data.fps={data.fps}")
    per_frame = data.sample_rate // data.fps
    if per_frame * f_t % hop:
        raise UserError(
            f"a latent frame of {per_frame * f_t} samples is no multiple of the {hop} samples of a sound token"
        )
    _check_halvings(config.denoiser.model, data.size // f_s, per_frame * f_t // hop)
    if data.size % config.clip.model.video.patch:
        raise UserError(f"data.size={data.size} is not a multiple of clip.model.video.patch")
    if max(config.audio_autoencoder.stft_windows) > data.frames * per_frame:
        raise UserError(f"audio_autoencoder.stft_windows go past the {data.frames * per_frame} samples of a clip")
    return Layout(
        frames=frames,
        samples=frames * per_frame,
        samples_per_frame=per_frame,
        f_t=f_t,
        latent_frames=1 + (frames - 1) // f_t,
        latent_fps=data.fps / f_t,
        video=(data.size // f_s, data.size // f_s, video.latent_channels),
        audio=(per_frame * f_t // hop, audio.latent_channels),
    )


def _check_numbers(name, value):
    """Raises UserError unless the settings of a model are whole numbers, and such as can be built."""
    if hasattr(value, "items"):  # settings of a part
        for key, part in value.items():
            _check_numbers(f"{name}.{key}", part)
        return
    counts = ("blocks", "middle_blocks", "layers", "text_layers", "attention", "cross_modal", "factorized")
    low, high = (0, 1000) if name.split(".")[-1] in counts else (1, 1_000_000)
    for one in value if isinstance(value, tuple | list) else (value,):
        if not isinstance(one, int) or not low <= one <= high:
            raise UserError(f"{name}={value!r} must be of whole numbers from {low} to {high}")


def _check_depths(config):
    """Raises UserError unless the settings of each level are as many as the model's channels."""
    for stage in STAGES:
        model = config[stage].model
        _check_numbers(f"{stage}.model", model)
        for name, value in model.items():
            levels = name in ("blocks", "attention", "cross_modal", "audio_channels")
            if (levels or name.endswith("strides")) and not (name == "audio_channels" and not value):
                wanted = len(model.channels) - (not levels)
                if len(value) != wanted:
                    raise UserError(
                        f"{stage}.model.{name}={value} must have {wanted} values for channels={model.channels}"
                    )


def _check_halvings(denoiser, side, tokens):
    """Raises UserError unless latents [side, side] and K = tokens a frame halve as often as the denoiser asks."""
    halvings = len(denoiser.channels) - 1
    if side % denoiser.patch:
        raise UserError(f"denoiser.model.patch={denoiser.patch} does not divide the {side}x{side} latents")
    side //= denoiser.patch
    if side % 2**halvings:
        raise UserError(
            f"denoiser.model.channels halve the {side}x{side} latents {halvings} times, and {side} is no multiple of "
            f"{2**halvings}: use fewer levels or another data.size"
        )
    for i in range(1, halvings + 1):
        if tokens * math.prod(denoiser.time_strides[:i]) % 2**i:
            raise UserError(
                f"{tokens} sound tokens a latent frame do not halve {i} times: use fewer denoiser levels, or another "
                "audio_autoencoder.model.patch or strides"
            )


def together(config, name):
    """How many clips of stage `name` go together: of each part of a batch a device holds a multiple of so many."""
    negatives = config.denoiser.hard_negatives
    return negatives.every if name == "denoiser" and negatives.words else 1


def check_batch(config, name, mesh):
    """Raises UserError where the batch of stage `name` does not divide over the mesh."""
    settings = config[name]
    sharding.check_batch(
        settings.batch_size, mesh, settings.accumulate, together(config, name), "denoiser.hard_negatives.every"
    )


def check_mesh(config, mesh, names):
    """Raises UserError where the mesh does not divide models or latents of stages `names`, or `remat` is wrong."""
    params, size = abstract_params(config), layout(config)
    frames = {"denoiser": size.latent_frames, "audio_autoencoder": size.latent_frames * size.audio[0]}
    side = size.video[0]
    for name in names:
        remat(config, name)
        shape, dimensions = (1, frames.get(name, size.frames), side, side, 1), VIDEO
        if name == "audio_autoencoder":
            shape, dimensions = (1, frames[name], 1), SOUND
        sharding.check_axes(mesh, params[name], {f"the clips of {name}": (shape, dimensions)})


def remat(config, name):
    """How stage `name` is apply_remat: (mode,), or of the denoiser a mode for each level. Raises UserError."""
    modes = tuple(diffusion.one_of(f"{name}.remat", mode, REMAT) for mode in config[name].remat.split(","))
    levels = len(config[name].model.channels) if name == "denoiser" else 1
    if len(modes) not in (1, levels):
        one = "one value" + (f", or one for each of {levels} levels" if levels > 1 else "")
        raise UserError(f"{name}.remat={config[name].remat!r} has {len(modes)} values: it takes {one}")
    return modes


# ---------------------------------------------------------------------------------------------------------- models


def models(config):
    """{stage: Flax module} for a config."""
    dtype = jnp.dtype(diffusion.one_of("compute_dtype", config.compute_dtype, ("float32", "bfloat16")))
    text_size = dict(vocabulary=text.VOCAB_SIZE, length=config.data.text_length)
    clip = config.clip.model
    size, modes = layout(config), remat(config, "denoiser")
    unet = dict(config.denoiser.model, remat=modes if len(modes) > 1 else (), latent_fps=size.latent_fps)
    return {
        "video_autoencoder": VideoAutoencoder(**config.video_autoencoder.model, dtype=dtype),
        "audio_autoencoder": AudioAutoencoder(**config.audio_autoencoder.model, dtype=dtype),
        "clip": Clip({**text_size, **clip.text}, clip.video.to_dict(), clip.embedding, dtype=dtype),
        "denoiser": UNet(**unet, dtype=dtype),
    }


def init_fns(config):
    """{stage: init(key) -> params}; every init runs under jit or eval_shape."""
    made, size = models(config), layout(config)
    video = jnp.zeros((1, size.frames, config.data.size, config.data.size, 3))
    audio = jnp.zeros((1, size.latent_frames * size.f_t * size.samples_per_frame))
    tokens = jnp.zeros((1, config.data.text_length), jnp.int32)
    z = {name: jnp.zeros((1, *shape)) for name, shape in latent_shapes(size).items()}
    level = {name: jnp.zeros((1, size.latent_frames)) for name in z}
    width = config.clip.model.text.width
    cond = {
        "states": jnp.zeros((1, config.data.text_length, width)),
        "mask": jnp.ones((1, config.data.text_length), bool),
        "pooled": jnp.zeros((1, width)),
    }
    arguments = {
        "video_autoencoder": (video, jax.random.key(0)),
        "audio_autoencoder": (audio, jax.random.key(0)),
        "clip": (tokens, tokens == 0, video),
        "denoiser": (z, level, cond),
    }
    return {name: lambda key, name=name: made[name].init(key, *arguments[name])["params"] for name in STAGES}


def abstract_params(config):
    """{stage: tree of ShapeDtypeStruct}."""
    key = config.to_json_best_effort()
    if key not in _shapes:
        _shapes[key] = {name: jax.eval_shape(init, jax.random.key(0)) for name, init in init_fns(config).items()}
    return dict(_shapes[key])


_shapes = {}  # by recipe: every check of a run asks for them, and tracing takes a second or more each time


def hard_negative_words(config, name):
    """Groups of words that stage `name` swaps in captions; () for none."""
    return config[name].hard_negatives.words if "hard_negatives" in config[name] else ()


def abstract_batch(config, name):
    """The batch that stage `name` trains on, as ShapeDtypeStructs."""
    size, side, rows = layout(config), config.data.size, config[name].batch_size
    tokens = jax.ShapeDtypeStruct((rows, config.data.text_length), jnp.int32)
    clips = {
        "video": jax.ShapeDtypeStruct((rows, size.frames, side, side, 3), jnp.uint8),
        "audio": jax.ShapeDtypeStruct((rows, size.samples), jnp.float32),
        "tokens": tokens,
    }
    if hard_negative_words(config, name):
        clips["hard_negative"] = tokens
    if name != "denoiser" or not config.denoiser.cached_clips:
        return clips
    words = jax.eval_shape(lambda p, t: encode_text(config, p, t), abstract_frozen(config), tokens)
    z = {m: jax.ShapeDtypeStruct((rows, *shape), jnp.float32) for m, shape in latent_shapes(size).items()}
    encoded = {"z": z, "text": words} | ({"hard_negative": words} if "hard_negative" in clips else {})
    return jax.tree.map(lambda x: x if x.dtype == bool else x.update(dtype=jnp.float16), encoded)


def abstract_frozen(config):
    """What the denoiser needs of earlier stages (see Stage), as ShapeDtypeStructs."""
    params = abstract_params(config)
    per_channel = {m: jax.ShapeDtypeStruct(s[-1:], jnp.float32) for m, s in latent_shapes(layout(config)).items()}
    statistics = {m: {"mean": x, "std": x} for m, x in per_channel.items()}
    return {**{name: params[name] for name in STAGES[:3]}, "statistics": statistics}


def latent_shapes(size):
    """Shapes of one clip's latents: {'video': (T, h, w, C), 'audio': (K*T, D)}."""
    per_frame, channels = size.audio
    return {
        "video": (size.latent_frames, *size.video),
        "audio": (size.latent_frames * per_frame, channels),
    }


# ---------------------------------------------------------------------------------------- clips <-> latents, text


def to_float(video):
    """uint8 0..255 -> float32 in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video):
    """float in [-1, 1] -> uint8 0..255."""
    return jnp.clip(jnp.round((video + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def pad_audio(audio, size):
    """[B, N] -> [B, T * f_t * samples_per_frame]: silence before frame 0, whose latent frame spans f_t frames."""
    return jnp.pad(audio, ((0, 0), ((size.f_t - 1) * size.samples_per_frame, 0)))


def trim_audio(audio, size):
    """Undoes `pad_audio`; the sound of a clip, within [-1, 1]."""
    return jnp.clip(audio[:, (size.f_t - 1) * size.samples_per_frame :], -1.0, 1.0)


def encode(config, frozen, video, audio):
    """Clips -> latents of unit variance. video uint8 [B, F, H, W, 3], audio [B, N] -> {'video', 'audio'}."""
    made = models(config)
    size = layout(config, video.shape[1])
    mean = {
        "video": _apply(made, frozen, "video_autoencoder", "encode", to_float(video))[0],
        "audio": _apply(made, frozen, "audio_autoencoder", "encode", pad_audio(audio, size))[0],
    }
    if "statistics" not in frozen:
        return mean
    s = frozen["statistics"]
    return {name: (mean[name] - s[name]["mean"]) / s[name]["std"] for name in mean}


def decode(config, frozen, z):
    """Latents -> (video uint8 [B, F, H, W, 3], audio float32 [B, N] in [-1, 1])."""
    made, s = models(config), frozen["statistics"]
    z = {name: z[name] * s[name]["std"] + s[name]["mean"] for name in z}
    video = _apply(made, frozen, "video_autoencoder", "decode", z["video"])
    audio = _apply(made, frozen, "audio_autoencoder", "decode", z["audio"])
    return to_uint8(video), trim_audio(audio, layout(config))


def reconstruct(config, stage, params, x):
    """Through one autoencoder and back, without sampling: video uint8 or audio float32, as in a batch."""
    made, size = models(config), layout(config)
    x = to_float(x) if stage == "video_autoencoder" else pad_audio(x, size)
    z = _apply(made, {stage: params}, stage, "encode", x)[0]
    out = _apply(made, {stage: params}, stage, "decode", z)
    return to_uint8(out) if stage == "video_autoencoder" else trim_audio(out, size)


def encode_text(config, frozen, tokens):
    """Tokens int32 [B, L] -> {'states' [B, L, D], 'mask' [B, L], 'pooled' [B, D]}: the text the denoiser reads."""
    mask = text.mask(tokens)
    return _apply(models(config), frozen, "clip", "encode_text", tokens, mask) | {"mask": mask}


def _apply(made, frozen, stage, method, *arguments):
    with jax.named_scope(f"{stage}_{method}" if method else stage):
        params = sharding.all_gather_params(frozen[stage], made[stage].dtype)
        return made[stage].apply({"params": params}, *arguments, method=method)


# ---------------------------------------------------------------------------------------------------------- losses


def build(config):
    """{name: Stage} of the four stages."""
    made, inits, size = models(config), init_fns(config), layout(config)

    def apply(stage, method=None):
        """(params, ...) -> what the stage's model gives, on any mesh, apply_remat as the config says."""

        def call(params, *arguments):
            return _apply(made, {stage: params}, stage, method, *arguments)

        modes = remat(config, stage)
        return apply_remat(call, modes[0]) if len(modes) == 1 else call  # else by level, see UNet

    def video_loss(params, key, batch, frozen):
        video = to_float(batch["video"])
        out, mean, log_variance = apply("video_autoencoder")(params, video, key)
        mse = jnp.mean(jnp.square(out - video))
        kl = _kl(mean, log_variance) / video[0, ..., 0].size
        loss = mse + jnp.mean(jnp.abs(out - video)) + config.video_autoencoder.kl_weight * kl
        return loss, {"loss": loss, "mse": mse, "kl": kl, "psnr": -10 * jnp.log10(mse / 4)}  # range is 2

    def audio_loss(params, key, batch, frozen):
        audio = pad_audio(batch["audio"], size)
        out, mean, log_variance = apply("audio_autoencoder")(params, audio, key)
        wave = jnp.mean(jnp.abs(out - audio)) + 10 * jnp.mean(jnp.square(out - audio))
        stft = sum(stft_distance(out, audio, w) for w in config.audio_autoencoder.stft_windows)
        kl = _kl(mean, log_variance) / audio.shape[1]
        c = config.audio_autoencoder
        loss = wave + c.stft_weight * stft / len(c.stft_windows) + c.kl_weight * kl
        return loss, {"loss": loss, "wave": wave, "stft": stft, "kl": kl}

    def clip_loss(params, key, batch, frozen):
        tokens, video = batch["tokens"], to_float(batch["video"])
        words, pictures, scale = apply("clip")(params, tokens, text.mask(tokens), video)
        logits = scale * words @ pictures.T  # [B, B], a row a text
        by_video, labels = logits.T, jnp.arange(len(logits))
        metrics = {"recall_at_1": jnp.mean(jnp.argmax(logits, 1) == labels), "temperature": 1 / scale}
        if (
            "hard_negative" in batch
        ):  # captions that are nearly right are wrong answers, too: arXiv:2210.01936, section 4
            near = batch["hard_negative"]
            wrong = apply("clip", "embed_text")(params, near, text.mask(near))
            wrong = scale * pictures @ wrong.T  # [B, B], a row a video
            same = jnp.all(near == tokens, 1)  # had no word to change
            told = (jnp.diagonal(wrong) < jnp.diagonal(logits)) & ~same
            metrics["hard_negative_accuracy"] = told.sum() / (~same).sum()
            by_video = jnp.concatenate([by_video, jnp.where(same, -jnp.inf, wrong)], 1)
        cross = optax.softmax_cross_entropy_with_integer_labels
        loss = 0.5 * (cross(logits, labels).mean() + cross(by_video, labels).mean())  # arXiv:2103.00020, fig. 3
        return loss, {"loss": loss, **metrics}

    def denoiser_loss(params, key, batch, frozen):
        if "z" not in batch:
            texts = {"text": batch["tokens"]} | (
                {"hard_negative": batch["hard_negative"]} if "hard_negative" in batch else {}
            )
            batch = {name: encode_text(config, frozen, tokens) for name, tokens in texts.items()} | {
                "z": encode(config, frozen, batch["video"], batch["audio"])
            }
            batch = jax.lax.stop_gradient(batch)
        else:  # from the cache, in half precision
            batch = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(jnp.float32), batch)
        z, words = batch["z"], batch["text"]
        drop_key, key = jax.random.split(key)
        null = encode_text(config, frozen, text.encode([text.NULL_TEXT], config.data.text_length))
        cond = conditioning.drop_text(drop_key, words, null, config.denoiser.text_dropout)
        denoise = functools.partial(apply("denoiser"), params)
        c = config.denoiser
        others = []
        if "hard_negative" in batch:
            some = jax.tree.map(
                lambda x: x.reshape(-1, c.hard_negatives.every, *x.shape[1:])[:, 0], (z, words, batch["hard_negative"])
            )
            near_key = jax.random.fold_in(key, 1)
            others = [diffusion.hard_negative_objective(near_key, *some, c.diffusion.target, c.hard_negatives)]
        loss, metrics = diffusion.loss(denoise, key, z, cond, c.diffusion, *others)
        return loss, {"loss": loss, **metrics}

    losses = dict(zip(STAGES, (video_loss, audio_loss, clip_loss, denoiser_loss), strict=True))
    return {name: Stage(inits[name], losses[name]) for name in STAGES}


def _kl(mean, log_variance):
    """KL of N(mean, exp(log_variance)) to N(0, 1), summed over a clip, batch mean (arXiv:1312.6114, app. B)."""
    kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
    return kl.sum() / mean.shape[0]


def stft_distance(a, b, window):
    """Spectral convergence + log-magnitude L1 of two sounds [B, N] (arXiv:1910.11480, eq. 4, 5), hops of window / 4."""
    a, b = _magnitudes(a, window), _magnitudes(b, window)
    floor = 1e-7 * b.size  # a mean of -70 dB, so that a batch of silence is no division by nothing
    convergence = jnp.sqrt(jnp.sum(jnp.square(a - b)) / (jnp.sum(jnp.square(b)) + floor) + 1e-8)
    return convergence + jnp.mean(jnp.abs(jnp.log(a + 1e-3) - jnp.log(b + 1e-3)))


def _magnitudes(audio, window):
    hop = window // 4
    blocks = audio[:, : audio.shape[1] // hop * hop].reshape(audio.shape[0], -1, hop)
    frames = blocks.shape[1] - 3
    windows = jnp.concatenate([blocks[:, i : i + frames] for i in range(4)], -1)  # [B, frames, window]
    hann = jnp.hanning(window)
    spectrum = jnp.fft.rfft(windows * hann)  # [B, frames, window/2 + 1]
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return jnp.sqrt(power + 1e-12) * (2 / hann.sum())  # a full-scale sine reads 1
