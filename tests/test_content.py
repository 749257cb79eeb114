"""The hash of the data of a run."""

import json
import shutil

import numpy as np
import pytest

from configs import common
from tests.test_shards import write
from vdm_jax.data import content, writing

LONG = 300_000  # bytes; only both ends of a file are read
TABLE = "file_name,text\nsub/b.mp4,b\na.mp4,a caption\n"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The bytes of a clip, and of the same one with bytes after its end, which no reader looks at."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    writing.write_mp4(path, np.zeros((2, 16, 16, 3), np.uint8), None, 8, 8000)
    return path.read_bytes(), path.read_bytes() + LONG.to_bytes(4, "big") + b"free" + bytes(LONG - 8)


@pytest.fixture
def config(tmp_path, clip):
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.mp4").write_bytes(clip[1])
    (folder / "a.txt").write_text("a caption")
    (folder / "sub" / "b.mp4").write_bytes(clip[0])
    config = common.get_config()
    config.data.update(source="files", path=str(folder))
    return config


@pytest.mark.parametrize(
    "change",
    [
        lambda folder, clip: (folder / "a.txt").write_text("another caption"),
        lambda folder, clip: (folder / "c.mp4").write_bytes(clip[0]),
        lambda folder, clip: (folder / "a.mp4").unlink(),
        lambda folder, clip: (folder / "a.mp4").rename(folder / "c.mp4"),
        lambda folder, clip: (folder / "sub" / "b.mp4").write_bytes(clip[1]),
        lambda folder, clip: (folder / "a.mp4").write_bytes(clip[1][:-1] + b"b"),
        lambda folder, clip: (folder / "a.mp4").write_bytes(clip[1] + bytes(1)),
        lambda folder, clip: (folder / "metadata.csv").write_text(TABLE),
        lambda folder, clip: write(folder / "c.tar", {"c.mp4": clip[0]}),
    ],
)
def test_other_videos_and_captions_have_another_hash(config, tmp_path, clip, change):
    before = content.digest(config)
    config.data.path = str(shutil.copytree(tmp_path / "clips", tmp_path / "copy"))
    (tmp_path / "copy" / "notes.md").write_text("no video")
    assert len(before) == 64 and content.digest(config) == before
    change(tmp_path / "copy", clip)
    assert content.digest(config) not in ("", before)


def test_clips_of_archives_and_captions_with_times_count(config, tmp_path, clip):
    def digest(data=clip[0], caption=b"a caption", row=None):
        write(tmp_path / "clips" / "c.tar", {"c.mp4": data, "c.txt": caption})
        rows = [{"file_name": "a.mp4", "text": "a"}, {"file_name": "a.mp4", "text": "b", **(row or {})}]
        (tmp_path / "clips" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return content.digest(config)

    found = [digest(), digest(clip[1]), digest(clip[1][:-1] + b"b"), digest(caption=b"b"), digest(row={"start": 1})]
    assert len({*found, digest(row={"start": 1, "end": 2})}) == 6 and digest() == found[0]


def test_the_order_of_the_captions_counts(config, tmp_path):
    """It decides which video is in which batch."""
    rows, found = ["a.mp4,a caption", "sub/b.mp4,b", "missing.mp4,c"], []
    for order in (rows, rows[::-1]):
        (tmp_path / "clips" / "metadata.csv").write_text("\n".join(["file_name,text", *order]))
        found.append(content.digest(config))
    assert found[0] != found[1]


def test_the_data_of_each_phase_counts(config, tmp_path):
    before = content.digest(config)
    config.clip.phases = ({"share": 0.5}, {"share": 0.5, "data.path": str(tmp_path / "clips" / "sub")})
    with_phase = content.digest(config)
    (tmp_path / "clips" / "sub" / "b.txt").write_text("a caption")
    assert len({before, with_phase, content.digest(config)}) == 3


def test_data_without_a_folder_has_no_hash(config):
    for change in (dict(path="nowhere"), dict(path=""), dict(source="world")):
        config.data.update(change)
        assert content.digest(config) == ""
