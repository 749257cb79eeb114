"""A procedural world of moving shapes with sound and exact state: an endless source of clips.

Colored shapes move in a box. They bounce off its walls and off each other, and every impact sounds. Episode i of a
seed is one infinite film: `World(seed)[i]` is its beginning, and `World(seed).window(i, start_frame, frames)` is any
part of it. Motion is simulated from event to event in closed form. (All objects share one acceleration, so their
relative motion is linear.) Positions and impact times are therefore exact and do not depend on the frame rate.

Units: the frame is 1 x 1, x to the right and y down. A position times the frame's size is in pixels, where pixel j
covers [j, j + 1). Times are in seconds. Frame k of a window shows time k / fps, and the sound of
[k / fps, (k + 1) / fps) belongs to it.
"""

import math
from typing import NamedTuple

import numpy as np

from vdm_jax.data.captions import COLORS, MATERIALS, SHAPES, caption
from vdm_jax.errors import UserError

PALETTE = {  # name -> RGB; the hues are about 60 degrees apart
    "red": (230, 36, 36),
    "green": (36, 200, 52),
    "blue": (44, 72, 240),
    "yellow": (236, 214, 36),
    "magenta": (226, 44, 214),
    "cyan": (36, 206, 222),
}

# Extents of the drawn shapes, in radii of the collider.
SQUARE = 0.87  # half a side of the square
APEX = 1.15  # from the center up to the triangle's apex
BASE = 0.95  # from the center down to the triangle's base
HALF_BASE = 1.25  # half the triangle's base
AREA = (math.pi, 4 * SQUARE**2, HALF_BASE * (APEX + BASE))  # drawn area / radius^2, by shape

# Brightness, in 0..1.
BACKGROUND = 0.12
WALL = 0.26
OCCLUDER = 0.45

# Lengths, in frame widths.
EDGE = 0.016  # width of the drawn wall inside the frame
OUTSIDE = 0.34  # centers go this far past the frame where the side walls are open

FREE = 0.45  # s without any impact at the beginning of an episode, so that each direction can be seen
TONE_SECONDS = 0.15  # the longest tone
TONES = {  # material -> (seconds of decay, ((frequency ratio, share), ...))
    "rubber": (0.013, ((0.7, 0.75), (1.4, 0.25))),
    "metal": (0.036, ((1.0, 0.55), (1.53, 0.25), (2.21, 0.2))),
}


class Event(NamedTuple):
    """An impact, or the turn of an object that has left the frame through an open side."""

    time: float  # s from the start of the episode
    kind: str  # 'wall', 'object' or 'turn'
    objects: tuple  # index of the object; of two objects, the faster one first
    speed: float  # of the impact, in frame widths per second
    contact: tuple  # (x, y) in world coordinates


class World:
    """An endless source of clips. Clip i follows from (seed, i) and the settings alone.

    `world[i]` is {'video': uint8 [F, H, W, 3], 'audio': float32 [F * sample_rate // fps], 'caption': str,
    'state': dict}. All of the state is as the camera sees it; with O objects in F frames:

      position   float32 [F, O, 2], in frame widths
      velocity   float32 [F, O, 2], in frame widths per second
      visible    float32 [F, O], the share of the object's area that lies in the frame and is not occluded
      radius     float32 [O], in frame widths
      shape, color, material  int [O], indices into SHAPES, COLORS, MATERIALS of captions.py
      camera     float32 [F, 2], in frame widths
      light      float32 [F], a factor on the brightness
      gravity    float, in frame widths per second^2
      occluder   float32 [F, 2], left and right edge in frame widths, or None
      events     list of {'time': s from the window's start, 'objects': indices,
                 'kind': 'wall' | 'object' | 'turn', 'position': (x, y) of the contact};
                 a 'turn' is silent and out of sight

    seed: int; another seed is another world
    frames: frames of a clip
    size: height and width of the frame, in pixels
    fps: frames per second
    sample_rate: of the sound, in Hz
    objects: chances of 1, 2 and 3 objects, which sum to 1
    shapes, colors: names to choose from
    gravity, occluder, leave, pan, light: chance in 0..1 that an episode has gravity, an occluding bar, open side
        walls, a moving camera, a changing light
    speed: range of the speed at the beginning, in frame widths per second
    radius: range of the radius, in frame widths
    undirected: chance in 0..1 of a caption that may leave directions out, each with a chance of 3 in 4
    start: first frame of `world[i]` in its episode
    length: number of clips

    Raises UserError where a setting is out of its range.
    """

    def __init__(
        self,
        seed=0,
        frames=17,
        size=32,
        fps=8,
        sample_rate=8000,
        objects=(0.5, 0.35, 0.15),
        shapes=SHAPES,
        colors=COLORS,
        gravity=0.2,
        occluder=0.2,
        leave=0.2,
        pan=0.2,
        light=0.2,
        speed=(0.35, 0.7),
        radius=(0.10, 0.19),
        undirected=0.0,
        start=0,
        length=2**31 - 1,
    ):
        for name, value, known in (("shapes", shapes, SHAPES), ("colors", colors, COLORS)):
            if not value or set(value) - set(known):
                raise UserError(f"world: {name}={value} must be some of {', '.join(known)}")
        if len(objects) > 3 or min(objects) < 0 or not math.isclose(sum(objects), 1, abs_tol=1e-6):
            raise UserError(f"world: objects={objects} must be the chances of 1 to 3 objects and sum to 1")
        if any(p > 0 and n >= len(set(colors)) for n, p in enumerate(objects)):
            raise UserError("world: no two objects share a color; name at least as many colors as objects")
        if frames < 1 or size < 8 or fps <= 0 or sample_rate < 2000 or start < 0:
            raise UserError("world: want frames >= 1, size >= 8, fps > 0, sample_rate >= 2000 and start >= 0")
        if not (0 < speed[0] <= speed[1] <= 1 and 0.04 <= radius[0] <= radius[1] <= 0.2):
            raise UserError("world: speed must be a range in 0..1 and radius a range in 0.04..0.2")
        self.seed = seed
        self.frames = frames
        self.size = size
        self.fps = fps
        self.sample_rate = sample_rate
        self.objects = tuple(objects)
        self.shapes = tuple(SHAPES.index(s) for s in shapes)
        self.colors = tuple(COLORS.index(c) for c in colors)
        self.chances = (gravity, occluder, leave, pan, light)
        self.speed = tuple(speed)
        self.radius = tuple(radius)
        self.undirected = undirected
        self.start = start
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if not -self.length <= i < self.length:
            raise IndexError(i)
        return self.window(i % self.length, self.start, self.frames)

    def window(self, i, start_frame, frames):
        """Returns frames [start_frame, start_frame + frames) of episode i; windows that overlap agree bit for bit."""
        episode = self._episode(np.random.default_rng([self.seed, int(i)]))
        times = (start_frame + np.arange(frames)) / self.fps  # s from the start of the episode
        begin, end = start_frame / self.fps, (start_frame + frames) / self.fps
        segments, events = simulate(episode, begin, end)

        starts = np.array([start for start, _ in segments])
        motion = np.array([values for _, values in segments])  # [segments, 4, O]: x, y, vx, vy
        current = np.searchsorted(starts, times, side="right") - 1  # [F]: the segment of each frame
        dt = (times - starts[current])[:, None]
        x, y, vx, vy = motion[current].transpose(1, 0, 2)  # each [F, O]
        g = episode["g"]
        camera, camera_velocity = camera_at(episode, times)
        position = np.stack([x + vx * dt, y + (vy + 0.5 * g * dt) * dt], -1) - camera[:, None]
        velocity = np.stack([vx, vy + g * dt], -1) - camera_velocity[:, None]
        light = np.ones(frames)
        if episode["light"]:
            period, phase = episode["light"]
            light = 0.95 + 0.15 * np.sin(2 * math.pi * times / period + phase)
        bar = episode["bar"]
        state = {
            "position": position.astype(np.float32),
            "velocity": velocity.astype(np.float32),
            "radius": np.array(episode["r"], np.float32),
            "shape": np.array(episode["shape"]),
            "color": np.array(episode["color"]),
            "material": np.array(episode["material"]),
            "camera": camera.astype(np.float32),
            "light": light.astype(np.float32),
            "occluder": None if bar is None else (np.array(bar) - camera[:, :1]).astype(np.float32),
            "gravity": g,
        }
        video, state["visible"] = render(state, self.size, open_sides=episode["open"])
        first_sample = int(start_frame * self.sample_rate // self.fps)
        audio = self._sound(episode, events, first_sample, frames)
        state["events"] = [_as_seen(event, episode, begin) for event in events if event.time >= begin]
        text = caption(state, np.random.default_rng([self.seed, int(i), start_frame]), self.undirected)
        return {"video": video, "audio": audio, "caption": text, "state": state}

    def _episode(self, rng):
        """Draws all that does not change in an episode, and where and how fast each object begins."""
        gravity, occluder, leave, pan, light = (rng.random() < chance for chance in self.chances)
        shares = np.cumsum(self.objects)
        count = int(np.searchsorted(shares, _uniform(rng, 0, 0.999999), side="right")) + 1
        episode = {"g": _uniform(rng, 0.4, 0.7) if gravity else 0.0, "open": leave}
        left = _uniform(rng, 0.33, 0.4)
        width = _uniform(rng, 0.26, 0.33)
        episode["bar"] = (left, left + width) if occluder else None
        reach = _uniform(rng, 0.06, 0.1)  # frame widths
        waves = [(_uniform(rng, low, high), _uniform(rng, 0, 6.28)) for low, high in ((6, 9), (7, 11))]
        episode["pan"] = (reach, *waves) if pan else None  # a wave, of x and of y: (period in s, phase)
        episode["light"] = (_uniform(rng, 5, 9), _uniform(rng, 0, 6.28)) if light else None
        colors = list(self.colors)
        episode["color"] = [colors.pop(int(rng.random() * len(colors))) for _ in range(count)]
        episode["shape"] = [_pick(rng, self.shapes) for _ in range(count)]
        episode["material"] = [int(rng.random() * 2) for _ in range(count)]
        while not self._place(episode, count, rng):
            if count == 1:
                episode["bar"] = None
            count = max(1, count - 1)  # a crowd that finds no room goes on with one object less
        return episode

    def _place(self, episode, count, rng):
        """Gives the first `count` objects their places, speeds and radii. Returns whether there was room for all."""
        for name in ("color", "shape", "material"):
            del episode[name][count:]
        x, y, vx, vy, r = columns = ([], [], [], [], [])
        smallest = self.radius[0]
        largest = max(smallest, self.radius[1] - 0.015 * (count - 1))  # several objects are smaller
        for _ in range(150):
            radius = _uniform(rng, smallest, largest)
            speed = _uniform(rng, *self.speed)
            angle = math.radians(_uniform(rng, -20, 20))
            along, across = speed * math.cos(angle), speed * math.sin(angle)
            dx, dy = _pick(rng, ((along, across), (-along, across), (across, along), (across, -along)))
            margin = radius + 0.02
            new = (_uniform(rng, margin, 1 - margin), _uniform(rng, margin, 1 - margin), dx, dy, radius)
            trial = [column + [value] for column, value in zip(columns, new)]
            if self._fits(episode, trial):
                for column, value in zip(columns, new):
                    column.append(value)
                if len(r) == count:
                    episode.update(x=x, y=y, vx=vx, vy=vy, r=r)
                    return True
        return False

    def _fits(self, episode, trial):
        """Returns whether the last object is in sight and apart from the others, and hits nothing for FREE seconds."""
        x, y, _, _, r = trial
        bar, n = episode["bar"], len(r) - 1
        if bar and bar[0] - r[n] < x[n] < bar[1] + r[n]:
            return False
        if any(math.hypot(x[n] - x[j], y[n] - y[j]) < r[n] + r[j] + 0.04 for j in range(n)):
            return False
        # The walls count as closed even where the sides are open: no object leaves before its direction is seen.
        return next_event(*trial, r, [1 - a for a in r], episode["g"])[0] > FREE

    def _sound(self, episode, events, first_sample, frames):
        """Returns the sum of all tones that ring in the window, softly clipped: float32 [N]."""
        length = int(frames * self.sample_rate // self.fps)
        audio = np.zeros(length, np.float32)
        for event in events:
            if event.kind == "turn":
                continue
            at = math.ceil(event.time * self.sample_rate)  # the first sample after the impact
            offset = at - event.time * self.sample_rate
            amplitude = np.float32((0.45 + 0.5 * min(1.0, event.speed)) * (1 if event.kind == "wall" else 0.75))
            for o in event.objects:
                material = MATERIALS[episode["material"][o]]
                wave = tone(episode["r"][o], material, offset, self.sample_rate)
                first = at - first_sample  # where the tone begins in the window; negative before it
                low, high = max(0, first), min(length, first + len(wave))
                if high > low:
                    audio[low:high] += amplitude * wave[low - first : high - first]
        return np.tanh(audio)


def _uniform(rng, low, high):
    return low + (high - low) * rng.random()


def _pick(rng, options):
    return options[int(rng.random() * len(options))]


def _as_seen(event, episode, begin):
    """Returns an event as it stands in a state: from the window's start, and as the camera sees it."""
    camera = camera_at(episode, np.array([event.time]))[0][0]
    return {
        "time": float(event.time - begin),
        "kind": event.kind,
        "objects": event.objects,
        "position": tuple((event.contact - camera).tolist()),
    }


# ------------------------------------------------------------------------------------------ motion


def next_event(x, y, vx, vy, r, low, high, g):
    """Returns (seconds until the next contact, kind, indices); kind is 'side', 'floor or ceiling' or 'object'.

    An object only meets what it approaches, so an object that has just bounced does not meet the same wall again.

    x, y, vx, vy, r: centers, velocities and radii, each a list of O numbers
    low, high: bounds of each center's x, lists of O numbers
    g: acceleration downwards, in frame widths per second^2
    """
    best, kind, indices = math.inf, None, ()
    for i in range(len(x)):
        if vx[i]:
            t = ((high[i] if vx[i] > 0 else low[i]) - x[i]) / vx[i]
            if t < best:
                best, kind, indices = max(t, 0.0), "side", (i,)
        to_floor, to_ceiling, v = max(1 - r[i] - y[i], 0.0), max(y[i] - r[i], 0.0), vy[i]
        t = math.inf
        if v < 0 and v * v >= 2 * g * to_ceiling:
            t = 2 * to_ceiling / (-v + math.sqrt(v * v - 2 * g * to_ceiling))
        elif g > 0:  # the later root, at which the object moves down
            t = (-v + math.sqrt(v * v + 2 * g * to_floor)) / g
        elif v > 0:
            t = to_floor / v
        if t < best:
            best, kind, indices = t, "floor or ceiling", (i,)
        for j in range(i):  # gravity is the same for both objects: their relative motion is a straight line
            dx, dy, dvx, dvy = x[i] - x[j], y[i] - y[j], vx[i] - vx[j], vy[i] - vy[j]
            b = dx * dvx + dy * dvy
            if b < 0:
                c = max(dx * dx + dy * dy - (r[i] + r[j]) ** 2, 0.0)
                disc = b * b - (dvx * dvx + dvy * dvy) * c
                if disc >= 0 and c / (-b + math.sqrt(disc)) < best:
                    best, kind, indices = c / (-b + math.sqrt(disc)), "object", (j, i)
    return best, kind, indices


def simulate(episode, begin, end):
    """Returns (segments, events): the motion over [begin, end) and all events that can be heard in it.

    segments: [(start in s, (x, y, vx, vy))] in world coordinates; in a segment every object flies freely
    events: [Event] of [begin - TONE_SECONDS, end)

    Collisions are elastic, and an object's mass is its radius squared. The memory used is that of the window alone.

    begin, end: s from the start of the episode
    """
    x, y, vx, vy = (list(episode[k]) for k in ("x", "y", "vx", "vy"))
    r, g, open_sides = episode["r"], episode["g"], episode["open"]
    low = [-OUTSIDE if open_sides else a for a in r]
    high = [1 + OUTSIDE if open_sides else 1 - a for a in r]
    now, events = 0.0, []
    segments = [(now, (x[:], y[:], vx[:], vy[:]))]
    while True:
        dt, kind, indices = next_event(x, y, vx, vy, r, low, high, g)
        if now + dt >= end:
            return segments, events
        now += dt
        for i in range(len(x)):
            x[i] += vx[i] * dt
            y[i] += (vy[i] + 0.5 * g * dt) * dt
            vy[i] += g * dt
        i = indices[0]
        if kind == "side":
            right = vx[i] > 0
            speed, x[i] = abs(vx[i]), high[i] if right else low[i]
            vx[i] = -vx[i]
            contact, kind = (float(right), y[i]), "turn" if open_sides else "wall"
        elif kind == "floor or ceiling":
            down = vy[i] > 0
            speed, y[i] = abs(vy[i]), 1 - r[i] if down else r[i]
            vy[i] = -vy[i]
            contact, kind = (x[i], float(down)), "wall"
        else:
            j = indices[1]
            nx, ny = x[j] - x[i], y[j] - y[i]
            distance = math.hypot(nx, ny)
            nx, ny = nx / distance, ny / distance
            speed = (vx[i] - vx[j]) * nx + (vy[i] - vy[j]) * ny
            mi, mj = r[i] ** 2, r[j] ** 2
            # The faster object "hits" the other one, so it is named first.
            if vx[i] * nx + vy[i] * ny < -(vx[j] * nx + vy[j] * ny):
                indices = (j, i)
            pi, pj = 2 * mj / (mi + mj) * speed, 2 * mi / (mi + mj) * speed
            vx[i], vy[i] = vx[i] - pi * nx, vy[i] - pi * ny
            vx[j], vy[j] = vx[j] + pj * nx, vy[j] + pj * ny
            contact = (x[i] + r[i] * nx, y[i] + r[i] * ny)
        if now <= begin:
            segments.clear()
        segments.append((now, (x[:], y[:], vx[:], vy[:])))
        if now >= begin - TONE_SECONDS:
            events.append(Event(now, kind, indices, speed, contact))


def camera_at(episode, times):
    """Returns the camera's offset and its velocity at `times` [F] (s): each [F, 2], in frame widths (per second)."""
    if episode["pan"] is None:
        return np.zeros((len(times), 2)), np.zeros((len(times), 2))
    reach, *waves = episode["pan"]
    periods, phases = np.array(waves).T
    size, rate = np.array([reach, 0.4 * reach]), 2 * math.pi / periods
    angle = times[:, None] * rate + phases
    return size * np.sin(angle), size * rate * np.cos(angle)


# ------------------------------------------------------------------------------------------ picture and sound


def coverage(shape, dx, dy, radius):
    """Returns how much of each pixel an object covers, anti-aliased, in 0..1.

    shape: index into SHAPES
    dx, dy: from the object's center to the pixels' centers, in pixels; they broadcast
    radius: of the collider, in pixels
    """
    if shape == 0:
        return np.clip(radius + 0.5 - np.sqrt(dx * dx + dy * dy), 0, 1)
    if shape == 1:
        half = SQUARE * radius + 0.5
        return np.clip(half - np.abs(dx), 0, 1) * np.clip(half - np.abs(dy), 0, 1)
    length = math.hypot(HALF_BASE, APEX + BASE)
    slope_x, slope_y = (APEX + BASE) / length, HALF_BASE / length
    sides = np.clip(0.5 + slope_y * (dy + APEX * radius) - slope_x * np.abs(dx), 0, 1)
    return sides * np.clip(BASE * radius + 0.5 - dy, 0, 1)


def render(state, size, open_sides=False):
    """Draws a state. Returns the video, uint8 [F, size, size, 3], and each object's visible share, float32 [F, O].

    state: as `World` describes it; 'visible' and 'events' are not read
    size: height and width, in pixels
    open_sides: draws no side walls
    """
    position, camera = state["position"], state["camera"]
    frames = len(position)
    center = ((np.arange(size) + 0.5) / size).astype(np.float32)
    still = not camera.any()
    world = center + (camera[:1] if still else camera)[:, :, None]  # [F or 1, 2, size]
    inside = np.clip((np.minimum(world, 1 - world) - EDGE) * size + 0.5, 0, 1)
    if open_sides:
        inside[:, 0] = 1
    wave = np.sin(world * np.float32(6 * math.pi))
    pattern = BACKGROUND - WALL + 0.025 * wave[:, 1, :, None] * wave[:, 0, None, :]
    gray = WALL + pattern * inside[:, 1, :, None] * inside[:, 0, None, :]
    canvas = np.empty((3, frames, size, size), np.float32)  # channels first: several times faster
    canvas[:] = gray
    flat = canvas.reshape(3, -1)

    bar = np.zeros((frames, size), np.float32)
    if state["occluder"] is not None:
        edges = state["occluder"] * size
        pixel = np.arange(size, dtype=np.float32) + 0.5
        bar = np.clip(np.minimum(pixel - edges[:, :1], edges[:, 1:] - pixel) + 0.5, 0, 1)

    visible = np.empty(position.shape[:2], np.float32)
    frame = np.arange(frames)[:, None]
    for o, (shape, color) in enumerate(zip(state["shape"], state["color"])):
        # Only a patch around the object is drawn. At the frame's edge the patch is moved inside.
        radius = float(state["radius"][o]) * size
        reach = math.ceil(1.3 * radius) + 1
        side = min(size, 2 * reach + 1)
        at = position[:, o] * size  # [F, 2]
        corner = np.clip(np.floor(at).astype(np.int32) - reach, 0, size - side)
        grid = corner[:, :, None] + np.arange(side, dtype=np.int32)  # [F, 2, side]
        offset = grid + np.float32(0.5) - at[:, :, None]
        dx, dy = offset[:, 0, None, :], offset[:, 1, :, None]
        alpha = coverage(shape, dx, dy, radius)  # [F, side, side]
        shown = alpha * (1 - bar[frame, grid[:, 0]])[:, None, :]
        visible[:, o] = np.minimum(1, shown.sum((1, 2)) / (AREA[shape] * radius**2))
        shine = None
        if MATERIALS[state["material"][o]] == "metal":
            spot = np.exp(-(((offset + 0.35 * radius) / (0.38 * radius)) ** 2))
            shine = 0.75 * spot[:, 0, None, :] * spot[:, 1, :, None]
        index = (frame[:, :, None] * size + grid[:, 1, :, None]) * size + grid[:, 0, None, :]
        for channel, value in zip(flat, PALETTE[COLORS[color]]):
            paint = np.float32(value / 255)
            if shine is not None:
                paint = 0.85 * paint + (0.95 - 0.85 * paint) * shine
            patch = channel[index]
            channel[index] = patch + (paint - patch) * alpha
    if state["occluder"] is not None:
        canvas += (OCCLUDER - canvas) * bar[:, None, :]
    canvas *= (255 * state["light"])[:, None, None]
    canvas += 0.5
    canvas = np.minimum(canvas, 255, out=canvas).astype(np.uint8)
    video = np.empty((frames, size, size, 3), np.uint8)
    for channel in range(3):
        video[..., channel] = canvas[channel]
    return video, visible


def tone(radius, material, offset, sample_rate):
    """Returns the sound of one impact: float32 [n], at most TONE_SECONDS long.

    A small object sounds high. Rubber is a dull thud of two harmonics; metal rings inharmonically.

    radius: of the object, in frame widths: 0.19 sounds at 400 Hz, 0.10 at 1750 Hz
    material: a word of MATERIALS
    offset: from the impact to the first sample, in samples, in 0..1
    sample_rate: in Hz
    """
    pitch = 400 * (0.19 / radius) ** 2.3  # Hz
    decay, partials = TONES[material]
    t = (np.arange(int(TONE_SECONDS * sample_rate)) + offset) / sample_rate
    t = t[: int(7 * decay * sample_rate)].astype(np.float32)
    wave = np.zeros_like(t)
    for ratio, share in partials:
        if ratio * pitch < 0.46 * sample_rate:
            wave += np.float32(share) * np.sin(np.float32(2 * math.pi * ratio * pitch) * t)
    fade = np.minimum(1, (t[-1] - t) * 50)  # to zero in 20 ms: a cut would be heard as a click
    return wave * np.exp(t * np.float32(-1 / decay)) * fade
