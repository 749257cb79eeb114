"""The results of an evaluation: metrics.json for programs, report.html for people, and a table for the terminal.

`metrics` is {"truth": M, "autoencoder": M, "samples": M, "reconstruction": {...}, "clip": {...}}. It holds the keys of
REQUIRED, and may hold other numbers beside them. "truth" is held-out clips, "autoencoder" is the same clips encoded and
decoded. Both are measured in the same way as the samples, because a model can hardly score higher than they do.

Three more keys may be in `metrics`: "loss_per_noise_level" holds columns of one length, "log_snr" (natural logarithm)
and a loss for each modality. "samplers" holds {name: M}. "tasks" holds {task: {figure: value}}; values that are lists
of one length are a curve.
"""

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

SOURCES = ("truth", "autoencoder", "samples")
OUTCOMES = {  # the keys of M, with their labels
    "one_object": "one object: color and shape right",
    "two_objects": "two objects: color and shape right",
    "direction": "direction of motion right",
    "permanence": "frames that show the object",
    "size_drift": "change of size (less is better)",
    "sync_impacts": "visible impacts with a sound",
    "sync_onsets": "sounds with a visible impact",
}
REQUIRED = {
    **dict.fromkeys(SOURCES, tuple(OUTCOMES)),
    "reconstruction": ("psnr", "ssim", "onset_within_half_frame"),
    "clip": ("recall_at_1",),
}
LABELS = {
    **OUTCOMES,
    "color_drift": "change of color (less is better)",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "si_sdr": "SI-SDR",
    "onset_within_half_frame": "impacts heard within half a frame",
    "recall_at_1": "text ranks its own video first",
    "hard_negative_accuracy": "caption beats its hard negative",
}
SHARES = {  # shown as a percentage with a bar
    *OUTCOMES,
    "sync_impacts_truth",
    "sync_onsets_truth",
    "moves",
    "moves_truth",
    "right",
    "count",
    "color",
    "shape",
    "onset_within_half_frame",
    "recall_at_1",
    "hard_negative_accuracy",
}
DECIBELS = {"psnr", "si_sdr", "first_frame_psnr", "first_frame_psnr_reconstructed"}
MEDIA = {  # suffix -> element and MIME type
    ".png": ("img", "image/png"),
    ".jpg": ("img", "image/jpeg"),
    ".mp4": ("video", "video/mp4"),
    ".wav": ("audio", "audio/wav"),
}


class _Cell(NamedTuple):
    text: str
    share: float | None = None  # in 0..1, drawn as a bar


class _Table(NamedTuple):
    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[_Cell]]]  # (label, a cell for each column)


def _cell(key: str, value: object) -> _Cell:
    """Returns a value as its key wants it shown: a share, decibels or a number; a dash for a missing value."""
    if value is None or isinstance(value, float | np.floating) and not math.isfinite(value):
        return _Cell("–")
    if key in SHARES:
        return _Cell(f"{100 * value:.0f} %", float(value))
    if key in DECIBELS:
        return _Cell(f"{value:.1f} dB")
    return _Cell(f"{value:.3f}" if isinstance(value, float | np.floating) else str(value))


def _tables(metrics: Mapping) -> list[_Table]:
    """Returns all that the page and the terminal show, as tables."""

    def rows(*dicts):  # known keys in the order of LABELS, then the other keys in their own order
        keys = [*LABELS, *(key for d in dicts for key in d)]
        keys = [k for k in dict.fromkeys(keys) if any(k in d for d in dicts)]
        label = {k: LABELS.get(k, k.replace("_", " ")) for k in keys}
        return [(label[k], [_cell(k, d.get(k)) for d in dicts]) for k in keys]

    tables = [
        _Table("Clips compared with their prompts", SOURCES, rows(*(metrics[s] for s in SOURCES))),
        _Table("Autoencoders, on held-out clips", [""], rows(metrics["reconstruction"])),
        _Table("Text encoder, on held-out clips", [""], rows(metrics["clip"])),
    ]
    if levels := dict(metrics.get("loss_per_noise_level", {})):
        log_snr = levels.pop("log_snr")
        losses = zip(*levels.values(), strict=True)  # columns to rows
        by_level = [
            (f"log SNR {x:+.1f}", [_cell("loss", float(loss)) for loss in row])
            for x, row in zip(log_snr, losses, strict=True)
        ]
        tables.append(_Table("Loss by noise level", [*levels], by_level))
    if samplers := metrics.get("samplers"):
        tables.append(_Table("The same prompts, by sampler and steps", [*samplers], rows(*samplers.values())))
    for task, figures in metrics.get("tasks", {}).items():
        curve = {k: v for k, v in figures.items() if isinstance(v, list)}
        if single := {k: v for k, v in figures.items() if k not in curve}:
            tables.append(_Table(f"Task: {task.replace('_', ' ')}", [""], rows(single)))
        if curve:
            name, *columns = curve
            points = [
                (f"{name} {value:g}", [_cell(key, curve[key][i]) for key in columns])
                for i, value in enumerate(curve[name])
            ]
            tables.append(_Table(f"Task: {task.replace('_', ' ')}", [c.replace("_", " ") for c in columns], points))
    return tables


def format_table(metrics: Mapping) -> str:
    """Returns the tables as plain text for a terminal; a missing value is a dash."""
    tables = _tables(metrics)
    width = max(len(text) for t in tables for text in [t.title, *(label for label, _ in t.rows)])
    blocks = []
    for title, columns, rows in tables:
        lines = [(title, columns), *((label, [cell.text for cell in row]) for label, row in rows)]
        blocks.append(
            "\n".join((f"{label:<{width}}" + "".join(f"  {c:>11}" for c in cells)).rstrip() for label, cells in lines)
        )
    return "\n\n".join(blocks)


_STYLE = """
:root { color-scheme: light dark; --bar: #4a90d9; --line: #d8dce1; --soft: #5b6570; }
@media (prefers-color-scheme: dark) { :root { --bar: #4a8fd6; --line: #3a4149; --soft: #9aa5b1; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 58rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { padding: .35rem .3rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; font-weight: normal; }
th:not(:first-child), td { width: 22%; overflow-wrap: break-word; }
thead th { color: var(--soft); font-weight: 600; }
td { font-variant-numeric: tabular-nums; }
td.share { background: linear-gradient(90deg, var(--bar) var(--share), transparent var(--share))
  left bottom / calc(100% - 6px) 5px no-repeat; }
.settings td { width: 65%; }
@media (max-width: 30rem) { table { font-size: .8rem; } }
figure { margin: 1rem 0; } figcaption { color: var(--soft); font-size: .9rem; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem; }
.clips figure { margin: 0; }
img, video { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block; }
audio { width: 100%; }
"""


def _html_table(table: _Table, kind: str = "numbers") -> str:
    def td(cell):
        bar = "" if cell.share is None else f' class="share" style="--share:{100 * cell.share:.0f}%"'
        return f"<td{bar}>{html.escape(cell.text)}</td>"

    head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in table.columns)
    head = head.replace("autoencoder", "auto&shy;encoder")  # a narrow screen may break the word here
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(label)}</th>{"".join(map(td, row))}</tr>' for label, row in table.rows
    )
    head = f"<thead><tr><th></th>{head}</tr></thead>\n" if any(table.columns) else ""
    return f'<h2>{html.escape(table.title)}</h2>\n<table class="{kind}">{head}<tbody>\n{body}\n</tbody></table>'


def _figure(caption: str, path: epath.Path) -> str:
    tag, mime = MEDIA[path.suffix.lower()]
    data = f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"
    caption = html.escape(caption)
    element = {
        "img": f'<img alt="{caption}" src="{data}">',
        "video": f'<video controls loop playsinline src="{data}"></video>',
        "audio": f'<audio controls src="{data}"></audio>',
    }[tag]
    return f"<figure>{element}<figcaption>{caption}</figcaption></figure>"


def _plain(value: object) -> object:
    """Returns a value without NumPy types, for JSON. NaN and infinity, which JSON lacks, become None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(
    directory: str | epath.Path,
    metrics: Mapping,
    *,
    settings: Mapping[str, object],
    media: Sequence[tuple[str, str | epath.Path]] = (),
) -> epath.Path:
    """Writes metrics.json and report.html into a folder and returns the path of the page.

    directory: the folder, which is made if it does not exist
    metrics: the numbers, as the module's docstring describes them
    settings: how the numbers were made (weights, prompts, steps, seed, ...), shown below the tables
    media: (caption, file) of small PNG, JPEG, MP4 or WAV files. The page contains them and is therefore a single file.
        Videos and sounds form a grid, pictures take the full width.

    Raises ValueError if a key of REQUIRED is missing, because other programs read these keys, or if a file is of
    another type.
    """
    missing = [f"{k}.{n}" for k, names in REQUIRED.items() for n in names if n not in metrics[k]]
    if missing:
        raise ValueError(f"metrics lack {', '.join(missing)}")
    media = [(caption, epath.Path(path)) for caption, path in media]
    if other := [str(path) for _, path in media if path.suffix.lower() not in MEDIA]:
        raise ValueError(f"a page cannot show {', '.join(other)}: use {', '.join(MEDIA)} files")
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.json").write_text(json.dumps(_plain(metrics), indent=2) + "\n")

    figures = [_figure(caption, path) for caption, path in media]
    clips = "".join(f for f in figures if "<img" not in f)
    pictures = [f for f in figures if "<img" in f]
    tables = [_html_table(table) for table in _tables(metrics)]
    how = _Table("How this was made", [""], [(k, [_Cell(str(v))]) for k, v in settings.items()])
    parts = [
        *tables[:1],
        "<h2>Samples</h2>" if media else "",
        f'<div class="clips">{clips}</div>' if clips else "",
        *pictures,
        *tables[1:],
        _html_table(how, "settings"),
    ]
    page = directory / "report.html"
    page.write_text(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>vdm_jax: evaluation</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        "<h1>Evaluation</h1>\n"
        "<p><b>truth</b>: held-out clips. <b>autoencoder</b>: the same clips, encoded and decoded. "
        "<b>samples</b>: clips that the model generates from prompts. The same tracker measures all three, so the "
        "first two columns show the best that samples can reach.</p>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return page
