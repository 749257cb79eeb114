"""The model card of exported weights."""

import hashlib
import json
import re

import pytest
import yaml
from etils import epath

from tests import tiny
from vdm_jax import weights
from vdm_jax.errors import UserError
from vdm_jax.metrics import report
from vdm_jax.metrics.shares import Share
from vdm_jax.run import card, folder, record
from vdm_jax.settings import PARTS
from vdm_jax.system import build
from vdm_jax.system.layout import STAGES
from vdm_jax.system.parts import with_hashes

STEPS = {"audio_autoencoder": 7, "denoiser": 1200}
FILES = {"audio_autoencoder": "a" * 64, "denoiser": "d" * 64}
# Text that ends a line, a code span, a table cell or the front matter, or that acts as markup elsewhere.
HOSTILE = "x\r\n---\nlicense: mit\u2028`<b>|a|[b](c)\\`\x1b[31m\u202e"


def described(change=None, **settings):
    config = tiny.get_config().unlock()
    config.denoiser.steps = 5000
    config.update_from_flattened_dict(settings)
    rows = [{"time": "2026-01-31", "steps": {"denoiser": 4, "clip": None}, "changed": change}] if change else []
    return config, STEPS, FILES, rows


def front_matter(text):
    """The values in it, and what follows."""
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_card_says_what_the_model_is():
    text = card.text(
        *described({"denoiser.learning_rate": [0.01, 0.02], "log_every": [1, 2], "denoiser.new": [None, 3]})
    )
    head, body = front_matter(text)
    assert head == {"library_name": "vdm_jax", "tags": ["text-to-video", "diffusion", "jax"]}
    lines = body.splitlines()
    for line in (
        "License: not stated.",
        "| size | 16 x 24 pixels (height x width) |",
        "| frames | 5, at 8 frames a second: 0.6 s |",
        "| sound | one channel, 2,000 Hz |",
        "| text | up to 96 tokens |",
        "| `source` | `world` |",
        "| `objects` | `[1.0]` |",
        f"| `denoiser.safetensors` | 1,200 of 5,000 | `{'d' * 64}` |",
        "| `2026-01-31` | `denoiser 4` | `denoiser.learning_rate` | `0.01` | `0.02` |",
        "| `2026-01-31` | `denoiser 4` | `denoiser.new` | `not set` | `3` |",
    ):
        assert line in lines
    assert "log_every" not in body and "clip.safetensors" not in body  # it is free, and it is not exported
    assert not {"## Results", "## Parts that it needs", "## What it was made from"} & set(lines)
    assert "No setting was changed" in card.text(*described({"log_every": [1, 2]}))


def test_a_card_names_folders_without_their_paths():
    settings = {
        "data.source": "files", "data.path": "/home/me/clips/", "video_codec.source": "gs://bucket/parts/wan",
        "video_codec.hash": "e" * 64, "denoiser.lora.rank": 2, "denoiser.lora.base": "/home/me/base",
        "denoiser.distillation.teacher": "C:\\home\\teacher",
    }  # fmt: skip
    phase = {"share": 0.5, "data.path": "/home/me/short", "data.tfds.name": "set/config"}
    text = card.text(*described({"denoiser.phases": [[], [phase]]}, **settings), base="b" * 64)
    assert "| `path` | `clips` |" in text and "| `held_out` | `0.2` |" in text
    assert f"| `video_codec` | `wan` | `{'e' * 64}` |" in text and "| `text_encoder`" not in text
    assert f"adapters of rank 2, which are merged in. Their base is `base`, with the hash `{'b' * 64}`" in text
    assert "Its teacher is `teacher`" in text
    assert "'data.path': 'short'" in text and "/me" not in text and "bucket" not in text
    assert "`name` | `set/config`" in card.text(*described(**{"data.source": "tfds", "data.tfds.name": "set/config"}))


def test_text_from_files_cannot_act_as_markup():
    def made(x):
        settings = dict.fromkeys(("data.path", "audio_codec.source", "audio_codec.hash", "denoiser.lora.base"), x)
        settings |= {"data.source": "files", "data.files": {x: x}, "denoiser.lora.rank": 2, "data.buckets": (x,)}
        config, steps, files, rows = described({x: [x, {x: [x]}]}, **settings)
        rows[0] |= {"time": x, "steps": {x: x}}
        return card.text(config, steps, dict.fromkeys(files, x), rows, x)

    plain, hostile = made("x"), made(HOSTILE)
    outside = re.compile(r"`[^`\n|]*`")
    assert outside.sub("``", hostile) == outside.sub("``", plain)
    assert front_matter(hostile)[0] == front_matter(plain)[0]
    assert hostile.replace("\n", "").isprintable() and "license: mit" in hostile
    assert len(made("y" * 10_000)) < 10_000


@pytest.mark.parametrize("license", ["MIT license", "mit\nx: y", "-", "a" * 65, '"'])
def test_a_license_is_an_identifier(license):
    with pytest.raises(UserError, match="is no identifier of a license.*such as apache-2.0") as error:
        card.check_license(license)
    assert "\n" not in str(error.value)


def write_metrics(path, **samples):
    values = {source: dict.fromkeys(report.OUTCOMES) for source in report.SOURCES}
    values["samples"] |= samples
    report.write_report(epath.Path(path), values, settings={})
    return path / "metrics.json"


def test_the_outcomes_of_a_report_keep_their_intervals(tmp_path):
    path = write_metrics(tmp_path, one_object=Share(0.75, 64), size_drift=0.125)
    columns, rows = report.read_outcomes(path)
    assert list(columns) == list(report.SOURCES)
    assert rows == [
        (report.LABELS["one_object"][0], ["–", "–", "75 % (63–84)"]),
        (report.LABELS["size_drift"][0], ["–", "–", "12 %"]),
    ]
    write_metrics(tmp_path)
    with pytest.raises(UserError, match="has no outcomes.*leave out --report"):
        report.read_outcomes(path)
    whole = json.loads(path.read_text())
    for wrong in ({}, {"samples": 3}, {"samples": {}}, {"truth": {"one_object": "|"}}, {"intervals": []}):
        path.write_text(json.dumps(whole | wrong if wrong else {}))
        with pytest.raises(UserError, match="no table of outcomes.*give the metrics.json of python"):
            report.read_outcomes(path)
    with pytest.raises(UserError, match="is missing: give the metrics.json"):
        report.read_outcomes(tmp_path / "none.json")


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    """A folder of exported weights, and the Weights in it."""
    out, loaded = epath.Path(tmp_path_factory.mktemp("card") / "exported"), folder.load(tiny_run, build)
    folder.write_exported(out, loaded, tiny_run)
    return out, loaded


def test_an_export_has_a_card_which_its_checksums_cover(tiny_run, exported, tmp_path, command):
    out, loaded = tmp_path / "out", exported[1]
    options = ["export", f"--workdir={exported[0]}", f"--out={out}"]
    path = write_metrics(tmp_path, one_object=Share(0.75, 64))
    done = command(weights, *options, "--license=apache-2.0", f"--report={path}")
    assert done.code == 0, done.err
    text = (out / card.NAME).read_text()
    assert front_matter(text)[0]["license"] == "apache-2.0" and "\nLicense: apache-2.0.\n" in text
    assert "|  | truth | autoencoder | samples |" in text and "| – | – | 75 % (63–84) |" in text
    for stage in STAGES:
        digest = hashlib.sha256((out / f"{stage}.safetensors").read_bytes()).hexdigest()
        assert f"| `{stage}.safetensors` | 8 of 8 | `{digest}` |" in text
    done = command(weights, "verify", out)
    assert done.code == 0 and "unknown" not in done.out

    (out / card.NAME).write_text(text + "mine")
    assert f"{out / card.NAME} is damaged" in command(weights, "verify", out).err[-1]
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(UserError, match="README.md would be lost, and is not as an export wrote it: move it away$"):
        folder.write_exported(out, loaded, tiny_run)
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}
    (out / card.NAME).write_text(text)
    folder.write_exported(out, loaded, tiny_run)
    assert "License: not stated." in (out / card.NAME).read_text()

    config = (tiny_run / "config.json").read_text()
    with pytest.raises(UserError, match="has a config.json, but no exported weights: give a new --out"):
        folder.write_exported(tiny_run, loaded, tiny_run)
    assert (tiny_run / "config.json").read_text() == config
    done = command(weights, *options, "--adapters", "--license=mit")
    assert done.code == 2 and "leave out --license and --report" in done.err[-1]
    assert command(weights, *options, "--license=MIT").code == 2


def test_an_export_with_parts_can_be_loaded_and_keeps_its_changes(exported, tmp_path):
    config = tiny.get_config().unlock()
    for key in PARTS:
        config[key].source = str(exported[0])
    config = with_hashes(config.lock())
    run, out = epath.Path(tmp_path / "run"), epath.Path(tmp_path / "out")
    run.mkdir()
    record.begin(run, 0, config)
    record.append(run, 0, {"denoiser": 4}, {"denoiser.learning_rate": [config.denoiser.learning_rate, 0.5]})
    system, params = build(folder.read_config(run)), exported[1].params
    folder.write_exported(out, folder.Weights(system, params, {"denoiser": 8}), run)
    text = (out / card.NAME).read_text()
    for key in PARTS:
        assert f"| `{key}` | `exported` | `{config[key].hash}` |" in text
    assert str(exported[0]) not in text and "`clip.safetensors`" not in text
    assert "| `denoiser 4` | `denoiser.learning_rate` | `0.002` | `0.5` |" in text
    stored = json.loads((out / "statistics.json").read_text())
    assert "run" not in stored and stored["encoders"] == folder.encoders_hash(params, system.parts)
    loaded = folder.load(out, build)
    assert loaded.system.parts.keys() == set(STAGES) - {"denoiser"} and loaded.steps == {"denoiser": 8}
    assert record.write_changes(out, tmp_path) == record.changes(run) == record.changes(epath.Path(tmp_path))
    (out / record.CHANGES).write_text('{"changed": 3}\n')
    with pytest.raises(UserError, match="changes.jsonl is damaged"):
        record.changes(out)
