"""Weights and settings come back as they were, and what is broken or missing is told."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import t2v_pod, world_tiny
from tests import tiny
from tests.conftest import write_run
from vdm_jax import checkpoint, stages, train
from vdm_jax.errors import UserError

PARAMS = {
    "stem": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4) / 7, "bias": np.ones(4, np.float32)},
    "scale": np.float32(0.25),
}
EXPECTED = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)


def state(step, factor=1.0):
    params = jax.tree.map(lambda x: jnp.asarray(factor * x), PARAMS)
    return {"step": jnp.asarray(step), "params": params, "ema": jax.tree.map(lambda x: 2 * x, params)}


def save(directory, *states, keep=2):
    with checkpoint.manager(directory, keep) as checkpoints:
        for one in states:
            checkpoint.save(checkpoints, one)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --------------------------------------------------------------------------------------------------- safetensors


def test_safetensors_come_back(tmp_path):
    path = tmp_path / "w.safetensors"
    checkpoint.write_safetensors(path, PARAMS, 7, np.float32)
    back, step = checkpoint.read_safetensors(path, EXPECTED)
    equal(back, PARAMS)
    assert step == 7
    checkpoint.write_safetensors(path, PARAMS, 0)
    half, _ = checkpoint.read_safetensors(path, EXPECTED)
    equal(half, jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), PARAMS))
    assert {x.dtype for x in jax.tree.leaves(half)} == {np.dtype(np.float32)}


def test_safetensors_of_another_model_are_told(tmp_path):
    path = tmp_path / "w.safetensors"
    stem = PARAMS["stem"]
    for params, words in (
        (
            {**PARAMS, "stem": {**stem, "kernel": stem["kernel"].T}},
            r"stem/kernel has shape \(4, 3\).*asks for \(3, 4\)",
        ),
        ({"stem": stem}, "scale is missing"),
        ({**PARAMS, "more": stem}, "more/bias is unknown"),
    ):
        checkpoint.write_safetensors(path, params, 0)
        with pytest.raises(UserError, match=words):
            checkpoint.read_safetensors(path, EXPECTED)


def test_damaged_safetensors_are_told(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match="missing"):
        checkpoint.read_safetensors(path, EXPECTED)
    for step in ("much", -1, 2**40):
        checkpoint.write_safetensors(path, PARAMS, step)
        with pytest.raises(UserError, match="no readable safetensors"):
            checkpoint.read_safetensors(path, EXPECTED)
    checkpoint.write_safetensors(path, PARAMS, 0)
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[:40], whole[:-3], whole + b"x", b"\xff" * 64, b"PK\3\4" + whole):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no readable safetensors"):
            checkpoint.read_safetensors(path, EXPECTED)


# --------------------------------------------------------------------------------------------------- checkpoints


def test_the_newest_state_comes_back(tmp_path):
    save(tmp_path, state(1), state(2, 5.0), state(3, 7.0))
    with checkpoint.manager(tmp_path) as checkpoints:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))
        restored = checkpoint.restore(checkpoints, abstract)
        assert checkpoints.all_steps() == [2, 3]
    equal(restored, state(3, 7.0))
    with checkpoint.manager(tmp_path / "none") as checkpoints:
        assert checkpoint.restore(checkpoints, abstract) is None


def test_weights_are_the_average_of_the_newest_state(tmp_path):
    save(tmp_path / "clip" / "checkpoints", state(1), state(2, 5.0))
    equal(checkpoint.load_params(tmp_path, "clip", EXPECTED), jax.tree.map(lambda x: 10 * x, PARAMS))
    other = {**EXPECTED, "scale": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(UserError, match=r"scale has shape \(\), the config asks for \(2,\)"):
        checkpoint.load_params(tmp_path, "clip", other)


def test_a_save_that_was_cut_off_does_not_count(tmp_path):
    folder = tmp_path / "clip" / "checkpoints"
    save(folder, state(1))
    rest = folder / "2.orbax-checkpoint-tmp"
    rest.mkdir()
    (rest / "half").write_text("half")
    equal(checkpoint.load_params(tmp_path, "clip", EXPECTED), jax.tree.map(lambda x: 2 * x, PARAMS))
    assert rest.exists()  # it may be a running save of a training run: a reader leaves it alone
    with checkpoint.manager(folder) as checkpoints:
        assert checkpoints.latest_step() == 1
        for _ in range(300):  # the run itself tidies up, in the background
            if not rest.exists():
                break
            time.sleep(0.1)
    assert not rest.exists()


# ----------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("recipe", [tiny, t2v_pod])
def test_settings_come_back_and_are_locked(tmp_path, recipe):
    config = recipe.get_config()
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    back = checkpoint.load_config(tmp_path / "config.json")
    assert back.to_dict() == config.to_dict()
    assert back.is_locked and isinstance(back.denoiser.model.channels, tuple)
    assert stages.layout(back) == stages.layout(config)
    with pytest.raises((AttributeError, KeyError)):
        back.denoiser.stps = 1


def test_statistics_come_back(tmp_path):
    path = tmp_path / "statistics.json"
    statistics = {"video": {"mean": np.array([0.1, -2e-9], np.float32), "std": np.array([1 / 3, 7], np.float32)}}
    checkpoint.write_statistics(path, statistics)
    equal(checkpoint.read_statistics(path), statistics)
    assert [p.name for p in tmp_path.iterdir()] == ["statistics.json"]
    path.write_text(path.read_text()[:-9])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read_statistics(path)
    path.unlink()
    with pytest.raises(UserError, match="unfinished"):
        checkpoint.read_statistics(path)


def test_a_run_that_is_none_or_unfinished_is_told(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        checkpoint.load_trained(tmp_path / "none", stages.abstract_params)
    run = write_run(tmp_path / "run", tiny.get_config(), ("video_autoencoder", "audio_autoencoder"))
    with pytest.raises(UserError, match="unfinished: stage clip has no checkpoint.*--stage=clip"):
        checkpoint.load_trained(run, stages.abstract_params)
    config = run / "config.json"
    config.write_text(config.read_text()[:200])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_trained(run, stages.abstract_params)
    for wrong in ("{}", '{"data": {"frames": 17}}', '{"data": 3}', "[]"):  # whole, but of no run
        config.write_text(wrong)
        with pytest.raises(UserError, match="config.json is (not that of a run|damaged)"):
            checkpoint.load_trained(run, stages.abstract_params)


def test_what_is_exported_is_what_was_trained(tiny_run, tmp_path, monkeypatch, command):
    trained = checkpoint.load_trained(tiny_run, stages.abstract_params)
    assert set(trained.frozen) == {*checkpoint.STAGES, "statistics"}
    monkeypatch.setattr(checkpoint, "REFERENCE", epath.Path(tmp_path / "out"))
    with pytest.raises(UserError, match="no reference weights"):
        checkpoint.load_trained(None, stages.abstract_params)
    done = command(checkpoint, "export", f"--workdir={tiny_run}", f"--out={tmp_path / 'out'}")
    assert done.code == 0 and "MB of weights" in done.out
    exported = checkpoint.load_trained(None, stages.abstract_params)
    assert exported.config.to_dict() == trained.config.to_dict()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), exported.frozen, trained.frozen)

    # -------------------------------------------------------------------------------------- and taken over by a new run
    run = tmp_path / "new" / "run"
    done = command(checkpoint, "import", f"--weights={tmp_path / 'out'}", f"--workdir={run}")
    assert done.code == 0 and f"denoiser at step {tiny.get_config().denoiser.steps}" in done.out
    jax.tree.map(
        np.testing.assert_array_equal, checkpoint.load_trained(run, stages.abstract_params).frozen, exported.frozen
    )
    done = command(checkpoint, "import", "--weights=reference", f"--workdir={run}")
    assert done.code == 2 and len(done.err) == 1 and "holds a run already" in done.err[0]
    done = command(checkpoint, "import", f"--weights={tmp_path}", f"--workdir={tmp_path / 'other'}")
    assert done.code == 2 and len(done.err) == 1 and "holds no weights" in done.err[0]
    longer = f"--config.denoiser.steps={tiny.get_config().denoiser.steps + 2}"
    done = command(train, "--config=tests/tiny.py", f"--workdir={run}", longer, "--config.preview_every=0")
    assert done.code == 0 and any("8 of 10 steps done" in line for line in done.err)
    assert checkpoint.newest_step(run, "denoiser") == tiny.get_config().denoiser.steps + 2

    # ----------------------------------------------------------------------------------------- and by one with more layers
    run = tmp_path / "grown"
    recipe = ["--config=tests/tiny.py", "--config.denoiser.model.text_layers=1"]
    done = command(checkpoint, "import", f"--weights={tmp_path / 'out'}", f"--workdir={run}", *recipe)
    assert done.code == 0 and "denoiser at step 0" in done.out and "text/" in done.out
    grown = checkpoint.load_trained(run, stages.abstract_params)
    cond = {"states": np.ones((1, 96, 16)), "mask": np.ones((1, 96), bool), "pooled": np.ones((1, 16))}
    size = stages.layout(grown.config)
    z = {name: np.ones((1, *shape), np.float32) for name, shape in stages.latent_shapes(size).items()}
    level = {name: np.zeros((1, size.latent_frames)) for name in z}
    outputs = [
        stages.models(one.config)["denoiser"].apply({"params": one.frozen["denoiser"]}, z, level, cond)
        for one in (grown, exported)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *outputs)
    done = command(train, *recipe, f"--workdir={run}", "--config.denoiser.steps=1", "--config.preview_every=0")
    assert done.code == 0
    start = grown.frozen["denoiser"]["stem_video"]["kernel"]
    after = checkpoint.load_trained(run, stages.abstract_params).frozen["denoiser"]["stem_video"]["kernel"]
    assert 0 < np.abs(after - start).max() < 0.1  # one step from the weights, not from a fresh draw
    other = "--config.denoiser.model.embedding=32"  # weights of another shape cannot be taken over
    done = command(checkpoint, "import", "--weights=reference", f"--workdir={tmp_path / 'no'}", *recipe, other)
    assert done.code == 2 and len(done.err) == 1 and "the config asks for" in done.err[0]
    assert not (tmp_path / "no").exists()

    for options in (["export"], ["export", f"--workdir={tiny_run}"], [f"--workdir={tiny_run}", "--out=x"]):
        done = command(checkpoint, *options)
        assert done.code == 2 and len(done.err) == 1 and "usage" in done.err[0]
    (tmp_path / "out" / "clip.safetensors").unlink()
    with pytest.raises(UserError, match="clip.safetensors is missing"):
        checkpoint.load_trained(None, stages.abstract_params)


def test_the_reference_weights_are_those_of_their_recipe():
    exported, recipe = checkpoint.load_config(checkpoint.REFERENCE / "config.json"), world_tiny.get_config()
    for stage in checkpoint.STAGES:
        assert exported[stage].to_dict() == recipe[stage].to_dict()
    for part in ("data", "sample", "evaluate"):
        assert exported[part].to_dict() == recipe[part].to_dict()
    assert (
        checkpoint.load_exported(checkpoint.REFERENCE, stages.abstract_params)[1]["denoiser"] == recipe.denoiser.steps
    )


def test_statistics_are_written_over(tmp_path):
    path = tmp_path / "statistics.json"
    for mean in (1.0, 2.0):
        checkpoint.write_statistics(path, {"video": {"mean": np.full(3, mean), "std": np.ones(3)}})
    np.testing.assert_array_equal(checkpoint.read_statistics(path)["video"]["mean"], [2.0, 2.0, 2.0])
    assert [p.name for p in tmp_path.iterdir()] == ["statistics.json"]
