"""What a run says about its folder of videos before it starts."""

import collections
import dataclasses
import functools
import logging
import os

from vdm_jax.data.caption_files import Captions, Timed
from vdm_jax.data.listing import Listing, shown

logger = logging.getLogger("vdm_jax")

FIRST = 5  # names that a message lists


@dataclasses.dataclass
class Summary:
    """The files of a folder in numbers. A group of files or rows is {'count', 'first': the first names}."""

    path: str
    found: int  # files and hidden folders, without files of captions
    used: int  # videos
    hours: float  # of the videos that are used
    shapes: dict[str, int]  # {"720x1280": number of videos of this height and width}
    frame_rates: dict[str, int]  # {"29.97": number of videos, "image": number of images}
    captions: dict[str, int]  # {where they come from: number of videos}
    held_out: str  # what training does not see
    left_out: dict[str, dict]  # {reason: group of files}
    caption_faults: dict[str, dict]  # {fault: group of files or rows}
    without_caption: dict  # group of videos
    without_sound: dict  # group of videos

    def log(self) -> None:
        """Logs the summary, unless it is the one before."""
        facts = [
            f"{self.used} of {self.found} files in {shown(self.path)} are used: {self.hours:.3g} hours of video",
            f"height x width: {_most(self.shapes)}; frames a second: {_most(self.frame_rates)}",
            f"captions: {_most(self.captions)}",
            f"held out: {self.held_out}",
        ]
        faults = [_fault(files, self.found, f"left out, {reason}") for reason, files in self.left_out.items()]
        faults += [_fault(self.without_sound, self.used, "no sound, it is silent")]
        faults += [_fault(self.without_caption, self.used, "no caption, it has the empty text")]
        faults += [_fault(rows, None, fault) for fault, rows in self.caption_faults.items()]
        _log(tuple(facts), tuple(filter(None, faults)))


def make(listing: Listing, captions: Captions, held_out: str) -> Summary:
    """Returns the summary of the videos that have captions, or the empty text."""
    videos = {name: listing.videos[name][1] for name in captions.of}
    left_out = {
        reason: group([f"{name} ({why})" if why else name for name, why in sorted(names.items())])
        for reason, names in sorted(listing.left_out.items())
    }
    return Summary(
        path=os.fspath(listing.root),
        found=len(videos) + sum(files["count"] for files in left_out.values()),
        used=len(videos),
        hours=sum(info.duration for info in videos.values()) / 3600,
        shapes=_counts(f"{info.height}x{info.width}" for info in videos.values()),
        frame_rates=_counts("image" if info.is_image else f"{info.fps:.5g}" for info in videos.values()),
        captions={source: count for source, count in captions.sources.items() if count},
        held_out=held_out,
        left_out=left_out,
        caption_faults={fault: group(names) for fault, names in captions.said.items()},
        without_caption=group([name for name, texts in captions.of.items() if not any(map(_text, texts))]),
        without_sound=group([name for name, info in videos.items() if not info.has_audio]),
    )


def group(names: list[str]) -> dict:
    """Returns {'count', 'first': the first names, as messages show them}."""
    return {"count": len(names), "first": [shown(name) for name in names[:FIRST]]}


def first_names(files: dict) -> str:
    """Returns the first names of a group, and the number of the others, as a text."""
    more = files["count"] - len(files["first"])
    return ", ".join(files["first"]) + (f" and {more} more" if more else "")


def _text(caption) -> str:
    return caption.text if isinstance(caption, Timed) else caption


def _counts(values) -> dict[str, int]:
    """Returns {value: how often it comes}, frequent ones first."""
    return dict(collections.Counter(values).most_common())


def _most(counts: dict[str, int]) -> str:
    """Returns the most frequent values with their counts, as a text."""
    most = sorted(counts.items(), key=lambda item: -item[1])
    listed = [f"{shown(value)} ({count})" for value, count in most[:FIRST]]
    return ", ".join(listed + [f"{len(most) - FIRST} others"] * (len(most) > FIRST)) or "none"


def _fault(files: dict, total: int | None, text: str) -> str:
    count = f"captions, {files['count']} times" if total is None else f"{files['count']} of {total} files"
    return f"{count}: {text}: {first_names(files)}" if files["count"] else ""


@functools.lru_cache(maxsize=16)  # a run opens the folder once for each of its stages and shapes
def _log(facts: tuple[str, ...], faults: tuple[str, ...]) -> None:
    for line in facts:
        logger.info("data: %s", line)
    for line in faults:
        logger.warning("data: %s", line)
