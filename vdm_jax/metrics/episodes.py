"""Episodes of the procedural world on which coherence is measured, and how a model is measured on them.

A film begins with the first frames of a true film, and a model goes on with it. Beside it stand the true film, what the
autoencoders make of it, and a film of chance, in which each clip is of another episode.
"""

import dataclasses
import functools

import numpy as np

from vdm_jax.data.captions import COLORS
from vdm_jax.metrics import coherence, tracker

FILMS = ("truth", "autoencoder", "samples", "chance")
CHANGED = 16  # pairs of films in which one thing is removed, or has another color
# What an episode has, on purpose, so that its events take place; everything else is off. The features are chances of
# the world. "far" sends things so far outside that they are away for about two clips.
KINDS = {
    "plain": {},
    "occluder": {"occluder": 1.0},
    "leave": {"leave": 1.0},
    "far": {"leave": 1.0, "outside": 1.0},
    "gravity": {"gravity": 1.0},
    "camera": {"pan": 1.0, "light": 1.0},
}
FEATURES = ("gravity", "occluder", "leave", "pan", "light")


def worlds(world, frames):
    """Returns {kind: World} of the KINDS that a World has, with films of so many frames."""
    known = {name for name in FEATURES if getattr(world, name) > 0} | {"outside"}
    off = dict.fromkeys(FEATURES, 0.0)
    kinds = {kind: own for kind, own in KINDS.items() if set(own) <= known}
    return {kind: dataclasses.replace(world, frames=frames, **(off | own)) for kind, own in kinds.items()}


def episodes(world, frames, count, first=0):
    """Returns `count` episodes, the kinds in turn: [(World, number of the clip)]."""
    kinds = [*worlds(world, frames).values()]
    return [(kinds[i % len(kinds)], first + i) for i in range(count)]


def change(world, number, recolor):
    """Returns (the clip, the same with one thing changed, its color, its new color or None where it is removed).

    None where the episode has one thing only.
    recolor: whether the thing gets another color; else it is removed.
    """
    episode = world.episode(number)
    if len(episode["color"]) < 2:
        return None
    other, old = {**episode}, COLORS[episode["color"][-1]]
    if recolor:
        free = [color for color in range(len(COLORS)) if color not in episode["color"]]
        other["color"] = [*episode["color"][:-1], free[0]]
    else:
        other |= {name: episode[name][:-1] for name in ("x", "y", "vx", "vy", "r", "color", "shape", "material")}
    return world[number], world.show(number, other), old, COLORS[free[0]] if recolor else None


def counterfactual(films, items, old, new, size=coherence.REACH):
    """Returns {'kept', 'changed'}: [(frame, value)] of two films that should differ by one change alone.

    kept     of the frames in which the change has not yet reached another thing, those in which it is where it was
    changed  of the frames, those in which the changed thing is not there, or there in its new color

    films: Film of the clip and of the changed clip. items: the two true clips. old, new: as from `change`.
    size: frame heights, by which a thing may be elsewhere.
    """
    found, rows = {"kept": [], "changed": []}, [film.tracks for film in films]
    for o, color in enumerate(COLORS[c] for c in items[0]["state"]["color"][:-1]):
        places = [item["state"]["position"][:, o] for item in items]
        same = np.linalg.norm(places[0] - places[1], axis=-1) < 0.005
        reached = len(same) if same.all() else int(same.argmin())
        a, b = (tracks.get(color) for tracks in rows)
        for f in range(reached):
            seen = [row is not None and row["present"][f] and row["visible"][f] >= tracker.WHOLE for row in (a, b)]
            if all(seen):
                found["kept"].append((f, bool(np.linalg.norm(a["position"][f] - b["position"][f]) <= size)))
            elif any(seen):
                found["kept"].append((f, False))
    absent = ~rows[1][old]["present"] if old in rows[1] else np.ones(len(films[1].light), bool)
    if new is not None:
        hidden = items[1]["state"]["visible"][:, -1] < tracker.VISIBLE
        there = rows[1][new]["present"] if new in rows[1] else np.zeros(len(absent), bool)
        absent = absent & (there | hidden)
    found["changed"] = [(f, bool(value)) for f, value in enumerate(absent)]
    return found


# ------------------------------------------------------------------------------------------------- a model on them


def measure(pipe, world, count, lengths, seed, batched):
    """Measures a Pipeline on `count` episodes of a World -> (figures, films {'truth', 'samples': uint8 [P, F, ...]}).

    lengths: in clips of training.
    batched: batched(what, function, pipe, *arrays), see evaluate.py.

    The figures are {"truth", "autoencoder", "samples", "chance": {length: {score: Share or None}}, "gates": the same
    four, "half_life": {score: length or None}, "absences": {absence: {film: Share}}, "counterfactual": {...}}.
    """
    layout, data = pipe.system.layout, pipe.config.data
    clip, past = layout.frames, 1 + layout.f_t * (pipe.config.sample.context_frames - 1)
    chosen = episodes(world, max(lengths) * clip, count)
    items = [source[number] for source, number in chosen]
    scenes = [coherence.scene_of(item, data.size, source.outside) for item, (source, _) in zip(items, chosen)]
    true = {part: np.stack([item[part] for item in items]) for part in ("video", "audio")}
    films = {"truth": true, "autoencoder": _reconstructed(pipe, true, clip, batched)}
    films["samples"] = _continued(pipe, [item["caption"] for item in items], true, max(lengths) * clip, past, seed)
    films["chance"] = _of_chance(chosen, max(lengths), clip)

    found, gates, absences = {}, {}, {}
    for name, film in films.items():
        read = [
            coherence.score(coherence.read(video, audio, data.fps, data.sample_rate, scene), scene, data.fps)
            for video, audio, scene in zip(film["video"], film["audio"], scenes, strict=True)
        ]
        measured = [coherence.by_length(events, clip, data.fps, lengths) for events in read]
        found[name], gates[name] = coherence.curves([by_length for by_length, _ in measured])
        for absence in coherence.ABSENCES:
            share = coherence.pooled([by_absence[absence] for _, by_absence in measured])
            absences.setdefault(absence, {})[name] = share
    half_life = {}
    for name in coherence.SCORES:
        columns = (
            {length: row[name] for length, row in found[film].items()} for film in ("samples", "truth", "chance")
        )
        half_life[name] = coherence.half_life(*columns)
    figures = found | {"gates": gates, "half_life": half_life, "absences": absences}
    figures["counterfactual"] = _counterfactuals(pipe, world, past, seed)
    return figures, {name: films[name]["video"] for name in ("truth", "samples")} | {"sound": films["samples"]["audio"]}


def _reconstructed(pipe, films, clip, batched):
    """Films, encoded and decoded clip by clip."""
    out = {}
    for part, stage in (("video", "video_autoencoder"), ("audio", "audio_autoencoder")):
        x = films[part]
        size = clip if part == "video" else clip * pipe.system.layout.samples_per_frame
        remake = functools.partial(pipe.system.reconstruct, stage)
        remade = batched(f"reconstructing {part}", remake, pipe, x.reshape(-1, size, *x.shape[2:]))
        out[part] = remade.reshape(x.shape)
    return out


def _continued(pipe, prompts, films, frames, past, seed):
    """Films that the model makes from the first `past` frames of each."""
    start = films["video"][:, :past], films["audio"][:, : past * pipe.system.layout.samples_per_frame]
    video, audio, _ = pipe.rollout(prompts, frames, seed=seed, start=start)
    return {"video": video, "audio": audio}


def _of_chance(chosen, length, clip):
    """Films in which each clip shows another episode of the same kind, with the sound of a third one."""
    films = {"video": [], "audio": []}
    for source, number in chosen:
        short = dataclasses.replace(source, frames=clip)
        own = range(1, length + 1)
        films["video"].append(np.concatenate([short[number + 1000 * part]["video"] for part in own]))
        films["audio"].append(np.concatenate([short[number + 1000 * part + 500]["audio"] for part in own]))
    return {part: np.stack(x) for part, x in films.items()}


def _counterfactuals(pipe, world, past, seed):
    """{'removed', 'recolored': {'kept', 'changed', and both of true films}}, each a Share."""
    frames, data, out = 2 * pipe.system.layout.frames, pipe.config.data, {}
    plain = worlds(world, frames)["plain"]
    for title, recolor in (("removed", False), ("recolored", True)):
        changed = [found for number in range(8 * CHANGED) if (found := change(plain, number, recolor))][:CHANGED]
        if not changed:
            continue
        true, made = [], []
        for clips in zip(*(found[:2] for found in changed)):  # first the clips, then the changed clips
            true.append({part: np.stack([clip[part] for clip in clips]) for part in ("video", "audio")})
            # Both films of a pair have the same noise: what differs comes from the change.
            made.append(_continued(pipe, [clip["caption"] for clip in clips], true[-1], frames, past, seed))
        out[title] = _compared(changed, made, plain, data)
        out[title] |= {f"{key}_truth": share for key, share in _compared(changed, true, plain, data).items()}
    return out


def _compared(changed, films, world, data):
    """{'kept', 'changed'}: Shares of pairs of films.

    changed: what `change` returns, for each pair.
    films: two dicts {'video' [P, F, ...], 'audio' [P, N]}.
    """
    found = []
    for number, (*clips, old, new) in enumerate(changed):
        read = []
        for clip, film in zip(clips, films, strict=True):
            scene = coherence.scene_of(clip, data.size, world.outside)
            shown = film["video"][number], film["audio"][number]
            read.append(coherence.read(*shown, data.fps, data.sample_rate, scene))
        found.append(counterfactual(read, clips, old, new))

    def share(key):
        return coherence.pooled([(sum(value for _, value in events[key]), len(events[key])) for events in found])

    return {key: share(key) for key in ("kept", "changed")}
