import hashlib
import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from configs import common
from tests import tiny
from tests.conftest import write_run
from tests.helpers import ROOT, finish, start
from vdm_jax import prepare, train
from vdm_jax.data import batches, media, scenes, writing
from vdm_jax.data.tfds import Tfds
from vdm_jax.errors import UserError
from vdm_jax.run import storage
from vdm_jax.system.layout import STAGES
from vdm_jax.system.parts import with_hashes

FPS, RATE = 8, 2000  # of tests/tiny.py
CONFIG = f"--config={ROOT / 'tests' / 'tiny.py'}"
LEVELS = {"a": 60, "b": 130, "c": 200}


@pytest.fixture
def beam():
    return pytest.importorskip("apache_beam")


def scene(name, frames, moves=True):
    """A gray ramp of one level on average, which moves by a tenth of its width a frame."""
    ramp = np.linspace(-30, 30, 24, dtype=int)[None, :, None] + np.zeros((16, 1, 3), int)
    return np.stack([np.roll(LEVELS[name] + ramp, 2 * n * moves, axis=1) for n in range(frames)]).astype(np.uint8)


def tone(frames, hertz=200):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(frames * RATE // FPS) / RATE)).astype(np.float32)


def write(path, video, audio):
    path.parent.mkdir(parents=True, exist_ok=True)
    writing.write_mp4(path, video, audio, FPS, RATE)


@pytest.fixture
def films(tmp_path, monkeypatch):
    """A folder of known truth: a film of three scenes, its double, and a film for each reason to leave one out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "films"
    write(folder / "film.mp4", np.concatenate([scene("a", 20), scene("b", 13), scene("c", 9)]), tone(42))
    (folder / "film.txt").write_text("three scenes")
    (folder / "sub").mkdir()
    (folder / "sub" / "double.mp4").write_bytes((folder / "film.mp4").read_bytes())
    write(folder / "still.mp4", scene("a", 10, moves=False), tone(10))
    write(folder / "black.mp4", np.zeros((10, 16, 24, 3), np.uint8), tone(10))
    write(folder / "silent.mp4", scene("b", 10), None)
    (folder / "broken.mp4").write_bytes(b"no film")
    (folder / ".hidden.mp4").write_bytes((folder / "film.mp4").read_bytes())
    return folder


def content(folder):
    """{name: bytes} of the files of a data set."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def opened(folder, **settings):
    options = dict(frames=5, size=(16, 24), fps=FPS, sample_rate=RATE, seed=0, split="train", held_out="")
    return Tfds(str(folder), **{**options, "audio_key": "audio", "caption_key": "caption", **settings})


def test_the_report_is_the_truth_and_the_clips_are_the_scenes(beam, films, tmp_path, command):
    out = tmp_path / "out"
    done = command(prepare, CONFIG, f"--source={films}", f"--out={out}", "--drop=still,black,silent")
    assert done.code == 0, done.err
    assert "3 clips of 5 videos" in done.out and "--config.data.tfds.audio_key=audio" in done.out
    told = json.loads((out / "report.json").read_text())
    found, videos, clips = told["found"], told["videos"], told["clips"]
    assert (found["found"], found["used"]) == (7, 5)
    assert found["used"] + sum(group["count"] for group in found["left_out"].values()) == found["found"]
    assert videos["the same content as an earlier file"] == {"count": 1, "first": ["sub/double.mp4"]}
    assert videos["cut into clips"] == 4 and videos["unreadable"]["count"] == 0
    assert (clips["cut"], clips["kept"], clips["splits"]) == (6, 3, {"train": 3, "held_out": 0})
    assert {reason: group["first"] for reason, group in clips["dropped"].items()} == {
        "it is black": ["black.mp4 0.00-1.25 s"],
        "it is silent": ["silent.mp4 0.00-1.25 s"],
        "it stands still": ["still.mp4 0.00-1.25 s"],
    }
    assert clips["hours"] == pytest.approx(42 / FPS / 3600)
    page = (out / "report.html").read_text()
    assert "dropped, it is black" in page and "broken.mp4" in page and "sub/double.mp4" in page

    source = opened(out)
    video, sound = media.read_video(films / "film.mp4", fps=FPS, size=(16, 24), sample_rate=RATE)
    for number, (first, end) in enumerate([(0, 20), (20, 33), (33, 42)]):
        example = source.source[number]
        np.testing.assert_array_equal(example["video"], video[first:end])
        np.testing.assert_allclose(example["audio"] / 32767, sound[first * 250 : end * 250], atol=1e-4)
        assert [text.decode() for text in example["caption"]] == ["three scenes"]
        assert (example["source"], example["start"], example["end"]) == (b"film.mp4", first / FPS, end / FPS)
        assert (example["height"], example["width"], example["source_fps"]) == (256, 384, FPS)
    assert source[0]["caption"] == "three scenes" and source[0]["audio"].any()


def test_a_second_run_writes_nothing_and_other_data_or_settings_are_named(beam, films, tmp_path, command):
    out = tmp_path / "out"
    asked = CONFIG, f"--source={films}", f"--out={out}"
    assert command(prepare, *asked).code == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = command(prepare, *asked)
    assert again.code == 0 and "nothing is done" in again.out
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    for more, named in ((["--drop=still"], "other drop:"), (["--config.data.fps=4"], "other fps:")):
        refused = command(prepare, *asked, *more)
        assert refused.code == 2 and named in refused.err[-1]
    (films / "film.txt").write_text("another caption")
    refused = command(prepare, *asked)
    assert refused.code == 2 and "other videos or captions:" in refused.err[-1]
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


def test_a_killed_run_goes_on_with_the_same_bits(beam, films, tmp_path, command):
    for number in range(12):
        write(films / f"more_{number:02}.mp4", np.roll(scene("c", 60), number, axis=1), tone(60, 100 + number))
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert command(prepare, CONFIG, f"--source={films}", f"--out={whole}").code == 0
    process = start("-m", "vdm_jax.prepare", CONFIG, f"--source={films}", f"--out={out}")
    while process.poll() is None and len(list(out.glob("parts/*.json"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*.json")}
    assert 3 <= len(done) < 16 and not (out / "prepared.json").exists()
    again = command(prepare, CONFIG, f"--source={films}", f"--out={out}")
    assert any(line.endswith(f"{len(done)} of 16 videos were done before") for line in again.err)
    assert content(out) == content(whole)


def test_two_workers_make_the_same_shards_as_one(beam, films, tmp_path, command):
    one, two = tmp_path / "one", tmp_path / "two"
    assert command(prepare, CONFIG, f"--source={films}", f"--out={one}").code == 0
    workers = ("--", "--direct_num_workers=2", "--direct_running_mode=multi_processing")
    code, _, err = finish(start("-m", "vdm_jax.prepare", CONFIG, f"--source={films}", f"--out={two}", *workers))
    assert code == 0, err
    assert content(one) == content(two)


IN_A_BUCKET = """
import hashlib, json
from etils import epath
files = epath.Path("gs://bucket/clips").iterdir()
print(json.dumps({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}))
"""


def test_a_bucket_gets_the_files_that_a_disk_gets(beam, films, tmp_path, command, bucket):
    assert command(prepare, CONFIG, f"--source={films}", f"--out={tmp_path / 'out'}").code == 0
    for said in ("clips of 5 videos are in gs://bucket/clips", "nothing is done"):
        to = CONFIG, f"--source={films}", "--out=gs://bucket/clips"
        code, printed, err = finish(start("-m", "vdm_jax.prepare", *to, **bucket))
        assert code == 0 and said in printed, "\n".join(err)
    code, printed, err = finish(start("-c", IN_A_BUCKET, **bucket))
    assert code == 0, err
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in content(tmp_path / "out").items()}
    assert json.loads(printed) == expected


WITHOUT_TENSORFLOW = """
import sys
from importlib.machinery import PathFinder

def find_spec(name, path=None, target=None, find=PathFinder.find_spec):
    return None if name.partition(".")[0] in ("tensorflow", "apache_beam") else find(name, path, target)

PathFinder.find_spec = find_spec
from vdm_jax.data.tfds import Tfds
source = Tfds(sys.argv[1], frames=5, size=(16, 24), fps=8, sample_rate=2000, seed=0, split="train", audio_key="audio")
print(source[0]["video"].shape, {"tensorflow", "apache_beam"} & set(sys.modules))
"""


def test_it_opens_without_tensorflow_and_trains(beam, films, tmp_path, command):
    out = tmp_path / "out"
    assert command(prepare, CONFIG, f"--source={films}", f"--out={out}").code == 0
    code, printed, err = finish(start("-c", WITHOUT_TENSORFLOW, out))
    assert code == 0 and printed.strip() == "(5, 16, 24, 3) set()", err
    data = [f"--config.data.{key}={value}" for key, value in {"source": "tfds", "tfds.name": out}.items()]
    data += ["--config.data.tfds.audio_key=audio", "--config.audio_autoencoder.steps=2", "--stage=audio_autoencoder"]
    trained = command(train, CONFIG, f"--workdir={tmp_path / 'run'}", *data)
    assert trained.code == 0, trained.err
    lines = (tmp_path / "run" / "audio_autoencoder" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2


def test_its_rates_are_known(beam, films, tmp_path, command):
    out = tmp_path / "out"
    assert command(prepare, CONFIG, f"--source={films}", f"--out={out}").code == 0
    slow = opened(out, fps=4, sample_rate=1000)
    assert (slow.source_fps, slow.source_sample_rate) == (FPS, RATE)
    assert slow[0]["audio"].shape == (5 * 250,)
    storage.write_json(out / "prepared.json", {"fps": "8", "sample_rate": RATE})
    with pytest.raises(UserError, match="fps='8' is not a finite number"):
        opened(out)


def test_whole_files_are_held_out_and_a_prepared_data_set_is_a_source(beam, put, tmp_path, command):
    folder = put("one.mp4")
    for number in range(50):
        write(folder / f"{number:02}.mp4", scene("a", 2) + np.uint8(2 * number), None)
    first, second = tmp_path / "first", tmp_path / "second"
    done = command(prepare, CONFIG, f"--source={folder}", f"--out={first}")
    assert done.code == 0 and "--config.data.tfds.held_out=held_out" in done.out, done.err
    config = common.get_config()
    config.data.update(source="tfds", frames=2, size=(16, 24), sample_rate=RATE)
    config.data.tfds.update(name=str(first), split="train", held_out="held_out")
    counts = [batches.source(config, split).count for split in ("train", "held_out")]
    assert sum(counts) == 51 and counts[1] >= 8
    splits = "--config.data.tfds.split=train", "--config.data.tfds.held_out=held_out"
    done = command(prepare, CONFIG, f"--source=tfds:{first}", f"--out={second}", *splits)
    assert done.code == 0, done.err
    for split in ("train", "held_out"):
        before, after = (opened(path, split=split).source for path in (first, second))
        assert [x["sha256"] for x in before] == [x["sha256"] for x in after]


def test_latents_of_prepared_clips_train_a_run_elsewhere_and_other_data_are_refused(beam, films, tmp_path, command):
    recipe, clips, other, out = f"{CONFIG}:small", tmp_path / "clips", tmp_path / "other", tmp_path / "latents"
    assert command(prepare, CONFIG, f"--source={films}", f"--out={clips}").code == 0
    (films / "film.txt").write_text("another caption")
    assert command(prepare, CONFIG, f"--source={films}", f"--out={other}").code == 0
    config = tiny.get_config("small")
    config.data.update(source="tfds")
    config.data.tfds.update(name=str(clips), audio_key="audio", caption_key="caption")
    write_run(tmp_path / "encoders", with_hashes(config), STAGES[:3])
    for name in ("here", "elsewhere", "third"):
        shutil.copytree(tmp_path / "encoders", tmp_path / name)

    def options(name, data=clips):
        tfds = {"source": "tfds", "tfds.name": data, "tfds.audio_key": "audio", "tfds.caption_key": "caption"}
        return recipe, f"--workdir={tmp_path / name}", *(f"--config.data.{key}={value}" for key, value in tfds.items())

    def losses(name, *more):
        done = command(train, *options(name), "--stage=denoiser", *more)
        assert done.code == 0, done.err
        rows = (tmp_path / name / "denoiser" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["loss"] for row in rows], "\n".join(done.err)

    made = command(prepare, *options("here"), "--latents", f"--out={out}")
    assert made.code == 0, made.err
    written = content(out)
    assert set(written) == {"clips_00000.npy", "fingerprint.json", "statistics.json"}
    own, said = losses("third")
    assert "measuring latent statistics" in said
    given, said = losses("elsewhere", f"--config.denoiser.latents={out}")
    assert "measuring latent statistics" not in said and "encoding" not in said
    np.testing.assert_allclose(given, own, rtol=1e-3)

    (out / "clips_00000.npy").unlink()  # as after a kill
    assert command(prepare, *options("here"), "--latents", f"--out={out}").code == 0
    assert content(out) == written
    shutil.copytree(tmp_path / "encoders", tmp_path / "fourth")
    told = command(train, *options("fourth", other), "--stage=denoiser", "--change", f"--config.denoiser.latents={out}")
    assert told.code == 2 and f"{out} has the latents of other videos or captions: make them" in told.err[-1]


def test_clips_that_come_twice_and_long_scenes(beam, tmp_path, monkeypatch, command):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "data" / "a.mp4", np.repeat(scene("a", 1), 40, axis=0), None)
    done = command(prepare, CONFIG, f"--source={tmp_path / 'data'}", f"--out={tmp_path / 'out'}", "--max_seconds=1.25")
    assert done.code == 0, done.err
    clips = json.loads((tmp_path / "out" / "report.json").read_text())["clips"]
    assert (clips["cut"], clips["kept"]) == (4, 1)
    (group,) = clips["dropped"].values()
    assert group == {"count": 3, "first": ["a.mp4 1.25-2.50 s", "a.mp4 2.50-3.75 s", "a.mp4 3.75-5.00 s"]}


@pytest.mark.parametrize(
    "options, fault",
    [
        (["--source=absent"], "'absent' is not a folder"),
        (["--source=world"], "data.source='world' has none"),
        (["--source=tfds:absent"], "'absent'.*cannot be opened"),
        (["--source=gs://bucket/films"], "is in a bucket"),
        (["--source=DATA", "--out=floppy://a/b"], "Protocol not known: floppy"),
        (["--source=EMPTY"], "no clip is left of 0 videos"),
        (["--source=DATA", "--drop=dull"], "no --drop 'dull': did you mean"),
        (["--source=DATA", "--scene_threshold=2"], "scene_threshold"),
        (["--source=DATA", "--out=DATA"], "holds 'clip.mp4', which is no data set of prepare"),
        (["--source=DATA", "--", "direct"], "unexpected argument 'direct'"),
        (["--source=DATA", "--", "--direct_num_workers=two"], "Beam cannot use its flags"),
    ],
)
def test_wrong_input_is_one_line(beam, put, tmp_path, command, options, fault):
    folder = put("clip.mp4")
    (tmp_path / "empty").mkdir()
    out = [] if any(option.startswith("--out") for option in options) else [f"--out={tmp_path / 'out'}"]
    options = [o.replace("DATA", str(folder)).replace("EMPTY", str(tmp_path / "empty")) for o in options]
    done = command(prepare, CONFIG, *out, *options)
    assert done.code == 2
    assert len([line for line in done.err if line.startswith("error: ")]) == 1
    assert re.search(fault, done.err[-1]), done.err


def test_a_missing_beam_is_named(put, tmp_path, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    done = command(prepare, CONFIG, f"--source={put('a.mp4')}", f"--out={tmp_path / 'out'}")
    assert done.code == 2 and 'pip install -e ".[prepare]"' in done.err[-1] and not (tmp_path / "out").exists()


def test_beam_is_imported_by_prepare_alone():
    code = "import sys, vdm_jax.prepare, vdm_jax.train; assert not {'apache_beam', 'tensorflow'} & set(sys.modules)"
    code, _, err = finish(start("-c", code))
    assert code == 0, err


def test_changes_are_zero_for_motion_in_a_quarter_and_the_difference_of_levels_for_a_cut():
    video = np.zeros((3, 16, 16, 3), np.uint8)
    video[0, 2, 2], video[1, 3, 4] = 255, 255  # a point that moves inside the first quarter
    np.testing.assert_array_equal(scenes.changes(video[:2]), [0])
    np.testing.assert_allclose(scenes.changes(np.stack([video[2], video[2] + np.uint8(51)])), [0.2])
    assert not scenes.is_still(video[2:]) and scenes.is_still(video[[2, 2]])
    assert scenes.is_black(video[2:]) and not scenes.is_black(video[2:] + np.uint8(20))
    assert scenes.is_silent(np.zeros(4)) and not scenes.is_silent(np.array([0, 0.01]))
