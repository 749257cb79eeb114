"""Control of a clip: which buttons are held in each frame. A CSV file with one column a button and one row a frame.

turn_left,fire
1,0
0.5,1
"""

import csv
import io
import os

import numpy as np

from vdm_jax.data.text import read_text
from vdm_jax.errors import UserError, one_of


def read(path: str | os.PathLike, names: tuple) -> np.ndarray:
    """Returns the control in a CSV file, float32 [F, A], with the columns in the order of `names`.

    A value is 1 for a button that is held in a frame, 0 for one that is not, and between them for a part of the frame.
    A button without a column is not held.

    path: of the file. Its first row names the buttons of its columns.
    names: A buttons that the model knows
    Raises UserError where the file is not of this form.
    """
    where = f"control file {os.fspath(path)!r}"
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(read_text(path))) if any(row)]
    except csv.Error as error:
        raise UserError(f"{where} is not CSV ({error}): write one row for each frame, with commas") from error
    if not rows:
        raise UserError(f"{where} is empty: its first row names buttons ({', '.join(names)})")
    header, *rows = rows
    for name in header:
        one_of("button", name[:30], names)
    if len(set(header)) < len(header):
        raise UserError(f"{where} names a button twice: give each one column")
    control = np.zeros((len(rows), len(names)), np.float32)
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise UserError(f"{where}, frame {number}: {len(row)} values for {len(header)} buttons")
        for name, cell in zip(header, row):
            control[number - 1, names.index(name)] = _share(cell, f"{where}, frame {number}, {name}")
    return control


def check(control, names: tuple, frames: int) -> np.ndarray:
    """Returns the control of a clip as float32 [F, A]. Raises UserError where it does not fit F frames and A names."""
    control = np.asarray(control)
    if control.ndim != 2 or control.shape[1] != len(names) or control.dtype.kind not in "biuf":
        raise UserError(f"control of shape {control.shape} must be numbers [frames, {len(names)}]: {', '.join(names)}")
    if len(control) != frames:
        raise UserError(f"control has {len(control)} rows, but {frames} frames are made: give one row for each frame")
    if not ((control >= 0) & (control <= 1)).all():
        raise UserError("control must be from 0 (not held) to 1 (held)")
    return control.astype(np.float32)


def _share(cell, where):
    try:
        value = float(cell)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise UserError(f"{where}: {cell[:30]!r} must be a number from 0 to 1")
    return value
