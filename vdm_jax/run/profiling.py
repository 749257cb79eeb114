"""Traces of some training steps, for xprof (TensorBoard's profile page, or `xprof --logdir=FOLDER`)."""

import logging

import jax

from vdm_jax.errors import UserError

logger = logging.getLogger("vdm_jax")


def span(text):
    """'10:15' -> (10, 15): the first and the last step to trace, from 1; None for none. Raises UserError."""
    if not text:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile={text} must name a first and a last step, such as 10:15")
    return int(first), int(last)


def tracer(steps, folder):
    """-> after(number, result), to be called before the first step and after each, with the number of steps done.

    Writes a trace of `steps` = (first, last), or of what is left of them, into `folder`; None writes nothing.
    """
    active = False

    def after(number, result=None):
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

    return after
