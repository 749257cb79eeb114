"""Known faults, each with its smallest input and the right result. A test that begins to pass is no longer a fault.

The reason of a test names the fault, and the planned work that mends it.
"""

import json
import logging
import shutil

import numpy as np
import pytest

from vdm_jax.data import batches, media
from vdm_jax.data.files import Files
from vdm_jax.errors import UserError

CLIP = {"frames": 17, "size": 32, "fps": 8, "sample_rate": 8000, "seed": 0}


def fault(sentence, planned="Real data", raises=AssertionError):
    """Marks a test that fails with `raises` alone: an error of another kind fails the test run."""
    return pytest.mark.xfail(strict=True, raises=raises, reason=f"{sentence} Planned: {planned}")


def small_video(path, shade=0, sound=True):
    """60 frames of one shade at 8 frames per second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = np.zeros(60000, np.float32) if sound else None
    media.write_mp4(path, np.full((60, 32, 32, 3), shade, np.uint8), audio, 8, 8000)


# ------------------------------------------------------------------------------------------ folders and captions


@fault("Videos in hidden folders are trained on.")
def test_hidden_folders_are_left_out(tmp_path):
    for name in ("kept.mp4", ".hidden.mp4", ".Trash-1000/files/deleted.mp4", "sub/.ipynb_checkpoints/copy.mp4"):
        small_video(tmp_path / name, sound=False)
    assert [video.name for video in Files(tmp_path, **CLIP).videos] == ["kept.mp4"]


@fault("Videos whose names end in .mts, .mpg, .gif and others are left out without a warning.")
def test_a_video_is_used_or_named_whatever_its_ending(tmp_path, caplog):
    small_video(tmp_path / "a.mp4")
    names = [f"a.{ending}" for ending in "mts m2ts ts mpg mpeg 3gp wmv flv ogv gif".split()]
    for name in names:
        shutil.copy(tmp_path / "a.mp4", tmp_path / name)
    with caplog.at_level(logging.WARNING):
        used = {video.name for video in Files(tmp_path, **CLIP).videos}
    assert not [name for name in names if name not in used and name not in caplog.text]


ROW = {"file_name": "x.mp4", "text": "a dog"}


@fault("Captions in forms that other programs write are not found.", raises=(AssertionError, UserError))
@pytest.mark.parametrize(
    "video, note, content",
    [
        pytest.param("x.mp4", "x.json", json.dumps({"caption": "a dog"}), id="x.json"),
        pytest.param("x.mp4", "x.mp4.txt", "a dog", id="x.mp4.txt"),
        pytest.param("x.mp4", "metadata.json", json.dumps([ROW]), id="metadata.json"),
        pytest.param("train/x.mp4", "train/metadata.csv", "file_name,text\nx.mp4,a dog\n", id="train/metadata.csv"),
        pytest.param("x.mp4", "metadata.csv", "file_name,text\nROOT/x.mp4,a dog\n", id="absolute name"),
        pytest.param("x.mp4", "metadata.jsonl", json.dumps({**ROW, "text": ["a dog", "a dog"]}), id="list of captions"),
    ],
)
def test_captions_are_found(tmp_path, video, note, content):
    small_video(tmp_path / video, sound=False)
    (tmp_path / note).write_text(content.replace("ROOT", str(tmp_path)))
    assert Files(tmp_path, **CLIP)[0]["caption"] == "a dog"


# ------------------------------------------------------------------------------------------ order and threads


@fault("Training draws the videos of a folder with replacement: after one pass, a third of them have not been seen.")
def test_training_sees_each_video_once_an_epoch(tmp_path):
    small_video(tmp_path / "0.mp4", sound=False)
    for number in range(12):
        if number:
            shutil.copy(tmp_path / "0.mp4", tmp_path / f"{number}.mp4")
        (tmp_path / f"{number}.txt").write_text(str(number))
    source = Files(tmp_path, **CLIP)
    ids = [i for step in range(3) for i in batches.sample_ids([source], [1], batch_size=4, seed=0, step=step)]
    assert {source[i]["caption"] for i in ids} == {str(number) for number in range(12)}
