"""A trained system, ready to sample: prompts, and what they start from, to clips of any length."""

import base64
import dataclasses
import functools
import html
import logging
import os
import tempfile
from pathlib import Path

import jax
import numpy as np

from vdm_jax import scene as scenes
from vdm_jax import sharding, tasks
from vdm_jax.data import append, captions, media, writing
from vdm_jax.data import control as control_files
from vdm_jax.errors import UserError
from vdm_jax.run import folder
from vdm_jax.run.progress import progress
from vdm_jax.scene import Scene
from vdm_jax.system import adapters, build, memory
from vdm_jax.system.layout import STAGES
from vdm_jax.system.sampling import Sampler, resolve

logger = logging.getLogger("vdm_jax")

FADE = 0.005  # s, over which the sound of one window of a long clip gives way to the next window's
MAX_SECONDS = 3600  # of a clip
STUDENT = "student"  # subfolder of exported weights
ENDINGS = (".mp4", ".wav", ".png")  # of files that a Clip can be saved to
OTHER_FLAG = {  # {what a file is: how a message tells where it belongs}
    "image": "a picture: give it as --image",
    "video": "a video: give it as --video, --continue or --between",
    "sound only": "a sound: give it as --audio",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A video with its sound, if it has one. A notebook shows it as a player."""

    video: np.ndarray  # uint8 [F, H, W, 3]
    audio: np.ndarray | None  # float32 [F * sample_rate // fps] in [-1, 1]
    fps: float  # frames a second
    sample_rate: int  # Hz
    prompt: str = ""
    picture_from: str | None = None  # a file that `video` was read from: an MP4 gets its picture as it is
    sound_from: str | None = None  # a file that `audio` was read from: an MP4 gets its sound as it is
    starts_from: str | None = None  # a file that the beginning was read from: an MP4 begins with its packets
    start_frames: int = 0  # frames of that beginning
    scene: Scene | None = None  # what the clip needs to go on, see Pipeline.extend

    @property
    def seconds(self):
        return len(self.video) / self.fps

    def save(self, path):
        """Writes an MP4 file (H.264 and AAC), a WAV file, or for x.png the frames as x_00000.png and so on.

        Raises UserError for another ending, and where the path cannot be written.
        """
        ending = Path(path).suffix.lower()
        if ending not in ENDINGS:
            raise UserError(f"{path} must end in {' or '.join(ENDINGS)}")
        if ending == ".png":
            writing.write_images(path, self.video)
        elif ending == ".mp4" and self.starts_from and self._goes_on():
            samples = round(self.start_frames * self.sample_rate / self.fps)
            new = self.video[self.start_frames :], self.audio[samples:]
            append.write_mp4(path, self.starts_from, *new, self.fps, self.sample_rate)
        elif ending == ".mp4":
            given = dict(picture_from=self.picture_from, sound_from=self.sound_from)
            writing.write_mp4(path, self.video, self.audio, self.fps, self.sample_rate, **given)
        elif self.audio is None:
            raise UserError(f"cannot write {path}: the clip has no sound")
        else:
            writing.write_wav(path, self.audio, self.sample_rate)

    def _goes_on(self):
        """Whether new frames can follow in the file of the beginning. Warns if not."""
        fault = append.fault(self.starts_from)
        if fault:
            logger.warning("%s is encoded anew, at the model's size: %s", self.starts_from, fault)
        return fault is None

    def _repr_html_(self):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "clip.mp4"
            self.save(path)
            data = base64.b64encode(path.read_bytes()).decode()
        return (
            f'<figure><video controls loop width="256" src="data:video/mp4;base64,{data}"></video>'
            f"<figcaption>{html.escape(self.prompt)}</figcaption></figure>"
        )


def load(path=None, *, stages=STAGES, lora=(), parts=None):
    """A trained system as a Pipeline.

    path: a run's folder, or a folder of exported weights; None or "reference": the reference weights of this package.
        A student that needs fewer steps may be in its subfolder "student": see Pipeline.for_steps.
    stages: the stages whose parameters are read. A Pipeline that samples needs all of them.
    lora: adapters that are merged into the denoiser and its student, "FILE" or "FILE:SCALE", or a list of them; see
        system/adapters.py.
    parts: folders of parts that were elsewhere in training, {"video_codec", "audio_codec" or "text_encoder": folder}.
    Raises UserError where something is missing or damaged.
    """
    weights = folder.load(path, build, stages, parts=parts)
    if lora and "denoiser" in weights.params:
        given = [lora] if isinstance(lora, str) else lora
        weights.params["denoiser"] = adapters.merge_files(weights.params["denoiser"], given)
    beside = folder.given("reference" if path is None else path) / STUDENT
    student = load(beside, stages=stages, lora=lora, parts=parts) if beside.is_dir() else None
    return Pipeline(weights.system, weights.params, student=student)


class Pipeline:
    """A System and its parameters. Call it with prompts; each shape of clip compiles once.

    system: a System.
    params: {stage: parameters}, with 'statistics' of the latents.
    mesh: parameters and clips are split over it; None: parameters are split over all devices.
    student: the Pipeline of a student, or None; see system/distillation.py.
    """

    def __init__(self, system, params, mesh=None, student=None):
        self.system = system
        self.student = student
        self.mesh = mesh or sharding.make_mesh(dict(data=1, fsdp=-1, sequence=1, tensor=1))
        self.params = jax.device_put(params, sharding.state_shardings(params, self.mesh))
        self.sampler = Sampler(system)
        self.sized = {}  # {(height, width): Pipeline}, see `for_size`

    @property
    def config(self):
        return self.system.config

    @functools.cached_property
    def weights_hash(self):
        """A hash of the parameters. A Scene in a file is of weights with this hash."""
        return folder.weights_hash(jax.device_get(self.params))

    def for_steps(self, steps=None, student=None):
        """The Pipeline that makes clips in this number of steps: this one, or its student.

        steps: None: those in config.sample.
        student: True for the student, False for this Pipeline, None for the student where it was trained for so few
            steps. Raises UserError for True without a student.
        """
        if student and not self.student:
            raise UserError("these weights have no student: leave out --student, or give a folder with a student")
        if student is None and self.student:
            student = (steps or self.config.sample.steps) <= self.student.config.sample.steps
            logger.info("the %s makes the clips, because of the number of steps", "student" if student else "teacher")
        return self.student if student else self

    def for_size(self, size):
        """The Pipeline that makes clips of a size (height, width), in pixels. Its parameters are those of this one.

        size: None: as in training.
        Raises UserError where the models do not take this size.
        """
        size = None if size is None else tuple(size)
        if size in (None, tuple(self.config.data.size)):
            return self
        if size not in self.sized:
            try:
                system = self.system.with_shape(self.config.data.frames, size)
            except UserError as error:
                raise UserError(f"size {size[0]}x{size[1]}: {error}") from None
            self.sized[size] = Pipeline(system, self.params, self.mesh)
        return self.sized[size]

    def __call__(
        self,
        prompt,
        *,
        seed=0,
        seconds=None,
        size=None,
        image=None,
        video=None,
        audio=None,
        between=None,
        control=None,
        **options,
    ):
        """A Clip of a prompt, or a list of Clips of a list of prompts.

        Main arguments:
        prompt: a text, or a list of texts.
        seed: seed of the noise. The same seed and prompt give the same clip.
        size: (height, width) in pixels; None: as in training.
        seconds: length; None: as in training, or that of `video` or `audio`. A longer clip is made window by window.
        image: the first frame; a file, or uint8 [h, w, 3].
        video: a clip of any length that gets a sound; a file, a Clip, or uint8 [F, h, w, 3] at the system's frame rate.
        audio: a sound of any length that gets a picture; a file, a Clip, or float32 [N] at the system's sample rate.
        between: two clips; the new clip leads from the end of the first to the beginning of the second.
        control: the buttons held in each frame; a CSV file as in data/control.py, or numbers from 0 to 1 [F, A] for the
            names in config.data.control.
        What is given comes back as it is, at the system's size and rates. An MP4 of the Clip has the streams of the
        file.

        Other arguments (less frequently used): student, as in `for_steps`; any setting of config.sample, such as steps,
        method, context_noise, lag.
        guidance is a dict of weights; a number sets only its weight `text`, which counts without context and after an
        image.

        Raises UserError where these do not fit.
        """

        def prepare(maker, prompts):
            maker = maker.for_size(size)
            if video is not None or audio is not None:
                whole = maker._whole(video, audio)
                held = maker._control(control, maker._frames_in(**whole))
                return functools.partial(maker.complete, prompts, **whole, seed=seed, control=held, **options)
            frames = maker.config.data.frames if seconds is None else maker.frames_of(seconds)
            given = dict(image=image, between=between, context_frames=options.get("context_frames"))
            context, held = maker.context(frames, **given), maker._control(control, frames)
            return functools.partial(
                maker.rollout, prompts, frames, seed=seed, context=context, control=held, **options
            )

        given = dict(image=image, video=video, audio=audio, between=between)
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            raise UserError(f"give only one of {', '.join(given)}")
        if seconds is not None and {"video", "audio"} & {*given}:
            raise UserError(f"the clip is as long as the given {', '.join(given)}: leave out seconds")
        kept = {"picture_from": _file(video, "picture_from"), "sound_from": _file(audio, "sound_from")}
        return self._clips(prompt, prepare, options, kept)

    def extend(self, clip, prompt, *, seconds=None, seed=None, control=None, cut=False, **options):
        """A Clip that begins with `clip` and goes on for `seconds`; a list of them for a list of prompts.

        An MP4 of it begins with the packets of the file, if they are H.264, and the new frames have the file's size.
        A Clip from this Pipeline has a scene: what its weights remember of it goes on, too.

        clip: a Clip, a file, or the Scene of a clip, with one clip for each prompt. A Scene has no earlier frames: then
            the result is what is added.
        prompt: a text, or a list of texts.
        seconds: length of what is added; None: the length of a clip in training.
        seed: as in a call; None: that of the scene, or 0.
        control: as in a call, for the frames that are added. The frames of `clip` get that of the first added frame.
        cut: whether the first new frame follows after a cut, and not from the last frames of `clip`.
        options: as in a call.
        """
        scene = clip if isinstance(clip, Scene) else getattr(clip, "scene", None)
        kept = {"starts_from": _file(clip, "starts_from"), "start_frames": getattr(clip, "start_frames", 0)}

        def prepare(maker, prompts):
            if clip is scene:
                start = maker._check_scene(scene, prompts)
            else:
                start = tuple(np.repeat(part[None], len(prompts), 0) for part in maker._read(clip))
            length = start[0].shape[1]
            kept["start_frames"] = kept["start_frames"] or length
            added = maker.config.data.frames if seconds is None else maker.frames_of(seconds)
            held = maker._control(control, added)
            held = None if held is None else np.pad(held, ((0, 0), (length, 0), (0, 0)), "edge")
            known = scene and (scene if scene.maker is maker.system else scene._replace(memory=None))
            own = dict(seed=(scene.seed if scene else 0) if seed is None else seed, scene=known, cut=cut)
            make = functools.partial(
                maker.rollout, prompts, length + added, start=start, control=held, **own, **options
            )
            return make if clip is not scene else functools.partial(_without_start, make, length)

        return self._clips(prompt, prepare, options, {} if clip is scene else kept)

    def save_scene(self, path, clips):
        """Writes the scenes of Clips to a file, from which `read_scene` reads them in another process."""
        parts = [clip.scene for clip in clips]
        if None in parts:
            raise UserError("a clip of which the picture or the sound was given has no scene to go on with")
        arrays = jax.tree.map(lambda *rows: np.concatenate(rows), *[part.arrays for part in parts])
        scenes.save(path, parts[0]._replace(**arrays), self.weights_hash)

    def read_scene(self, path, clips=1):
        """Returns the Scene of so many clips in a file of `save_scene`. Raises UserError where it is another one."""
        layout, context = self.system.layout, self._context_frames
        expected = {
            "video": np.empty((clips, context, *self.config.data.size, 3), np.uint8),
            "audio": np.empty((clips, context * layout.samples_per_frame), np.float32),
            "memory": memory.empty(self.config.denoiser.model, layout, clips) if self._remembers else {},
        }
        return scenes.read(path, expected, self.weights_hash)._replace(maker=self.system)

    @property
    def _remembers(self):
        return bool(self.config.denoiser.model.get("memory"))  # older weights have no such setting

    @property
    def _context_frames(self):
        """Video frames that a window gets from the window before."""
        return 1 + self.system.layout.f_t * (self.config.sample.context_frames - 1)

    def _check_scene(self, scene, prompts):
        """The last frames and sounds of a Scene, as `rollout` takes them. Raises UserError where they do not fit."""
        size = scene.video.shape[2:4]
        if size != tuple(self.config.data.size) or len(scene.video) != len(prompts):
            raise UserError(
                f"the scene has {len(scene.video)} clips of {size[0]}x{size[1]} pixels: give as many prompts, and "
                "this --size"
            )
        return scene.video, scene.audio

    # --------------------------------------------------------------------------------------------- arrays in and out

    def sample(self, prompts, **arguments):
        """-> (video uint8 [P, F, H, W, 3], audio float32 [P, N]) of P prompts; arguments as in Sampler.window."""
        return self.window(prompts, **arguments)[:2]

    def window(self, prompts, **arguments):
        """-> (video, audio, memory) of P prompts; arguments as in Sampler.window."""
        with jax.set_mesh(self.mesh):
            return self.sampler.window(self.params, prompts, **arguments)

    def rollout(
        self, prompts, frames, *, seed=0, context=None, start=None, control=None, scene=None, cut=False, **options
    ):
        """-> (video, audio, Scene), like `sample`, for clips of any length.

        They are made window after window. Each window gets the end of the one before as context, and the memory of all
        windows before it where the weights have a memory.

        prompts: P texts.
        frames: video frames of the whole, 1 + f_t * n.
        context: tasks.Context of the first window; None: no context. Not used with start. It comes back as it is.
        start: (video uint8 [P, n, H, W, 3], audio float32 [P, n * samples_per_frame]) that the clips begin with;
            None: the first window is sampled.
        control: of the whole, float [P or 1, frames, A]; None: not known.
        scene: of `start`: its memory, and the number of the next window; None: nothing is remembered.
        cut: whether the first window after `start` gets no context.
        options: as in Sampler.window. A window gets `context_frames` latent frames of the window before, or fewer
            where there are fewer.
        """
        layout = self.system.layout
        per_frame = layout.samples_per_frame
        number, remembered = (scene.window, scene.memory) if scene else (1, None)
        begin = None if start is None else start[0].shape[1]
        if cut:
            plan = [0, *self.plan(frames, begin + layout.frames, options.get("context_frames"))]
        else:
            plan = self.plan(frames, begin, options.get("context_frames"))
        if start is None:
            video, audio, remembered = self._first_window(prompts, frames, seed, context, control, options)
        else:
            video, audio = start
        with progress("sampling", len(plan), "window") as advance:
            for past in plan:
                context = None
                if past:
                    context = tasks.continue_(video[:, -past:], audio[:, -past * per_frame :], layout)
                held = _window(control, video.shape[1] - past, layout.frames)
                own = dict(seed=seed, window=number, context=context, control=held, memory=remembered)
                next_video, next_audio, remembered = self.window(prompts, **own, **options)
                video = np.concatenate([video, next_video[:, past:]], 1)
                if past:
                    audio = crossfade(audio, next_audio, past * per_frame, self._fade)
                else:
                    audio = np.concatenate([audio, next_audio], 1)
                number += 1
                advance(1)
        video, audio = video[:, :frames], audio[:, : frames * per_frame]
        kept = self._context_frames
        end = video[:, -kept:], audio[:, -kept * per_frame :]
        return video, audio, Scene(*end, remembered, number, seed, self.system)

    def complete(self, prompts, *, video=None, audio=None, seed=0, control=None, **options):
        """-> (video, audio) as `sample`, for clips of any length of which one modality is given whole and comes back.

        prompts: P texts.
        video: uint8 [F, H, W, 3], which gets a sound; or
        audio: float32 [N], which gets a picture. After its end there is silence, up to the end of a frame.
        control, options: as in `rollout`.
        """
        layout = self.system.layout
        per_frame = layout.samples_per_frame
        frames = self._frames_in(video, audio)
        filled = 1 + layout.f_t * -(-(frames - 1) // layout.f_t)  # frames, so that latent frames are whole
        plan = self.plan(filled, context_frames=options.get("context_frames"))
        layout = layout.with_frames(min(filled, layout.frames))
        end = layout.frames + sum(layout.frames - past for past in plan)  # of the last window
        if video is None:
            whole = np.pad(audio.astype(np.float32), (0, end * per_frame - len(audio)))
            context = tasks.audio(whole[: layout.samples], layout)
        else:
            whole = np.pad(video, ((0, end - frames), (0, 0), (0, 0), (0, 0)), "edge")
            context = tasks.foley(whole[: layout.frames], layout)
        whole = np.broadcast_to(whole, (len(prompts), *whole.shape))
        made, sound, _ = self._first_window(prompts, filled, seed, context, control, options)
        start = 0  # frame of the window
        with progress("sampling", len(plan), "window") as advance:
            for window, past in enumerate(plan, 1):
                start += layout.frames - past
                samples = slice(start * per_frame, (start + layout.frames) * per_frame)
                if video is None:
                    context = tasks.begun(made[:, start:], whole[:, samples], layout)
                else:
                    context = tasks.begun(whole[:, start : start + layout.frames], sound[:, samples], layout)
                own = dict(seed=seed, window=window, context=context, control=_window(control, start, layout.frames))
                next_video, next_audio = self.sample(prompts, **own, **options)
                made = np.concatenate([made, next_video[:, past:]], 1)
                sound = crossfade(sound, next_audio, past * per_frame, self._fade)
                advance(1)
        made, sound = (made, whole) if video is None else (whole, sound)
        return made[:, :frames], sound[:, : frames * per_frame]

    def _first_window(self, prompts, frames, seed, context, control, options):
        """As `window`, for the first window of clips of so many frames. What is context comes back as it was given."""
        layout = self.system.layout.with_frames(min(frames, self.config.data.frames))
        own = dict(seed=seed, frames=layout.frames, context=context, control=_window(control, 0, layout.frames))
        video, audio, remembered = self.window(prompts, **own, **options)
        return *tasks.restored(context, video, audio, layout, self._fade), remembered

    def _control(self, control, frames):
        """-> float32 [1, frames, A] of a file or an array; None for None. Raises UserError where it does not fit."""
        names = tuple(self.config.data.get("control", ()))  # older weights have none
        if control is None:
            return None
        if not names:
            raise UserError("these weights were trained without control: leave out control")
        if isinstance(control, str | os.PathLike):
            control = control_files.read(control, names)
        return control_files.check(control, names, frames)[None]

    def _frames_in(self, video=None, audio=None):
        """The video frames of a clip whose picture or sound is given whole."""
        return -(-len(audio) // self.system.layout.samples_per_frame) if video is None else len(video)

    @property
    def _fade(self):
        return round(FADE * self.config.data.sample_rate)

    def plan(self, frames, start=None, context_frames=None):
        """The windows that make a clip longer: for each window, its number of context frames.

        frames: video frames of the whole.
        start: video frames that are there before the first of these windows; None: as many as a clip of training.
        context_frames: latent frames of context at most; None: as in config.sample.
        Raises UserError for context_frames that leave nothing to generate.
        """
        layout = self.system.layout
        context_frames = self.config.sample.context_frames if context_frames is None else context_frames
        if not 0 < context_frames < layout.latent_frames:
            raise UserError(
                f"sample.context_frames={context_frames} must be from 1 to {layout.latent_frames - 1} latent frames"
            )
        done = layout.frames if start is None else start
        plan = []
        while done < frames:
            plan.append(1 + layout.f_t * min(context_frames - 1, (done - 1) // layout.f_t))
            done += layout.frames - plan[-1]
        return plan

    def frames_of(self, seconds):
        """Video frames nearest to `seconds` that fill whole latent frames. Warns if that is another length.

        Raises UserError for a length that is not above 0 or too long.
        """
        if not 0 < seconds <= MAX_SECONDS:
            raise UserError(f"seconds={seconds}: give a length above 0 and up to {MAX_SECONDS}")
        fps, f_t = self.config.data.fps, self.system.layout.f_t
        frames = 1 + f_t * max(0, round((seconds * fps - 1) / f_t))
        if abs(frames / fps - seconds) > 0.5 / fps:
            logger.warning(
                "seconds=%g rounded to %.3f s: %d frames at %g fps, 1 and then %d for each latent frame",
                seconds, frames / fps, frames, fps, f_t,
            )  # fmt: skip
        return frames

    def context(self, frames, *, image=None, between=None, context_frames=None):
        """The tasks.Context of a clip.

        frames: video frames of the clip. If it is longer than a clip of training, this is the context of its first
            window.
        image, between: as in a call; at most one of them.
        context_frames: latent frames of context at either end with `between`; None: as in config.sample.
        Raises UserError for `between` with a long clip.
        """
        data = self.config.data
        layout = self.system.layout.with_frames(min(frames, data.frames))
        if image is not None:
            if not isinstance(image, np.ndarray):
                check_kind(image, "image")
                image = media.read_image(image)
            self._tell_fit("the image", image.shape[:2])
            return tasks.image(media.fit(image, data.size), layout)
        if between is None:
            return tasks.text(layout)
        if frames > data.frames:
            raise UserError(f"between is for clips of up to {data.frames / data.fps:g} s: lower seconds")
        return self._between(between, layout, context_frames)

    def _whole(self, video, audio):
        """-> {'video': uint8 [F, H, W, 3]} or {'audio': float32 [N]}, as `complete` takes it."""
        if video is not None:
            return {"video": self._read(video)[0]}
        if isinstance(audio, Clip):
            audio = self._read(audio)[1]
        elif not isinstance(audio, np.ndarray):
            check_kind(audio, "sound only", "video")
            seconds = media.sound_seconds(audio)
            if seconds > MAX_SECONDS:
                raise UserError(f"{audio} lasts {seconds:.0f} s: cut it to {MAX_SECONDS} s")
            audio = media.read_audio(audio, self.config.data.sample_rate, seconds)
        if not len(audio):
            raise UserError("the sound has no samples")
        return {"audio": audio}

    def _clips(self, prompt, prepare, options, sources):
        """A Clip of a prompt, or a list of them. Warns of words that no caption in training had.

        prepare: (this Pipeline or its student, prompts) -> make. It checks its inputs. make() -> (video, audio), or
            (video, audio, Scene).
        options: of a call; `student` is taken out. Raises UserError where they are wrong.
        sources: fields of the Clips that tell the files that were given.
        """
        maker = self.for_steps(options.get("steps"), options.pop("student", None))
        resolve(maker.config.sample, options)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("there is no prompt: give a text, or a list with at least one")
        make = prepare(maker, prompts)
        data = maker.config.data
        if data.source == "world":
            unknown = captions.unknown_words(" ".join(prompts), data.world.get("wordings", 0.0))
            if unknown:
                words = [f"{word[:30]!r}" + (f" (nearest: {near!r})" if near else "") for word, near in unknown.items()]
                words = ", ".join(words[:10]) + (f" and {len(words) - 10} more" if len(words) > 10 else "")
                logger.warning("training had no caption with the words %s: the model may ignore them", words)
        video, audio, *scene = make()
        clips = []
        for i, text in enumerate(prompts):
            own = {"scene": scene[0].of_clip(i)} if scene else {}
            clips.append(Clip(video[i], audio[i], data.fps, data.sample_rate, text, **sources, **own))
        return clips[0] if isinstance(prompt, str) else clips

    def _between(self, clips, layout, context_frames):
        if isinstance(clips, str) or len(clips) != 2:
            raise UserError("between wants two clips: first.mp4 and second.mp4")
        start, end = (self._read(clip) for clip in clips)
        wanted = self.config.sample.context_frames if context_frames is None else context_frames
        latents = min(wanted, (layout.latent_frames - 1) // 2)
        need = layout.f_t * latents
        if not latents or min(len(start[0]), len(end[0])) < need:
            raise UserError(
                f"between needs two clips of at least {need} frames at {self.config.data.fps:g} fps, and a new clip "
                "that is long enough for both ends: raise seconds"
            )
        return tasks.between(start, end, layout, latents)

    def _read(self, clip):
        """-> (video uint8 [F, H, W, 3], audio float32 [N]) at the system's size and rates.

        clip: a file, a Clip, or frames uint8 [F, h, w, 3] at the system's frame rate.
        """
        data, per_frame = self.config.data, self.system.layout.samples_per_frame
        if isinstance(clip, np.ndarray):
            clip = Clip(clip, np.zeros(len(clip) * per_frame, np.float32), data.fps, data.sample_rate)
        if not isinstance(clip, Clip):
            check_kind(clip, "video")
            self._tell_fit(clip, media.probe(clip)["size"])
            video, audio = media.read_video(clip, fps=data.fps, size=data.size, sample_rate=data.sample_rate)
            return video, audio[: len(video) * per_frame]
        if clip.audio is None:
            silence = np.zeros(len(clip.video) * per_frame, np.float32)
            clip = dataclasses.replace(clip, audio=silence, sample_rate=data.sample_rate)
        if (clip.fps, clip.sample_rate) != (data.fps, data.sample_rate):
            raise UserError(
                f"the clip has {clip.fps:g} fps and {clip.sample_rate} Hz, the system {data.fps:g} fps and "
                f"{data.sample_rate} Hz: save the clip, and give the file"
            )
        if not len(clip.video) or len(clip.audio) < len(clip.video) * per_frame:
            raise UserError(f"the clip has {len(clip.video)} frames and {len(clip.audio)} samples of sound: too few")
        self._tell_fit("the clip", clip.video.shape[1:3])
        video = np.stack([media.fit(frame, data.size) for frame in clip.video])
        return video, clip.audio[: len(video) * per_frame]

    def _tell_fit(self, name, size):
        """Tells that a picture of a size (height, width) is scaled to that of the clips, and cropped if it must be."""
        height, width = self.config.data.size
        if tuple(size) != (height, width):
            cropped = "scaled and cropped" if size[0] * width != size[1] * height else "scaled"
            logger.info("%s of %dx%d pixels is %s to %dx%d", name, *size, cropped, height, width)


def check_kind(path, *kinds):
    """Raises UserError for a file that belongs to another argument. kinds: what it may be, see media.kind."""
    kind = media.kind(path)
    if kind is not None and kind not in kinds:
        raise UserError(f"{path} is {OTHER_FLAG[kind]}")


def _file(given, field):
    """-> the path of a file that was given, or the file in this field of a Clip that was given, or None."""
    if isinstance(given, Clip):
        return getattr(given, field)
    return None if given is None or isinstance(given, np.ndarray) else str(given)


def _without_start(make, frames):
    """As make() -> (video, audio, scene), without the first frames and their sound."""
    video, audio, scene = make()
    samples = audio.shape[1] // video.shape[1] * frames
    return video[:, frames:], audio[:, samples:], scene


def _window(control, first, frames):
    """The control of frames `first` to first + frames - 1, where there is any. After its end it is that of its end."""
    if control is None:
        return None
    return control[:, np.minimum(np.arange(first, first + frames), control.shape[1] - 1)]


def crossfade(audio, following, overlap, fade):
    """Two sounds as one, without a click where they meet.

    audio: [P, N].
    following: [P, M]; its first `overlap` samples are the last of `audio`.
    fade: samples at the end of the overlap over which the first sound gives way to the second.
    """
    fade = min(fade, overlap)
    share = np.linspace(0, 1, fade + 2, dtype=np.float32)[1:-1]
    blend = audio[:, audio.shape[1] - fade :] * (1 - share) + following[:, overlap - fade : overlap] * share
    return np.concatenate([audio[:, : audio.shape[1] - fade], blend, following[:, overlap:]], 1)
