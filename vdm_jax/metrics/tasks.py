"""How well a trained model does each task, by the tracker; for the procedural world only.

Where a figure has a ceiling, it stands beside the figure: the same measure on the true clips.
"""

import functools
import logging

import jax
import numpy as np

from vdm_jax import tasks
from vdm_jax.data import captions
from vdm_jax.metrics import reconstruction, shares, tracker

logger = logging.getLogger("vdm_jax")

WINDOWS = 10  # length of a rollout, in clips
STILL = 0.02  # frame widths: an object that moves less has not moved
APART = 2  # frames: a velocity change this near an impact is the impact's


def objects(item):
    """What the caption of a clip of the world asks for, as the tracker wants it; None for other data."""
    return captions.asked(item["state"]) if "state" in item else None


def follow(config, asked, video, audio):
    """What the tracker finds in each of P clips; [] where nothing is asked. asked: P lists of objects, or of None."""
    fps, sample_rate, clips = config.data.fps, config.data.sample_rate, zip(video, audio, asked, strict=True)
    return [tracker.measure(*clip, fps, sample_rate, want) for *clip, want in clips if want is not None]


def measure(pipe, items, seed):
    """The figures of each task, {task: {figure: value}}, where a Pipeline completes the clips `items` of the world."""
    run, out = _Run(pipe, items, seed), {}
    for task in (undirected, image, continue_, foley, audio, rollout):
        name = task.__name__.rstrip("_")
        logger.info("task: %s, %d clips", name, len(items))
        out[name] = task(run)
    return out


class _Run:
    """The clips of an evaluation, and the model that is asked to complete them."""

    def __init__(self, pipe, items, seed):
        self.pipe, self.items, self.seed = pipe, items, seed
        self.layout, self.fps = pipe.system.layout, pipe.config.data.fps
        self.asked = [objects(item) for item in items]
        self.prompts = [item["caption"] for item in items]
        self.video, self.audio = (np.stack([item[part] for item in items]) for part in ("video", "audio"))

    def complete(self, make):
        """-> (video, audio) of all clips, each completed from its tasks.Context, make(video, audio)."""
        contexts = [make(video, audio) for video, audio in zip(self.video, self.audio)]
        arrays = jax.tree.map(lambda *x: np.concatenate(x), *(context[:2] for context in contexts))
        return self.pipe.sample(self.prompts, seed=self.seed, context=tasks.Context(*arrays, contexts[0].masks))

    def outcomes(self, video, audio):
        """What the tracker finds in each clip."""
        return follow(self.pipe.config, self.asked, video, audio)

    def synchrony(self, video, audio):
        """Shares of visible impacts that sound, and of onsets that have an impact."""
        made, true = (tracker.summarize(self.outcomes(*c)) for c in ((video, audio), (self.video, self.audio)))
        keys = ("sync_impacts", "sync_onsets")
        return {key: made[key] for key in keys} | {f"{key}_truth": true[key] for key in keys}


def undirected(run):
    """Prompts that name color and shape alone: shares of prompts with all objects right."""
    texts = [" and ".join(f"a {o['color']} {o['shape']}" for o in things) for things in run.asked]
    made = run.pipe.sample(texts, seed=run.seed, context=tasks.text(run.layout))
    found = tracker.summarize(run.outcomes(*made))
    return {key: found[key] for key in ("one_object", "two_objects")}


def image(run):
    """The first frame against its reconstruction, and the share of clips in which something moves."""
    video, _ = run.complete(lambda video, audio: tasks.image(video[0], run.layout))
    reconstruct = jax.jit(functools.partial(run.pipe.system.reconstruct, "video_autoencoder"))
    remade = np.concatenate([reconstruct(run.pipe.params, clip[None])[:, :1] for clip in run.video])
    return {
        "first_frame_psnr": reconstruction.psnr(run.video[:, :1], video[:, :1]),
        "first_frame_psnr_reconstructed": reconstruction.psnr(run.video[:, :1], remade),
        "moves": shares.mean([_moves(clip) for clip in video]),
        "moves_truth": shares.mean([_moves(clip) for clip in run.video]),
    }


def _moves(video):
    """Whether an object is ever more than STILL away from where the tracker first sees it."""
    paths = [row["position"][row["present"]] for row in tracker.track(video).values()]
    return any(len(path) > 2 and np.linalg.norm(path - path[0], axis=1).max() > STILL for path in paths)


def continue_(run):
    """Median velocity changes before, at and after the end of the context, in frame widths a second.

    The context is the first config.sample.context_frames latent frames of the true clip, as the autoencoder shows them.
    'given' measures the context frames, 'seam' the two frames around its end, 'inside' the generated frames after that.
    """
    past = 1 + run.layout.f_t * (run.pipe.config.sample.context_frames - 1)
    samples = past * run.layout.samples_per_frame
    video, _ = run.complete(lambda video, audio: tasks.continue_(video[None, :past], audio[None, :samples], run.layout))
    true = {f"{key}_truth": value for key, value in _velocity_changes(run, run.video, past).items()}
    right = shares.mean([clip["right"] for clip in run.outcomes(video, run.audio)])
    return _velocity_changes(run, video, past) | true | {"right": right}


def _velocity_changes(run, clips, past):
    """Medians of |velocity change|, as `continue_` describes them; the first `past` frames are context.

    Frames near an impact of the true clip are left out. Inside, frames near a detected impact are left out too. At the
    seam they are not: a jump there looks like an impact.
    """
    found = {"given": [], "seam": [], "inside": []}
    for item, video in zip(run.items, clips, strict=True):
        tracks = tracker.track(video)
        true_impacts = [event["time"] * run.fps for event in item["state"]["events"]]
        seen_impacts = [time * run.fps for time, *_ in tracker.impacts(tracks, run.fps)]
        for row in tracks.values():
            change = np.linalg.norm(tracker.second_differences(row), axis=1) * run.fps
            for k, value in enumerate(change, 1):  # at frame k, from the frames k - 1 to k + 1
                where = "given" if k + 1 < past else "inside" if k > past else "seam"
                impacts = true_impacts + seen_impacts if where == "inside" else true_impacts
                if np.isfinite(value) and all(abs(k - time) > APART for time in impacts):
                    found[where].append(value)
    return {name: float(np.median(x)) if x else None for name, x in found.items()}


def foley(run):
    """Silent clips get a sound: the synchrony of the true picture and the generated sound."""
    _, sound = run.complete(lambda video, audio: tasks.foley(video, run.layout))
    return run.synchrony(run.video, sound)


def audio(run):
    """Sounds get a picture: the synchrony of the true sound and the generated picture."""
    video, _ = run.complete(lambda video, audio: tasks.audio(audio, run.layout))
    return run.synchrony(video, run.audio)


def rollout(run):
    """Outcomes of clips WINDOWS times as long as in training, one value for each length of a training clip."""
    frames, per_frame = run.layout.frames, run.layout.samples_per_frame
    video, audio, _ = run.pipe.rollout(run.prompts, WINDOWS * frames, seed=run.seed)
    curve = {"seconds": [], "right": [], "permanence": [], "size_drift": []}
    for start in range(0, WINDOWS * frames, frames):
        end = start + frames
        found = run.outcomes(video[:, start:end], audio[:, start * per_frame : end * per_frame])
        right = shares.mean([clip["right"] for clip in found])
        figures = tracker.summarize(found) | {"seconds": end / run.fps, "right": right}
        for name, column in curve.items():
            column.append(figures[name])
    return curve
