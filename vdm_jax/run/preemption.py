"""A clean stop: after SIGTERM or SIGINT a run finishes its current step, saves and ends.

A second signal ends it at once.
"""

import contextlib
import logging
import os
import signal
import sys

import jax
from jax.experimental import multihost_utils

logger = logging.getLogger("vdm_jax")

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """What a signal asks of the run."""

    def __init__(self):
        self.signal = None  # name of the signal that this process received
        self.after_step = False  # whether training has begun; before, a signal ends the run at once

    def is_due(self, step):
        """Whether the run must end after `step`. All processes get the same answer."""
        if jax.distributed.is_initialized():  # JAX handles SIGTERM, and chooses a step for all processes
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signal is not None


@contextlib.contextmanager
def watching():
    """Yields a Stop, and handles the signals until the context ends. It runs after jax.distributed.initialize."""
    stop = Stop()
    distributed = jax.distributed.is_initialized()
    handled = SIGNALS[distributed:]  # all but SIGTERM, when JAX handles that

    def handle(number, frame):
        for each in handled:
            signal.signal(each, signal.SIG_DFL)
        stop.signal = signal.Signals(number).name
        if distributed:
            os.kill(os.getpid(), signal.SIGTERM)  # passes SIGINT on to JAX
        if stop.after_step or distributed:
            logger.info(
                "%s: the run saves and ends after this step; the same signal again ends it at once", stop.signal
            )
        else:
            logger.info("%s: nothing to save, the run ends", stop.signal)
            logging.shutdown()
            sys.stdout.flush()
            # Not sys.exit: an exception that passes through a compilation of XLA crashes the process.
            os._exit(0)

    before = {each: signal.signal(each, handle) for each in handled}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
