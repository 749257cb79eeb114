"""Scores of coherence on true films, on films of chance, and on films with one planted fault.

    python -m tests.coherence_truth [--episodes=32] [--lengths=1,2,4,8,16,32]

True films must have at least 99 % at every length. A fault must lower the scores that LOWERED declares by 10 points or
more, and no other score by more than 2.
"""

import dataclasses

import numpy as np
from absl import app, flags

from vdm_jax.data.captions import COLORS
from vdm_jax.data.world import World, render
from vdm_jax.metrics import coherence, episodes

FPS, RATE, CLIP = 8, 8000, 17  # frames of a clip
FULL = World(seed=1_000_003, objects=(0.4, 0.35, 0.25))  # the full world, in clips that no training sees
LOWERED = {  # {fault: scores that it lowers}
    "another color behind the occluder": {"identity", "permanence"},
    "a bounce without a wall": {"cause", "heard"},
    "late sound": {"heard", "explained"},
    "a thing vanishes": {"identity"},
    "a thing comes back on the other side": {"place"},
}
KIND = {  # {fault: kind of the episodes in which it is planted}
    "another color behind the occluder": "occluder",
    "a bounce without a wall": "plain",
    "late sound": "plain",
    "a thing vanishes": "plain",
    "a thing comes back on the other side": "leave",
}


def shown(item, world, **changed):
    """The picture of a clip with another state."""
    return render({**item["state"], **changed}, world.size, item["state"]["open"])[0]


def plant(fault, world, number):
    """-> (video, audio) of a clip with a fault; None where its event does not take place."""
    item = world[number]
    state, video, audio = item["state"], item["video"], item["audio"]
    frames, visible = len(video), state["visible"]
    if fault == "late sound":
        late = RATE // 4
        return video, np.concatenate([np.zeros(late, np.float32), audio[:-late]])
    if fault == "a thing vanishes":
        position = state["position"].copy()
        position[frames // 2 :, 0] = -9
        return shown(item, world, position=position), audio
    if fault == "a bounce without a wall":
        # After a third of the film the thing runs back for three frames, and then on as if nothing had been.
        impacts = np.array([event["time"] * FPS for event in state["events"]])
        calm = [f for f in range(5, frames - 9) if not ((impacts > f - 5) & (impacts < f + 5)).any()]
        if not calm or len(state["color"]) > 1:
            return None
        f, back = calm[0], 3
        order = np.concatenate([np.arange(f + 1), f - 1 - np.arange(back), np.arange(f - back + 1, frames)])[:frames]
        sound = audio.reshape(frames, -1)
        silent = np.concatenate([sound[: f + 1], np.zeros((2 * back, sound.shape[1]), np.float32), sound[f + 1 :]])
        return shown(item, world, position=state["position"][order]), silent[:frames].ravel()
    hidden = np.flatnonzero((visible == 0).any(1))
    if not len(hidden) or len(state["color"]) > 1:
        return None
    f = hidden[0]
    if fault == "another color behind the occluder":
        other = np.array([(int(state["color"][0]) + 2) % len(COLORS)])
        return np.concatenate([video[:f], shown(item, world, color=other)[f:]]), audio
    position = state["position"].copy()
    position[f:, 0, 0] = world.size[1] / world.size[0] - position[f:, 0, 0]
    return shown(item, world, position=position), audio


def measured(world, number, video, audio, lengths, other=None):
    """What coherence.by_length says of a film. other: number of the clip that it is scored against; None: its own."""
    item = world[number if other is None else other]
    scene = coherence.scene_of(item, world.size, world.outside)
    film = coherence.read(video, audio, FPS, RATE, scene)
    return coherence.by_length(coherence.score(film, scene, FPS), CLIP, FPS, lengths)[0]


def with_fault(fault, wanted, length=2):
    """-> ({score: share} of true films, the same of films with a fault), of `wanted` films."""
    world = episodes.worlds(FULL, length * CLIP)[KIND[fault]]
    single = fault not in ("late sound", "a thing vanishes")
    world = dataclasses.replace(world, objects=(1.0,)) if single else world
    true, faulty, number = [], [], 0
    while len(true) < wanted:
        film = plant(fault, world, number)
        if film is not None:
            item = world[number]
            true.append(measured(world, number, item["video"], item["audio"], (length,)))
            faulty.append(measured(world, number, *film, (length,)))
        number += 1
    return tuple(coherence.curves(films)[0][length] for films in (true, faulty))


def true_films(count, lengths):
    """[by_length of each film] of so many episodes."""
    found = []
    for world, number in episodes.episodes(FULL, max(lengths) * CLIP, count):
        item = world[number]
        found.append(measured(world, number, item["video"], item["audio"], lengths))
    return found


def films_of_chance(count, lengths):
    """As `true_films`: each clip length shows another episode of the same kind, with the sound of a third one."""
    found = []
    for world, number in episodes.episodes(FULL, max(lengths) * CLIP, count):
        short = dataclasses.replace(world, frames=CLIP)
        parts = [short[number + 1000 * part] for part in range(1, max(lengths) + 1)]
        sounds = [short[number + 1000 * part + 500]["audio"] for part in range(1, max(lengths) + 1)]
        video = np.concatenate([part["video"] for part in parts])
        found.append(measured(world, number, video, np.concatenate(sounds), lengths))
    return found


def check(true, faulty, lowered):
    """-> (names of scores that are not as declared, {score: its fall in points}, where both films have its event)."""
    falls = {name: 100 * (x - faulty[name]) for name, x in true.items() if None not in (x, faulty[name])}
    missing = lowered - falls.keys()
    return sorted(
        missing | {name for name, fall in falls.items() if (fall < 10 if name in lowered else fall > 2)}
    ), falls


def table(films):
    found, gates = coherence.curves(films)
    for name in coherence.SCORES:
        shares = {n: row[name] for n, row in found.items()}
        cells = ["-" if x is None else f"{100 * x:5.1f} ({gates[n][name]:.2f})" for n, x in shares.items()]
        print(f"{name:12} {'  '.join(f'{cell:>12}' for cell in cells)}", flush=True)


def main(argv):
    lengths = tuple(map(int, flags.FLAGS.lengths))
    print("true films, by length in clips", lengths)
    table(true_films(flags.FLAGS.episodes, lengths))
    print("films of chance")
    table(films_of_chance(flags.FLAGS.episodes, lengths))
    for fault, lowered in LOWERED.items():
        true, faulty = with_fault(fault, flags.FLAGS.episodes)
        wrong, falls = check(true, faulty, lowered)
        print(
            f"{fault}: " + ", ".join(f"{name} -{fall:.0f}" for name, fall in falls.items() if abs(fall) > 0.5),
            "WRONG" if wrong else "as declared",
            wrong,
            flush=True,
        )


if __name__ == "__main__":
    flags.DEFINE_integer("episodes", 32, "Films of each kind of measurement.")
    flags.DEFINE_list("lengths", list(map(str, coherence.LENGTHS)), "Lengths, in clips.")
    app.run(main)
