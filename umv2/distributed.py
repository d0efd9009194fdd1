"""Several processes as one: how they join, and what they must agree on.

The work is JAX's: it finds the other processes of a SLURM step, an Open MPI job, a TPU pod (of
several slices, too) or an indexed Kubernetes job, and tells all of a SIGTERM that reached one.
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

# A process that ends waits as long for the others, which may be writing their last files; when
# they do not come, because it ended by an error of its own, all end.
_SHUTDOWN_TIMEOUT_SECONDS = 60


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    saves_on_termination: bool,
) -> int:
    """Joins the other processes of the job, before JAX is used; returns which of them this one is.

    A process that was started by hand is alone, and asks no network.

    Args:
      coordinator_address: host:port of process 0, with the other two, where JAX cannot find them.
      num_processes: 1 says that this process is alone, whatever started it.
      process_id: from 0.
      saves_on_termination: SIGTERM asks for a `StopSignal` instead of ending the process.

    Raises:
      UserError: values that do not fit together, or a launcher that JAX cannot ask.
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
            # What is given here must not be completed by what a launcher says.
            cluster_detection_method="deactivate" if num_processes else None,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_SECONDS,
        )
    except (RuntimeError, ValueError, KeyError, OSError, ImportError) as error:
        source = "the flags" if num_processes else launcher
        raise UserError(
            f"cannot join the processes of {source}: {error}; --coordinator_address,"
            " --num_processes and --process_id say who they are, --num_processes=1 that there are"
            " no others"
        ) from error
    if jax.process_index() == 0:
        logging.info("%d processes, %d devices", jax.process_count(), jax.device_count())
    return jax.process_index()


def require_alone(what: str, num_processes: int | None) -> None:
    """Checks that a job which only one process can do was not started in several.

    Raises:
      UserError: it was.
    """
    if (num_processes or 1) > 1:
        raise UserError(f"--num_processes={num_processes}: {what} runs in one process")
    launcher, started = _launcher()
    if num_processes is None and (started or 1) > 1:
        raise UserError(
            f"{what} runs in one process, and {launcher} started {started}: start one, or give"
            " --num_processes=1 where this is another job"
        )


def everywhere[T](work: Callable[[], T]) -> T:
    """Returns what work gives that each process does by itself, such as reading files.

    Where it fails in one process it fails in all: the others would wait for that one in vain.

    Raises:
      UserError: it succeeded here, but not in another process.
      Exception: what `work` raises here.
    """
    if jax.process_count() == 1:
        return work()
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:  # whatever it is, the others must hear of it first
        error = caught
    failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(error is not None)))
    if error is not None:
        raise error
    if failed.size:
        raise UserError(f"process {failed[0]} failed, and says why")
    return result


def require_shared(directory: Path) -> None:
    """Creates a directory, and checks that it is one and the same for all processes.

    Raises:
      UserError: a process does not see what process 0 writes there.
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

    everywhere(write)
    seen = multihost_utils.process_allgather(np.asarray(probe.exists())).ravel()
    if jax.process_index() == 0:
        probe.unlink(missing_ok=True)
    if not seen.all():
        blind = ", ".join(str(process) for process in np.flatnonzero(~seen))
        raise UserError(
            f"{directory}: is not shared by all {seen.size} processes (what process 0 writes there"
            f" is not seen by {blind}); give a --workdir on a disk that all of them mount"
        )


@contextlib.contextmanager
def only_job(folder: Path, work: str) -> Iterator[None]:
    """Holds a folder for this job, however many processes it has: process 0 locks it for all.

    Args:
      folder: that nobody else may work in; it is made.
      work: what is done there, for the message of whoever comes second.

    Raises:
      UserError: another job works there, or the folder cannot be made.
    """
    with contextlib.ExitStack() as held:

        def lock() -> None:
            if jax.process_index() == 0:
                held.enter_context(files.locked(folder / "lock", work))

        everywhere(lock)
        yield


def of_first_process(work: Callable[[], int]) -> int:
    """Returns on every process what `work` gives on the first, which alone does it."""
    value = everywhere(lambda: work() if jax.process_index() == 0 else 0)
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class StopSignal:
    """SIGTERM or Ctrl-C as a wish to stop, on which all processes agree.

    `requested(step)` says after each step whether to. A second Ctrl-C ends the process at once, and
    saves nothing. One process gets the signals from Python. Several cannot act on them each by
    itself, for one would save while the others compute: JAX's preemption service tells all of a
    SIGTERM, which Ctrl-C becomes here, and picks the first step that none of them has reached.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python gives signals to the main thread alone
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
        """Of the signal, where this process got it."""
        return self._received or "a signal to another process"

    def requested(self, step: int) -> bool:
        """Returns whether to stop after this step; the same in all processes."""
        if jax.process_count() == 1:
            return self.received
        return multihost_utils.reached_preemption_sync_point(step)

    @property
    def received(self) -> bool:
        """Whether to leave work that is done between steps; False where processes must agree."""
        return self._received is not None and jax.process_count() == 1

    def _note(self, number: int, _: object) -> None:
        self._received = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

    def _interrupt(self, number: int, frame: object) -> None:
        # The system itself ends the process: a handler would wait for the end of a compilation.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._note(number, frame)
        # Not through the log, whose locks the signal may have met half-way.
        os.write(2, b"\nstopping as soon as the state is saved; Ctrl-C once more ends at once\n")
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
    """Returns what started this process as one of several, and of how many where that is known.

    Reads the environment alone: JAX, which knows the details, may ask a network for them.
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
    # JAX sets it when it is imported where TPUs are attached. A host of one TPU joins itself.
    if "TPU_ML_PLATFORM" in environment and "tpu" in (jax.config.jax_platforms or "tpu"):
        return "the TPU pod", None
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return "the Kubernetes job", None
    return None, None
