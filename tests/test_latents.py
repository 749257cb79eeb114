"""Latents are scaled to unit variance, and encoded once."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from etils import epath

from tests import tiny
from tests.helpers import weights
from vdm_jax import sharding
from vdm_jax.data import batches
from vdm_jax.errors import UserError
from vdm_jax.models import ops
from vdm_jax.system import build, latents, losses


@pytest.fixture
def config():
    config = tiny.get_config("hard_negatives")
    config.unlock()
    return config


def examples(system):
    source = batches.source(system.config)
    return batches.Examples(source, system.config.data.text_length, system.stages["denoiser"].make_hard_negative)


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
        return latents._cached(system, params, examples(system), epath.Path(tmp_path / folder))

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
    with (folder / "clips_00001.npy").open("wb") as file:
        np.save(file, np.zeros((32, 4)))
    with pytest.raises(UserError, match="clips_00001.npy is damaged"):
        cached("two").take([40])
    cut = (folder / "clips_00002.npy").read_bytes()[:-1]
    (folder / "clips_00002.npy").write_bytes(cut)
    with pytest.raises(UserError, match="clips_00002.npy is damaged"):
        cached("two").take([79])


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
        params, items = latents.prepare(system, epath.Path(workdir), examples(system), mesh)
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
