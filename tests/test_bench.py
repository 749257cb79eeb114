"""The benchmark, on the tiny recipe: its figures are complete and consistent."""

import json

import pytest

from vdm_jax import bench

KEYS = {
    "part", "device", "params", "step_ms", "step_flops", "gflops_per_s", "mfu",
    "peak_memory_bytes", "compile_seconds", "examples_per_s",
}  # fmt: skip
CONFIG = "--config=tests/tiny.py"


@pytest.mark.parametrize(
    "part, more",
    [
        ("train", ["--stage=clip", "--config.data.source=tfds"]),  # without the data set
        ("train", ["--stage=denoiser"]),
        ("sample", ["--method=heun", "--steps=2"]),
        ("encode", []),
        ("data", ["--stage=clip"]),
    ],
)
def test_figures_agree(command, tmp_path, part, more):
    out = tmp_path / "made" / "bench.json"
    done = command(bench, CONFIG, f"--part={part}", f"--out={out}", "--repeats=2", *more)
    assert done.code == 0, done.err
    result = json.loads(out.read_text())
    assert set(result) >= KEYS and result["part"] == part and result["mfu"] is None  # a CPU has no known peak
    assert all(key in done.out for key in KEYS)
    assert result["step_ms"] > 0 and result["examples_per_s"] > 0
    if part == "data":
        assert result["params"] is None
        return
    assert result["gflops_per_s"] == pytest.approx(result["step_flops"] / result["step_ms"] / 1e6)
    assert result["params"] > 1000 and result["peak_memory_bytes"] > 4 * result["params"]
    low, high = result["step_ms_range"]
    assert low <= result["step_ms"] <= high
    if part == "sample":
        assert result["method"] == "heun" and result["denoise_ms"] == result["step_ms"] / 2


def test_twice_the_steps_need_almost_twice_the_flops(command, tmp_path):
    work = {}
    for steps in (2, 4):
        out = tmp_path / f"{steps}.json"
        command(bench, CONFIG, "--part=sample", f"--steps={steps}", f"--out={out}", "--repeats=1")
        work[steps] = json.loads(out.read_text())["step_flops"]
    assert 1.5 < work[4] / work[2] < 2  # the text encoder and the decoders run once


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--config=FILE is missing"),
        ([CONFIG, "--part=all"], "--part"),
        ([CONFIG, "--repeats=0"], "--repeats"),
        ([CONFIG, "--config.denoiser.batch_size=0"], "batch_size=0 must be a whole number of at least 1"),
        ([CONFIG, "more"], "unexpected argument 'more'"),
    ],
)
def test_wrong_input_is_one_clear_line(command, options, message):
    done = command(bench, *options)
    assert done.code == 2 and len(done.err) == 1
    assert done.err[0].startswith("error: ") and message in done.err[0]


def test_a_scene_goes_on_with_the_programs_of_its_first_windows(command, tmp_path):
    out = tmp_path / "bench.json"
    options = ["--part=rollout", "--windows=9", "--config.sample.steps=1", f"--out={out}"]
    done = command(bench, "--config=tests/tiny.py:memory", *options)
    assert done.code == 0, done.err
    result = json.loads(out.read_text())
    assert result["compilations"] == 0
    assert result["early_ms"] > 0 < result["late_ms"] and result["late_bytes"] >= result["early_bytes"] > 1e8
