"""Atomic checkpoints of the train state and configuration, with checksums verified on restore.

A checkpoint is a folder named after its step. `state` holds every array of the train state under
its name ("params/blocks/ffn/up"); `metadata` holds the step, the configuration, the identity of the
training data, package versions, the number of processes, and the shape, dtype and checksum of every
array.
"""

import contextlib
import dataclasses
import fnmatch
import gc
import importlib.metadata
import logging as std_logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, UInt32

from umv2 import distributed, files
from umv2.config import Config, ConfigError, differing_fields
from umv2.config import files as config_files
from umv2.config.schema import UserError
from umv2.model.parameter import path_name
from umv2.model.weights import Weights
from umv2.training.state import TrainState, abstract_weights

# Fields that may change when a run resumes: they affect only how results are computed, logged and
# stored.
RUNTIME_FIELDS = (
    "train.log_interval_steps",
    "train.evaluation_interval_steps",
    "train.checkpoint_interval_steps",
    "train.num_checkpoints_kept",
    "train.tensorboard",
    "train.wandb_project",
    "evaluation.*",
    "generate.*",
    "mesh.*",
    "data.num_workers",
    "data.prefetch_batches",
    "model.scan_layers",
    "model.remat",
    "model.attention",
    "model.memory.chunk_tokens",
    "model.memory.product_key_top_k",
    "model.memory.value_aggregation",
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class CheckpointError(UserError):
    """No checkpoint can be read or written, or it is of another model."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """The step and weights of a checkpoint."""

    step: int
    weights: Weights


class Checkpointer:
    """Saves the train state in the background, and restores the newest valid checkpoint.

    A checkpoint gets its name only once it is complete; unfinished ones left by a killed process
    are removed. The `keep` newest are kept. Each checkpoint is read back before the next save. If
    the disk fails transiently, the save is abandoned with a warning, and the next one tries again.
    Use it as a context manager, which waits for pending writes on exit.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        config: dict[str, Any],
        data: Mapping[str, Any] | None = None,
    ):
        """Creates the folder.

        Args:
          directory: folder for the checkpoints of one run.
          keep: number of checkpoints to keep.
          config: configuration of the run, as nested dicts.
          data: the `corpus.Identity` of the training data, as a dict; None if unknown.

        Raises:
          FileError: the folder cannot be created, or its path has unsupported characters.
          UserError: the processes of the run do not share the folder.
        """
        check_name(directory)
        self._directory, self._config, self._data = directory.absolute(), config, data
        self._saving: int | None = None  # step of the save that is not yet verified
        self._failed: str | None = None  # reason why the last save was abandoned
        distributed.require_shared(self._directory)
        with files.errors(self._directory):
            self._manager = _open(
                self._directory,
                cleanup_tmp_directories=True,
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            )

    def __enter__(self) -> "Checkpointer":
        self._hook, sys.unraisablehook = sys.unraisablehook, self._report_unless_late
        return self

    def _report_unless_late(self, raised: "sys.UnraisableHookArgs") -> None:
        """Ignores errors of writes that outlive a failed save, for which orbax no longer waits."""
        if str(raised.exc_value) != "Event loop is closed":
            self._hook(raised)

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            self._settle()
        finally:
            self._manager.close()
            sys.unraisablehook = self._hook
        if error_type is None:
            self._require_saved()

    def save(self, step: int, state: TrainState) -> None:
        """Starts a save; returns as soon as the state may be donated.

        Raises:
          CheckpointError: there is a checkpoint of this step or a later one, or the previously
            saved one cannot be read.
        """
        self._settle()
        arrays = _named(state)
        checksums = jax.device_get(_checksums(arrays))
        metadata = {
            "step": step,
            "config": self._config,
            "data": self._data,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "num_processes": jax.process_count(),
            "arrays": {name: _describe(array) for name, array in arrays.items()},
            "checksums": {name: int(checksum) for name, checksum in checksums.items()},
        }
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays), metadata=ocp.args.JsonSave(metadata)
        )
        try:
            started = self._manager.save(step, args=args)
        except Exception as error:  # orbax and tensorstore raise many types
            self._abandon_save(step, error)
            return
        if not started:
            raise CheckpointError(
                f"step {step} cannot follow step {self.latest_step()} in {self._directory}"
            )
        self._saving = step

    def wait(self) -> None:
        """Waits until the last save is on disk and verified.

        Raises:
          CheckpointError: the save failed; the message gives the reason and the newest checkpoint.
        """
        self._settle()
        self._require_saved()

    def _require_saved(self) -> None:
        if self._failed is not None:
            raise CheckpointError(
                f"{self._failed}; the newest checkpoint in {self._directory} is of step"
                f" {self.latest_step()}"
            )

    def _settle(self) -> None:
        """Waits for a pending save, if any, and reads back what it wrote."""
        step, self._saving = self._saving, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax and tensorstore raise many types
            self._abandon_save(step, error)
            return
        self._failed = None
        with _open_to_read(self._directory) as manager, _silence_abandoned_work() as failures:
            try:
                _check_step(_read_metadata(manager, step), step)
                _restore_arrays(manager, step, {"step": jax.ShapeDtypeStruct((), jnp.int32)})
            except Exception as error:  # orbax and tensorstore raise many types
                failures.append(why := _reason(error))
                if _is_transient(error):
                    logging.warning("step %d was saved, but could not be verified: %s", step, why)
                    return
                raise CheckpointError(
                    f"{self._directory / str(step)}: was saved, but cannot be read: {why}"
                ) from error

    def _abandon_save(self, step: int, error: Exception) -> None:
        """Abandons a save that failed with a transient error, and removes its files.

        Raises:
          Exception: `error`, if it is not transient.
        """
        if not _is_transient(error):
            raise error
        self._failed = f"step {step} could not be saved: {_reason(error)}"
        logging.warning("%s; the next save will try again", self._failed)
        with _silence_abandoned_work() as failures:
            failures.append(self._failed)
            if jax.process_index() == 0:
                self._remove_unfinished()
            self._manager.reload()

    def _remove_unfinished(self) -> None:
        for _ in range(10):  # an abandoned write may still create files
            unfinished = list(self._directory.glob("*.orbax-checkpoint-tmp*"))
            if not unfinished:
                return
            for folder in unfinished:
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.1)

    def latest_step(self) -> int | None:
        """Returns the newest step, whether or not its checkpoint is damaged."""
        return self._manager.latest_step()

    def restore(self, abstract: TrainState) -> TrainState:
        """Restores the newest valid checkpoint, skipping damaged ones with a warning.

        Damaged checkpoints are renamed to `damaged_<step>`, so that their steps can be saved again.

        Args:
          abstract: shapes, dtypes and shardings of the state. Arrays without a sharding are
            replicated over the current mesh.

        Raises:
          ConfigError: the checkpoint's configuration differs in more than `RUNTIME_FIELDS`, or the
            run was trained on other data.
          CheckpointError: no checkpoint can be read, or its arrays do not match `abstract`.
        """
        wanted = _named(abstract)

        def read(step: int) -> tuple[int, TrainState]:
            metadata = _read_metadata(manager, step)
            _check_step(metadata, step)
            check_config(metadata["config"], self._config)
            check_data(metadata.get("data"), self._data)
            _check_arrays(metadata["arrays"], wanted)
            arrays = _read_arrays(manager, step, wanted, metadata["checksums"])
            state = _from_named(abstract, arrays)
            _check_step({"step": int(state.step)}, step)  # old metadata has no step
            return step, state

        with _open_to_read(self._directory) as manager:
            step, state = _read_newest(manager, read)
        self._rename_damaged(after=step)
        return state

    def _rename_damaged(self, *, after: int) -> None:
        """Renames the checkpoints of later steps, which are damaged."""
        if jax.process_index() == 0:
            for step in self._manager.all_steps():
                if step > after:
                    renamed = self._directory / f"damaged_{step}"
                    shutil.rmtree(renamed, ignore_errors=True)
                    (self._directory / str(step)).rename(renamed)
        ocp.multihost.sync_global_processes("umv2_checkpoints_set_aside")
        self._manager.reload()


def saved_config(directory: Path) -> dict[str, Any]:
    """Returns the configuration of the newest checkpoint with readable metadata, as nested dicts.

    Raises:
      CheckpointError: there is none.
    """
    return _saved_metadata(directory)["config"]


def saved_data(directory: Path) -> dict[str, Any] | None:
    """Returns the `corpus.Identity` of the run's training data, as a dict; None if unknown.

    Raises:
      CheckpointError: there is no checkpoint with readable metadata.
    """
    return _saved_metadata(directory).get("data")


def _saved_metadata(directory: Path) -> dict[str, Any]:
    def read(step: int) -> dict[str, Any]:
        metadata = _read_metadata(manager, step)
        _check_step(metadata, step)
        return metadata

    with _open_to_read(directory) as manager:
        return _read_newest(manager, read)


def restore_for_inference(directory: Path, config: Config) -> Restored:
    """Restores the weights of the newest valid checkpoint, without reading the optimizer state.

    Raises:
      CheckpointError: no checkpoint can be read, or it does not match the model configuration.
    """
    abstract = abstract_weights(config)
    wanted = abstract.named()

    def read(step: int) -> Restored:
        metadata = _read_metadata(manager, step)
        _check_step(metadata, step)
        saved = metadata["arrays"].items()
        parts = {field.name for field in dataclasses.fields(Weights)}
        _check_arrays({k: v for k, v in saved if k.partition("/")[0] in parts}, wanted)
        arrays = _read_arrays(manager, step, wanted, metadata["checksums"])
        return Restored(step=step, weights=_from_named(abstract, arrays))

    with _open_to_read(directory) as manager:
        return _read_newest(manager, read)


def essential_differences(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    runtime_fields: Sequence[str] = RUNTIME_FIELDS,
) -> list[str]:
    """Lists 'path: saved -> current' for the differing fields that match no runtime pattern.

    A field that did not exist when the configuration was saved counts as having its default.
    """
    return [
        line
        for line in differing_fields(config_files.completed(saved, current), current)
        if not any(fnmatch.fnmatchcase(line.partition(":")[0], field) for field in runtime_fields)
    ]


def check_config(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    runtime_fields: Sequence[str] = RUNTIME_FIELDS,
) -> None:
    """Checks that a run with the configuration `current` may resume a checkpoint.

    Raises:
      ConfigError: the configurations differ in fields that match no runtime pattern; the message
        has one line per field.
    """
    if differences := essential_differences(saved, current, runtime_fields):
        raise ConfigError(
            "the checkpoint has a different configuration (saved -> given):\n  "
            + "\n  ".join(differences)
        )


def check_data(saved: Mapping[str, Any] | None, current: Mapping[str, Any] | None) -> None:
    """Checks that a run resumes on the data that it was trained on; None is unknown data.

    Raises:
      ConfigError: the tokenizer or the documents differ.
    """
    if saved is None or current is None:
        return
    check_tokenizer(saved, current["tokenizer"])
    if saved["documents"] != current["documents"]:
        raise ConfigError(
            "data: the documents are not those that the run was trained on"
            f" ({_summary(saved)}; now {_summary(current)}); restore them, or start a new run in"
            " another --workdir"
        )


def check_tokenizer(saved: Mapping[str, Any] | None, fingerprint: str) -> None:
    """Checks that a tokenizer has the same content as the one that a run was trained with.

    Raises:
      ConfigError: the contents differ.
    """
    if saved is not None and saved["tokenizer"] and fingerprint != saved["tokenizer"]:
        raise ConfigError(
            "data.tokenizer: its content differs from the tokenizer that the run was trained with;"
            " restore the file, or start a new run in another --workdir"
        )


def _summary(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in data["description"].items())


def check_name(directory: Path) -> None:
    """Rejects paths that orbax would interpret as glob patterns.

    Raises:
      FileError: the absolute path has one of the characters * ? [ ] or a backslash.
    """
    if invalid := sorted(set(str(directory.absolute())) & set("*?[]\\")):
        raise files.FileError(
            f"{directory.absolute()}: the path of a run must not contain {' '.join(invalid)}"
        )


def _open(directory: Path, **options: Any) -> ocp.CheckpointManager:
    for logger in (logging.get_absl_logger(), std_logging.getLogger("asyncio")):
        logger.addFilter(_is_not_from_orbax)  # adding a filter again has no effect
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(**options),
        item_handlers={
            # Trained weights compress by only 8 %, and compression would take most of the time.
            "state": ocp.PyTreeCheckpointHandler(use_compression=False),
            "metadata": ocp.JsonCheckpointHandler(),
        },
    )


def _open_to_read(directory: Path) -> ocp.CheckpointManager:
    def check() -> None:
        check_name(directory)
        if not directory.is_dir():
            raise CheckpointError(f"there is no checkpoint: {directory} does not exist")

    distributed.on_all_processes(check)
    # Each process reads independently: orbax's barriers would wait for a process that failed.
    options = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    return _open(
        directory.absolute(), create=False, read_only=True, multiprocessing_options=options
    )


def _is_not_from_orbax(record: std_logging.LogRecord) -> bool:
    """Filters out the log of orbax, which also raises its errors; they are reported here."""
    text = record.pathname + record.getMessage()
    return "orbax" not in text and "exception was never retrieved" not in text


@contextlib.contextmanager
def _silence_abandoned_work() -> Iterator[list[str]]:
    """Silences the tasks that orbax abandons when a read or write fails; only its error is raised.

    Yields a list to which the caller appends failures.
    """
    hook, failures = sys.unraisablehook, list[str]()
    sys.unraisablehook = lambda _: None
    try:
        yield failures
    finally:
        if failures:  # abandoned tasks warn when they are garbage-collected, so do that here
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
                gc.collect()
        sys.unraisablehook = hook


def _read_newest[T](manager: ocp.CheckpointManager, read: Callable[[int], T]) -> T:
    """Returns `read(step)` for the newest checkpoint that is not damaged."""
    with _silence_abandoned_work() as faults:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                return read(step)
            except (ConfigError, CheckpointError):
                raise
            except Exception as error:  # orbax, tensorstore and json raise many types
                path = manager.directory / str(step)
                faults.append(f"{path} ({type(error).__name__}: {_reason(error)})")
                if _is_transient(error):
                    raise CheckpointError(
                        f"{path}: cannot be read now, but may be valid: {_reason(error)}"
                    ) from error
                logging.warning("skipping a damaged checkpoint: %s", faults[-1])
    if faults:
        raise CheckpointError(f"no checkpoint can be read: {'; '.join(faults)}")
    raise CheckpointError(f"there is no checkpoint in {manager.directory}")


def _read_metadata(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
    return distributed.on_all_processes(lambda: manager.restore(step, args=args).metadata)


def _read_arrays(
    manager: ocp.CheckpointManager,
    step: int,
    wanted: Mapping[str, Any],
    checksums: Mapping[str, int],
) -> dict[str, Array]:
    """Reads only the wanted arrays, and verifies their checksums."""
    arrays = _restore_arrays(manager, step, wanted)
    changed = [
        name
        for name, checksum in jax.device_get(_checksums(arrays)).items()
        if checksum != checksums[name]
    ]
    if changed:
        raise ValueError(f"checksum mismatch: {', '.join(changed)}")
    return arrays


def _restore_arrays(
    manager: ocp.CheckpointManager, step: int, wanted: Mapping[str, Any]
) -> dict[str, Array]:
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))
        for name, leaf in wanted.items()
    }
    state_args = ocp.args.PyTreeRestore(
        abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    args = ocp.args.Composite(state=state_args)
    return distributed.on_all_processes(lambda: manager.restore(step, args=args).state)


def _check_step(metadata: Mapping[str, Any], step: int) -> None:
    """Raises ValueError if the checkpoint's folder was renamed."""
    if (saved := metadata.get("step", step)) != step:
        raise ValueError(f"the folder of step {step} contains step {saved}: it was renamed")


# Status codes in messages of tensorstore and jax that correspond to `files.TRANSIENT_ERRNOS`.
_TRANSIENT_STATUS = re.compile(
    r"^(RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b"
)
_OS_ERROR_CODE = re.compile(r"os_error_code='(\d+)'")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and the chain of its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = _OS_ERROR_CODE.search(str(error))
    return int(match[1]) if match else None


def _is_transient(error: BaseException) -> bool:
    """Returns whether an error comes from the state of the machine, not from the checkpoint."""
    return any(
        isinstance(cause, MemoryError)
        or _errno(cause) in files.TRANSIENT_ERRNOS
        or _TRANSIENT_STATUS.match(str(cause))
        for cause in _causes(error)
    )


def _reason(error: BaseException) -> str:
    """Returns the reason for a failed read or write, on one line."""
    for cause in _causes(error):
        if number := _errno(cause):
            return os.strerror(number)
    return (str(error).splitlines() or [""])[0][:300]


def _sharding(leaf: Any) -> Sharding:
    """Returns the sharding of an abstract array on the devices of the current mesh."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, getattr(leaf.sharding, "spec", PartitionSpec()))


@jax.jit
def _checksums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    """Returns a checksum of each array that does not depend on its sharding.

    The words of an array are hashed and summed modulo 2^32; without the hash, two flipped sign bits
    would cancel. Stored chunks have no checksums of their own, and missing ones read as zeros.
    """

    def checksum(array: Array) -> Array:
        word = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
        bits = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
        return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)

    return {name: checksum(array) for name, array in arrays.items()}


def _check_arrays(saved: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any]) -> None:
    expected = {name: _describe(leaf) for name, leaf in wanted.items()}
    differences = differing_fields(
        {name: f"{array['dtype']}{array['shape']}" for name, array in saved.items()},
        {name: f"{array['dtype']}{array['shape']}" for name, array in expected.items()},
    )
    if differences:
        raise CheckpointError(
            "the checkpoint does not match the model (saved -> expected):\n  "
            + "\n  ".join(differences)
        )


def _describe(array: Any) -> dict[str, Any]:
    return {"dtype": str(array.dtype), "shape": list(array.shape)}


def _named(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path name, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _from_named(abstract: Any, arrays: Mapping[str, Array]) -> Any:
    """Rebuilds a tree from its named leaves; the inverse of `_named`."""
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[n] for n in _named(abstract)])
