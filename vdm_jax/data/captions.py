"""The words of the procedural world: a clip's state becomes an English sentence.

A state is the dict that `World` returns with a clip (see world.py); its 'shape', 'color' and 'material' are indices
into the names below.
"""

import numpy as np

SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow", "magenta", "cyan")
MATERIALS = ("rubber", "metal")
DIRECTIONS = ("left", "right", "up", "down")

SMALL = 0.13  # frame widths: an object of a smaller radius may be called small
LARGE = 0.16  # frame widths: an object of a larger radius may be called large


def direction_of(vector):
    """Returns the word of DIRECTIONS for the larger component of a velocity or displacement (x, y)."""
    x, y = vector
    if abs(x) >= abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def seen(state):
    """Returns the indices of the objects that a caption names: at least half of each is in sight in some frame."""
    return [o for o in range(len(state["radius"])) if state["visible"][:, o].max() >= 0.5]


def describe(state):
    """Returns [(color, shape, direction)] of the objects that are seen, the direction as the clip begins."""
    names = [(COLORS[c], SHAPES[s]) for c, s in zip(state["color"], state["shape"])]
    return [(*names[o], direction_of(state["velocity"][0, o])) for o in seen(state)]


def meaning(state):
    """Returns `describe` as a sorted tuple: clips that show the same objects and directions have the same meaning."""
    return tuple(sorted(describe(state)))


def asked(state):
    """Returns the meaning as [{'color', 'shape', 'direction'}], the form of `prompts` and of the tracker."""
    return [dict(zip(("color", "shape", "direction"), thing)) for thing in meaning(state)]


def caption(state, rng, undirected=0.0):
    """Returns a sentence about a clip: its objects, usually their directions, and usually its first impact.

    undirected: chance, in 0..1, of a sentence that may leave directions out, each with a chance of 3 in 4
    """
    indices = seen(state)
    vague = undirected and rng.random() < undirected
    things = {}
    for o, (color, shape, direction) in zip(indices, describe(state)):
        radius = state["radius"][o]
        size = material = ""
        if len(indices) < 3 and rng.integers(3) == 0:
            size = "small" if radius < SMALL else "large" if radius > LARGE else ""
        # Few captions become longer than 96 bytes: a second adjective is for single objects only.
        if len(indices) < (2 if size else 3) and rng.integers(3) == 0:
            material = MATERIALS[state["material"][o]]
        direction = "" if vague and rng.integers(4) else direction
        things[o] = _noun_phrase(rng, color, shape, direction, size, material)
    if rng.integers(10) < 7:
        for event in state["events"]:
            if event["kind"] != "turn" and set(event["objects"]) <= set(indices):
                return _impact(rng, event, things)
    return _list(rng, list(things.values())) if things else "an empty box"


def prompts(seed, n, objects=1, shapes=SHAPES, colors=COLORS):
    """Returns n sentences of the captions' grammar, without impacts, and what each of them asks for.

    The result is [{'text': str, 'objects': [{'color', 'shape', 'direction'}]}]. `objects` is the number of objects in
    each sentence, all of different colors.
    """
    rng = np.random.default_rng([seed, objects, 77])
    drawn = []
    for _ in range(n):
        things = []
        for c in rng.permutation(len(colors))[:objects]:
            shape, direction = shapes[rng.integers(len(shapes))], DIRECTIONS[rng.integers(4)]
            things.append({"color": colors[c], "shape": shape, "direction": direction})
        drawn.append({"text": _list(rng, [_noun_phrase(rng, **thing) for thing in things]), "objects": things})
    return drawn


def _noun_phrase(rng, color, shape, direction, size="", material=""):
    """Returns 'a small metal red circle moving left'; an empty direction, size or material is left out."""
    words = " ".join(word for word in (size, material, color, shape) if word)
    verb = ("moving", "moving", "going", "heading")[rng.integers(4)]
    return f"a {words} {verb} {direction}" if direction else f"a {words}"


def _list(rng, things):
    """Returns one to three noun phrases as a list in words."""
    if len(things) == 1:
        return ("{}", "{}", "there is {}", "we see {}")[rng.integers(4)].format(things[0])
    text = ", ".join(things[:-1]) + " and " + things[-1]
    if rng.integers(3):
        return text
    return f"{('two', 'three')[len(things) - 2]} {('objects', 'shapes')[rng.integers(2)]}: {text}"


def _impact(rng, event, things):
    """Returns a sentence about an impact. things: {index of an object: its noun phrase}."""
    first, *hit = event["objects"]
    rest = [phrase for o, phrase in things.items() if o not in event["objects"]]
    others = {0: "", 1: " and {}", 2: ", {} and {}"}[len(rest)].format(*rest)
    if hit:
        verb = ("hits", "bumps into", "collides with")[rng.integers(3)]
        return f"{things[first]} {verb} {things[hit[0]]}{others}"
    verb = ("bounces off", "hits")[rng.integers(2)]
    x, y = event["position"]
    side = "wall" if min(x, 1 - x) < min(y, 1 - y) else "floor" if y > 0.5 else "ceiling"
    return f"{things[first]} {verb} the {side}{others}"
