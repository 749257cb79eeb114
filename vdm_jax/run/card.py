"""The model card of exported weights: their README.md, as Hugging Face shows it.

What comes from a file stands in a code span, so that it cannot act as markup. Of a path only the last name is shown.
"""

import re

from vdm_jax import lora, settings
from vdm_jax.errors import UserError

NAME = "README.md"
LONGEST = 200  # characters of a value that is shown


def text(config, steps, files, changes=(), base="", outcomes=None, license=""):
    """Returns the model card.

    config: ConfigDict of the run; its adapters are merged into the weights
    steps: {stage: the step that its weights are from}
    files: {stage: SHA-256 of its safetensors file}
    changes: rows, see record.changes
    base: hash of the weights that the adapters change; "" if it is not known
    outcomes: (columns, rows), see report.read_outcomes; None without a report
    license: see `check_license`; "" if it is not stated
    """
    blocks = [
        _front_matter(license),
        "# Text to video with sound",
        "The model makes a video with its sound from a text. It was trained with `vdm_jax`.",
        f"License: {license or 'not stated'}.",
        *_clips(config.data),
        *_usage(config.data.source),
        *_data(config.data),
        *_weights(config, steps, files),
        *_parts(config),
        *_origin(config.denoiser, base),
        *_changes(changes),
        *_results(outcomes),
    ]
    return "\n\n".join(blocks) + "\n"


def finetuned(config, step, sha256, changes=(), license=""):
    """Returns the model card of a published pipeline whose denoiser was trained further.

    config: ConfigDict of the run; its adapters are merged into the weights
    step: that the weights are from
    sha256: of the denoiser's safetensors file
    changes, license: as in `text`
    """
    denoiser, (height, width) = config.denoiser, config.data.size
    trained = f"adapters of rank {adapters.rank}, merged in" if (adapters := lora.active(denoiser)) else "all weights"
    rows = [
        ("began from", _shown("denoiser.source", denoiser.source)),
        ("hash of its denoiser", _code(denoiser.hash or "unknown")),
        ("trained", trained),
        ("training steps", f"{step:,} of {denoiser.steps:,}"),
        ("clips in training", f"{config.data.frames} frames of {height} x {width}, at {config.data.fps:g} a second"),
        ("`unet/diffusion_pytorch_model.safetensors`, SHA-256", _code(sha256)),
    ]
    blocks = [
        _front_matter(license, "diffusers"),
        "# Text to video",
        "The model makes a video from a text. `vdm_jax` has trained the denoiser of a published model further. All "
        "other parts are those of that model.",
        f"License: {license or 'not stated'}. The license of the published model counts, too.",
        "## How to use it",
        "`FOLDER` is the folder that has this file.",
        "```python\nfrom diffusers import TextToVideoSDPipeline\n\n"
        'pipe = TextToVideoSDPipeline.from_pretrained("FOLDER")\n```',
        '```sh\npython -m vdm_jax.sample --weights=FOLDER --prompt="TEXT" --out=clip.mp4\n```',
        "## Weights",
        _table(("", ""), rows),
        *_data(config.data),
        *_changes(changes),
    ]
    return "\n\n".join(blocks) + "\n"


def check_license(license):
    """Raises UserError unless a text can be the identifier of a license on Hugging Face, such as apache-2.0."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", license):
        raise UserError(
            f"--license={license!r} is no identifier of a license: give one in small letters, such as apache-2.0"
        )


def _front_matter(license, library="vdm_jax"):
    stated = [f'license: "{license}"'] if license else []
    return "\n".join(
        ["---", f"library_name: {library}", *stated, "tags:", "- text-to-video", "- diffusion", "- jax", "---"]
    )


def _clips(data):
    height, width = data.size
    rows = [
        ("size", f"{height} x {width} pixels (height x width)"),
        ("frames", f"{data.frames}, at {data.fps:g} frames a second: {data.frames / data.fps:.1f} s"),
        ("sound", f"one channel, {data.sample_rate:,} Hz"),
        ("text", f"up to {data.text_length} tokens"),
    ]
    if data.get("buckets"):
        rows.append(("shapes in training", _shown("data.buckets", data.buckets)))
    return "## What it makes", _table(("clip", ""), rows)


def _usage(source):
    prompt = "a red circle moving right" if source == "world" else "TEXT"
    return (
        "## How to use it",
        "`FOLDER` is the folder that has this file.",
        f'```python\nimport vdm_jax\n\nclip = vdm_jax.load("FOLDER")("{prompt}")\nclip.save("clip.mp4")\n```',
        f'```sh\npython -m vdm_jax.sample --weights=FOLDER --prompt="{prompt}" --out=clip.mp4\n'
        "python -m vdm_jax.weights verify FOLDER\n```",
    )


def _data(data):
    shown = {"source": data.source} | ({"path": data.path} if data.path else {}) | dict(data.get(data.source, {}))
    rows = [(_code(key), _shown(f"data.{data.source}.{key}", value)) for key, value in shown.items() if value != ""]
    return "## Training data", _table(("setting", "value"), rows)


def _weights(config, steps, files):
    rows = [
        (f"`{stage}.safetensors`", f"{step:,} of {config[stage].steps:,}", _code(files[stage]))
        for stage, step in steps.items()
    ]
    return "## Weights", _table(("file", "training steps", "SHA-256"), rows)


def _parts(config):
    rows = [
        (f"`{key}`", _shown(key, config[key].source), _code(config[key].hash or "unknown"))
        for key in settings.PARTS
        if config.get(key) and config[key].source
    ]
    if not rows:
        return ()
    return (
        "## Parts that it needs",
        "These parts are not in this folder. `config.json` says where they are expected.",
        _table(("part", "folder", "hash"), rows),
    )


def _origin(denoiser, base):
    lines = []
    if adapters := lora.active(denoiser):
        lines.append(
            f"The denoiser has adapters of rank {adapters.rank}, which are merged in. Their base is "
            f"{_shown('base', adapters.base)}, with the hash {_code(base or 'unknown')}."
        )
    if teacher := (denoiser.get("distillation") or {}).get("teacher"):
        lines.append(f"The denoiser is a student, which needs few steps. Its teacher is {_shown('teacher', teacher)}.")
    return ("## What it was made from", *lines) if lines else ()


def _changes(changes):
    rows = [
        (
            _code(row["time"]),
            _code(", ".join(f"{stage} {step}" for stage, step in row["steps"].items() if step is not None)),
            _code(key),
            *(_code("not set") if value is None else _shown(key, value) for value in values),
        )
        for row in changes
        for key, values in row["changed"].items()
        if (known := settings.setting(key)) is None or known.rule != settings.FREE
    ]
    if not rows:
        return "## Changes during the training", "No setting was changed that changes what is trained."
    columns = ("time", "steps done", "setting", "before", "from then on")
    return "## Changes during the training", _table(columns, rows)


def _results(outcomes):
    if outcomes is None:
        return ()
    columns, rows = outcomes
    return (
        "## Results",
        "truth: clips that training did not show. autoencoder: the same clips, encoded and decoded. samples: clips "
        "that the model made from texts. In parentheses: the 95 % interval.",
        _table(("", *columns), [(label, *cells) for label, cells in rows]),
    )


def _table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _shown(key, value):
    return _code(_last_names(key, value))


def _last_names(key, value):
    """Returns the value of a setting, with each path cut to its last name. The name of a TFDS data set is no path."""
    if isinstance(value, dict):
        return {name: _last_names(name, x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_last_names(key, x) for x in value]
    if isinstance(value, str) and key != "data.tfds.name":
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _code(value):
    """Returns a code span on one line. A character that ends it, splits a table or is not printable becomes "?"."""
    value = str(value)
    value = value if len(value) <= LONGEST else value[:LONGEST] + "..."
    value = "".join(c if c.isprintable() and c not in "`|\\" else "?" for c in value)
    return f"`{value or ' '}`"
