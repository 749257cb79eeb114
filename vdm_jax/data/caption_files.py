"""Captions of the videos in a folder, in the forms that people have.

A table names videos and their captions: `metadata.csv`, `.jsonl`, `.json` or `.parquet`, or `videos.txt` and
`prompts.txt` line by line. It speaks for its folder and the folders below. A video without a table has its captions
beside it: `name.txt`, `name.caption`, `name.json` or `name.mp4.txt`. Letters of any case are the same.
"""

import collections
import csv
import io
import json
import math
import os
import posixpath
from collections.abc import Iterator
from typing import NamedTuple

from vdm_jax.data.listing import LISTED, NOTES, TABLES, Listing, shown
from vdm_jax.data.shards import OUTSIDE
from vdm_jax.data.text import read_text
from vdm_jax.errors import UserError

MAX_METADATA_BYTES = 1 << 30
NAME_COLUMNS = ("file_name", "video", "video_path", "media_path", "path")
TEXT_COLUMNS = ("text", "caption", "prompt")
TIME_COLUMNS = ("start", "end")  # s
PROMPTS, VIDEOS = "prompts.txt", "videos.txt"


class Timed(NamedTuple):
    """The caption of a part of a video."""

    text: str
    start: float  # s
    end: float | None  # s; None is the end of the video


class Captions(NamedTuple):
    """The captions of a folder, and what was found in its files of captions."""

    of: dict[str, list]  # {name of a video: its captions, each a text or a Timed}, in the order of training
    sources: dict[str, int]  # {where captions come from: number of videos}
    said: dict[str, list[str]]  # {a fact: the files or rows that it is true of}


def choose(captions: list, start: float, end: float, which: float) -> str:
    """Returns a caption of the window from `start` to `end`, in s.

    which: a draw in [0, 1), where there are several

    Captions with times come first: the one that shares most of its time with the window, if one does.
    """
    if any(isinstance(caption, Timed) for caption in captions):
        times = [(c.start, math.inf if c.end is None else c.end) if isinstance(c, Timed) else (0, 0) for c in captions]
        shared = [min(end, last) - max(start, first) for first, last in times]
        most = max(shared)
        if most > 0:
            captions = [caption.text for caption, time in zip(captions, shared) if time > most - 1e-6]
        else:
            captions = [caption for caption in captions if not isinstance(caption, Timed)] or [""]
    return captions[int(which * len(captions))]


def read(listing: Listing) -> Captions:
    """Returns the captions of the videos to train on. A video that no row names goes to `listing.left_out`.

    Raises UserError if a file of captions cannot be used.
    """
    found = Captions({}, collections.Counter(), collections.defaultdict(list))
    tables = _tables(listing)
    names = _Names(listing) if tables else None
    for folder in sorted(tables, key=lambda folder: (len(folder.split("/")) if folder else 0, folder)):
        table, of = tables[folder][0], {}
        for name, captions in _captions_in_table(listing, table, names, found.said):
            of.setdefault(name, []).extend(captions)
        for name in sorted(of.keys() & found.of.keys()):
            found.said[f"two tables name it, {shown(table)} counts"].append(name)
        found.of.update(of)
        found.sources[shown(table)] = len(of)
    _add_notes(listing, tables, found)
    return found


def _tables(listing: Listing) -> dict[str, list[str]]:
    """Returns {folder: the files of its table}."""
    tables = collections.defaultdict(list)
    for name in listing.left_out.get(OUTSIDE, ()):
        if posixpath.basename(name).lower() in TABLES:
            raise _points_out(listing, name)
    for name in sorted(listing.tables):
        tables[posixpath.dirname(name)].append(name)
    for folder, found in tables.items():
        pair = {posixpath.basename(name).lower(): name for name in found}
        texts = [pair[base] for base in (VIDEOS, PROMPTS) if base in pair]
        others = [name for name in found if name not in texts]
        if len(others) > 1 or (others and len(texts) == 2):
            first, second = map(shown, (others + texts)[:2])
            raise UserError(f"{os.fspath(listing.root)!r} holds both {first} and {second}: keep one of them")
        tables[folder] = others or (texts if len(texts) == 2 else [])
    return {folder: found for folder, found in tables.items() if found}


class _Names:
    """The files of a folder by the names that people write."""

    def __init__(self, listing: Listing):
        self.listing, self.folded = listing, {}
        self.known = {*listing.videos, *(name for names in listing.left_out.values() for name in names)}
        self.roots = [os.path.abspath(listing.root), os.path.realpath(listing.root)]

    def find(self, folder: str, name: str) -> str | None:
        """Returns the name in the listing of a file that a table in `folder` names, or None.

        Raises UserError if the name leads out of the folder. Nothing is opened.
        """
        written = name
        for root in self.roots:
            if name.startswith(root.rstrip("/") + "/"):
                folder, name = "", name[len(root.rstrip("/")) + 1 :]
                break
        if name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
            raise _points_out(self.listing, written)
        tries = [posixpath.normpath(posixpath.join(where, name)) for where in dict.fromkeys((folder, ""))]
        tries += [name.replace("\\", "/") for name in tries]
        for name in tries:
            if name in self.known:
                return name
        if not self.folded:
            self.folded = {name.casefold(): name for name in self.known}
        for name in tries:
            if name.casefold() in self.folded:
                return self.folded[name.casefold()]
        if self.listing.left_out.get(LISTED) and "\0" not in name:  # the name may lead through a link
            path = os.path.relpath(os.path.realpath(self.listing.root / tries[0]), self.roots[1])
            return path if path in self.known else None
        return None


def _points_out(listing: Listing, name: str) -> UserError:
    root = os.fspath(listing.root)
    return UserError(f"{shown(name)!r} points out of {root!r}: keep the videos and captions inside the folder")


def _captions_in_table(listing: Listing, table: str, names: _Names, said: dict) -> Iterator[tuple[str, list]]:
    """Yields (name of a video, captions) of the rows of a table that can be used."""
    before, named, rows = set(), 0, 0
    for rows, row in enumerate(_rows(listing, table), 1):
        if not isinstance(row, dict):
            raise UserError(f"{shown(table)}: row {rows} is no object with a file_name and a text, correct it")
        row = {key.strip().lower(): value for key, value in row.items() if isinstance(key, str)}
        written = next((row[key] for key in NAME_COLUMNS if row.get(key)), None)
        if not isinstance(written, str):
            said["a row without a file name, it is left out"].append(f"{table} row {rows}")
            continue
        named += 1
        name = names.find(posixpath.dirname(table), written)
        if name is None:
            said["a row names a file that does not exist, it is left out"].append(written)
        if name not in listing.videos:
            continue
        texts = [row[key] for key in TEXT_COLUMNS if row.get(key)]
        if len(texts) > 1 and texts.count(texts[0]) < len(texts):
            said["a row has several columns of text, the first counts"].append(f"{table} row {rows}")
        captions = _texts(texts[0] if texts else "")
        if not any(map(str.strip, captions)):
            said["a row without text"].append(f"{table} row {rows}")
        try:
            captions = _timed(captions, *map(row.get, TIME_COLUMNS))
        except (ValueError, TypeError, OverflowError):
            said["a row whose start and end are no times in s, it is left out"].append(f"{table} row {rows}")
            continue
        if (key := hash((name, *captions))) in before:
            said["a row comes again, it counts each time"].append(f"{table} row {rows}")
        before.add(key)
        yield name, captions
    if rows and not named:
        raise UserError(f"no row of {shown(table)} has a column {', '.join(NAME_COLUMNS)}: name the videos in one")


def _texts(value) -> list[str]:
    """Returns the captions in a value, of at least one; the empty text for a value that is none."""
    texts = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, str)]
    return texts or [""]


def _timed(texts: list[str], start, end) -> list:
    """Returns the captions of a row with the times `start` and `end`. Raises ValueError or TypeError."""
    if start in (None, "") and end in (None, ""):
        return texts
    first = 0.0 if start in (None, "") else float(start)
    last = None if end in (None, "") else float(end)
    if not 0 <= first < (math.inf if last is None else last) or last == math.inf:
        raise ValueError("no span of time")
    return [Timed(text, first, last) for text in texts]


def _rows(listing: Listing, table: str) -> Iterator:
    """Yields the rows of a table as {column: value}. Raises UserError."""
    path, count = listing.root / table, 0
    ending = path.suffix.lower()
    if ending == ".parquet":
        yield from _parquet_rows(path, table)
        return
    if ending == ".txt":
        yield from _lines_in_pairs(listing, table)
        return
    content = read_text(path, MAX_METADATA_BYTES)
    try:
        if ending == ".json":
            rows = json.loads(content)
            if not isinstance(rows, list):
                raise UserError(
                    f"{shown(table)} must hold a list of rows, or rename it to .jsonl if each line is a row"
                )
        elif ending == ".jsonl":
            rows = (json.loads(line) for line in io.StringIO(content, newline="") if line.strip())
        else:
            rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
            columns = {column.strip().lower() for column in rows.fieldnames or ()}
            missing = [known for known in (NAME_COLUMNS, TEXT_COLUMNS) if not columns.intersection(known)]
            if missing:
                wanted = " and no column ".join(" or ".join(map(repr, known)) for known in missing)
                raise UserError(f"{shown(table)} has no column {wanted}: name the columns in its first line")
        for row in rows:
            yield row
            count += 1
    except UserError:
        raise
    except (csv.Error, ValueError, RecursionError) as error:
        fault = f"cannot read {shown(table)} after row {count}: {error}"
        raise UserError(" ".join(fault.split())) from error


def _lines_in_pairs(listing: Listing, table: str) -> Iterator[dict]:
    """Yields the lines of `videos.txt` with those of `prompts.txt` beside it."""
    other = next(n for n in listing.tables if n.lower() == posixpath.join(posixpath.dirname(table), PROMPTS).lower())
    videos, prompts = (read_text(listing.root / n, MAX_METADATA_BYTES).rstrip().splitlines() for n in (table, other))
    if len(videos) != len(prompts):
        raise UserError(
            f"{shown(table)} has {len(videos)} lines and {shown(other)} has {len(prompts)}: "
            "write one caption on the line of each video"
        )
    for video, prompt in zip(videos, prompts):
        yield {"video": video.strip(), "prompt": prompt.strip()}


def _parquet_rows(path, table: str) -> Iterator[dict]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{shown(table)} needs a package: pip install pyarrow, or write metadata.csv") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = {*NAME_COLUMNS, *TEXT_COLUMNS, *TIME_COLUMNS}
            columns = [name for name in file.schema_arrow.names if name.strip().lower() in wanted]
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            if sum(group.total_byte_size for group in groups) > MAX_METADATA_BYTES:
                raise UserError(f"{shown(table)} is over {MAX_METADATA_BYTES} bytes: split it")
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"cannot read {shown(table)}: {' '.join(str(error).split())[:200]}") from error


def _add_notes(listing: Listing, tables: dict[str, list[str]], found: Captions) -> None:
    """Adds the captions beside the videos that no table speaks for."""
    beside, used = collections.defaultdict(list), set()
    in_tables = {name for files in tables.values() for name in files}
    notes = [name for name in listing.notes if name not in in_tables]
    outside = [name for name in listing.left_out.get(OUTSIDE, ()) if name.lower().endswith(NOTES)]
    for note in notes + outside:
        beside[posixpath.splitext(note)[0].casefold()].append(note)
    for name, (part, _) in listing.videos.items():
        stems = [posixpath.splitext(name)[0], name]  # of name.txt, of name.mp4.txt
        if part is not None:  # WebDataset: files with the same letters before the first dot belong together
            stems.append(posixpath.join(posixpath.dirname(name), posixpath.basename(name).partition(".")[0]))
        folded = list(dict.fromkeys(map(str.casefold, stems)))
        mine = [note for stem in folded for note in sorted(beside.get(stem, ()), key=_rank)]
        mine = [note for note in mine if posixpath.splitext(note)[0] in stems] or mine
        used.update(mine)
        if name in found.of:
            if mine:
                found.said["a table and a file beside it have its caption, the table counts"].append(name)
        elif part is None and not tables.keys().isdisjoint(_folders_above(name)):
            listing.left_out["no row of the table names it"][name] = ""
        else:
            read = [captions for note in mine if any(captions := _read_note(listing, note))]
            if any(captions != read[0] for captions in read):
                found.said[f"several captions beside it differ, that of {NOTES[0]} counts"].append(name)
            found.of[name] = read[0] if read else [""]
            found.sources["files beside the videos"] += bool(read)
    if unused := sorted(note for note in notes if note not in used):
        found.said["a file of text that belongs to no video"] = unused


def _folders_above(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _rank(note: str) -> int:
    return NOTES.index(posixpath.splitext(note)[1].lower())


def _read_note(listing: Listing, note: str) -> list[str]:
    """Returns the captions in a file beside a video, of at least one. Raises UserError."""
    if note in listing.left_out.get(OUTSIDE, ()):
        raise _points_out(listing, note)
    content = read_text(listing.open(note, listing.notes[note]))
    if note.lower().endswith(".json"):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"cannot read {shown(note)}: {' '.join(str(error).split())}, correct the file") from error
        if isinstance(content, dict):
            values = {key.lower(): value for key, value in content.items()}
            content = next((values[key] for key in TEXT_COLUMNS if values.get(key)), "")
    return [" ".join(text.split()) for text in _texts(content)]
