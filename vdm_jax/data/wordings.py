"""How people ask for the things of the procedural world: synonyms, verbs, and sentences for one to three things.

A wording is a sentence with the pairs of words that meet in it, such as ("crimson", "ball") and ("ball", "rolling").
Some pairs are held out: training never sees them together, though it sees each word in other pairs. Sentences with a
held-out pair test whether a model understands words, or has learned sentences by heart.
"""

import re
import zlib

WORDS = {  # the plain word -> all words for it
    "circle": ("circle", "ball", "disc", "disk", "dot"),
    "square": ("square", "box", "block", "cube"),
    "triangle": ("triangle", "pyramid", "wedge"),
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald", "grass-green"),
    "blue": ("blue", "cobalt", "royal blue"),
    "yellow": ("yellow", "golden", "lemon"),
    "magenta": ("magenta", "pink", "purple", "fuchsia"),
    "cyan": ("cyan", "turquoise", "teal", "aqua"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "rubber": ("rubber", "rubbery"),
    "metal": ("metal", "metallic", "steel"),
}
VERBS = (  # participle, finite form
    ("moving", "moves"),
    ("going", "goes"),
    ("heading", "heads"),
    ("sliding", "slides"),
    ("rolling", "rolls"),
    ("traveling", "travels"),
    ("travelling", "travels"),
    ("drifting", "drifts"),
    ("flying", "flies"),
    ("gliding", "glides"),
)
DIRECTIONS = (  # ways to say left, right, up and down
    ("left", "right", "up", "down"),
    ("to the left", "to the right", "to the top", "to the bottom"),
    ("leftwards", "rightwards", "upwards", "downwards"),
    ("leftward", "rightward", "upward", "downward"),
    ("towards the left", "towards the right", "towards the top", "towards the bottom"),
    ("toward the left", "toward the right", "toward the top", "toward the bottom"),
)
NEVER = {  # the plain word -> words for it that no caption has
    "circle": ("sphere", "orb", "globe"),
    "square": ("tile", "crate", "brick"),
    "triangle": ("cone", "arrowhead", "tetrahedron"),
    "red": ("ruby", "cherry", "vermilion"),
    "green": ("jade", "lime", "shamrock"),
    "blue": ("sapphire", "navy", "ultramarine"),
    "yellow": ("canary", "mustard", "sunflower"),
    "magenta": ("orchid", "mauve", "plum"),
    "cyan": ("aquamarine", "lagoon"),
}
NEVER_VERBS = ("floating", "sailing", "racing", "creeping", "cruising", "darting")
VERTICAL = {"up": ("rising", "rises"), "down": ("falling", "falls")}  # participle, finite form
ARTICLES = ("a", "a", "a", "a", "one", "the", "")
OPENINGS = ("", "", "", "there is ", "we see ", "I see ", "here is ", "a video of ", "show me ")
JOINTS = (" and ", " and ", " and ", " while ", " as ", " with ", " next to ", ", ", "; ")
HITS = ("hits", "bumps into", "collides with", "crashes into")
BOUNCES = ("bounces off", "hits", "bumps into")
LONGEST = 126  # bytes of a sentence: with its begin and end it fills config.data.text_length = 128
HELD_OUT = 7  # one pair in this number of pairs is held out


def draw(rng, things, held_out=False, impact=None):
    """Returns a sentence about things.

    things: [{'color', 'shape', 'direction', 'size', 'material'}], plain words; '' where the sentence does not tell. The
        last two may be missing.
    held_out: True: the sentence has a held-out pair; False: it has none.
    impact: (number of the thing, number of the thing that it hits or None, 'wall', 'floor' or 'ceiling'); None for a
        sentence without an impact.
    """
    while True:
        pairs = []  # each phrase adds its pairs of words
        text = _impact(rng, things, pairs, *impact) if impact else _sentence(rng, things, pairs)
        if rng.integers(4) == 0:
            text = text[0].upper() + text[1:]
        if rng.integers(4) == 0:
            text += "."
        if len(text) <= LONGEST and held_out == any(map(is_held_out, pairs)):
            return text


def draw_never(rng, thing):
    """Returns a sentence about a thing {'color', 'shape', 'direction'}. No caption has its color, shape or verb.

    So training never sees two of its words side by side. It sees the words of the direction.
    """
    color, shape = (_pick(rng, NEVER[thing[key]]) for key in ("color", "shape"))
    where = _way(rng)[DIRECTIONS[0].index(thing["direction"])]
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape} {_pick(rng, NEVER_VERBS)} {where}"


def is_held_out(pair):
    """Whether training never sees this pair of words. Pairs of plain words are always seen."""
    plain = all(word in WORDS or word in ("moving", *DIRECTIONS[0]) for word in pair)
    return not plain and zlib.crc32(" ".join(pair).encode()) % HELD_OUT == 0


def _sentence(rng, things, pairs):
    opening, way = _pick(rng, OPENINGS), _way(rng)
    if len(things) > 2 or (len(things) == 2 and rng.integers(5) == 0):
        *phrases, last = [_phrase(rng, thing, way, False, pairs) for thing in things]
        count = f"{('two', 'three')[len(things) - 2]} {_pick(rng, ('objects', 'shapes', 'things'))}: "
        return (count if rng.integers(2) else "") + ", ".join(phrases) + " and " + last
    joint = _pick(rng, JOINTS)
    finite = (not opening, joint in (" while ", " as "))
    phrases = [_phrase(rng, thing, way, own, pairs) for thing, own in zip(things, finite)]
    if len(things) == 2 and all(thing["direction"] for thing in things):
        pairs.append((opening.strip() or "-", joint.strip()))
    return opening + joint.join(phrases)


def _impact(rng, things, pairs, first, hit, side):
    way = _way(rng)
    phrases = [_phrase(rng, thing, way, False, pairs) for thing in things]
    others = [phrase for i, phrase in enumerate(phrases) if i not in (first, hit)]
    event = f"{_pick(rng, BOUNCES)} the {side}" if hit is None else f"{_pick(rng, HITS)} {phrases[hit]}"
    return " and ".join([f"{phrases[first]} {event}", *others])


def _way(rng):
    """Returns an entry of DIRECTIONS, the plain words in more than half of the draws."""
    return DIRECTIONS[rng.integers(len(DIRECTIONS)) if rng.integers(2) else 0]


def _phrase(rng, thing, way, finite, pairs):
    """Returns a thing in words. Adds to `pairs` the pairs of words that meet in it.

    way: an entry of DIRECTIONS
    finite: whether the phrase may be a sentence of its own, such as 'a ball moves left'
    """
    color, shape, size, material = (_word(rng, thing.get(key)) for key in ("color", "shape", "size", "material"))
    noun = shape or _pick(rng, ("shape", "object", "thing"))
    if color and shape:
        pairs.append((color, noun))
    if color and rng.integers(12) == 0:
        color += _pick(rng, ("-colored", "-coloured"))
    words = " ".join(word for word in (size, material, color, noun) if word)
    article = _pick(rng, ARTICLES)
    if article == "a" and words[0] in "aeio":
        article = "an"
    text = f"{article} {words}".strip()
    direction = thing["direction"]
    if not direction:
        return text
    participle, verb = _pick(rng, VERBS) if rng.integers(2) else VERBS[0]
    where = way[DIRECTIONS[0].index(direction)]
    if direction in VERTICAL and rng.integers(5) == 0:
        (participle, verb), where = VERTICAL[direction], ""
    pairs += [(noun, participle), (participle, where)]
    own = (verb, verb, f"is {participle}") if finite else (f"that {verb}", f"which is {participle}")
    return f"{text} {_pick(rng, (participle, participle, *own))} {where}".strip()


def _word(rng, plain):
    """Returns the plain word in half of the draws, and else any word for it. Nothing stays nothing."""
    return _pick(rng, WORDS[plain]) if plain and rng.integers(2) else plain


def _pick(rng, options):
    return options[rng.integers(len(options))]


def split(text):
    """Returns the words of a text in small letters."""
    return re.findall(r"[^\W\d_]+", text.lower())


GRAMMAR = """an a one the two three objects shapes things shape object thing there is we see i here video of show me and
while as with next to that which colored coloured wall floor ceiling empty"""
FORMS = (*WORDS.values(), *VERBS, *DIRECTIONS, *VERTICAL.values(), HITS, BOUNCES)
KNOWN = frozenset(split(" ".join([GRAMMAR, *sum(FORMS, ())])))  # all words of all sentences
