"""Traces of the steps asked for, and only of those."""

import jax
import jax.numpy as jnp
import pytest

from vdm_jax import train
from vdm_jax.errors import UserError
from vdm_jax.run import profiling


def test_spans():
    assert profiling.span("10:15") == (10, 15) and profiling.span("3:3") == (3, 3)
    assert profiling.span(None) is None
    for wrong in ("10", "a:b", "5:3", "0:2", "1:2:3", ":"):
        with pytest.raises(UserError, match="such as 10:15"):
            profiling.span(wrong)


@pytest.mark.parametrize("done, first, last", [(0, 2, 3), (2, 2, 4), (0, 1, 1), (5, 2, 3)])
def test_a_trace_begins_before_its_first_step_and_ends_after_its_last(monkeypatch, tmp_path, done, first, last):
    """For a run that goes on from step `done`: what has been missed is missed."""
    active, traced = [False], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: active.__setitem__(0, True))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: active.__setitem__(0, False))
    after = profiling.tracer((first, last), tmp_path)
    after(done)
    for number in range(done + 1, 9):
        traced += [number] if active[0] else []
        after(number, jnp.ones(()))
    assert traced == [n for n in range(first, last + 1) if n > done] and not active[0]


def test_a_trace_is_written(tmp_path):
    after = profiling.tracer((1, 2), tmp_path)
    after(0)
    for number in (1, 2, 3):
        after(number, jax.jit(lambda x: x @ x)(jnp.ones((8, 8))))
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_wrong_span_is_told_before_anything_is_done(command, tmp_path):
    options = ["--config=tests/tiny.py", f"--workdir={tmp_path / 'run'}", "--profile=15:10"]
    done = command(train, *options)
    assert done.code == 2 and "--profile=15:10" in done.err[0] and not (tmp_path / "run").exists()
