"""Long steps show a bar on a terminal, and plain lines elsewhere."""

import io
import logging

import pytest

from vdm_jax.run import hosts
from vdm_jax.run.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(parts):
    with progress("sampling", sum(parts), "clip") as advance:
        for part in parts:
            advance(part)


def test_lines_where_stderr_is_no_terminal(caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    caplog.set_level(logging.INFO)
    shown([8, 8, 4])
    assert caplog.messages == [f"sampling: {done} of 20 clips" for done in (8, 16, 20)]
    caplog.clear()
    shown([1] * 100)
    assert caplog.messages == [f"sampling: {done} of 100 clips" for done in range(10, 101, 10)]
    caplog.clear()
    shown([20])
    assert caplog.messages == []


def test_a_bar_on_a_terminal(caplog, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    caplog.set_level(logging.INFO)
    shown([8, 12])
    assert "sampling:" in terminal.getvalue() and "/20" in terminal.getvalue() and caplog.messages == []


@pytest.mark.parametrize("stderr", [io.StringIO(), Terminal()])
def test_other_processes_show_nothing(caplog, monkeypatch, stderr):
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(hosts, "is_primary", lambda: False)
    caplog.set_level(logging.INFO)
    shown([8, 12])
    assert stderr.getvalue() == "" and caplog.messages == []
