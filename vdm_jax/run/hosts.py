"""Several processes that run one program: how they find each other, and how they end when one of them is lost.

Each process of a job runs the same command. Slurm, GKE or a TPU VM tells it where the others are. Elsewhere flags do:

    python -m vdm_jax.train ... --coordinator=HOST:PORT --processes=2 --process=0    # and --process=1 on the other host

When a process dies, or makes no progress for config.watchdog_seconds, the others end, too. A process that notices the
loss ends with exit code 75. A scheduler should then start the job again. It continues from the newest checkpoint.
"""

import contextlib
import logging
import os
import threading
import time
import urllib.request
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from jax.experimental import multihost_utils

from vdm_jax.errors import UserError
from vdm_jax.sharding import find_devices

logger = logging.getLogger("vdm_jax")

COMPILING = 3600  # seconds after which the slowest process must have compiled
TRY_AGAIN = 75  # exit code, EX_TEMPFAIL of sysexits.h
METADATA = "http://{}/computeMetadata/v1/instance/attributes/worker-network-endpoints"  # lists the hosts of a TPU slice


def define_flags():
    flags.DEFINE_enum(
        "distributed", "auto", ("auto", "yes", "no"), "Join other processes. auto: if Slurm, GKE or a TPU VM names any."
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0. Give --processes and --process with it.")
    flags.DEFINE_integer("processes", None, "Number of processes.", 1, 2**20)
    flags.DEFINE_integer("process", None, "Number of this process, from 0.", 0, 2**20)


def initialize(options):
    """Joins the other processes that the flags name, if there are any. A command calls it before it uses a device.

    Raises UserError when flags are missing or wrong, or when the others or this process's devices cannot be reached.
    """
    own = dict(coordinator=options.coordinator, processes=options.processes, process=options.process)
    missing = [name for name, value in own.items() if value is None]
    if len(missing) == len(own):
        if options.distributed == "no" or options.distributed == "auto" and not has_peers(os.environ):
            return
    elif missing:
        raise UserError(f"--{missing[0]} is missing: give all of --coordinator, --processes and --process")
    elif options.process >= options.processes:
        raise UserError(f"--process={options.process} must be below --processes={options.processes}")
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # else the collectives of two programs may deadlock
    try:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the other processes: {error}") from None
    find_devices()
    logger.info("process %d of %d", jax.process_index(), jax.process_count())
    if not is_primary():
        logger.setLevel(logging.WARNING)  # process 0 reports for all


def has_peers(environment):
    """Returns whether Slurm, GKE or a TPU VM started several processes, from the environment variables."""
    if "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return True
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or int(environment.get("MEGASCALE_NUM_SLICES", 1)) > 1:
        return True  # GKE
    if any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")) or "GCE_METADATA_HOST" in environment:
        url = METADATA.format(environment.get("GCE_METADATA_HOST", "metadata.google.internal"))
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with contextlib.suppress(OSError):  # not a Google machine, or not one of a slice
            with urllib.request.urlopen(request, timeout=2) as answer:
                return "," in answer.read().decode()
    return False


def is_primary():
    """Returns whether this is process 0, which writes the files and reports for all."""
    return jax.process_index() == 0


def broadcast_from_primary(value):
    """Returns the `value` of process 0, an integer or a bool, on all processes. They wait for each other here."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def compiled(step, *arguments, **static):
    """Returns a jitted `step`, compiled for its arguments. It waits until all processes have compiled.

    Otherwise a collective would time out, after 30 s on a CPU, while a slow process still compiles.
    """
    program = step.lower(*arguments, **static).compile()
    barrier("compiled", COMPILING)
    return program


def barrier(what, seconds):
    """Waits until all processes are at the place of this name, and fails after `seconds`."""
    if jax.process_count() > 1:
        ocp.multihost.sync_global_processes(what, timeout=seconds)


def abort(why):
    """Ends this process at once, with exit code 75. A normal end would wait for the lost process."""
    logger.error("error: %s; exit code %d asks the scheduler to start the job again", why, TRY_AGAIN)
    os._exit(TRY_AGAIN)


@contextlib.contextmanager
def exit_on_lost_peer():
    """Ends this process by `abort` when JAX reports that another process is lost."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # between CPUs, Gloo raises ValueError
        if jax.process_count() == 1 or isinstance(error, ValueError) and "Gloo" not in str(error):
            raise
        abort(f"another process is lost, or failed: {str(error).splitlines()[0]}")


def watchdog(seconds):
    """Returns report_progress(what), to be called when a step begins. When the calls stop, the process ends by `abort`.

    seconds: the longest pause between two calls; 0 for any. A single process has no limit: it waits for no other.
    what: what was done last, for the message. report_progress(None) ends the watch.
    """
    last = None, 0.0  # what was done, and when

    def report_progress(what):
        nonlocal last
        last = what, time.monotonic()

    def watch():
        while True:
            time.sleep(min(1.0, seconds / 10))
            what, when = last
            if what is not None and time.monotonic() - when > seconds:
                abort(f"nothing has happened for {seconds:g} s after {what}: a process is stuck or gone")

    if seconds and jax.process_count() > 1:
        threading.Thread(target=watch, daemon=True).start()
    return report_progress
