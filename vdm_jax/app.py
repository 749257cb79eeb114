"""A page on this machine to try all tasks: http://127.0.0.1:7860

    python -m vdm_jax.app [--workdir=DIR | --weights=DIR] [--lora=FILE:SCALE] [--port=7860]

Without --workdir and --weights the page uses the reference weights of this package. The page needs gradio:
`pip install -e ".[app]"`.

Only this machine can open the page, and the page loads nothing from other machines. Uploads and results are in one
temporary folder, which is deleted at the end. The seconds of a compilation are kept in the user's cache folder
(run/profiling.py). One clip is generated at a time, and other requests wait.
"""

import concurrent.futures
import html
import logging
import os
import shlex
import signal
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from absl import flags

from vdm_jax.data import media
from vdm_jax.errors import UserError, one_of
from vdm_jax.metrics import figures
from vdm_jax.pipeline import Clip, Pipeline, load
from vdm_jax.run import cli
from vdm_jax.settings import PARTS

logger = logging.getLogger("vdm_jax")

MAX_SECONDS = 60  # of an uploaded clip, and of what is generated
MAX_UPLOAD = "64mb"
LIMITS = {"seconds": (0.1, MAX_SECONDS), "seed": (0, 2**31 - 1), "steps": (1, 1000), "guidance": (0, 20)}


class Task(NamedTuple):
    name: str  # on the page
    files: dict = {}  # {field of the form: its name on the page}
    flag: str = ""  # of vdm_jax.sample, for the files
    weight: str = "text"  # key of config.sample.guidance for the text
    is_whole: bool = False  # whether the clip is as long as the file


TASKS = {
    "text": Task("A clip from words"),
    "image": Task("Animate a picture", {"picture": "Picture"}, "image"),
    "continue": Task("Continue a clip", {"clip": "Clip to continue"}, "continue", "text_continue"),
    "between": Task("Join two clips", {"clip": "First clip", "second_clip": "Second clip"}, "between", "text_continue"),
    "foley": Task("Give a silent clip its sound", {"clip": "Silent clip"}, "video", "text_cross_modal", True),
    "audio": Task("Give a sound its pictures", {"sound": "Sound"}, "audio", "text_cross_modal", True),
    "rollout": Task("A long clip from words"),
    "go_on": Task("Go on with the result", weight="text_continue"),
}
STATE = "scene.state"  # file of the command line, from which a clip goes on
FILES = ("picture", "clip", "second_clip", "sound")
FIELDS = ("task", "prompt", *FILES, "seconds", "seed", "steps", "guidance")
ABOUT_LEVELS = """**Noise levels.** Each row is a step. Time in the clip goes from left to right. Dark is noise, and
light is finished. A column that is light from the start comes from your file, or from the previous part of a long
clip."""
STYLE = """footer, button[aria-label="Trim video to selection"] {display: none !important}
#message {overflow-wrap: anywhere} .error {color: #c02626; font-weight: 600}"""
ONLY_LOCAL = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # what the browser may load


def main(argv):
    options = flags.FLAGS
    cli.only_options(argv)
    weights = cli.weights_folder(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that the folder is deleted
    with tempfile.TemporaryDirectory(prefix="vdm_jax_app_") as folder:
        tempfile.tempdir = folder  # the web server keeps an unfinished upload there
        os.environ.update(GRADIO_TEMP_DIR=folder, MPLCONFIGDIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        try:
            import gradio
        except ImportError as error:
            raise UserError(f'the page needs gradio ({error}): pip install -e ".[app]"') from None
        pipe = load(weights, lora=options.lora, parts=cli.parts(options))
        cli.use_cache(pipe.config)
        names = ("workdir", "weights", "lora", *(f"{key}.source" for key in PARTS))
        source = {name: options[name].value for name in names if options[name].value}
        demo = page(WatchedPipeline(pipe), Path(folder), source)
        theme = gradio.themes.Default(font="sans-serif", font_mono="monospace")  # the default loads fonts
        policy = f'<meta http-equiv="Content-Security-Policy" content="{ONLY_LOCAL}">'
        try:
            demo.launch(
                server_name="127.0.0.1", server_port=options.port, share=False, ssr_mode=False, mcp_server=False,
                quiet=True, prevent_thread_lock=True, max_file_size=MAX_UPLOAD, run_history=False, footer_links=[],
                css=STYLE, theme=theme, head=policy,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"cannot use port {options.port} ({error}): give another --port") from None
        logger.info("open http://127.0.0.1:%d in a browser; Ctrl-C ends the page", options.port)
        demo.block_thread()


def request(form, config, source, last=None):
    """Returns (arguments, command line) of a filled form.

    The arguments are keywords of Pipeline.extend if `clip` is one of them, and of Pipeline.__call__ if not.

    form: {field: value} for each of FIELDS; an upload is the path of a file, or None.
    config: of the Pipeline.
    source: {flag: value} that names the weights, with a list of values for a repeated flag; {}: the reference weights.
    last: the newest Clip of the page, or None.
    Raises UserError where a value is missing or out of range.
    """
    task = TASKS[one_of("task", form["task"], tuple(TASKS))]
    for name, (low, high) in LIMITS.items():
        if form[name] is None or not low <= form[name] <= high:
            raise UserError(f"{name} is {form[name]}: enter a number from {low} to {high}")
    longest = config.data.frames / config.data.fps
    if form["task"] == "rollout" and form["seconds"] <= longest:
        raise UserError(f"a long clip has more than {longest:g} s: enter more, or choose {TASKS['text'].name!r}")
    for field, name in task.files.items():
        if not form[field]:
            raise UserError(f"the {name.lower()} is missing: choose a file")

    numbers = {} if task.is_whole else {"seconds": form["seconds"]}
    numbers |= {"seed": int(form["seed"]), "steps": int(form["steps"])}
    # Where the files are too short for the task's weight, the sampler takes the weight `text`. So both are set.
    weights = {name: float(form["guidance"]) for name in sorted({"text", task.weight})}
    arguments = {"prompt": form["prompt"] or "", **numbers, "guidance": weights}
    options = {**source, "prompt": arguments["prompt"]}
    if form["task"] == "go_on":
        if last is None:
            raise UserError("there is no result to go on with: make a clip first")
        arguments["clip"] = last
        options |= {"resume-state": STATE} if last.scene else {"continue": "clip.mp4"}
    if files := [form[field] for field in task.files]:
        arguments["clip" if task.flag == "continue" else task.flag] = files if len(files) > 1 else files[0]
        names = [Path(file).name for file in files]
        options[task.flag] = ",".join(f'"{name}"' for name in names) if len(names) > 1 else names[0]
    options |= numbers | {"guidance" if name == "text" else f"guidance.{name}": weights[name] for name in weights}
    options |= {} if task.is_whole else {"save-state": STATE}
    pairs = [(name, x) for name, value in options.items() for x in (value if isinstance(value, list) else [value])]
    words = [f"--{name}={shlex.quote(str(value))}" for name, value in pairs]
    return arguments, " ".join(["python -m vdm_jax.sample", *words, "--out=clip.mp4"])


def videos_of(arguments):
    """Returns the paths of the videos among arguments, as `request` returns them."""
    given = [*(arguments[name] for name in ("clip", "video") if name in arguments), *arguments.get("between", ())]
    return [path for path in given if not isinstance(path, Clip)]


def defaults(task, config):
    """Returns (seconds, guidance) that the form shows when the task is chosen."""
    seconds = config.data.frames / config.data.fps * (3 if task == "rollout" else 1)
    return min(round(seconds, 3), MAX_SECONDS), config.sample.guidance[TASKS[task].weight]


class WatchedPipeline(Pipeline):
    """A Pipeline that another thread can watch while it makes a clip.

    levels: the scheduling matrix of the newest window, as tasks.scheduling_matrix returns it.
    message: the newest line for the user, such as how long a compilation took the last time.
    notes: the warnings about the clip.
    """

    def __init__(self, pipe):
        super().__init__(pipe.system, pipe.params, pipe.mesh, pipe.student and WatchedPipeline(pipe.student))
        self.durations = {}  # {program: s that its last window took}
        self.handler = logging.Handler(logging.INFO)
        self.handler.emit = self._log

    def begin(self):
        """Resets what is watched, before the next `make`."""
        self.windows, self.done = 1, 0
        self.expected = None  # s, of this window
        self.message, self.notes = "preparing", []

    def plan(self, frames, start=None, context_frames=None):
        """As Pipeline.plan."""
        plan = super().plan(frames, start, context_frames)
        self.windows = len(plan) + (start is None)
        return plan

    def share(self):
        """Returns how much of the clip is done, from 0 to 1. The share of a window is guessed from the time."""
        guess = min(0.95, (time.monotonic() - self.began) / self.expected) if self.expected else 0.0
        return min(1.0, (self.done + guess) / self.windows)

    def make(self, arguments):
        """Returns a Clip. arguments: as `request` returns them. Raises UserError."""
        files = {path: media.probe(path)["duration"] for path in videos_of(arguments)}
        if "audio" in arguments:
            files[arguments["audio"]] = media.sound_seconds(arguments["audio"])
        for path, seconds in files.items():
            if seconds > MAX_SECONDS:
                raise UserError(f"{Path(path).name!r} lasts {seconds:.0f} s: cut it to {MAX_SECONDS} s")
        logger.addHandler(self.handler)
        try:
            make = self.extend if "clip" in arguments else self
            return make(**arguments, student=False)
        finally:
            logger.removeHandler(self.handler)

    def window(self, prompts, *, context=None, **arguments):
        """As Pipeline.window."""
        masks = context and context._replace(video=None, audio=None)  # the levels depend on nothing else
        options = {name: x for name, x in arguments.items() if name not in ("seed", "window", "memory")}
        arrays, static = self.sampler.arguments(self.params, context=masks, **options)
        self.levels = arrays["levels"]
        program = str((self.levels["video"].shape, static))
        self.message = "generating" if self.windows == 1 else f"generating part {self.done + 1} of {self.windows}"
        self.expected, self.began = self.durations.get(program), time.monotonic()
        made = super().window(prompts, context=context, **arguments)
        self.durations[program] = time.monotonic() - self.began
        self.done, self.expected = self.done + 1, None
        return made

    def _log(self, record):
        self.message, self.began = record.getMessage(), time.monotonic()  # a compilation is no part of the time
        if record.levelno >= logging.WARNING:
            self.notes.append(self.message)


def page(pipe, folder, source):
    """Returns the page, a gradio.Blocks.

    pipe: a WatchedPipeline.
    folder: gets the results.
    source: as in `request`.
    """
    import gradio as gr

    config = (pipe.student or pipe).config  # of the first settings that the form shows
    worker = concurrent.futures.ThreadPoolExecutor(1)
    last = {}  # {"clip": the newest Clip}

    def generate(*values, progress=gr.Progress()):  # noqa: B008, gradio finds its progress bar by this default
        try:
            form = dict(zip(FIELDS, values, strict=True))
            form |= {field: form[field] and form[field]["path"] for field in FILES}
            arguments, command = request(form, config, source, last.get("clip"))
            maker = pipe.for_steps(arguments["steps"])
            maker.begin()
            job = worker.submit(maker.make, arguments)
            while not concurrent.futures.wait([job], timeout=0.2).done:
                progress(maker.share(), desc=maker.message)
            clip = job.result()
        except UserError as error:
            return None, None, "", f'<p class="error" role="alert">Error: {html.escape(str(error))}</p>'
        path = Path(tempfile.mkdtemp(dir=folder)) / "clip.mp4"
        clip.save(path)
        last["clip"] = clip
        rows, frames = maker.levels["video"].shape
        matrix = figures.scheduling_matrix(maker.levels, (max(2, min(22, 200 // frames)), max(3, min(10, 330 // rows))))
        text = " ".join([f"{clip.seconds:g} s, {len(clip.video)} frames.", *(f"Note: {note}." for note in maker.notes)])
        return str(path), matrix, command, f"<p>{html.escape(text)}</p>"

    def choose(task, steps):
        names = TASKS[task].files
        uploads = [gr.update(visible=field in names, label=names.get(field)) for field in FILES]
        seconds, weight = defaults(task, pipe.for_steps(int(steps)).config)
        return [*uploads, gr.update(value=seconds, visible=not TASKS[task].is_whole), weight, ""]

    with gr.Blocks(title="vdm_jax", analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        gr.Markdown("# Words to video with sound\nChoose what to make, describe it, and press the button.")
        with gr.Row():
            with gr.Column(min_width=320):
                task = gr.Radio([(TASKS[word].name, word) for word in TASKS], value="text", label="What to make")
                prompt = gr.Textbox("a red circle moving right", label="Description", lines=2, max_length=1000)
                hidden = dict(sources=["upload"], buttons=[], visible=False)
                picture = gr.Image(height=220, elem_id="picture", **hidden)
                clip = gr.Video(height=220, elem_id="clip", **hidden)
                second_clip = gr.Video(height=220, elem_id="second_clip", **hidden)
                sound = gr.Audio(elem_id="sound", **hidden)
                start_seconds, start_guidance = defaults("text", config)
                with gr.Row():
                    seconds = gr.Number(start_seconds, label="Seconds to make", min_width=130)
                    seed = gr.Number(0, label="Seed", precision=0, min_width=130)
                most = max(128, pipe.config.sample.steps)
                steps = gr.Slider(1, most, config.sample.steps, step=1, label="Steps: more is slower and finer")
                guidance = gr.Slider(0, 12, start_guidance, step=0.1, label="Guidance: more is closer to the words")
                button = gr.Button("Generate", variant="primary", elem_id="generate")
                message = gr.HTML(elem_id="message")
            with gr.Column(min_width=320):
                shown = dict(interactive=False)
                video = gr.Video(label="Result", height=380, loop=True, buttons=["download"], elem_id="result", **shown)
                gr.Markdown(ABOUT_LEVELS)
                matrix = gr.Image(show_label=False, buttons=[], elem_id="levels", **shown)
                command = gr.Textbox(label="The same by command line", lines=4, buttons=["copy"], elem_id="command")
        changed = [picture, clip, second_clip, sound, seconds, guidance, message]
        task.change(choose, [task, steps], changed, queue=False)
        if pipe.student:  # it has its own guidance
            steps.release(lambda task, steps: choose(task, steps)[-2], [task, steps], guidance, queue=False)
        button.click(lambda: "", None, message, queue=False)
        inputs = [task, prompt, picture, clip, second_clip, sound, seconds, seed, steps, guidance]
        outputs = [video, matrix, command, message]
        # Without gradio's own reading of the inputs, vdm_jax.data.media is the only code that opens an upload.
        button.click(generate, inputs, outputs, preprocess=False, show_progress_on=video)
    return demo.queue(max_size=8, default_concurrency_limit=1)


def define_flags():
    cli.define_weights()
    flags.DEFINE_integer("port", 7860, "Port of the page on 127.0.0.1.", lower_bound=1, upper_bound=65535)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
