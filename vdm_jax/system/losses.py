"""What each stage trains: one record per stage, one function per loss."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vdm_jax import diffusion, lora
from vdm_jax.data import text
from vdm_jax.errors import UserError
from vdm_jax.sharding import named_leaves, path_name
from vdm_jax.system import distillation, hard_negatives, memory, spectra
from vdm_jax.system.layout import STAGES
from vdm_jax.system.networks import init_fns, remat_modes, to_float


class Stage(NamedTuple):
    """One stage of training. The commands train, bench and dry_run read this record."""

    init: Callable  # init(key) -> params; call it under jit or eval_shape
    loss: Callable  # loss(params, key, batch, encoder_params) -> (scalar, metrics)
    param_shapes: Any  # what init gives, as ShapeDtypeStructs
    batch: dict  # a training batch, as ShapeDtypeStructs
    # The shapes of `encoder_params`: parameters of earlier stages, 'statistics', the 'teacher' of a student, and the
    # 'base' of adapters; or {}.
    encoder_shapes: dict
    # validation(params, batch, encoder_params) -> {name: scalar}: errors that are the same in each call
    validation: Callable
    shows: str | None  # what is shown while it trains: reconstructed "video" or "audio", or "samples"; None: nothing
    # The mesh axis `sequence` must divide at least one of these sizes. Audio autoencoder: (sound tokens,). Denoiser:
    # (latent frames, height of a latent frame). Other stages: (video frames, height of a latent frame).
    sequence_sizes: tuple
    make_hard_negative: Callable | None = None  # caption -> wrong caption; None for a stage without hard negatives
    # The loss uses one hard negative per group of this many consecutive clips. A group must share a device.
    clips_per_negative: int = 1
    clip_frames: int = 0  # video frames of a training clip
    any_shape: bool = False  # whether the model takes clips of any length, height and width, see data/buckets.py


def make_stages(system):
    """{name: Stage} of the four stages of a System. Raises UserError for wrong settings."""
    config, layout = system.config, system.layout
    # This raises for noise levels that do not fit together.
    jax.eval_shape(functools.partial(diffusion.log_snr_at, config=system.diffusion), 0.0)
    inits = init_fns(system.models, config, layout)
    folders = system.parts | ({"denoiser": system.published} if system.published else {})
    params = {name: jax.eval_shape(init, jax.random.key(0)) for name, init in inits.items() if name not in folders}
    params |= {name: part.param_shapes() for name, part in folders.items()}
    adapters, base = lora.active(config.denoiser), params["denoiser"]
    if adapters:  # they are what is trained
        inits["denoiser"] = lambda key: lora.init(key, base, adapters.rank, adapters.layers)
        params["denoiser"] = jax.eval_shape(inits["denoiser"], jax.random.key(0))
    encoders = {name: params[name] for name in STAGES[:3] if name in params}
    if "teacher" in params:
        distillation.check(config.denoiser)
        encoders["teacher"] = params["teacher"]
    if adapters:
        encoders["base"] = jax.tree.map(lambda x: x.update(dtype=jnp.float16), base) if system.published else base
    memory.check(config, layout)
    check_trained_layers(config.denoiser, params["denoiser"])
    channels = {m: jax.ShapeDtypeStruct(shape[-1:], jnp.float32) for m, shape in layout.latent_shapes.items()}
    encoders["statistics"] = {m: {"mean": x, "std": x} for m, x in channels.items()}

    def stage(name, loss, sequence_sizes, shows=None, encoder_shapes=None):
        settings = config[name]
        remat_modes(config, name)  # raises for a wrong setting
        rows = settings.batch_size
        frames = memory.clip_frames(config, layout) if encoder_shapes else layout.frames
        batch = {
            "video": jax.ShapeDtypeStruct((rows, frames, *config.data.size, 3), jnp.uint8),
            "audio": jax.ShapeDtypeStruct((rows, frames * layout.samples_per_frame), jnp.float32),
            "tokens": jax.ShapeDtypeStruct((rows, config.data.text_length), jnp.int32),
        }
        if layout.control:
            batch["control"] = jax.ShapeDtypeStruct((rows, frames, layout.control), jnp.float32)
        negatives = settings.get("hard_negatives", {})
        word_groups = negatives.get("words", ())
        swap_words = functools.partial(hard_negatives.swap_words, groups=word_groups)
        hard_negatives.check_groups(f"{name}.hard_negatives.words", word_groups)
        if word_groups:
            batch[hard_negatives.BATCH_KEY] = batch["tokens"]
        if encoder_shapes and settings.cached_clips:
            batch = jax.eval_shape(functools.partial(encode_batch, system), encoder_shapes, batch)
            # Encoded clips are stored in half precision.
            batch = jax.tree.map(lambda x: x if x.dtype == bool else x.update(dtype=jnp.float16), batch)
        return Stage(
            init=inits[name],
            loss=functools.partial(loss, system),
            validation=functools.partial(denoiser_errors if shows == "samples" else loss_with_fixed_key(loss), system),
            param_shapes=params[name],
            batch=batch,
            encoder_shapes=encoder_shapes or {},
            shows=shows,
            sequence_sizes=sequence_sizes,
            make_hard_negative=swap_words if word_groups else None,
            clips_per_negative=negatives.get("every", 1) if word_groups else 1,
            clip_frames=frames,
            any_shape=bool(encoder_shapes),
        )

    height, stages = layout.video[0], {}
    stages["video_autoencoder"] = stage("video_autoencoder", video_autoencoder_loss, (layout.frames, height), "video")
    if layout.audio:
        tokens = layout.latent_frames * layout.audio[0]
        stages["audio_autoencoder"] = stage("audio_autoencoder", audio_autoencoder_loss, (tokens,), "audio")
    stages["clip"] = stage("clip", clip_loss, (layout.frames, height))
    stages["denoiser"] = stage("denoiser", denoiser_loss, (layout.latent_frames, height), "samples", encoders)
    return stages


def video_autoencoder_loss(system, params, key, batch, encoder_params):
    """Squared and absolute error of the pixels, plus the KL divergence of the latents. -> (scalar, metrics)."""
    video = to_float(batch["video"])
    out, mean, log_variance = system.apply_fn("video_autoencoder")(params, video, key)
    mse = jnp.mean(jnp.square(out - video))
    kl = kl_divergence(mean, log_variance) / video[0, ..., 0].size  # per pixel
    loss = mse + jnp.mean(jnp.abs(out - video)) + system.config.video_autoencoder.kl_weight * kl
    return loss, {"loss": loss, "mse": mse, "kl": kl, "psnr": -10 * jnp.log10(mse / 4)}  # pixels span a range of 2


def audio_autoencoder_loss(system, params, key, batch, encoder_params):
    """Error of the waveform and of its spectra, plus the KL divergence of the latents. -> (scalar, metrics).

    A distance is computed where its weight is not 0.
    """
    settings, rate = system.config.audio_autoencoder, system.config.data.sample_rate
    audio = system.pad_audio(batch["audio"])
    out, mean, log_variance = system.apply_fn("audio_autoencoder")(params, audio, key)
    wave = jnp.mean(jnp.abs(out - audio)) + 10 * jnp.mean(jnp.square(out - audio))
    kl = kl_divergence(mean, log_variance) / audio.shape[1]  # per sample
    loss = settings.get("wave_weight", 1.0) * wave + settings.kl_weight * kl  # older weights have no wave_weight
    metrics = {"wave": wave, "kl": kl}
    if settings.stft_weight:
        metrics["stft"] = sum(spectra.stft_distance(out, audio, window) for window in settings.stft_windows)
        loss += settings.stft_weight * metrics["stft"] / len(settings.stft_windows)
    if settings.get("mel_weight"):
        windows = [spectra.window_samples(ms, rate) for ms in settings.mel_windows]
        metrics["mel"] = sum(spectra.mel_distance(out, audio, window, rate) for window in windows) / len(windows)
        loss += settings.mel_weight * metrics["mel"]
    return loss, {"loss": loss, **metrics}


def kl_divergence(mean, log_variance):
    """KL of N(mean, exp(log_variance)) to N(0, 1), summed over a clip, batch mean (arXiv:1312.6114, appendix B)."""
    kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
    return kl.sum() / mean.shape[0]


def clip_loss(system, params, key, batch, encoder_params):
    """Contrastive loss of captions and clips (arXiv:2103.00020, fig. 3). -> (scalar, metrics).

    With hard negatives each clip adds one wrong caption, and every video is compared with all wrong captions of the
    batch (arXiv:2210.01936, section 4).
    """
    tokens, video = batch["tokens"], to_float(batch["video"])
    texts, videos, scale = system.apply_fn("clip")(params, tokens, text.mask(tokens), video)
    logits = scale * texts @ videos.T  # [B, B], one row per text
    by_video, labels = logits.T, jnp.arange(len(logits))
    metrics = {"recall_at_1": jnp.mean(jnp.argmax(logits, 1) == labels), "temperature": 1 / scale}
    if hard_negatives.BATCH_KEY in batch:
        wrong_tokens = batch[hard_negatives.BATCH_KEY]
        wrong = system.apply_fn("clip", "embed_text")(params, wrong_tokens, text.mask(wrong_tokens))
        wrong = scale * videos @ wrong.T  # [B, B], one row per video
        same = jnp.all(wrong_tokens == tokens, 1)  # the caption has no word of config.clip.hard_negatives
        right = (jnp.diagonal(wrong) < jnp.diagonal(logits)) & ~same
        metrics["hard_negative_accuracy"] = right.sum() / (~same).sum()
        by_video = jnp.concatenate([by_video, jnp.where(same, -jnp.inf, wrong)], 1)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    loss = 0.5 * (cross_entropy(logits, labels).mean() + cross_entropy(by_video, labels).mean())
    return loss, {"loss": loss, **metrics}


def check_trained_layers(denoiser, params):
    """Raises UserError where denoiser.trained is no regular expression, or is found in no path of a parameter."""
    layers = denoiser.get("trained", "")  # older weights have no such setting
    try:
        found = any(re.search(layers, path) for path in named_leaves(params))
    except re.error as error:
        raise UserError(f"denoiser.trained={layers!r} is no regular expression: {error}") from None
    if not found:
        raise UserError(
            f"denoiser.trained={layers!r} is found in no path of a parameter, such as {min(named_leaves(params))}"
        )


def train_only(params, layers):
    """Returns the parameters. Those without the regular expression `layers` in their path get no gradient."""

    def leaf(path, x):
        return x if re.search(layers, path_name(path)) else jax.lax.stop_gradient(x)

    return jax.tree_util.tree_map_with_path(leaf, params)


def drop_conditions(key, cond, null, text_share, control_share=0.0):
    """Replaces text and control by those of `null` in shares of the rows: guidance needs a network trained with both.

    Half of the rows without text also lose their control, and the other half keep it (as in arXiv:2211.09800, 3.2.1).

    cond, null: {'states', 'mask', 'pooled'}, and 'control' where the clips have control. `null` may be of one row. What
        only `cond` has, such as a memory, stays as it is.
    """
    draw = jax.random.uniform(key, cond["pooled"].shape[:1])  # [B]
    dropped = dict.fromkeys(cond, draw < text_share)
    if "control" in cond:
        dropped["control"] = (draw - text_share / 2) % 1 < control_share

    def choose(name):
        rows = dropped[name].reshape(-1, *(1,) * (cond[name].ndim - 1))
        return jnp.where(rows, null[name], cond[name])

    return cond | {name: choose(name) for name in null}


def encode_batch(system, encoder_params, batch):
    """Encodes a batch of clips for the denoiser -> {'z': latents, 'text': text}.

    If the batch has hard negatives, their text is added under BATCH_KEY. If it has control, that of the latent frames
    is added as 'control'. For longer clips than those of the layout, latents and control are those of its windows,
    [B, W, ...], see memory.py.
    """
    encoded = {"text": system.encode_text(encoder_params, batch["tokens"])}
    if hard_negatives.BATCH_KEY in batch:
        encoded[hard_negatives.BATCH_KEY] = system.encode_text(encoder_params, batch[hard_negatives.BATCH_KEY])
    clips = {name: batch[name] for name in ("video", "audio", "control") if name in batch}
    is_long = clips["video"].shape[1] > system.layout.frames
    if is_long:
        clips = memory.windows(system, clips)
    latents = {"z": system.encode(encoder_params, clips["video"], clips["audio"])}
    if "control" in clips:
        latents["control"] = system.pool_control(clips["control"])
    if is_long:
        latents = jax.tree.map(lambda x: x.reshape(len(batch["video"]), -1, *x.shape[1:]), latents)  # [B, W, ...]
    return encoded | latents


def conditions(encoded, text="text"):
    """The `cond` of the denoiser in an encoded batch: its text, or the one under another name, and its control."""
    return encoded[text] | {name: encoded[name] for name in ("control",) if name in encoded}


def denoiser_loss(system, params, key, batch, encoder_params):
    """The denoising loss, with the loss of hard negatives where the batch has any. -> (scalar, metrics).

    A student has the loss of distillation.py instead. batch: clips, or what `encode_batch` made of them.
    """
    settings, levels = system.config.denoiser, system.diffusion
    if "z" in batch:
        batch = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(jnp.float32), batch)
    else:
        batch = jax.lax.stop_gradient(encode_batch(system, encoder_params, batch))
    z, cond = batch["z"], conditions(batch)
    params = train_only(params, settings.get("trained", ""))  # older weights have no such setting
    drop_key, key, pair_key = jax.random.split(key, 3)
    if z["video"].ndim == 6:  # [B, W, T, h, w, C]
        z, cond = memory.training_rows(system, params, jax.random.fold_in(drop_key, 1), z, cond)
    null = system.encode_null_text(encoder_params) | system.unknown_control(z["video"].shape[1])
    denoise_fn = system.denoise_fn(params, encoder_params)
    if "teacher" in encoder_params:
        teacher_fn = functools.partial(system.apply, "teacher", encoder_params)
        loss, metrics = distillation.loss(denoise_fn, teacher_fn, key, z, cond, null, settings)
        return loss, {"loss": loss, **metrics}
    dropped = drop_conditions(drop_key, cond, null, settings.text_dropout, settings.get("control_dropout", 0.0))
    if hard_negatives.BATCH_KEY not in batch:
        loss, metrics = diffusion.loss(denoise_fn, key, z, dropped, levels)
        return loss, {"loss": loss, **metrics}

    wrong, target = conditions(batch, hard_negatives.BATCH_KEY), levels["target"]
    pairs = hard_negatives.make_pairs(pair_key, z, cond, wrong, target, settings.hard_negatives)
    noised = diffusion.corrupt(key, z, levels)
    prediction, pair_prediction = hard_negatives.call_together(
        denoise_fn, (noised.z_t, noised.log_snr, dropped), (pairs.z_t, pairs.log_snr, pairs.cond)
    )
    denoising_loss, metrics = diffusion.weighted_error(prediction, noised, levels)
    pair_loss, pair_metrics = hard_negatives.classification_loss(pair_prediction, pairs, settings.hard_negatives)
    loss = denoising_loss + pair_loss
    return loss, {"loss": loss, **metrics, **pair_metrics}


# ------------------------------------------------------------------------------------------------------- validation


def loss_with_fixed_key(loss):
    """Returns errors(system, params, batch, encoder_params) -> the metrics of a loss, with the same noise each time."""

    def errors(system, params, batch, encoder_params):
        return loss(system, params, jax.random.key(0), batch, encoder_params)[1]

    return errors


def denoiser_errors(system, params, batch, encoder_params):
    """Errors of the noise on clips, by modality and noise level, and their means -> {name: scalar}.

    The clips have the same noise in each call.
    """
    clips = {name: x for name, x in batch.items() if name != hard_negatives.BATCH_KEY}
    encoded = encode_batch(system, encoder_params, clips)
    z, levels = encoded["z"], noise_levels(system, system.config.validation.noise_levels)
    eps = diffusion.noise_like(jax.random.key(0), z)
    found = errors_per_noise_level(
        system, system.denoise_fn(params, encoder_params), z, conditions(encoded), eps, levels
    )
    means = {f"{name}/mean": x.mean() for name, x in found.items()}
    return means | {
        f"{name}/log_snr_{level:+.1f}": error for name, x in found.items() for level, error in zip(levels, x.mean(0))
    }


def noise_levels(system, count):
    """Returns log_snr [count], evenly spaced over the range of training and half a space from its ends."""
    settings = system.diffusion
    if system.published:
        low, high = settings["table"][-1], settings["table"][0]
    else:
        low, high = settings["log_snr_min"], settings["log_snr_max"]
    return np.linspace(low, high, 2 * count + 1)[1::2]


def errors_per_noise_level(system, denoise_fn, z, cond, eps, levels):
    """Mean squared error of the noise (eps) that the denoiser predicts, all latent frames at one noise level.

    A student predicts as for one step to clean latents.

    z, eps: latents and their noise, {modality: [B, ...]}
    levels: log_snr [L]
    Returns {modality: [B, L]}.
    """
    settings = system.config.denoiser.diffusion
    if system.models["denoiser"].student:
        clean = {name: jnp.full(z["video"].shape[:2], settings.log_snr_max) for name in z}  # [B, T]
        cond = {**cond, "next_log_snr": clean}

    def at(level):
        log_snr = {name: jnp.full(z["video"].shape[:2], level) for name in z}  # [B, T]
        prediction = denoise_fn(diffusion.add_noise(z, eps, log_snr), log_snr, cond)
        target = diffusion.to_target(z, eps, log_snr, settings.target)
        factor = diffusion.eps_error_factor(level, settings.target)
        return {name: factor * jax.vmap(jnp.mean)(jnp.square(prediction[name] - target[name])) for name in z}  # [B]

    return jax.tree.map(jnp.transpose, jax.lax.map(at, jnp.asarray(levels, jnp.float32)))  # [B, L]
