"""A procedural world of moving shapes with sound and exact state: an endless source of clips.

Colored shapes move in a box, bounce off its walls and off each other, and every impact sounds.
Episode i of a seed is one infinite film: `World(seed)[i]` is its beginning, and
`World(seed).window(i, start_frame, frames)` is any part of it. Motion is simulated from event to
event in closed form (all objects share one acceleration, so relative motion is linear), hence
positions and impact times are exact and do not depend on the frame rate.

Units: the frame is 1 x 1 (x to the right, y down), so position * size is in pixels, where pixel j
covers [j, j + 1). Times are in seconds; frame k of a window shows time k / fps and owns the sound
of [k / fps, (k + 1) / fps).
"""

import math

import numpy as np

from vdm_jax.errors import UserError

SHAPES = ("circle", "square", "triangle")
PALETTE = {  # name -> RGB; hues about 60 degrees apart
    "red": (230, 36, 36),
    "green": (36, 200, 52),
    "blue": (44, 72, 240),
    "yellow": (236, 214, 36),
    "magenta": (226, 44, 214),
    "cyan": (36, 206, 222),
}
COLORS = tuple(PALETTE)
MATERIALS = ("rubber", "metal")
DIRECTIONS = ("left", "right", "up", "down")

SQUARE, APEX, BASE, HALF_BASE = 0.87, 1.15, 0.95, 1.25  # extents of the drawn shapes / radius
AREA = (math.pi, 4 * SQUARE**2, HALF_BASE * (APEX + BASE))  # drawn area / radius^2, by shape
BACKGROUND, WALL, OCCLUDER = 0.12, 0.26, 0.45  # neutral greys
EDGE = 0.016  # width of the drawn wall inside the frame
OUTSIDE = 0.34  # how far past the frame centres go where the side walls are open
FREE = 0.45  # s, no object hits anything before this in an episode, so that a direction can be seen
TONE_SECONDS = 0.15
TONES = {  # material -> (seconds of decay, ((frequency ratio, share), ...))
    "rubber": (0.013, ((0.7, 0.75), (1.4, 0.25))),
    "metal": (0.036, ((1.0, 0.55), (1.53, 0.25), (2.21, 0.2))),
}


def coverage(shape, dx, dy, radius):
    """Anti-aliased coverage in 0..1 of pixels whose centres lie (dx, dy) pixels from the object.

    shape: index into SHAPES; radius: of the collider, in pixels. dx and dy broadcast.
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


def tone(radius, material, offset, sample_rate):
    """The sound of one impact, float32 [n], n <= TONE_SECONDS * sample_rate, from `offset` samples
    (0..1) after the impact on.

    Small objects sound high; rubber is a dull thud of two harmonics, metal rings inharmonically.
    """
    pitch = 400 * (0.19 / radius) ** 2.3  # Hz: 400 at radius 0.19, 1750 at 0.10
    decay, partials = TONES[material]
    t = (np.arange(int(TONE_SECONDS * sample_rate)) + offset) / sample_rate
    t = t[: int(7 * decay * sample_rate)].astype(np.float32)
    wave = np.zeros_like(t)
    for ratio, share in partials:
        if ratio * pitch < 0.46 * sample_rate:
            wave += np.float32(share) * np.sin(np.float32(2 * math.pi * ratio * pitch) * t)
    fade = np.minimum(1, (t[-1] - t) * 50)  # ends at zero, so that no click is heard there
    return wave * np.exp(t * np.float32(-1 / decay)) * fade


class World:
    """Endless source of clips; everything about clip i follows from (seed, i) and the settings.

    objects: chances of 1, 2, 3 objects. gravity, occluder, leave, pan, light: chance of each in an
    episode. speed (frames/s) and radius (of the frame) are ranges. undirected: chance of a caption
    that leaves directions out, each with a chance of 3 in 4, as prompts may. `world[i]` begins at frame
    `start` and is {'video': uint8 [F, H, W, 3], 'audio': float32 [F * sample_rate // fps],
    'caption': str, 'state': dict}, where the state, all as the camera sees it, holds
      position, velocity  float32 [F, O, 2], in frame widths (per second)
      visible             float32 [F, O], share of the object's area in the frame and not occluded
      radius              float32 [O], in frame widths
      shape, color, material  int [O], indices into SHAPES, COLORS, MATERIALS
      camera              float32 [F, 2];  light  float32 [F];  gravity  float
      occluder            float32 [F, 2], left and right edge, or None
      events              list of {'time': s from the window's start, 'objects': indices,
                          'kind': 'wall' | 'object' | 'turn', 'position': (x, y) of the contact};
                          a 'turn' is silent and out of sight.
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
            raise UserError(f"world: objects={objects} must be chances of 1 to 3 objects, sum 1")
        if any(p > 0 and n >= len(set(colors)) for n, p in enumerate(objects)):
            raise UserError("world: no two objects share a color; name as many colors as objects")
        if frames < 1 or size < 8 or fps <= 0 or sample_rate < 2000 or start < 0:
            raise UserError("world: frames >= 1, size >= 8, fps > 0, sample_rate >= 2000, start >= 0")
        if not (0 < speed[0] <= speed[1] <= 1 and 0.04 <= radius[0] <= radius[1] <= 0.2):
            raise UserError("world: speed must be a range in 0..1 and radius one in 0.04..0.2")
        self.seed, self.frames, self.size, self.fps = seed, frames, size, fps
        self.sample_rate, self.start, self.length = sample_rate, start, length
        self.objects, self.speed, self.radius = tuple(objects), tuple(speed), tuple(radius)
        self.shapes = tuple(SHAPES.index(s) for s in shapes)
        self.colors = tuple(COLORS.index(c) for c in colors)
        self.chances = (gravity, occluder, leave, pan, light)
        self.undirected = undirected

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if not -self.length <= i < self.length:
            raise IndexError(i)
        return self.window(i % self.length, self.start, self.frames)

    def window(self, i, start_frame, frames):
        """Frames [start_frame, start_frame + frames) of episode i; equal where windows overlap."""
        episode = self._episode(np.random.default_rng([self.seed, int(i)]))
        times = (start_frame + np.arange(frames)) / self.fps  # s since the episode's start
        begin, end = start_frame / self.fps, (start_frame + frames) / self.fps
        segments, events = simulate(episode, begin, end)

        starts = np.array([s[0] for s in segments])
        motion = np.array([s[1] for s in segments])  # [segments, 4, O]: x, y, vx, vy
        which = np.searchsorted(starts, times, side="right") - 1
        dt = (times - starts[which])[:, None]
        x, y, vx, vy = motion[which].transpose(1, 0, 2)  # each [F, O]
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
        first = int(start_frame * self.sample_rate // self.fps)
        audio = self._sound(episode, events, first, frames)
        state["events"] = []
        for t, kind, who, _, where in events:
            if t >= begin:
                where = tuple((where - camera_at(episode, np.array([t]))[0][0]).tolist())
                state["events"].append({"time": float(t - begin), "kind": kind, "objects": who, "position": where})
        text = caption(state, np.random.default_rng([self.seed, int(i), start_frame]), self.undirected)
        return {"video": video, "audio": audio, "caption": text, "state": state}

    def _episode(self, rng):
        """Draws everything that does not change and where and how fast each object begins."""
        draws = (value for _ in iter(int, 1) for value in rng.random(128).tolist())  # endless
        u = lambda low=0.0, high=1.0: low + (high - low) * next(draws)  # noqa: E731
        pick = lambda options: options[int(u() * len(options))]  # noqa: E731
        gravity, occluder, leave, pan, light = (u() < chance for chance in self.chances)
        count = int(np.searchsorted(np.cumsum(self.objects), u(0, 0.999999), side="right")) + 1
        episode = {"g": u(0.4, 0.7) if gravity else 0.0, "open": leave}
        left, width = u(0.33, 0.4), u(0.26, 0.33)
        episode["bar"] = (left, left + width) if occluder else None
        sway = (u(0.06, 0.1), u(6, 9), u(0, 6.28), u(7, 11), u(0, 6.28))  # reach, (s, phase) x, y
        episode["pan"] = sway if pan else None
        episode["light"] = (u(5, 9), u(0, 6.28)) if light else None
        colors = list(self.colors)
        episode["color"] = [colors.pop(int(u() * len(colors))) for _ in range(count)]
        episode["shape"] = [pick(self.shapes) for _ in range(count)]
        episode["material"] = [int(u() * 2) for _ in range(count)]
        while not self._place(episode, count, u, pick):
            if count == 1:
                episode["bar"] = None
            count = max(1, count - 1)  # a crowd that finds no room goes on with one object less
        return episode

    def _place(self, episode, count, u, pick):
        for name in ("color", "shape", "material"):
            del episode[name][count:]
        x, y, vx, vy, r = columns = ([], [], [], [], [])
        smallest = self.radius[0]
        largest = max(smallest, self.radius[1] - 0.015 * (count - 1))  # several are smaller
        for _ in range(150):
            radius, speed, angle = u(smallest, largest), u(*self.speed), math.radians(u(-20, 20))
            along, across = speed * math.cos(angle), speed * math.sin(angle)
            dx, dy = pick(((along, across), (-along, across), (across, along), (across, -along)))
            margin = radius + 0.02
            new = (u(margin, 1 - margin), u(margin, 1 - margin), dx, dy, radius)
            trial = [column + [value] for column, value in zip(columns, new)]
            if self._free(episode, trial):
                for column, value in zip(columns, new):
                    column.append(value)
                if len(r) == count:
                    episode.update(x=x, y=y, vx=vx, vy=vy, r=r)
                    return True
        return False

    def _free(self, episode, trial):
        x, y, _, _, r = trial
        bar, n = episode["bar"], len(r) - 1
        if bar and bar[0] - r[n] < x[n] < bar[1] + r[n]:
            return False
        if any(math.hypot(x[n] - x[j], y[n] - y[j]) < r[n] + r[j] + 0.04 for j in range(n)):
            return False
        # Closed walls even where the sides are open: nothing leaves before its direction is seen.
        return next_event(*trial, r, [1 - a for a in r], episode["g"])[0] > FREE

    def _sound(self, episode, events, first, frames):
        """Sum of all tones that ring in the window, softly clipped."""
        length = int(frames * self.sample_rate // self.fps)
        audio = np.zeros(length, np.float32)
        for t, kind, who, speed, _ in events:
            if kind == "turn":
                continue
            at = math.ceil(t * self.sample_rate)
            amplitude = np.float32((0.45 + 0.5 * min(1.0, speed)) * (1 if kind == "wall" else 0.75))
            for o in who:
                material = MATERIALS[episode["material"][o]]
                offset = at - t * self.sample_rate
                wave = tone(episode["r"][o], material, offset, self.sample_rate)
                low, high = max(0, at - first), min(length, at - first + len(wave))
                if high > low:
                    audio[low:high] += amplitude * wave[low - at + first : high - at + first]
        return np.tanh(audio)

    @staticmethod
    def meaning(item):
        """What a clip's caption says, or could, of its objects: sorted tuple of (color, shape, direction)."""
        return tuple(sorted(describe(item["state"])))


def next_event(x, y, vx, vy, r, low, high, g):
    """(seconds until the next contact, kind, indices); low and high bound the x of each centre.

    Only what approaches counts, so an object that has just bounced does not meet the wall again.
    """
    best, kind, who = math.inf, None, ()
    for i in range(len(x)):
        if vx[i]:
            t = ((high[i] if vx[i] > 0 else low[i]) - x[i]) / vx[i]
            if t < best:
                best, kind, who = max(t, 0.0), "side", (i,)
        to_floor, to_ceiling, v = max(1 - r[i] - y[i], 0.0), max(y[i] - r[i], 0.0), vy[i]
        t = math.inf
        if v < 0 and v * v >= 2 * g * to_ceiling:
            t = 2 * to_ceiling / (-v + math.sqrt(v * v - 2 * g * to_ceiling))
        elif g > 0:  # the later root: there it moves down
            t = (-v + math.sqrt(v * v + 2 * g * to_floor)) / g
        elif v > 0:
            t = to_floor / v
        if t < best:
            best, kind, who = t, "level", (i,)
        for j in range(i):  # gravity is the same for both: relative motion is a straight line
            dx, dy, dvx, dvy = x[i] - x[j], y[i] - y[j], vx[i] - vx[j], vy[i] - vy[j]
            b = dx * dvx + dy * dvy
            if b < 0:
                c = max(dx * dx + dy * dy - (r[i] + r[j]) ** 2, 0.0)
                disc = b * b - (dvx * dvx + dvy * dvy) * c
                if disc >= 0 and c / (-b + math.sqrt(disc)) < best:
                    best, kind, who = c / (-b + math.sqrt(disc)), "object", (j, i)
    return best, kind, who


def simulate(episode, begin, end):
    """Motion over [begin, end), events of [begin - TONE_SECONDS, end); s since the episode's start.

    Returns ([(start, (x, y, vx, vy))], [(time, kind, objects, impact speed, contact)]) in world
    coordinates; memory is that of the window alone. Collisions are elastic, mass goes with area.
    """
    x, y, vx, vy = (list(episode[k]) for k in ("x", "y", "vx", "vy"))
    r, g, sides = episode["r"], episode["g"], episode["open"]
    low = [-OUTSIDE if sides else a for a in r]
    high = [1 + OUTSIDE if sides else 1 - a for a in r]
    now, events = 0.0, []
    segments = [(now, (x[:], y[:], vx[:], vy[:]))]
    while True:
        dt, kind, who = next_event(x, y, vx, vy, r, low, high, g)
        if now + dt >= end:
            return segments, events
        now += dt
        for i in range(len(x)):
            x[i] += vx[i] * dt
            y[i] += (vy[i] + 0.5 * g * dt) * dt
            vy[i] += g * dt
        i = who[0]
        if kind == "side":
            right = vx[i] > 0
            speed, x[i] = abs(vx[i]), high[i] if right else low[i]
            vx[i] = -vx[i]
            contact, kind = (float(right), y[i]), "turn" if sides else "wall"
        elif kind == "level":
            down = vy[i] > 0
            speed, y[i] = abs(vy[i]), 1 - r[i] if down else r[i]
            vy[i] = -vy[i]
            contact, kind = (x[i], float(down)), "wall"
        else:
            j = who[1]
            nx, ny = x[j] - x[i], y[j] - y[i]
            distance = math.hypot(nx, ny)
            nx, ny = nx / distance, ny / distance
            speed = (vx[i] - vx[j]) * nx + (vy[i] - vy[j]) * ny
            mi, mj = r[i] ** 2, r[j] ** 2
            # The first named is the one that comes faster: it "hits" the other.
            if vx[i] * nx + vy[i] * ny < -(vx[j] * nx + vy[j] * ny):
                who = (j, i)
            pi, pj = 2 * mj / (mi + mj) * speed, 2 * mi / (mi + mj) * speed
            vx[i], vy[i] = vx[i] - pi * nx, vy[i] - pi * ny
            vx[j], vy[j] = vx[j] + pj * nx, vy[j] + pj * ny
            contact = (x[i] + r[i] * nx, y[i] + r[i] * ny)
        if now <= begin:
            segments.clear()
        segments.append((now, (x[:], y[:], vx[:], vy[:])))
        if now >= begin - TONE_SECONDS:
            events.append((now, kind, who, speed, contact))


def camera_at(episode, times):
    """Camera offset and its velocity at `times` (s), each [F, 2] in frame widths (per second)."""
    if episode["pan"] is None:
        return np.zeros((len(times), 2)), np.zeros((len(times), 2))
    reach, *periods = episode["pan"]
    size, rate = np.array([reach, 0.4 * reach]), 2 * math.pi / np.array(periods[::2])
    angle = times[:, None] * rate + np.array(periods[1::2])
    return size * np.sin(angle), size * rate * np.cos(angle)


def render(state, size, open_sides=False):
    """Draws a state: video uint8 [F, size, size, 3], and each object's visible share [F, O]."""
    position, camera = state["position"], state["camera"]
    frames = len(position)
    centre = ((np.arange(size) + 0.5) / size).astype(np.float32)
    still = not camera.any()
    world = centre + (camera[:1] if still else camera)[:, :, None]  # [F or 1, 2, size]
    inside = np.clip((np.minimum(world, 1 - world) - EDGE) * size + 0.5, 0, 1)
    if open_sides:
        inside[:, 0] = 1
    wave = np.sin(world * np.float32(6 * math.pi))
    pattern = BACKGROUND - WALL + 0.025 * wave[:, 1, :, None] * wave[:, 0, None, :]
    grey = WALL + pattern * inside[:, 1, :, None] * inside[:, 0, None, :]
    canvas = np.empty((3, frames, size, size), np.float32)  # channels first: several times faster
    canvas[:] = grey
    flat = canvas.reshape(3, -1)

    bar = np.zeros((frames, size), np.float32)
    if state["occluder"] is not None:
        edges = state["occluder"] * size
        pixel = np.arange(size, dtype=np.float32) + 0.5
        bar = np.clip(np.minimum(pixel - edges[:, :1], edges[:, 1:] - pixel) + 0.5, 0, 1)

    visible = np.empty(position.shape[:2], np.float32)
    step = np.arange(frames)[:, None]
    for o, (shape, color) in enumerate(zip(state["shape"], state["color"])):
        # Only a patch around the object is drawn; at the frame's edge it is moved inside.
        radius = float(state["radius"][o]) * size
        reach = math.ceil(1.3 * radius) + 1
        side = min(size, 2 * reach + 1)
        at = position[:, o] * size  # [F, 2]
        corner = np.clip(np.floor(at).astype(np.int32) - reach, 0, size - side)
        grid = corner[:, :, None] + np.arange(side, dtype=np.int32)  # [F, 2, side]
        offset = grid + np.float32(0.5) - at[:, :, None]
        dx, dy = offset[:, 0, None, :], offset[:, 1, :, None]
        alpha = coverage(shape, dx, dy, radius)  # [F, side, side]
        shown = alpha * (1 - bar[step, grid[:, 0]])[:, None, :]
        visible[:, o] = np.minimum(1, shown.sum((1, 2)) / (AREA[shape] * radius**2))
        shine = None
        if MATERIALS[state["material"][o]] == "metal":
            spot = np.exp(-(((offset + 0.35 * radius) / (0.38 * radius)) ** 2))
            shine = 0.75 * spot[:, 0, None, :] * spot[:, 1, :, None]
        index = (step[:, :, None] * size + grid[:, 1, :, None]) * size + grid[:, 0, None, :]
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


def direction_of(velocity):
    """One of DIRECTIONS for a velocity or displacement (x, y): along its larger component."""
    x, y = velocity
    if abs(x) >= abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def seen(state):
    """Objects that a caption speaks of: those of which at some time at least half is in sight."""
    return [o for o in range(len(state["radius"])) if state["visible"][:, o].max() >= 0.5]


def describe(state):
    """[(color, shape, direction)] of the objects that are seen."""
    names = [(COLORS[c], SHAPES[s]) for c, s in zip(state["color"], state["shape"])]
    return [(*names[o], direction_of(state["velocity"][0, o])) for o in seen(state)]


def _thing(rng, color, shape, direction, size="", material=""):
    word = " ".join(w for w in (size, material, color, shape) if w)
    verb = ("moving", "moving", "going", "heading")[int(rng.integers(4))]
    return f"a {word} {verb} {direction}" if direction else f"a {word}"


def _together(rng, things):
    if len(things) == 1:
        return ("{}", "{}", "there is {}", "we see {}")[int(rng.integers(4))].format(things[0])
    text = ", ".join(things[:-1]) + " and " + things[-1]
    if rng.integers(3):
        return text
    word = ("objects", "shapes")[int(rng.integers(2))]
    return f"{('two', 'three')[len(things) - 2]} {word}: {text}"


def caption(state, rng, undirected=0.0):
    """A sentence on a clip: objects, mostly their directions as it begins, mostly the first event."""
    who = seen(state)
    things = {}
    vague = undirected and rng.random() < undirected
    for o, (color, shape, direction) in zip(who, describe(state)):
        r, size, material = state["radius"][o], "", ""
        if len(who) < 3 and rng.integers(3) == 0:
            size = "small" if r < 0.13 else "large" if r > 0.16 else ""
        if len(who) < (2 if size else 3) and rng.integers(3) == 0:  # few go over 96 bytes
            material = MATERIALS[state["material"][o]]
        things[o] = _thing(rng, color, shape, "" if vague and rng.integers(4) else direction, size, material)
    if rng.integers(10) < 7:
        for event in state["events"]:
            if event["kind"] == "turn" or not set(event["objects"]) <= set(who):
                continue
            first, *hit = event["objects"]
            rest = [things[o] for o in who if o not in event["objects"]]
            after = {0: "", 1: " and {}", 2: ", {} and {}"}[len(rest)].format(*rest)
            if hit:
                verb = ("hits", "bumps into", "collides with")[int(rng.integers(3))]
                return f"{things[first]} {verb} {things[hit[0]]}{after}"
            wall = ("bounces off", "hits")[int(rng.integers(2))]
            x, y = event["position"]
            place = "wall" if min(x, 1 - x) < min(y, 1 - y) else "floor" if y > 0.5 else "ceiling"
            return f"{things[first]} {wall} the {place}{after}"
    return _together(rng, list(things.values())) if who else "an empty box"


def prompts(seed, n, objects=1, shapes=SHAPES, colors=COLORS):
    """n sentences of the captions' grammar, without events, and what they ask for:
    [{'text': str, 'objects': [{'color', 'shape', 'direction'}]}]."""
    rng = np.random.default_rng([seed, objects, 77])
    out = []
    for _ in range(n):
        asked = []
        for c in rng.permutation(len(colors))[:objects]:
            shape, direction = shapes[rng.integers(len(shapes))], DIRECTIONS[rng.integers(4)]
            asked.append({"color": colors[c], "shape": shape, "direction": direction})
        out.append({"text": _together(rng, [_thing(rng, **a) for a in asked]), "objects": asked})
    return out
