"""The hash of the data of a run. The videos are not decoded, so any bytes will do."""

import shutil

import pytest

from configs import common
from vdm_jax.data import content

LONG = 300_000  # bytes; only both ends of a file are read


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.mp4").write_bytes(b"a" * LONG)
    (folder / "a.txt").write_text("a caption")
    (folder / "sub" / "b.mp4").write_bytes(b"b")
    config = common.get_config()
    config.data.update(source="files", path=str(folder))
    return config


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a.txt").write_text("another caption"),
        lambda folder: (folder / "c.mp4").write_bytes(b"c"),
        lambda folder: (folder / "a.mp4").unlink(),
        lambda folder: (folder / "a.mp4").rename(folder / "c.mp4"),
        lambda folder: (folder / "sub" / "b.mp4").write_bytes(b"c"),
        lambda folder: (folder / "a.mp4").write_bytes(b"a" * (LONG - 1) + b"b"),
        lambda folder: (folder / "a.mp4").write_bytes(b"a" * (LONG + 1)),
        lambda folder: (folder / "metadata.csv").write_text("file_name,text\nsub/b.mp4,b\na.mp4,a caption\n"),
    ],
)
def test_other_videos_and_captions_have_another_hash(config, tmp_path, change):
    before = content.digest(config)
    config.data.path = str(shutil.copytree(tmp_path / "clips", tmp_path / "copy"))
    (tmp_path / "copy" / "notes.md").write_text("no video")
    assert len(before) == 64 and content.digest(config) == before
    change(tmp_path / "copy")
    assert content.digest(config) not in ("", before)


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
