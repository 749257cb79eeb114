"""What a run tells of itself, and that nothing of it is lost or told twice."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest

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
    assert path.read_text() == WHOLE and path.stat().st_ino == before  # the file itself, not another in its place
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
def test_good_lines_outlive_bad_ones_between_them(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    run_log.MetricsLog(tmp_path, 6).close()
    assert (tmp_path / "metrics.jsonl").read_text() == WHOLE
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
    means, skipped = run_log.summarise(history(1.0, np.nan, 5.0, skipped=(1,)), 7)
    assert means == {"loss": 3.0, "part": 3.0, "grad_norm": 6.0, "skipped": 1}
    (one,) = skipped
    assert one.step == 8 and np.isnan(one.loss) and one.why() == "loss nan, gradient norm nan"
    means, skipped = run_log.summarise(history(1e9, skipped=(0,)), 1)
    assert np.isnan(means["loss"]) and means["skipped"] == 1 and len(skipped) == 1
    assert run_log.mean([(2.0, 3), (np.nan, 0), (4.0, 1)]) == 2.5 and np.isnan(run_log.mean([]))


def test_a_row_goes_on_over_log_lines_and_ends_with_a_good_step():
    def skipped(*steps):
        return [run_log.Skipped(step, np.nan, 1.0) for step in steps]

    row = run_log.Row()
    assert not row.add(skipped(2, 4, 5), 5, 4) and [one.step for one in row.steps] == [4, 5]
    assert not row.add(skipped(6), 7, 4) and not row.steps
    assert not row.add(skipped(9, 10), 10, 4)
    assert row.add(skipped(11, 12, 13, 14), 15, 4) and [one.step for one in row.steps] == [9, 10, 11, 12]


def test_goodput_is_the_share_of_time_in_steps():
    watch = run_log.Watch()
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


def test_a_heartbeat_is_whole_at_any_moment(tmp_path):
    for step in (1, 2):
        run_log.write_heartbeat(tmp_path / "heartbeat.json", step=step)
        beat = json.loads((tmp_path / "heartbeat.json").read_text())
        assert beat["step"] == step and abs(beat["time"] - time.time()) < 1000
    assert [p.name for p in tmp_path.iterdir()] == ["heartbeat.json"]


@pytest.mark.parametrize("seconds, shown", [(0, "0:00:00"), (61.9, "0:01:01"), (360_000, "100:00:00")])
def test_clock(seconds, shown):
    assert run_log.clock(seconds) == shown
