"""Runs and data in a bucket, on a stand-in for Google Cloud Storage (bucket.py)."""

import json
import os
import sys

import numpy as np
import pytest
from etils import epath

from tests.helpers import finish, start
from vdm_jax.errors import UserError

FOLDER = epath.Path("gs://bucket/run")


def test_a_run_goes_on_in_a_bucket(bucket):
    options = ["--config=tests/tiny.py", f"--workdir={FOLDER}", "--stage=audio_autoencoder"]
    for part in ("first", "resumed"):
        code, _, err = finish(start("-m", "vdm_jax.train", *options, **bucket))
        assert code == 0, "\n".join(err[-20:])
        assert ("4 of 8 steps done" in "\n".join(err)) == (part == "resumed")
        code, out, err = finish(start("-m", "tests.test_bucket", part, **bucket))
        assert code == 0, "\n".join(err[-20:])
    lines, before = json.loads(out)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["loss"] for line in lines] == [line["loss"] for line in before]


def test_a_bucket_of_an_unknown_kind_is_told():
    code, _, err = finish(start("-m", "vdm_jax.train", "--config=tests/tiny.py", "--workdir=floppy://a/b"), 100)
    assert code == 2
    assert err[-1].startswith("error: floppy://a/b: Protocol not known: floppy")


def metrics(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def first():
    """After the first run: copies its log, and deletes its last checkpoint."""
    stage = FOLDER / "audio_autoencoder"
    (stage / "metrics.jsonl").copy(FOLDER / "before.jsonl")
    (stage / "checkpoints" / "8").rmtree()
    assert json.loads((FOLDER / "heartbeat.json").read_text())["saved"] == 8


def resumed():
    (start,) = metrics(FOLDER / "starts.jsonl")
    assert start["changed"] == {} and start["steps"]["audio_autoencoder"] == 4
    print(json.dumps([metrics(FOLDER / "audio_autoencoder" / "metrics.jsonl"), metrics(FOLDER / "before.jsonl")]))


def data(folder):
    """Writes encoded clips, an MP4 and a data set to a bucket, and reads them back."""
    from vdm_jax.data import writing
    from vdm_jax.data.tfds import Tfds
    from vdm_jax.run import storage
    from vdm_jax.system import latents

    top = epath.Path("gs://bucket/data")
    rows = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    clips = {"z": rows}
    record = latents._record(clips)
    encoded = [{"z": rows[:4]}, {"z": rows[4:]}]
    latents.ENCODE_BATCH = 4
    latents._write(top / "clips_00000.npy", encoded, record, 0, 5, "mark")
    assert [path.name for path in top.iterdir()] == ["clips_00000.npy"]
    found = latents.Encoded([top / "clips_00000.npy"], clips, 5, "mark").take([4, 0, 2])
    np.testing.assert_array_equal(found["z"], rows[[4, 0, 2]])
    whole = (top / "clips_00000.npy").read_bytes()
    for lost in (1, record.itemsize):  # part of the last clip, and all of it
        (top / "cut.npy").write_bytes(whole[:-lost])
        with pytest.raises(UserError, match="cut.npy is damaged"):
            latents.Encoded([top / "cut.npy"], clips, 5, "mark").take([4])

    video = np.zeros((3, 16, 16, 3), np.uint8)
    writing.write_mp4(top / "clip.mp4", video, None, 8, 8000)
    assert b"ftyp" in storage.reader(top / "clip.mp4").read(16)

    for where, _, files in os.walk(folder):
        for name in files:
            path = epath.Path(where) / name
            path.copy(top / path.relative_to(folder))
    options = dict(frames=4, size=16, fps=8, sample_rate=8000, seed=1, video_key="clip", audio_key="sound")
    options["caption_key"] = "text"
    here, there = (Tfds("tiny_clips", data_dir=str(place), **options) for place in (folder, top))
    direct = Tfds(str(top / "tiny_clips" / "1.0.0"), **options)
    for i in range(3):
        for key, value in here[i].items():
            np.testing.assert_array_equal(value, there[i][key])
            np.testing.assert_array_equal(value, direct[i][key])


if __name__ == "__main__":
    {"first": first, "resumed": resumed, "data": data}[sys.argv[1]](*sys.argv[2:])
