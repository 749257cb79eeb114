"""Records an episode of Doom in a process of its own: ViZDoom's engine, the levels of Freedoom, a player that wanders.

    python -m vdm_jax.data.doom_engine < REQUEST.json      writes EPISODE into the working folder

The engine handles signals itself and may crash, so the process that trains never loads it. One process records one
episode: nothing of an episode before it can change the next one. `Doom` in doom.py starts these processes.

Time is counted in tics of the engine, 1/35 s. Frame k shows tic floor(35 k / fps). Its buttons are held from this tic
to that of the next frame, and the sound of [k / fps, (k + 1) / fps) belongs to it.
"""

import dataclasses
import json
import os
import sys

import numpy as np

from vdm_jax.data import media
from vdm_jax.data.doom_captions import MONSTERS
from vdm_jax.data.rates import rational, sample_count
from vdm_jax.errors import UserError

EPISODE = "episode.npz"
TICS = 35  # a second
RATE = 22050  # Hz, of the engine's sound
SAMPLES_PER_TIC = RATE // TICS
WIDTH = 320  # pixels of the engine's picture, 4:3
BUTTONS = {  # name of the button -> ViZDoom's
    "forward": "MOVE_FORWARD",
    "backward": "MOVE_BACKWARD",
    "turn_left": "TURN_LEFT",
    "turn_right": "TURN_RIGHT",
    "strafe_left": "MOVE_LEFT",
    "strafe_right": "MOVE_RIGHT",
    "fire": "ATTACK",
    "use": "USE",
}
WEAPON_CHANCES = {1: 0.1, 2: 0.25, 3: 0.3, 4: 0.15, 5: 0.1, 6: 0.1}  # slot: chance
# Monsters that are put before the player: name, chance.
SUMMONED = {"Zombieman": 0.3, "ShotgunGuy": 0.2, "DoomImp": 0.25, "Demon": 0.15, "Cacodemon": 0.05, "HellKnight": 0.05}
ACTIONS = (  # of each, one is drawn: name of a button or "", chance
    {"": 0.2, "forward": 0.56, "backward": 0.08, "strafe_left": 0.08, "strafe_right": 0.08},
    {"": 0.5, "turn_left": 0.25, "turn_right": 0.25},
    {"": 0.72, "fire": 0.18, "use": 0.1},
)
VARIABLES = {  # name in the state -> ViZDoom's
    "health": "HEALTH",
    "weapon": "SELECTED_WEAPON",
    "ammo": "SELECTED_WEAPON_AMMO",
    "hits": "HITCOUNT",
    "hits_taken": "HITS_TAKEN",
    "kills": "KILLCOUNT",
    "x": "POSITION_X",
    "y": "POSITION_Y",
    "z": "POSITION_Z",
    "angle": "ANGLE",
}
MONSTER_CHANCE = 0.7  # that a scene begins with a monster in front of the player, beside those of the level
LEAST_WIDTH = 10  # pixels; what is seen narrower than this is not told
LEAST_MOVE = 4  # units of the map in a frame; a player that walks and moves less is stuck
WARM_UP = 18  # tics in a new place before it is recorded, in which the weapon is raised


@dataclasses.dataclass(frozen=True)
class Request:
    """What an episode follows from."""

    seed: tuple  # whole numbers
    levels: tuple  # names of levels to choose from
    scenes: int  # an episode has so many scenes, each in a place of its own
    frames: int  # of a scene
    size: tuple  # height and width of a frame, in pixels
    fps: float  # frames a second
    sample_rate: int  # of the sound, in Hz


def tic_of(frame, fps):
    """Returns the tic that a frame shows."""
    return int(frame * TICS / rational(fps))


def open_game(level, seed):
    """Returns a DoomGame of a level that has begun: without a window, and with its sound in a buffer."""
    import vizdoom

    game = vizdoom.DoomGame()
    game.set_doom_game_path(os.path.join(os.path.dirname(vizdoom.__file__), "freedoom2.wad"))
    game.set_doom_map(level)
    game.set_doom_skill(2)
    game.set_seed(seed)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_window_visible(False)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_render_hud(False)
    game.set_render_crosshair(False)
    game.set_render_messages(False)
    game.set_render_screen_flashes(False)  # the tint of pain would hide the scene for seconds
    game.set_labels_buffer_enabled(True)
    game.set_objects_info_enabled(True)
    game.set_sound_enabled(True)
    game.set_audio_buffer_enabled(True)
    game.set_audio_sampling_rate(vizdoom.SamplingRate.SR_22050)
    game.set_audio_buffer_size(TICS)  # tics: more than a frame lasts
    selects = [f"SELECT_WEAPON{slot}" for slot in WEAPON_CHANCES]
    game.set_available_buttons([getattr(vizdoom.Button, name) for name in (*BUTTONS.values(), *selects)])
    game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in VARIABLES.values()])
    game.set_episode_timeout(0)
    game.add_game_args("+snd_efx 0 +sv_cheats 1")  # with effects the engine is silent
    game.init()
    return game


class Player:
    """Draws what the player does: it wanders, turns to what it sees, and fires at it.

    An action lasts some frames, so that a clip of two seconds has one to four of them.
    """

    def __init__(self, rng):
        self.rng = rng
        self.left = 0  # frames until the next action is drawn
        self.held = set()  # names of buttons

    def buttons(self, monsters, stuck):
        """Returns the names of the buttons that are held in the next frame.

        monsters: the widths and centers of the monsters in sight, from 0 at the left to 1 at the right: [(width, x)]
        stuck: whether the player walked and did not move
        """
        rng = self.rng
        if stuck:
            self.left, self.held = int(rng.integers(3, 7)), {str(rng.choice(["turn_left", "turn_right"]))}
        elif self.left == 0:
            self.left = int(rng.integers(3, 9))
            drawn = [str(rng.choice([*chances], p=[*chances.values()])) for chances in ACTIONS]
            self.held = set(drawn) - {""}
        self.left -= 1
        held = set(self.held)
        if monsters:
            _, x = max(monsters)
            held -= {"turn_left", "turn_right", "use"}
            if abs(x - 0.5) > 0.08:
                held |= {"turn_left" if x < 0.5 else "turn_right"}
            else:
                held |= {"fire"}
        return held


def record(request):
    """Returns an episode, a dict of arrays; L is scenes * frames, and A the number of BUTTONS:

    video    uint8 [L, H, W, 3]
    audio    float32 [samples of L frames], in [-1, 1]
    control  float32 [L, A], 1 where a button is held
    shots    float32 [L], fired in a frame; none with the chainsaw
    health, weapon, ammo, hits, hits_taken, kills, x, y, z, angle   float32 [L], when the frame is shown
    objects  uint8, the JSON text of a list for each frame: the things in sight, [name, left, top, width, height], in
             pixels of 320 x 240
    level    its name
    """
    rng = np.random.default_rng(request.seed)
    level = str(rng.choice(request.levels))
    game = open_game(level, int(rng.integers(2**31)))
    begin(game)
    scenes = []
    while len(scenes) < request.scenes:
        try:
            scenes.append(record_scene(game, request, rng))
        except LevelLeft:
            game.new_episode()
            begin(game)
    game.close()
    if not any(scene["audio"].any() for scene in scenes):
        raise UserError("the engine of Doom gives no sound: check that OpenAL is installed, as docs/data.md tells")
    objects = json.dumps([seen for scene in scenes for seen in scene.pop("objects")]).encode()
    episode = {name: np.concatenate([scene[name] for scene in scenes]) for name in scenes[0]}
    return episode | {"objects": np.frombuffer(objects, np.uint8), "level": np.array(level)}


class LevelLeft(Exception):
    """The player has found the exit of the level."""


def begin(game):
    """Makes the player of a level that has just begun immortal, and gives it all weapons."""
    for command in ("buddha", "give weapons", "cl_showsecretmessage 0"):
        game.send_game_command(command)


def record_scene(game, request, rng):
    """Returns one scene as a dict, see `record`: the player is put to a random place of the level and wanders.

    Raises LevelLeft.
    """
    frames = {name: [] for name in ("video", "control", "shots", "objects", *VARIABLES)}
    sounds, held = [], set()

    def hold(buttons, tics):
        game.make_action([float(name in buttons) for name in (*BUTTONS, *WEAPON_CHANCES)], tics)
        if game.is_episode_finished():
            raise LevelLeft
        return game.get_state()

    things = [(o.position_x, o.position_y) for o in game.get_state().objects if o.name != "DoomPlayer"]
    if things:
        x, y = things[rng.integers(len(things))]
        game.send_game_command(f"warp {x:.0f} {y:.0f}")
    for cheat in ("give health", "give ammo"):
        game.send_game_command(cheat)
    hold({str(rng.choice(["turn_left", "turn_right"]))}, int(rng.integers(1, 50)))
    hold({int(rng.choice([*WEAPON_CHANCES], p=[*WEAPON_CHANCES.values()]))}, 2)
    if rng.random() < MONSTER_CHANCE:
        game.send_game_command(f"summon {rng.choice([*SUMMONED], p=[*SUMMONED.values()])}")
    state = hold(set(), WARM_UP)

    player = Player(rng)
    for k in range(request.frames):
        now = dict(zip(VARIABLES, state.game_variables))
        seen = [
            [o.object_name, o.x, o.y, o.width, o.height]
            for o in state.labels
            if o.object_name != "DoomPlayer" and o.width >= LEAST_WIDTH
        ]
        moved = np.hypot(now["x"] - frames["x"][-1], now["y"] - frames["y"][-1]) if k else 0
        monsters = [(width, (left + width / 2) / WIDTH) for name, left, _, width, _ in seen if name in MONSTERS]
        held = player.buttons(monsters, stuck="forward" in held and moved < LEAST_MOVE)
        frames["video"].append(media.fit(state.screen_buffer, request.size))
        frames["control"].append([name in held for name in BUTTONS])
        frames["objects"].append(seen)
        for name, value in now.items():
            frames[name].append(value)
        tics = tic_of(k + 1, request.fps) - tic_of(k, request.fps)
        state = hold(held, tics)
        sounds.append(state.audio_buffer[-tics * SAMPLES_PER_TIC :].copy())
        after = dict(zip(VARIABLES, state.game_variables))
        frames["shots"].append(max(0, now["ammo"] - after["ammo"]) if now["weapon"] == after["weapon"] else 0)
    # The last frame may end within a tic.
    sounds.append(hold(set(), 1).audio_buffer[-SAMPLES_PER_TIC:].copy())
    sound = np.concatenate(sounds).astype(np.float32).mean(1) / 32768
    sound = media.resample(sound, RATE, request.sample_rate)[
        : sample_count(request.frames, request.fps, request.sample_rate)
    ]
    sound = sound.clip(-1, 1)
    scene = {name: np.array(frames[name], np.float32) for name in ("control", "shots", *VARIABLES)}
    return scene | {"video": np.stack(frames["video"]), "audio": sound, "objects": frames["objects"]}


def main():
    os.environ["ALSOFT_DRIVERS"] = "null"  # no sound card is needed
    request = json.load(sys.stdin)
    np.savez(EPISODE, **record(Request(**request)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
