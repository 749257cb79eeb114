"""Films of any origin, measured without a model and without true clips: drift, sound against motion, and faults.

Each film is read in pieces, so that memory does not grow with its length. The same file has the same numbers on any
machine: sizes and times are fixed, the picture is counted in whole numbers, and results are rounded to three places.
Rounding hides that floating-point arithmetic differs by machine, unless a value lies just at a limit.
"""

import logging
import os
from collections.abc import Callable

import numpy as np

from vdm_jax.data import listing, summary, whole
from vdm_jax.errors import UserError
from vdm_jax.metrics import av_align, features, reconstruction, tracker
from vdm_jax.metrics.distances import FRAME_PACKAGES

logger = logging.getLogger("vdm_jax")

SIDE = features.SIDE  # pixels of the short side of a frame; all but the network sees half of it
MAX_FPS = 30  # a film with more frames a second is read at a half, a third, ... of its rate
SAMPLE_RATE = 16_000  # Hz
STEP = 0.5  # s between the frames whose features and colors are compared
SPAN = 5  # s of a point of the curves over time
COLORS = 8  # parts of each of the three axes of a color histogram
CUT = 12  # levels of 255: a frame that differs more from the one before may be a cut
CUT_RATIO = 4  # and it differs so many times more than the usual frame within CUT_NEAR frames
CUT_NEAR = 12  # frames
FREEZE = 0.15  # levels of 255: a frame that differs less repeats the one before
FREEZE_SECONDS = 0.4  # a shorter freeze does not count: films of another frame rate repeat single frames
LOUDNESS_WINDOW = 0.25  # s
LOUDNESS_WINDOWS = 4  # before and after a step
LOUDNESS_STEP = 10  # dB
SILENCE = -60  # dB of full scale; less is the same
MARGIN = 0.125  # s of sound on each side of an onset that decide on it
PLACES = 3  # decimal places of results

SCORES = ("feature_drift", "histogram_drift", "av_align", "cuts", "flicker", "frozen", "loudness_steps")

AXES = dict.fromkeys(SCORES, f"over time, each {SPAN} s") | dict.fromkeys(SCORES[:2], "by lag")  # of the curves


def measure_folder(path: str, progress: Callable) -> dict:
    """Returns {'folder': {score: mean over the films}, 'films': {name: as `measure`}, 'curves', 'left_out'}.

    'curves' has the mean of each curve over the films that are long enough; 'left_out' is {reason: summary.group}.

    path: of a folder; each video in it and in its subfolders is a film
    progress: see run/progress.progress
    Raises UserError where there is no film that can be measured.
    """
    if not os.path.isdir(path):
        raise UserError(f"--films={path}: there is no such folder: give a folder with films")
    found = listing.read(path)
    names = [name for name, (_, info) in found.videos.items() if not info.is_image]
    left_out = {reason: {**files} for reason, files in found.left_out.items()}
    images = [name for name in found.videos if name not in names]
    if images:
        left_out["an image"] = dict.fromkeys(images, "")
    network = features.efficientnet_lite0() if features.has_packages(*FRAME_PACKAGES) else None
    if network is None or not features.has_packages("cv2"):
        logger.warning("some scores are left out, as packages are missing: pip install 'vdm_jax[metrics]'")
    films = {}
    with progress("measuring", len(names), "film") as advance:
        for name in names:
            part, info = found.videos[name]
            try:
                films[name] = measure(found.open(name, part), info, network)
            except UserError as error:
                left_out.setdefault(listing.BROKEN, {})[name] = str(error)
            advance(1)
    groups = {
        reason: summary.group([f"{name} ({why})" if why else name for name, why in sorted(files.items())])
        for reason, files in sorted(left_out.items())
    }
    for reason, group in groups.items():
        logger.warning("films: %d left out, %s: %s", group["count"], reason, summary.first_names(group))
    if not films:
        told = "; ".join(f"{reason}: {summary.first_names(group)}" for reason, group in groups.items())
        raise UserError(f"--films={path} has no film that can be read ({told or 'it is empty'}): give a folder of MP4s")
    scores = {name: _mean([film["scores"][name] for film in films.values()]) for name in SCORES}
    return {"folder": scores, "films": films, "curves": _mean_curves(films.values()), "left_out": groups}


def measure(place, info: listing.Info, network: Callable | None) -> dict:
    """Returns {'seconds', 'fps', 'scores': {score: number}, 'curves': {score: {'seconds', 'value'}}} of a film.

      feature_drift   1 - cosine similarity to the mean features of the first second, mean over the lags
      histogram_drift     1 - intersection of color histograms with those of the first second, mean over the lags
      av_align        share of onsets and motion peaks that have a partner, see av_align.py
      cuts            a minute
      flicker         mean distance of a frame's brightness from the mean of its two neighbors, in levels of 255
      frozen          share of frames in freezes of FREEZE_SECONDS or more
      loudness_steps  a minute: times at which the loudness of the second before and after differs by LOUDNESS_STEP dB

    A score that has nothing to measure is None. The curves of drift are over the lag, from 0.5 s after the first second
    to the end. The others have one point for each SPAN seconds, whose cuts and loudness steps are counts.

    place: path or Part
    network: features of frames, uint8 [N, H, W, 3] -> float [N, D]; None leaves out feature_drift
    Raises UserError if the film cannot be read.
    """
    fps = info.fps / np.ceil(info.fps / MAX_FPS)
    frames = max(1, int(info.duration * fps + 1e-6))
    picture, sound = _Picture(fps, network), _Sound()
    for video, audio in whole.read_film(place, frames, fps, _size(info), SAMPLE_RATE):
        picture.add(video)
        sound.add(audio)
    sound.end()
    seconds = picture.count / fps
    time = np.arange(picture.count) / fps

    differences, light = np.array(picture.differences), np.array(picture.light)
    cuts = _cuts(differences)
    frozen = _long_runs(differences < FREEZE, FREEZE_SECONDS * fps)
    flicker = np.full(len(light), np.nan)
    flicker[1:-1] = np.abs(light[1:-1] - (light[:-2] + light[2:]) / 2)
    flicker[cuts | np.append(cuts[1:], False)] = np.nan  # a cut is no flicker
    steps = _loudness_steps(np.array(sound.loudness))
    curves = {
        "flicker": _spans(time, flicker, seconds, _mean),
        "frozen": _spans(time, frozen.astype(float), seconds, _mean),
        "cuts": _spans(time, cuts, seconds, np.sum),
        "loudness_steps": _spans(steps, np.ones(len(steps)), seconds, np.sum),
    }
    curves |= {name: _drift(rows, SIMILARITY[name]) for name, rows in picture.compared.items()}
    scores = {
        "flicker": _mean(flicker),
        "frozen": _mean(frozen),
        "cuts": 60 * cuts.sum() / seconds,
        "loudness_steps": 60 * len(steps) / seconds,
    }
    scores |= {name: _mean(curves[name]["value"]) for name in picture.compared}
    if picture.motion:
        partners = _partners(np.array(picture.motion), differences < FREEZE, cuts, sound.onsets, fps)
        curves["av_align"] = _spans(*partners, seconds, _mean)
        scores["av_align"] = _mean(partners[1])
    return {
        "seconds": round(seconds, PLACES),
        "fps": round(float(fps), PLACES),
        "scores": {name: _rounded(scores.get(name)) for name in SCORES},
        "curves": {name: {key: [*map(_rounded, curves[name][key])] for key in curves[name]} for name in curves},
    }


def _size(info):
    """Height and width at which a film is read: the short side is SIDE, and both are even."""
    ratio = SIDE / min(info.height, info.width)
    return tuple(max(2, 2 * round(side * ratio / 2)) for side in (info.height, info.width))


class _Picture:
    """What is kept of the frames of a film: a few numbers for each."""

    def __init__(self, fps, network):
        self.fps, self.network = fps, network
        self.count = 0  # frames
        self.last = None  # frame, at half size
        self.differences, self.light, self.motion = [], [], []  # of each frame
        self.compared = {"histogram_drift": []} | ({"feature_drift": []} if network else {})  # a row each STEP seconds

    def add(self, video):
        """video: uint8 [F, H, W, 3], the next frames."""
        count, height, width, _ = video.shape
        blocks = video.reshape(count, height // 2, 2, width // 2, 2, 3)
        small = ((blocks.sum((2, 4), dtype=np.uint16) + 2) // 4).astype(np.uint8)  # [F, H/2, W/2, 3]
        numbers = np.arange(self.count, self.count + count)  # of the frames
        picked = np.floor(numbers / self.fps / STEP) > np.floor((numbers - 1) / self.fps / STEP)
        self.compared["histogram_drift"] += [_histogram(frame) for frame in small[picked]]
        if self.network and picked.any():
            self.compared["feature_drift"] += [*np.asarray(self.network(video[picked]), np.float64)]
        self.light += [frame.mean(dtype=np.float64) for frame in small]
        joined = small if self.last is None else np.concatenate([self.last[None], small])
        pairs = zip(joined[1:].astype(np.int16), joined[:-1])
        first = [np.inf] if self.last is None else []  # the first frame repeats none
        self.differences += [*first, *(np.abs(a - b).mean(dtype=np.float64) for a, b in pairs)]
        if features.has_packages("cv2"):
            motion = av_align.motion(joined)
            self.motion += [*(motion if self.last is None else motion[1:])]
        self.last, self.count = small[-1], self.count + count


class _Sound:
    """What is kept of the sound of a film: its onsets, and the loudness of each window."""

    def __init__(self):
        self.onsets, self.loudness = [], []  # in s; in dB
        self.done = 0  # samples
        self.tail, self.rest = (np.zeros(0, np.float32) for _ in range(2))  # of onsets, of loudness

    def add(self, audio):
        """audio: float32 [N], the next samples."""
        self._find_onsets(np.concatenate([self.tail, audio]), len(audio), MARGIN)
        self.tail = np.concatenate([self.tail, audio])[-round(2 * MARGIN * SAMPLE_RATE) :]
        window = round(LOUDNESS_WINDOW * SAMPLE_RATE)
        audio = np.concatenate([self.rest, audio])
        whole_windows = len(audio) // window
        self.rest = audio[whole_windows * window :]
        power = np.square(audio[: whole_windows * window].reshape(-1, window), dtype=np.float64).mean(1)
        self.loudness += [*np.round(np.maximum(10 * np.log10(power + 1e-12), SILENCE), 1)]

    def end(self):
        """The film has ended: the onsets at its end are found, too."""
        self._find_onsets(self.tail, 0, 0)

    def _find_onsets(self, audio, new, margin):
        """Adds the onsets up to `margin` s before the end. The last `new` samples are new."""
        begin = (self.done + new - len(audio)) / SAMPLE_RATE
        after = self.done / SAMPLE_RATE - MARGIN if self.done else 0
        self.done += new
        before = self.done / SAMPLE_RATE - margin
        times = begin + tracker.onsets(audio, SAMPLE_RATE)
        self.onsets += [*times[(times >= after) & (times < before)]]


def _histogram(frame):
    """Shares of the colors of a frame, uint8 [H, W, 3] -> [COLORS ** 3]."""
    parts = frame.reshape(-1, 3).astype(np.int64) * COLORS // 256
    return np.bincount(parts @ [COLORS**2, COLORS, 1], minlength=COLORS**3) / len(parts)


def _drift(rows, similarity):
    """The curve of the drift of rows of a film, one each STEP seconds.

    similarity: of rows [N, D] and one row [D], in 0..1
    """
    first = round(1 / STEP)  # rows of the first second
    rows = np.array(rows)
    later = rows[first + 1 :]
    value = 1 - similarity(later, rows[:first].mean(0)) if len(later) else []
    return {"seconds": STEP * np.arange(1, len(later) + 1), "value": value}


def _cosine(rows, row):
    return rows @ row / np.linalg.norm(rows, axis=1) / np.linalg.norm(row)


def _intersection(rows, row):
    return np.minimum(rows, row).sum(1)


SIMILARITY = {"histogram_drift": _intersection, "feature_drift": _cosine}


def _cuts(differences):
    """bool [F]: whether a cut is before a frame."""
    cuts = np.zeros(len(differences), bool)
    for i in np.flatnonzero(differences[1:] > CUT) + 1:
        near = differences[max(1, i - CUT_NEAR) : i + CUT_NEAR + 1]
        cuts[i] = differences[i] > CUT_RATIO * np.median(near)
    return cuts


def _long_runs(is_still, least):
    """bool [F]: whether a frame is in a run of still frames, of at least so many frames."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_still, [False]]).astype(int)))
    found = np.zeros(len(is_still), bool)
    for start, end in edges.reshape(-1, 2):
        found[start:end] = end - start >= least
    return found


def _partners(motion, repeats, cuts, onsets, fps):
    """(times in s, 1.0 for a pair and 0.0 for an onset or motion peak without a partner) of a film."""
    motion = np.round(motion, PLACES)  # so that equal motion is equal on any machine
    for i in np.flatnonzero(repeats | cuts):  # a repeated frame has no motion of its own, nor has a cut
        motion[i] = motion[i - 1] if i else 0.0
    peaks, pairs = av_align.motion_peaks(motion, fps), []
    onsets = np.array(onsets)
    for start in np.arange(0, len(motion) / fps, SPAN):  # the pairing of a whole film would take its length squared
        a, b = (times[(times >= start) & (times < start + SPAN)] for times in (peaks, onsets))
        paired = len(reconstruction.onset_errors(a, b, 1 / fps)) if len(a) and len(b) else 0
        pairs += [(start, 1.0)] * paired + [(start, 0.0)] * (len(a) + len(b) - 2 * paired)
    return np.array(pairs).reshape(-1, 2).T


def _loudness_steps(loudness):
    """Times (s) of the steps of a loudness in dB, one for each window."""
    size, found = LOUDNESS_WINDOWS, []
    if len(loudness) < 2 * size:
        return np.zeros(0)
    usual = np.median(np.lib.stride_tricks.sliding_window_view(loudness, size), axis=1)
    change = np.abs(usual[size:] - usual[:-size])  # at the windows size, size + 1, ...
    for i in np.argsort(-change, kind="stable"):  # the largest first; no other step is as near as a second
        if change[i] < LOUDNESS_STEP:
            break
        if all(abs(i - other) >= size for other in found):
            found.append(i)
    return (np.sort(np.array(found, int)) + size) * LOUDNESS_WINDOW


def _spans(times, values, seconds, reduce):
    """The curve of values at some times: reduce(values) for each SPAN seconds."""
    starts = np.arange(0, max(seconds, 1e-9), SPAN)
    index = np.floor(np.asarray(times) / SPAN).astype(int)
    return {"seconds": starts, "value": [reduce(np.asarray(values)[index == i]) for i in range(len(starts))]}


def _mean(values):
    """The mean of the values that are numbers, or None."""
    values = np.array([np.nan if value is None else value for value in values], np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _rounded(value):
    return None if value is None else round(float(value), PLACES) + 0.0


def _mean_curves(films) -> dict:
    """The mean of each curve over the films, {score: {'seconds', 'value', 'films': number of films at each point}}."""
    curves = {}
    for name in SCORES:
        given = [film["curves"][name] for film in films if name in film["curves"]]
        longest = max((curve["seconds"] for curve in given), key=len, default=[])
        columns = [[curve["value"][i] for curve in given if i < len(curve["value"])] for i in range(len(longest))]
        counts = [sum(value is not None for value in column) for column in columns]
        curves[name] = {"seconds": longest, "value": [_rounded(_mean(column)) for column in columns], "films": counts}
    return curves
