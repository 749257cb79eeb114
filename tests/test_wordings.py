"""The many words of captions: every word is trained, held-out pairs of words are not, and the meaning stays."""

import re

import numpy as np
import pytest

from vdm_jax.data import captions, wordings
from vdm_jax.data.world import World
from vdm_jax.errors import UserError
from vdm_jax.system import hard_negatives

BOX = dict(objects=(0.4, 0.6), gravity=0.0, occluder=0.0, leave=0.0, pan=0.0, light=0.0)


def thing(color="red", shape="circle", direction="left", size="", material=""):
    return dict(color=color, shape=shape, direction=direction, size=size, material=material)


def named(text, names):
    """The plain words of `names` that a text tells, by any synonym."""
    return {name for name in names if re.search(rf"\b({'|'.join(wordings.WORDS[name])})\b", text.lower())}


def test_captions_tell_in_many_words_what_is_seen():
    source = World(seed=21, wordings=1.0, **BOX)
    texts = [source[i]["caption"] for i in range(600)]
    for i, text in enumerate(texts):
        assert text.isascii() and len(text) <= wordings.LONGEST and "  " not in text
        things = captions.describe(source[i]["state"])
        assert named(text, captions.COLORS) == {color for color, _, _ in things}
        assert named(text, captions.SHAPES) == {shape for _, shape, _ in things}
    assert len(set(texts)) > 580
    seen = set(wordings.split(" ".join(texts)))
    assert set(wordings.split(" ".join(word for words in wordings.WORDS.values() for word in words))) <= seen
    assert {verb for forms in wordings.VERBS for verb in forms} <= seen | {"travels"}
    assert seen <= wordings.KNOWN


def test_a_share_of_captions_is_plain():
    plain, mixed = World(seed=21, **BOX), World(seed=21, wordings=0.5, **BOX)
    known = [not captions.unknown_words(mixed[i]["caption"], 0.0) for i in range(300)]
    assert 0.45 < np.mean(known) < 0.65  # half, and a few of the others
    assert all(not captions.unknown_words(plain[i]["caption"], 0.0) for i in range(300))


def test_vague_captions_leave_out_directions_colors_or_shapes():
    source = World(seed=21, wordings=1.0, undirected=1.0, **BOX)
    told = {"color": [], "shape": [], "direction": []}
    directions = "|".join(word for way in captions.DIRECTION_WORDS for word in way)
    for i in range(400):
        item = source[i]
        if len(things := captions.describe(item["state"])) == 1:
            text = item["caption"].lower()
            told["color"].append(named(text, captions.COLORS) == {things[0][0]})
            told["shape"].append(named(text, captions.SHAPES) == {things[0][1]})
            told["direction"].append(bool(re.search(rf"\b({directions})\b", text)))
    shares = {key: np.mean(values) for key, values in told.items()}
    assert shares["direction"] < 0.35 and all(0.8 < shares[key] < 0.97 for key in ("color", "shape")), shares


def test_held_out_pairs_are_never_trained():
    rng = np.random.default_rng(0)
    pairs = [
        (color, shape)
        for name in captions.COLORS
        for color in wordings.WORDS[name]
        for kind in captions.SHAPES
        for shape in wordings.WORDS[kind]
    ]
    held_out = {pair for pair in pairs if wordings.is_held_out(pair)}
    assert 0.08 < len(held_out) / len(pairs) < 0.2
    assert not any(wordings.is_held_out((color, shape)) for color in captions.COLORS for shape in captions.SHAPES)
    for seen in (False, True):
        texts = [wordings.draw(rng, [thing("cyan", "square", "")], held_out=seen) for _ in range(200)]
        found = {pair for pair in held_out for text in texts if f" {' '.join(pair)} " in f" {text.lower()} "}
        assert bool(found) == seen


def test_prompts_with_held_out_pairs():
    drawn = captions.prompts(0, 50, 2, held_out=True)
    plain = captions.prompts(0, 50, 2)
    assert drawn == captions.prompts(0, 50, 2, held_out=True)
    for prompt in drawn:
        assert named(prompt["text"], captions.COLORS) == {o["color"] for o in prompt["objects"]}
        assert named(prompt["text"], captions.SHAPES) == {o["shape"] for o in prompt["objects"]}
    assert drawn[0]["objects"] == plain[0]["objects"] and drawn[0]["text"] != plain[0]["text"]


def test_prompts_in_words_that_no_caption_has():
    drawn = captions.prompts_in_unknown_words()
    assert len({prompt["text"] for prompt in drawn}) == len(drawn) == 216
    known = wordings.KNOWN | captions.PLAIN  # all words of all captions, as the tests above show
    for prompt in drawn:
        (asked,) = prompt["objects"]
        article, color, shape, verb, *where = prompt["text"].split()
        assert article == ("an" if color[0] in "aeiou" else "a")
        assert color in wordings.NEVER[asked["color"]] and shape in wordings.NEVER[asked["shape"]]
        assert not known & {color, shape, verb}  # so no caption has two words of a prompt that meet in a pair
        place = captions.DIRECTIONS.index(asked["direction"])
        assert " ".join(where) in {way[place] for way in wordings.DIRECTIONS}
    meanings = [tuple(prompt["objects"][0].values()) for prompt in drawn]
    assert set(map(meanings.count, meanings)) == {3} and len(set(meanings[:72])) == 72
    few = captions.prompts_in_unknown_words(shapes=("circle",), colors=("red", "green"))
    assert len(few) == 24 and {p["objects"][0]["color"] for p in few} == {"red", "green"}


@pytest.mark.parametrize(
    "caption, wrong",
    [
        (
            "A ball moving to the left and a box going to the top",
            "A ball moving to the top and a box going to the left",
        ),
        ("Red ball rises", "Red ball falls"),
        ("a ball heading up while a box slides right", "a ball heading right while a box slides up"),
        ("a ball", "a ball"),
    ],
)
def test_hard_negatives_swap_phrases(caption, wrong):
    assert hard_negatives.swap_words(caption, captions.DIRECTION_WORDS) == wrong


@pytest.mark.parametrize(
    "groups",
    [("left", "right"), (("",),), (("left|", "right"),), ((1, 2),), (("Left", "right"),), ((" left", "right"),)],
)
def test_wrong_groups_of_words(groups):
    with pytest.raises(UserError, match="clip.hard_negatives.words has the group"):
        hard_negatives.check_groups("clip.hard_negatives.words", groups)
    hard_negatives.check_groups("", (captions.COLOR_WORDS, captions.SHAPE_WORDS, *captions.DIRECTION_WORDS))


def test_chances_are_from_0_to_1():
    for value in (-1, 2.0, float("nan"), None, "x"):
        with pytest.raises(UserError, match="wordings=.* must be a chance from 0 to 1"):
            World(wordings=value)


def test_synonyms_are_no_hard_negatives():
    groups = (captions.COLOR_WORDS,)
    assert hard_negatives.swap_words("Scarlet ball, royal blue box", groups) == "Royal blue ball, scarlet box"
    wrong = {hard_negatives.swap_words(f"a crimson ball number {i}", groups) for i in range(100)}
    assert len(wrong) > 10 and not any(named(text, ["red"]) for text in wrong)


def test_unknown_words_have_a_nearest_word():
    assert captions.unknown_words("A green BOX and a dog", 0.5) == {"dog": "dot"}
    assert captions.unknown_words("a dog and a box", 0.0) == {"dog": "down", "box": "square"}
    assert captions.unknown_words("one ball that is moving left", 0.0)["ball"] == "circle"
    assert captions.unknown_words("红色", 0.0) == {"红色": ""}
    assert captions.unknown_words("", 0.0) == captions.unknown_words("a red circle moving left", 0.0) == {}
