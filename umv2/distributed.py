"""Multi-process jobs: initialisation, and operations on which all processes must agree.

Builds on JAX, which discovers the processes of a SLURM step, an Open MPI job, a TPU pod (of one or
several slices) or an indexed Kubernetes job, and propagates a SIGTERM from one process to all.
"""

import contextlib
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from umv2 import files
from umv2.config.schema import UserError

# How long an exiting process waits for the others, which may still be writing files. After an error
# in one process the others never arrive; then all processes are terminated.
_SHUTDOWN_TIMEOUT_SECONDS = 60


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    saves_on_termination: bool,
) -> int:
    """Initialises `jax.distributed` if the job has several processes; returns the process index.

    Must be called before JAX is used. A process that no launcher started runs alone, and does not
    access the network.

    Args:
      coordinator_address: host:port of process 0. If JAX cannot discover the processes, this and
        the next two arguments are all required.
      num_processes: number of processes; 1 runs this process alone, whatever started it.
      process_id: index of this process.
      saves_on_termination: SIGTERM triggers `StopSignal` instead of ending the process.

    Raises:
      UserError: the arguments are inconsistent, or JAX cannot query the launcher.
    """
    _check(coordinator_address, num_processes, process_id)
    launcher, _ = _launcher()
    if num_processes == 1 or (num_processes is None and launcher is None):
        return 0
    jax.config.update("jax_enable_preemption_service", saves_on_termination)
    if process_id == 0:
        logging.info("waiting for %d processes at %s", num_processes, coordinator_address)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            # Explicit arguments must not be combined with those of a launcher.
            cluster_detection_method="deactivate" if num_processes else None,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_SECONDS,
        )
    except (RuntimeError, ValueError, KeyError, OSError, ImportError) as error:
        source = "the flags" if num_processes else launcher
        raise UserError(
            f"cannot join the processes of {source}: {error}; --coordinator_address,"
            " --num_processes and --process_id specify them, --num_processes=1 runs this process"
            " alone"
        ) from error
    if jax.process_index() == 0:
        logging.info("%d processes, %d devices", jax.process_count(), jax.device_count())
    return jax.process_index()


def require_single_process(what: str, num_processes: int | None) -> None:
    """Checks that a single-process job was not started in several processes.

    Raises:
      UserError: it was.
    """
    if (num_processes or 1) > 1:
        raise UserError(f"--num_processes={num_processes}: {what} runs in one process")
    launcher, started = _launcher()
    if num_processes is None and (started or 1) > 1:
        raise UserError(
            f"{what} runs in one process, but {launcher} started {started}: start only one, or pass"
            " --num_processes=1 if this process is not part of that job"
        )


def on_all_processes[T](work: Callable[[], T]) -> T:
    """Calls `work` on every process, raising on all of them if it fails on any.

    For per-process work such as reading files: if only one process raised, the others would wait
    for it forever.

    Raises:
      UserError: `work` failed in another process.
      Exception: the exception that `work` raised in this process.
    """
    if jax.process_count() == 1:
        return work()
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:  # raised below, after the other processes are informed
        error = caught
    failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(error is not None)))
    if error is not None:
        raise error
    if failed.size:
        raise UserError(f"process {failed[0]} failed; see its error message")
    return result


def require_shared(directory: Path) -> None:
    """Creates a directory, and checks that all processes see the same one.

    Raises:
      UserError: a process does not see a file that process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    token = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
    probe = directory / f".written_by_process_0_{token:08x}"

    def write() -> None:
        if jax.process_index() == 0:
            files.make_folder(directory)
            with files.errors(directory):
                probe.touch()

    on_all_processes(write)
    visible = multihost_utils.process_allgather(np.asarray(probe.exists())).ravel()
    if jax.process_index() == 0:
        probe.unlink(missing_ok=True)
    if not visible.all():
        others = ", ".join(str(process) for process in np.flatnonzero(~visible))
        raise UserError(
            f"{directory}: is not shared by all {visible.size} processes (files of process 0 are"
            f" not visible to {others}); use a --workdir on a disk that all of them mount"
        )


@contextlib.contextmanager
def lock_folder(folder: Path, work: str) -> Iterator[None]:
    """Locks a folder for all processes of this job; process 0 holds the lock.

    Args:
      folder: the folder to lock; it is created if missing.
      work: description of the work, for the error message of other jobs.

    Raises:
      UserError: another job holds the lock, or the folder cannot be created.
    """
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            if jax.process_index() == 0:
                stack.enter_context(files.locked(folder / "lock", work))

        on_all_processes(lock)
        yield


def broadcast_from_first(work: Callable[[], int]) -> int:
    """Calls `work` on the first process, and returns its result on all processes."""
    value = on_all_processes(lambda: work() if jax.process_index() == 0 else 0)
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a request to stop, on which all processes agree.

    `requested(step)` returns after each step whether to stop. A second Ctrl-C ends the process
    immediately, without saving. A single process handles the signals itself. Several processes must
    all stop after the same step, or some would save while others compute. There Ctrl-C is converted
    to SIGTERM, which JAX's preemption service propagates to all processes, choosing the first step
    that none of them has reached.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python allows signal handlers only in the main thread
        handlers: dict[int, Callable[..., None]] = {signal.SIGINT: self._interrupt}
        if jax.process_count() == 1:
            handlers[signal.SIGTERM] = self._note
        for number, handler in handlers.items():
            self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        """Name of the signal, if this process received it."""
        return self._received or "a signal to another process"

    def requested(self, step: int) -> bool:
        """Returns whether to stop after this step; the result is the same on all processes."""
        if jax.process_count() == 1:
            return self.received
        return multihost_utils.reached_preemption_sync_point(step)

    @property
    def received(self) -> bool:
        """Whether to stop work between steps; always False if several processes must agree."""
        return self._received is not None and jax.process_count() == 1

    def _note(self, number: int, _: object) -> None:
        self._received = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

    def _interrupt(self, number: int, frame: object) -> None:
        # Restore the default action, which ends the process even during a compilation, where Python
        # would not run a handler.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._note(number, frame)
        # Do not use the logger: the interrupted code may hold its lock.
        os.write(2, b"\nstopping once the state is saved; press Ctrl-C again to end immediately\n")
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _check(address: str | None, num_processes: int | None, process_id: int | None) -> None:
    given = {
        "--coordinator_address": address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given) and num_processes != 1:
        there = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        raise UserError(f"{there}: needs {' and '.join(missing)} too")
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator_address={address}: must be host:port")
    if process_id is not None and num_processes is not None and process_id >= num_processes:
        raise UserError(f"--process_id={process_id}: must be below --num_processes={num_processes}")


def _launcher() -> tuple[str | None, int | None]:
    """Returns the launcher that started several processes, if any, and their number, if known.

    Reads only environment variables: JAX's own detection may access the network.
    """
    environment = os.environ
    for launcher, count in (
        ("Open MPI", "OMPI_COMM_WORLD_SIZE"),
        ("SLURM", "SLURM_STEP_NUM_TASKS"),
    ):
        given = environment.get(count, "1")
        if not given.isdecimal():
            raise UserError(f"{count}={given}: must be the number of processes of {launcher}")
        if (started := int(given)) > 1:
            return launcher, started
    # JAX sets this variable on import if TPUs are attached. A single TPU host joins only itself.
    if "TPU_ML_PLATFORM" in environment and "tpu" in (jax.config.jax_platforms or "tpu"):
        return "the TPU pod", None
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return "the Kubernetes job", None
    return None, None
