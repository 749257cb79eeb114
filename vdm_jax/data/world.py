"""A procedural world of moving shapes with sound and exact state: an endless source of clips.

Colored shapes move in a box. They bounce off its walls and off each other, and every impact sounds. Motion is simulated
from event to event in closed form. (All objects share one acceleration, so their relative motion is linear.) Positions
and impact times are therefore exact and do not depend on the frame rate.

Units: lengths are in frame heights, x to the right and y down. A position times the frame's height is in pixels, where
pixel j covers [j, j + 1). Times are in seconds. Frame k shows time k / fps, and the sound of [k / fps, (k + 1) / fps)
belongs to it.
"""

import dataclasses
import math

import numpy as np

from vdm_jax.data.captions import COLORS, MATERIALS, SHAPES, caption
from vdm_jax.data.rates import sample_count
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

# Lengths, in frame heights.
EDGE = 0.016  # width of the drawn wall inside the frame
OUTSIDE = 0.34  # centers go this far past the frame where the side walls are open

FREE = 0.45  # s without any impact at the beginning of an episode, so that each direction can be seen
TONE_SECONDS = 0.15  # the longest tone
TONES = {  # material -> (seconds of decay, ((frequency ratio, share), ...))
    "rubber": (0.013, ((0.7, 0.75), (1.4, 0.25))),
    "metal": (0.036, ((1.0, 0.55), (1.53, 0.25), (2.21, 0.2))),
}


@dataclasses.dataclass(eq=False)
class World:
    """An endless source of clips. Clip i follows from (seed, i) and the settings alone; more frames only continue it.

    `world[i]` is {'video': uint8 [F, H, W, 3], 'audio': float32 [F * sample_rate // fps], 'caption': str,
    'state': dict}. All of the state is as the camera sees it; with O objects in F frames:

      position   float32 [F, O, 2], in frame heights
      velocity   float32 [F, O, 2], in frame heights per second
      visible    float32 [F, O], the share of the object's area that lies in the frame and is not occluded
      radius     float32 [O], in frame heights
      shape, color, material  int [O], indices into SHAPES, COLORS, MATERIALS of captions.py
      camera     float32 [F, 2], in frame heights
      light      float32 [F], a factor on the brightness
      gravity    float, in frame heights per second^2
      open       bool, whether objects may leave at the sides
      occluder   float32 [F, 2], left and right edge in frame heights, or None
      events     list of {'time': s, 'objects': indices, the faster one first, 'kind': 'wall' | 'object' | 'turn',
                 'speed': of the impact, in frame heights per second, 'position': (x, y) of the contact}; in a 'turn' an
                 object that has left through an open side comes back, silent and out of sight

    Raises UserError where a setting is out of its range.
    """

    seed: int = 0
    frames: int = 17  # F
    size: tuple = (32, 32)  # height and width of the frame, in pixels
    fps: float = 8  # frames per second
    sample_rate: int = 8000  # of the sound, in Hz
    objects: tuple = (0.5, 0.35, 0.15)  # chances of 1, 2 and 3 objects, which sum to 1
    shapes: tuple = SHAPES  # names to choose from
    colors: tuple = COLORS  # names to choose from
    gravity: float = 0.2  # chance in 0..1 that an episode has gravity
    occluder: float = 0.2  # of a bar that occludes objects
    leave: float = 0.2  # of open side walls
    pan: float = 0.2  # of a moving camera
    light: float = 0.2  # of a changing light
    speed: tuple = (0.35, 0.7)  # range of the speed at the beginning, in frame heights per second
    radius: tuple = (0.10, 0.19)  # range, in frame heights
    undirected: float = 0.0  # chance in 0..1 of a caption that may leave directions out, each with a chance of 3 in 4
    wordings: float = 0.0  # chance in 0..1 of a caption in the many words of wordings.py
    outside: float = OUTSIDE  # centers go this far past the frame where the side walls are open, in frame heights

    def __post_init__(self):
        objects, speed, radius = self.objects, self.speed, self.radius
        for name, value, known in (("shapes", self.shapes, SHAPES), ("colors", self.colors, COLORS)):
            if not value or set(value) - set(known):
                raise UserError(f"world: {name}={value} must be some of {', '.join(known)}")
        if len(objects) > 3 or min(objects) < 0 or not math.isclose(sum(objects), 1, abs_tol=1e-6):
            raise UserError(f"world: objects={objects} must be the chances of 1 to 3 objects and sum to 1")
        for name in ("gravity", "occluder", "leave", "pan", "light", "undirected", "wordings"):
            chance = getattr(self, name)
            if not isinstance(chance, int | float) or not 0 <= chance <= 1:
                raise UserError(f"world: {name}={chance!r} must be a chance from 0 to 1")
        if any(p > 0 and n >= len(set(self.colors)) for n, p in enumerate(objects)):
            raise UserError("world: no two objects share a color; name at least as many colors as objects")
        if self.frames < 1 or min(self.size) < 8 or self.fps <= 0 or self.sample_rate < 2000:
            raise UserError("world: want frames >= 1, size >= 8, fps > 0 and sample_rate >= 2000")
        if self.size[1] < 0.5 * self.size[0]:
            raise UserError(f"world: size={self.size} (height, width) must be at least half as wide as high")
        if not (0 < speed[0] <= speed[1] <= 1 and 0.04 <= radius[0] <= radius[1] <= 0.2):
            raise UserError("world: speed must be a range in 0..1 and radius a range in 0.04..0.2")

    def __len__(self):
        return 2**31 - 1

    def __getitem__(self, i):
        return self.show(i, self.episode(i))

    def episode(self, i):
        """Returns all that decides clip i: a dict of lists with one value for each object, and of numbers."""
        return self._episode(np.random.default_rng([self.seed, int(i)]))

    def show(self, i, episode):
        """Returns clip i with another episode, say one in which an object is missing."""
        times = np.arange(self.frames) / self.fps
        starts, motion, events = simulate(episode, self.frames / self.fps)
        current = np.searchsorted(starts, times, side="right") - 1  # [F]: the segment of each frame
        dt = (times - starts[current])[:, None]
        x, y, vx, vy = motion[current].transpose(1, 0, 2)  # each [F, O]
        g, bar = episode["g"], episode["bar"]
        camera, camera_velocity = camera_at(episode, times)
        position = np.stack([x + vx * dt, y + (vy + 0.5 * g * dt) * dt], -1) - camera[:, None]
        velocity = np.stack([vx, vy + g * dt], -1) - camera_velocity[:, None]
        light = np.ones(self.frames)
        if episode["light"]:
            period, phase = episode["light"]
            light = 0.95 + 0.15 * np.sin(2 * math.pi * times / period + phase)
        state = {
            "position": position.astype(np.float32),
            "velocity": velocity.astype(np.float32),
            "radius": np.array(episode["r"], np.float32),
            **{name: np.array(episode[name]) for name in ("shape", "color", "material")},
            "camera": camera.astype(np.float32),
            "light": light.astype(np.float32),
            "occluder": None if bar is None else (np.array(bar) - camera[:, :1]).astype(np.float32),
            "gravity": g,
            "open": episode["open"],
        }
        video, state["visible"] = render(state, self.size, episode["open"])
        cameras = camera_at(episode, np.array([event["time"] for event in events]))[0]
        state["events"] = [
            {**event, "position": tuple((event["position"] - at).tolist())} for event, at in zip(events, cameras)
        ]
        text = caption(state, np.random.default_rng([self.seed, int(i), 0]), self.undirected, self.wordings)
        return {"video": video, "audio": self._sound(episode, events), "caption": text, "state": state}

    def _episode(self, rng):
        """Draws all that does not change in an episode, and where and how fast each object begins."""
        wide = self.size[1] / self.size[0]
        chances = (self.gravity, self.occluder, self.leave, self.pan, self.light)
        gravity, occluder, leave, pan, light = (rng.random() < chance for chance in chances)
        count = int(np.searchsorted(np.cumsum(self.objects), _uniform(rng, 0, 0.999999), side="right")) + 1
        episode = {"g": _uniform(rng, 0.4, 0.7) if gravity else 0.0, "open": leave, "wide": wide}
        episode["outside"] = self.outside
        left = _uniform(rng, 0.33, 0.4)
        right = left + _uniform(rng, 0.26, 0.33)
        episode["bar"] = (left * wide, right * wide) if occluder else None
        reach = _uniform(rng, 0.06, 0.1)  # frame heights
        waves = [(_uniform(rng, low, high), _uniform(rng, 0, 6.28)) for low, high in ((6, 9), (7, 11))]
        episode["pan"] = (reach if pan else 0.0, *waves)  # a wave, of x and of y: (period in s, phase)
        episode["light"] = (_uniform(rng, 5, 9), _uniform(rng, 0, 6.28)) if light else None
        colors = list(self.colors)
        drawn = [colors.pop(int(rng.random() * len(colors))) for _ in range(count)]
        episode["color"] = [COLORS.index(color) for color in drawn]
        episode["shape"] = [SHAPES.index(_pick(rng, self.shapes)) for _ in range(count)]
        episode["material"] = [int(rng.random() * 2) for _ in range(count)]
        while not self._place(episode, count, rng):
            if count == 1:
                episode["bar"] = None
            count = max(1, count - 1)  # a crowd that finds no room goes on with one object less
        return episode

    def _place(self, episode, count, rng):
        """Gives the first `count` objects their places, speeds and radii. Returns whether there was room for all.

        Each is in sight and apart from the others, and hits nothing for FREE seconds.
        """
        for name in ("color", "shape", "material"):
            del episode[name][count:]
        bar, placed = episode["bar"], []  # placed: (x, y, vx, vy, r) of each object
        smallest = self.radius[0]
        largest = max(smallest, self.radius[1] - 0.015 * (count - 1))  # several objects are smaller
        for _ in range(150):
            r = _uniform(rng, smallest, largest)
            speed = _uniform(rng, *self.speed)
            angle = math.radians(_uniform(rng, -20, 20))
            along, across = speed * math.cos(angle), speed * math.sin(angle)
            velocity = _pick(rng, ((along, across), (-along, across), (across, along), (across, -along)))
            margin = r + 0.02
            x, y = _uniform(rng, margin, episode["wide"] - margin), _uniform(rng, margin, 1 - margin)
            if bar and bar[0] - r < x < bar[1] + r:
                continue
            if any(math.hypot(x - x2, y - y2) < r + r2 + 0.04 for x2, y2, _, _, r2 in placed):
                continue
            trial = [*placed, (x, y, *velocity, r)]
            columns = list(zip(*trial))
            # The walls count as closed even where the sides are open: no object leaves before its direction is seen.
            if next_event(*columns, columns[-1], episode["wide"], episode["g"])[0] > FREE:
                placed = trial
                if len(placed) == count:
                    episode.update(zip(("x", "y", "vx", "vy", "r"), columns))
                    return True
        return False

    def _sound(self, episode, events):
        """Returns the sum of all tones, softly clipped: float32 [N]."""
        audio = np.zeros(sample_count(self.frames, self.fps, self.sample_rate), np.float32)
        for event in events:
            if event["kind"] == "turn":
                continue
            time = event["time"] * self.sample_rate  # samples
            at = math.ceil(time)  # the first sample after the impact
            loudness = 1 if event["kind"] == "wall" else 0.75
            amplitude = np.float32((0.45 + 0.5 * min(1.0, event["speed"])) * loudness)
            for o in event["objects"]:
                wave = tone(episode["r"][o], MATERIALS[episode["material"][o]], at - time, self.sample_rate)
                audio[at : at + len(wave)] += amplitude * wave[: max(0, len(audio) - at)]
        return np.tanh(audio)


def _uniform(rng, low, high):
    return low + (high - low) * rng.random()


def _pick(rng, options):
    return options[int(rng.random() * len(options))]


def next_event(x, y, vx, vy, r, low, wide, g):
    """Returns (seconds until the next contact, kind, indices); kind is 'side', 'floor or ceiling' or 'object'.

    An object only meets what it approaches, so an object that has just bounced does not meet the same wall again.

    x, y, vx, vy, r: centers, velocities and radii, each O numbers
    low: the lower bound of each center's x; the upper bound is wide - low
    wide: width of the frame
    g: acceleration downwards, in frame heights per second^2
    """
    best, kind, indices = math.inf, None, ()
    for i in range(len(x)):
        if vx[i]:
            t = ((wide - low[i] if vx[i] > 0 else low[i]) - x[i]) / vx[i]
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


def simulate(episode, end):
    """Returns (starts, motion, events) of [0, end) seconds. In a segment every object flies freely.

    starts: of the S segments, in s: [S]
    motion: x, y, vx, vy of each object at these starts, in world coordinates: [S, 4, O]
    events: as in the state of `World`, but in world coordinates

    Collisions are elastic, and an object's mass is its radius squared.
    """
    x, y, vx, vy = motion = [list(episode[k]) for k in ("x", "y", "vx", "vy")]
    r, g, wide, open_sides = (episode[k] for k in ("r", "g", "wide", "open"))
    low = [-episode["outside"] if open_sides else a for a in r]
    now, events = 0.0, []
    starts, motions = [now], [np.array(motion)]
    while True:
        dt, kind, indices = next_event(x, y, vx, vy, r, low, wide, g)
        if now + dt >= end:
            return np.array(starts), np.array(motions), events
        now += dt
        for i in range(len(x)):
            x[i] += vx[i] * dt
            y[i] += (vy[i] + 0.5 * g * dt) * dt
            vy[i] += g * dt
        i = indices[0]
        if kind == "object":
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
        else:
            at, velocity, bound, length = (x, vx, low, wide) if kind == "side" else (y, vy, r, 1)
            far = velocity[i] > 0  # the right wall, or the floor
            speed, at[i] = abs(velocity[i]), length - bound[i] if far else bound[i]
            velocity[i] = -velocity[i]
            contact = (far * wide, y[i]) if kind == "side" else (x[i], float(far))
            kind = "turn" if kind == "side" and open_sides else "wall"
        starts.append(now)
        motions.append(np.array(motion))
        events.append({"time": now, "kind": kind, "objects": indices, "speed": speed, "position": contact})


def camera_at(episode, times):
    """Returns the camera's offset and its velocity at `times` [F] (s): each [F, 2], in frame heights (per second)."""
    reach, *waves = episode["pan"]
    periods, phases = np.array(waves).T
    size, rate = np.array([reach, 0.4 * reach]), 2 * math.pi / periods
    angle = times[:, None] * rate + phases
    return size * np.sin(angle), size * rate * np.cos(angle)


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


def render(state, size, open_sides):
    """Returns the video of a state, uint8 [F, H, W, 3], and each object's visible share, float32 [F, O].

    state: as `World` describes it, without 'visible' and 'events'
    size: (H, W), in pixels
    open_sides: without side walls
    """
    position, camera = state["position"], state["camera"]
    frames, (height, width) = len(position), size
    cameras = camera if camera.any() else camera[:1]  # a still camera sees one background

    def along(axis, pixels):
        """The pixels' centers along an axis, the background's wave at them, and how far they are inside the walls."""
        centers = np.arange(pixels, dtype=np.float32) + 0.5
        place = centers / height + cameras[:, axis, None]  # [F or 1, pixels]
        inside = np.clip((np.minimum(place, pixels / height - place) - EDGE) * height + 0.5, 0, 1)
        return centers, np.sin(place * np.float32(6 * math.pi)), inside

    (x, wave_x, inside_x), (_, wave_y, inside_y) = along(0, width), along(1, height)
    if open_sides:
        inside_x[:] = 1
    pattern = BACKGROUND - WALL + 0.025 * wave_y[:, :, None] * wave_x[:, None, :]
    gray = WALL + pattern * inside_y[:, :, None] * inside_x[:, None, :]
    canvas = np.broadcast_to(gray, (3, frames, height, width)).copy()  # channels first: several times faster
    flat = canvas.reshape(3, -1)

    bar = np.zeros((frames, width), np.float32)
    if state["occluder"] is not None:
        edges = state["occluder"] * height
        bar = np.clip(np.minimum(x - edges[:, :1], edges[:, 1:] - x) + 0.5, 0, 1)

    visible = np.empty(position.shape[:2], np.float32)
    frame = np.arange(frames)[:, None]
    for o, (shape, color) in enumerate(zip(state["shape"], state["color"])):
        # Only a patch around the object is drawn. At the frame's edge the patch is moved inside.
        radius = float(state["radius"][o]) * height
        reach = math.ceil(1.3 * radius) + 1
        side = min(height, width, 2 * reach + 1)
        at = position[:, o] * height  # [F, 2]
        corner = np.clip(np.floor(at).astype(np.int32) - reach, 0, (width - side, height - side))
        grid = corner[:, :, None] + np.arange(side, dtype=np.int32)  # [F, 2, side]
        offset = grid + np.float32(0.5) - at[:, :, None]
        alpha = coverage(shape, offset[:, 0, None, :], offset[:, 1, :, None], radius)  # [F, side, side]
        shown = alpha * (1 - bar[frame, grid[:, 0]])[:, None, :]
        visible[:, o] = np.minimum(1, shown.sum((1, 2)) / (AREA[shape] * radius**2))
        metal = MATERIALS[state["material"][o]] == "metal"
        if metal:
            spot = np.exp(-(((offset + 0.35 * radius) / (0.38 * radius)) ** 2))
            shine = 0.75 * spot[:, 0, None, :] * spot[:, 1, :, None]
        index = (frame[:, :, None] * height + grid[:, 1, :, None]) * width + grid[:, 0, None, :]
        for channel, value in zip(flat, PALETTE[COLORS[color]]):
            paint = np.float32(value / 255)
            if metal:
                paint = 0.85 * paint + (0.95 - 0.85 * paint) * shine
            patch = channel[index]
            channel[index] = patch + (paint - patch) * alpha
    if state["occluder"] is not None:
        canvas += (OCCLUDER - canvas) * bar[:, None, :]
    canvas *= (255 * state["light"])[:, None, None]
    canvas += 0.5
    return np.stack(np.minimum(canvas, 255).astype(np.uint8), axis=-1), visible


def tone(radius, material, offset, sample_rate):
    """Returns the sound of one impact: float32 [n], at most TONE_SECONDS long.

    A small object sounds high. Rubber is a dull thud of two harmonics; metal rings inharmonically.

    radius: in frame heights: 0.19 sounds at 400 Hz, 0.10 at 1750 Hz
    material: a word of MATERIALS
    offset: from the impact to the first sample, in samples, in 0..1
    """
    pitch = 400 * (0.19 / radius) ** 2.3  # Hz
    decay, partials = TONES[material]
    samples = int(min(TONE_SECONDS, 7 * decay) * sample_rate)
    t = ((np.arange(samples) + offset) / sample_rate).astype(np.float32)
    wave = np.zeros_like(t)
    for ratio, share in partials:
        if ratio * pitch < 0.46 * sample_rate:
            wave += np.float32(share) * np.sin(np.float32(2 * math.pi * ratio * pitch) * t)
    fade = np.minimum(1, (t[-1] - t) * 50)  # to zero in 20 ms: a cut would be heard as a click
    return wave * np.exp(t * np.float32(-1 / decay)) * fade
