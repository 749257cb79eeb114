"""What a run shows while it trains: errors on held-out clips, reconstructions, and samples of the user's prompts.

The same parameters give the same numbers and files. Training is not changed: nothing here draws from its keys or reads
from its batches.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from vdm_jax import sharding
from vdm_jax.data import batches, writing
from vdm_jax.errors import UserError
from vdm_jax.metrics import figures
from vdm_jax.pipeline import Pipeline
from vdm_jax.run import hosts, storage
from vdm_jax.settings import PROMPT_FILES
from vdm_jax.system import finetuned
from vdm_jax.system.layout import STAGES

SHOWN_CLIPS = 4  # held-out clips that are reconstructed, or whose captions are prompts


class Shown(NamedTuple):
    """A clip with its label. `video` or `audio` is None where the stage makes none."""

    label: str
    video: Any = None  # uint8 [F, H, W, 3]
    audio: Any = None  # float32 [N]


def check(system):
    """Raises UserError for a file in config.validation.prompts that is missing, or of no use for the denoiser."""
    for prompt in system.config.validation.prompts:
        for key in set(prompt) & set(PROMPT_FILES) if not isinstance(prompt, str) else ():
            if system.published:
                raise UserError(f"validation.prompts: the denoiser of denoiser.source takes no {key}: leave it out")
            if not storage.is_file(storage.given(prompt[key])):
                raise UserError(f"validation.prompts: {key} {prompt[key]} is no file: correct its path")


def make(directory, system, name, mesh):
    """Returns validate(state, encoder_params, step) of stage `name`, or None where config.validation.every is 0.

    All processes call it. It returns ({name: number}, {name: file}): what Stage.validation measures, and on the
    primary process the files of directory/previews/STEP. With config.validation.raw the parameters without their
    moving average are measured and shown, too; the names of their numbers begin with "raw/".
    """
    config, stage = system.config, system.stages[name]
    if not config.validation.every:
        return None
    held_out = batches.source(config, "held_out")
    examples = batches.Examples(held_out, system.tokenize, stage.make_hard_negative)
    batch = examples.take(range(config.validation.clips))
    measure = together(stage.validation)
    if stage.shows is None:
        show = None
    elif stage.shows == "samples":
        show = samples(system, mesh, read_prompts(config, held_out))
    else:
        show = reconstructions(system, name, stage.shows, [held_out[i] for i in range(SHOWN_CLIPS)])

    def validate(state, encoder_params, step):
        weights = {"": state["ema"]} | ({"raw": state["params"]} if config.validation.raw else {})
        numbers, shown = {}, []
        for kind, params in weights.items():
            found = jax.device_get(measure(params, batch, encoder_params))
            numbers |= {f"raw/{key}" if kind else key: float(value) for key, value in found.items()}
            if show:
                mark = " (raw weights)" if kind else ""
                shown.append([clip._replace(label=clip.label + mark) for clip in show(params, encoder_params)])
        side_by_side = [clip for clips in zip(*shown) for clip in clips]
        if not side_by_side or not hosts.is_primary():
            return numbers, {}
        folder = storage.make_folder(directory / "previews" / str(step))
        return numbers, write(folder, side_by_side, config.data.fps, config.data.sample_rate)

    return validate


def together(function):
    """Returns the function jitted, with its result on all processes, which compile it together in the first call.

    Its arguments must have the same shapes in each call.
    """
    jitted, compiled = jax.jit(lambda *arguments: sharding.replicate(function(*arguments))), []

    def call(*arguments):
        if not compiled:
            compiled.append(hosts.compiled(jitted, *arguments))
        return compiled[0](*arguments)

    return call


def reconstructions(system, name, modality, items):
    """Returns show(params, encoder_params) of an autoencoder: held-out clips, each followed by its reconstruction."""
    truth = np.stack([item[modality] for item in items])
    reconstruct = together(lambda params, x: system.reconstruct(name, {name: params}, x))

    def show(params, encoder_params):
        remade = np.asarray(reconstruct(params, truth))
        rows = [(item["caption"], "reconstruction") for item in items]
        return [
            Shown(label, **{modality: x})
            for labels, pair in zip(rows, zip(truth, remade))
            for label, x in zip(labels, pair)
        ]

    return show


def read_prompts(config, held_out):
    """Returns config.validation.prompts as [{'text', 'seed', at most one of PROMPT_FILES}].

    Without prompts they are captions of held-out clips, with the control of the clips where they have any.
    """
    prompts = config.validation.prompts or [_prompt_of(held_out[i]) for i in range(SHOWN_CLIPS)]
    prompts = [{"text": prompt} if isinstance(prompt, str) else dict(prompt) for prompt in prompts]
    return [{"seed": 0, **prompt} for prompt in prompts]


def _prompt_of(item):
    return {"text": item["caption"]} | {name: item[name] for name in ("control",) if name in item}


def samples(system, mesh, prompts):
    """Returns show(params, encoder_params) of the denoiser: the clips that the command `sample` makes."""
    merged = jax.jit(system.denoiser_params)
    if system.published:
        pipe = finetuned.sampler(system, {}, mesh)

        def sample(params, text, seed):
            pipe.params.update(unet=params["denoiser"], vae=params["video_autoencoder"], text_encoder=params["clip"])
            return Shown(text, pipe.clips([text], seed=seed)[0])
    else:
        pipe = Pipeline(system, {}, mesh)

        def sample(params, text, seed, **given):
            pipe.params = params
            start = given.pop("continue", None)
            make = functools.partial(pipe.extend, start) if start else pipe
            clip = make(text, seed=seed, **given)
            return Shown(text, clip.video, clip.audio)

    def show(params, encoder_params):
        denoiser = merged(params, encoder_params) if "base" in encoder_params else params
        used = {key: encoder_params[key] for key in (*STAGES, "statistics") if key in encoder_params}
        return [sample(used | {"denoiser": denoiser}, **prompt) for prompt in prompts]

    return show


def write(folder, shown, fps, sample_rate):
    """Writes clips into a folder, and returns {name: file}.

    contact_sheet.png and spectrogram.png show all, 000.mp4 (or 000.wav of a sound alone) and so on show one each.
    """
    files = {}
    if shown[0].video is not None:
        files["contact_sheet"] = folder / "contact_sheet.png"
        figures.contact_sheet(files["contact_sheet"], [clip.video for clip in shown], [clip.label for clip in shown])
    if shown[0].audio is not None:
        files["spectrogram"] = folder / "spectrogram.png"
        figures.spectrogram(files["spectrogram"], np.concatenate([clip.audio for clip in shown]), sample_rate)
    for i, clip in enumerate(shown):
        if clip.video is None:
            files[f"sound_{i:03d}"] = path = folder / f"{i:03d}.wav"
            writing.write_wav(path, clip.audio, sample_rate)
        else:
            files[f"clip_{i:03d}"] = path = folder / f"{i:03d}.mp4"
            writing.write_mp4(path, clip.video, clip.audio, fps, sample_rate)
    return files
