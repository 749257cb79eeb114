"""Weights that are exported, imported and verified."""

import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath

from configs import common, world_tiny, world_words
from tests import damage, tiny
from tests.conftest import write_run
from tests.test_checkpoint import equal, flip
from vdm_jax import diffusion, train, weights
from vdm_jax.data import batches
from vdm_jax.errors import UserError
from vdm_jax.run import checksums, storage
from vdm_jax.run import folder as run_folder
from vdm_jax.system import build, latents
from vdm_jax.system.layout import STAGES
from vdm_jax.system.phases import phases


def test_a_run_that_is_none_or_unfinished_is_told(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*none"):
        run_folder.load(tmp_path / "none", build)
    with pytest.raises(UserError, match="neither a run nor exported weights.*vdm_jax.train"):
        run_folder.load(tmp_path, build)
    run = write_run(tmp_path / "run", tiny.get_config(), ("video_autoencoder", "audio_autoencoder"))
    with pytest.raises(UserError, match="unfinished: stage clip has no checkpoint.*--stage=clip"):
        run_folder.load(run, build)
    config = run / "config.json"
    config.write_text(config.read_text()[:200])
    with pytest.raises(UserError, match="damaged"):
        run_folder.load(run, build)
    for wrong in ("{}", '{"data": {"frames": 17}}', '{"data": 3}', "[]"):  # valid JSON, but no config of a run
        config.write_text(wrong)
        with pytest.raises(UserError, match="config.json (does not fit this version|is damaged)"):
            run_folder.load(run, build)


def test_what_is_exported_is_what_was_trained(tiny_run, tmp_path, monkeypatch, command):
    trained = run_folder.load(tiny_run, build)
    assert set(trained.params) == {*STAGES, "statistics"}
    monkeypatch.setattr(run_folder, "REFERENCE", epath.Path(tmp_path / "out"))
    done = command(weights, "verify", tiny_run)
    assert done.code == 0 and done.out.count(": good") == 6 and "GB/s" in done.out  # with config and statistics
    assert "unknown" not in done.out
    with pytest.raises(UserError, match="no reference weights"):
        run_folder.load(None, build)
    done = command(weights, "export", f"--workdir={tiny_run}", f"--out={tmp_path / 'out'}")
    assert done.code == 0 and "MB of weights" in done.out
    exported = run_folder.load(None, build)
    assert exported.system.config.to_dict() == trained.system.config.to_dict()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), exported.params, trained.params)

    # -------------------------------------------------------------------------------------- and imported as a new run
    run = tmp_path / "new" / "run"
    done = command(weights, "import", f"--weights={tmp_path / 'out'}", f"--workdir={run}")
    assert done.code == 0 and f"denoiser at step {tiny.get_config().denoiser.steps}" in done.out
    equal(run_folder.load(run, build).params, exported.params)
    done = command(weights, "import", "--weights=reference", f"--workdir={run}")
    assert done.code == 2 and len(done.err) == 1 and "holds a run already" in done.err[0]
    done = command(weights, "import", f"--weights={tmp_path}", f"--workdir={tmp_path / 'other'}")
    assert done.code == 2 and len(done.err) == 1 and "neither a run nor exported weights" in done.err[0]
    longer = f"--config.denoiser.steps={tiny.get_config().denoiser.steps + 2}"
    done = command(train, "--config=tests/tiny.py", f"--workdir={run}", longer, "--config.validation.every=0")
    assert done.code == 0 and any("8 of 10 steps done" in line for line in done.err)
    assert run_folder.newest_step(run, "denoiser") == tiny.get_config().denoiser.steps + 2

    # ------------------------------------------------------------- and imported to train a stage again from step 0
    run = tmp_path / "tuned"
    whole = ["import", f"--weights={tmp_path / 'out'}", f"--workdir={run}"]
    done = command(weights, *whole, "--restart=audio_autoencoder", "--restart=denoiser")
    assert done.code == 0 and "audio_autoencoder at step 0" in done.out and "denoiser at step 0" in done.out
    assert f"video_autoencoder at step {tiny.get_config().video_autoencoder.steps}" in done.out
    equal(run_folder.load(run, build).params, exported.params)
    done = command(weights, *whole, "--restart=decoder")
    assert done.code == 2 and "decoder" in done.err[-1]

    # ------------------------------------------------------------------------------------ and imported with more layers
    run = tmp_path / "grown"
    recipe = ["--config=tests/tiny.py", "--config.denoiser.model.text_layers=1"]
    done = command(weights, "import", f"--weights={tmp_path / 'out'}", f"--workdir={run}", *recipe)
    assert done.code == 0 and "denoiser at step 0" in done.out and "text/" in done.out
    grown = run_folder.load(run, build)
    cond = {"states": np.ones((1, 96, 16)), "mask": np.ones((1, 96), bool), "pooled": np.ones((1, 16))}
    layout = grown.system.layout
    z = {name: np.ones((1, *shape), np.float32) for name, shape in layout.latent_shapes.items()}
    log_snr = {name: np.zeros((1, layout.latent_frames)) for name in z}
    outputs = [
        jax.jit(made.system.models["denoiser"].apply)({"params": made.params["denoiser"]}, z, log_snr, cond)
        for made in (grown, exported)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *outputs)
    done = command(train, *recipe, f"--workdir={run}", "--config.denoiser.steps=1", "--config.validation.every=0")
    assert done.code == 0
    start = grown.params["denoiser"]["stem_video"]["kernel"]
    after = run_folder.load(run, build).params["denoiser"]["stem_video"]["kernel"]
    assert 0 < np.abs(after - start).max() < 0.1  # one step from the imported weights, not from fresh ones
    other = "--config.denoiser.model.embedding=32"  # weights of another shape cannot be imported
    done = command(weights, "import", "--weights=reference", f"--workdir={tmp_path / 'no'}", *recipe, other)
    assert done.code == 2 and len(done.err) == 1 and "the config asks for" in done.err[0]
    assert not (tmp_path / "no").exists()

    for options in (["export"], ["export", f"--workdir={tiny_run}"], [f"--workdir={tiny_run}", "--out=x"]):
        done = command(weights, *options)
        assert done.code == 2 and len(done.err) == 1 and "usage" in done.err[0]
    done = command(weights, "verify", tmp_path / "out")
    assert done.code == 0 and done.out.count(": good") == 3
    done = command(weights, "verify", tmp_path / "nothing")
    assert done.code == 2 and len(done.err) == 1 and "is not a folder" in done.err[0]
    flip(tmp_path / "out" / "clip.safetensors")
    with pytest.raises(UserError, match="clip.safetensors is damaged"):
        run_folder.load(None, build)
    done = command(weights, "verify", tmp_path / "out")
    assert done.code == 2 and len(done.err) == 1 and "clip.safetensors is damaged" in done.err[0]
    flip(tmp_path / "out" / "clip.safetensors")
    (tmp_path / "out" / checksums.NAME).unlink()
    with pytest.raises(UserError, match="out has no checksums.txt.*restore this file, or import .* --unverified"):
        run_folder.load(None, build)
    equal(run_folder.load(None, build, unverified=True).params, exported.params)
    done = command(weights, "verify", tmp_path / "out")
    assert done.code == 2 and len(done.err) == 1 and "no checksums.txt" in done.err[0] and "--unverified" in done.err[0]
    assert command(weights, "verify", tmp_path / "out", "--unverified").code == 0
    options = ["import", f"--weights={tmp_path / 'out'}", f"--workdir={tmp_path / 'unverified'}"]
    done = command(weights, *options)
    assert done.code == 2 and len(done.err) == 1 and not (tmp_path / "unverified").exists()
    assert command(weights, *options, "--unverified").code == 0
    checksums.write(tmp_path / "out")
    (tmp_path / "out" / "clip.safetensors").unlink()
    with pytest.raises(UserError, match="clip.safetensors is missing"):
        run_folder.load(None, build)


def test_an_export_leaves_other_files_alone_and_is_no_run(tmp_path):
    damage.make(tmp_path, 1)
    out, notes = epath.Path(tmp_path / "out"), tmp_path / "out" / "notes\udcff.txt"
    whole = SimpleNamespace(**vars(damage.SYSTEM), config=damage.config_of(1))

    def load():
        return run_folder.load(out, lambda config: whole)

    notes.write_text("a note")
    trained = load()
    fewer = {stage: step for stage, step in trained.steps.items() if stage != "clip"}
    run_folder.write_exported(out, trained._replace(steps=fewer), tmp_path / "run")
    assert not (out / "clip.safetensors").exists()  # of the earlier export
    run_folder.write_exported(out, trained, tmp_path / "run")
    notes.write_text("an edited note")
    equal(load().params, trained.params)

    before = {path: path.read_bytes() for path in out.iterdir()}
    for unverified in (False, True):
        with pytest.raises(UserError, match="out holds exported weights, and no run: .* import --weights=.*out"):
            run_folder.write_config(out, damage.config_of(1), STAGES, unverified=unverified)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_an_import_tells_what_its_config_changes(capsys):
    config, steps = tiny.get_config(), dict.fromkeys(STAGES, 8)

    def check(changes, restarted=()):
        changed = tiny.get_config()
        changed.update_from_flattened_dict(changes)
        done = steps | dict.fromkeys(restarted, 0)
        weights.check_changes(config, run_folder.Weights(SimpleNamespace(config=changed), {}, done))
        return capsys.readouterr().out

    assert check({}) == check({"log_every": 7}) == ""
    told = check({"data.frames": 9, "seed": 1})
    assert told == "data.frames: 5 for the weights, 9 in the new run\nseed: 0 for the weights, 1 in the new run\n"
    target = {"denoiser.diffusion.target": "x0"}
    with pytest.raises(UserError, match="trained with denoiser.diffusion.target='v'.*--restart=denoiser"):
        check(target)
    assert "'x0' in the new run" in check(target, ["denoiser"])
    with pytest.raises(
        UserError, match="^clip.steps=7, but 8 steps are done in the weights: give at least 8, or --restart=clip$"
    ):
        check({"clip.steps": 7})
    assert "clip.steps" in check({"clip.steps": 7}, ["clip"])


def test_verify_tells_damage_from_a_save_under_way_and_names_what_it_does_not_know(tiny_run, tmp_path, command):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    latents_folder = run / "denoiser" / "latents"
    latents_folder.mkdir()
    fingerprint = dict.fromkeys(latents.PARTS, "a")
    storage.write_json(latents_folder / latents.FINGERPRINT, fingerprint)
    clips = {"z": np.ones((4, 3), np.float16)}
    path = epath.Path(latents_folder / "clips_00000.npy")
    latents._write(path, [clips], latents._record(clips), 0, 4, latents._mark(fingerprint))
    saving = run / "clip" / "checkpoints" / "12.orbax-checkpoint-tmp"
    saving.mkdir()
    (run / "clip" / "damaged").mkdir()
    (run / "clip" / "notes.txt").write_text("mine")
    with run_folder.exclusive_lock(run):
        done = command(weights, "verify", run)
    assert done.code == 0 and done.out.count(": good") == 7, done.err
    lines = done.out.splitlines()
    assert f"{saving}: a save under way" in lines
    assert f"{run / 'clip' / 'damaged'}: set aside, not checked" in lines
    assert f"{run / 'clip' / 'notes.txt'}: unknown, not checked" in lines
    flip(path)
    done = command(weights, "verify", run)
    assert done.code == 2 and done.err == [f"error: {path} is damaged: remove it, to encode its clips anew"]
    assert f"{saving}: the rest of a save; the next start deletes it" in done.out.splitlines()
    shutil.rmtree(latents_folder)
    (run / "clip" / "checkpoints" / "8").rename(run / "clip" / "checkpoints" / "9")
    done = command(weights, "verify", run)
    assert done.code == 2 and "9 is step 8 of run 0, where step 9 of run 0 belongs, or accept this" in done.err[0]
    (run / "denoiser" / "statistics.json").write_text("[]")
    for spoil in ((run / "config.json").unlink, lambda: (run / "config.json").write_text("{}")):
        spoil()
        done = command(weights, "verify", run)
        assert done.code == 2 and done.out.count("DAMAGED") == 2 and "and 1 more are damaged" in done.err[0]


def merged(defaults, settings):
    """`defaults`, with the values of `settings` in their place; both may hold dicts."""
    if not isinstance(settings, dict) or not isinstance(defaults, dict):
        return settings
    if settings.keys() <= set(diffusion.PATTERNS):  # shares: those that are not named are 0
        return settings
    return {**defaults, **{key: merged(defaults.get(key, {}), value) for key, value in settings.items()}}


def test_the_reference_weights_are_those_of_their_recipe():
    exported, recipe = run_folder.read_config(run_folder.REFERENCE), world_tiny.get_config()
    defaults = common.get_config()
    for part in (*STAGES, "data", "sample", "evaluate"):
        # A setting that is newer than the weights has its default.
        known = merged(defaults[part].to_dict(), exported[part].to_dict())
        assert known == recipe[part].to_dict()
    assert checksums.check(run_folder.REFERENCE) > 1e6
    assert run_folder.load(None, build).steps["denoiser"] == recipe.denoiser.steps


# Of the reference weights, on four held-out clips. Other weights with the same settings have other losses.
LOSSES = {"video_autoencoder": 0.0120864, "audio_autoencoder": 0.0997274, "clip": 0.137986, "denoiser": 0.133068}


@pytest.mark.parametrize("name", STAGES)
def test_the_reference_weights_have_their_losses(name):
    weights = run_folder.load(None, build)
    system, stage = weights.system, weights.system.stages[name]
    examples = batches.Examples(batches.source(system.config, "held_out"), system.tokenize, stage.make_hard_negative)
    batch = examples.take(range(4))
    loss, _ = jax.jit(stage.loss)(weights.params[name], jax.random.key(0), batch, weights.params)
    np.testing.assert_allclose(loss, LOSSES[name], rtol=1e-4)


def test_the_begun_run_can_go_on():
    """The weights at the end of a phase are whole, and the next phase of their recipe begins with them."""
    folder = epath.Path(__file__).parents[1] / "configs" / "world_words_begun"
    assert checksums.check(folder) > 1e6
    begun = run_folder.load(folder, build)
    recipe = build(world_words.get_config())
    planned_phases = phases(recipe, "denoiser")
    done = begun.steps["denoiser"]
    assert begun.steps == {name: recipe.config[name].steps for name in STAGES[:3]} | {"denoiser": done}
    assert done in [phase.start for phase in planned_phases[1:]]
    finished = [phase for phase in planned_phases if phase.start < done]
    for trained, planned in zip(phases(begun.system, "denoiser"), finished):
        # A setting that is newer than the weights has its default, and one that is gone does not count.
        known = merged(common.get_config().to_dict(), trained.system.config.to_dict())
        expected = planned.system.config.to_dict()
        assert {key: known[key] for key in expected} == expected
