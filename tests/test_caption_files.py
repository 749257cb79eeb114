"""Captions in the forms that people have."""

import csv
import json
import os
import sys

import numpy as np
import pytest

from tests.test_listing import CLIP
from vdm_jax.data import caption_files
from vdm_jax.data.caption_files import Timed
from vdm_jax.data.files import Files
from vdm_jax.errors import UserError

ROW = {"file_name": "x.mp4", "text": "a dog"}


@pytest.mark.parametrize(
    "video, notes",
    [
        ("x.mp4", {"x.txt": "a\n dog"}),
        ("x.mp4", {"x.json": json.dumps({"Caption": "a dog", "id": 3})}),
        ("x.mp4", {"x.json": json.dumps(["a dog", "a dog"])}),
        ("x.mp4", {"x.caption": "a dog"}),
        ("x.mp4", {"x.mp4.txt": "a dog"}),
        ("X.mp4", {"x.MP4.Txt": "a dog"}),
        ("x.mp4", {"metadata.json": json.dumps([ROW])}),
        ("train/x.mp4", {"train/metadata.csv": "file_name,text\nx.mp4,a dog\n"}),
        ("train/x.mp4", {"train/metadata.csv": "file_name,text\ntrain/x.mp4,a dog\n"}),
        ("train/x.mp4", {"Metadata.CSV": " File_Name , TEXT \ntrain\\X.mp4,a dog\n"}),
        ("x.mp4", {"metadata.csv": "file_name,text\nROOT/x.mp4,a dog\n"}),
        ("x.mp4", {"metadata.csv": "prompt,media_path\na dog,./x.mp4\n"}),
        ("x.mp4", {"metadata.jsonl": json.dumps({**ROW, "text": ["a dog", "a dog"]})}),
        ("x.mp4", {"metadata.jsonl": json.dumps({"video": "x.mp4", "caption": "a dog"})}),
        ("v/x.mp4", {"videos.txt": "v/x.mp4\n", "Prompts.txt": "a dog\n"}),
        ("v/x.mp4", {"v/videos.txt": "x.mp4", "v/prompts.txt": "a dog"}),
    ],
    ids=str,
)
def test_captions_are_found(put, video, notes):
    folder = put(video)
    for name, content in notes.items():
        (folder / name).write_text(content.replace("ROOT", str(folder)))
    source = Files(folder, **CLIP)
    assert source[0]["caption"] == "a dog" and not source.summary.caption_faults


def test_parquet(put, monkeypatch):
    folder = put("x.mp4")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.table({"Video": ["x.mp4", "x.mp4"], "text": ["a dog", None], "end": [9.0, None], "more": [1, 2]})
    parquet.write_table(rows, folder / "metadata.parquet")
    source = Files(folder, **CLIP)
    assert source.videos[0].captions == [Timed("a dog", 0.0, 9.0), ""]
    assert source.summary.caption_faults["a row without text"] == {"count": 1, "first": ["metadata.parquet row 2"]}
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="metadata.parquet needs a package: pip install pyarrow"):
        Files(folder, **CLIP)


def test_rows_that_cannot_be_used_are_counted(put):
    folder = put("x.mp4", "y.mp4", "unnamed.mp4")
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([
            ["file_name", "text", "caption", "start", "end"],
            ["x.mp4", "a dog"],
            ["x.mp4", "a dog"],
            ["y.mp4"],
            ["gone\n.mp4", "a cat"],
            ["", "a cat"],
            ["y.mp4", "a cat", "a cow"],
            ["y.mp4", "a cat", "", "2", "1"],
            ["y.mp4", "a cat", "", "nan", ""],
            ["y.mp4", "a cat", "", "one", ""],
        ])  # fmt: skip
    (folder / "y.txt").write_text("a file beside it")
    (folder / "z.txt").write_text("of nothing")
    source = Files(folder, **CLIP)
    assert {video.name: video.captions for video in source.videos} == {"x.mp4": ["a dog"] * 2, "y.mp4": ["", "a cat"]}
    faults = {fault: (rows["count"], rows["first"][0]) for fault, rows in source.summary.caption_faults.items()}
    assert faults == {
        "a row comes again, it counts each time": (1, "metadata.csv row 2"),
        "a row without text": (1, "metadata.csv row 3"),
        "a row names a file that does not exist, it is left out": (1, r"'gone\n.mp4'"),
        "a row without a file name, it is left out": (1, "metadata.csv row 5"),
        "a row has several columns of text, the first counts": (1, "metadata.csv row 6"),
        "a row whose start and end are no times in s, it is left out": (3, "metadata.csv row 7"),
        "a table and a file beside it have its caption, the table counts": (1, "y.mp4"),
        "a file of text that belongs to no video": (1, "z.txt"),
    }
    assert source.summary.left_out == {"no row of the table names it": {"count": 1, "first": ["unnamed.mp4"]}}
    assert source.summary.captions == {"metadata.csv": 2}


def test_sources_that_contradict(put):
    folder = put("sub/x.mp4", "y.mp4")
    (folder / "y.txt").write_text("from txt")
    (folder / "y.json").write_text('{"text": "from json"}')
    source = Files(folder, **CLIP)
    assert source.videos[1].captions == ["from txt"]
    assert source.summary.caption_faults["several captions beside it differ, that of .txt counts"]["first"] == ["y.mp4"]
    (folder / "metadata.csv").write_text("file_name,text\nsub/x.mp4,outer\ny.mp4,y\n")
    (folder / "sub" / "metadata.csv").write_text("file_name,text\nx.mp4,inner\n")
    source = Files(folder, **CLIP)
    assert {video.name: video.captions for video in source.videos} == {"sub/x.mp4": ["inner"], "y.mp4": ["y"]}
    assert source.summary.caption_faults["two tables name it, sub/metadata.csv counts"]["first"] == ["sub/x.mp4"]
    (folder / "prompts.txt").write_text("a\nb\n")
    (folder / "videos.txt").write_text("y.mp4\n")
    with pytest.raises(UserError, match="holds both metadata.csv and videos.txt: keep one of them"):
        Files(folder, **CLIP)
    (folder / "metadata.csv").unlink()
    with pytest.raises(UserError, match="videos.txt has 1 lines and prompts.txt has 2: write one caption"):
        Files(folder, **CLIP)


def test_a_window_has_the_caption_of_its_time():
    captions = [Timed("first", 0.0, 2.0), Timed("then", 2.0, 4.0), Timed("late", 6.0, None), "whole"]

    def at(start, end, which=0.0):
        return caption_files.choose(captions, start, end, which)

    assert at(0, 1) == at(0, 1, 0.99) == at(1, 2.5) == "first" and at(1.5, 3) == "then"
    assert {at(1, 3, which) for which in (0.0, 0.6)} == {"first", "then"}  # as much of both
    assert at(4, 5) == "whole" and at(100, 101) == "late"
    assert caption_files.choose(captions[:1], 3, 4, 0.5) == ""
    assert [caption_files.choose(["a", "b"], 0, 1, which) for which in (0.0, 0.49, 0.5)] == ["a", "a", "b"]


def test_windows_of_a_video_with_times(put):
    folder = put("x.mp4")  # two frames of 1/8 s
    rows = [{**ROW, "text": "zero", "start": 0, "end": 0.125}, {**ROW, "text": "one", "start": "0.125"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Files(folder, **CLIP, held_out=0.0)
    seen = {(int(np.random.default_rng([0, i]).random(2)[0] * 2), source[i]["caption"]) for i in range(20)}
    assert seen == {(0, "zero"), (1, "one")}


def test_no_name_of_a_row_opens_a_file_outside(put, tmp_path, monkeypatch):
    folder = put("x.mp4", "../outside/y.mp4")
    (folder / "link").symlink_to(tmp_path / "outside")
    opened = []
    monkeypatch.setattr(os, "stat", lambda path, *a, f=os.stat, **k: opened.append(str(path)) or f(path, *a, **k))
    (folder / "metadata.csv").write_text("file_name,text\nx.mp4,a dog\nlink/y.mp4,a cat\nfile:///etc/passwd,x\n~,y\n")
    assert [video.name for video in Files(folder, **CLIP).videos] == ["x.mp4"]
    for name in ("../outside/y.mp4", "..\\outside\\y.mp4", f"{tmp_path}/outside/y.mp4", f"{folder}/../outside/y.mp4"):
        (folder / "metadata.csv").write_text(f"file_name,text\n{name},a cat\n")
        with pytest.raises(UserError, match="points out of .*: keep the videos and captions inside the folder"):
            Files(folder, **CLIP)
    assert not any("outside" in path for path in opened)
