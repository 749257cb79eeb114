"""What a training run reports while it runs: metrics.jsonl, validation.jsonl, boards, a progress line, a heartbeat."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from vdm_jax.errors import UserError
from vdm_jax.run import boards, hosts, storage

logger = logging.getLogger("vdm_jax")

SUSPECTS = {  # settings of a stage that can make a part of its state not finite
    "params": "learning_rate, weight_decay and beta2",
    "ema": "ema",
}
BUCKET_PAUSE = 30  # seconds between two writes of metrics.jsonl in a bucket


@dataclasses.dataclass(eq=False)
class RunLog:
    """The report of one stage's training. The loop goes over `remaining_steps`, and shows a progress bar.

    Each step calls `add`. Then it calls `write` if a line is due, `mean_loss` if a save is due, and `heartbeat`.
    `close` comes when the last save is complete.
    """

    stage: str
    title: str  # of the stage, or of a phase of it, for the user
    phase: int
    directory: Path  # of the stage, for metrics.jsonl and events; heartbeat.json is in the folder above
    stage_steps: int  # of the whole stage
    last_step: int  # of the phase
    done: int  # how many of the steps an earlier start did
    stopwatch: "Stopwatch"  # began with the stage
    sample_ids: Callable  # sample_ids(number) returns the names of the samples in the batch of a step
    stop_after: int  # number of skipped steps in a row that ends the run with an error
    heartbeat_every: float  # seconds
    find_saved: Callable  # find_saved() looks on the disk for the newest complete checkpoint -> its step, or None
    wait_for_save: Callable  # wait_for_save() waits for the current save; called before that error
    wandb: dict | None = None  # arguments of boards.Wandb; None for no Weights & Biases

    def __post_init__(self):
        left = range(self.done + 1, self.last_step + 1)
        self.remaining_steps = tqdm(left, self.title, self.stage_steps, initial=self.done, disable=None, unit="step")
        self.metrics = MetricsLog(self.directory, self.done, self.wandb) if hosts.is_primary() else None
        self.history = []  # metrics of the steps since the last log boundary, on the device
        self.losses = []  # (mean loss, number of steps) for each log boundary since the last save
        self.streak = []  # the Skipped in a row, up to the last logged step
        self.last_beat = float("-inf")
        self.known = self.due = self.find_saved()  # newest complete checkpoint that is known, and the last save begun

    def saved(self):
        """Returns the step of the newest complete checkpoint, or None. It looks on the disk only during a save."""
        if self.known != self.due:
            self.known = self.find_saved()
        return self.known

    def add(self, metrics):
        """Takes the metrics of the next step, on the device: {name: scalar}, with 'loss', 'grad_norm' and 'skipped'."""
        self.history.append(metrics)

    def write(self, number, flush=False):
        """Logs the steps up to `number`. It waits for the device, once.

        flush: see `MetricsLog.write`. A save needs it.
        Raises UserError when `stop_after` steps in a row were skipped.
        """
        means, skipped = summarize(self.history, number + 1 - len(self.history))
        if counted := len(self.history) - len(skipped):
            self.losses.append((means["loss"], counted))
        means |= self.stopwatch.lap(len(self.history))
        means |= {"goodput": self.stopwatch.goodput(), "phase": self.phase}
        self.history = []
        if self.metrics:
            self.metrics.write(number, self.stage, means, flush)
            self._show(number, means)
            for step in skipped:
                ids = self.sample_ids(step.number)
                logger.warning("%s: step %d is skipped (%s), its samples are %s", self.stage, step.number, step, ids)
        self._stop_after_streak(number, skipped)

    def is_validated(self, number):
        """Returns whether validation.jsonl has a line of step `number`."""
        return bool(self.metrics) and self.metrics.validated == number

    def write_validation(self, number, values, files):
        """Logs what validation.py found after step `number`: {name: number} and {name: file}."""
        if self.metrics:
            self.metrics.write_validation(number, self.stage, values, files)

    def _show(self, number, means):
        """Updates the progress bar. When stderr is no terminal, it writes a line instead."""
        loss, waiting = f"{means['loss']:.4f}", f"{means['data_wait_share']:.0%}"
        skipped, saved = self.metrics.skipped, self.saved()
        saved = "-" if saved is None else saved
        self.remaining_steps.set_postfix(dict(loss=loss, data=waiting, skipped=skipped, saved=saved))
        if self.remaining_steps.disable:
            seconds = means["step_seconds"]
            left = tqdm.format_interval((self.stage_steps - number) * seconds)
            logger.info(
                f"{self.title} {number}/{self.stage_steps} loss {loss}  {1e3 * seconds:.0f} ms/step, {waiting} of it "
                f"waiting for data  {skipped} skipped  saved {saved}  {left} left"
            )

    def _stop_after_streak(self, number, skipped):
        for step in skipped:
            follows = self.streak and self.streak[-1].number == step.number - 1
            self.streak = [*self.streak, step] if follows else [step]
            if len(self.streak) >= self.stop_after:
                self.wait_for_save()
                first = self.streak[0]
                raise UserError(
                    f"{self.stage}: {len(self.streak)} steps in a row were skipped, from step {first.number} on "
                    f"({first}); the newest checkpoint is of step {self.saved()}; lower {self.stage}.learning_rate, "
                    f"or look at these samples"
                )
        if self.streak and self.streak[-1].number != number:
            self.streak = []

    def check_state(self, number, finite):
        """Call it before a save. Raises UserError when the state after step `number` is not finite.

        finite: see train_state.finite
        """
        bad = [part for part, good in jax.device_get(finite).items() if not good]
        if bad:
            self.wait_for_save()
            raise UserError(
                f"{self.stage}: step {number} is not saved, because numbers in {' and '.join(bad)} are not finite; the "
                f"newest checkpoint is of step {self.saved()}; look at {self.stage}.{SUSPECTS[bad[0]]}"
            )
        self.due = number

    @property
    def skipping(self):
        """Whether the last logged step was skipped. Then the state may be the cause, and should not be saved."""
        return bool(self.streak)

    def mean_loss(self):
        """Returns the mean loss of the logged steps since the last call; nan when there are none."""
        losses, self.losses = self.losses, []
        count = sum(n for _, n in losses)
        return sum(loss * n for loss, n in losses) / count if count else float("nan")

    def heartbeat(self, number):
        """Writes heartbeat.json after step `number` was started, at most every `heartbeat_every` seconds."""
        if self.metrics and time.monotonic() - self.last_beat > self.heartbeat_every:
            self._beat(number)

    def _beat(self, number):
        self.last_beat = time.monotonic()
        self.metrics.check()
        # The device may be some steps behind. Asking whether a result is there does not wait for it.
        behind = sum(not metrics["loss"].is_ready() for metrics in self.history)
        beat = dict(
            time=time.time(), process=os.getpid(), stage=self.stage, phase=self.phase,
            step=number - behind, steps=self.stage_steps, saved=self.saved(),
            skipped=self.metrics.skipped, goodput=self.stopwatch.goodput(),
        )  # fmt: skip
        storage.replace(self.directory.parent / "heartbeat.json", json.dumps(beat) + "\n")

    def close(self, number):
        """Writes the last heartbeat, after step `number`, and closes the files."""
        if self.metrics:
            self._beat(number)
            self.metrics.close()


class Skipped(NamedTuple):
    """A step whose update was not applied."""

    number: int  # from 1
    loss: float
    grad_norm: float

    def __str__(self):
        return f"loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}"


def summarize(history, first):
    """Returns ({metric: mean}, list of Skipped) for a history [{metric: scalar array}] of steps from number `first` on.

    Skipped steps are left out of the means; when all steps were skipped, 'loss' is nan. A nan in another metric means
    "not measured in this step", and is left out, too.
    """
    values = jax.device_get(history)
    numbered = enumerate(values, first)
    skipped = [Skipped(i, float(v["loss"]), float(v["grad_norm"])) for i, v in numbered if v["skipped"]]
    series = {key: np.array([v[key] for v in values if not v["skipped"]], np.float64) for key in values[0]}
    means = {key: float(v[~np.isnan(v)].mean()) for key, v in series.items() if not np.isnan(v).all()}
    return {"loss": float("nan"), **means, "skipped": len(skipped)}, skipped


class Stopwatch:
    """Measures where wall time goes. `with watch(what):` marks "data", "compiling", "saving" or "validation"."""

    def __init__(self):
        self.began = time.perf_counter()
        self.stepping = 0.0  # seconds in steps before the current lap
        self.start()

    def start(self):
        """Begins a lap, just before the first step."""
        self.lap_began = time.perf_counter()
        self.spent = {}  # seconds of this lap that are not in steps

    @contextlib.contextmanager
    def __call__(self, what):
        began = time.perf_counter()
        yield
        self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - began

    def lap(self, steps):
        """Ends a lap of this many steps, and begins the next lap. Returns the figures of the lap:

        'step_seconds': seconds a step, without saves and validation.
        'data_wait_share': share of this time that the loop waited for data.
        'saving_share': share of all wall time that the steps stood still for a save.
        """
        whole = time.perf_counter() - self.lap_began
        waited, compiling = (self.spent.pop(what, 0.0) for what in ("data", "compiling"))
        seconds = max(whole - sum(self.spent.values()), 1e-9)
        saving = self.spent.get("saving", 0.0) / max(whole, 1e-9)
        self.stepping += seconds - waited - compiling
        self.start()
        return {"step_seconds": seconds / steps, "data_wait_share": waited / seconds, "saving_share": saving}

    def goodput(self):
        """Returns the share of wall time since the beginning of the stage that was spent in steps."""
        return self.stepping / (time.perf_counter() - self.began)


class MetricsLog:
    """metrics.jsonl and validation.jsonl with one JSON object a line, and the boards beside them.

    A run that continues after step `step` drops all later lines, and a last line that a killed run left incomplete.
    `skipped` counts the skipped steps in all lines. `validated` is the step of the last validation, or None.
    """

    def __init__(self, directory, step, wandb=None):
        self.path = path = directory / "metrics.jsonl"
        self.file, self.skipped, _ = open_lines(path, step)
        self.validation, _, self.validated = open_lines(directory / "validation.jsonl", step)
        # A training whose lock was deleted ends, because another one may have begun.
        lock = directory.parent / "lock"
        self.lock = open(lock) if not storage.in_bucket(path) and lock.exists() else None
        self.pause = BUCKET_PAUSE if storage.in_bucket(path) else 0
        self.flushed = time.monotonic()
        self.boards = [boards.TensorBoard(directory, step)] + ([boards.Wandb(directory, **wandb)] if wandb else [])

    def write(self, step, prefix, metrics, flush=False):
        """Writes a line, and `prefix/<key>` for each metric on the boards. A number that is not finite becomes null.

        In a bucket, where no file can grow, the files are written anew after BUCKET_PAUSE, or at once with `flush`.
        """
        self.check()
        self.file.write(_line(step, metrics))
        self.skipped += metrics["skipped"]
        for board in self.boards:
            board.write(step, {f"{prefix}/{key}": value for key, value in metrics.items()})
        if flush or time.monotonic() - self.flushed >= self.pause:
            self.file.flush()
            for board in self.boards:
                board.flush()
            self.flushed = time.monotonic()

    def write_validation(self, step, prefix, values, files):
        """Writes a line of validation.jsonl, and values and files on the boards: {name: number}, {name: path}."""
        self.check()
        for board in self.boards:
            board.write(step, {f"{prefix}/validation/{key}": value for key, value in values.items()})
            board.write_files(step, {f"{prefix}/validation/{key}": path for key, path in files.items()})
            board.flush()
        self.validation.write(_line(step, values))
        self.validation.flush()
        self.validated = step

    def check(self):
        """Raises OSError when the file was deleted, moved or replaced. A bucket has no files that stay open."""
        files = (self.file, self.validation, self.lock)
        for file in () if storage.in_bucket(self.path) else filter(None, files):
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                raise FileNotFoundError(errno.ENOENT, "it was replaced", os.fspath(file.name))

    def close(self):
        for file in filter(None, (self.file, self.validation, self.lock)):
            file.close()
        for board in self.boards:
            board.close()


def _line(step, values):
    """Returns a line of a .jsonl file. A number that is not finite becomes null."""
    return json.dumps({"step": step, **{k: (v if np.isfinite(v) else None) for k, v in values.items()}}) + "\n"


def open_lines(path, step):
    """Returns (a .jsonl file open for more lines, the skipped steps in its lines, the step of the last or None).

    It keeps the good lines up to `step`.
    """
    stored = path.read_bytes() if path.exists() else b""
    kept, skipped, damaged = good_lines(stored, step)
    if damaged:
        logger.warning("%s: %d damaged line(s) are left out", path, damaged)
    last = json.loads(kept.splitlines()[-1])["step"] if kept else None
    return storage.growing(path, stored, kept), skipped, last


def good_lines(stored, step):
    """Returns (the good lines in the bytes of a .jsonl file, the number of skipped steps that they report, and the
    number of damaged lines).

    A line is good when it is complete, is not after `step`, and has a later step than the good line before it. A line
    after `step` is not damaged.
    """
    good, last, skipped, damaged = [], -1, 0, 0
    for line in stored.splitlines():
        try:
            values = json.loads(line.decode())
            number, more = values["step"], values.get("skipped", 0)
            if last < number <= step:
                last, skipped = number, skipped + more
                good.append(line.rstrip() + b"\n")
            damaged += number < last
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += 1
    return b"".join(good), skipped, damaged
