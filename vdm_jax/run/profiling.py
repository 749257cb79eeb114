"""Where the time goes: traces of training steps, and how long a compilation takes.

A trace is shown by TensorBoard's profile page, or by `xprof --logdir=FOLDER`.
"""

import contextlib
import json
import logging
import os
import time
from pathlib import Path

import jax

from vdm_jax.errors import UserError

logger = logging.getLogger("vdm_jax")


def span(text):
    """Returns (10, 15) for '10:15', the numbers of the first and the last step to trace; None for no text.

    Raises UserError for any other text. Steps count from 1.
    """
    if not text:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile={text} must name a first and a last step, such as 10:15")
    return int(first), int(last)


def tracer(steps, folder):
    """Returns trace(number, result=None). Call trace(done) before the first step and trace(number, result) after each.

    steps: (first, last) step to trace, from 1; None for no trace. Steps that are done already are left out.
    folder: gets the trace.

    number: how many steps are done. result: an output of the last step.
    """
    active = False

    def trace(number, result=None):
        nonlocal active
        if steps and not active and steps[0] <= number + 1 <= steps[1]:
            jax.block_until_ready(result)
            jax.profiler.start_trace(str(folder))
            active = True
        elif active and number >= steps[1]:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            active = False
            logger.info("wrote a trace of steps up to %d to %s", number, folder)

    return trace


@contextlib.contextmanager
def compiling(what, cache_file=None, key=""):
    """Says that `what` is being compiled and how long this took the last time on this kind of device.

    what: such as "the training step of clip".
    cache_file: JSON file that remembers the seconds. Default: vdm_jax/compile_seconds.json in the user's cache folder,
        which is $XDG_CACHE_HOME, or ~/.cache. A file that cannot be read or written is no error.
    key: tells programs of the same name apart, such as the number of parameters.
    """
    path = _cache_folder() / "compile_seconds.json" if cache_file is None else Path(cache_file)
    name = " ".join(filter(None, [what, str(key), "on", jax.devices()[0].device_kind]))
    before = _read_seconds(path).get(name)
    logger.info("compiling %s (%s)", what, "first time here" if before is None else f"took {before:.0f} s last time")
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    logger.info("compiled in %.0f s", seconds)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(_read_seconds(path) | {name: round(seconds, 1)}, indent=1) + "\n")
        part.replace(path)  # another process reads the old file or the new one


def _cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vdm_jax"


def _read_seconds(path):
    """Returns {what was compiled: seconds}, empty for a file that is missing or damaged."""
    try:
        stored = json.loads(path.read_text())
        return {name: float(seconds) for name, seconds in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
