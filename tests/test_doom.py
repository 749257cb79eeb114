"""Scenes of Doom: the same bits in every process, splits without a common episode, sound with what is seen."""

import ctypes.util
import dataclasses
import hashlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from vdm_jax import train
from vdm_jax.data import batches, doom, doom_captions, doom_engine
from vdm_jax.data.doom import Doom
from vdm_jax.errors import UserError

pytest.importorskip("vizdoom", reason="the extra `doom` is not installed")
if not ctypes.util.find_library("openal"):
    pytest.skip("the sound library OpenAL is not installed: apt-get install libopenal1", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def source():
    """One episode, 16 clips."""
    return Doom(seed=3, episodes=1)


@pytest.fixture(scope="module")
def items(source):
    return [source[i] for i in range(16)]


def digest(item):
    parts = [item[name].tobytes() for name in ("video", "audio", "control")]
    return hashlib.sha256(b"".join(parts) + item["caption"].encode()).hexdigest()


def test_an_item_has_its_parts(items):
    item = items[0]
    assert item["video"].shape == (17, 48, 64, 3) and item["video"].dtype == np.uint8
    assert item["audio"].shape == (34000,) and item["audio"].dtype == np.float32 and np.abs(item["audio"]).max() <= 1
    assert item["control"].shape == (17, len(doom.CONTROL)) and set(np.unique(item["control"])) == {0, 1}
    assert item["caption"].startswith("the player ") and len(item["state"]["objects"]) == 17
    assert np.mean([np.abs(item["audio"]).max() > 0.01 for item in items]) > 0.8
    assert np.mean([item["video"].std() for item in items]) > 15  # neither black nor of one color


def test_items_of_another_process_in_another_order_are_the_same(items):
    code = (
        f"import hashlib\nfrom vdm_jax.data.doom import Doom\n{inspect.getsource(digest)}\n"
        "source = Doom(seed=3, episodes=1)\n"
        "print(*(digest(source[i]) for i in (12, 3)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [digest(items[12]), digest(items[3])], done.stderr


def test_each_clip_of_an_episode_comes_once_and_then_again(source):
    two = dataclasses.replace(source, episodes=2)
    places = [two.place(i) for i in range(64)]
    every = {(episode, clip) for episode in range(2) for clip in range(16)}
    assert set(places[:32]) == set(places[32:]) == every and places[:32] != places[32:]
    endless = dataclasses.replace(source, episodes=0)
    assert len({endless.place(i) for i in range(1024)}) == 1024


def test_clips_of_a_scene_go_on(source, items):
    """The player at the end of a clip is near where it is at the beginning of the next."""
    at = {source.place(i): item for i, item in enumerate(items)}

    def distance(a, b):
        moved = [a["state"][axis][-1] - b["state"][axis][0] for axis in "xy"]
        return np.hypot(*moved)

    within = [distance(at[e, c], at[e, c + 1]) for e in range(1) for c in range(15) if (c + 1) % doom.CLIPS]
    assert max(within) < 8 * 30  # map units: a player runs no faster than 30 a tic, and a frame lasts 5 tics
    assert len({(item["state"]["level"], item["state"]["x"][0]) for item in items}) > 4


def test_held_out_levels_are_not_in_training():
    train_split, held_out = Doom(seed=3), Doom(seed=3, split="held_out")
    assert set(train_split.levels) | set(held_out.levels) == set(doom.LEVELS)
    assert not set(train_split.levels) & set(held_out.levels)
    assert Doom(seed=3, split="held_out", episodes=1)[0]["state"]["level"] in held_out.levels


def test_a_shot_is_heard_when_its_flash_is_seen(tmp_path):
    """A pistol in a level without monsters, tic by tic."""
    code = (
        "import os; os.environ['ALSOFT_DRIVERS'] = 'null'\n"
        "import numpy as np; from vdm_jax.data import doom_engine as engine\n"
        "game = engine.open_game('MAP01', 7); engine.begin(game)\n"
        "names = [*engine.BUTTONS, *engine.WEAPON_CHANCES]\n"
        "game.send_game_command('kill monsters')\n"
        "game.make_action([float(name == 2) for name in names], 70)\n"
        "for tic in range(60):\n"
        "    game.make_action([float(name == 'fire' and tic < 3) for name in names], 1)\n"
        "    state = game.get_state()\n"
        "    sound = np.abs(state.audio_buffer[-engine.SAMPLES_PER_TIC:].astype(float)).max()\n"
        "    print(state.game_variables[2], sound, state.screen_buffer[120:].astype(float).mean())\n"
        "game.close()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    ammo, sound, light = np.array([line.split() for line in done.stdout.splitlines()], float).T
    shot = int(np.argmax(np.diff(ammo) < 0)) + 1  # the tic of the shot
    assert sound[:shot].max() < 0.1 * sound[shot : shot + 3].max(), done.stderr
    assert int(np.argmax(np.diff(light) > 1)) + 1 - shot in (0, 1)  # tics of 29 ms


def test_sound_gets_louder_where_a_shot_is_fired(items):
    louder = []
    for item in items:
        loud = np.abs(item["audio"].reshape(17, -1)).max(1)
        shots = item["state"]["shots"] > 0
        first = [k for k in np.flatnonzero(shots) if 2 <= k and not shots[k - 2 : k].any()]
        louder += [loud[k] - loud[k - 1] for k in first]
    assert len(louder) >= 3 and np.median(louder) > 0.1


def test_turns_are_those_of_the_buttons(items):
    """Left is counter-clockwise, so the angle grows. A chainsaw that hits turns the player itself."""
    left, right = doom.CONTROL.index("turn_left"), doom.CONTROL.index("turn_right")
    seen = 0
    for item in items:
        if 1 in item["state"]["weapon"]:
            continue
        turned = (np.diff(item["state"]["angle"]) + 180) % 360 - 180  # degrees, from a frame to the next
        asked = (item["control"][:, left] - item["control"][:, right])[:-1]
        assert (turned[asked == 1] > 0).all() and (turned[asked == -1] < 0).all()
        seen += (asked != 0).sum()
    assert seen > 20


def test_a_caption_tells_actions_weapon_target_and_hits():
    zombie, barrel = ["Zombieman", 100, 50, 40, 80], ["ExplosiveBarrel", 0, 50, 20, 30]
    state = dict(shots=np.zeros(4), weapon=np.full(4, 3), kills=np.zeros(4), hits=np.zeros(4), hits_taken=np.zeros(4))
    state["objects"] = [[], [zombie, barrel], [zombie], []]
    still = {name: np.zeros(4) for name in doom.CONTROL}
    assert doom_captions.caption(state, still) == "the player stands still; a zombie is in sight"
    state["shots"][1] = 1
    turning = still | {"turn_left": np.ones(4), "fire": np.ones(4)}
    assert doom_captions.caption(state, turning).endswith(" fires a shotgun at a zombie; a barrel is in sight")
    state["kills"][3] = state["hits_taken"][3] = 1
    told = "the player turns left and fires a shotgun at a zombie, which dies; the player is hit; a barrel is in sight"
    assert doom_captions.caption(state, turning) == told


def test_faults_are_one_clear_line(monkeypatch):
    with pytest.raises(UserError, match="no level 'MAP99': did you mean "):
        Doom(held_out=("MAP99",))
    with pytest.raises(UserError, match="must name some levels, but not all"):
        Doom(held_out=())
    broken = Doom(size=(0, 64))
    with pytest.raises(UserError, match="Doom's engine failed in episode "):
        broken[0]
    monkeypatch.setattr(doom, "SECONDS", 0.01)
    with pytest.raises(UserError, match="more than 0.01 s for episode"):
        Doom()[0]
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(UserError, match="apt-get install libopenal1"):
        Doom()


def test_the_source_gives_control_where_the_config_asks_for_it():
    config = tiny.get_config("doom")
    assert batches.source(config).with_control
    config.data.control = ()
    assert not batches.source(config).with_control
    config.data.control = ("jump",)
    with pytest.raises(UserError, match="data.source=doom has no control .*: set data.control="):
        batches.source(config)


def test_each_stage_trains_a_step_on_it(tmp_path, command):
    options = [f"--config={ROOT}/tests/tiny.py:doom", f"--workdir={tmp_path}/run", "--config.validation.every=1"]
    options += [f"--config.{stage}.steps=1" for stage in ("video_autoencoder", "audio_autoencoder", "clip", "denoiser")]
    done = command(train, *options)
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "denoiser" / "previews" / "1" / "000.mp4").exists()


def test_a_frame_shows_the_tic_of_its_time():
    tics = [doom_engine.tic_of(k, 8) for k in range(17)]
    assert tics[0] == 0 and tics[8] == 35 and tics[16] == 70 and set(np.diff(tics)) == {4, 5}
