"""Checkpoints: complete or invisible, checked bit by bit when read, with their configuration.

A checkpoint is a folder named after its step. `state` holds every array of the train state under
its name ("params/blocks/ffn/up"); `metadata` holds the step, the configuration, what the run was
trained on, package versions, the number of processes, and the shape, dtype and checksum of every
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

# What may change when a run goes on: how the same numbers are computed, shown and kept.
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
    """There is no checkpoint that can be read, or it is one of another model."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A trained model, without what only training needs."""

    step: int
    weights: Weights


class Checkpointer:
    """Saves the train state in the background, and restores the newest good one.

    A checkpoint appears under its name once it is complete; what a killed process left unfinished
    is removed. The `keep` newest are kept. What was saved is opened again before the next save. A
    save that the disk refuses is given up with a warning, and the next one tries again. Use it as
    a context: leaving it waits for the disk.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        config: dict[str, Any],
        data: Mapping[str, Any] | None = None,
    ):
        """Makes the folder.

        Args:
          directory: of the checkpoints of one run.
          keep: how many to keep.
          config: of the run, as nested dicts.
          data: `pipeline.Identity` of what it is trained on, as a dict; None: not known.

        Raises:
          FileError: a folder that cannot be made, or whose name checkpoints cannot have.
          CheckpointError: the processes of the run do not share it.
        """
        check_name(directory)
        self._directory, self._config, self._data = directory.absolute(), config, data
        self._saving: int | None = None  # the step whose save has begun and is not yet checked
        self._failed: str | None = None  # why the last save was given up
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
        """Leaves out the writes of a failed save that end when orbax waits for them no more."""
        if str(raised.exc_value) != "Event loop is closed":
            self._hook(raised)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._settle()
        finally:
            self._manager.close()
            sys.unraisablehook = self._hook
        if kind is None:
            self._require_saved()

    def save(self, step: int, state: TrainState) -> None:
        """Begins to save; returns as soon as the state may be donated.

        Raises:
          CheckpointError: there is a checkpoint of this step or a later one, or the last one that
            was saved cannot be read.
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
        except Exception as error:  # orbax and tensorstore raise all kinds
            self._give_up(step, error)
            return
        if not started:
            raise CheckpointError(
                f"step {step} cannot follow step {self.latest_step()} in {self._directory}"
            )
        self._saving = step

    def wait(self) -> None:
        """Returns when what was saved last is on disk and can be read.

        Raises:
          CheckpointError: it is not; the message says why, and which one is the newest.
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
        """Waits for the save that has begun, if any, and opens what it wrote."""
        step, self._saving = self._saving, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax and tensorstore raise all kinds
            self._give_up(step, error)
            return
        self._failed = None
        with _open_to_read(self._directory) as manager, _without_abandoned_work() as failures:
            try:
                _check_step(_read_metadata(manager, step), step)
                _restore_arrays(manager, step, {"step": jax.ShapeDtypeStruct((), jnp.int32)})
            except Exception as error:  # orbax and tensorstore raise all kinds
                failures.append(why := _reason(error))
                if _is_passing(error):
                    logging.warning("step %d is saved, but not checked: %s", step, why)
                    return
                raise CheckpointError(
                    f"{self._directory / str(step)}: was saved, but cannot be read: {why}"
                ) from error

    def _give_up(self, step: int, error: Exception) -> None:
        """Forgets a save that failed for a reason that may pass, and removes what it left.

        Raises:
          Exception: `error`, where its reason is another.
        """
        if not _is_passing(error):
            raise error
        self._failed = f"step {step} could not be saved: {_reason(error)}"
        logging.warning("%s; the next save tries again", self._failed)
        with _without_abandoned_work() as failures:
            failures.append(self._failed)
            if jax.process_index() == 0:
                self._remove_unfinished()
            self._manager.reload()

    def _remove_unfinished(self) -> None:
        for _ in range(10):  # a write that nobody waits for any more may still add a file
            found = list(self._directory.glob("*.orbax-checkpoint-tmp*"))
            if not found:
                return
            for folder in found:
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.1)

    def latest_step(self) -> int | None:
        """Returns the newest step, be its checkpoint good or damaged."""
        return self._manager.latest_step()

    def restore(self, abstract: TrainState) -> TrainState:
        """Returns the newest good checkpoint; damaged ones are skipped with a warning.

        The skipped are renamed to `damaged_<step>`, so that the run can save their steps again.

        Args:
          abstract: shapes, dtypes and shardings. What has no sharding of its own is replicated
            over the mesh in use.

        Raises:
          ConfigError: the checkpoint's configuration differs in more than `RUNTIME_FIELDS`, or it
            was trained on other data.
          CheckpointError: none can be read, or its arrays are not those of `abstract`.
        """
        wanted = _named(abstract)

        def read(step: int) -> tuple[int, TrainState]:
            metadata = _read_metadata(manager, step)
            _check_step(metadata, step)
            check_config(metadata["config"], self._config)
            check_data(metadata.get("data"), self._data)
            _check_arrays(metadata["arrays"], wanted)
            arrays = _read_arrays(manager, step, wanted, metadata["checksums"])
            state = _unnamed(abstract, arrays)
            _check_step({"step": int(state.step)}, step)  # metadata of before named none
            return step, state

        with _open_to_read(self._directory) as manager:
            step, state = _newest(manager, read)
        self._set_aside_after(step)
        return state

    def _set_aside_after(self, step: int) -> None:
        if jax.process_index() == 0:
            for later in self._manager.all_steps():
                if later > step:
                    aside = self._directory / f"damaged_{later}"
                    shutil.rmtree(aside, ignore_errors=True)
                    (self._directory / str(later)).rename(aside)
        ocp.multihost.sync_global_processes("umv2_checkpoints_set_aside")
        self._manager.reload()


def saved_config(directory: Path) -> dict[str, Any]:
    """Returns the configuration, as nested dicts, of the newest checkpoint that can tell it.

    Raises:
      CheckpointError: there is none.
    """
    return _saved(directory)["config"]


def saved_data(directory: Path) -> dict[str, Any] | None:
    """Returns what the run was trained on, as `pipeline.Identity` has it; None: it is not known.

    Raises:
      CheckpointError: there is no checkpoint that can tell.
    """
    return _saved(directory).get("data")


def _saved(directory: Path) -> dict[str, Any]:
    def read(step: int) -> dict[str, Any]:
        metadata = _read_metadata(manager, step)
        _check_step(metadata, step)
        return metadata

    with _open_to_read(directory) as manager:
        return _newest(manager, read)


def restore_for_inference(directory: Path, config: Config) -> Restored:
    """Returns the model of the newest good checkpoint; the optimizer's arrays are not read.

    Raises:
      CheckpointError: none can be read, or it is not a model of this configuration.
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
        return Restored(step=step, weights=_unnamed(abstract, arrays))

    with _open_to_read(directory) as manager:
        return _newest(manager, read)


def essential_differences(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    runtime_fields: Sequence[str] = RUNTIME_FIELDS,
) -> list[str]:
    """Lists 'path: saved -> current' for the fields that differ and may not (patterns may).

    A field that is younger than what was saved had its default then.
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
    """Compares the configuration of a checkpoint with that of the run which is to continue it.

    Raises:
      ConfigError: they differ in more than the runtime fields (patterns); one line for each field.
    """
    if differences := essential_differences(saved, current, runtime_fields):
        raise ConfigError(
            "the checkpoint has another configuration (saved -> given):\n  "
            + "\n  ".join(differences)
        )


def check_data(saved: Mapping[str, Any] | None, current: Mapping[str, Any] | None) -> None:
    """Compares what a run was trained on with what it is to go on with; None is not known.

    Raises:
      ConfigError: the tokenizer or the documents are others.
    """
    if saved is None or current is None:
        return
    check_tokenizer(saved, current["tokenizer"])
    if saved["documents"] != current["documents"]:
        raise ConfigError(
            "data: the documents are not those that the run was trained on"
            f" ({_described(saved)}; now {_described(current)}); restore them, or start a run in"
            " another --workdir"
        )


def check_tokenizer(saved: Mapping[str, Any] | None, fingerprint: str) -> None:
    """Compares the tokenizer that a run was trained with with another, by their content.

    Raises:
      ConfigError: they differ.
    """
    if saved is not None and saved["tokenizer"] and fingerprint != saved["tokenizer"]:
        raise ConfigError(
            "data.tokenizer: its content is not that of the tokenizer that the run was trained"
            " with, whatever its path; restore the file, or start a run in another --workdir"
        )


def _described(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in data["description"].items())


def check_name(directory: Path) -> None:
    """Refuses folders that the checkpoint library would read as patterns of names.

    Raises:
      FileError: the absolute path has one of the characters * ? [ ] or a backslash.
    """
    if found := sorted(set(str(directory.absolute())) & set("*?[]\\")):
        raise files.FileError(
            f"{directory.absolute()}: the path of a run may not hold {' '.join(found)}"
        )


def _open(directory: Path, **options: Any) -> ocp.CheckpointManager:
    for logger in (logging.get_absl_logger(), std_logging.getLogger("asyncio")):
        logger.addFilter(_is_no_chatter)  # a logger keeps a filter once
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(**options),
        item_handlers={
            # Trained weights hardly compress (8 %), and trying to takes most of the time.
            "state": ocp.PyTreeCheckpointHandler(use_compression=False),
            "metadata": ocp.JsonCheckpointHandler(),
        },
    )


def _open_to_read(directory: Path) -> ocp.CheckpointManager:
    def check() -> None:
        check_name(directory)
        if not directory.is_dir():
            raise CheckpointError(f"there is no checkpoint: {directory} does not exist")

    distributed.everywhere(check)
    # Each process reads by itself: orbax's barriers would wait for one that cannot.
    itself = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    return _open(directory.absolute(), create=False, read_only=True, multiprocessing_options=itself)


def _is_no_chatter(record: std_logging.LogRecord) -> bool:
    """Keeps from the terminal what orbax says; what goes wrong it also raises, to be said here."""
    said = record.pathname + record.getMessage()
    return "orbax" not in said and "exception was never retrieved" not in said


@contextlib.contextmanager
def _without_abandoned_work() -> Iterator[list[str]]:
    """Keeps quiet what orbax abandons when a read or write fails, whose error alone it raises.

    Yields a list of the failures, for those within to add to.
    """
    hook, failures = sys.unraisablehook, list[str]()
    sys.unraisablehook = lambda _: None
    try:
        yield failures
    finally:
        if failures:  # what they abandoned speaks when it is collected, which takes a while
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
                gc.collect()
        sys.unraisablehook = hook


def _newest[T](manager: ocp.CheckpointManager, read: Callable[[int], T]) -> T:
    """Returns what `read` makes of the newest checkpoint that it does not find damaged."""
    with _without_abandoned_work() as faults:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                return read(step)
            except (ConfigError, CheckpointError):
                raise
            except Exception as error:  # orbax, tensorstore and json raise all kinds
                path = manager.directory / str(step)
                faults.append(f"{path} ({type(error).__name__}: {_reason(error)})")
                if _is_passing(error):
                    raise CheckpointError(
                        f"{path}: cannot be read now, and may be good: {_reason(error)}"
                    ) from error
                logging.warning("skipping a damaged checkpoint: %s", faults[-1])
    if faults:
        raise CheckpointError(f"no checkpoint can be read: {'; '.join(faults)}")
    raise CheckpointError(f"there is no checkpoint in {manager.directory}")


def _read_metadata(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
    return distributed.everywhere(lambda: manager.restore(step, args=args).metadata)


def _read_arrays(
    manager: ocp.CheckpointManager,
    step: int,
    wanted: Mapping[str, Any],
    checksums: Mapping[str, int],
) -> dict[str, Array]:
    """Reads the wanted arrays alone, and checks that they are what was saved."""
    arrays = _restore_arrays(manager, step, wanted)
    changed = [
        name
        for name, checksum in jax.device_get(_checksums(arrays)).items()
        if checksum != checksums[name]
    ]
    if changed:
        raise ValueError(f"not what was saved: {', '.join(changed)}")
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
    return distributed.everywhere(lambda: manager.restore(step, args=args).state)


def _check_step(metadata: Mapping[str, Any], step: int) -> None:
    """Raises ValueError for a folder that was renamed after it was saved."""
    if (saved := metadata.get("step", step)) != step:
        raise ValueError(f"the folder of step {step} holds step {saved}: it was renamed")


# What `files.PASSING_ERRNOS` are in the messages of tensorstore and of jax.
_PASSING_STATUS = re.compile(
    r"^(RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b"
)
_OS_ERROR_CODE = re.compile(r"os_error_code='(\d+)'")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR_CODE.search(str(error))
    return int(found[1]) if found else None


def _is_passing(error: BaseException) -> bool:
    """Tells whether an error is of the machine at this moment, not of what was read or written."""
    return any(
        isinstance(cause, MemoryError)
        or _errno(cause) in files.PASSING_ERRNOS
        or _PASSING_STATUS.match(str(cause))
        for cause in _causes(error)
    )


def _reason(error: BaseException) -> str:
    """Returns in one line why something could not be read or written."""
    for cause in _causes(error):
        if number := _errno(cause):
            return os.strerror(number)
    return (str(error).splitlines() or [""])[0][:300]


def _sharding(leaf: Any) -> Sharding:
    """The sharding of an abstract array, on the devices of the mesh in use."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, getattr(leaf.sharding, "spec", PartitionSpec()))


@jax.jit
def _checksums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    """Sums the mixed bits of each array modulo 2^32, so that order and sharding do not matter.

    What the disk returns has no checksum of its own, and a missing chunk reads as zeros. Without
    mixing, two flips of a sign bit would cancel.
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
            "the checkpoint is one of another model (saved -> expected):\n  "
            + "\n  ".join(differences)
        )


def _describe(array: Any) -> dict[str, Any]:
    return {"dtype": str(array.dtype), "shape": list(array.shape)}


def _named(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree under their paths, in the tree's order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unnamed(abstract: Any, arrays: Mapping[str, Array]) -> Any:
    """Returns the tree whose leaves `_named` took apart."""
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[n] for n in _named(abstract)])
