"""The command that times, on a tiny recipe: what it writes is whole and agrees with itself."""

import json

import pytest

from vdm_jax import bench

KEYS = {"part", "device", "params", "step_ms", "step_flops", "gflops_per_s", "mfu"} | {
    "peak_memory_bytes", "compile_seconds", "examples_per_s",
}  # fmt: skip
CONFIG = "--config=tests/tiny.py"


@pytest.mark.parametrize(
    "part, more",
    [
        ("train", ["--stage=clip", "--config.data.source=tfds"]),  # which is not there
        ("train", ["--stage=denoiser"]),
        ("sample", ["--method=heun", "--steps=2"]),
        ("encode", []),
        ("data", []),
    ],
)
def test_figures_agree(command, tmp_path, part, more):
    out = tmp_path / "made" / "bench.json"
    done = command(bench, CONFIG, f"--part={part}", f"--out={out}", "--repeats=2", *more)
    assert done.code == 0, done.err
    result = json.loads(out.read_text())
    assert set(result) >= KEYS and result["part"] == part and result["mfu"] is None  # a CPU has no stated peak
    assert all(key in done.out for key in KEYS)
    assert result["step_ms"] > 0 and result["examples_per_s"] > 0
    if part == "data":
        assert result["params"] is None
        return
    assert result["gflops_per_s"] == pytest.approx(result["step_flops"] / result["step_ms"] / 1e6)
    assert result["params"] > 1000 and result["peak_memory_bytes"] > 4 * result["params"]
    low, high = result["step_ms_range"]
    assert low <= result["step_ms"] <= high
    if "--stage=denoiser" in more:
        assert result["data_examples_per_s"] > 0
    elif part == "train":
        assert result["data_examples_per_s"] is None and "is not timed: data.tfds.name" in done.err[-1]


def test_twice_the_steps_is_nearly_twice_the_work(command, tmp_path):
    work = {}
    for steps in (2, 4):
        out = tmp_path / f"{steps}.json"
        command(bench, CONFIG, "--part=sample", f"--steps={steps}", f"--out={out}", "--repeats=1")
        work[steps] = json.loads(out.read_text())["step_flops"]
    assert 1.5 < work[4] / work[2] < 2  # text and decoder count once


@pytest.mark.parametrize("options, told", [
    ([], "--config=FILE is missing"),
    ([CONFIG, "--part=all"], "--part"),
    ([CONFIG, "--repeats=0"], "--repeats"),
    ([CONFIG, "--config.denoiser.batch_size=0"], "batch_size=0"),
    ([CONFIG, "more"], "unexpected argument 'more'"),
])  # fmt: skip
def test_wrong_input_is_one_clear_line(command, options, told):
    done = command(bench, *options)
    assert done.code == 2 and len(done.err) == 1
    assert done.err[0].startswith("error: ") and told in done.err[0]
