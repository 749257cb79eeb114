"""Latents are scaled to unit variance, and encoded once."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath

from tests import tiny
from tests.helpers import ROOT, weights
from vdm_jax import prepare, sharding, train
from vdm_jax.data import batches, writing
from vdm_jax.data.files import Files
from vdm_jax.errors import UserError
from vdm_jax.models import ops
from vdm_jax.run import checksums, storage
from vdm_jax.system import build, latents, losses


def small_video(path, shade=0):
    """60 frames of one shade at 8 frames per second, with silence."""
    writing.write_mp4(path, np.full((60, 32, 32, 3), shade, np.uint8), np.zeros(60000, np.float32), 8, 8000)


@pytest.fixture
def config():
    config = tiny.get_config("hard_negatives")
    config.unlock()
    return config


def examples(system):
    source = batches.source(system.config)
    return batches.Examples(source, system.tokenize, system.stages["denoiser"].make_hard_negative)


def test_statistics_give_zero_mean_and_unit_variance(config):
    system = build(config)
    params = {name: weights(tree) for name, tree in system.param_shapes.items()}
    statistics = latents.measure(system, params, examples(system))
    assert {m: s["mean"].shape for m, s in statistics.items()} == {"video": (4,), "audio": (4,)}
    assert all(np.abs(s["std"] - 1).max() > 0.05 for s in statistics.values())  # not so by chance
    scaled = latents.measure(system, {**params, "statistics": statistics}, examples(system))
    for s in scaled.values():
        np.testing.assert_allclose(s["mean"], 0, atol=1e-3)
        np.testing.assert_allclose(s["std"], 1, rtol=1e-3)


def test_processes_encode_files_of_their_own_and_go_on_where_they_were_ended(config, tmp_path, monkeypatch):
    config.denoiser.cached_clips = 80
    system = build(config)
    params = {name: weights(tree) for name, tree in system.param_shapes.items()}
    params["statistics"] = latents.measure(system, params, examples(system))

    def cached(folder, process=0, processes=1):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        return latents._cached(system, params, examples(system), epath.Path(tmp_path / folder), latents._make_current)

    whole = cached("one").take(list(range(80)))
    monkeypatch.setattr(latents, "CLIPS_PER_FILE", 32)
    monkeypatch.setattr(latents.hosts, "barrier", lambda *a: None)
    folder = tmp_path / "two"
    names = lambda: sorted(path.name for path in folder.glob("clips*"))  # noqa: E731
    cached("two", 0, 2)
    assert names() == ["clips_00000.npy", "clips_00002.npy"]
    for name in names():  # the other process has looked before
        (folder / name).rename(tmp_path / name)
    cached("two", 1, 2)
    assert names() == ["clips_00001.npy"]
    for name in ("clips_00000.npy", "clips_00002.npy"):
        (tmp_path / name).rename(folder / name)
    first = (folder / "clips_00000.npy").stat().st_mtime_ns
    (folder / "clips_00001.npy").rename(folder / "clips_00001.npy.tmp")  # ended while it was being written
    items = cached("two")
    assert (folder / "clips_00000.npy").stat().st_mtime_ns == first
    assert names() == [f"clips_0000{i}.npy" for i in range(3)] and len(items) == 80
    jax.tree.map(np.testing.assert_array_equal, items.take(list(range(80))), whole)


def test_a_clip_that_is_not_whole_and_in_its_place_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "CLIPS_PER_FILE", 4)
    z = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float16)
    (tmp_path / "run").mkdir()
    paths = [epath.Path(tmp_path / "run" / f"clips_{part:05d}.npy") for part in (0, 1)]
    fingerprint = dict.fromkeys(latents.PARTS, "a") | {"files": {}}
    storage.write_json(tmp_path / "run" / latents.FINGERPRINT, fingerprint)
    mark = latents._mark(fingerprint)

    def write(mark=mark):
        for part, path in enumerate(paths):
            latents._write(path, [{"z": z[4 * part :][:4]}], latents._record({"z": z}), 4 * part, 4, mark)

    def take():
        return latents.Encoded(paths, {"z": z}, 8, mark).take(list(range(8)))["z"]

    write()
    np.testing.assert_array_equal(take(), z)
    assert latents.check(epath.Path(tmp_path / "run")) == sum(path.stat().length for path in paths)
    first, second = (path.read_bytes() for path in paths)
    header = len(first) - 4 * latents._record({"z": z}).itemsize
    length = first[:8] + bytes([first[8] ^ 1]) + first[9:]  # of the header
    flipped = first[:-1] + bytes([first[-1] ^ 16])
    zeros = first[:header] + bytes(len(first) - header)
    other = first[:6] + b"\2" + first[7:]  # another version of the format
    for content in (length, flipped, zeros, other, second, first[:-1], first[: len(first) // 2], first[:5], b"", None):
        paths[0].unlink()
        paths[0].mkdir() if content is None else paths[0].write_bytes(content)
        for read in (take, lambda: latents.check(epath.Path(tmp_path / "run"))):
            with pytest.raises(UserError, match="clips_00000.npy is damaged: remove it, to encode its clips anew"):
                read()
        if content is None:
            paths[0].rmdir()
        paths[0].write_bytes(first)
    np.testing.assert_array_equal(take(), z)
    write("another run")
    with pytest.raises(UserError, match="clips_00000.npy is damaged"):
        take()


def test_the_cache_is_made_again_where_weights_data_or_settings_are_others(config, tmp_path, caplog):
    caplog.set_level("INFO")
    folder, clips = epath.Path(tmp_path / "latents"), tmp_path / "clips"
    clips.mkdir()
    for number in range(2):
        small_video(clips / f"{number}.mp4", 40 * number)
        (clips / f"{number}.txt").write_text("a caption full of mistakes")
    config.data.update(source="files", path=str(clips), size=(16, 16))
    params = {"weights": np.zeros(3)}

    def current():
        """Returns why the cached clips are encoded again, "" when they are not."""
        caplog.clear()
        (folder / "clips_00000.npy").touch()
        latents._make_current(folder, latents._fingerprint(config, params, {}), batches.source(config))
        told = [line for line in caplog.messages if not line.startswith("data: ")]  # without the summary of the folder
        assert (folder / "clips_00000.npy").exists() != bool(told)
        return " ".join(told).partition("encoded again: ")[2]

    latents._make_current(folder, latents._fingerprint(config, params, {}), batches.source(config))
    assert current() == ""
    shutil.copytree(clips, tmp_path / "moved")
    config.data.update(path=str(tmp_path / "moved"), threads=3)
    assert current() == ""
    (tmp_path / "moved" / "1.txt").write_text("a caption put right")
    assert current() == "other data" and current() == ""
    shutil.copy(clips / "0.mp4", tmp_path / "moved" / "1.mp4")
    assert current() == "other data" and current() == ""
    small_video(tmp_path / "moved" / "2.mp4", 80)
    (tmp_path / "moved" / "2.txt").write_text("one more")
    assert current() == "other data"
    config.data.files.held_out = 0.25
    params["weights"] = np.ones(3)
    assert current() == "other weights and settings"
    config.data.world.gravity = 0.5  # of another source
    assert current() == ""
    (folder / latents.FINGERPRINT).write_bytes(b"\xff")
    assert "fingerprint.json is damaged (no UTF-8 text)" in current()
    (folder / latents.FINGERPRINT).write_text('{"files": 3}')
    assert "fingerprint.json is damaged (it has no checksum)" in current()
    (folder / latents.FINGERPRINT).unlink()
    (folder / "fingerprint").write_text("of an earlier version")
    assert "fingerprint.json is missing" in current() and current() == ""


def test_a_large_folder_is_read_once(config, tmp_path, monkeypatch):
    small_video(tmp_path / "0.mp4")
    small_video(tmp_path / "1.mp4", 40)
    source = Files(tmp_path, frames=5, size=16, fps=8, sample_rate=8000, seed=0)
    known = source.fingerprint({})
    assert [known[name][0] for name in ("0.mp4", "1.mp4")] == [(tmp_path / name).stat().st_size for name in known]
    os.utime(tmp_path / "1.mp4")
    read = []
    monkeypatch.setattr(checksums, "crc32_of", lambda file, f=checksums.crc32_of: read.append(file.name) or f(file))
    later = source.fingerprint(known)
    assert (
        read == [str(tmp_path / "1.mp4")]
        and later["0.mp4"] == known["0.mp4"]
        and later["1.mp4"][2] == known["1.mp4"][2]
    )
    (tmp_path / "0.mp4").unlink()
    with pytest.raises(UserError, match="cannot read .*0.mp4"):
        source.fingerprint(known)


def test_statistics_are_measured_again_where_the_autoencoders_are_others(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    shapes = {m: dict.fromkeys(("mean", "std"), jax.ShapeDtypeStruct((4,), np.float32)) for m in ("video", "audio")}
    denoiser = SimpleNamespace(encoder_shapes={"statistics": shapes})
    system, path = SimpleNamespace(stages={"denoiser": denoiser}, parts={}), epath.Path(tmp_path / "statistics.json")
    measured = []
    ones = jax.tree.map(lambda x: np.ones(x.shape), shapes)
    monkeypatch.setattr(latents, "measure", lambda *arguments: measured.append(1) or ones)

    def statistics(value):
        caplog.clear()
        measured.clear()
        params = {"video_autoencoder": {"x": np.full(3, value)}, "clip": {"x": np.zeros(3)}}
        found = latents._statistics(system, params, None, path, 3)
        return float(found["video"]["mean"][0]), len(measured), " ".join(caplog.messages)

    assert statistics(1.0) == (1.0, 1, "") and statistics(1.0) == (1.0, 0, "")
    value, times, line = statistics(2.0)
    assert times == 1 and line.endswith(
        "statistics.json is of other codecs or another text encoder: it is measured again"
    )
    earlier = {m: {name: [0.5] * 4 for name in ("mean", "std")} for m in ("video", "audio")}
    storage.write_json(path, earlier | {"run": 3})  # of an earlier version, and accepted with --unverified
    assert statistics(2.0) == statistics(2.0) == (0.5, 0, "")
    assert statistics(1.0)[:2] == (1.0, 1)


def test_accelerators_forms_measure_the_same(config):
    config.denoiser.statistics_clips = 32
    system = build(config)
    params = {name: weights(tree) for name, tree in system.param_shapes.items()}
    want = latents.measure(system, params, examples(system))
    with ops.backend("gpu"):
        got = latents.measure(system, params, examples(system))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)


def test_clips_are_encoded_once_and_again_when_anything_changed(config, tiny_run, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in ("video_autoencoder", "audio_autoencoder", "clip"):
        (workdir / name).symlink_to(tiny_run / name)
    (workdir / "denoiser").mkdir()
    mesh = sharding.make_mesh(config.mesh)
    encoded = []
    monkeypatch.setattr(latents, "_encoder", lambda *a, f=latents._encoder: encoded.append(1) or f(*a))

    def prepare():
        encoded.clear()
        system = build(config)
        params, (items,) = latents.prepare([system], epath.Path(workdir), [examples(system)], mesh, 0)
        return params, items, len(encoded)

    params, items, times = prepare()
    assert times == 2 and len(items) == 32  # statistics, then latents
    assert set(params) == {"video_autoencoder", "audio_autoencoder", "clip", "statistics"}
    item = jax.tree.map(lambda x: x[0], items.take([5]))
    system = build(config)
    assert {m: z.shape for m, z in item["z"].items()} == system.layout.latent_shapes
    assert {k: x.shape for k, x in item["text"].items()} == {"states": (96, 16), "mask": (96,), "pooled": (16,)}
    assert jax.tree.map(np.shape, item["hard_negative"]) == jax.tree.map(np.shape, item["text"])

    # Item 5 is the sixth clip of the shuffled source.
    order = dict(batch_size=latents.ENCODE_BATCH, seed=config.seed, start=0, data=config.data)
    batch = next(batches.batches(examples(system), **order))
    batch = {name: x[5:6] for name, x in batch.items()}
    wanted = jax.jit(lambda p, b: losses.encode_batch(system, p, b))(params, batch)
    same = lambda a, b: np.testing.assert_allclose(a, b[0], rtol=2e-3, atol=2e-3)  # noqa: E731 half precision
    jax.tree.map(same, item, wanted)

    stored = np.load(workdir / "denoiser" / "latents" / "clips_00000.npy")["z/video"]
    np.testing.assert_array_equal(items.take([3, 0])["z"]["video"], stored[[3, 0]])
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda i: items.take([i])["z"]["video"][0], 8 * list(range(32))))
    np.testing.assert_array_equal(taken, np.tile(stored, (8, 1, 1, 1, 1)))
    again_params, again, times = prepare()
    assert times == 0
    jax.tree.map(np.testing.assert_array_equal, again.take(list(range(32))), items.take(list(range(32))))
    jax.tree.map(np.testing.assert_array_equal, again_params, params)
    config.denoiser.cached_clips = 20
    twenty = prepare()[1]
    assert len(twenty) == 20 and len(encoded) == 1
    jax.tree.map(np.testing.assert_array_equal, twenty.take(list(range(20))), items.take(list(range(20))))
    config.seed = 1
    assert prepare()[2] == 1
    config.denoiser.hard_negatives.words = ()
    assert set(prepare()[1].take([0])) == {"z", "text"} and len(encoded) == 1
    config.denoiser.cached_clips = 0
    assert isinstance(prepare()[1], batches.Examples)


def test_stored_latents_train_as_those_of_the_run(tiny_run, tmp_path, command):
    recipe = f"--config={ROOT / 'tests' / 'tiny.py'}"
    for name in ("own", "given"):
        shutil.copytree(tiny_run, tmp_path / name)
    out = tmp_path / "latents"

    def store(*more):
        more = (f"--workdir={tmp_path / 'given'}", f"--out={out}", "--config.denoiser.steps=12", *more)
        return command(prepare, recipe, "--latents", *more)

    def denoise(name, *more):
        more = ("--stage=denoiser", "--config.denoiser.steps=12", *more)
        return command(train, recipe, f"--workdir={tmp_path / name}", *more)

    told = denoise("given", f"--config.denoiser.latents={out}")
    assert told.code == 2 and f"{out} holds no latents" in told.err[-1]
    assert store().code == 0
    written = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert store().code == 0 and {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == written
    told = store("--config.denoiser.cached_clips=16")
    assert told.code == 2 and "was trained with other settings (denoiser.cached_clips=32, now 16)" in told.err[-1]

    assert denoise("own").code == denoise("given", f"--config.denoiser.latents={out}").code == 0
    assert not (tmp_path / "given" / "denoiser" / "latents").exists()
    rows = [(tmp_path / name / "denoiser" / "metrics.jsonl").read_text().splitlines()[-4:] for name in ("own", "given")]
    losses_of = [[json.loads(row)["loss"] for row in run] for run in rows]
    assert losses_of[0] == losses_of[1] and len(losses_of[0]) == 4

    (out / "clips_00000.npy").unlink()
    told = denoise("given", f"--config.denoiser.latents={out}", "--config.denoiser.steps=16")
    assert told.code == 2 and "lacks 1 of 1 files" in told.err[-1] and "goes on there" in told.err[-1]
    told = denoise("given", f"--config.denoiser.latents={tmp_path}", "--config.denoiser.steps=16")
    assert told.code == 2 and "holds no latents" in told.err[-1]


def test_stored_latents_of_something_else_are_refused(config, tmp_path):
    folder, params = epath.Path(tmp_path / "latents"), {"weights": np.zeros(3)}
    config.data.update(source="tfds", hash="one")
    source = SimpleNamespace()

    def fingerprint():
        return latents._fingerprint(config, params, {})

    latents._begin_stored(folder, fingerprint(), source)
    latents._begin_stored(folder, fingerprint(), source)
    (folder / "clips_00000.npy").touch()
    latents._check_stored(folder, fingerprint(), source)
    config.data.tfds.name = "/moved"
    latents._check_stored(folder, fingerprint(), source)
    for change, told in (
        (lambda: config.data.update(hash="two"), "other videos or captions"),
        (lambda: params.update(weights=np.ones(3)), "other encoders or statistics and other videos"),
        (lambda: config.update(seed=1), "other settings"),
    ):
        change()
        with pytest.raises(UserError, match=told):
            latents._check_stored(folder, fingerprint(), source)
        with pytest.raises(UserError, match=told):
            latents._begin_stored(folder, fingerprint(), source)
    with pytest.raises(UserError, match="holds something else than latents"):
        latents._begin_stored(epath.Path(tmp_path), fingerprint(), source)
