"""What the command lines share: the --config flag, and errors of one clear line."""

import logging
import sys

import absl.logging
from absl import app, flags
from ml_collections import config_flags

from vdm_jax.errors import UserError


def define_config():
    """Defines --config=FILE, with --config.some.key=value to change a value."""
    return config_flags.DEFINE_config_file("config", None, "Recipe, such as configs/world.py.", lock_config=True)


def run(main):
    """absl's app.run, with UserError and flag errors as one line on stderr and exit code 2."""
    absl.logging.set_verbosity(absl.logging.WARNING)  # libraries speak up only when something is wrong
    logger = logging.getLogger("vdm_jax")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        app.run(_guarded(main), flags_parser=_parse)
    except UserError as error:
        fail(error)


def _guarded(main):
    def guarded(argv):
        try:
            main(argv)
        except UserError as error:
            fail(error)
        except KeyboardInterrupt:
            fail("interrupted")

    return guarded


def fail(message):
    sys.stderr.write(f"error: {' '.join(str(message).split())}\n")
    sys.exit(2)


def _parse(argv):
    """Parses flags; a recipe that is missing or broken and a mistyped key become a UserError."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(_explain(error)) from None


def _explain(error):
    """The text of an absl or ml_collections error without quotes and line breaks around the parts."""
    lines = [line.strip(" '\"\\") for line in str(error).replace("\\n", "\n").splitlines()]
    return ": ".join(line for line in lines if line) or type(error).__name__
