"""Prompts to MP4s with sound.

    python -m vdm_jax.sample --prompt="a red circle moving right" --out=clip.mp4 [--workdir=DIR] [--seconds=2 --steps=32
        --guidance=4 --seed=0 --method=dpmpp_2m] [--image=x.png | --video=x.mp4 | --audio=x.wav]
    python -m vdm_jax.sample --prompts=file.txt --out=FOLDER

Without --workdir the reference weights that ship with the package are used. A given image becomes the first frame, a
given video gets a sound made to fit, a given sound gets a video made to fit.
"""

import logging

from absl import flags
from etils import epath

from vdm_jax import checkpoint, cli, generate, media, samplers, stages, text
from vdm_jax.errors import UserError

logger = logging.getLogger("vdm_jax")


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


def read_given(config, frames, image=None, video=None, audio=None):
    """Files given on the command line -> what `Generator` takes as `given`, at the config's size and rates."""
    if sum(x is not None for x in (image, video, audio)) > 1:
        raise UserError("give only one of --image, --video and --audio")
    data = config.data
    if image is not None:
        return {"video": media.read_image(image, data.size)[None]}
    if video is not None:
        shape = dict(fps=data.fps, size=data.size, sample_rate=data.sample_rate)
        return {"video": media.read_video(video, **shape, frames=frames)[0]}
    if audio is not None:
        samples = media.read_audio(audio, data.sample_rate, frames / data.fps)
        return {"audio": samples[: stages.layout(config, frames).samples]}
    return {}


def main(argv):
    options = flags.FLAGS
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: options are given as --name=value")
    if not options.out:
        raise UserError("--out is missing: a file such as clip.mp4, or a folder with --prompts")
    if (options.prompt is None) == (options.prompts is None):
        raise UserError('give either --prompt="..." or --prompts=FILE')
    prompts = [options.prompt] if options.prompts is None else text.read_prompts(options.prompts)
    out = epath.Path(options.out)
    if options.prompts is None and out.suffix.lower() != ".mp4":
        raise UserError(f"--out={options.out} must end in .mp4")

    trained = checkpoint.load_trained(options.workdir, stages.abstract_params)
    config = trained.config
    frames = config.data.frames if options.seconds is None else frames_of(options.seconds, config)
    given = read_given(config, frames, options.image, options.video, options.audio)
    make_folder(out.parent if options.prompts is None else out)
    video, audio = generate.Generator(config, trained.frozen)(
        prompts,
        seed=options.seed,
        frames=frames,
        steps=options.steps,
        method=options.method,
        guidance=options.guidance,
        given=given,
    )
    # File names are numbers: a prompt is nobody's path.
    paths = [out] if options.prompts is None else [out / f"{i:03d}.mp4" for i in range(len(prompts))]
    for path, v, a in zip(paths, video, audio, strict=True):
        media.write_mp4(path, v, a, config.data.fps, config.data.sample_rate)
        logger.info("wrote %s", path)
    if options.prompts is not None:
        media.contact_sheet(out / "contact_sheet.png", list(video), prompts)
        logger.info("wrote %s", out / "contact_sheet.png")


def make_folder(path):
    """-> path of a folder for results, made if need be: before the work, so that none is lost. Raises UserError."""
    path = epath.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from None
    return path


def define_run_flags():
    """Which run, and how to sample it."""
    flags.DEFINE_string("workdir", None, "Run folder; without it the reference weights are used.")
    flags.DEFINE_integer("steps", None, "Denoising steps; default of the run's config.", lower_bound=1)
    flags.DEFINE_float("guidance", None, "Weight of the text: 1 is none added; default of the run's config.")
    flags.DEFINE_enum("method", None, samplers.METHODS, "Sampler; default of the run's config.")
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**31 - 1)


def define_flags():
    define_run_flags()
    flags.DEFINE_string("prompt", None, "What to show.")
    flags.DEFINE_string("prompts", None, "Text file with one prompt a line.")
    flags.DEFINE_string("out", None, "MP4 to write, or with --prompts a folder.")
    flags.DEFINE_float("seconds", None, "Length of the clip; default as trained.")
    flags.DEFINE_string("image", None, "Image to start from.")
    flags.DEFINE_string("video", None, "Video to make the sound of.")
    flags.DEFINE_string("audio", None, "Sound to make the video of.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
