"""Prompts to MP4s with sound.

    python -m vdm_jax.sample --prompt="a red circle moving right" --out=clip.mp4 [--workdir=DIR] [--seconds=2 --steps=32
        --guidance=4 --seed=0 --method=dpmpp_2m] [--image=x.png | --video=x.mp4 | --audio=x.wav | --continue=x.mp4 |
        --between=x.mp4,y.mp4] [--guidance.history=1.5 --guidance.modality=1.5 --guidance.text_continue=1
        --guidance.text_cross_modal=2.5 --history_noise=0 --context_noise=0.02 --lag=0]
    python -m vdm_jax.sample --prompts=file.txt --out=FOLDER

Without --workdir the reference weights that ship with the package are used.

--image     becomes the first frame and is set in motion
--video     gets a sound made to fit
--audio     gets a video made to fit
--continue  goes on for --seconds after its end; the clip itself, at the model's size and rates, comes first
--between   a clip that leads from the end of the first to the beginning of the second

Clips longer than those of training are rolled out: window after window, each given the end of the one before.
"""

import logging

import jax
import numpy as np
from absl import flags

from vdm_jax import pipeline as generate
from vdm_jax import samplers, sharding, tasks
from vdm_jax.data import media, text
from vdm_jax.errors import UserError
from vdm_jax.run import checkpoint, cli, hosts, storage
from vdm_jax.system import codec as stages

logger = logging.getLogger("vdm_jax")

GIVEN = ("image", "video", "audio", "continue", "between")  # flags, of which one may be given
SAMPLER = ("method", "steps", "history_noise", "context_noise", "lag")  # flags that change config.sample
# Flags that change config.sample.guidance; --guidance is the text's.
GUIDANCE = {"guidance": "text"} | {
    f"guidance.{key}": key for key in ("text_continue", "text_cross_modal", "history", "modality")
}


def frames_of(seconds, config):
    """Video frames that come nearest to `seconds` and fill whole latent frames; says so when it had to round."""
    if not 0 < seconds <= 3600:
        raise UserError(f"--seconds={seconds}: give a length above 0 and up to 3600")
    size = stages.layout(config)
    frames = 1 + size.f_t * max(0, round((seconds * config.data.fps - 1) / size.f_t))
    if abs(frames / config.data.fps - seconds) > 0.5 / config.data.fps:
        logger.warning(
            "--seconds=%g rounded to %.3f s: %d frames at %g fps, 1 and then %d for each latent frame",
            seconds, frames / config.data.fps, frames, config.data.fps, size.f_t,
        )  # fmt: skip
    return frames


def read_given(config, frames, files):
    """-> (tasks.Context for the first window, the clip to continue or None). files: {flag: what it was given}.

    A clip to continue is (video [1, n, H, W, 3], audio [1, n * samples_per_frame]). Raises UserError.
    """
    files = {flag: value for flag, value in files.items() if value}
    if len(files) > 1:
        raise UserError(f"give only one of {', '.join(f'--{flag}' for flag in GIVEN)}")
    data = config.data
    shape = dict(fps=data.fps, size=data.size, sample_rate=data.sample_rate)
    size = stages.layout(config, min(frames, data.frames))  # of the first window, if there are several
    for flag in ("video", "audio", "between"):
        if flag in files and frames > data.frames:
            raise UserError(f"--{flag} is for clips of up to {data.frames / data.fps:g} s: lower --seconds")

    def clip(path, most=None):
        video, audio = media.read_video(path, **shape, frames=most)[:2]
        return video, audio[: len(video) * data.sample_rate // data.fps]

    if "image" in files:
        return tasks.image(media.read_image(files["image"], data.size), size), None
    if "video" in files:
        return tasks.foley(clip(files["video"], frames)[0], size), None
    if "audio" in files:
        return tasks.audio(media.read_audio(files["audio"], data.sample_rate, frames / data.fps), size), None
    if "continue" in files:
        return None, tuple(part[None] for part in clip(files["continue"]))
    if "between" in files:
        if len(files["between"]) != 2:
            raise UserError("--between wants two files, such as --between=first.mp4,second.mp4")
        start, end = (clip(path) for path in files["between"])
        latents = min(config.sample.context_frames, (size.latent_frames - 1) // 2)
        need = size.f_t * latents
        if not latents or min(len(start[0]), len(end[0])) < need:
            raise UserError(
                f"--between wants clips of at least {need} frames at {data.fps} fps, and --seconds for both"
            )
        return tasks.between(start, end, size, latents), None
    return tasks.text(size), None


def main(argv):
    options = flags.FLAGS
    cli.only_options(argv)
    if not options.out:
        raise UserError("--out is missing: a file such as clip.mp4, or a folder with --prompts")
    if (options.prompt is None) == (options.prompts is None):
        raise UserError('give either --prompt="..." or --prompts=FILE')
    prompts = [options.prompt] if options.prompts is None else text.read_prompts(options.prompts)
    out = storage.given(options.out)
    if options.prompts is None and out.suffix.lower() != ".mp4":
        raise UserError(f"--out={options.out} must end in .mp4")

    hosts.initialize(options)
    trained = checkpoint.load_trained(options.workdir, stages.abstract_params)
    config = trained.config
    cli.use_cache(config)
    set_sampler(config)
    frames = config.data.frames if options.seconds is None else frames_of(options.seconds, config)
    given, start = read_given(config, frames, {flag: options[flag].value for flag in GIVEN})
    make_folder(out.parent if options.prompts is None else out)
    # Whatever mesh it was trained on: weights split over all devices there are, and the prompts, too.
    mesh = sharding.make_mesh(dict(data=1, fsdp=-1, sequence=1, tensor=1))
    with jax.set_mesh(mesh):
        generator = generate.Generator(config, trained.frozen, mesh)
        video, audio = make(generator, prompts, frames, given, start, options.seed)
    if not hosts.is_primary():
        return
    # File names are numbers: a prompt is nobody's path.
    paths = [out] if options.prompts is None else [out / f"{i:03d}.mp4" for i in range(len(prompts))]
    for path, v, a in zip(paths, video, audio, strict=True):
        media.write_mp4(path, v, a, config.data.fps, config.data.sample_rate)
        logger.info("wrote %s", path)
    if options.prompts is not None:
        media.contact_sheet(out / "contact_sheet.png", list(video), prompts)
        logger.info("wrote %s", out / "contact_sheet.png")


def make(generator, prompts, frames, given, start, seed):
    """-> (video uint8 [P, F, H, W, 3], audio float32 [P, N]); given, start: as read_given gives them."""
    if start is not None:  # the same beginning for every prompt
        start = tuple(np.repeat(part, len(prompts), 0) for part in start)
        frames += start[0].shape[1]
    if start is not None or frames > generator.config.data.frames:
        return generator.rollout(prompts, frames, seed=seed, given=given, start=start)
    return generator(prompts, seed=seed, frames=frames, given=given)


def set_sampler(config):
    """Puts the sampler's flags that were given into config.sample."""
    options = flags.FLAGS
    config.sample.update({key: options[key].value for key in SAMPLER if options[key].value is not None})
    weights = {key: options[flag].value for flag, key in GUIDANCE.items() if options[flag].value is not None}
    config.sample.guidance.update(weights)


def make_folder(path):
    """-> path of a folder for results, made if need be: before the work, so that none is lost. Raises UserError."""
    path = storage.given(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from None
    return path


def define_run_flags():
    """Which run, and how to sample it."""
    flags.DEFINE_string("workdir", None, "Run folder; without it the reference weights are used.")
    flags.DEFINE_integer(
        "steps", None, "Denoising steps; this and the next: default of the run's config.", lower_bound=1
    )
    flags.DEFINE_enum("method", None, tuple(samplers.METHODS), "Sampler.")
    flags.DEFINE_float("guidance", None, "Classifier-free guidance scale of the text; 1: no guidance, here and below.")
    flags.DEFINE_float("guidance.text_continue", None, "Scale of the text where a clip is continued.")
    flags.DEFINE_float("guidance.text_cross_modal", None, "Scale of the text where picture or sound is given whole.")
    flags.DEFINE_float("guidance.history", None, "Guidance scale of the context frames.")
    flags.DEFINE_float("guidance.modality", None, "Guidance scale of sound on picture, and of picture on sound.")
    flags.DEFINE_float(
        "history_noise", None, "History guidance withholds detail up to this time in [0, 1]; 0: all of it."
    )
    flags.DEFINE_float("context_noise", None, "Noise context frames of a continued clip to this time in [0, 1].")
    flags.DEFINE_integer("lag", None, "Steps each latent frame is behind the one before: a pyramid.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**31 - 1)


def define_flags():
    define_run_flags()
    hosts.define_flags()
    flags.DEFINE_string("prompt", None, "What to show.")
    flags.DEFINE_string("prompts", None, "Text file with one prompt a line.")
    flags.DEFINE_string("out", None, "MP4 to write, or with --prompts a folder.")
    flags.DEFINE_float("seconds", None, "Length of what is made; default as trained.")
    flags.DEFINE_string("image", None, "Image to start from.")
    flags.DEFINE_string("video", None, "Video to make the sound of.")
    flags.DEFINE_string("audio", None, "Sound to make the video of.")
    flags.DEFINE_string("continue", None, "Video to carry on.")
    flags.DEFINE_list("between", None, "Two videos to make the way between.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
