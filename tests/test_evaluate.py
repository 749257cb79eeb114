"""The evaluation of a tiny run, and the parts of it against what is known to be true."""

import json
import logging
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.conftest import write_run
from vdm_jax import evaluate, load
from vdm_jax.data import batches, media, writing
from vdm_jax.data.world import World
from vdm_jax.errors import UserError
from vdm_jax.metrics import coherence, distances, episodes, features, report
from vdm_jax.metrics import tasks as task_metrics


@pytest.fixture
def config():
    return tiny.get_config()


def clips_of(items):
    return {part: np.stack([item[part] for item in items]) for part in ("video", "audio")}


def test_a_run_is_evaluated(tiny_run, tmp_path, command):
    out = tmp_path / "new" / "report"
    counts = ["--count=3", "--steps=4", "--suite=all", "--samplers=ddim:2", "--lengths=1,2"]
    done = command(evaluate, f"--workdir={tiny_run}", f"--out={out}", *counts)
    assert done.code == 0, done.err
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["tasks"]) == {"undirected", "image", "continue", "foley", "audio", "rollout"}
    assert len(metrics["tasks"]["rollout"]["seconds"]) == 10 and "Task: rollout" in done.out
    for part in ("truth", "autoencoder", "samples"):
        assert set(report.OUTCOMES) <= set(metrics[part])
    assert {"psnr", "ssim", "onset_within_half_frame"} <= set(metrics["reconstruction"])
    assert metrics["truth"]["one_object"] == metrics["truth"]["permanence"] == 1
    assert metrics["truth"]["two_objects"] is None  # this world has none
    assert metrics["samples"]["one_object"] == metrics["autoencoder"]["one_object"] == 0  # weights are random
    assert 0 < metrics["reconstruction"]["psnr"] < 20
    assert metrics["clip"]["candidates"] == 64 and 0 <= metrics["clip"]["recall_at_1"] < 0.2
    assert 0 <= metrics["clip"]["hard_negative_accuracy"] <= 1
    assert set(metrics["samplers"]) == {"ddim 2"} and set(metrics["samplers"]["ddim 2"]) == set(report.OUTCOMES)
    assert "by sampler and steps" in done.out
    found = metrics["unknown_words"]
    assert found["one_object"] == 0 and found["direction"] < 1 and 0 <= found["empty"] <= 1 and found["prompts"] == 3
    assert set(metrics["intervals"]["unknown_words"]) == {"one_object", "direction", "empty"}
    assert "Prompts in words that no caption has" in done.out
    found = metrics["coherence"]
    assert set(found) == {*episodes.FILMS, "gates", "half_life", "absences", "counterfactual"}
    assert set(found["samples"]) == {"1", "2"} and set(found["samples"]["1"]) == set(coherence.SCORES)
    assert found["truth"]["1"]["light"] == found["gates"]["truth"]["1"]["light"] == 1
    assert set(metrics["intervals"]["coherence"]["truth"]["1"]) >= {"light", "camera"}
    levels = metrics["loss_per_noise_level"]
    assert levels["log_snr"] == [-10.5, -7.5, -4.5, -1.5, 1.5, 4.5, 7.5, 10.5]
    assert all(len(levels[m]) == 8 and min(levels[m]) > 0 for m in ("video", "audio"))
    assert "text ranks its own video first" in done.out and "100 %" in done.out
    page = (out / "report.html").read_text()
    assert page.count("data:video/mp4") == 5 + 3 and page.count("data:image/png") == 3
    video, audio = media.read_video(out / "sample_002.mp4", fps=8, size=(16, 24), sample_rate=2000)
    assert video.shape == (5, 16, 24, 3) and np.abs(audio).max() > 0.01


def test_the_autoencoders_alone(tmp_path, command):
    run = write_run(tmp_path / "run", tiny.get_config(), names=("video_autoencoder", "audio_autoencoder"))
    out = tmp_path / "report"
    done = command(evaluate, f"--workdir={run}", f"--out={out}", "--count=3", "--suite=reconstruction")
    assert done.code == 0, done.err
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["reconstruction"]["psnr"] > 0 and metrics["truth"]["one_object"] == 1
    assert set(metrics["samples"].values()) == {None} and metrics["clip"]["recall_at_1"] is None
    done = command(evaluate, f"--workdir={run}", f"--out={out}")
    assert done.code == 2 and len(done.err) == 1 and "stage clip has no checkpoint" in done.err[0]


def test_a_folder_of_videos_has_no_state_but_all_else(tmp_path, command, config):
    films = tmp_path / "films"
    films.mkdir()
    source = World(seed=5, frames=30, size=(16, 24), sample_rate=2000, **config.data.world)
    for i in range(3):
        item = source[i]
        writing.write_mp4(films / f"{i}.mp4", item["video"], item["audio"], fps=8, sample_rate=2000)
        (films / f"{i}.txt").write_text(f"film number {i}")
    config.data.update(source="files", path=str(films))
    run, out = write_run(tmp_path / "run", config), tmp_path / "report"
    done = command(evaluate, f"--workdir={run}", f"--out={out}", "--count=3", "--steps=4")
    assert done.code == 0, done.err
    metrics = json.loads((out / "metrics.json").read_text())
    for part in ("truth", "autoencoder", "samples"):
        assert set(metrics[part].values()) == {None}
    assert metrics["reconstruction"]["psnr"] > 0 and metrics["reconstruction"]["onset_within_half_frame"] is None
    assert metrics["clip"]["candidates"] == 3 and metrics["clip"]["recall_at_1"] is not None
    assert len(list(out.glob("sample_*.mp4"))) == 3
    assert any("too few captions" in line for line in done.err)
    assert metrics["distances"]["truth"]["clips"] == metrics["distances"]["samples"]["clips"] == 3
    if features.has_packages(*distances.FRAME_PACKAGES, "cv2"):
        assert metrics["distances"]["samples"]["frames"] == 15
        for part in ("autoencoder", "samples"):
            assert metrics["distances"][part]["frechet_frames_lite0"] > 0
        assert {"av_align", "av_align_clips"} <= set(metrics["distances"]["truth"])
        assert "EfficientNet-lite0 (no FID)" in done.out

    other = tmp_path / "other"
    other.mkdir()
    shutil.copyfile(films / "0.mp4", other / "alone.mp4")
    options = [f"--data={other}", "--suite=reconstruction", "--count=2"]
    done = command(evaluate, f"--workdir={run}", f"--out={out}", *options)
    assert done.code == 0, done.err
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["distances"]["autoencoder"]["clips"] == 2 and "films" not in (out / "report.html").read_text()
    assert (
        "clips of the folder" in (out / "report.html").read_text() and str(other) in (out / "report.html").read_text()
    )
    for more, told in {
        "--suite=copies": "--suite=copies compares with the clips of the training: leave out --data",
        f"--fvd_network={tmp_path}/none.pt": "is no file: give a TorchScript (.pt) or an ONNX file (.onnx)",
    }.items():
        done = command(evaluate, f"--workdir={run}", f"--out={out}", f"--data={other}", "--count=2", more)
        assert done.code == 2 and told in done.err[-1]
    done = command(evaluate, f"--workdir={run}", f"--out={out}", "--suite=words")
    assert done.code == 2 and done.err == [
        "error: --suite=words is for the procedural world, whose clips the tracker reads"
    ]


@pytest.mark.parametrize(
    "options, told",
    [
        ([], "--out is missing"),
        (["--out={tmp}/r", "--workdir={tmp}/none"], "there is no folder"),
        (["--out={tmp}/r", "--workdir={tmp}/a", "--weights={tmp}/b"], "only one of --workdir and --weights"),
        (["--out={tmp}/r", "--suite=samples"], "--suite"),
        (["--out={tmp}/r", "--lengths=1,0"], "--lengths=1,0: want whole numbers from 1 to 1000"),
        (["--out={tmp}/r", "--samplers=ddim"], "--samplers=ddim"),
        (["--out={tmp}/r", "--samplers=dpm:4"], "dpmpp_2m"),
        (["--out={tmp}/r", "--count=0"], "--count"),
        (["--out={tmp}/r", "--method=euler"], "--method"),
        (["--out={tmp}/r", "more"], "unexpected argument 'more'"),
        (["--out={tmp}/file", "--workdir={run}"], "cannot make the folder"),
    ],
)
def test_wrong_input_is_one_clear_line(tiny_run, tmp_path, command, options, told):
    (tmp_path / "file").write_text("")
    done = command(evaluate, *(option.format(tmp=tmp_path, run=tiny_run) for option in options))
    assert done.code == 2 and len(done.err) == 1
    assert done.err[0].startswith("error: ") and told in done.err[0]
    assert not (tmp_path / "r").exists()


def test_onsets_of_true_sound_are_found_and_those_of_silence_and_delay_are_not(config):
    with config.unlocked():
        config.data.update(frames=17, sample_rate=8000)
    source = World(seed=11, frames=17, **config.data.world)
    items = [source[i] for i in range(40)]
    audio = clips_of(items)["audio"]
    true = evaluate.onset_errors(config, items, audio)
    assert true["onset_within_half_frame"] >= 0.95 and true["onset_within_half_frame_isolated"] >= 0.98
    assert true["onset_error_ms"] < 5
    late = evaluate.onset_errors(config, items, np.roll(audio, 320, 1))  # 40 ms, less than half a frame of 62
    assert 35 < late["onset_error_ms"] < 45 and late["onset_within_half_frame"] > 0.9
    later = evaluate.onset_errors(config, items, np.roll(audio, 640, 1))
    assert later["onset_within_half_frame_isolated"] < 0.1
    silent = evaluate.onset_errors(config, items, np.zeros_like(audio))
    assert list(silent.values()) == [0, 0, None]


def test_prompts_ask_for_nothing_that_previews_show(config):
    with config.unlocked():
        config.data.world.update(objects=(0.5, 0.5), colors=("red", "green"), shapes=("circle",))
        config.evaluate.prompts = 5
    held_out = batches.source(config, "held_out")
    prompts = evaluate.choose_prompts(config, held_out, seed=3)
    assert [len(p["objects"]) for p in prompts] == [1] * 5 + [2] * 5
    shown = [task_metrics.objects(held_out[i]) for i in range(evaluate.SHOWN_CLIPS)]
    for prompt in prompts:
        assert prompt["objects"] not in shown and prompt["objects"][::-1] not in shown
        for thing in prompt["objects"]:
            assert thing["shape"] == "circle" and thing["color"] in ("red", "green")
            assert all(word in prompt["text"] for word in thing.values())
    assert prompts == evaluate.choose_prompts(config, held_out, seed=3)
    assert prompts != evaluate.choose_prompts(config, held_out, seed=4)
    with config.unlocked():
        config.data.world.update(objects=(0, 0, 1.0), colors=("red", "green", "blue"))
    with pytest.raises(UserError, match="no prompts of one or two objects"):
        evaluate.choose_prompts(config, held_out, seed=3)


def test_other_sources_are_sampled_by_held_out_captions(config):
    with config.unlocked():
        config.data.source = "files"
        config.evaluate.prompts = 3
    captions = ["a", "b", "c", "d", "e", "b", "f"]
    prompts = evaluate.choose_prompts(config, [{"caption": c} for c in captions], seed=0)
    assert [p["text"] for p in prompts] == ["e", "f"]
    prompts = evaluate.choose_prompts(config, [{"caption": c} for c in "abcdabc"], seed=0)
    assert [p["text"] for p in prompts] == ["a", "b", "c"]  # nothing else to show
    assert task_metrics.follow(config, [None], [None], [None]) == []


def test_batches_are_filled_up_and_cut_again(config, caplog):
    caplog.set_level(logging.INFO)
    shapes = []

    def function(params, tree, y):
        shapes.append(y.shape)  # once for each trace
        return {"sum": tree["x"].sum(1) + y + params}

    x, y = np.arange(15.0).reshape(5, 3), np.arange(5.0)
    pipe = SimpleNamespace(config=config, params=1)
    np.testing.assert_allclose(evaluate.batched("adding", function, pipe, {"x": x}, y)["sum"], x.sum(1) + y + 1)
    assert shapes == [(2,)]
    assert caplog.messages == [f"adding: {done} of 5 clips" for done in (2, 4, 5)]


def test_loss_by_level_of_a_network_that_says_nothing(tiny_run, config):
    """v = 0 means eps = sigma z, so the error is alpha^2 (alpha eps - sigma x)^2: alpha^2 (alpha^2 + sigma^2 x^2)."""
    pipe = load(tiny_run)
    pipe.params["denoiser"] = jax.tree.map(jnp.zeros_like, pipe.params["denoiser"])
    source = batches.source(config, "held_out")
    items = [source[i] for i in range(4)]
    clips = clips_of(items)
    columns = evaluate.loss_per_noise_level(pipe, items, clips, seed=0)
    z = jax.jit(lambda p, c: pipe.system.encode(p, c["video"], c["audio"]))(pipe.params, clips)
    for name in ("video", "audio"):
        alpha2 = 1 / (1 + np.exp(-np.array(columns["log_snr"])))
        expected = alpha2 * (alpha2 + (1 - alpha2) * float(jnp.square(z[name]).mean()))
        np.testing.assert_allclose(columns[name], expected, rtol=0.25)
