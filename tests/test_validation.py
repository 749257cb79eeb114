"""What a run shows while it trains: the same numbers and files each time, and the same training with and without."""

import importlib.util
import json
import shutil
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from tests import tiny
from tests.conftest import write_run
from tests.helpers import digest, final_state
from vdm_jax import train
from vdm_jax.data import media
from vdm_jax.settings import STAGES

PROMPTS = 'validation.prompts=("a red circle moving right", {{"text": "a blue square", "seed": 3, "image": "{image}"}})'
WATCH = ["--config=tests/tiny.py:small", "--stage=denoiser", "--config.denoiser.steps=4", "--config.checkpoint_every=2"]
ONCE = ["--config.validation.every=2", "--config.validation.raw=True", "--config.sample.steps=2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run whose denoiser has not begun, and a picture."""
    folder = tmp_path_factory.mktemp("base")
    write_run(folder / "run", tiny.get_config("small"), STAGES[:3])
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(picture).save(folder / "first.png")
    return folder


@pytest.fixture
def watched(base, tmp_path_factory, command):
    """The folder of a run of 4 steps with validation on both boards."""
    folder = base / "watched"
    if not folder.exists():
        shutil.copytree(base / "run", folder)
        board = ["--config.wandb.project=tests"] if importlib.util.find_spec("wandb") else []
        done = command(train, *WATCH, *options(base), *board, f"--workdir={folder}")
        assert done.code == 0, done.err
    return folder


def options(base):
    return [*ONCE, "--config." + PROMPTS.format(image=base / "first.png")]


def lines(folder):
    return [json.loads(line) for line in (folder / "denoiser" / "validation.jsonl").read_text().splitlines()]


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_numbers_and_files_twice_and_the_same_training_without(base, watched, command, tmp_path):
    told = lines(watched)
    assert [line["step"] for line in told] == [0, 2, 4]
    levels = [-10.5, -7.5, -4.5, -1.5, 1.5, 4.5, 7.5, 10.5]
    keys = {f"{m}/{at}" for m in ("video", "audio") for at in ("mean", *(f"log_snr_{level:+.1f}" for level in levels))}
    assert set(told[0]) == {"step", *keys, *(f"raw/{key}" for key in keys)}
    for key in keys:
        assert told[0][key] == told[0][f"raw/{key}"]  # the average begins with the parameters
        assert told[0][key] != told[2][key] != told[2][f"raw/{key}"]
    for m in ("video", "audio"):
        assert np.isclose(told[0][f"{m}/mean"], np.mean([told[0][f"{m}/log_snr_{level:+.1f}"] for level in levels]))
    previews = watched / "denoiser" / "previews"
    names = {"contact_sheet.png", "spectrogram.png", *(f"{i:03d}.mp4" for i in range(4))}
    assert {f"{step}/{name}" for step in (0, 2, 4) for name in names} == set(content(previews))
    assert (previews / "0" / "000.mp4").read_bytes() == (previews / "0" / "001.mp4").read_bytes()  # EMA and raw
    assert (previews / "4" / "000.mp4").read_bytes() != (previews / "4" / "001.mp4").read_bytes()
    video, audio = media.read_video(previews / "4" / "002.mp4", fps=8, size=(16, 24), sample_rate=2000)
    assert video.shape == (5, 16, 24, 3) and np.abs(audio).max() > 0

    # Interrupted after the save of step 2 and before its validation was written.
    again = shutil.copytree(watched, tmp_path / "again")
    shutil.rmtree(again / "denoiser" / "checkpoints" / "4")
    log = again / "denoiser" / "validation.jsonl"
    log.write_text(json.dumps(told[0]) + "\n" + '{"step": 2, "vid')
    for step in ("2", "4"):
        shutil.rmtree(again / "denoiser" / "previews" / step)
    done = command(train, *WATCH, *options(base), f"--workdir={again}")
    assert done.code == 0 and any("2 of 4 steps done" in line for line in done.err), done.err
    assert lines(again) == told and content(again / "denoiser" / "previews") == content(previews)

    plain = shutil.copytree(base / "run", tmp_path / "plain")
    assert command(train, *WATCH, "--config.validation.every=0", f"--workdir={plain}").code == 0
    states = [digest(final_state(run, "denoiser", tiny.get_config("small"))) for run in (watched, again, plain)]
    assert states[0] == states[1] == states[2]
    assert not (plain / "denoiser" / "previews").exists()


def events(folder):
    """The events in the files of TensorBoard: records of (length, CRC, content, CRC)."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_tensorboard_holds_numbers_pictures_clips_and_sound(watched):
    values = {(event.step, value.tag): value for event in events(watched / "denoiser") for value in event.summary.value}
    for line in lines(watched):
        value = values[line["step"], "denoiser/validation/video/mean"]
        assert np.isclose(value.simple_value, line["video/mean"])
    sheet = values[4, "denoiser/validation/contact_sheet"].image
    folder = watched / "denoiser" / "previews" / "4"
    assert sheet.encoded_image_string == (folder / "contact_sheet.png").read_bytes()
    clip = values[4, "denoiser/validation/clip_000"].image
    assert clip.encoded_image_string.startswith(b"GIF89a") and clip.height == 256
    sound = values[4, "denoiser/validation/clip_000/sound"].audio
    assert sound.sample_rate == 48_000 and sound.length_frames >= 48_000 * 5 / 8
    assert np.frombuffer(sound.encoded_audio_string[44:], "<i2").any()


def test_weights_and_biases_holds_them_too(watched):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    (run,) = (watched / "denoiser" / "wandb").glob("offline-run-*")
    (stored,) = run.glob("*.wandb")
    store, rows = DataStore(), []
    store.open_for_scan(str(stored))
    while (data := store.scan_data()) is not None:
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    losses = [row["denoiser/loss"] for row in rows if "denoiser/loss" in row]
    assert len(losses) == 4
    means = {
        row["step"]: row["denoiser/validation/video/mean"] for row in rows if "denoiser/validation/video/mean" in row
    }
    assert means == {line["step"]: line["video/mean"] for line in lines(watched)}
    shown = [row for row in rows if "denoiser/validation/clip_000/path" in row]
    assert [row["step"] for row in shown] == [0, 2, 4]
    clip = run / "files" / shown[-1]["denoiser/validation/clip_000/path"]
    assert clip.read_bytes() == (watched / "denoiser" / "previews" / "4" / "000.mp4").read_bytes()
    assert media.probe(clip)["has_audio"]


@pytest.mark.parametrize(
    "prompts, told",
    [
        ('({"text": "x", "image": "none.png"},)', "validation.prompts: image none.png is no file: correct its path"),
        ('({"seed": 1},)', 'must be texts, or {"text", "seed"} with at most one of image, video, audio and continue'),
        ('({"text": "x", "picture": "a.png"},)', "must be texts"),
        ("(3,)", "must be texts"),
    ],
)
def test_a_prompt_that_does_not_fit_is_one_line(base, command, tmp_path, prompts, told):
    run = shutil.copytree(base / "run", tmp_path / "run")
    done = command(train, *WATCH, f"--config.validation.prompts={prompts}", f"--workdir={run}")
    assert done.code == 2 and told in done.err[-1] and done.err[-1].startswith("error: ")
