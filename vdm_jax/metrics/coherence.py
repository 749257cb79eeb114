"""How long films of the procedural world stay coherent: scores by length, each with its gate.

A film is read by the tracker, and scored against what its first frames have shown and against the rules of the world.
It need not follow the true film: after an impact small differences grow. The scores are shares:

  identity     of the frames in which a thing can be seen, those with its own color, shape and size; a further thing
               counts as a frame that is wrong
  permanence   of the things that go out of sight and are due back, those that come back with their own shape and size
  place        of the things that come back, those that come from where their motion leads
  velocity     of the frames between impacts, those in which the velocity stays as it is, except for gravity
  bounce       of the impacts on a wall, those after which the speed is as before
  gravity      of the films, those that fall as they did at the beginning
  cause        of the changes of motion, those with a wall or another thing in reach
  effect       of the arrivals at a wall, those that change the motion
  heard        of the changes of motion, those with an onset of sound within a frame
  explained    of the onsets, those with a change of motion within a frame
  light        of the frames, those whose light is that of the frame before
  camera       of the frames, those whose camera is near that of the frame before

Gate: the share of films in which the event took place at all. A model cannot score by avoiding an event unseen.
"""

import math
from typing import NamedTuple

import numpy as np

from vdm_jax.data.captions import COLORS
from vdm_jax.data.world import render
from vdm_jax.metrics import shares, tracker

LENGTHS = (1, 2, 4, 8, 16, 32)  # in clips of training
ABSENCES = (0.5, 1, 2, 4)  # in clips of training
SCORES = ("identity", "permanence", "place", "velocity", "bounce", "gravity", "cause", "effect")
SCORES += ("heard", "explained", "light", "camera")

SIZE = 0.2  # a thing has its size within this share of its radius
PAN = 0.1  # frame heights, by which a camera that moves is off at most
REACH = 0.06  # frame heights between two things, or a thing and a wall, that touch
SPEED = (0.2, 0.12)  # a speed is as before within this share of it, and this many frame heights per second
JOLT = 0.25  # frame heights per second: a smaller change of velocity may be an error of the tracker
FALL = 0.25  # frame heights per second^2, by which an acceleration may differ
DIM = 0.05  # by which the light may change from frame to frame, as a share
SHIFT = 0.035  # frame heights, by which the camera may move from frame to frame
EXTENT = 1.3  # radii from the center of a thing to the end of its drawn shape
SIDEWAYS = 0.15  # frame heights per second, with which a thing surely passes the occluder
CLEAR = 2  # frames next to an impact, whose velocity is not judged


class Scene(NamedTuple):
    """What a film is scored against."""

    things: dict  # {color: (index of its shape, radius in frame heights)}
    gravity: float  # in frame heights per second^2
    open: bool  # whether things may leave at the sides
    outside: float  # frame heights past the frame, where they turn
    bar: tuple | None  # left and right edge of the occluder, in frame heights
    pans: bool  # whether the camera moves
    wide: float  # width of the frame, in frame heights


def scene_of(item, size, outside):
    """The Scene of a clip of the world. size: (height, width) in pixels. outside: as in data/world.py."""
    state = item["state"]
    kinds = zip(state["color"], state["shape"], state["radius"], strict=True)
    return Scene(
        things={COLORS[color]: (int(shape), float(radius)) for color, shape, radius in kinds},
        gravity=float(state["gravity"]),
        open=bool(state["open"]),
        outside=outside,
        bar=None if state["occluder"] is None else tuple(state["occluder"][0].tolist()),
        pans=bool(state["camera"].any()),
        wide=size[1] / size[0],
    )


class Film(NamedTuple):
    """What the tracker reads in a film."""

    tracks: dict  # see tracker.track
    kinks: list  # changes of velocity, see tracker.impacts
    faint: list  # also those that are too small for `kinks`
    onsets: np.ndarray  # s
    light: np.ndarray  # [F], median brightness of the background
    camera: np.ndarray  # [F, 2], offset in frame heights that fits the background best


def read(video, audio, fps, sample_rate, scene):
    """Returns the Film of a video uint8 [F, H, W, 3] and its sound float32 [N]."""
    tracks = tracker.track(video)
    return Film(
        tracks=tracks,
        kinks=tracker.impacts(tracks, fps),
        faint=tracker.impacts(tracks, fps, tracker.FAINT_KINK),
        onsets=tracker.onsets(audio, sample_rate),
        **_background(video, scene),
    )


def _background(video, scene):
    """The light and the camera of each frame: the empty world that fits the gray pixels best, of a grid of offsets."""
    x, y = np.meshgrid(np.arange(-0.12, 0.121, 0.015), np.arange(-0.06, 0.061, 0.015), indexing="ij")
    offsets = np.stack([x.ravel(), y.ravel()], -1).astype(np.float32)  # [grid, 2]
    count = len(offsets)
    nothing = dict(position=np.zeros((count, 0, 2), np.float32), radius=np.zeros(0), shape=[], color=[], material=[])
    empty, _ = render(
        dict(nothing, camera=offsets, light=np.ones(count, np.float32), occluder=None), video.shape[1:3], scene.open
    )
    empty = empty[..., 0].reshape(count, -1).astype(np.float32)  # [grid, pixels]
    pixels = video.reshape(len(video), -1, 3).astype(np.float32)
    spread = pixels.max(-1) - pixels.min(-1)
    gray = ((spread < 16) & (pixels.max(-1) < 0.32 * 255)).astype(np.float32)  # neither a thing nor the occluder
    value = pixels.mean(-1)
    number = np.maximum(gray.sum(1), 1)
    light = np.ones(len(video), np.float32)
    for _ in range(2):  # the light and the offset depend on each other
        scaled = gray * value / light[:, None]
        error = (gray @ (empty**2).T) - 2 * scaled @ empty.T  # [F, grid], without what all offsets share
        best = error.argmin(1)
        light = np.maximum((gray * value).sum(1) / np.maximum((gray * empty[best]).sum(1), 1), 1e-3)
    seen = number > 0.1 * gray.shape[1]
    return {"light": np.where(seen, light, np.nan), "camera": np.where(seen[:, None], offsets[best], np.nan)}


# ---------------------------------------------------------------------------- scores: [(time in s, value in 0..1)]


def score(film, scene, fps):
    """Returns {score: [(frame, value)]}: every event of a Film, with its value in 0..1."""
    found = {name: [] for name in SCORES}
    rows = {color: film.tracks[color] for color in scene.things if color in film.tracks}
    frames = len(film.light)
    kinks = _distinct(film.kinks, frames, fps)
    causes = [(time, color, _cause(film.tracks, scene, time, color, fps)) for time, color, _ in kinks]
    _identity(found, film, scene, frames)
    for color, row in rows.items():
        others = [other for name, other in rows.items() if name != color]
        _returns(found, row, scene.things[color], others, scene, fps)
        own = [(time, cause) for time, name, cause in causes if name == color]
        _motion(found, row, scene, own, film.kinks, color, fps)
    sizes = {(time, color): size for time, color, size in kinks}
    found["cause"] += [(time * fps, cause is not None) for time, color, cause in causes if sizes[time, color] > JOLT]
    _sound(found, film, scene, kinks, fps, frames)
    for name, change in (
        ("light", np.abs(np.diff(np.log(np.maximum(film.light, 1e-3)))) <= DIM),
        ("camera", np.linalg.norm(np.diff(film.camera, axis=0), axis=1) <= SHIFT),
    ):
        known = np.isfinite(np.diff(film.light))
        found[name] += [(f + 1, bool(change[f])) for f in np.flatnonzero(known)]
    return found


def _identity(found, film, scene, frames):
    for color, row in film.tracks.items():
        there = row["present"]
        if color not in scene.things:
            found["identity"] += [(f, False) for f in np.flatnonzero(there & (row["visible"] >= tracker.VISIBLE))]
            continue
        found["identity"] += [(f, False) for f in np.flatnonzero(row["extra"] > 0)]
        clear = there & (row["visible"] >= tracker.VISIBLE) & ~row["cut"] & ~_at_edge(row, scene)
        right = _is_itself(row, scene.things[color])
        found["identity"] += [(f, bool(right[f])) for f in np.flatnonzero(clear)]
        found["identity"] += [(f, False) for f in np.flatnonzero(_missing(row, scene))]
    never = len(scene.things.keys() - film.tracks.keys())
    found["identity"] += [(f, False) for f in range(frames)] * never


def _is_itself(row, thing):
    shape, radius = thing
    with np.errstate(invalid="ignore"):
        return (row["shape"] == shape) & (np.abs(row["radius"] / radius - 1) <= SIZE)


def _at_edge(row, scene):
    """Whether the occluder or an open side hides a part of a thing, or may do so: bool [F]."""
    x, extent = row["position"][:, 0], EXTENT * np.nanmax(np.append(row["radius"], 0))
    room, at = PAN if scene.pans else 0, np.zeros(len(x), bool)
    with np.errstate(invalid="ignore"):
        if scene.bar:
            at |= (x + extent > scene.bar[0] - room) & (x - extent < scene.bar[1] + room)
        if scene.open:
            at |= (x < extent) | (x > scene.wide - extent)
    return at & row["present"]


def _missing(row, scene):
    """Whether a thing is absent and not out of sight: bool [F]. It is out of sight after an edge hid a part of it."""
    there, frames = row["present"], len(row["present"])
    at = np.flatnonzero(there)
    if not len(at):
        return np.ones(frames, bool)
    hidden = (row["cut"] & (row["visible"] < tracker.WHOLE)) | _at_edge(row, scene)
    place = np.searchsorted(at, np.arange(frames))
    before, after = at[np.maximum(place - 1, 0)], at[np.minimum(place, len(at) - 1)]
    return ~there & ~hidden[before] & ~hidden[after]


def _returns(found, row, thing, others, scene, fps):
    there, frames, x = row["present"], len(row["present"]), row["position"][:, 0]
    at_edge, itself = _at_edge(row, scene), _is_itself(row, thing)
    for gone in (f for f in range(2, frames) if not there[f] and at_edge[f - 1]):
        seen = np.flatnonzero(there[:gone] & (row["visible"][:gone] >= tracker.WHOLE))[-4:]
        if len(seen) < 2:
            continue
        steps = np.diff(x[seen]) / np.diff(seen) * fps
        speed, exit_at = np.median(np.abs(steps)), x[gone - 1]
        if scene.open and min(exit_at, scene.wide - exit_at) < EXTENT * thing[1]:
            middle, way = scene.wide / 2, 2 * scene.outside
            comes_from = np.sign(exit_at - middle)
        elif scene.bar is None:
            continue
        else:
            middle, way = sum(scene.bar) / 2, scene.bar[1] - scene.bar[0]
            comes_from = np.sign(middle - exit_at)
        expected = way / max(speed, 0.05)  # s
        due = gone + (1.3 * expected + tracker.LATE) * fps
        back = np.flatnonzero(there[gone:])
        back = gone + back[0] if len(back) else frames
        span = slice(gone - 1, min(frames, int(due) + 2, back + 2))
        meets = any((~other["present"] | _at_edge(other, scene))[span].any() for other in others)
        if back > due and (meets or due >= frames):
            continue  # it may have met another thing, out of sight, or it is not due yet
        if back > due:
            found["permanence"].append((due, False, expected))
            continue
        whole = [f for f in range(int(back), min(int(back) + 12, frames)) if there[f] and not at_edge[f]]
        if whole:
            found["permanence"].append((back, bool(np.mean(itself[whole]) >= 0.5), expected))
            if not meets and speed >= SIDEWAYS:
                found["place"].append((back, bool(np.sign(x[back] - middle) == comes_from)))


def _around(row, time, fps):
    """Where a thing may be in the moment of an impact, [2 * 5, 2]: five moments between two frames, from either side.

    None where it is not seen in the two frames before or after.
    """
    f, part = int(time * fps), np.linspace(0, 1, 5)[:, None]
    if f < 1 or f + 2 >= len(row["present"]):
        return None
    p, there = row["position"][f - 1 : f + 3], row["present"][f - 1 : f + 3]
    if not there.all():
        return None
    return np.concatenate([p[1] + part * (p[1] - p[0]), p[2] - (1 - part) * (p[3] - p[2])])


def _cause(tracks, scene, time, color, fps):
    """What is in reach of a thing when its motion changes: 'wall', 'thing' or None; 'unseen' where that is not seen."""
    at = _around(tracks[color], time, fps)
    if at is None:
        return "unseen"
    radius = _radius(tracks, scene, color)
    if _gap(at, radius, scene).min() <= REACH:
        return "wall"
    places = {other: _around(row, time, fps) for other, row in tracks.items() if other != color}
    for other, place in places.items():
        touch = radius + _radius(tracks, scene, other) + REACH
        if place is not None and np.linalg.norm(at - place, axis=1).min() <= touch:
            return "thing"
    return "unseen" if any(place is None for place in places.values()) else None


def _radius(tracks, scene, color):
    return scene.things[color][1] if color in scene.things else np.nanmedian(tracks[color]["radius"])


def _gap(at, radius, scene):
    """The room between a thing and the nearest wall, for each of its places [..., 2]; less than 0 is inside the wall.

    A camera that moves may show the wall up to PAN further away.
    """
    gaps = [at[..., 1] - radius, 1 - radius - at[..., 1]]
    gaps += [] if scene.open else [at[..., 0] - radius, scene.wide - radius - at[..., 0]]
    return np.min(gaps, 0) - (PAN if scene.pans else 0)


def _distinct(kinks, frames, fps):
    """The changes of velocity without those at the ends of a film, and without the small ones beside a large one."""

    def is_rest(time, color, size):  # a large change that is not told exactly leaves a rest
        return any(name == color and other > 2 * size and abs(when - time) * fps <= 2 for when, name, other in kinks)

    return [kink for kink in kinks if 1 <= kink[0] * fps < frames - 4 and not is_rest(*kink)]


def _motion(found, row, scene, own, all_kinks, color, fps):
    second = tracker.second_differences(row) - np.array([0, scene.gravity / fps**2])  # [F - 2, 2]
    kinks = np.array([time * fps for time, name, _ in all_kinks if name == color])
    middle = np.arange(1, len(second) + 1)
    inner = (middle > 1) & (middle < len(second) - 2)  # an impact at an end of a film is not found
    apart = np.abs(middle[:, None] - kinks).min(1, initial=np.inf) >= CLEAR
    hidden = _at_edge(row, scene)
    known = np.isfinite(second).all(1) & apart & inner & ~(hidden[:-2] | hidden[1:-1] | hidden[2:])
    size = np.linalg.norm(second, axis=1)
    found["velocity"] += [(middle[k], bool(size[k] * fps < tracker.MIN_KINK)) for k in np.flatnonzero(known)]
    found["gravity"] += [(middle[k], second[k, 1] * fps**2) for k in np.flatnonzero(known)]  # see `by_length`

    position, whole = row["position"], row["present"] & (row["visible"] >= tracker.WHOLE)
    for time, cause in own:
        low, high = math.floor(time * fps - 0.2), math.ceil(time * fps + 0.2)  # the frames around the impact
        alone = sum(abs(other - time) * fps < 3.5 for other, *_ in all_kinks) == 1
        if cause == "wall" and alone and 0 < low and high < len(whole) - 1 and whole[low - 1 : high + 2].all():
            # Gravity changes the speed from the middle of the two frames to the impact.
            fall = np.array([0, scene.gravity / fps])
            before = (position[low] - position[low - 1]) * fps + fall * (time * fps - low + 0.5)
            after = (position[high + 1] - position[high]) * fps - fall * (high + 0.5 - time * fps)
            before, after = np.linalg.norm(before), np.linalg.norm(after)
            slack = SPEED[0] * before + SPEED[1] + (2 * PAN if scene.pans else 0)  # the camera has a speed, too
            found["bounce"].append((time * fps, bool(abs(after - before) <= slack)))
    radius = np.nanmedian(row["radius"])
    for f in range(1, len(whole) - 4):
        if scene.bar and hidden[f : f + 3].any():
            continue  # what happens behind the occluder is not seen
        step = position[f] - position[f - 1]
        arrives = _gap(position[f] + step, radius, scene) < -REACH - (2 * PAN if scene.pans else 0)
        if whole[f - 1 : f + 1].all() and arrives:
            # Also a thing that is not seen well enough for an exact time has turned if it is not where it went to.
            elsewhere = np.linalg.norm(position[f + 2] - position[f] - 2 * step) > np.linalg.norm(step)
            turned = np.abs(kinks - f).min(initial=np.inf) <= 2 or (row["present"][f + 2] and elsewhere)
            found["effect"].append((f, bool(turned)))


def _sound(found, film, scene, kinks, fps, frames):
    struck, faint = (np.array([time for time, *_ in part]) for part in (kinks, film.faint))
    clear = [(row["visible"] >= tracker.WHOLE) & ~_at_edge(row, scene) for row in film.tracks.values()]
    clear = np.all(clear, axis=0) & np.ones(frames, bool)
    for time in struck:
        found["heard"].append((time * fps, np.abs(film.onsets - time).min(initial=np.inf) <= 1 / fps))
    for time in film.onsets:
        f = int(time * fps)
        if 1 <= f < frames - 2 and clear[max(0, f - 2) : f + 4].all():
            found["explained"].append((time * fps, np.abs(faint - time).min(initial=np.inf) <= 1 / fps))


# ----------------------------------------------------------------------------------------------- curves over length


def by_length(found, clip_frames, fps, lengths=LENGTHS):
    """Returns ({score: {length: (sum of values, number of values)}}, {absence: the same of permanence}) of one film.

    Length n is for the frames from n / 2 to n clips; length 1 for all of the first clip.
    """
    out = {name: {} for name in SCORES}
    for length in lengths:
        low, high = (0 if length == 1 else length * clip_frames / 2), length * clip_frames
        for name in SCORES:
            values = [value for frame, value, *_ in found[name] if low <= frame < high]
            if name == "gravity":  # one vote: single frames are too noisy
                values = [abs(np.median(values)) <= FALL] if len(values) >= 12 else []
            out[name][length] = (float(sum(values)), len(values))
    absences = {}
    for absence in ABSENCES:
        values = [
            value
            for _, value, seconds in found["permanence"]
            if ABSENCES[np.abs(np.log(np.array(ABSENCES) * clip_frames / fps / seconds)).argmin()] == absence
        ]
        absences[absence] = (float(sum(values)), len(values))
    return out, absences


def curves(films):
    """Pools what `by_length` tells of films: ({length: {score: Share or None}}, {length: {score: gate}})."""
    lengths = films[0][SCORES[0]]
    found = {n: {name: pooled([film[name][n] for film in films]) for name in SCORES} for n in lengths}
    gates = {n: {name: gate([film[name][n] for film in films]) for name in SCORES} for n in lengths}
    return found, gates


def pooled(pairs):
    """Returns the share of [(sum, number)] of films, with its interval by a bootstrap over films; None without any."""
    pairs = np.array(pairs, float)
    if not pairs[:, 1].any():
        return None

    def share(draws):
        total = draws.sum(-2)
        return total[..., 0] / np.maximum(total[..., 1], 1)

    return shares.Share.within(float(share(pairs)), *shares.bootstrap(share, pairs))


def gate(pairs):
    """Returns the share of films in which the event took place."""
    return float(np.mean([number > 0 for _, number in pairs]))


def half_life(curve, ceiling, chance):
    """The length, in clips, at which half of the distance from ceiling to chance is lost; None if it never is.

    curve, ceiling, chance: {length: share or None}. Between two lengths the loss is linear in log length.
    """
    before = None
    for length, value in curve.items():
        top, bottom = ceiling.get(length), chance.get(length)
        if value is None or top is None or bottom is None or top <= bottom:
            continue
        kept = (value - bottom) / (top - bottom)
        if kept <= 0.5:
            if before is None:
                return float(length)
            share = (before[1] - 0.5) / (before[1] - kept)
            return float(np.exp(np.log(before[0]) + share * (np.log(length) - np.log(before[0]))))
        before = (length, kept)
    return None
