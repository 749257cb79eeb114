import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vdm_jax.metrics.report import LABELS, OUTCOMES, format_table, html_table, write_report
from vdm_jax.metrics.shares import Difference, Share

SETTINGS = {"prompts": 64, "weights": "<reference> & more"}


@pytest.fixture
def metrics():
    shares = {"truth": 1.0, "autoencoder": 0.975, "samples": 0.625}
    return {
        **{source: dict.fromkeys(OUTCOMES, share) for source, share in shares.items()},
        "reconstruction": {"psnr": 31.27, "ssim": 0.9412, "onset_within_half_frame": 0.96, "onset_error_ms": 1.25},
        "clip": {"recall_at_1": 53 / 64, "candidates": 64},
        "loss_per_noise_level": {
            "log_snr": [-8.0, 0.0, 8.0],
            "video": [0.99, 0.5, 0.031],
            "audio": [0.98, 0.4, 0.02],
        },
    }


class Page(HTMLParser):
    """The elements of a page, with a check that every one that opens also closes."""

    VOID = {"meta", "img", "br"}

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())

    def row(self, label):
        """The cells right of a label, up to the next row."""
        texts = [t for t in self.text if t]
        start = texts.index(label) + 1
        return texts[start : start + 3]


def test_json_has_plain_values(tmp_path, metrics):
    metrics["samples"]["two_objects"] = float("nan")
    metrics["reconstruction"]["psnr"] = math.inf
    write_report(tmp_path, metrics, settings=SETTINGS)
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    read = json.loads(text)
    assert read["samples"]["two_objects"] is None and read["reconstruction"]["psnr"] is None
    assert read["samples"]["one_object"] == 0.625
    assert read["loss_per_noise_level"]["log_snr"] == [-8, 0, 8]


def test_shares_have_their_interval_beside_them(tmp_path, metrics):
    metrics["samples"]["one_object"] = Share(0.75, 64)
    metrics["tasks"] = {"rollout": {"seconds": [2.0, 4.0], "right": [Share(1.0, 32), None]}}
    page = Page(write_report(tmp_path, metrics, settings=SETTINGS))
    assert page.row(LABELS["one_object"][0]) == ["100 %", "98 %", "75 % (63–84)"]
    assert "75 % (63–84)" in format_table(metrics) and "100 % (89–100)" in format_table(metrics)
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read["samples"]["one_object"] == 0.75
    (low, high), nothing = read["intervals"]["tasks"]["rollout"]["right"]
    assert 0.89 < low < high <= 1 and nothing is None
    assert read["intervals"]["samples"] == {"one_object": [Share(0.75, 64).low, Share(0.75, 64).high]}


def test_differences_stand_in_columns(metrics):
    rows = {"one_object": Difference(-0.0125, -0.034, 0.01), "two_objects": None}
    metrics["differences"] = {"ddim 4": rows, "dpmpp_2m 16": rows}
    lines = format_table(metrics).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Difference to"))
    assert lines[start + 1].split("  ")[-1].strip().startswith("-1.2 (-3.4 to +1.0)")
    assert len(lines[start]) == len(lines[start + 1]) == len(lines[start + 2])


def test_table_in_the_terminal(metrics):
    metrics["samples"]["two_objects"] = float("nan")
    metrics["truth"]["position_error_px"] = 0.25  # a number of this source alone
    lines = format_table(metrics).splitlines()
    assert max(map(len, lines)) <= 80
    by_label = {line[:35].strip(): line[35:].split() for line in lines}
    assert by_label[LABELS["one_object"][0]] == ["100", "%", "98", "%", "62", "%"]
    assert by_label[LABELS["two_objects"][0]] == ["100", "%", "98", "%", "–"]
    assert by_label["position error px"] == ["0.250", "–", "–"]
    assert by_label["PSNR"] == ["31.3", "dB"] and by_label["SSIM"] == ["0.941"]
    assert by_label["text ranks its own video first"] == ["83", "%"]
    assert by_label["videos that a text chooses from"] == ["64"]
    assert by_label["median error of an impact's time"] == ["1.2", "ms"]
    assert by_label["log SNR -8.0"] == ["0.990", "0.980"]
    # columns stand under their heads
    head, row = lines[0], next(line for line in lines if line.startswith(LABELS["one_object"][0]))
    assert head.index("truth") + len("truth") == row.index("100 %") + len("100 %")


def test_page_shows_the_numbers_and_escapes_text(tmp_path, metrics):
    page = Page(write_report(tmp_path, metrics, settings=SETTINGS))
    assert page.row(LABELS["one_object"][0]) == ["100 %", "98 %", "62 %"]
    assert page.row("log SNR +8.0")[:2] == ["0.031", "0.020"]
    assert "<reference> & more" in page.text
    bars = [a["style"] for tag, a in page.elements if tag == "td" and a.get("class") == "share"]
    assert "--share:62%" in bars
    assert "width=device-width" in str(page.elements) and "prefers-color-scheme" in str(page.text)


def test_page_needs_no_other_file(tmp_path, metrics):
    sheet, clip = tmp_path / "sheet.png", tmp_path / "clip.mp4"
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(sheet)
    clip.write_bytes(bytes(160))
    media = [('a "red" {circle}', sheet), ("the clip", clip)]
    page = Page(write_report(tmp_path, metrics, settings=SETTINGS, media=media))
    sources = {tag: a["src"] for tag, a in page.elements if "src" in a}
    assert sources["img"].startswith("data:image/png;base64,")
    assert sources["video"].startswith("data:video/mp4;base64,")
    assert [a["alt"] for tag, a in page.elements if tag == "img"] == ['a "red" {circle}']
    assert not any(tag in ("link", "script") for tag, _ in page.elements)


def test_tasks_have_plain_labels(metrics):
    metrics["tasks"] = {
        "continue": {"seam": 0.25, "seam_truth": 0.125, "right": None},
        "rollout": {"seconds": [2.125, 4.25], "right": [1.0, 0.5], "size_drift": [0.0, None]},
    }
    lines = format_table(metrics).splitlines()
    assert max(map(len, lines)) <= 80
    by_label = {label: cells for label, *cells in (re.split(" {2,}", line) for line in lines)}
    assert by_label["velocity change at the seam"] == ["0.250 /s"]
    assert by_label["velocity change at the seam (truth)"] == ["0.125 /s"] and by_label["all objects right"] == ["–"]
    assert by_label["Task: rollout"] == ["right", "size drift"]
    assert by_label["after 2.125 s"] == ["100 %", "0 %"] and by_label["after 4.25 s"] == ["50 %", "–"]


def test_a_share_is_a_bar_and_a_text_never_becomes_html():
    html = html_table("Clips", ["number"], [("<b>", ["40 % (30–50)"]), ("name", ['"><i> %.mp4'])])
    assert 'style="--share:40%"' in html and html.count("--share") == 1
    assert "<i>" not in html and "<b>" not in html and "&lt;b&gt;" in html
