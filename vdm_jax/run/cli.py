"""What the command lines share: the --config flag, and errors of one clear line."""

import logging
import sys
from pathlib import Path

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

from vdm_jax.errors import UserError

# Of libraries: what users need to know, this package says. Now, as some warn when they are loaded.
absl.logging.set_verbosity(absl.logging.ERROR)


def define_config():
    """Defines --config=FILE, with --config.some.key=value to change a value."""
    return config_flags.DEFINE_config_file("config", None, "Recipe, such as configs/world.py.", lock_config=True)


def only_options(argv):
    """Raises UserError where a command line has a word that is no option."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: options are given as --name=value")


def use_cache(config):
    """Keeps compiled programs in the folder config.compilation_cache, if any, for later processes."""
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)


def run(main):
    """absl's app.run, with UserError and flag errors as one line on stderr and exit code 2."""
    _log()
    try:
        app.run(_guarded(main), flags_parser=_parse)
    except UserError as error:
        fail(error)


def call(script, *options):
    """What `python -m SCRIPT OPTIONS` does, inside this process: in a notebook the TPU belongs to it and to no other.

    script: a module with define_flags and main. Raises UserError.
    """
    _log()
    known, before = set(flags.FLAGS), sys.argv
    sys.argv = [script.__name__, *options]  # where ml_collections looks for --config.some.key
    script.define_flags()
    try:
        script.main(_parse(sys.argv))
    finally:
        sys.argv = before
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)


def _log():
    logger = logging.getLogger("vdm_jax")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


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
    # Recipes import their neighbours as `configs.common`, wherever the command is given from.
    for path in (a.split("=", 1)[1] for a in argv if a.lstrip("-").startswith("config=")):
        sys.path.append(str(Path(path).resolve().parent.parent))
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(_explain(error)) from None
    except (SyntaxError, ImportError, NameError) as error:
        raise UserError(f"the recipe is broken: {type(error).__name__}: {error}") from None
    if "config" in flags.FLAGS:
        try:
            hasattr(flags.FLAGS.config, "lock")  # ml_collections keeps the error of a missing file for the first access
        except OSError:
            raise UserError(f"cannot read the recipe --config={flags.FLAGS['config'].config_filename}") from None
    return rest


def _explain(error):
    """The text of an absl or ml_collections error without quotes and line breaks around the parts."""
    lines = [line.strip(" '\"\\") for line in str(error).replace("\\n", "\n").splitlines()]
    if any(line.startswith("Traceback") for line in lines):  # of the recipe: its last line says what was wrong
        lines = ["the recipe is broken", lines[-1]]
    if isinstance(error, KeyError) and len(lines) == 1 and " " not in lines[0]:
        lines = [f"the config has no {lines[0]!r}"]
    return ": ".join(line for line in lines if line) or type(error).__name__
