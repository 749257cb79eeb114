"""Random damage to the files that a run reads back: `python -m tests.soak damage --count=2000`.

Each damaged file must be refused with one line, or lead to the same values as the whole file: an older checkpoint is
used, or the file is made again.
"""

import collections
import logging
import random
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tests import tiny
from tests.helpers import digest
from vdm_jax.errors import UserError
from vdm_jax.run import checkpoint, record, storage
from vdm_jax.run import folder as run_folder
from vdm_jax.system import latents
from vdm_jax.system.layout import STAGES, layout

SHAPES = {"a": jax.ShapeDtypeStruct((8, 9), np.float32), "b": jax.ShapeDtypeStruct((3,), np.float32)}
STATISTICS = {m: dict.fromkeys(("mean", "std"), jax.ShapeDtypeStruct((4,), np.float32)) for m in ("video", "audio")}
DENOISER = SimpleNamespace(encoder_shapes={"statistics": STATISTICS})
SYSTEM = SimpleNamespace(
    param_shapes=dict.fromkeys(STAGES, SHAPES), stages={"denoiser": DENOISER}, parts={}, published=None
)
CLIPS = {"z": jax.ShapeDtypeStruct((4, 5), np.float16)}
CONTENTS = (b"", b"{}", b"[]", b"null", b"NaN", b"\xff\xfe", b"0" * 100)
# A group is what matches a pattern in the folder of `make`, and is read as a whole.
GROUPS = ("run/*.json*", "run/clip", "run/denoiser/statistics.json", "run/denoiser/latents", "out")


class MadeAgain(Exception):
    """The file is not used, and the run makes it again."""


def state(step, seed):
    params = values(SHAPES, seed + step)
    return jax.tree.map(jnp.asarray, {"step": np.int32(step), "params": params, "ema": params})


def doubled(state, step):
    """Returns the state after some training to a later step."""
    return jax.tree.map(lambda x: jnp.asarray(2 * np.asarray(x)), state) | {"step": jnp.asarray(np.int32(step))}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def values(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.uniform(0.5, 2, x.shape).astype(x.dtype), shapes)


def config_of(seed):
    config = tiny.get_config()
    with config.unlocked():
        config.seed = seed
        return config


def fingerprint(seed):
    return {"weights": str(seed), "data": "", "settings": "settings"}


def make(folder, seed):
    """Writes a run with two checkpoints of a stage, statistics and encoded clips, and exported weights."""
    run, params = epath.Path(folder / "run"), values(SYSTEM.param_shapes, seed)
    statistics = values(STATISTICS, seed)
    with run_folder.exclusive_lock(run), checkpoint.manager(run / "clip" / "checkpoints", seed) as checkpoints:
        record.begin(run, seed, config_of(seed))  # the number of the run is the seed
        record.append(run, seed, {}, {"log_every": [1, 3]})
        for step in (4, 8):
            checkpoint.save(checkpoints, state(step, seed))
        checkpoint.finish(checkpoints)
    clips = run / "denoiser" / "latents"
    latents._make_current(clips, fingerprint(seed), None)
    mark = latents._mark(storage.read_json(clips / latents.FINGERPRINT, ""))
    for part in (0, 1):
        made = [values(CLIPS, seed + part)]
        first = part * latents.CLIPS_PER_FILE
        latents._write(clips / f"clips_0000{part}.npy", made, latents._record(CLIPS), first, 4, mark)
    run_folder.write_statistics(run / run_folder.STATISTICS, statistics, params, seed)
    system = SimpleNamespace(config=config_of(seed), parts={})
    weights = run_folder.Weights(system, params | {"statistics": statistics}, dict.fromkeys(STAGES, 8))
    run_folder.write_exported(epath.Path(folder / "out"), weights, run)


def read(folder, group, seed):
    """Returns a digest of what a run reads from a group of files. Raises UserError or MadeAgain."""
    run = epath.Path(folder / "run")
    if group == "run/*.json*":
        config = run_folder.read_system(run, lambda config: layout(config) and config)
        return {key: value for key, value in config.to_dict().items() if key in config_of(seed)}
    if group == "run/clip":
        checkpoint.quarantine_damaged(run / "clip" / "checkpoints", seed)
        with checkpoint.manager(run / "clip" / "checkpoints") as checkpoints:
            return digest(checkpoint.restore(checkpoints, abstract(state(0, 0))))
    if group == "run/denoiser/statistics.json":
        params = values(SYSTEM.param_shapes, seed)
        return digest(latents._statistics(SYSTEM, params, None, run / run_folder.STATISTICS, seed))
    if group == "run/denoiser/latents":
        clips = run / "denoiser" / "latents"
        latents._make_current(clips, fingerprint(seed), None)
        paths = [clips / f"clips_0000{part}.npy" for part in (0, 1)]
        if not all(path.exists() for path in paths):
            raise MadeAgain
        mark = latents._mark(storage.read_json(clips / latents.FINGERPRINT, ""))
        numbers = [part * latents.CLIPS_PER_FILE + i for part in (0, 1) for i in range(4)]
        return digest(latents.Encoded(paths, CLIPS, 2 * latents.CLIPS_PER_FILE, mark).take(numbers))
    weights = run_folder.load(folder / "out", lambda config: SimpleNamespace(config=config, **vars(SYSTEM)))
    return digest(weights.params) + weights.system.config.to_json(sort_keys=True) + str(weights.steps)


def flip(draw, data, low, high):
    """Flips a bit of a byte that lies at a share of the length between `low` and `high`."""
    data = bytearray(data or b"\0")
    data[int(draw.uniform(low, high) * len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def replace_number(draw, data, text):
    """Replaces a number in a text by `text`."""
    found = draw.choice(list(re.finditer(rb"[\d.]+", data)) or [re.search(b"", data)])
    return data[: found.start()] + text + data[found.end() :]


def damage(draw, folder, group, other):
    """Damages one file of a group. other: the folder of another run. Returns what was done, for a message."""
    found = list(folder.glob(group))
    files = sorted(path for top in found for path in [top, *top.rglob("*")] if path.is_file())
    path = draw.choice(files)
    data, name = path.read_bytes(), path.relative_to(folder)
    kind = draw.randrange(13)
    if kind == 0:
        path.unlink()
        draw.choice((lambda: None, path.mkdir, lambda: path.symlink_to("nowhere")))()
        return f"{name} is missing, a folder or a dangling link"
    if kind == 1 and (folder / "run/clip/checkpoints").exists() and group == "run/clip":
        checkpoints, step = folder / "run/clip/checkpoints", draw.choice(("4", "8"))
        draw.choice((shutil.copytree, shutil.move))(checkpoints / step, checkpoints / draw.choice(("2", "6", "12")))
        return f"{step} has another number"
    if kind == 2:
        path.write_bytes((other / name).read_bytes() if (other / name).is_file() else b"")
        return f"{name} is another run's"
    cut = draw.choice((1, len(data) // 2, len(data)))
    contents = (
        lambda: data[: len(data) - cut],
        lambda: data + draw.randbytes(draw.choice((1, 50))),
        lambda: flip(draw, data, 0, 0.1),
        lambda: flip(draw, data, 0, 1),
        lambda: flip(draw, data, 0.9, 1),
        lambda: flip(draw, flip(draw, data, 0, 1), 0, 1),
        lambda: bytes(len(data)),
        lambda: draw.choice(CONTENTS),
        lambda: replace_number(draw, data, draw.choice((b"null", b"NaN", b"1e999", b"7", b"[]", b"{}"))),
        lambda: draw.choice(files).read_bytes(),
    )
    path.write_bytes(contents[max(0, kind - 3)]())
    return f"{name}, damage {kind}"


def trials(count, seed, folder):
    """Damages a fresh copy of a tiny run `count` times. Returns {(group, outcome): times}."""
    whole, other, draw = folder / "whole", folder / "other", random.Random(seed)
    counts = collections.Counter()
    make(whole, 1)
    make(other, 2)
    older = digest(state(4, 1))
    measured, latents.measure = latents.measure, made_again
    logging.disable(logging.CRITICAL)
    try:
        right = {group: read(whole, group, 1) for group in GROUPS}
        for turn in range(count):
            run, group = folder / "damaged", GROUPS[turn % len(GROUPS)]
            shutil.rmtree(run, ignore_errors=True)
            (run / group).parent.mkdir(parents=True)
            for path in whole.glob(group):
                (shutil.copytree if path.is_dir() else shutil.copy2)(path, run / path.relative_to(whole))
            done = damage(draw, run, group, other)
            try:
                found = read(run, group, 1)
                if found == right[group]:
                    outcome = "the same"
                else:
                    assert group == "run/clip" and found == older, f"trial {turn}: {done}: other values, and no word"
                    assert (run / "run/clip/damaged").exists() or not (run / "run/clip/checkpoints/8").exists()
                    outcome = "the older checkpoint"
            except MadeAgain:
                outcome = "made again"
            except UserError as error:
                assert "\n" not in str(error), f"trial {turn}: {done}: {error}"
                outcome = "refused"
            except Exception as error:
                raise AssertionError(f"trial {turn}: {done}: {error!r}") from error
            counts[group, outcome] += 1
            if turn % 200 == 199:
                print(turn + 1, flush=True)
    finally:
        latents.measure = measured
        logging.disable(logging.NOTSET)
    return counts


def made_again(*arguments):
    raise MadeAgain
