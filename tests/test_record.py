"""The settings of a run, and what its starts change. Nothing is compiled here."""

import errno
import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from etils import epath

from tests import tiny
from vdm_jax import settings, train
from vdm_jax.errors import UserError
from vdm_jax.run import checksums, folder, record, storage
from vdm_jax.settings import STAGES
from vdm_jax.system.layout import layout

CONFIG = "--config=tests/tiny.py"


@pytest.fixture
def config():
    config = tiny.get_config()
    config.unlock()
    return config


@pytest.fixture
def workdir(tmp_path, config):
    """A run after its first start."""
    workdir = epath.Path(tmp_path / "run")
    workdir.mkdir()
    folder.write_config(workdir, config, STAGES)
    return workdir


def rows(workdir):
    return [json.loads(line) for line in (workdir / record.NAME).read_text().splitlines()]


def another(row):
    """Returns a row as another run has it."""
    return json.dumps(storage.seal(storage.unseal(row) | {record.RUN: 4})).encode()


def contents(directory):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(directory).rglob("*")) if p.is_file()}


def test_each_later_start_adds_a_row(workdir, config, monkeypatch, caplog):
    assert [p.name for p in workdir.iterdir()] == ["config.json"]
    first = json.loads((workdir / "config.json").read_text())
    monkeypatch.setattr(sys, "argv", ["train.py", "--config=a b"])
    folder.write_config(workdir, config, STAGES)
    config.update(seed=3)
    config.clip.model.video.channels = (8, 32)
    config.denoiser.diffusion.patterns = {"text": 1.0}
    with caplog.at_level("INFO"):
        folder.write_config(workdir, config, STAGES)
    assert "seed: 0 before, 3 from this start on" in caplog.text
    config.seed = 4
    folder.write_config(workdir, config, STAGES)
    last = json.loads((workdir / "config.json").read_text())
    assert (first.pop(record.STARTS), last.pop(record.STARTS)) == (0, 3)
    assert first.pop(storage.CHECKSUM) != last.pop(storage.CHECKSUM) and first == last
    same, second, third = rows(workdir)
    assert same["changed"] == {} and same["command"] == "train.py '--config=a b'" and same["version"] == "0.1.0"
    assert same["steps"] == dict.fromkeys(STAGES) and same["time"].endswith("+00:00")
    assert second["changed"]["seed"] == [0, 3] and second["changed"]["clip.model.video.channels"] == [[8, 16], [8, 32]]
    assert second["changed"]["denoiser.diffusion.patterns"][1] == {"text": 1.0} and len(second["changed"]) == 3
    assert third["changed"] == {"seed": [3, 4]}
    assert folder.read_config(workdir).to_dict() == config.to_dict()


def test_a_key_that_is_no_setting_any_more_is_not_in_force(workdir, config):
    del config.data.world.gravity
    folder.write_config(workdir, config, STAGES)
    assert rows(workdir)[0]["changed"] == {"data.world.gravity": [0.0, None]}
    assert folder.read_config(workdir).to_dict() == config.to_dict()


def test_a_kill_between_the_row_and_the_config_loses_neither(workdir, config, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    config.seed = 3
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(storage, "write_json", killed)
        folder.write_config(workdir, config, STAGES)
    assert folder.read_config(workdir).seed == 3
    folder.write_config(workdir, config, STAGES)
    assert [row["changed"] for row in rows(workdir)] == [{"seed": [0, 3]}, {}]


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda lines: [lines[0][:40], lines[1]], "line 1 of .*starts.jsonl is damaged"),
        (lambda lines: [lines[0], lines[1][:-9]], "line 2 of .*starts.jsonl is damaged"),
        (lambda lines: lines[:1], "starts.jsonl has 1 of 2 lines: restore the file from a copy .train --unverified"),
        (lambda lines: [], "starts.jsonl has 0 of 2 lines"),
        (lambda lines: [lines[0], b"\xff\xfe"], "starts.jsonl is damaged .no UTF-8 text.: restore the file"),
        (lambda lines: [lines[0], lines[1].replace(b"4]", b"5]")], "line 2 of .*it differs from its checksum"),
        (lambda lines: [lines[0], b"{}"], "line 2 of"),
        (lambda lines: [lines[0], b'{"changed": {"seed": 3}}'], "line 2 of"),
        (lambda lines: [lines[0], b"[" * 100_000], "line 2 of"),
        (lambda lines: [lines[1], lines[0]], r"line 1 of .*seed was 0 before it, not 3.*restore the file from a copy"),
        (lambda lines: [lines[0], another(lines[1])], "line 2 of .*it is of another run"),
    ],
)
def test_a_damaged_row_is_told(workdir, config, damage, words):
    for config.seed in (3, 4):
        folder.write_config(workdir, config, STAGES)
    path = workdir / record.NAME
    path.write_bytes(b"".join(line + b"\n" for line in damage(path.read_bytes().splitlines())))
    before = contents(workdir)
    for call in (lambda: folder.read_config(workdir), lambda: folder.write_config(workdir, config, STAGES)):
        with pytest.raises(UserError, match=words):
            call()
    assert contents(workdir) == before


def test_what_is_lost_is_told_until_it_is_accepted(workdir, config):
    """A lost starts.jsonl, and a config.json without its checksum, its number or itself."""
    path, number = workdir / "config.json", folder.run_number(workdir)
    for config.seed in (3, 4):
        folder.write_config(workdir, config, STAGES)

    def without(*keys):
        return lambda: path.write_text(
            json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in keys})
        )

    for lose, words in (
        ((workdir / record.NAME).unlink, "starts.jsonl has 0 of 2 lines"),
        (without(storage.CHECKSUM), "config.json is damaged .it has no checksum.: restore .* --unverified"),
        (path.unlink, "config.json is missing, but .* holds a run: restore"),
    ):
        lose()
        before = contents(workdir)
        with pytest.raises(UserError, match=words):
            folder.write_config(workdir, config, STAGES)
        assert contents(workdir) == before
        known = path.exists()
        accepted = folder.write_config(workdir, config, STAGES, unverified=True)
        assert (accepted == number) == known and folder.read_config(workdir).seed == 4
        assert folder.write_config(workdir, config, STAGES) == accepted
    values = json.loads(path.read_text())
    storage.write_json(path, {k: v for k, v in values.items() if k not in (record.RUN, storage.CHECKSUM)})
    with pytest.raises(UserError, match="config.json has no number of its run"):
        folder.read_config(workdir)


def test_a_pipe_is_no_config(workdir):
    (workdir / "config.json").unlink()
    os.mkfifo(workdir / "config.json")
    with pytest.raises(UserError, match="config.json is no file"):
        folder.read_config(workdir)


def test_a_config_that_contradicts_itself_is_told(workdir):
    storage.write_json(workdir / "config.json", {"data": 3, "data.size": 3, record.RUN: 1, record.STARTS: 0})
    with pytest.raises(UserError, match="config.json is damaged"):
        folder.read_config(workdir)


def test_a_full_disk_at_a_start_loses_nothing(workdir, config, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    config.seed = 3
    (workdir / "new").mkdir()
    before = contents(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    for place in (workdir, workdir / "new"):
        with pytest.raises(UserError, match="cannot write .*: No space left"):
            folder.write_config(place, config, STAGES)
    left = contents(tmp_path)
    assert {p: x for p, x in left.items() if p.suffix != ".tmp"} == before and folder.read_config(workdir).seed == 0


def test_exported_weights_have_the_changes_of_their_run(workdir, config, tmp_path):
    out = epath.Path(tmp_path)
    record.write_changes(workdir, out)
    folder.write_config(workdir, config, STAGES)
    record.write_changes(workdir, out)
    assert not (out / record.CHANGES).exists()
    config.seed = 3
    folder.write_config(workdir, config, STAGES)
    record.write_changes(workdir, out)
    (row,) = map(json.loads, (out / record.CHANGES).read_text().splitlines())
    assert row["changed"] == {"seed": [0, 3]} and set(row) == {"time", "version", "steps", "changed"}


REFUSED = {  # options of a start in a finished run -> what the line says
    "--config.denoiser.diffusion.target=x0": "denoiser.diffusion.target='v', and what it has saved has no meaning",
    "--config.denoiser.diffusion.log_snr_max=9": "denoiser.diffusion.log_snr_max=12.0, and what it has saved",
    "--config.audio_autoencoder.model.latent_channels=8": "audio_autoencoder.model.latent_channels=4, and what it has",
    "--config.data.fps=4": "data.fps=8.0, and what it has saved has no meaning with 4.0",
    "--config.data.text_length=64": "data.text_length=96, and what it has saved",
    "--config.data.frames=9": "data.frames=5, and what it has saved",
    "--config.clip.optimizer=muon": "clip.optimizer='adamw', and what it has saved",
    "--config.clip.learning_rate=1": "clip.learning_rate=0.002, now 1.0): give --change",
    "--config.clip.learning_rate=nan": "clip.learning_rate=nan must be a finite number above 0",
    "--config.seed=1": "seed=0, now 1): give --change",
    "--config.data.world.pan=1": "data.world.pan=0.0, now 1.0): give --change",
    "--config.clip.steps=7": "clip.steps=7, but 8 steps are done in",
}
ALLOWED = {  # -> the changes in the record
    ("--config.log_every=3", "--config.sample.steps=2"): {"log_every": [1, 3], "sample.steps": [4, 2]},
    ("--config.clip.steps=9",): {"clip.steps": [8, 9]},
    ("--config.seed=1", "--change"): {"seed": [0, 1]},
    ("--config.clip.ema=0.5", "--stage=denoiser"): {},
}


class WithoutModels:
    """A System that checks settings, and builds no models."""

    def __init__(self, config):
        self.config, self.layout, self.parts = config, layout(config), {}
        self.stages = dict.fromkeys(STAGES, SimpleNamespace(clip_frames=config.data.frames))

    def in_buckets(self, name):
        return [self]

    def check_batch(self, *arguments):
        pass

    check_mesh = check_batch


@pytest.fixture
def finished(workdir, monkeypatch):
    """A run whose stages have all taken their eight steps. Its starts train nothing."""
    monkeypatch.setattr(train, "build", WithoutModels)
    monkeypatch.setattr(train, "train_phase", lambda *arguments: True)
    monkeypatch.setattr(folder, "done_step", lambda workdir, stage: 8)
    (workdir / "denoiser").mkdir()
    for name in ("lock", folder.STATISTICS):
        (workdir / name).touch()
    return workdir


@pytest.mark.parametrize("option, words", REFUSED.items())
def test_a_refused_start_changes_nothing(command, finished, option, words):
    before = contents(finished)
    done = command(train, CONFIG, f"--workdir={finished}", option)
    assert done.code == 2 and len(done.err) == 1 and words in done.err[0]
    assert contents(finished) == before


@pytest.mark.parametrize("options, changed", ALLOWED.items())
def test_an_allowed_change_is_told_and_in_force(command, finished, options, changed):
    done = command(train, CONFIG, f"--workdir={finished}", *options)
    assert done.code == 0, done.err
    (row,) = rows(finished)
    assert row["changed"] == changed and row["steps"] == dict.fromkeys(STAGES, 8)
    for key, (old, new) in changed.items():
        assert any(f"{key}: {old!r} before, {new!r} from this start on" in line for line in done.err)
    assert record.of(folder.read_config(finished)) == record.of(tiny.get_config()) | {
        k: v[1] for k, v in changed.items()
    }


def test_other_videos_and_another_teacher_are_told(command, finished, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(train.batches, "source", lambda config, **options: None)  # it would decode the videos
    clips, teacher = tmp_path / "clips", tmp_path / "teacher"
    clips.mkdir()
    teacher.mkdir()
    options = ["--config.data.source=files", f"--config.data.path={clips}"]
    options += [f"--config.denoiser.distillation.teacher={teacher}"]

    def write(path, content):
        path.write_bytes(content)
        checksums.write(teacher)

    def start(*more):
        return command(train, CONFIG, f"--workdir={finished}", *options, *more)

    write(clips / "a.mp4", clip.read_bytes())
    write(teacher / "denoiser.safetensors", b"weights")
    assert start("--change").code == 0 and start().code == 0
    assert rows(finished)[0]["changed"].keys() >= settings.INPUTS.keys() and rows(finished)[1]["changed"] == {}
    for path, key in ((clips / "b.mp4", "data.hash"), (teacher / "denoiser.safetensors", "denoiser.distillation.hash")):
        write(path, clip.read_bytes() + b"\0")
        before = contents(finished)
        done = start()
        assert done.code == 2 and len(done.err) == 1 and settings.INPUTS[key] in done.err[0]
        assert "give --change to go on with the new values" in done.err[0] and contents(finished) == before
        assert start("--change").code == 0 and list(rows(finished)[-1]["changed"]) == [key]
        assert start().code == 0


def test_a_run_of_an_older_version_goes_on_once_it_is_accepted(command, finished):
    path = finished / "config.json"
    older = json.loads(path.read_text())
    for key in (storage.CHECKSUM, record.RUN, record.STARTS):
        del older[key]
    del older["denoiser"]["diffusion"]["shift"]
    path.write_text(json.dumps(older))
    storage.write_json(finished / folder.STATISTICS, {})
    done = command(train, CONFIG, f"--workdir={finished}")
    assert done.code == 2 and "it has no checksum" in done.err[0] and "train --unverified" in done.err[0]
    assert json.loads(path.read_text()) == older
    assert command(train, CONFIG, f"--workdir={finished}", "--unverified").code == 0
    assert rows(finished)[0]["changed"] == {"denoiser.diffusion.shift": [None, 1.0]}
    number = folder.run_number(finished)
    assert storage.read_json(finished / folder.STATISTICS, "") == {record.RUN: number}
    assert command(train, CONFIG, f"--workdir={finished}").code == 0 and folder.run_number(finished) == number
