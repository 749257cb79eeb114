"""What all commands share: the --config flag, output that nobody reads, and faults that end with one clear line."""

import errno
import logging
import os
import sys
from pathlib import Path

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

from vdm_jax.errors import SaveError, UserError
from vdm_jax.settings import SOURCES

PATH_FAULTS = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS)

# Hides what libraries log: a fault that ends a run is raised, too. Some libraries warn while they are imported, so this
# is done before that.
absl.logging.set_verbosity(absl.logging.FATAL)


def define_config():
    """Defines --config=FILE. With it, --config.some.key=value changes a value."""
    config_flags.DEFINE_config_file(
        "config", None, "Recipe, such as configs/world.py. --config.KEY=VALUE changes a value of it.", lock_config=True
    )


def only_options(argv):
    """Raises UserError when a command line has a word that is not an option."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: options are given as --name=value")


def recipe(argv):
    """Returns the config. Raises UserError when --config is missing, or a word of the command line is not an option."""
    only_options(argv)
    if flags.FLAGS.config is None:
        raise UserError("--config=FILE is missing: name a recipe, such as configs/world_tiny.py")
    return flags.FLAGS.config


def define_weights():
    flags.DEFINE_string("workdir", None, "Run folder; without it and --weights: the reference weights.")
    flags.DEFINE_string("weights", None, "Folder of exported weights.")
    flags.DEFINE_multi_string("lora", [], "Adapters to merge in, FILE or FILE:SCALE; repeat the flag for several.")
    define_parts()


def define_parts():
    for key in SOURCES:
        flags.DEFINE_string(f"{key}.source", None, f"Folder of the {key.replace('_', ' ')}; default: as in training.")


def parts(options):
    """Returns {part: folder} of the flags that `define_parts` defines."""
    return {key: options[f"{key}.source"].value for key in SOURCES if options[f"{key}.source"].value}


def weights_folder(options):
    """The folder that --workdir or --weights names; None for the reference weights. Raises UserError for both."""
    if options.workdir and options.weights:
        raise UserError("give only one of --workdir and --weights")
    return options.workdir or options.weights


def use_cache(config):
    """Keeps compiled programs in the folder config.compilation_cache, for later processes. "" keeps none."""
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)


def run(main):
    """Runs main(argv) as absl's app.run does. A UserError and a wrong flag end with one line and exit code 2."""
    _keep_streams()
    _log()
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith(("vdm_jax", "ml_collections")):  # --help shows all flags of a command
            for flag in defined:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    try:
        app.run(main, flags_parser=_parse)
    except SaveError as error:
        _end(str(error), leave=os._exit)  # threads of Orbax may still wait for the rest of the save, for minutes
    except (UserError, KeyboardInterrupt) as error:
        _end(str(error) or "interrupted")
    except OSError as error:
        if error.errno not in PATH_FAULTS:
            raise
        _end(f"cannot use {str(error.filename)[:300]}: {error.strerror}: give another path")
    except MemoryError as error:
        _end(f"this machine has too little memory ({error}): use smaller clips or batches")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _end(
            f"the device has too little memory ({str(error).splitlines()[0]}): use smaller batches, or end another "
            f"process that holds its memory"
        )


def _end(fault, leave=sys.exit):
    sys.stderr.write(f"error: {' '.join(fault.split())}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    leave(2)


class _Stream:
    """A standard stream. When its reader is gone, what is written to it is lost, and no error is raised.

    A character that its encoding lacks is written as a number, such as \\xe9.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        encoding = self.stream.encoding or "utf-8"
        self._try(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, function, *arguments):
        try:
            function(*arguments)
        except OSError as error:
            if error.errno == errno.EPIPE:  # from now on also for what Python or a library writes by itself
                with open(os.devnull, "wb") as nothing:
                    os.dup2(nothing.fileno(), self.stream.fileno())


def _keep_streams():
    """Opens standard streams that are closed, and keeps a run alive when the reader of one goes away."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The file gets the number of the closed stream. Otherwise the next file that is opened would get it, and
            # with it the messages of a library.
            setattr(sys, name, open(os.devnull, mode))
    sys.stdout, sys.stderr = _Stream(sys.stdout), _Stream(sys.stderr)


def call(script, *options):
    """Does in this process what `python -m SCRIPT OPTIONS` does. A notebook needs it: its process has the only TPU.

    script: a module with `define_flags` and `main`.
    options: strings such as "--seed=1".
    """
    _log()
    known, before = set(flags.FLAGS), sys.argv
    sys.argv = [script.__name__, *options]  # ml_collections reads --config.some.key from here
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


def _parse(argv):
    """Parses flags. Raises UserError for a broken recipe, a mistyped key and an empty value."""
    # An empty value comes from an unset variable of a shell. Without a value a flag would have its default, silently.
    for name in (a[:-1] for a in argv[1:] if a.startswith("-") and a.endswith("=") and a.count("=") == 1):
        if name.lstrip("-") != "prompt" and not name.lstrip("-").startswith("config."):
            raise UserError(f"{name}= has no value: give one, or leave the flag out")
    # Recipes import `configs.common`. This makes it importable from any working directory.
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
            hasattr(flags.FLAGS.config, "lock")  # the first access raises the error of a missing file
        except OSError:
            raise UserError(f"cannot read the recipe --config={flags.FLAGS['config'].config_filename}") from None
    return rest


def _explain(error):
    """Returns the text of an absl or ml_collections error on one line, without quotes."""
    lines = [line.strip(" '\"\\") for line in str(error).replace("\\n", "\n").splitlines()]
    if any(line.startswith("Traceback") for line in lines):  # the last line of a traceback names the fault
        lines = ["the recipe is broken", lines[-1]]
    if isinstance(error, KeyError) and len(lines) == 1 and " " not in lines[0]:
        lines = [f"the config has no {lines[0]!r}"]
    return ": ".join(line for line in lines if line) or type(error).__name__
