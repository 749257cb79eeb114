"""Prompts to MP4s with sound.

    python -m vdm_jax.sample --prompt="a red circle moving right" --out=clip.mp4 [--workdir=DIR | --weights=DIR]
        [--seconds=2 --steps=32 --guidance=4 --seed=0 --method=dpmpp_2m]
        [--image=x.png | --video=x.mp4 | --audio=x.wav | --continue=x.mp4 | --between=x.mp4,y.mp4]
        [--guidance.history=1.5 --guidance.modality=1.5 --guidance.text_continue=1 --guidance.text_cross_modal=2.5]
        [--history_noise=0 --context_noise=0.02 --lag=0] [--lora=FILE:SCALE] [--control=FILE.csv]
        [--save-state=scene.state] [--resume-state=scene.state [--cut]]
    python -m vdm_jax.sample --prompts=file.txt --out=FOLDER

Without --workdir and --weights the reference weights of this package are used. Where the weights have a student, it
makes clips in as few steps as its recipe has, and its teacher those in more; --student or --teacher decides otherwise.
--lora merges adapters into the denoiser, with a scale of 1 or SCALE, and may be repeated. FILE is an
adapter_model.safetensors beside its adapter_config.json, from `weights export --adapters` or from `peft`.
The codecs and the text encoder of a run may come from folders. --video_codec.source=FOLDER, --audio_codec.source and
--text_encoder.source tell where they are, if they have moved since.

--image     becomes the first frame of the clip
--video     gets a sound, whatever its length; the output has its picture as it is
--audio     gets a picture, whatever its length; the output has its sound as it is
--continue  goes on for --seconds after its end; the output begins with the clip as it is, if that is H.264
--between   gives a clip that leads from the end of the first file to the beginning of the second

--control   says which buttons are held: a CSV file whose first row names them, with one more row for each frame that
            is made; for weights that were trained with control

--save-state    writes what the clips need to go on: their last frames, and the memory of weights that have one
--resume-state  goes on from there, with the same weights, in another process too; the output is what is added
--cut           the first new frame follows after a cut

A clip longer than the clips of training is made window by window. Each window gets the end of the window before as
context.

--weights may also name the folder of a published text-to-video model, such as ModelScope (see system/parts.py), and
--workdir a run that has trained it further. The clips have no sound, and are made at once, whatever their length. Both
take --size, --seconds, --steps, --guidance, --method, --seed and --lora.
"""

import logging

from absl import flags

from vdm_jax import samplers
from vdm_jax.data import buckets, text
from vdm_jax.errors import UserError
from vdm_jax.metrics import figures
from vdm_jax.pipeline import ENDINGS, Clip, load
from vdm_jax.run import cli, hosts, storage
from vdm_jax.settings import PARTS
from vdm_jax.system import finetuned, published
from vdm_jax.system.layout import STAGES

logger = logging.getLogger("vdm_jax")

CONTEXT = ("image", "video", "audio", "between")  # flags that are arguments of a Pipeline
SAMPLER = ("method", "steps", "history_noise", "context_noise", "lag")  # flags that change config.sample
GUIDANCE = {"guidance": "text"}  # flags that change config.sample.guidance
GUIDANCE |= {f"guidance.{key}": key for key in ("text_continue", "text_cross_modal", "history", "modality")}
SCENE = ("continue", "save-state", "resume-state", "cut")  # flags of what a clip goes on from
NOT_PUBLISHED = {*CONTEXT, *SCENE, "control", "student", "teacher", *SAMPLER, *GUIDANCE}
NOT_PUBLISHED -= {"steps", "method", "guidance"}
NOT_PUBLISHED |= {f"{key}.source" for key in PARTS}


def main(argv):
    options = flags.FLAGS
    cli.only_options(argv)
    if not options.out:
        raise UserError("--out is missing: a file such as clip.mp4, or a folder with --prompts")
    if (options.prompt is None) == (options.prompts is None):
        raise UserError('give either --prompt="..." or --prompts=FILE')
    many = options.prompts is not None
    prompts = text.read_prompts(options.prompts) if many else [options.prompt]
    out = storage.given(options.out)
    if not many and out.suffix.lower() not in ENDINGS:
        raise UserError(f"--out={options.out} must end in {' or '.join(ENDINGS)}")
    context = {flag: options[flag].value for flag in CONTEXT if options[flag].value}
    start = options["continue"].value
    resumed = options["resume-state"].value
    given = [name for name, value in (("continue", start), ("resume-state", resumed)) if value]
    if given and len(given) + len(context) > 1:
        raise UserError(f"give only one of {', '.join([*given, *context])}")
    if options.cut and not given:
        raise UserError("--cut goes on after a cut: give also --continue or --resume-state")

    hosts.initialize(options)
    source = cli.weights_folder(options)
    is_published = source and (published.is_pipeline(source) or finetuned.is_run(source))
    pipe = load_published(options) if is_published else load_pipeline(options)
    storage.make_folder(out if many else out.parent)
    arguments = dict(seconds=options.seconds, seed=options.seed, control=options.control, student=False)
    if is_published:
        clips = pipe(prompts)
    elif given:
        if resumed:
            start = pipe.read_scene(resumed, len(prompts))
            arguments["seed"] = options.seed if options["seed"].present else None
        clips = pipe.extend(start, prompts, cut=options.cut, **arguments)
    else:
        clips = pipe(prompts, **arguments, **context)
    if not hosts.is_primary():
        return
    if options["save-state"].value:
        pipe.save_scene(options["save-state"].value, clips)
        logger.info("wrote %s", options["save-state"].value)
    # File names are numbers: a prompt must not become a path.
    paths = [out / f"{i:03d}.mp4" for i in range(len(prompts))] if many else [out]
    for path, clip in zip(paths, clips, strict=True):
        clip.save(path)
        logger.info("wrote %s", path)
    if many:
        figures.contact_sheet(out / "contact_sheet.png", [clip.video for clip in clips], prompts)
        logger.info("wrote %s", out / "contact_sheet.png")


def load_pipeline(options, stages=STAGES):
    """The Pipeline that the flags name, or its student, with the sampler's flags in its config. Raises UserError."""
    if options.student and options.teacher:
        raise UserError("give only one of --student and --teacher")
    chosen = options.student if options.student or options.teacher else None
    pipe = load(cli.weights_folder(options), stages=stages, lora=options.lora, parts=cli.parts(options))
    pipe = pipe.for_steps(options["steps"].value, chosen)
    pipe = pipe.for_size(buckets.parse_size(options.size) if options.size else None)
    cli.use_cache(pipe.config)
    settings = pipe.config.sample
    settings.update({key: options[key].value for key in SAMPLER if options[key].value is not None})
    weights = {key: options[flag].value for flag, key in GUIDANCE.items() if options[flag].value is not None}
    settings.guidance.update(weights)
    return pipe


def load_published(options):
    """A function from prompts to Clips, of the published model and options that the flags name. Raises UserError."""
    source = cli.weights_folder(options)
    is_pipeline = published.is_pipeline(source)
    for flag in sorted(NOT_PUBLISHED | ({"denoiser.source"} if is_pipeline else set())):
        if options[flag].present:
            raise UserError(f"--{flag} is not for a published model: leave it out")
    if is_pipeline:
        pipe = published.load(source, lora=options.lora)
    else:
        pipe = finetuned.load(source, options.lora, cli.parts(options))

    def make(prompts):
        chosen = {name: options[name].value for name in ("seed", "seconds", "steps", "method", "guidance")}
        size = buckets.parse_size(options.size) if options.size else None
        videos = pipe.clips(prompts, size=size, **chosen)
        return [Clip(video, None, pipe.fps, 0, prompt) for video, prompt in zip(videos, prompts, strict=True)]

    return make


def define_run_flags():
    """Which weights, and how to sample with them."""
    cli.define_weights()
    flags.DEFINE_integer("steps", None, "Denoising steps; default: the run's config.", lower_bound=1)
    flags.DEFINE_bool("student", False, "Use the student of the weights, whatever the steps.")
    flags.DEFINE_bool("teacher", False, "Do not use the student of the weights, whatever the steps.")
    flags.DEFINE_enum("method", None, tuple(samplers.METHODS), "Sampler; default: the run's config.")
    flags.DEFINE_float("guidance", None, "Classifier-free guidance scale of the text; 1: no guidance, here and below.")
    flags.DEFINE_float("guidance.text_continue", None, "Scale of the text where a clip is continued.")
    flags.DEFINE_float("guidance.text_cross_modal", None, "Scale of the text where picture or sound is given whole.")
    flags.DEFINE_float("guidance.history", None, "Guidance scale of the context frames.")
    flags.DEFINE_float("guidance.modality", None, "Guidance scale of sound on picture, and of picture on sound.")
    flags.DEFINE_float("history_noise", None, "Time in [0, 1] to which history guidance noises the context; 0: clean.")
    flags.DEFINE_float("context_noise", None, "Noise the context frames of a continued clip to this time in [0, 1].")
    flags.DEFINE_string("size", None, "Height x width of the clips in pixels, such as 48x64; default: as in training.")
    flags.DEFINE_integer("lag", None, "Steps by which each latent frame follows the one before it.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**31 - 1)


def define_flags():
    define_run_flags()
    hosts.define_flags()
    flags.DEFINE_string("prompt", None, "What to show.")
    flags.DEFINE_string("prompts", None, "Text file with one prompt a line.")
    flags.DEFINE_string("out", None, "File to write: .mp4, .wav, or .png for numbered frames. With --prompts a folder.")
    flags.DEFINE_float("seconds", None, "Length of what is made; default: as in training.")
    flags.DEFINE_string("control", None, "CSV file of the buttons that are held, one row for each frame.")
    flags.DEFINE_string("image", None, "Image to start from.")
    flags.DEFINE_string("video", None, "Video that gets a sound.")
    flags.DEFINE_string("audio", None, "Sound that gets a video.")
    flags.DEFINE_string("continue", None, "Video to continue.")
    flags.DEFINE_string("save-state", None, "File to write, from which --resume-state goes on.")
    flags.DEFINE_string("resume-state", None, "File of --save-state to go on from.")
    flags.DEFINE_bool("cut", False, "Go on after a cut, without the last frames as context.")
    flags.DEFINE_list("between", None, "Two videos to join.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
