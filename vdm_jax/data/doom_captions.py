"""A clip of Doom as an English sentence: what the player does, what it fires at, what happens, what is in sight."""

import collections

import numpy as np

WEAPONS = {  # slot of the engine -> words
    1: "chainsaw",
    2: "pistol",
    3: "shotgun",
    4: "chaingun",
    5: "rocket launcher",
    6: "plasma gun",
}
MONSTERS = {  # name of the engine -> words
    "Zombieman": "zombie",
    "ShotgunGuy": "shotgun zombie",
    "ChaingunGuy": "chaingun zombie",
    "DoomImp": "imp",
    "Demon": "demon",
    "Spectre": "spectre",
    "LostSoul": "lost soul",
    "Cacodemon": "cacodemon",
    "HellKnight": "hell knight",
    "BaronOfHell": "baron of hell",
    "Revenant": "revenant",
    "Fatso": "mancubus",
    "Arachnotron": "arachnotron",
    "PainElemental": "pain elemental",
    "Archvile": "archvile",
    "SpiderMastermind": "spider mastermind",
    "Cyberdemon": "cyberdemon",
}
THINGS = {  # the same, of what is no monster
    "ExplosiveBarrel": "barrel",
    "BurningBarrel": "burning barrel",
    "TorchTree": "dead tree",
    "BigTree": "big tree",
    "Column": "lamp",
    "TechLamp": "lamp",
    "TechLamp2": "lamp",
    "TechPillar": "pillar",
    "TallGreenColumn": "green column",
    "ShortGreenColumn": "green column",
    "TallRedColumn": "red column",
    "ShortRedColumn": "red column",
    "RedTorch": "red torch",
    "ShortRedTorch": "red torch",
    "BlueTorch": "blue torch",
    "ShortBlueTorch": "blue torch",
    "GreenTorch": "green torch",
    "ShortGreenTorch": "green torch",
    "Candelabra": "candelabra",
    "EvilEye": "evil eye",
    "FloatingSkull": "floating skull",
    "Medikit": "medical kit",
    "Stimpack": "medical kit",
    "BlueArmor": "blue armor",
    "GreenArmor": "green armor",
    "Backpack": "backpack",
    "ClipBox": "box of bullets",
    "ShellBox": "box of shells",
    "RocketBox": "box of rockets",
    "Shotgun": "shotgun on the floor",
    "SuperShotgun": "shotgun on the floor",
    "Chaingun": "chaingun on the floor",
    "RocketLauncher": "rocket launcher on the floor",
    "PlasmaRifle": "plasma gun on the floor",
}
MOVES = {  # button -> words, if it is held in this share of the frames or more
    "turn_left": "turns left",
    "turn_right": "turns right",
    "forward": "walks forward",
    "backward": "walks backward",
    "strafe_left": "steps left",
    "strafe_right": "steps right",
}
LEAST_SHARE = 0.25  # of the frames in which a button is held


def caption(state, control):
    """Returns the sentence, such as "the player turns left and fires a shotgun at a zombie, which dies".

    state: of a clip of `Doom`, see doom.py
    control: {name of a button: float [F]}
    """
    share = {name: float(np.mean(held)) for name, held in control.items()}
    does = [words for name, words in MOVES.items() if share[name] >= LEAST_SHARE]
    if "turns left" in does and "turns right" in does:
        does = ["looks around", *does[2:]]
    fires = (state["shots"] > 0) | ((np.asarray(control["fire"]) > 0) & (state["weapon"] == 1))
    target = None
    if fires.any():
        first = int(np.argmax(fires))
        weapon = WEAPONS.get(int(state["weapon"][first]), "gun")
        attack = f"attacks with {_article(weapon)}" if weapon == "chainsaw" else f"fires {_article(weapon)}"
        target = _largest(state["objects"][frame] for frame in np.flatnonzero(fires))
        does.append(attack + (f" at {_article(target)}" if target else ""))
    text = "the player " + _joined(does or ["stands still"])
    if target and state["kills"][-1] > state["kills"][0]:
        text += ", which dies"
    elif target and state["hits"][-1] > state["hits"][0]:
        text += ", which is hit"
    if state["hits_taken"][-1] > state["hits_taken"][0]:
        text += ", and is hit" if not target else "; the player is hit"
    seen = _largest(state["objects"], but=target) or _largest(state["objects"], monsters=False)
    return text + (f"; {_article(seen)} is in sight" if seen else "")


def _largest(frames, monsters=True, but=None):
    """Returns the words of what takes most of the pictures, or None. frames: lists of objects, see doom_engine.record.

    monsters: whether only monsters count, or only other things. but: words that do not count.
    """
    known, area = MONSTERS if monsters else THINGS, collections.Counter()
    for objects in frames:
        for name, _, _, width, height in objects:
            words = known.get(name)
            if words and words != but:
                area[words] += width * height
    return area.most_common(1)[0][0] if area else None


def _article(words):
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _joined(parts):
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
