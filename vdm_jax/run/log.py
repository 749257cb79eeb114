"""What a run tells of itself while it trains: metrics.jsonl, TensorBoard events, skipped steps, a heartbeat."""

import contextlib
import json
import os
import time
from typing import NamedTuple

import jax
import numpy as np
from tensorboardX import event_file_writer, summary
from tensorboardX.proto.event_pb2 import Event, SessionLog

from vdm_jax.run import storage

BUCKET_PAUSE = 30  # seconds


class Skipped(NamedTuple):
    """A step whose update was left out."""

    step: int  # its number, from 1
    loss: float
    grad_norm: float

    def why(self):
        return f"loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}"


def summarise(history, first):
    """-> (means of the metrics of consecutive steps, [Skipped]). history: their metrics, still on devices; one sync.

    first: number of the first of the steps. Skipped steps do not count for the means, of which "loss" is nan where all
    were skipped; a part of the loss that a step did not measure (nan) is left out.
    """
    values = jax.device_get(history)
    skipped = [
        Skipped(first + i, float(v["loss"]), float(v["grad_norm"])) for i, v in enumerate(values) if v["skipped"]
    ]
    series = {key: np.array([v[key] for v in values if not v["skipped"]], np.float64) for key in values[0]}
    means = {key: float(v[~np.isnan(v)].mean()) for key, v in series.items() if not np.isnan(v).all()}
    return {"loss": float("nan"), **means, "skipped": len(skipped)}, skipped


def mean(losses):
    """The mean of [(mean loss, number of steps)]; nan for no steps."""
    count = sum(n for _, n in losses)
    return sum(loss * n for loss, n in losses if n) / count if count else float("nan")


class Row:
    """The steps skipped in a row up to now."""

    def __init__(self):
        self.steps = []

    def add(self, skipped, last, limit):
        """Takes in the Skipped of the steps up to number `last`. -> whether `limit` of them came in a row."""
        for one in skipped:
            self.steps = [*self.steps, one] if self.steps and self.steps[-1].step == one.step - 1 else [one]
            if len(self.steps) >= limit:
                return True
        if self.steps and self.steps[-1].step != last:
            self.steps = []
        return False


class Watch:
    """Where the wall time of a stage goes. `with watch("data")`, "saves", "compiling": time that is not in steps."""

    def __init__(self):
        self.began = self.mark = time.perf_counter()
        self.stepping, self.spent = 0.0, {}  # seconds in steps before `mark`; seconds elsewhere since then

    @contextlib.contextmanager
    def __call__(self, what):
        asked = time.perf_counter()
        yield
        self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - asked

    def start(self):
        """The first step follows."""
        self.mark, self.spent = time.perf_counter(), {}

    def lap(self, steps):
        """-> {'step_seconds', 'data_wait_share'} of the `steps` since the last lap, saves and previews left out.

        And 'saving_share': the share of all wall time since then that the steps stood still for a save.
        """
        whole = time.perf_counter() - self.mark
        waited, compiling = (self.spent.pop(what, 0.0) for what in ("data", "compiling"))
        seconds = max(whole - sum(self.spent.values()), 1e-9)
        saving = self.spent.get("saving", 0.0) / max(whole, 1e-9)
        self.stepping += seconds - waited - compiling
        self.start()
        return {"step_seconds": seconds / steps, "data_wait_share": waited / seconds, "saving_share": saving}

    def goodput(self):
        """The share of wall time since the beginning of the stage that went into steps."""
        return self.stepping / (time.perf_counter() - self.began)


class MetricsLog:
    """metrics.jsonl: one object a line, only ever appended to, and TensorBoard events beside it.

    In a bucket both are written anew: at most every BUCKET_PAUSE seconds, and when they are flushed.

    Opened for a run that goes on after `step`, whatever stands behind that step's line is cut off: lines of steps that
    are done again, and one that a killed run left torn. `skipped` counts the steps that the lines say were skipped.
    """

    def __init__(self, directory, step):
        path = directory / "metrics.jsonl"
        stored = path.read_bytes() if path.exists() else b""
        kept, self.skipped = good_lines(stored, step)
        self.file = storage.growing(path, stored, kept)
        self.pause = BUCKET_PAUSE if storage.in_bucket(path) else 0
        self.flushed = time.monotonic()
        self.events = event_file_writer.EventsWriter(os.path.join(directory, "events"))
        if step:  # TensorBoard then forgets the points of later steps
            start = SessionLog(status=SessionLog.START)
            self.events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step, prefix, metrics):
        finite = {k: (v if np.isfinite(v) else None) for k, v in metrics.items()}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.skipped += metrics["skipped"]
        for key, value in metrics.items():
            values = summary.scalar(f"{prefix}/{key}", value)
            self.events.write_event(Event(wall_time=time.time(), step=step, summary=values))
        if time.monotonic() - self.flushed >= self.pause:
            self.flush()

    def flush(self):
        self.file.flush()
        self.events.flush()
        self.flushed = time.monotonic()

    def close(self):
        self.file.close()
        self.events.close()


def good_lines(stored, step):
    """The lines of a metrics.jsonl up to that of `step`, without torn and repeated ones. -> (bytes, steps skipped)."""
    good, last, skipped = [], 0, 0
    for line in stored.splitlines():
        try:
            values = json.loads(line)
            number, more = values["step"], values.get("skipped", 0)
            if not last < number <= step:
                continue
            last, skipped = number, skipped + more
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        good.append(line.rstrip() + b"\n")
    return b"".join(good), skipped


def write_heartbeat(path, **values):
    """A JSON object with the `time` (s since 1970) of writing; the file is whole at any moment."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(json.dumps({"time": time.time(), "process": os.getpid(), **values}) + "\n")
    part.replace(path)


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
