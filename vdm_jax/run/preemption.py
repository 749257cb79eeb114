"""A polite stop: SIGTERM or SIGINT ends a run after the step under way, saved; a second one ends it at once."""

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
    """stop(step) -> whether the run is to end after `step`; the same on all processes, whichever got the signal."""

    def __init__(self):
        self.signal = None  # name of the one received
        self.stepping = False  # whether there are steps to save: else the process may end where it is

    def __call__(self, step):
        if jax.distributed.is_initialized():  # JAX has SIGTERM then, and lets all processes agree on a step
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signal is not None


@contextlib.contextmanager
def watching():
    """Yields a Stop. For the main thread, after jax.distributed.initialize if that is called at all."""
    stop, distributed = Stop(), jax.distributed.is_initialized()

    def handle(number, frame):
        for one in SIGNALS[distributed:]:
            signal.signal(one, signal.SIG_DFL)
        stop.signal = signal.Signals(number).name
        if distributed:
            os.kill(os.getpid(), signal.SIGTERM)  # as one whom the scheduler stops
        if stop.stepping or distributed:
            logger.info("%s: the run stops after this step, saved; the same signal again stops it at once", stop.signal)
        else:
            logger.info("%s: nothing to save, the run stops", stop.signal)
            sys.exit(0)

    before = {one: signal.signal(one, handle) for one in SIGNALS[distributed:]}
    try:
        yield stop
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
