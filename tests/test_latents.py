"""Latents are scaled to unit variance, and encoded once."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from tests import tiny
from tests.helpers import weights
from vdm_jax import latents, sharding, stages
from vdm_jax.data import pipeline
from vdm_jax.models import layers


@pytest.fixture
def config():
    config = tiny.get_config("near_misses")
    config.unlock()
    return config


def test_statistics_give_zero_mean_and_unit_variance(config):
    params = {name: weights(tree) for name, tree in stages.abstract_params(config).items()}
    source = pipeline.source(config)
    statistics = latents.measure(config, params, source)
    assert {m: s["mean"].shape for m, s in statistics.items()} == {"video": (4,), "audio": (4,)}
    assert all(np.abs(s["std"] - 1).max() > 0.05 for s in statistics.values())  # not so by chance
    scaled = latents.measure(config, {**params, "statistics": statistics}, source)
    for s in scaled.values():
        np.testing.assert_allclose(s["mean"], 0, atol=1e-3)
        np.testing.assert_allclose(s["std"], 1, rtol=1e-3)


def test_accelerators_forms_measure_the_same(config):
    params = {name: weights(tree) for name, tree in stages.abstract_params(config).items()}
    config.denoiser.statistics_clips = 32
    source = pipeline.source(config)
    want = latents.measure(config, params, source)
    with layers.forms_of("gpu"):
        got = latents.measure(config, params, source)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)


def test_clips_are_encoded_once_and_again_when_anything_changed(config, tiny_run, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in ("video_autoencoder", "audio_autoencoder", "clip"):
        (workdir / name).symlink_to(tiny_run / name)
    (workdir / "denoiser").mkdir()
    mesh = sharding.make_mesh(config.mesh)
    source = pipeline.source(config)
    encoded = []
    monkeypatch.setattr(latents, "_encoded_batches", lambda *a, f=latents._encoded_batches: encoded.append(1) or f(*a))

    def prepare():
        encoded.clear()
        frozen, items = latents.prepare(config, workdir, source, mesh)
        return frozen, items, len(encoded)

    frozen, items, times = prepare()
    assert times == 2 and len(items) == 32  # statistics, then latents
    assert set(frozen) == {"video_autoencoder", "audio_autoencoder", "clip", "statistics"}
    item = jax.tree.map(lambda x: x[0], items.take([5]))
    size = stages.layout(config)
    assert {m: z.shape for m, z in item["z"].items()} == stages.latent_shapes(size)
    assert {k: x.shape for k, x in item["text"].items()} == {"states": (96, 16), "mask": (96,), "pooled": (16,)}
    assert jax.tree.map(np.shape, item["near_miss"]) == jax.tree.map(np.shape, item["text"])

    # Item 5 is the sixth clip of the shuffled source.
    batch = next(
        pipeline.batches(
            source,
            batch_size=latents.ENCODE_BATCH,
            seed=config.seed,
            start=0,
            data=config.data,
            to_example=lambda item: pipeline.example(item, config.data.text_length, config.denoiser.near_misses),
        )
    )
    batch = {name: x[5:6] for name, x in batch.items()}
    z = jax.jit(lambda f, b: stages.encode(config, f, b["video"], b["audio"]))(frozen, batch)
    words = jax.jit(lambda f, b: [stages.encode_text(config, f, b[name]) for name in ("tokens", "near_miss")])
    words = dict(zip(("text", "near_miss"), words(frozen, batch)))
    same = lambda a, b: np.testing.assert_allclose(a, b[0], rtol=2e-3, atol=2e-3)  # noqa: E731 half precision
    jax.tree.map(same, item, {"z": z, **words})

    stored = np.load(workdir / "denoiser" / "latents" / "z_video.npy")
    np.testing.assert_array_equal(items.take([3, 0])["z"]["video"], stored[[3, 0]])
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda i: items.take([i])["z"]["video"][0], 8 * list(range(32))))
    np.testing.assert_array_equal(taken, np.tile(stored, (8, 1, 1, 1, 1)))
    again_frozen, again, times = prepare()
    assert times == 0
    jax.tree.map(np.testing.assert_array_equal, again.take(list(range(32))), items.take(list(range(32))))
    jax.tree.map(np.testing.assert_array_equal, again_frozen, frozen)
    config.denoiser.cached_clips = 20
    twenty = prepare()[1]
    assert len(twenty) == 20 and len(encoded) == 1
    jax.tree.map(np.testing.assert_array_equal, twenty.take(list(range(20))), items.take(list(range(20))))
    config.seed = 1
    assert prepare()[2] == 1
    config.denoiser.near_misses = ()
    assert set(prepare()[1].arrays) == {"z", "text"} and len(encoded) == 1
    config.denoiser.cached_clips = 0
    assert prepare()[1] is source
