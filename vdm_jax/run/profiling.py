"""Where the time goes: traces of training steps, and how long a compilation takes.

A trace is shown by TensorBoard's profile page, or by `xprof --logdir=FOLDER`.
"""

import contextlib
import logging
import time

import jax

from vdm_jax.errors import UserError
from vdm_jax.run import storage

logger = logging.getLogger("vdm_jax")


def span(text):
    """Returns (10, 15) for '10:15', the first and the last step to trace; None for no text. Raises UserError."""
    if not text:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile={text} must name a first and a last step, such as 10:15")
    return int(first), int(last)


def tracer(steps, folder):
    """Returns trace(number, result=None). Call trace(done) before the first step and trace(number, result) after each.

    steps: (first, last) step to trace into `folder`, from 1; None for no trace.
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
def compiling(what, key=""):
    """Says that `what` is being compiled and how long this took the last time on this kind of device.

    key: tells programs of the same name apart, such as the number of parameters.
    A file of seconds that cannot be read or written is no error.
    """
    path = storage.user_cache() / "compile_seconds.json"
    name = f"{what} {key} on {jax.devices()[0].device_kind}"
    before = _read_seconds(path).get(name)
    logger.info("compiling %s (%s)", what, "first time here" if before is None else f"took {before:.0f} s last time")
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    logger.info("compiled in %.0f s", seconds)
    storage.remember(path, _read_seconds(path) | {name: round(seconds, 1)})


def _read_seconds(path):
    """Returns {what was compiled: seconds}, empty for a file that is missing or damaged."""
    try:
        return {name: float(seconds) for name, seconds in storage.read_json(path, "").items()}
    except (ValueError, TypeError):
        return {}
