"""Reads a clip of the procedural world back from its pixels and its waveform, by classical vision alone.

Color: in the plane of chroma, where every gray is the origin, an object's pixel is light * coverage * the vector of
its paint. The angle therefore names the color, and the length is a soft mask.
Shape, center and radius: the world's own anti-aliased shapes are fitted to that mask by least squares (Gauss-Newton).
The best shape is named only if it fits well enough, so a blob, a smear or a ghost has no shape.
Impacts are kinks of the tracks, found to a fraction of a frame. Onsets are peaks of the spectral flux.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from vdm_jax.data.captions import COLORS, DIRECTIONS, SHAPES, direction_of
from vdm_jax.data.world import AREA, OUTSIDE, PALETTE, coverage
from vdm_jax.errors import one_of
from vdm_jax.metrics import shares

VISIBLE = 0.75  # an object is judged where at least this share of it is in sight
WHOLE = 0.9  # an impact is looked for where at least this share of the object is in sight
MIN_AREA = 0.010  # share of the frame that the smallest object covers
MIN_STRENGTH = 0.62  # of the paint's chroma: a half-transparent ghost has less
MIN_FIT = 0.79  # soft intersection over union of mask and best shape: less has no shape
MIN_BODY = 0.55  # the same, and less is noise and no object
SHARE = 0.8  # an object is right if its shape is right in this share of the frames in which it can be seen
MIN_FLUX = 0.08  # mean rise of log(1 + 100 magnitude) over 8 ms: less is no onset
FLUX_DELAY = 0.0003  # s from the middle of the window at the flux's peak to the onset
MIN_KINK = 0.12  # frame heights per second: a smaller change of velocity is no impact
FAINT_KINK = 0.06  # but so small a change may explain an onset
STEPS = 8  # of Gauss-Newton
LATE = 0.3  # s, by which an object may come back late
ABSENT = {"present": False, "shape": -1, "cut": False, "extra": 0}  # where an object is absent; a float is NaN

_CHROMA = np.array([[1, -0.5, -0.5], [0, 3**0.5 / 2, -(3**0.5) / 2]], np.float32)
_VECTORS = (np.array([PALETTE[c] for c in COLORS], np.float32) / 255) @ _CHROMA.T  # [colors, 2]
_LENGTHS = np.linalg.norm(_VECTORS, axis=1)
_PLANE = ndimage.generate_binary_structure(2, 1)[None]  # the four neighbors within a frame
_WITHIN_FRAMES = np.pad(_PLANE, ((1, 1), (0, 0), (0, 0)))  # the same, for an array of frames


def track(video):
    """Returns the objects of every frame, linked by their color: {color: track}, each track with F frames.

      present   bool [F]
      shape     int [F], index into SHAPES, or -1 where no shape fits
      position  float [F, 2], of the center, in frame heights
      radius    float [F], in frame heights
      visible   float [F], share of the fitted shape that is in sight, in 0..1
      cut       bool [F], whether it touches an occluder or the edge of the frame
      hue       float [F], in radians
      extra     int [F], number of further objects of this color

    A float is NaN where the object is absent. video: uint8 [F, H, W, 3]
    """
    pixels = _read(video)
    color, frame, body, others = _find_blobs(pixels)
    if not len(color):
        return {}
    mask, weight, cut, strength = _masks(pixels, color, frame, body)
    shape, center, radius, fit, seen = _fit(mask, weight, body)

    frames, height, width = pixels.value.shape
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    extra = []
    for n, regions in enumerate(others):
        covered = coverage(shape[n], x - center[n, 0], y - center[n, 1], radius[n]) > 0.3
        extra.append(sum((region & covered).sum() < 0.5 * region.sum() for region in regions))
    # A sliver of an object fits as a small whole one. Its area and radius are therefore compared with other frames.
    area, visible = body.sum((1, 2)), seen.astype(np.float64)
    for c in np.unique(color):
        whole, sliver = (color == c) & ~cut, (color == c) & cut
        for size in (area, radius**2):
            largest = np.median(size[whole]) if whole.any() else size[sliver].max()
            visible[sliver] = np.minimum(visible[sliver], size[sliver] / largest)
    strong = strength > MIN_STRENGTH
    chroma = [pixels.chroma[f][b].mean(0) for f, b in zip(frame, body)]
    found = {
        "present": strong & (fit > MIN_BODY),
        "shape": np.where(strong & (fit >= MIN_FIT), shape, -1),
        "position": center / height,
        "radius": radius / height,
        "visible": visible,
        "cut": cut,
        "hue": np.array([math.atan2(v, u) for u, v in chroma]),
        "extra": np.array(extra),
    }

    def in_frames(key, own):
        values = np.full((frames, *found[key].shape[1:]), ABSENT.get(key, np.nan))
        values[frame[own]] = found[key][own]
        return values

    return {COLORS[c]: {key: in_frames(key, color == c) for key in found} for c in np.unique(color)}


class _Pixels(NamedTuple):
    """What each pixel shows. All arrays begin with [F, H, W]."""

    value: np.ndarray  # the largest of R, G, B, in 0..1
    chroma: np.ndarray  # [..., 2]; every gray is at 0
    nearest: np.ndarray  # index of the color that is nearest by its angle
    strength: np.ndarray  # [..., colors]: along each color's vector; 1 is the paint in full light
    colored: np.ndarray  # the strength along the nearest color
    occluder: np.ndarray  # bool: gray of the occluder's brightness


def _read(video):
    """Returns the _Pixels of a video, averaged over k x k pixels, k = min(H, W) // 32."""
    k = max(1, min(video.shape[1:3]) // 32)
    frames, height, width = video.shape[0], video.shape[1] // k, video.shape[2] // k
    cells = video[:, : height * k, : width * k].reshape(frames, height, k, width, k, 3)
    pooled = cells.mean((2, 4)).astype(np.float32) / 255
    chroma = pooled @ _CHROMA.T
    value = pooled.max(-1)
    dots = chroma @ (_VECTORS / _LENGTHS[:, None]).T  # [F, H, W, colors]
    nearest = dots.argmax(-1)
    strength = dots / _LENGTHS
    colored = np.take_along_axis(strength, nearest[..., None], -1)[..., 0]
    occluder = (colored < 0.12) & (value > 0.325) & (value < 0.55)
    return _Pixels(value, chroma, nearest, strength, colored, occluder)


def _find_blobs(pixels):
    """Returns the largest region of each color in each frame, and the others: color, frame, body [N, H, W], others."""
    frames, height, width = pixels.value.shape
    color, frame, body, others = [], [], [], []
    for c in range(len(COLORS)):
        label, _ = ndimage.label((pixels.nearest == c) & (pixels.colored > 0.3), _WITHIN_FRAMES)
        sizes = np.bincount(label.ravel())
        for f in range(frames):
            regions = [k for k in np.unique(label[f]) if k and sizes[k] >= MIN_AREA * height * width]
            if regions:
                regions.sort(key=lambda k: -sizes[k])
                color.append(c)
                frame.append(f)
                body.append(label[f] == regions[0])
                others.append([label[f] == k for k in regions[1:]])
    return np.array(color), np.array(frame), np.array(body), others


def _masks(pixels, color, frame, body):
    """Returns how much of each pixel a blob covers, the pixels' weights, if the blob is cut off, and its strength."""
    power = pixels.strength[frame, :, :, color]  # [N, H, W]
    strength = np.array([np.percentile(p[m], 75) for p, m in zip(power, body)])
    power = power / strength[:, None, None]
    bright = pixels.value[frame]
    foreign = (pixels.nearest[frame] != color[:, None, None]) & (pixels.colored[frame] > 0.25)

    # A highlight loses chroma, but not brightness. Inside the body a pixel is covered, whatever it shows.
    mask = np.clip(power, 0, 1) * (~foreign & (power > 0.12))  # a smaller power is noise
    peak = np.array([np.percentile(v[m], 60) for v, m in zip(bright, body)])[:, None, None]
    near = ndimage.binary_dilation(body, np.ones((1, 3, 3))) & (bright > 0.58) & ~foreign
    mask = np.where(near, np.maximum(mask, np.clip((bright - 0.12) / (peak - 0.12), 0, 1)), mask)
    solid = ndimage.binary_fill_holes(mask > 0.5, _WITHIN_FRAMES)
    inner = ndimage.binary_erosion(solid & (body | near), _PLANE, border_value=1)
    mask = np.where(inner, 1, mask).astype(np.float32)
    weight = (~foreign & ~pixels.occluder[frame]) | inner
    # The outside is like an occluder. A pixel on the edge of an occluder shows a mixture, and is neither.
    edge = ndimage.binary_dilation(np.zeros_like(pixels.occluder), _PLANE, border_value=1)
    beside = (ndimage.binary_dilation(pixels.occluder, _PLANE, iterations=2) | edge)[frame]
    return mask, weight.astype(np.float32), (beside & body).any((1, 2)), strength


def _fit(mask, weight, body):
    """Returns the shape that fits each mask best, its center and radius in pixels, its fit and its share in sight."""
    height = mask.shape[1]
    boxes = [ndimage.find_objects(b)[0] for b in body.astype(int)]
    low = np.array([(x.start, y.start) for y, x in boxes])
    high = np.array([(x.stop, y.stop) for y, x in boxes])
    side = int(min((high - low).max(), 0.62 * height)) + 8
    origin = (low + high) // 2 - side // 2  # [N, 2]; the patch may go past the edge of the frame

    def patches(images):
        padded = np.pad(images, ((0, 0), (side, side), (side, side)))
        return np.stack([image[y : y + side, x : x + side] for image, (x, y) in zip(padded, origin + side)])

    mask, weight = patches(mask), patches(weight)
    results = [_fit_shape(shape, mask, weight, 0.3 * height) for shape in range(len(SHAPES))]
    errors, params, fits, seens = map(np.stack, zip(*results))
    shape, n = errors.argmin(0), np.arange(len(mask))
    return shape, params[shape, n, :2] + origin, params[shape, n, 2], fits[shape, n], seens[shape, n]


def _fit_shape(shape, mask, weight, max_radius):
    """Returns (error [N], (x, y, radius) [N, 3], fit [N], share in sight [N]) of a shape, fitted to N patches."""
    count, side, _ = mask.shape
    x = np.arange(side, dtype=np.float32) + np.float32(0.5)
    y = x[:, None]

    def draw(p):
        at = p[:, :, None, None]
        return coverage(shape, x - at[:, 0], y - at[:, 1], at[:, 2])

    total = np.maximum(mask.sum((1, 2)), 1e-6)
    middle = np.stack([(mask * x).sum((1, 2)), (mask * y).sum((1, 2))], -1) / total[:, None]
    radius = np.sqrt(total / AREA[shape])
    start = np.stack([middle[:, 0], middle[:, 1] - 0.25 * radius * (shape == 2), radius], -1)
    p = best = start.astype(np.float32)
    best_error = np.full(count, np.inf, np.float32)
    for step in range(STEPS + 1):
        rest = weight * (mask - draw(p))
        error = (rest * rest).sum((1, 2))
        best = np.where((error < best_error)[:, None], p, best)
        best_error = np.minimum(error, best_error)
        if step < STEPS:
            shifts = 0.3 * np.eye(3, dtype=np.float32)
            slope = np.stack([weight * (draw(p + d) - draw(p - d)) / 0.6 for d in shifts], 1).reshape(count, 3, -1)
            normal = slope @ slope.transpose(0, 2, 1) + 0.5 * np.eye(3)
            move = np.linalg.solve(normal, slope @ rest.reshape(count, -1, 1))[..., 0]
            p = p + np.clip(move, -1, 1).astype(np.float32)
            p[:, 2] = np.clip(p[:, 2], 1, max_radius)
    drawn = draw(best)  # the fit is the soft intersection over union of this and the mask
    overlap = (weight * np.minimum(drawn, mask)).sum((1, 2))
    union = (weight * np.maximum(drawn, mask)).sum((1, 2))
    seen = (weight * drawn).sum((1, 2)) / (AREA[shape] * best[:, 2] ** 2)
    return best_error, best, overlap / np.maximum(union, 1e-6), np.minimum(seen, 1)


def second_differences(row):
    """Returns the second differences of a track's positions, float [F - 2, 2] in frame heights, NaN if out of sight."""
    usable = row["present"] & (row["visible"] >= WHOLE)
    position = np.where(usable[:, None], row["position"], np.nan)
    return position[2:] - 2 * position[1:-1] + position[:-2]


def impacts(tracks, fps, least=MIN_KINK):
    """Returns the visible changes of velocity: sorted [(time in s, color, change in frame heights per second)].

    The second differences of a track are zero, except for gravity and for impacts. An impact between frames f and f + 1
    changes the velocity by d = (d2[f] + d2[f + 1]) * fps, and the shares of d2[f] and d2[f + 1] in it tell the time.
    The largest change is taken out first, until the rest is no more than noise.

    least: change that counts, in frame heights per second
    """
    second = {name: second_differences(row) for name, row in tracks.items()}
    second = {name: d2 for name, d2 in second.items() if len(d2) > 1 and np.isfinite(d2).any()}
    if not second:
        return []
    fall = np.array([0, np.clip(np.nanmedian(np.concatenate([*second.values()])[:, 1]), 0, 1 / fps**2)])
    found = []
    for name, d2 in second.items():
        d2 = d2 - fall
        smallest = max(least / fps, 5 * (1.48 * np.nanmedian(np.abs(d2))))
        for _ in range(len(d2)):
            kink = d2[:-1] + d2[1:]
            size = np.nan_to_num(np.linalg.norm(kink, axis=1))
            k = int(size.argmax())
            if size[k] < smallest:
                break
            share = float(np.clip(d2[k + 1] @ kink[k] / size[k] ** 2, 0, 1))
            found.append(((k + 1 + share) / fps, name, float(size[k] * fps)))
            d2[k] -= (1 - share) * kink[k]
            d2[k + 1] -= share * kink[k]
    return sorted(found)


def onsets(audio, sample_rate):
    """Returns the times (s) of sharp rises in a sound, float [N] in [-1, 1]: peaks of the spectral flux.

    The flux is the mean rise of the log magnitudes of a 16 ms STFT over 8 ms, at a hop of 2 ms. Each bin is compared
    with the largest of three neighboring bins before, so that ringing and beating do not count (SuperFlux, Boeck and
    Widmer 2013). The first and last 10 ms have no onsets, because the cut of a sound is a sharp rise itself.
    """
    hop = max(1, round(0.002 * sample_rate))
    size, lag = 8 * hop, 4
    if len(audio) < size + (lag + 1) * hop:
        return np.zeros(0)
    view = np.lib.stride_tricks.sliding_window_view(np.asarray(audio, np.float32), size)[::hop]
    spectrum = np.abs(np.fft.rfft(view * np.hanning(size))) * (4 / size)  # 1: a full-scale tone
    level = np.log1p(100 * spectrum)
    flux = np.maximum(level[lag:] - ndimage.maximum_filter1d(level[:-lag], 3, axis=1), 0).mean(1)
    smooth = ndimage.uniform_filter1d(flux, 3)
    usual = ndimage.median_filter(smooth, 51)  # over 0.1 s
    peak = (smooth == ndimage.maximum_filter1d(smooth, 11)) & (smooth > MIN_FLUX + 1.2 * usual)
    times = (np.flatnonzero(peak) + lag + 4) * hop / sample_rate + FLUX_DELAY  # middle of window
    return times[np.diff(times, prepend=-1) > 0.012]


def measure(video, audio, fps, sample_rate, objects):
    """Compares a clip, uint8 [F, H, W, 3] and float [N], with the objects that its prompt asks for. Returns a dict:

      objects       [{'present_share', 'shape_right_share', 'right', 'direction_right', 'size_drift', 'color_drift',
                    'returns'}], one dict for each object that is asked for. A drift is None where too little of the
                    object is seen, and 'returns' where the object does not go out of sight early enough to come back
      right         bool, whether all of these objects are right
      count_right   bool, whether the number of objects is right
      empty         bool, whether no object is seen for a quarter of the clip
      sync_impacts  (visible impacts with an onset within one frame, visible impacts)
      sync_onsets   (onsets with a visible impact within one frame, which may be faint; onsets)

    Some frames do not count against an object's presence and shape: frames in which most of the object is out of sight,
    and frames in which it is absent next to a frame in which an occluder or the edge hides a part of it. An onset
    counts only where all objects are in full sight, and not in the first frame or the last two.

    objects: [{'color', 'shape', 'direction'}], words of captions.py; UserError for another word
    """
    tracks, frames = track(video), len(video)
    kinks, heard = impacts(tracks, fps), onsets(audio, sample_rate)
    judged = [_judge(tracks, ask, kinks, fps) for ask in objects]

    lasting = [row for row in tracks.values() if row["present"].mean() >= 0.25]
    more = sum((row["extra"] > 0).mean() >= 0.25 for row in lasting)
    clear = np.all([row["visible"] >= WHOLE for row in lasting], axis=0) & np.ones(frames, bool)
    struck, grazed = (np.array([t for t, *_ in found]) for found in (kinks, impacts(tracks, fps, FAINT_KINK)))
    counted = [t for t in heard if 1 <= t * fps < frames - 2 and clear[int(t * fps) - 1 : int(t * fps) + 3].all()]

    def partners(times, others):
        return sum(bool(np.abs(others - t).min(initial=np.inf) <= 1 / fps) for t in times)

    return {
        "objects": judged,
        "right": all(j["right"] for j in judged),
        "count_right": len(lasting) + more == len(objects),
        "empty": not lasting,
        "sync_impacts": (partners(struck, heard), len(struck)),
        "sync_onsets": (partners(counted, grazed), len(counted)),
    }


def _judge(tracks, ask, kinks, fps):
    """Returns what `measure` says of one object. ask: the object's words."""
    for key, known in (("color", COLORS), ("shape", SHAPES), ("direction", DIRECTIONS)):
        one_of(key, ask[key], known)
    out = dict(present_share=0.0, shape_right_share=0.0, right=False, direction_right=False)
    out |= dict(size_drift=None, color_drift=None, returns=None)
    row = tracks.get(ask["color"])
    if row is None or not row["present"].any():
        return out
    there, visible, frames = row["present"], row["visible"], len(row["present"])
    clear = there & (visible >= VISIBLE)
    at = np.flatnonzero(there)
    place = np.searchsorted(at, np.arange(frames))
    before, after = at[np.maximum(place - 1, 0)], at[np.minimum(place, len(at) - 1)]
    hidden = row["cut"] & (visible < WHOLE)
    missing = ~there & ~hidden[before] & ~hidden[after]  # and not out of sight
    good = there & (row["shape"] == SHAPES.index(ask["shape"]))
    judged = (clear | missing).sum()
    few = max(0, frames / 5 - judged)  # so many frames in which a part of it is in sight count, too
    out["present_share"] = float(there.sum() / (there | missing).sum())
    right = (good & clear).sum() + min(few, (good & ~clear).sum())
    out["shape_right_share"] = float(right / (judged + few))
    out["returns"] = _returns(row, [other for color, other in tracks.items() if color != ask["color"]], fps)
    out["right"] = bool(out["shape_right_share"] >= SHARE)

    hit = min([t for t, name, _ in kinks if name == ask["color"]], default=math.inf)
    first = at[(at < at[0] + 4) & (at / fps <= hit)]
    if clear[first].sum() > 1:
        first = first[clear[first]]
    if len(first) > 1 and first[0] < frames / 2:
        move = row["position"][first[-1]] - row["position"][first[0]]
        moved = np.abs(move).max() > 0.02
        out["direction_right"] = bool(moved and direction_of(move) == ask["direction"])

    seen = np.flatnonzero(clear)
    early, late = seen[seen < frames // 3], seen[seen >= frames - frames // 3]
    if len(early) and len(late):
        small, large = sorted(np.median(row["radius"][part]) for part in (early, late))
        turn = np.angle(np.exp(1j * row["hue"][late]).mean() / np.exp(1j * row["hue"][early]).mean())
        out["size_drift"] = float(min(1, (large - small) / np.median(row["radius"][clear])))
        out["color_drift"] = float(min(1, abs(turn) / (math.pi / 3)))  # 1: the next color's hue
    return out


def _returns(row, others, fps):
    """Returns whether an object that goes out of sight comes back in its old shape; None where it need not yet.

    It needs at most the time to go OUTSIDE past the edge and back, at the sideways speed that it had before, and LATE
    more. That is longer than the way behind an occluder. If another object is out of sight, too, they may meet there.
    """
    there, visible, frames = row["present"], row["visible"], len(row["present"])
    partly = there & row["cut"] & (visible < VISIBLE)
    gone = [f for f in range(2, frames) if not there[f] and partly[f - 1]]
    if not gone:
        return None
    seen = np.flatnonzero(there[: gone[0]])
    steps = np.abs(np.diff(row["position"][seen, 0])) / np.diff(seen)  # sideways, in frame heights a frame
    speed = np.median(steps[-4:]) * fps if len(steps) else 0.0
    late = gone[0] + (2 * OUTSIDE / max(speed, 1e-3) + LATE) * fps
    back = np.flatnonzero(there[gone[0] :]) + gone[0]
    if (row["shape"][back] == row["shape"][seen[0]]).any():
        return True
    meets = any(not other["present"][gone[0] :].all() for other in others)
    return False if late < frames and not meets else None


def counts(measures):
    """Returns what `summarize` pools: {name: [(sum of values in 0..1, number of values) for each result]}."""

    def of_objects(key):
        found = [[judged[key] for judged in m["objects"] if judged[key] is not None] for m in measures]
        return [(sum(values), len(values)) for values in found]

    def of_clips(key, objects=None):
        return [(m[key], 1) if objects in (None, len(m["objects"])) else (0, 0) for m in measures]

    return {
        "one_object": of_clips("right", objects=1),
        "two_objects": of_clips("right", objects=2),
        "direction": of_objects("direction_right"),
        "count": of_clips("count_right"),
        "empty": of_clips("empty"),
        "permanence": of_objects("present_share"),
        "returns": of_objects("returns"),
        "size_drift": of_objects("size_drift"),
        "color_drift": of_objects("color_drift"),
        "sync_impacts": [m["sync_impacts"] for m in measures],
        "sync_onsets": [m["sync_onsets"] for m in measures],
    }


def summarize(measures):
    """Returns the means of many results of `measure`, one per clip: {name: Share}, or None where nothing counts."""
    return {name: shares.pooled(pairs) for name, pairs in counts(measures).items()}
