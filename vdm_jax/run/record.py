"""The settings of a run: config.json of its first start, and starts.jsonl with what each later start changed.

A row of starts.jsonl:

    {"time": "2026-01-31T12:00:00+00:00", "version": "0.1.0", "command": "...", "steps": {STAGE: step or null},
     "changed": {KEY: [value before, value from this start on]}, "run": 1234, "crc32": "..."}

The settings in force are those of config.json after all changes, in order. config.json has two more values: the number
of the run, drawn at its first start, and the number of rows. A start writes its row first. So a kill between the two
leaves one row more than config.json knows, and a row that is lost later is noticed.
"""

import datetime
import importlib.metadata
import json
import secrets
import shlex
import sys

from vdm_jax import settings
from vdm_jax.errors import UserError
from vdm_jax.run import storage

NAME = "starts.jsonl"
BITS = 31  # of the number of a run
RUN, STARTS = "run", "starts"  # keys of config.json that are no settings
FIX = "restore the file from a copy (train --unverified accepts a file that has no checksum or is of another run)"
CHANGES = "changes.jsonl"  # the rows that change something, beside exported weights


def of(config):
    """Returns the settings of a ConfigDict, {dotted key: value}, with values as JSON has them."""
    return settings.flat(json.loads(config.to_json_best_effort()))


def read(folder, unverified=False):
    """Returns (the settings in force, nested; the number of the run, None in exported weights and where it is lost).

    unverified: accepts a config.json without a checksum, and rows that are missing or of another run. The config.json
      of exported weights has its checksum in checksums.txt.
    Raises UserError for a damaged file.
    """
    path = folder / "config.json"
    first = storage.read_json(path, FIX, sealed=not unverified)
    run, starts = first.pop(RUN, None), first.pop(STARTS, None)
    in_force, rows = settings.flat(first), _rows(folder)
    if not (isinstance(run, int) and 0 <= run < 1 << BITS and isinstance(starts, int)):
        if not unverified:
            raise UserError(f"{path} has no number of its run: {FIX}")
        run = None
    if not unverified and len(rows) < starts:
        raise UserError(f"{folder / NAME} has {len(rows)} of {starts} lines: {FIX}")
    for number, row in enumerate(rows, 1):
        try:
            row = storage.unseal(row)
            if not unverified and row.get(RUN) != run:
                raise ValueError("it is of another run")
            for key, (old, new) in row["changed"].items():
                if in_force.get(key) != old:
                    raise ValueError(f"{key} was {in_force.get(key)!r} before it, not {old!r}")
                in_force[key] = new
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"line {number} of {folder / NAME} is damaged ({error}): {FIX}") from None
    try:
        return _nested(in_force), run
    except (TypeError, AttributeError) as error:  # a key is a setting and a group of settings
        raise UserError(f"{path} is damaged ({error}): {FIX}") from None


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


def new_number():
    """Returns the number of a new run. Two runs have the same one in one of 2 billion cases."""
    return secrets.randbits(BITS)


def begin(workdir, run, config):
    """Writes the config.json of a new run. run: its number."""
    (workdir / NAME).unlink(missing_ok=True)
    first = json.loads(config.to_json_best_effort(sort_keys=True))
    storage.write_json(workdir / "config.json", first | {RUN: run, STARTS: 0})


def append(workdir, run, steps, changed):
    """Adds the row of a start. steps: {stage: step of its newest checkpoint}. changed: {key: [before, now]}."""
    row = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": _version(),
        "command": shlex.join(sys.argv),
        "steps": steps,
        "changed": changed,
    }
    rows = [*map(storage.unseal, _rows(workdir)), row]
    storage.replace(workdir / NAME, "".join(json.dumps(storage.seal(row | {RUN: run})) + "\n" for row in rows))
    path = workdir / "config.json"
    storage.write_json(path, storage.read_json(path, FIX, sealed=False) | {RUN: run, STARTS: len(rows)})


def write_changes(workdir, folder):
    """Writes the rows of `changes` into a folder of exported weights, and returns them."""
    rows = changes(workdir)
    (folder / CHANGES).unlink(missing_ok=True)
    if rows:
        storage.replace(folder / CHANGES, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def changes(folder):
    """Returns the rows that change something, without the commands, of a run or of exported weights. Raises UserError.

    A row: {"time": ..., "version": ..., "steps": {STAGE: step or None}, "changed": {KEY: [before, after]}}
    """
    name = CHANGES if (folder / CHANGES).exists() else NAME
    try:
        rows = [storage.unseal(row, sealed=False) for row in _rows(folder, name)]
        rows = [{key: row[key] for key in ("time", "version", "steps", "changed")} for row in rows if row["changed"]]
        for row in rows:
            row |= {"steps": dict(row["steps"]), "changed": {key: [a, b] for key, (a, b) in row["changed"].items()}}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / name} is damaged ({error}): {FIX}") from None
    return rows


def _rows(folder, name=NAME):
    path = folder / name
    return storage.read_text(path, FIX).splitlines() if path.exists() else []


def _version():
    try:
        return importlib.metadata.version("vdm_jax")
    except importlib.metadata.PackageNotFoundError:  # the source is used without an installation
        return None
