import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from vdm_jax.data import files, media, writing
from vdm_jax.data.files import Files
from vdm_jax.errors import UserError

FPS, RATE, FRAMES = 8, 8000, 9


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(files.logger, "warning", lambda message, *args: lines.append(message % args))
    return lines


def write(path, frames, sound=True, first=0):
    """Frame k is the gray level 3 * (first + k), and its sound a constant tone as loud as k."""
    path.parent.mkdir(parents=True, exist_ok=True)
    video = np.zeros((frames, 16, 16, 3), np.uint8)
    video += (3 * (first + np.arange(frames, dtype=np.uint8)))[:, None, None, None]
    t = np.arange(frames * 1000)
    audio = np.repeat(np.arange(frames) / 128, 1000) * np.sin(2 * np.pi * 500 * t / RATE)
    writing.write_mp4(path, video, audio if sound else None, FPS, RATE)


def open_files(folder, **settings):
    defaults = {"frames": FRAMES, "size": 16, "fps": FPS, "sample_rate": RATE, "seed": 0}
    return Files(folder, **{**defaults, **settings})


def levels(item):
    return np.round(item["video"].mean((1, 2, 3)) / 3).astype(int)


@pytest.fixture(scope="module")
def two_videos(tmp_path_factory):
    """a: frames 0..49 with sound, b: frames 52..71 without."""
    folder = tmp_path_factory.mktemp("two")
    write(folder / "a.mp4", 50)
    write(folder / "sub" / "b.mp4", 20, sound=False, first=52)
    (folder / "a.txt").write_text("a gets\nbrighter\n")
    (folder / "sub" / "b.txt").write_text("b too")
    return folder


@pytest.fixture
def folder(two_videos, tmp_path):
    return shutil.copytree(two_videos, tmp_path / "folder")


def test_items_are_windows_with_their_sound_and_caption(folder, warnings):
    source = open_files(folder)
    assert len(source) == 2**31 - 1
    seen = set()
    for i in range(30):
        item = source[i]
        assert item["video"].shape == (FRAMES, 16, 16, 3) and item["video"].dtype == np.uint8
        assert item["audio"].shape == (FRAMES * 1000,) and item["audio"].dtype == np.float32
        level = levels(item)
        np.testing.assert_array_equal(np.diff(level), 1)
        seen.add(level[0])
        assert item["caption"] == ("a gets brighter" if level[0] < 50 else "b too")
        loudness = np.abs(item["audio"]).reshape(FRAMES, 1000)[:, 300:700].max(axis=1)
        expected = level / 128 if level[0] < 50 else np.zeros(FRAMES)
        np.testing.assert_allclose(loudness, expected, atol=0.03)
    assert len(seen) > 12
    assert [line for line in warnings if "no sound" in line] == [
        "data: 1 of 2 files: no sound, it is silent: sub/b.mp4"
    ]


def test_items_depend_on_seed_and_index_alone(folder):
    first, again, other = open_files(folder), open_files(folder), open_files(folder, seed=1)
    order = [5, 0, 17, 10**9, 5]
    for i, j in zip(order, sorted(order)):
        assert first[i]["caption"]
        assert again[j]["caption"]
    for i in order:
        np.testing.assert_array_equal(first[i]["video"], again[i]["video"])
        np.testing.assert_array_equal(first[i]["audio"], again[i]["audio"])
    assert any(levels(first[i])[0] != levels(other[i])[0] for i in range(10))


def test_every_video_comes_once_an_epoch(folder):
    write(folder / "c.mp4", 10, first=75)
    source = open_files(folder)
    for epoch in range(6):
        starts = [levels(source[3 * epoch + k])[0] for k in range(3)]
        assert sorted(np.digitize(starts, [50, 73])) == [0, 1, 2]


def test_memory_and_seeking_give_the_same(folder):
    cached, sought = open_files(folder), open_files(folder, cache_bytes=0)
    some = open_files(folder, cache_bytes=30 * (16 * 16 * 3 + 4 * 1000))
    assert [video[-1] for video in cached.videos] == [True, True]
    assert [video[-1] for video in sought.videos] == [False, False]
    assert [video[-1] for video in some.videos] == [False, True]
    for i in range(12):
        first, second = cached[i], sought[i]
        np.testing.assert_array_equal(first["video"], second["video"])
        np.testing.assert_allclose(first["audio"], second["audio"], atol=0.1)  # up to half a sample off
        lag = np.correlate(first["audio"], second["audio"], "full").argmax() - (FRAMES * 1000 - 1)
        assert lag == 0 or not first["audio"].any()


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_training_never_touches_what_is_held_out(folder, cache_bytes):
    train = open_files(folder, held_out=0.3, cache_bytes=cache_bytes)
    held_out = open_files(folder, held_out=0.3, cache_bytes=cache_bytes, split="held_out")
    trained = np.concatenate([levels(train[i]) for i in range(60)])
    kept = np.concatenate([levels(held_out[i]) for i in range(40)])
    assert set(kept) == {*range(35, 50), *range(63, 72)}  # 15 frames of a; b keeps one window, 9
    assert set(trained) <= {*range(35), *range(52, 63)} and {20, 62} <= set(trained)


def test_short_videos_are_padded_and_said(tmp_path, warnings):
    write(tmp_path / "a.mp4", 5)
    item = open_files(tmp_path, held_out=0.0)[0]
    np.testing.assert_array_equal(levels(item), [0, 1, 2, 3, 4, 4, 4, 4, 4])
    assert item["caption"] == ""
    assert np.abs(item["audio"][4200:4800]).max() > 0.02 and not item["audio"][5000:].any()
    assert any("shorter than a window, its last frame is repeated: a.mp4" in w for w in warnings)
    assert any("no caption" in line for line in warnings)
    with pytest.raises(UserError, match="raise held_out"):
        open_files(tmp_path, held_out=0.0, split="held_out")
    write(tmp_path / "b.mp4", 30)
    assert [v[0] for v in open_files(tmp_path, split="held_out", held_out=0.4).videos] == ["b.mp4"]
    assert any("it is left out: a.mp4" in line for line in warnings)


def test_metadata(folder, warnings):
    rows = [
        ("a.mp4", 'a, with "quotes"'),
        ("sub/b.mp4", "b"),
        ("sub/b.mp4", "another b"),
        ("gone.mp4", "?"),
    ]
    table = "file_name,text,extra\n" + "".join(
        f'{name},"{text.replace(chr(34), 2 * chr(34))}",1\n' for name, text in rows
    )
    lines = "\n".join(json.dumps({"file_name": n, "text": t, "x": [1]}) for n, t in rows) + "\n\n"
    for name, content in (("metadata.csv", table), ("metadata.jsonl", lines)):
        (folder / name).write_text(content)
        source = open_files(folder)
        captions = {source[i]["caption"] for i in range(30)}
        assert captions == {'a, with "quotes"', "b", "another b"}
        assert any("a row names a file that does not exist" in w and "gone.mp4" in w for w in warnings)
        warnings.clear()
        (folder / name).unlink()


def test_broken_files_are_skipped_counted_and_named(folder, warnings):
    (folder / "x.mp4").write_bytes(b"no video")
    (folder / "y.mp4").touch()
    source = open_files(folder)
    assert {source[i]["caption"] for i in range(8)} == {"a gets brighter", "b too"}
    line = next(line for line in warnings if "cannot be read" in line)
    assert line.startswith("data: 2 of 4 files") and "x.mp4" in line and "y.mp4" in line


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_a_file_that_fails_later_is_replaced(folder, warnings, cache_bytes):
    source = open_files(folder, cache_bytes=cache_bytes)
    (folder / "sub" / "b.mp4").write_bytes(b"overwritten")
    warnings.clear()
    items = [source[i] for i in range(8)]
    assert {item["caption"] for item in items} == {"a gets brighter"}
    assert len(warnings) == 1 and "b.mp4" in warnings[0]
    (folder / "a.mp4").unlink()
    with pytest.raises(UserError, match="none of the videos"):
        source._cache.clear()
        source[0]


def test_unusable_folders(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_bytes(b"x")
    for path, fault in [
        (tmp_path / "absent", "not a folder"),
        (folder / "a.mp4", "not a folder"),
        (tmp_path / "empty", "holds no video"),
        (tmp_path / "bad", "no usable train video.*a.mp4"),
    ]:
        with pytest.raises(UserError, match=fault):
            open_files(path)
    with pytest.raises(UserError, match="held_out"):
        open_files(folder, split="test")
    with pytest.raises(UserError, match="share"):
        open_files(folder, held_out=1.0)


@pytest.mark.parametrize(
    "name, content, fault",
    [
        ("metadata.csv", "file,text\na.mp4,x\n", "no column 'file_name'"),
        ("metadata.csv", "", "no column 'file_name'.* and no column 'text'"),
        ("metadata.csv", 'file_name,text\na.mp4,"x\n', "after row 0"),
        ("metadata.csv", "file_name,text\n../a.mp4,x\n", "points out"),
        ("metadata.csv", "file_name,text\n/etc/a.mp4,x\n", "points out"),
        ("metadata.csv", "file_name,text\nsub/../../a.mp4,x\n", "points out"),
        ("metadata.csv", "file_name,text\nlink.mp4,x\n", "points out"),
        ("metadata.csv", "file_name,text\na\0.mp4,x\n", "metadata.csv|no usable"),
        ("metadata.csv", b"file_name,text\na.mp4,\xff\n", "metadata.csv"),
        ("metadata.jsonl", '["a.mp4", "x"]\n', "row 1 is no object"),
        ("metadata.jsonl", '{"file": "a.mp4", "text": "x"}\n', "no row of metadata.jsonl has a column file_name"),
        ("metadata.json", '{"file_name": "a.mp4"}', "must hold a list of rows"),
        ("metadata.json", "[" + "9" * 5000 + "]", "cannot read metadata.json after row 0"),
        ("metadata.parquet", "PAR1", "metadata.parquet"),
        ("a.json", "{", "cannot read a.json"),
        ("metadata.jsonl", "{not json\n", "after row 0"),
        ("metadata.jsonl", "[" * 100_000, "metadata.jsonl"),
        ("a.txt", b"\xff", "a.txt' is not UTF-8"),
        ("a.txt", "x" * 2_000_000, "a.txt' is over"),
    ],
)
def test_bad_metadata_is_one_clear_line(tmp_path, name, content, fault):
    folder = tmp_path / "inside"
    write(folder / "a.mp4", 10)
    write(tmp_path / "a.mp4", 10)
    if "link" in str(content):
        (folder / "link.mp4").symlink_to(tmp_path / "a.mp4")
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=fault) as error:
        open_files(folder)
    assert "\n" not in str(error.value)


def test_both_kinds_of_metadata_and_links_out(tmp_path):
    folder = tmp_path / "inside"
    write(folder / "a.mp4", 10)
    (folder / "metadata.csv").write_text("file_name,text\na.mp4,x\n")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "x"}\n')
    with pytest.raises(UserError, match="keep one"):
        open_files(folder)
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").rename(tmp_path / "metadata.jsonl")
    (folder / "metadata.jsonl").symlink_to(tmp_path / "metadata.jsonl")
    with pytest.raises(UserError, match="points out"):
        open_files(folder)
    (folder / "metadata.jsonl").unlink()
    (tmp_path / "secret").write_text("secret")
    (folder / "a.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="points out"):
        open_files(folder)
    (folder / "a.txt").unlink()
    (folder / "b.mp4").symlink_to(folder / "a.mp4")  # inside: fine
    assert len(open_files(folder).videos) == 2


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """20 frames: gray levels 0, 3, 6, ..., with sound."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write(path, 20)
    return path


def test_whole_files_are_held_out_where_there_are_enough(clip, tmp_path, caplog):
    caplog.set_level("INFO")
    for number in range(40):
        os.link(clip, tmp_path / f"{number}.mp4")
    for number in range(20):
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / f"still_{number}.png")
    parts = {split: open_files(tmp_path, split=split) for split in ("train", "held_out")}
    names = {split: {video.name for video in source.videos} for split, source in parts.items()}
    assert not names["train"] & names["held_out"] and len(names["train"] | names["held_out"]) == 60
    assert len([name for name in names["train"] if name.endswith(".png")]) == 20  # images are never held out
    spans = {(video.first, video.end) for source in parts.values() for video in source.videos if ".mp4" in video.name}
    assert spans == {(0, 20)}
    assert f"data: held out: {len(names['held_out'])} of 60 videos (data.files.held_out=0.2)" in caplog.messages
    for number in range(40, 60):
        os.link(clip, tmp_path / f"{number}.mp4")
    more = {split: {video.name for video in open_files(tmp_path, split=split).videos} for split in parts}
    assert names["train"] <= more["train"] and names["held_out"] <= more["held_out"]
    assert open_files(tmp_path, held_out=0.0).summary.held_out.startswith("nothing")


def test_threads_decode_a_video_once(folder, monkeypatch):
    calls = []
    read_video = media.read_video

    def counted(path, **settings):
        calls.append(path.name)
        return read_video(path, **settings)

    monkeypatch.setattr(files.media, "read_video", counted)
    source = open_files(folder)
    with ThreadPoolExecutor(8) as pool:
        items = list(pool.map(source.__getitem__, range(40)))
    assert sorted(calls) == ["a.mp4", "b.mp4"]
    alone = open_files(folder)
    for i in (0, 7, 39):
        np.testing.assert_array_equal(items[i]["video"], alone[i]["video"])


def test_two_threads_decode_two_videos_at_the_same_time(folder, monkeypatch):
    read_video, both, met = media.read_video, threading.Barrier(2), []

    def wait_for_the_other(path, **settings):
        try:
            both.wait(timeout=20)
            met.append(True)
        except threading.BrokenBarrierError:
            met.append(False)
        return read_video(path, **settings)

    monkeypatch.setattr(media, "read_video", wait_for_the_other)
    source = open_files(folder)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(source.__getitem__, range(2)))  # the two videos of the first epoch
    assert met == [True, True]


def test_images_among_videos_are_silent_stills(folder, warnings):
    Image.fromarray(np.full((20, 20, 3), 240, np.uint8)).save(folder / "x.png")
    (folder / "metadata.csv").write_text("file_name,text\na.mp4,a video\nx.png,an image\n")
    source = open_files(folder)
    items = {item["caption"]: item for item in (source[0], source[1])}
    assert (items["an image"]["video"] == 240).all() and not items["an image"]["audio"].any()
    assert items["an image"]["video"].shape == items["a video"]["video"].shape
    assert any("its last frame is repeated: x.png" in line for line in warnings)
    assert [video.name for video in open_files(folder, split="held_out").videos] == ["a.mp4"]


def test_half_of_the_windows_are_mirrored_but_none_that_tells_a_side(tmp_path):
    video = np.zeros((FRAMES, 16, 16, 3), np.uint8)
    video[:, :, :8] = 200
    for name, caption in (("a", "a car"), ("b", "a car turns LEFT"), ("c", "upright")):
        writing.write_mp4(tmp_path / f"{name}.mp4", video, None, FPS, RATE)
        (tmp_path / f"{name}.txt").write_text(caption)

    def mirrored(**settings):
        items = [open_files(tmp_path, held_out=0.0, **settings)[i] for i in range(60)]
        return [(item["caption"], bool(item["video"][..., :4, :].mean() < 100)) for item in items]

    found = mirrored(flip=True)
    assert found == mirrored(flip=True) and found != mirrored(flip=True, seed=1)
    cars = [flipped for caption, flipped in found if caption == "a car"]
    assert len(cars) == 20 and 4 < sum(cars) < 16
    assert not any(flipped for caption, flipped in found if caption != "a car")
    assert not any(flipped for _, flipped in mirrored())
    plain, flipped = (open_files(tmp_path, held_out=0.0, flip=flip) for flip in (False, True))
    for i in range(12):
        a, b = plain[i], flipped[i]
        assert a["caption"] == b["caption"] and any(
            np.array_equal(a["video"], x) for x in (b["video"], b["video"][:, :, ::-1])
        )
    assert plain.name_of(4).removesuffix(".mp4") in "abc"
    assert {plain.name_of(i) for i in range(3, 6)} == {"a.mp4", "b.mp4", "c.mp4"}
