"""How far a long step is: a bar on a terminal, plain lines elsewhere."""

import contextlib
import logging
import sys

from tqdm import tqdm

from vdm_jax.run import hosts

logger = logging.getLogger("vdm_jax")


@contextlib.contextmanager
def progress(what, total, unit):
    """Yields advance(n), to be called when n more of the `total` units are done.

    On a terminal, advance moves a bar, which disappears at the end. Elsewhere advance logs a line for each tenth of the
    units, unless the first call does all units. With several processes only the first process shows anything.
    """
    primary, done = hosts.is_primary(), 0
    # disable=None hides the bar where stderr is no terminal. Some services have no stderr at all.
    with tqdm(total=total, desc=what, unit=unit, disable=None if primary and sys.stderr else True, leave=False) as bar:

        def advance(n):
            nonlocal done
            done += n
            bar.update(n)
            tenths = 10 * done // total - 10 * (done - n) // total  # since the call before
            if primary and bar.disable and n < total and tenths:
                logger.info("%s: %d of %d %ss", what, done, total, unit)

        yield advance
