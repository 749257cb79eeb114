"""The results of an evaluation: metrics.json for programs, report.html for people, and a table for the terminal.

`metrics` is {"truth": M, "autoencoder": M, "samples": M, "reconstruction": {...}, "clip": {...}}; M has the keys of
OUTCOMES, and None where a value is missing. "truth" is held-out clips, "autoencoder" is the same clips encoded and
decoded. These keys may be there, too:

  loss_per_noise_level   columns of one length, "log_snr" (natural logarithm) and a loss for each modality
  samplers               {name: M}
  differences            {name: like M, of the same prompts, minus "samples"}
  wordings               outcomes of prompts in words that training did not combine
  unknown_words          outcomes of prompts in words that no caption has, and the number of prompts
  distances              {"truth", "autoencoder" and "samples": what metrics/distances.py measures}
  copies                 distances to training clips
  tasks                  {task: {figure: value}}; the values of a task with "seconds" are columns of one length
  coherence              what metrics/episodes.py measures

A shares.Share is shown with its 95 % interval; metrics.json has the intervals apart, under "intervals".
"""

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence

from etils import epath

from vdm_jax.errors import UserError
from vdm_jax.metrics.shares import Difference, Share
from vdm_jax.run import storage

SOURCES = ("truth", "autoencoder", "samples")
OUTCOMES = ("one_object", "two_objects", "direction", "permanence", "size_drift", "sync_impacts", "sync_onsets")
LABELS = {  # key -> (label, unit of the value); %: the value is a share in 0..1, shown with a bar
    "one_object": ("one object: color and shape right", "%"),
    "two_objects": ("two objects: color and shape right", "%"),
    "direction": ("direction of motion right", "%"),
    "count": ("number of objects right", "%"),
    "empty": ("clips that show nothing", "%"),
    "permanence": ("frames that show the object", "%"),
    "returns": ("objects that come back into sight", "%"),
    "size_drift": ("change of size (less is better)", "%"),
    "color_drift": ("change of color (less is better)", "%"),
    "sync_impacts": ("visible impacts with a sound", "%"),
    "sync_onsets": ("sounds with a visible impact", "%"),
    "psnr": ("PSNR", "dB"),
    "ssim": ("SSIM", ""),
    "si_sdr": ("SI-SDR", "dB"),
    "mel_error": ("mean error of a mel band's level", "dB"),
    "onset_recall": ("onsets of the sound found within half a frame", "%"),
    "onset_precision": ("onsets found that the sound has", "%"),
    "tones_kept": ("tones kept, within a semitone and 3 dB", "%"),
    "onset_within_half_frame": ("impacts heard within half a frame", "%"),
    "onset_within_half_frame_isolated": ("lone impacts heard within half a frame", "%"),
    "onset_error_ms": ("median error of an impact's time", "ms"),
    "true_onset_within_half_frame": ("true sound: heard within half a frame", "%"),
    "recall_at_1": ("text ranks its own video first", "%"),
    "candidates": ("videos that a text chooses from", ""),
    "hard_negative_accuracy": ("caption beats its hard negative", "%"),
    "first_frame_psnr": ("PSNR of the first frame", "dB"),
    "first_frame_psnr_reconstructed": ("PSNR of the first frame, reconstructed", "dB"),
    "moves": ("clips in which something moves", "%"),
    "right": ("all objects right", "%"),
    "given": ("velocity change before the seam", "/s"),
    "seam": ("velocity change at the seam", "/s"),
    "inside": ("velocity change after the seam", "/s"),
    "samples_to_training": ("samples to the nearest training clip", ""),
    "held_out_to_training": ("held-out clips to the nearest", ""),
    "ratio": ("ratio of both; copies have less than 1", ""),
    "ratio_low": ("lower end of its 95 % interval", ""),
    "ratio_high": ("upper end of its 95 % interval", ""),
    "frechet_frames_lite0": ("Fréchet distance of frames, EfficientNet-lite0 (no FID)", ""),
    "frechet_video": ("Fréchet video distance, network of --fvd_network", ""),
    "av_align": ("AV-Align", ""),
    "av_align_clips": ("clips with onsets or motion peaks", ""),
    "feature_drift": ("drift of features", ""),
    "histogram_drift": ("drift of color histograms", ""),
    "cuts": ("cuts", "/min"),
    "flicker": ("flicker", "levels"),
    "frozen": ("frozen frames", "%"),
    "loudness_steps": ("loudness steps", "/min"),
}
COHERENCE = {  # score of metrics/coherence.py -> label
    "identity": "identity: things as at the beginning",
    "permanence": "permanence: things come back as themselves",
    "place": "place: they come back where they should",
    "velocity": "velocity: constant between impacts",
    "bounce": "bounce: the speed after an impact on a wall",
    "gravity": "gravity: things fall as they should",
    "cause": "cause: each change of motion has one",
    "effect": "effect: at a wall the motion changes",
    "heard": "heard: changes of motion with a sound",
    "explained": "explained: sounds with a change of motion",
    "light": "light: as in the frame before",
    "camera": "camera: as in the frame before",
}
PLACES = {"dB": 1, "ms": 1, "/min": 1}  # decimal places of a unit; others have three
TITLES = {
    "reconstruction": "Autoencoders, on held-out clips",
    "clip": "Text encoder, on held-out clips",
    "loss_per_noise_level": "Loss by noise level",
    "samplers": "The same prompts, by sampler and steps",
    "differences": "Difference to the samples above, points",
    "wordings": "Prompts in words that training did not combine",
    "unknown_words": "Prompts in words that no caption has",
    "copies": "Copies of training clips",
    "distances": "Distances to the true clips, and sound against motion",
}
AXES = {"log_snr": "log SNR {:+.1f}", "seconds": "after {:g} s"}  # key of a column -> label of a row
MEDIA = {  # suffix -> element that shows a file
    ".png": '<img alt="{caption}" src="data:image/png;base64,{data}">',
    ".mp4": '<video controls loop playsinline src="data:video/mp4;base64,{data}"></video>',
}


def _label(key: str) -> tuple[str, str]:
    """Returns the label and the unit of a key. `x_truth` is the same measure as x, of the true clips."""
    base = key.removesuffix("_truth")
    label, unit = LABELS.get(base, (base.replace("_", " "), ""))
    return label + " (truth)" * key.endswith("_truth"), unit


def _cell(key: str, value: float | int | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    _, unit = _label(key)
    if isinstance(value, Share):
        return f"{100 * value:.0f} % ({100 * value.low:.0f}–{100 * value.high:.0f})"
    if isinstance(value, Difference):
        return f"{100 * value:+.1f} ({100 * value.low:+.1f} to {100 * value.high:+.1f})"
    if unit == "%":
        return f"{100 * value:.0f} %"
    text = f"{value:.{PLACES.get(unit, 3)}f}" if isinstance(value, float) else str(value)
    return f"{text} {unit}".rstrip()


def _table(title: str, figures: Mapping) -> tuple:
    """Returns (title, columns, [(label, a text for each column)]).

    figures: {key: value}, {column: {key: value}}, or {name: column of numbers} with one name of AXES.
    """
    for axis, label in AXES.items():
        if axis in figures:
            names = [name for name in figures if name != axis]
            points = zip(figures[axis], *(figures[name] for name in names), strict=True)
            lines = [(label.format(x), [_cell(*pair) for pair in zip(names, values)]) for x, *values in points]
            return title, [name.replace("_", " ") for name in names], lines
    columns = figures if all(isinstance(value, Mapping) for value in figures.values()) else {"": figures}
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    lines = [(_label(key)[0], [_cell(key, column.get(key)) for column in columns.values()]) for key in keys]
    return title, [*columns], lines


def read_outcomes(path: epath.Path) -> tuple:
    """Returns (columns, [(label, a text for each column)]) of the outcomes in a metrics.json. Raises UserError.

    Outcomes that no source has are left out.
    """
    fix = "give the metrics.json of python -m vdm_jax.evaluate"
    metrics = storage.read_json(path, fix, sealed=False)

    def outcome(source, key):
        value, interval = metrics[source][key], metrics["intervals"].get(source, {}).get(key)
        if value is None or not interval:
            return value if value is None else float(value)
        low, high = map(float, interval)
        return Share.within(float(value), low, high)

    try:
        read = {source: {key: outcome(source, key) for key in OUTCOMES} for source in SOURCES}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path} has no table of outcomes ({type(error).__name__}: {error}): {fix}") from None
    found = [key for key in OUTCOMES if any(column[key] is not None for column in read.values())]
    if not found:
        raise UserError(f"{path} has no outcomes, which only the procedural world has: leave out --report")
    return _table("", {source: {key: column[key] for key in found} for source, column in read.items()})[1:]


def _tables(metrics: Mapping) -> list[tuple]:
    """Returns all that the page and the terminal show, as `_table` returns it."""
    tables = [_table("Clips compared with their prompts", {source: metrics[source] for source in SOURCES})]
    tables += [_table(title, metrics[key]) for key, title in TITLES.items() if key in metrics]
    tables += [_table(f"Task: {task}", figures) for task, figures in metrics.get("tasks", {}).items()]
    return tables + (_coherence_tables(metrics["coherence"]) if "coherence" in metrics else [])


def _coherence_tables(figures: Mapping) -> list[tuple]:
    """Returns the tables of coherence: a row for each score, a column for each length."""

    def by_length(rows):
        named = {n: {COHERENCE[name]: value for name, value in row.items()} for n, row in rows.items()}
        return {f"{n} clip" + "s" * (n > 1): row for n, row in named.items()}

    films = {"samples": "the model", "truth": "true films", "autoencoder": "the autoencoders", "chance": "chance"}
    tables = [_table(f"Coherence of {title}, by length", by_length(figures[name])) for name, title in films.items()]
    tables.append(_table("Share of the model's films with the event", by_length(figures["gates"]["samples"])))
    absences = {f"away {absence:g} clips": row for absence, row in figures["absences"].items()}
    tables.append(_table("Things that come back as themselves", absences))
    reached = {COHERENCE[name]: length for name, length in figures["half_life"].items() if length is not None}
    tables.append(_table("Half-life in clips, where it is reached", reached or {"none is reached": None}))
    changed = figures["counterfactual"]  # nothing where the world has clips of one thing only
    return tables + ([_table("Counterfactuals: one thing is changed", changed)] if changed else [])


def format_table(metrics: Mapping) -> str:
    """Returns the tables as plain text for a terminal; a missing value is a dash."""
    return format_tables(_tables(metrics))


def format_tables(tables: Sequence[tuple]) -> str:
    """As `format_table`, of tables as `_table` returns them."""
    width = max(len(text) for title, _, rows in tables for text in [title, *(label for label, _ in rows)])

    blocks = []
    for title, columns, rows in tables:
        lines = [(title, columns), *rows]
        cell = max(14, *(len(text) for _, cells in lines for text in cells))
        texts = [f"{label:<{width}}" + "".join(f" {text:>{cell}}" for text in cells) for label, cells in lines]
        blocks.append("\n".join(text.rstrip() for text in texts))
    return "\n\n".join(blocks)


def film_tables(measured: Mapping) -> list[tuple]:
    """Returns the tables of films, as `_table` returns one. measured: as films.measure_folder returns it."""
    films, folder, left_out = measured["films"], measured["folder"], measured["left_out"]
    rows = [(name, [_cell(*pair) for pair in film["scores"].items()]) for name, film in films.items()]
    tables = [("Films", [_label(key)[0] for key in folder], rows)]
    counts = {key: sum(film["scores"][key] is not None for film in films.values()) for key in folder}
    means = [(_label(key)[0], [_cell(key, folder[key]), str(counts[key])]) for key in folder]
    tables.append(("All films", ["mean", "films"], means))
    if left_out:
        names = [(reason, [str(files["count"]), ", ".join(files["first"])]) for reason, files in left_out.items()]
        tables.append(("Left out", ["files", "the first"], names))
    return tables


_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vdm_jax: TITLE</title>
<style>
:root { color-scheme: light dark; --bar: #4a90d9; --line: #d8dce1; --soft: #5b6570; }
@media (prefers-color-scheme: dark) { :root { --bar: #4a8fd6; --line: #3a4149; --soft: #9aa5b1; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 58rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { padding: .35rem .3rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; font-weight: normal; }
th:not(:first-child), td { width: 22%; overflow-wrap: break-word; }
th[scope=col] { color: var(--soft); font-weight: 600; }
td.share { background: linear-gradient(90deg, var(--bar) var(--share), transparent var(--share))
  left bottom / calc(100% - 6px) 5px no-repeat; }
.settings td { width: 65%; }
.many { table-layout: auto; font-size: .85rem; } .many th:first-child, .many td { overflow-wrap: anywhere; }
.many th:not(:first-child), .many td { width: auto; }
.groups th:nth-child(2) { width: 12%; }
.groups th:last-child, .groups td:last-child { width: 55%; text-align: left; }
@media (max-width: 30rem) { table { font-size: .8rem; } }
figure { margin: 1rem 0; } figcaption { color: var(--soft); font-size: .9rem; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem; }
.clips figure { margin: 0; }
img, video { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block; }
</style>
<h1>TITLE</h1>
"""
_COLUMNS = """<p><b>truth</b>: held-out clips. <b>autoencoder</b>: the same clips, encoded and decoded.
<b>samples</b>: clips that the model generates from prompts. The same tracker measures all three, so the first two
columns show the best that samples can reach. In parentheses: the 95 % interval of a share.</p>"""

_SCORES = """<p>No model and no true clips are needed for these scores. <b>Drift</b>: distance to the first second, mean
over all lags; less is steadier. <b>AV-Align</b>: share of onsets and peaks of motion that have a partner. A cut, a
freeze or a step of loudness may be meant: compare films of one kind.</p>"""


def page(title: str, above: str, blocks: Sequence[str]) -> str:
    """Returns a page in HTML.

    above: paragraphs below the title, in HTML
    blocks: the parts of the page, in HTML, such as those of `html_table`
    """
    return "\n".join([_HEAD.replace("TITLE", html.escape(title)), above, *blocks, "</html>\n"])


def html_table(title: str, columns: Sequence[str], rows: Sequence[tuple], kind: str = "numbers") -> str:
    """Returns a table as a part of a page.

    columns, rows: as `_table` returns them
    kind: "numbers", "many" (many columns), "settings" (one wide column) or "groups" (a number and names)
    """

    def td(text):
        share = re.match(r"(\d+) %", text)
        bar = f' class="share" style="--share:{share[1]}%"' if share else ""
        return f"<td{bar}>{html.escape(text)}</td>"

    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in ["", *columns])
    lines = [f"<tr>{head}</tr>"] if any(columns) else []
    lines += [f'<tr><th scope="row">{html.escape(label)}</th>{"".join(map(td, cells))}</tr>' for label, cells in rows]
    return "\n".join([f'<h2>{html.escape(title)}</h2>\n<table class="{kind}">', *lines, "</table>"])


def _figure(caption: str, path: epath.Path) -> str:
    caption, data = html.escape(caption), base64.b64encode(path.read_bytes()).decode()
    element = MEDIA[path.suffix].format(caption=caption, data=data)
    return f"<figure>{element}<figcaption>{caption}</figcaption></figure>"


def _intervals(metrics):
    """Returns the interval of each Share or Difference, [low, high], at its place; None in place of other numbers."""
    if isinstance(metrics, Mapping):
        return {key: found for key, value in metrics.items() if (found := _intervals(value))}
    if isinstance(metrics, list):
        return [_intervals(value) for value in metrics] if any(map(_intervals, metrics)) else None
    return [metrics.low, metrics.high] if isinstance(metrics, Share | Difference) else None


def write_films(directory: epath.Path, measured: Mapping, *, settings: Mapping, media: Sequence) -> epath.Path:
    """As `write_report`, for films. measured: as films.measure_folder returns it."""
    storage.replace(directory / "metrics.json", json.dumps(measured, indent=2) + "\n")
    pictures = "<h2>Curves</h2>\n" + "".join(_figure(*item) for item in media)
    how = [(name, [str(value)]) for name, value in settings.items()]
    blocks = [*(html_table(*table, "many") for table in film_tables(measured)), pictures]
    path = directory / "report.html"
    made = html_table("How this was made", [""], how, "settings")
    storage.replace(path, page("Films", _SCORES, [*blocks, made]))
    return path


def write_report(directory: epath.Path, metrics: Mapping, *, settings: Mapping, media: Sequence = ()) -> epath.Path:
    """Writes metrics.json and report.html into a folder, which must exist, and returns the path of the page.

    settings: how the numbers were made (weights, prompts, steps, seed, ...), shown below the tables
    media: (caption, path) of small PNG and MP4 files, which become parts of the page
    """
    numbers = {**metrics, "intervals": _intervals(metrics)}
    plain = json.loads(json.dumps(numbers), parse_constant=lambda _: None)  # JSON has no NaN and no infinity
    storage.replace(directory / "metrics.json", json.dumps(plain, indent=2) + "\n")
    shown = {suffix: "".join(_figure(*item) for item in media if item[1].suffix == suffix) for suffix in MEDIA}
    first, *others = (html_table(*table) for table in _tables(metrics))
    how = [(name, [str(value)]) for name, value in settings.items()]
    samples = f'<h2>Samples</h2>\n<div class="clips">{shown[".mp4"]}</div>\n{shown[".png"]}'
    made = html_table("How this was made", [""], how, "settings")
    path = directory / "report.html"
    storage.replace(path, page("Evaluation", _COLUMNS, [first, samples, *others, made]))
    return path
