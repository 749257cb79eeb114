"""Which files of a folder are videos, and what is said of the others."""

import os
import shutil

import av
import numpy as np
from PIL import Image

from tests import real_files
from vdm_jax.data import index, listing, media, shards
from vdm_jax.data.files import Files
from vdm_jax.run import storage

CLIP = {"frames": 1, "size": 16, "fps": 8, "sample_rate": 8000, "seed": 0}


def test_hidden_folders_are_left_out(put):
    folder = put("kept.mp4", ".hidden.mp4", ".Trash-1000/files/deleted.mp4", "sub/.ipynb_checkpoints/copy.mp4")
    found = listing.read(folder)
    assert list(found.videos) == ["kept.mp4"]
    assert set(found.left_out["hidden"]) == {".hidden.mp4", ".Trash-1000", "sub/.ipynb_checkpoints"}


def test_a_video_is_used_or_named_whatever_its_ending(put, caplog):
    names = [f"a.{ending}" for ending in "mp4 mts m2ts ts mpg mpeg 3gp wmv flv ogv gif bin".split()]
    folder = put(*names, "b.mp4.part")
    for name, content in {"b.ts": "let a: number", "b.jpg": "x", "b.mp4": "x", "c.mkv": "", "d.zip": "x"}.items():
        (folder / name).write_text(content)
    assert {video.name for video in Files(folder, **CLIP).videos} == set(names)
    for fault in (
        "2 of 18 files: left out, cannot be read: b.mp4 (Invalid data found when processing input), c.mkv (the file is",
        "2 of 18 files: left out, no video: b.jpg, b.ts",
        "1 of 18 files: left out, packed, unpack it first: d.zip",
        "1 of 18 files: left out, an unfinished download: b.mp4.part",
    ):
        assert fault in caplog.text


def test_images_and_sound_among_videos(put, caplog):
    folder = put("a.mp4")
    for name in ("x", "a.jpg"):  # a.jpg is a picture of a.mp4, as programs that download videos make it
        Image.fromarray(np.full((20, 30, 3), 240, np.uint8)).save(folder / name, "PNG")
    with av.open(str(folder / "s.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    for _ in range(2):  # the second time from the index
        found = listing.read(folder)
        assert list(found.videos) == ["a.mp4", "x"]
        assert found.left_out == {"sound only": {"s.mp4": ""}, "a picture with the name of a video": {"a.jpg": ""}}
        assert found.videos["x"][1] == (0, False, 20, 30, 0)
    source = Files(folder, **CLIP)
    assert source.summary.frame_rates == {"8": 1, "image": 1} and source.summary.used == 2
    assert "1 of 4 files: left out, sound only: s.mp4" in caplog.text


def test_a_file_that_cannot_be_opened_is_looked_at_again(put, monkeypatch):
    folder = put("x")

    def deny(path):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "open_file", deny)
        assert listing.read(folder).left_out == {"cannot be read": {"x": "Permission denied"}}
    assert list(listing.read(folder).videos) == ["x"]


def test_without_a_home_no_index_is_written(put, tmp_path, monkeypatch):
    """Python then takes ~ for the name of a folder."""
    folder = put("a.mp4")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/.cache")
    monkeypatch.chdir(tmp_path)
    assert list(listing.read(folder).videos) == ["a.mp4"] and not (tmp_path / "~").exists()


def test_links_inside_are_followed_and_loops_end(put, tmp_path):
    folder = put("in/x.mp4", ".store/y.mp4", "../outside/z.mp4")
    for name, target in {
        "b.mp4": folder / "in/x.mp4", "stored": ".store", "alias": "in", "in/up": "..", "round": "round",
        "none.mp4": "nothing", "out": tmp_path / "outside", "out.mp4": tmp_path / "outside" / "z.mp4",
    }.items():  # fmt: skip
        (folder / name).symlink_to(target)
    found = listing.read(folder)
    assert list(found.videos) == ["b.mp4", "in/x.mp4", "stored/y.mp4"]
    assert set(found.left_out[listing.OUTSIDE]) == {"out", "out.mp4"}
    assert set(found.left_out[listing.LISTED]) == {"alias/", "in/up/"}
    assert set(found.left_out[listing.NOWHERE]) == {"none.mp4", "round"}
    (folder / "metadata.csv").write_text("file_name,text\nalias/x.mp4,a dog\n")
    assert Files(folder, **CLIP)[0]["caption"] == "a dog"


def test_names_are_escaped(put):
    assert listing.shown("\x1b[31m\n") == r"'\x1b[31m\n'" and listing.shown("é.mp4") == "é.mp4"
    assert len(listing.shown("x" * 9999)) < 300
    folder = put("a.mp4")
    with open(os.fsencode(folder) + b"/\xff\n.mp4", "wb"):
        pass
    (told,) = Files(folder, **CLIP).summary.left_out["cannot be read"]["first"]
    assert told.isprintable() and told.isascii()


def test_a_later_start_opens_only_files_that_changed(put, monkeypatch, caplog):
    folder = put("a.mp4", "b.mp4", "c.txt")
    seen = []
    monkeypatch.setattr(media, "probe", lambda path, f=media.probe: seen.append(path.name) or f(path))
    first = listing.read(folder)
    assert sorted(seen) == ["a.mp4", "b.mp4"]
    assert listing.read(folder).videos == first.videos and len(seen) == 2
    (folder / "b.mp4").unlink()
    shutil.copy(folder / "a.mp4", folder / "b.mp4")  # another time, and c.mp4 is new
    put("c.mp4")
    listing.read(folder)
    assert sorted(seen[2:]) == ["b.mp4", "c.mp4"]
    monkeypatch.setattr(index, "_reader", lambda: "another version")
    listing.read(folder)
    assert len(seen) == 7 and not caplog.messages
    # Damage is said, and the index is made anew.
    path = index.path_of(folder)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"b.mp4", b"d.mp4"))
    assert listing.read(folder).videos.keys() == {"a.mp4", "b.mp4", "c.mp4"} and len(seen) == 10
    assert "(it differs from its checksum): it is made anew" in caplog.text and path.read_bytes() == content
    # So are rows that no reader wrote.
    rows = {"a.mp4": [1], "b.mp4": None, "c.mp4": "x", "d": {}, "e.mp4": []}
    storage.write_json(path, {"reader": "another version", "rows": rows})
    assert len(listing.read(folder).videos) == 3 and path.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_no_error(put, tmp_path):
    folder = put("a.mp4")
    (tmp_path / "cache").write_text("no folder")
    assert list(listing.read(folder).videos) == ["a.mp4"]
    assert os.listdir(folder) == ["a.mp4"]


def test_a_folder_as_people_have_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "clips").mkdir()
    films, truth = real_files.make(tmp_path / "clips", 50, seed=1)
    assert {film.codec for film in films.values()} == set(real_files.CODECS)
    assert real_files.differences(tmp_path / "clips", films, truth) == []
