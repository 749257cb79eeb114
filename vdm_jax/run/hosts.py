"""Several processes that run one program: how they find each other, what they share, what ends them when one is gone.

Each process of a job runs the same command. They find each other by what Slurm, GKE or a TPU VM tell, or by flags:

    python -m vdm_jax.train ... --coordinator=HOST:PORT --processes=2 --process=0    # and --process=1 on the other

A peer that dies, or stands still for longer than config.watchdog_seconds, ends the others: with exit code 75 those that
notice, by JAX's own abort those whose coordinator is then gone. A scheduler starts the job again, and it goes on from
the newest checkpoint.
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

logger = logging.getLogger("vdm_jax")

COMPILING = 3600  # seconds in which the slowest process must have compiled
TRY_AGAIN = 75  # exit code: EX_TEMPFAIL of sysexits.h
METADATA = "http://{}/computeMetadata/v1/instance/attributes/worker-network-endpoints"  # of a TPU VM: who its peers are


def define_flags():
    flags.DEFINE_enum("distributed", "auto", ("auto", "yes", "no"), "Join the other processes of the job.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, with --processes and --process.")
    flags.DEFINE_integer("processes", None, "How many processes there are.", lower_bound=1)
    flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0)


def initialize(options):
    """Joins the job that the flags or the surroundings tell of; for the start of a script. Raises UserError."""
    own = dict(coordinator=options.coordinator, processes=options.processes, process=options.process)
    missing = [name for name, value in own.items() if value is None]
    if len(missing) == len(own):
        if options.distributed == "no" or options.distributed == "auto" and not surroundings(os.environ):
            return
    elif missing:
        raise UserError(f"--{missing[0]} is missing: give all of --coordinator, --processes and --process")
    elif options.process >= options.processes:
        raise UserError(f"--process={options.process} must be below --processes={options.processes}")
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # with it, collectives of two programs deadlock
    try:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the other processes: {error}") from None
    logger.info("process %d of %d", jax.process_index(), jax.process_count())
    if not is_primary():
        logger.setLevel(logging.WARNING)  # one tells what all do


def surroundings(environment):
    """What tells of several processes, "slurm", "gke" or "tpu"; None where this is the only one."""
    if "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return "slurm"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or int(environment.get("MEGASCALE_NUM_SLICES", 1)) > 1:
        return "gke"
    if any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")) or "GCE_METADATA_HOST" in environment:
        url = METADATA.format(environment.get("GCE_METADATA_HOST", "metadata.google.internal"))
        try:
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            with urllib.request.urlopen(request, timeout=2) as answer:
                return "tpu" if "," in answer.read().decode() else None
        except OSError:  # no Google machine, or none of a slice
            return None
    return None


def is_primary():
    """Whether this process writes what all of them made."""
    return jax.process_index() == 0


def broadcast_from_primary(value):
    """What process 0 has as `value`, an integer or truth value, on all of them; they wait for each other here."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def compiled(step, *arguments):
    """A jitted `step`, compiled for its arguments; with several processes, by all before one of them runs it.

    A peer that waits in a step for one that still compiles would give it up: on a CPU after half a minute.
    """
    program = step.lower(*arguments).compile()
    barrier("compiled", COMPILING)
    return program


def barrier(what, seconds):
    """Returns when all processes have come here, the slowest within `seconds`; in a collective a CPU waits for 30."""
    if jax.process_count() > 1:
        ocp.multihost.sync_global_processes(what, timeout=seconds)


def abort(why):
    """Ends this process at once, without waiting for peers that will not come."""
    logger.error("error: %s; exit code %d asks the scheduler to start the job again", why, TRY_AGAIN)
    os._exit(TRY_AGAIN)


@contextlib.contextmanager
def exit_on_lost_peer():
    """What JAX raises in a process when another one has gone, said clearly; for the part that all do together."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # the latter of gloo, between CPUs
        if jax.process_count() == 1 or isinstance(error, ValueError) and "Gloo" not in str(error):
            raise
        abort(f"a peer is gone, or failed: {str(error).splitlines()[0]}")


def watchdog(seconds):
    """-> alive(what), to be called whenever something is done; alive(None) stands the watch down.

    Where that does not come for `seconds` (0: any time), the process gives up. Only for several processes: one alone
    has nobody to wait for.
    """
    last = [None, 0.0]

    def alive(what):
        last[:] = what, time.monotonic()

    def watch():
        while True:
            time.sleep(min(1.0, seconds / 10))
            what, when = last
            if what is not None and time.monotonic() - when > seconds:
                abort(f"nothing has happened for {seconds:g} s after {what}: a process is stuck or gone")

    if seconds and jax.process_count() > 1:
        threading.Thread(target=watch, daemon=True).start()
    return alive
