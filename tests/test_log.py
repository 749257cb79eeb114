"""What a run reports while it trains. No line of it is lost or repeated."""

import json
import logging
import shutil
import time

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from vdm_jax import train_state
from vdm_jax.errors import UserError
from vdm_jax.run import folder as run_folder
from vdm_jax.run import log as run_log


def line(step, **more):
    return json.dumps({"step": step, "loss": 0.5, **more}) + "\n"


WHOLE = "".join(map(line, (2, 4, 6)))


@pytest.mark.parametrize(
    "tail",
    [
        "",
        '{"step": 8, "lo',
        line(8),
        line(8) + line(10),
        "\0" * 300,
        "\n",
        '{"step": 8}',
        '{"loss": 1}\n',
        line(6),
        "[]\n",
    ],
)
def test_what_follows_the_restored_step_is_cut_off_in_place(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text(WHOLE + tail)
    before = path.stat().st_ino
    log = run_log.MetricsLog(tmp_path, 6)
    assert path.read_text() == WHOLE and path.stat().st_ino == before  # the same file, not a new one in its place
    log.write(8, "clip", {"loss": np.nan, "skipped": 2})
    log.close()
    assert path.read_text() == WHOLE + '{"step": 8, "loss": null, "skipped": 2}\n'


@pytest.mark.parametrize(
    "content",
    [
        line(2) + "\0\0\n" + line(4) + line(6),
        line(2) + line(4)[:-9] + "\n" + line(4) + line(6),
        line(2) + line(4) + line(4) + line(6),
        line(2) + line(4) + line(6).rstrip(),
        "[" * 100_000 + "\n" + WHOLE,
        line(9) + WHOLE + line(7),
    ],
)
def test_good_lines_outlive_bad_ones_between_them_which_are_told(tmp_path, caplog, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    run_log.MetricsLog(tmp_path, 6).close()
    assert (tmp_path / "metrics.jsonl").read_text() == WHOLE
    bad = "\0" in content or "[" in content or line(4)[:-9] + "\n" in content
    assert ("1 damaged line(s) are left out" in caplog.text) == bad
    assert not list(tmp_path.glob("*.tmp"))


def test_skipped_steps_are_counted_over_restarts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(line(1, skipped=1) + line(2, skipped=3) + line(3, skipped=7))
    log = run_log.MetricsLog(tmp_path, 2)
    assert log.skipped == 4
    log.write(3, "clip", {"loss": 1.0, "skipped": 1})
    assert log.skipped == 5
    log.close()


def history(*losses, skipped=()):
    return [
        {
            "loss": jnp.float32(x),
            "part": jnp.float32(np.nan if i else 3),
            "grad_norm": 2 * x,
            "skipped": float(i in skipped),
        }
        for i, x in enumerate(losses)
    ]


def test_means_leave_out_skipped_steps_and_what_was_not_measured():
    means, skipped = run_log.summarize(history(1.0, np.nan, 5.0, skipped=(1,)), 7)
    assert means == {"loss": 3.0, "part": 3.0, "grad_norm": 6.0, "skipped": 1}
    (one,) = skipped
    assert one.number == 8 and np.isnan(one.loss) and str(one) == "loss nan, gradient norm nan"
    means, skipped = run_log.summarize(history(1e9, skipped=(0,)), 1)
    assert np.isnan(means["loss"]) and means["skipped"] == 1 and len(skipped) == 1


def test_goodput_is_the_share_of_time_in_steps():
    watch = run_log.Stopwatch()
    time.sleep(0.2)  # set-up
    watch.start()
    with watch("compiling"):
        time.sleep(0.2)
    with watch("data"):
        time.sleep(0.1)
    time.sleep(0.3)  # steps
    with watch("saving"):
        time.sleep(0.2)
    lap = watch.lap(3)
    assert watch.spent == {}
    assert 0 < lap["data_wait_share"] < 1 and lap["step_seconds"] > 0.1
    assert 0.2 / 1000 < lap["saving_share"] < 1
    assert watch.stepping >= 0.3 and 0 < watch.goodput() < 1  # a sleep is at least as long as asked


# ----------------------------------------------------------------------------------------------- what the loop calls


def report(directory, done=0, **changed):
    """A RunLog of 6 steps in a folder of its own, and the list of what it called."""
    called = []
    watch = run_log.Stopwatch()
    watch.start()
    directory.mkdir(parents=True, exist_ok=True)
    settings = dict(
        stage_steps=6, last_step=6, done=done, find_saved=lambda: None, stopwatch=watch, stop_after=3,
        heartbeat_every=1000.0, sample_ids=lambda number: f"those of {number}",
        wait_for_save=lambda: called.append("finish"),
    )  # fmt: skip
    return run_log.RunLog("clip", "clip", 1, directory, **{**settings, **changed}), called


def step(loss, skipped=0.0):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1), "skipped": jnp.float32(skipped)}


def read_lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_log_line_holds_the_means_since_the_line_before(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    complete = [None]
    log, _ = report(tmp_path / "clip", find_saved=lambda: complete[-1])
    for number in log.remaining_steps:
        log.add(step(number))
        if number % 2 == 0:
            log.write(number, flush=True)
        if number == 4:
            assert log.mean_loss() == 2.5
            assert np.isnan(log.mean_loss())
            log.check_state(4, {"params": True, "ema": True})  # a save begins
            complete.append(3)  # what is on the disk counts
    log.close(6)
    lines = read_lines(tmp_path / "clip")
    assert [(line["step"], line["loss"], line["skipped"]) for line in lines] == [(2, 1.5, 0), (4, 3.5, 0), (6, 5.5, 0)]
    assert {"step_seconds", "data_wait_share", "saving_share", "goodput"} <= set(lines[0])
    assert list((tmp_path / "clip").glob("events*"))
    shown = [record.message for record in caplog.records]  # lines, because stderr is no terminal here
    assert [line.split("  ")[0] for line in shown] == [
        "clip 2/6 loss 1.5000", "clip 4/6 loss 3.5000", "clip 6/6 loss 5.5000",
    ]  # fmt: skip
    assert "saved -" in shown[1] and "saved 3" in shown[2] and shown[2].endswith("  00:00 left")


def test_a_run_that_continues_reports_the_steps_that_are_left(tmp_path):
    log, _ = report(tmp_path / "clip", done=4)
    assert list(log.remaining_steps) == [5, 6]


def test_skipped_steps_are_named_and_too_many_in_a_row_end_the_run(tmp_path, caplog):
    log, called = report(tmp_path / "clip", find_saved=lambda: 1)
    for skipped in (0, 1, 1):
        log.add(step(np.nan if skipped else 1, skipped))
    log.write(3)
    assert log.skipping and not called
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"clip: step {number} is skipped (loss nan, gradient norm 1), its samples are those of {number}"
        for number in (2, 3)
    ]
    log.add(step(np.nan, 1))
    with pytest.raises(UserError, match="clip: 3 steps in a row were skipped, from step 2 on .* of step 1; lower"):
        log.write(4)
    assert called == ["finish"]
    other, called = report(tmp_path / "other")
    for skipped in (1, 1, 0):
        other.add(step(1, skipped))
    other.write(3)
    assert not other.skipping and not called


def test_a_streak_goes_on_over_log_lines_and_ends_with_a_good_step(tmp_path):
    log, _ = report(tmp_path / "clip", stop_after=4)

    def write(number, marks):
        for skipped in marks:
            log.add(step(1, skipped))
        log.write(number)
        return [one.number for one in log.streak]

    assert write(5, (0, 1, 0, 1, 1)) == [4, 5]
    assert write(7, (1, 0)) == [] and not log.skipping
    assert np.isclose(log.mean_loss(), 1)
    assert write(10, (0, 1, 1)) == [9, 10]
    with pytest.raises(UserError, match="4 steps in a row were skipped, from step 9 on"):
        write(15, (1, 1, 1, 1, 0))


class Unfinished:
    """The loss of a step that the device has not finished."""

    def is_ready(self):
        return False


def test_the_heartbeat_is_written_at_its_pace_and_at_the_end_and_tells_what_is_finished(tmp_path):
    complete = [None]
    log, _ = report(tmp_path / "clip", find_saved=lambda: complete[-1])
    path = tmp_path / "heartbeat.json"

    def check(*values):
        beat = json.loads(path.read_text())
        assert (beat["step"], beat["saved"], beat["steps"], beat["stage"]) == (*values, 6, "clip")
        assert abs(beat["time"] - time.time()) < 1000

    log.check_state(2, {"params": True, "ema": True})  # a save begins
    log.add(step(1))
    log.add({"loss": Unfinished()})
    log.heartbeat(2)
    check(1, None)  # step 2 was started only
    log.heartbeat(3)
    check(1, None)
    log.history, log.heartbeat_every = [step(2)], 0.0
    complete.append(2)
    time.sleep(0.01)
    log.heartbeat(3)
    check(3, 2)
    log.history, log.heartbeat_every = [], 1000.0
    log.check_state(6, {"params": True, "ema": True})
    complete.append(6)
    log.close(6)
    check(6, 6)
    assert not list(tmp_path.glob("*.tmp"))  # it is whole at any moment


@pytest.mark.parametrize("lost", ["deleted", "moved", "replaced", "unlocked"])
def test_a_folder_that_is_gone_is_told_instead_of_written_anew(tmp_path, lost):
    workdir = tmp_path / "run"
    (workdir / "clip").mkdir(parents=True)
    (workdir / "lock").touch()
    log, _ = report(workdir / "clip", heartbeat_every=0.0)
    log.add(step(1))
    log.write(1)
    if lost == "moved":
        workdir.rename(tmp_path / "elsewhere")
    elif lost == "unlocked":  # by the user; another training may have begun
        (workdir / "lock").rename(workdir / "old")
        (workdir / "lock").touch()
    else:
        shutil.rmtree(workdir)
    if lost == "replaced":  # by another training
        other, _ = report(workdir / "clip")
        other.metrics.close()
    before = sorted(tmp_path.rglob("*"))
    for act in (lambda: log.write(2), lambda: log.heartbeat(2)):
        log.add(step(2))
        with pytest.raises(UserError, match="clip: cannot write in .*run: .*deleted, moved or replaced"):
            with run_folder.explain_disk_faults(epath.Path(workdir), "clip"):
                act()
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(FileNotFoundError), run_folder.explain_disk_faults(epath.Path(workdir), "clip"):
        open(tmp_path / "video.mp4")  # no file of the run


@pytest.mark.parametrize("part, settings", [("params", "clip.learning_rate"), ("ema", "clip.ema")])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, part, settings):
    log, called = report(tmp_path / "clip", find_saved=lambda: 4)
    state = {"params": {"a": jnp.ones(3), "b": jnp.ones((2, 2))}, "ema": {"a": jnp.ones(3)}, "opt": ()}
    log.check_state(6, train_state.finite(state))
    assert not called
    for bad in (np.nan, np.inf):
        state[part]["a"] = state[part]["a"].at[1].set(bad)
        with pytest.raises(UserError, match=f"clip: step 6 is not saved.* in {part} .* of step 4; look at {settings}"):
            log.check_state(6, train_state.finite(state))
    assert called == ["finish"] * 2


def test_only_the_primary_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log.hosts, "is_primary", lambda: False)
    log, called = report(tmp_path / "clip")
    for _ in range(3):
        log.add(step(np.nan, 1))
    with pytest.raises(UserError, match="in a row"):  # all processes stop
        log.write(3)
    log.heartbeat(3)
    log.close(3)
    assert called == ["finish"]
    assert [path.name for path in tmp_path.iterdir()] == ["clip"] and not list((tmp_path / "clip").iterdir())
