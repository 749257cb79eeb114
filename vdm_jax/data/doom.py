"""Scenes of Doom, seen by a player: an endless source of clips with sound, control and the engine's state.

The engine and its levels come with the package `vizdoom`: ViZDoom and the free levels, pictures and sounds of Freedoom.
"""

import collections
import ctypes.util
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from vdm_jax.data import doom_captions
from vdm_jax.data.doom_engine import BUTTONS, EPISODE, VARIABLES
from vdm_jax.data.media import pair
from vdm_jax.data.rates import sample_count
from vdm_jax.errors import UserError, one_of

LEVELS = tuple(f"MAP{n:02d}" for n in range(1, 31))
SCENES = 4  # of an episode
CLIPS = 4  # of a scene, one after the other
GROUP = 16  # episodes whose clips are mixed
SECONDS = 300  # the longest time that an episode may take
CONTROL = tuple(BUTTONS)  # names of the columns of `control`


@dataclasses.dataclass(eq=False)
class Doom:
    """An endless source of clips. Item i follows from (seed, i) and the settings alone.

    An episode is one level and SCENES places in it. In each place the player wanders for CLIPS clips. Items come in
    groups of GROUP episodes, whose clips are mixed. The splits have other levels, so they share no episode.

    `doom[i]` is {'video': uint8 [F, h, w, 3], 'audio': float32 [F * sample_rate // fps], 'caption': str, 'control':
    float32 [F, A], 1 where a button of CONTROL is held from this frame to the next, 'state': dict}. The state is that
    of doom_engine.record, with 'objects' as a list [F] of lists.

    Raises UserError where the engine is missing or fails.
    """

    in_epochs = True  # see batches.Examples

    seed: int = 0
    split: str = "train"  # or "held_out"
    frames: int = 17  # F
    size: tuple = (48, 64)  # height and width of a frame, in pixels
    fps: float = 8  # frames per second
    sample_rate: int = 16000  # of the sound, in Hz
    held_out: tuple = ("MAP04", "MAP11", "MAP19", "MAP26")  # levels that training never sees
    with_control: bool = True  # False leaves `control` out of the items
    episodes: int = 0  # so many are recorded, and then seen again and again; 0: each is new
    cache_bytes: int = 2 << 30  # for recorded episodes; those not used for longest go first

    def __post_init__(self):
        one_of("split", self.split, ("train", "held_out"))
        for level in self.held_out:
            one_of("level", level, LEVELS)
        if not 0 < len(set(self.held_out)) < len(LEVELS):
            raise UserError(f"data.doom.held_out={self.held_out} must name some levels, but not all")
        if importlib.util.find_spec("vizdoom") is None:
            raise UserError("data.source=doom needs the package vizdoom: pip install 'vdm_jax[doom]'")
        if not ctypes.util.find_library("openal"):
            raise UserError("data.source=doom needs the sound library OpenAL: apt-get install libopenal1")
        chosen = set(self.held_out) if self.split == "held_out" else set(LEVELS) - set(self.held_out)
        self.levels = sorted(chosen)
        self._cache = collections.OrderedDict()  # {episode: dict}
        self._locks = collections.defaultdict(threading.Lock)  # of each episode, so that it is recorded once
        self._lock = threading.Lock()  # of the two dicts

    def __len__(self):
        return 2**31 - 1

    def __getitem__(self, i):
        episode, clip = self.place(i)
        recorded = self._episode(episode)
        first = clip * self.frames
        span = slice(first, first + self.frames)
        begin, end = (sample_count(n, self.fps, self.sample_rate) for n in (first, first + self.frames))
        state = {name: recorded[name][span] for name in ("shots", *VARIABLES, "objects")}
        state["level"] = recorded["level"]
        control = recorded["control"][span]
        item = {
            "video": recorded["video"][span],
            "audio": recorded["audio"][begin:end],
            "caption": doom_captions.caption(state, dict(zip(BUTTONS, control.T))),
            "state": state,
        }
        return item | {"control": control} if self.with_control else item

    def place(self, i):
        """Returns (number of the episode, number of the clip in it) of item i."""
        each = SCENES * CLIPS
        together = min(GROUP, self.episodes) if self.episodes else GROUP
        group, within = divmod(int(i), together * each)
        order = np.random.default_rng([self.seed, group, 1]).permutation(together * each)
        episode, clip = divmod(int(order[within]), each)
        number = group * together + episode
        return number % self.episodes if self.episodes else number, clip

    def _episode(self, number):
        with self._lock:
            lock = self._locks[number]
        with lock:
            with self._lock:
                if number in self._cache:
                    self._cache.move_to_end(number)
                    return self._cache[number]
            recorded = self._record(number)
            with self._lock:
                self._cache[number] = recorded
                height, width = pair(self.size)
                frame_bytes = height * width * 3 + 4 * self.sample_rate / self.fps
                kept = max(GROUP, self.cache_bytes / (SCENES * CLIPS * self.frames * frame_bytes))
                while len(self._cache) > kept:
                    del self._locks[self._cache.popitem(last=False)[0]]
            return recorded

    def _record(self, number):
        """Returns episode `number`, recorded by a process of doom_engine.py."""
        request = dict(
            seed=(self.seed, int(self.split == "held_out"), number),
            levels=self.levels,
            scenes=SCENES,
            frames=CLIPS * self.frames,
            size=pair(self.size),
            fps=self.fps,
            sample_rate=self.sample_rate,
        )
        root = Path(__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        with tempfile.TemporaryDirectory() as folder:  # the engine writes its settings there
            try:
                ended = subprocess.run(
                    [sys.executable, "-m", "vdm_jax.data.doom_engine"],
                    input=json.dumps(request).encode(),
                    cwd=folder,
                    env=environment,
                    capture_output=True,
                    timeout=SECONDS,
                )
            except subprocess.TimeoutExpired as error:
                raise UserError(
                    f"Doom's engine took more than {SECONDS} s for episode {number}: start again"
                ) from error
            if ended.returncode:
                told = ended.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {ended.returncode}"]
                raise UserError(f"Doom's engine failed in episode {number}: {told[-1][:300]}")
            with np.load(Path(folder) / EPISODE, allow_pickle=False) as stored:
                episode = dict(stored)
        objects = json.loads(episode["objects"].tobytes())
        return episode | {"objects": objects, "level": str(episode["level"])}
