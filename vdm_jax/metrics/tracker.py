"""Reads a world clip back from its pixels and its waveform, by classical vision alone.

Color: in the plane of chroma (where every grey is the origin) an object's pixel is light *
coverage * the palette's vector, so its angle names the color and its length is a soft mask.
Shape, centre and radius: least squares (Gauss-Newton) of the world's own anti-aliased shapes on
that mask; pixels that show something else (the occluder, another object, beyond the frame) have no
say. The best of the three shapes is named only if it fits well enough, so blobs, smears and ghosts
have none.
Impacts: kinks of the tracks, to a fraction of a frame. Onsets: peaks of spectral flux.

Frames larger than 64 px are averaged down to about 32 first; positions and radii are shares of the
frame, as in `World`. Times are in seconds.
"""

import math

import numpy as np
from scipy import ndimage

from vdm_jax.data.captions import COLORS, DIRECTIONS, SHAPES, direction_of
from vdm_jax.data.world import AREA, PALETTE, coverage
from vdm_jax.errors import UserError

VISIBLE = 0.75  # an object is judged where at least this share of it is in sight
MIN_AREA = 0.010  # share of the frame that makes an object
MIN_STRENGTH = 0.62  # of the palette's chroma: a half-transparent ghost has less
MIN_FIT = 0.79  # soft intersection over union of mask and best shape
MIN_BODY = 0.55  # the same, for something to be there at all rather than noise
SHARE = 0.8  # an object is right if it is so in this share of the frames in which it can be seen
MIN_FLUX = 0.08  # mean rise of log(1 + 100 magnitude) over 8 ms that is an onset
FLUX_DELAY = 0.0003  # s, from the middle of the window at the flux's peak to the onset
MIN_KINK = 0.12  # frame widths per second, the least change of velocity that is an impact

_RGB = np.array([PALETTE[c] for c in COLORS], np.float32) / 255
_CHROMA = np.array([[1, -0.5, -0.5], [0, 3**0.5 / 2, -(3**0.5) / 2]], np.float32)
_VECTORS = _RGB @ _CHROMA.T  # [colors, 2]
_LENGTHS = np.linalg.norm(_VECTORS, axis=1)
_PLANE = ndimage.generate_binary_structure(2, 1)[None]  # neighbours within a frame


def track(video):
    """Objects of every frame, linked by color. video: uint8 [F, H, W, 3].

    Returns {color: {'present' bool, 'shape' int (index into SHAPES, -1: none fits), 'position'
    [., 2], 'radius', 'visible' (share of the fitted shape in sight), 'fit', 'strength', 'hue'
    (radians), 'extra' (further objects of this color)}}, each [F]; floats are NaN where absent.
    """
    pooled = _pool(video)
    frames, height, width, _ = pooled.shape
    chroma = pooled @ _CHROMA.T
    value = pooled.max(-1)
    dots = chroma @ (_VECTORS / _LENGTHS[:, None]).T  # [F, H, W, colors]
    nearest = dots.argmax(-1)
    strength = dots / _LENGTHS  # 1: the palette's color in full light
    colored = np.take_along_axis(strength, nearest[..., None], -1)[..., 0]
    grey_bar = (colored < 0.12) & (value > 0.325) & (value < 0.55)

    out, fits = {}, []
    for c, name in enumerate(COLORS):
        mine = (nearest == c) & (colored > 0.3)
        if (mine.sum((1, 2)) < MIN_AREA * height * width).all():
            continue
        label, _ = ndimage.label(mine, np.pad(_PLANE, ((1, 1), (0, 0), (0, 0))))
        sizes = np.bincount(label.ravel())
        for f in range(frames):
            parts = np.unique(label[f])[1:] if label[f].any() else []
            parts = [k for k in parts if sizes[k] >= MIN_AREA * height * width]
            if not parts:
                continue
            main = max(parts, key=lambda k: sizes[k])
            fits.append((c, f, label[f] == main, [label[f] == k for k in parts if k != main]))
        out[name] = {
            "present": np.zeros(frames, bool),
            "shape": np.full(frames, -1),
            "position": np.full((frames, 2), np.nan),
            "extra": np.zeros(frames, int),
            **{k: np.full(frames, np.nan) for k in ("radius", "visible", "fit", "strength", "hue")},
        }
    if not fits:
        return {}
    index = np.array([(c, f) for c, f, _, _ in fits])
    body = np.stack([m for _, _, m, _ in fits])  # [N, H, W]
    power = strength[index[:, 1], :, :, index[:, 0]]
    level = np.array([np.percentile(p[m], 75) for p, m in zip(power, body)])
    power = power / level[:, None, None]
    bright, hues = value[index[:, 1]], nearest[index[:, 1]]
    foreign = (hues != index[:, :1, None]) & (colored[index[:, 1]] > 0.25)

    # Highlights lose chroma, not brightness; inside the body a pixel is covered whatever it shows.
    mask = np.clip(power, 0, 1) * (~foreign & (power > 0.12))  # less is noise
    peak = np.array([np.percentile(v[m], 60) for v, m in zip(bright, body)])[:, None, None]
    near = ndimage.binary_dilation(body, np.ones((1, 3, 3))) & (bright > 0.58) & ~foreign
    mask = np.where(near, np.maximum(mask, np.clip((bright - 0.12) / (peak - 0.12), 0, 1)), mask)
    solid = ndimage.binary_fill_holes(mask > 0.5, np.pad(_PLANE, ((1, 1), (0, 0), (0, 0))))
    inner = ndimage.binary_erosion(solid & (body | near), _PLANE, border_value=1)
    mask = np.where(inner, 1, mask).astype(np.float32)
    weight = (~foreign & ~grey_bar[index[:, 1]]) | inner

    ended = np.pad(grey_bar, ((0, 0), (1, 1), (1, 1)), constant_values=True)[index[:, 1]]
    cut = (ended[:, 1:-1, 1:-1] | ended[:, 1:-1, :-2] | ended[:, 1:-1, 2:]) | (ended[:, :-2, 1:-1] | ended[:, 2:, 1:-1])
    cut = (cut & body).any((1, 2))  # touches the occluder or the frame's edge

    shape, centre, radius, fit, seen = _fit(mask, weight.astype(np.float32), body)
    for n, (c, f, main, others) in enumerate(fits):
        row = out[COLORS[c]]
        inside = (
            (np.arange(width) + 0.5 - centre[n, 0]),
            (np.arange(height)[:, None] + 0.5 - centre[n, 1]),
        )
        shown = coverage(max(shape[n], 0), *inside, radius[n]) > 0.3
        row["extra"][f] = sum((other & shown).sum() < 0.5 * other.sum() for other in others)
        row["present"][f] = level[n] > MIN_STRENGTH and fit[n] > MIN_BODY
        mean = chroma[f][main].mean(0)
        row["hue"][f] = math.atan2(mean[1], mean[0])
        row["shape"][f] = shape[n] if fit[n] >= MIN_FIT and level[n] > MIN_STRENGTH else -1
        row["position"][f] = centre[n] / (width, height)
        row["radius"][f], row["visible"][f] = radius[n] / height, seen[n]
        row["fit"][f], row["strength"][f] = fit[n], level[n]
    for c, name in enumerate(COLORS):  # a sliver fits as a small whole: compare it with the others
        of = index[:, 0] == c
        if of.any():
            row, f, area = out[name], index[of, 1], body[of].sum((1, 2))
            whole = np.median(area[~cut[of]]) if (~cut[of]).any() else area.max()
            smaller = np.where(cut[of], area / whole, 1)
            row["visible"][f] = np.minimum(row["visible"][f], smaller)
    return out


def _pool(video):
    """float32 [F, H / k, W / k, 3] in 0..1 with k = H // 32 where H >= 64."""
    video = np.asarray(video)
    k = max(1, min(video.shape[1:3]) // 32)
    frames, height, width = video.shape[0], video.shape[1] // k, video.shape[2] // k
    cut = video[:, : height * k, : width * k].reshape(frames, height, k, width, k, 3)
    return (cut.mean((2, 4)) if k > 1 else cut[:, :, 0, :, 0]).astype(np.float32) / 255


def _fit(mask, weight, body, steps=8):
    """Fits each shape to each soft mask [N, H, W]; returns the best: shape, centre [N, 2] and
    radius in pixels, soft intersection over union, share of the shape in sight; all [N]."""
    count, height, width = mask.shape
    rows, columns = body.any(2), body.any(1)
    low = np.stack([columns.argmax(1), rows.argmax(1)], -1)
    high = np.stack([width - columns[:, ::-1].argmax(1), height - rows[:, ::-1].argmax(1)], -1)
    side = int(min((high - low).max(), 0.62 * height)) + 8
    origin = (low + high) // 2 - side // 2  # [N, 2]; the patch may reach past the frame
    pad = side
    grid = origin[:, :, None] + np.arange(side)  # [N, 2, side]
    where = (np.arange(count)[:, None, None], grid[:, 1, :, None] + pad, grid[:, 0, None, :] + pad)
    widths = ((0, 0), (pad, pad), (pad, pad))
    mask, weight = np.pad(mask, widths)[where], np.pad(weight, widths)[where]

    x, y = grid[:, 0] - origin[:, :1] + 0.5, grid[:, 1] - origin[:, 1:] + 0.5  # [N, side]
    x, y = x[:, None, :].astype(np.float32), y[:, :, None].astype(np.float32)
    total = np.maximum(mask.sum((1, 2)), 1e-6)
    middle = np.stack([(mask * x).sum((1, 2)), (mask * y).sum((1, 2))], -1) / total[:, None]
    results = []
    for shape in range(len(SHAPES)):

        def draw(p, shape=shape):
            at = p[:, :, None, None]
            return coverage(shape, x - at[:, 0], y - at[:, 1], at[:, 2])

        radius = np.sqrt(total / AREA[shape])
        start = np.stack([middle[:, 0], middle[:, 1] - 0.25 * radius * (shape == 2), radius], -1)
        p = best = start.astype(np.float32)
        best_error = np.full(count, np.inf, np.float32)
        for step in range(steps + 1):
            drawn = draw(p)
            rest = weight * (mask - drawn)
            error = (rest * rest).sum((1, 2))
            better = error < best_error
            best = np.where(better[:, None], p, best)
            best_error = np.where(better, error, best_error)
            if step == steps:
                break
            slope = np.stack(
                [weight * (draw(p + d) - draw(p - d)) / 0.6 for d in 0.3 * np.eye(3, dtype=np.float32)],
                1,
            ).reshape(count, 3, -1)
            normal = slope @ slope.transpose(0, 2, 1) + 0.5 * np.eye(3)
            move = np.linalg.solve(normal, slope @ rest.reshape(count, -1, 1))[..., 0]
            p = p + np.clip(move, -1, 1).astype(np.float32)
            p[:, 2] = np.clip(p[:, 2], 1, 0.3 * height)
        drawn = draw(best)
        overlap = (weight * np.minimum(drawn, mask)).sum((1, 2))
        union = (weight * np.maximum(drawn, mask)).sum((1, 2))
        fit = overlap / np.maximum(union, 1e-6)
        seen = (weight * drawn).sum((1, 2)) / (AREA[shape] * best[:, 2] ** 2)
        results.append((best_error, best, fit, np.minimum(seen, 1)))
    errors, params, fits, seens = (np.stack(r) for r in zip(*results))
    shape = errors.argmin(0)
    n = np.arange(count)
    return (
        shape,
        params[shape, n, :2] + origin,
        params[shape, n, 2],
        fits[shape, n],
        seens[shape, n],
    )


def impacts(tracks, fps):
    """Visible changes of velocity: sorted [(time in s, color, change in frame widths per second)].

    Second differences of a track are zero but for gravity and for impacts: one between frames f and
    f + 1 changes the velocity by d = (d2[f] + d2[f + 1]) * fps, and how it is shared between the
    two says when. The largest is taken out first, until what is left is no more than noise.
    """
    second = {}
    for name, row in tracks.items():
        usable = row["present"] & (row["visible"] >= VISIBLE)
        position = np.where(usable[:, None], row["position"], np.nan)
        if len(position) > 3:
            second[name] = position[2:] - 2 * position[1:-1] + position[:-2]  # d2[k]: frame k + 1
    known = np.concatenate([d[~np.isnan(d[:, 0])] for d in second.values()] or [np.zeros((0, 2))])
    if not len(known):
        return []
    fall = np.array([0, np.clip(np.median(known[:, 1]), 0, 1 / fps**2)])
    found = []
    for name, d2 in second.items():
        d2 = d2 - fall
        noise = 1.48 * np.nanmedian(np.abs(d2)) if not np.isnan(d2).all() else 0
        least = max(MIN_KINK / fps, 5 * noise)
        for _ in range(len(d2)):
            kink = d2[:-1] + d2[1:]
            size = np.nan_to_num(np.linalg.norm(kink, axis=1))
            k = int(size.argmax())
            if size[k] < least:
                break
            share = float(np.clip(d2[k + 1] @ kink[k] / size[k] ** 2, 0, 1))
            found.append(((k + 1 + share) / fps, name, float(size[k] * fps)))
            d2[k] -= (1 - share) * kink[k]
            d2[k + 1] -= share * kink[k]
    return sorted(found)


def onsets(audio, sample_rate):
    """Times (s) of sharp rises: peaks of the spectral flux of a 16 ms STFT at a hop of 2 ms.

    The flux is taken over 8 ms, of log magnitudes, against the largest of three neighbouring bins
    before (as in SuperFlux, Boeck and Widmer 2013), so that ringing and beating do not count.
    Nothing is said of the first and last 10 ms, where a sound cannot be told from its cut.
    """
    hop = max(1, round(0.002 * sample_rate))
    size, lag = 8 * hop, 4
    if len(audio) < size + (lag + 1) * hop:
        return np.zeros(0)
    view = np.lib.stride_tricks.sliding_window_view(np.asarray(audio, np.float32), size)[::hop]
    spectrum = np.abs(np.fft.rfft(view * np.hanning(size))) * (4 / size)  # 1: a full-scale tone
    level = np.log1p(100 * spectrum)
    before = ndimage.maximum_filter1d(level[:-lag], 3, axis=1)
    flux = np.maximum(level[lag:] - before, 0).mean(1)
    smooth = ndimage.uniform_filter1d(flux, 3)
    usual = ndimage.median_filter(smooth, 51)  # over 0.1 s
    peak = (smooth == ndimage.maximum_filter1d(smooth, 11)) & (smooth > MIN_FLUX + 1.2 * usual)
    times = (np.flatnonzero(peak) + lag + 4) * hop / sample_rate + FLUX_DELAY  # middle of window
    return times[np.diff(times, prepend=-1) > 0.012]


def measure(video, audio, fps, sample_rate, objects):
    """One clip against what was asked of it.

    video: uint8 [F, H, W, 3]; audio: [N] in [-1, 1]; objects: [{'color', 'shape', 'direction'}] by
    name. Returns {'objects': [per asked object {'present_share', 'shape_right_share', 'right',
    'direction_right', 'size_drift', 'color_drift'}], 'right': all objects right, 'count_right',
    'sync_impacts': (impacts with an onset within one frame, impacts), 'sync_onsets': (onsets with
    an impact within one frame, onsets)}. A drift is None where too little is seen. Frames in which
    an object is mostly out of sight, or gone after it was partly so, are not held against its
    shape; onsets are judged only where all tracked objects are in full sight, a frame from either
    end (two from the last).
    """
    tracks, frames = track(video), len(video)
    kinks, heard = impacts(tracks, fps), onsets(audio, sample_rate)
    judged = [_judge(tracks.get(ask["color"]), ask, kinks, fps, frames) for ask in objects]

    lasting = [row for row in tracks.values() if row["present"].mean() >= 0.25]
    more = sum((row["extra"] > 0).mean() >= 0.25 for row in lasting)
    clear = np.all([row["visible"] >= VISIBLE for row in lasting], axis=0) & np.ones(frames, bool)
    struck = np.array([t for t, *_ in kinks])
    near = lambda t, times: len(times) and np.abs(times - t).min() <= 1 / fps  # noqa: E731
    asked = [t for t in heard if 1 <= t * fps < frames - 2 and clear[int(t * fps) - 1 : int(t * fps) + 3].all()]
    return {
        "objects": judged,
        "right": all(j["right"] for j in judged),
        "count_right": len(lasting) + more == len(objects),
        "sync_impacts": (sum(bool(near(t, heard)) for t in struck), len(struck)),
        "sync_onsets": (sum(bool(near(t, struck)) for t in asked), len(asked)),
    }


def _judge(row, ask, kinks, fps, frames):
    """The part of `measure` that concerns one asked object; row: its color's track, if any."""
    for key, known in (("color", COLORS), ("shape", SHAPES), ("direction", DIRECTIONS)):
        if ask[key] not in known:
            raise UserError(f"tracker: {key} {ask[key]!r} unknown; one of {', '.join(known)}")
    out = {"present_share": 0.0, "shape_right_share": 0.0, "right": False, "direction_right": False}
    out |= {"size_drift": None, "color_drift": None}
    if row is None or not row["present"].any():
        return out
    there = row["present"]
    clear = there & (row["visible"] >= VISIBLE)
    at = np.flatnonzero(there)
    before = at[np.maximum(np.searchsorted(at, np.arange(frames)) - 1, 0)]
    after = at[np.minimum(np.searchsorted(at, np.arange(frames)), len(at) - 1)]
    excused = ~there & (np.minimum(row["visible"][before], row["visible"][after]) < 0.9)
    counted = max((clear | (~there & ~excused)).sum(), frames / 5)
    good = clear & (row["shape"] == SHAPES.index(ask["shape"]))
    out["present_share"] = float(there.mean())
    out["shape_right_share"] = float(good.sum() / counted)
    out["right"] = bool(out["shape_right_share"] >= SHARE)

    hit = min([t for t, name, _ in kinks if name == ask["color"]], default=math.inf)
    first = at[(at < at[0] + 4) & (at / fps <= hit)]
    if clear[first].sum() > 1:
        first = first[clear[first]]
    if len(first) > 1 and first[0] < frames / 2:
        move = row["position"][first[-1]] - row["position"][first[0]]
        moved = np.abs(move).max() > 0.02
        out["direction_right"] = bool(moved and direction_of(move) == ask["direction"])

    early, late = (part[clear[part]] for part in (np.arange(frames // 3), np.arange(frames - frames // 3, frames)))
    if len(early) and len(late):
        small, large = sorted(np.median(row["radius"][part]) for part in (early, late))
        turn = np.angle(np.exp(1j * row["hue"][late]).mean() / np.exp(1j * row["hue"][early]).mean())
        whole = np.median(row["radius"][clear])
        out["size_drift"] = float(min(1, (large - small) / whole))
        out["color_drift"] = float(min(1, abs(turn) / (math.pi / 3)))  # 1: the next color's hue
    return out


def summarise(measures):
    """Pools `measure`s: {'one_object', 'two_objects' (color and shape right), 'direction',
    'count', 'permanence', 'size_drift', 'color_drift', 'sync_impacts', 'sync_onsets'}, shares in
    0..1, None where there was nothing to count."""
    mean = lambda values: float(np.mean(values)) if len(values) else None  # noqa: E731
    each = [j for m in measures for j in m["objects"]]
    known = lambda key: [j[key] for j in each if j[key] is not None]  # noqa: E731
    out = {
        "one_object": mean([m["right"] for m in measures if len(m["objects"]) == 1]),
        "two_objects": mean([m["right"] for m in measures if len(m["objects"]) == 2]),
        "direction": mean(known("direction_right")),
        "count": mean([m["count_right"] for m in measures]),
        "permanence": mean(known("present_share")),
        "size_drift": mean(known("size_drift")),
        "color_drift": mean(known("color_drift")),
    }
    for key in ("sync_impacts", "sync_onsets"):
        hits, total = np.sum([m[key] for m in measures], axis=0) if measures else (0, 0)
        out[key] = float(hits / total) if total else None
    return out
