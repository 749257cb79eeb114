"""Traces hold the steps asked for and no others. Compilation times are remembered."""

import logging

import jax
import jax.numpy as jnp
import pytest

from vdm_jax import train
from vdm_jax.errors import UserError
from vdm_jax.run import profiling, storage


def test_spans():
    assert profiling.span("10:15") == (10, 15) and profiling.span("3:3") == (3, 3)
    assert profiling.span(None) is None
    for wrong in ("10", "a:b", "5:3", "0:2", "1:2:3", ":"):
        with pytest.raises(UserError, match="such as 10:15"):
            profiling.span(wrong)


@pytest.mark.parametrize("done, first, last", [(0, 2, 3), (2, 2, 4), (0, 1, 1), (5, 2, 3)])
def test_a_trace_begins_before_its_first_step_and_ends_after_its_last(monkeypatch, tmp_path, done, first, last):
    """A run that continues from step `done` traces only steps after it."""
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


@pytest.fixture
def said(caplog):
    """Returns the messages since the last call."""
    caplog.set_level(logging.INFO)

    def read():
        messages = list(caplog.messages)
        caplog.clear()
        return messages

    return read


@pytest.fixture
def seconds(tmp_path, monkeypatch):
    """The path of the file that remembers seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vdm_jax" / "compile_seconds.json"


def test_the_seconds_of_the_last_compilation_are_told_before_the_next(seconds, said, monkeypatch):
    clock = iter([0, 54.6, 100, 130, 0, 1])
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: next(clock))
    with profiling.compiling("the training step"):
        assert said() == ["compiling the training step (first time here)"]
    assert said() == ["compiled in 55 s"]
    with profiling.compiling("the training step"):
        assert said() == ["compiling the training step (took 55 s last time)"]
    (last,) = storage.read_json(seconds, "").values()
    assert last == 30 and [p.name for p in seconds.parent.iterdir()] == [seconds.name]
    said()
    with profiling.compiling("the training step", key="1.2 M"):  # another program of that name
        assert said() == ["compiling the training step (first time here)"]
    assert len(storage.read_json(seconds, "")) == 2


def test_a_compilation_that_fails_is_not_remembered(seconds):
    with pytest.raises(ZeroDivisionError), profiling.compiling("it"):
        raise ZeroDivisionError
    assert not seconds.exists()


@pytest.mark.parametrize("content", ["", "[]", "3", '{"a": []}', '{"a": "x"}', "\0", "[" * 100_000])
def test_a_damaged_file_of_seconds_is_replaced(seconds, content, said):
    seconds.parent.mkdir()
    seconds.write_text(content)
    for told in ("first time here", "took 0 s last time"):
        with profiling.compiling("it"):
            assert said() == [f"compiling it ({told})"]
        said()


def test_without_a_home_no_seconds_are_stored(tmp_path, monkeypatch, said):
    """Python then takes ~ for the name of a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", "~/.cache")
    monkeypatch.chdir(tmp_path)
    with profiling.compiling("it"):
        assert said() == ["compiling it (first time here)"]
    assert not list(tmp_path.iterdir())


def test_seconds_that_cannot_be_stored_are_no_error(seconds, said):
    seconds.parent.write_text("")
    for _ in range(2):
        with profiling.compiling("it"):
            assert said() == ["compiling it (first time here)"]
        said()
