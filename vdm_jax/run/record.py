"""The settings of a run: config.json of its first start, and starts.jsonl with what each later start changed.

A row of starts.jsonl:

    {"time": "2026-01-31T12:00:00+00:00", "version": "0.1.0", "command": "...", "steps": {STAGE: step or null},
     "changed": {KEY: [value before, value from this start on]}}

The settings in force are those of config.json after all changes, in order.
"""

import contextlib
import datetime
import importlib.metadata
import json
import re
import shlex
import sys

from vdm_jax import settings
from vdm_jax.errors import UserError
from vdm_jax.run import storage

NAME = "starts.jsonl"
FIX = "restore the file from a copy"
CHANGES = "changes.jsonl"  # the rows that change something, beside exported weights


def of(config):
    """Returns the settings of a ConfigDict, {dotted key: value}, with values as JSON has them."""
    return settings.flat(json.loads(config.to_json_best_effort()))


def read(folder):
    """Returns the settings in force, nested, of a run or of exported weights. Raises UserError for a damaged file."""
    path = folder / "config.json"
    in_force = settings.flat(storage.read_json(path, "restore it or train again", sealed=False))
    for number, row in enumerate(_rows(folder), 1):
        try:
            for key, (old, new) in storage.unseal(row)["changed"].items():
                if in_force.get(key) != old:
                    raise ValueError(f"{key} was {in_force.get(key)!r} before it, not {old!r}")
                in_force[key] = new
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"line {number} of {folder / NAME} is damaged ({error}): restore the file from a copy"
            ) from None
    try:
        return _nested(in_force)
    except (TypeError, AttributeError) as error:  # a key is a setting and a group of settings
        raise UserError(f"{path} is damaged ({error}): restore it or train again") from None


def _nested(in_force):
    """{dotted key: value} -> nested dicts. A key with None is no setting any more."""
    tree = {}
    for key, value in in_force.items():
        *groups, name = key.split(".")
        part = tree
        for group in groups:
            part = part.setdefault(group, {})
        if value is not None:
            part[name] = value
    return tree


def append(workdir, steps, changed):
    """Adds the row of a start. steps: {stage: step of its newest checkpoint}. changed: {key: [before, now]}."""
    row = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": _version(),
        "command": shlex.join(sys.argv),
        "steps": steps,
        "changed": changed,
    }
    path = workdir / NAME
    stored, kept = _stored(workdir).encode(), "".join(row + "\n" for row in _rows(workdir)).encode()
    with contextlib.closing(storage.growing(path, stored, kept)) as file:
        file.write(json.dumps(storage.seal(row)) + "\n")


def write_changes(workdir, folder):
    """Writes the rows of a run that change something into a folder of exported weights, without the commands."""
    rows = [row for row in map(storage.unseal, _rows(workdir)) if row["changed"]]
    (folder / CHANGES).unlink(missing_ok=True)
    if rows:
        lines = [json.dumps({key: row[key] for key in ("time", "version", "steps", "changed")}) + "\n" for row in rows]
        storage.replace(folder / CHANGES, "".join(lines))


def _rows(folder):
    """The rows. A last row without its end is left out: a start was killed while it wrote the row."""
    *rows, last = _stored(folder).split("\n")
    return [*rows, last] if re.search(r'"crc32": "\w{8}"}', last) else rows


def _stored(folder):
    return storage.read_text(folder / NAME, FIX) if (folder / NAME).exists() else ""


def _version():
    try:
        return importlib.metadata.version("vdm_jax")
    except importlib.metadata.PackageNotFoundError:  # the source is used without an installation
        return None
