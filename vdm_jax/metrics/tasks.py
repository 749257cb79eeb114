"""How well a trained model does each task that is a pattern of given frames, by the tracker; the procedural world only.

Every figure has its ceiling beside it where there is one: the same measure on the true clips.
"""

import logging

import jax
import numpy as np

from vdm_jax import tasks
from vdm_jax.data import captions
from vdm_jax.metrics import reconstruction, tracker
from vdm_jax.system import codec as stages

logger = logging.getLogger("vdm_jax")

WINDOWS = 10  # lengths of a clip that a roll-out is followed for
STILL = 0.02  # frame widths: what moves less has not moved


def objects(item):
    """What the caption of a clip of the world asks for, as the tracker wants it; None for other sources."""
    if "state" not in item:
        return None
    return captions.asked(item["state"])


def measure(generator, items, seed):
    """-> {'undirected', 'image', 'continue', 'foley', 'sound', 'rollout'}: figures of each task over `items`."""
    config = generator.config
    run = _Run(generator, items, stages.layout(config), config.data.fps, config.data.sample_rate, seed)
    out = {}
    for task in (undirected, image, continue_, foley, sound, rollout):
        name = {"continue_": "continue"}.get(task.__name__, task.__name__)
        logger.info("task: %s, %d clips", name.replace("_", " "), len(items))
        out[name] = task(run)
    return out


class _Run:
    """The clips of an evaluation, and the model that is asked to complete them."""

    def __init__(self, generator, items, size, fps, rate, seed):
        self.generator, self.items, self.size, self.fps, self.rate, self.seed = generator, items, size, fps, rate, seed
        self.prompts = [item["caption"] for item in items]
        self.video, self.audio = (np.stack([item[part] for item in items]) for part in ("video", "audio"))

    def complete(self, make):
        """make(video, audio) -> tasks.Context of one clip; all clips are completed from their own."""
        given = [make(video, audio) for video, audio in zip(self.video, self.audio, strict=True)]
        parts = [None if x[0] is None else np.concatenate(x) for x in zip(*((g.video, g.audio) for g in given))]
        return self.generator(self.prompts, seed=self.seed, given=tasks.Context(*parts, given[0].masks))


def undirected(run):
    """The clips' objects asked for by color and shape alone: shares of prompts of which all are right."""
    asked = [objects(item) for item in run.items]
    texts = [" and ".join(f"a {o['color']} {o['shape']}" for o in things) for things in asked]
    clips = zip(*run.generator(texts, seed=run.seed, given=tasks.nothing(run.size)), asked, strict=True)
    made = tracker.summarize([tracker.measure(v, a, run.fps, run.rate, want) for v, a, want in clips])
    return {key: made[key] for key in ("one_object", "two_objects")}


def image(run):
    """The first frame against its reconstruction, and whether what it shows moves."""
    video, _ = run.complete(lambda video, audio: tasks.image(video[0], run.size))
    remake = jax.jit(lambda p, x: stages.reconstruct(run.generator.config, "video_autoencoder", p, x))
    params = run.generator.frozen["video_autoencoder"]
    remade = np.concatenate([remake(params, clip[None])[:, :1] for clip in run.video])
    truth = run.video[:, :1]
    return {
        "first_frame_psnr": reconstruction.psnr(truth, video[:, :1]),
        "first_frame_psnr_reconstructed": reconstruction.psnr(truth, remade),
        "moves": float(np.mean([_moves(clip) for clip in video])),
        "moves_truth": float(np.mean([_moves(clip) for clip in run.video])),
    }


def _moves(video):
    """Whether an object that is tracked in the first third and in the last is elsewhere in between, or then."""
    for row in tracker.track(video).values():
        at = row["position"][row["present"]]
        if len(at) > 2 and np.linalg.norm(at - at[0], axis=1).max() > STILL:
            return True
    return False


def continue_(run):
    """Velocity changes where a given beginning ends, before it and after it, away from impacts; frame widths a second.

    The beginning is config.sample.context_frames latent frames of the true clip, autoencoded. 'seam' is of
    the two frames around its end, 'inside' of those whose neighbours are made, too, 'given' of those before.
    """
    past = 1 + run.size.f_t * (run.generator.config.sample.context_frames - 1)
    samples = past * run.size.samples_per_frame
    video, _ = run.complete(lambda video, audio: tasks.history(video[None, :past], audio[None, :samples], run.size))
    made, true = _velocity_changes(run, video, past), _velocity_changes(run, run.video, past)
    shown = [tracker.measure(v, a, run.fps, run.rate, objects(i)) for v, a, i in zip(video, run.audio, run.items)]
    return {
        **made,
        **{f"{key}_truth": value for key, value in true.items()},
        "right": float(np.mean([m["right"] for m in shown])),
    }


def _velocity_changes(run, clips, past):
    """Medians of |velocity change|, frames 'given', 'seam' and 'inside'; the first `past` are given.

    Away from impacts of the true clip, which what is given leads to, and inside from those seen, too: at the seam a
    jump would pass for an impact.
    """
    found = {"given": [], "seam": [], "inside": []}
    for item, video in zip(run.items, clips, strict=True):
        tracks = tracker.track(video)
        true = [e["time"] * run.fps for e in item["state"]["events"]]
        seen = [t * run.fps for t, *_ in tracker.impacts(tracks, run.fps)]
        for row in tracks.values():
            usable = row["present"] & (row["visible"] >= tracker.VISIBLE)
            position = np.where(usable[:, None], row["position"], np.nan)
            change = np.linalg.norm(position[2:] - 2 * position[1:-1] + position[:-2], axis=1) * run.fps
            for k, value in enumerate(change, 1):  # at frame k, by the frames k - 1 to k + 1
                where = "given" if k + 1 < past else "inside" if k > past else "seam"
                struck = true + seen if where == "inside" else true
                if np.isfinite(value) and all(abs(k - t) > 2 for t in struck):
                    found[where].append(value)
    return {name: float(np.median(x)) if x else None for name, x in found.items()}


def foley(run):
    """Silent clips get their sound: shares of visible impacts that sound, and of onsets that have an impact."""
    _, audio = run.complete(lambda video, audio: tasks.video(video, run.size))
    return _in_step(run, run.video, audio)


def sound(run):
    """Sounds get their clip: the same two shares, of the true sound and the picture made."""
    video, _ = run.complete(lambda video, audio: tasks.sound(audio, run.size))
    return _in_step(run, video, run.audio)


def _in_step(run, video, audio):
    def shares(video, audio):
        clips = zip(video, audio, run.items, strict=True)
        return tracker.summarize([tracker.measure(v, a, run.fps, run.rate, objects(i)) for v, a, i in clips])

    made, true = shares(video, audio), shares(run.video, run.audio)
    keys = ("sync_impacts", "sync_onsets")
    return {key: made[key] for key in keys} | {f"{key}_truth": true[key] for key in keys}


def rollout(run):
    """What is asked, window by window of a clip's length, up to WINDOWS of them: a curve of shares."""
    frames = WINDOWS * run.size.frames
    video, audio = run.generator.rollout(run.prompts, frames, seed=run.seed)
    per_frame = run.size.samples_per_frame
    curve = {"seconds": [], "right": [], "permanence": [], "size_drift": []}
    for i in range(WINDOWS):
        at = slice(i * run.size.frames, (i + 1) * run.size.frames)
        sounds = audio[:, at.start * per_frame : at.stop * per_frame]
        clips = zip(video[:, at], sounds, run.items, strict=True)
        judged = [tracker.measure(v, a, run.fps, run.rate, objects(item)) for v, a, item in clips]
        summary = tracker.summarize(judged)
        curve["seconds"].append(at.stop / run.fps)
        curve["right"].append(float(np.mean([m["right"] for m in judged])))
        curve["permanence"].append(summary["permanence"])
        curve["size_drift"].append(summary["size_drift"])
    return curve
