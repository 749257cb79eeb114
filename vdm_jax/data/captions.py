"""The words of the procedural world: a clip's state becomes an English sentence.

A state is the dict that `World` returns with a clip (see world.py); its 'shape', 'color' and 'material' are indices
into the names below.
"""

import difflib
import itertools

import numpy as np

from vdm_jax.data import wordings

SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow", "magenta", "cyan")
MATERIALS = ("rubber", "metal")
DIRECTIONS = ("left", "right", "up", "down")

# Groups of words for hard negatives, with synonyms: ("red|crimson|scarlet", ...)
COLOR_WORDS = tuple("|".join(wordings.WORDS[color]) for color in COLORS)
SHAPE_WORDS = tuple("|".join(wordings.WORDS[shape]) for shape in SHAPES)
DIRECTION_WORDS = (*wordings.DIRECTIONS, *zip(*wordings.VERTICAL.values()))

PLAIN = frozenset(  # words of a caption without wordings.py
    [*SHAPES, *COLORS, *MATERIALS, *DIRECTIONS]
    + "a an empty small large moving going heading there is we see two three objects shapes and".split()
    + "hits bumps into collides with bounces off the wall floor ceiling".split()
)
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


def caption(state, rng, undirected=0.0, wording=0.0):
    """Returns a sentence about a clip: its objects, usually their directions, and usually its first impact.

    undirected: chance, in 0..1, of a sentence that may leave directions out, each with a chance of 3 in 4
    wording: chance, in 0..1, of a sentence in the words of wordings.py
    """
    indices = seen(state)
    free = wording and rng.random() < wording
    vague = undirected and rng.random() < undirected
    things, phrases = [], []
    for o, (color, shape, direction) in zip(indices, describe(state)):
        radius = state["radius"][o]
        size = material = ""
        if len(indices) < 3 and rng.integers(3) == 0:
            size = "small" if radius < SMALL else "large" if radius > LARGE else ""
        # Few captions become longer than 96 bytes: a second adjective is for single objects only.
        if len(indices) < (2 if size else 3) and rng.integers(3) == 0:
            material = MATERIALS[state["material"][o]]
        direction = "" if vague and rng.integers(4) else direction
        thing = dict(color=color, shape=shape, direction=direction, size=size, material=material)
        if not free:
            phrases.append(_noun_phrase(rng, **thing))
        elif not direction and rng.integers(4) == 0:
            thing[("color", "shape")[rng.integers(2)]] = ""
        things.append(thing)
    if not things:
        return "an empty box"
    impact = _first_impact(state, indices) if rng.integers(10) < 7 else None
    if free:
        return wordings.draw(rng, things, impact=impact)
    return _impact(rng, phrases, *impact) if impact else _list(rng, phrases)


def _first_impact(state, indices):
    """Returns the first impact of objects that are seen, as `wordings.draw` takes it, or None."""
    for event in state["events"]:
        if event["kind"] != "turn" and set(event["objects"]) <= set(indices):
            first, *hit = map(indices.index, event["objects"])
            x, y = event["position"]
            side = "wall" if min(x, 1 - x) < min(y, 1 - y) else "floor" if y > 0.5 else "ceiling"
            return first, hit[0] if hit else None, side
    return None


def prompts(seed, n, objects=1, shapes=SHAPES, colors=COLORS, held_out=False):
    """Returns n sentences of the captions' grammar, without impacts, and what each of them asks for.

    The result is [{'text': str, 'objects': [{'color', 'shape', 'direction'}]}]. `objects` is the number of objects in
    each sentence, all of different colors. held_out: sentences of wordings.py with pairs of words that training never
    sees.
    """
    rng = np.random.default_rng([seed, objects, 77])
    drawn = []
    for _ in range(n):
        things = []
        for c in rng.permutation(len(colors))[:objects]:
            shape, direction = shapes[rng.integers(len(shapes))], DIRECTIONS[rng.integers(4)]
            things.append({"color": colors[c], "shape": shape, "direction": direction})
        if held_out:
            text = wordings.draw(rng, things, held_out=True)
        else:
            text = _list(rng, [_noun_phrase(rng, **thing) for thing in things])
        drawn.append({"text": text, "objects": things})
    return drawn


def prompts_in_unknown_words(shapes=SHAPES, colors=COLORS):
    """Returns a fixed list of prompts of one object, in words that no caption has; see wordings.draw_never.

    The list has the form of `prompts`. It asks three times for each color, shape and direction, in other words each
    time: 216 prompts with all colors and shapes. Its beginning has them in nearly equal numbers.
    """
    rng, meanings = np.random.default_rng(77), [*itertools.product(colors, shapes, DIRECTIONS)]
    order = np.concatenate([rng.permutation(len(meanings)) for _ in range(3)])
    things = [dict(zip(("color", "shape", "direction"), meanings[i])) for i in order]
    return [{"text": wordings.draw_never(rng, thing), "objects": [thing]} for thing in things]


def unknown_words(text, wording):
    """Returns {word: the nearest known word, or ''} of the words in a text that no caption has.

    wording: chance of captions in the words of wordings.py; with 0 only the plain words are known
    """
    known = sorted(wordings.KNOWN if wording else PLAIN)
    nearest = {}
    for word in wordings.split(text):
        if word not in known:
            synonyms = [plain for plain, words in wordings.WORDS.items() if word in words]
            nearest[word] = next(iter(synonyms or difflib.get_close_matches(word[:30], known, n=1, cutoff=0.3)), "")
    return nearest


def _noun_phrase(rng, color, shape, direction, size="", material=""):
    """Returns 'a small metal red circle moving left'; an empty direction, size or material is left out."""
    words = " ".join(word for word in (size, material, color, shape) if word)
    verb = ("moving", "moving", "going", "heading")[rng.integers(4)]
    return f"a {words} {verb} {direction}" if direction else f"a {words}"


def _list(rng, phrases):
    """Returns one to three noun phrases as a list in words."""
    if len(phrases) == 1:
        return ("{}", "{}", "there is {}", "we see {}")[rng.integers(4)].format(phrases[0])
    text = ", ".join(phrases[:-1]) + " and " + phrases[-1]
    if rng.integers(3):
        return text
    return f"{('two', 'three')[len(phrases) - 2]} {('objects', 'shapes')[rng.integers(2)]}: {text}"


def _impact(rng, phrases, first, hit, side):
    """Returns a sentence about an impact, of noun phrases; the impact is as `wordings.draw` takes it."""
    rest = [phrase for i, phrase in enumerate(phrases) if i not in (first, hit)]
    others = ("", " and {}", ", {} and {}")[len(rest)].format(*rest)
    if hit is None:
        return f"{phrases[first]} {('bounces off', 'hits')[rng.integers(2)]} the {side}{others}"
    verb = ("hits", "bumps into", "collides with")[rng.integers(3)]
    return f"{phrases[first]} {verb} {phrases[hit]}{others}"
