import contextlib
import dataclasses
import errno
import io
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from configs import base
from umv2 import files
from umv2.config import Config, ConfigError, differing_fields, from_config_dict, to_dict
from umv2.model.memory.store import ValueStore
from umv2.model.parameter import Declaration
from umv2.training import checkpoint, optim, state
from umv2.training.table_gradient import Dense

CONFIG = {"seed": 0, "train": {"num_steps": 10, "log_interval_steps": 5}}


def make_state(step: int, *, dense: bool = False) -> state.TrainState:
    """Returns a small state with arbitrary shapes and every kind of leaf that a real one has.

    Arrays are large enough to dominate the files over the metadata.
    """
    random = np.random.default_rng(step)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    params = {"embedding": draw(512, 8), "final_norm": {"weight": draw(8)}}
    store = None if dense else ValueStore(values=draw(1024, 4), pre_values=draw(1024, 2))
    declared = {
        "params/embedding": Declaration(("vocabulary", "hidden"), "embeddings", "compute"),
        "params/final_norm/weight": Declaration((None,), "norms", "float32"),
    }
    optimizer = optim.Optimizer(from_config_dict(base.get_config()).optimizer, 100, declared)
    opt_state = optimizer.init(params, store)
    gradients = jax.tree.map(jnp.sin, (params, store))
    opt_state = optimizer.update(gradients[0], Dense(gradients[1]), opt_state, params, store)[2]
    train_state = state.TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        store=store,
        buffers={"memory": {"shuffle": jnp.asarray(random.permutation(16), jnp.int32)}},
        optimizer=opt_state,
        usage={}
        if dense
        else {"memory": jnp.asarray(random.integers(0, 2**31 - 1, (1, 1024)), jnp.int32)},
    )
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(train_state)  # no memory of numpy's


def open_checkpoints(
    directory: Path, *, keep: int = 3, config: dict[str, Any] = CONFIG
) -> checkpoint.Checkpointer:
    return checkpoint.Checkpointer(directory, keep=keep, config=config)


def assert_same_bits(left: Any, right: Any) -> None:
    lefts, rights = (jax.tree_util.tree_leaves_with_path(tree) for tree in (left, right))
    for (left_path, a), (right_path, b) in zip(lefts, rights, strict=True):
        assert (left_path, a.dtype, a.shape) == (right_path, b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def data_file(directory: Path) -> Path:
    """Returns the file with the arrays."""
    return max(files_of(directory / "state"), key=lambda path: path.stat().st_size)


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    with open_checkpoints(directory) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step))
    return directory


@pytest.fixture
def two(two_saved: Path, tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2, to damage."""
    return Path(shutil.copytree(two_saved, tmp_path / "checkpoints"))


@pytest.mark.parametrize("dense", [False, True])
def test_a_round_trip_keeps_every_bit(tmp_path: Path, dense: bool) -> None:
    saved = make_state(7, dense=dense)
    odd = jnp.asarray([np.nan, -0.0, np.inf, 1e-45, -np.nan, 0, 0, 0], jnp.float32)
    saved.params["final_norm"]["weight"] = odd
    with open_checkpoints(tmp_path) as checkpointer:
        checkpointer.save(7, saved)
        checkpointer.wait()
        assert checkpointer.latest_step() == 7
    with open_checkpoints(tmp_path) as checkpointer:
        restored = checkpointer.restore(make_state(0, dense=dense))
    assert_same_bits(restored, saved)


def test_the_state_may_be_donated_after_save(tmp_path: Path) -> None:
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    donated, live, expected = make_state(1), make_state(1), make_state(1)
    spoil(donated)  # compiled here, so that the next call runs during the save
    assert donated.params["embedding"].is_deleted()
    with open_checkpoints(tmp_path) as checkpointer:
        checkpointer.save(1, live)
        # XLA copies buffers that the save still reads, instead of overwriting them.
        spoiled = jax.block_until_ready(spoil(live))
        checkpointer.wait()
        assert not np.array_equal(spoiled.params["embedding"], expected.params["embedding"])
        assert_same_bits(checkpointer.restore(expected), expected)


def test_arrays_are_restored_sharded_over_the_mesh(tmp_path: Path) -> None:
    saved = make_state(3)
    mesh = jax.make_mesh((8,), ("replica",), axis_types=(AxisType.Explicit,))
    with open_checkpoints(tmp_path) as checkpointer:
        checkpointer.save(3, saved)
        checkpointer.wait()
        with jax.set_mesh(mesh):
            sharded = jax.device_put(saved.store, PartitionSpec("replica"))
            restored = checkpointer.restore(dataclasses.replace(saved, store=sharded))
    assert restored.store is not None
    assert restored.store.values.addressable_shards[0].data.shape == (128, 4)
    assert restored.params["embedding"].sharding.is_fully_replicated
    assert restored.params["embedding"].sharding.num_devices == 8
    assert_same_bits(restored, saved)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    with open_checkpoints(tmp_path, keep=2) as checkpointer:
        for step in (5, 10, 15, 20):
            checkpointer.save(step, make_state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["15", "20"]


def test_metadata_contains_config_and_versions(two: Path) -> None:
    (path,) = (two / "2" / "metadata").glob("metadata")
    metadata = json.loads(path.read_text())
    assert metadata["config"] == CONFIG
    assert metadata["versions"]["jax"] == jax.__version__
    assert metadata["num_processes"] == 1
    assert metadata["arrays"]["store/values"] == {"dtype": "float32", "shape": [1024, 4]}


@pytest.mark.parametrize("damage", [delete, truncate, overwrite, flip_a_bit])
def test_a_newest_checkpoint_with_damaged_arrays_is_skipped(
    two: Path,
    damage: Callable[[Path], None],
    log: io.StringIO,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(data_file(two / "2"))
    with open_checkpoints(two) as checkpointer:
        assert_same_bits(checkpointer.restore(make_state(0)), make_state(1))
    assert f"skipping a damaged checkpoint: {two / '2'} (" in log.getvalue()
    assert len(log.getvalue().splitlines()) == 1
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("damage", [delete, truncate, overwrite])
def test_a_newest_checkpoint_with_damaged_metadata_is_skipped(
    two: Path, damage: Callable[[Path], None], log: io.StringIO
) -> None:
    damage(two / "2" / "metadata" / "metadata")
    with open_checkpoints(two) as checkpointer:
        assert_same_bits(checkpointer.restore(make_state(0)), make_state(1))
    assert f"skipping a damaged checkpoint: {two / '2'} (" in log.getvalue()
    assert checkpoint.saved_config(two) == CONFIG


@pytest.mark.slow
def test_damage_to_any_file_never_yields_wrong_numbers(two_saved: Path, tmp_path: Path) -> None:
    states = {step: make_state(step) for step in (1, 2)}
    restored_steps = []
    for number, file in enumerate(files_of(two_saved / "2")):
        for damage in (delete, truncate, overwrite):
            folder = tmp_path / f"{damage.__name__}_{number}"
            shutil.copytree(two_saved, folder)
            damage(folder / file.relative_to(two_saved))
            with open_checkpoints(folder) as checkpointer:
                restored = checkpointer.restore(states[1])
            assert_same_bits(restored, states[int(restored.step)])
            restored_steps.append(int(restored.step))
            shutil.rmtree(folder)
    assert {1} <= set(restored_steps) <= {1, 2}


def test_the_run_can_save_the_damaged_step_again(two: Path) -> None:
    overwrite(data_file(two / "2"))
    with open_checkpoints(two) as checkpointer:
        checkpointer.restore(make_state(0))
        assert checkpointer.latest_step() == 1
        checkpointer.save(2, make_state(2))
    assert sorted(path.name for path in two.iterdir()) == ["1", "2", "damaged_2"]
    with open_checkpoints(two) as checkpointer:
        assert_same_bits(checkpointer.restore(make_state(0)), make_state(2))


def test_no_readable_checkpoint_is_an_error_that_names_the_folder(two: Path) -> None:
    for step in ("1", "2"):
        overwrite(data_file(two / step))
    with (
        open_checkpoints(two) as checkpointer,
        pytest.raises(checkpoint.CheckpointError, match="no checkpoint can be read") as error,
    ):
        checkpointer.restore(make_state(0))
    assert str(two / "1") in str(error.value)
    assert str(two / "2") in str(error.value)


def test_an_empty_or_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with (
        open_checkpoints(tmp_path) as checkpointer,
        pytest.raises(checkpoint.CheckpointError, match=f"there is no checkpoint in {tmp_path}"),
    ):
        checkpointer.restore(make_state(0))
    with pytest.raises(checkpoint.CheckpointError, match="none does not exist"):
        checkpoint.saved_config(tmp_path / "none")


def test_leftovers_of_a_killed_save_are_ignored_and_removed(two: Path) -> None:
    # Orbax writes to a folder with this name, and renames it when complete.
    unfinished = two / "3.orbax-checkpoint-tmp"
    shutil.copytree(two / "2", unfinished)
    delete(data_file(unfinished))
    assert checkpoint.saved_config(two) == CONFIG
    with open_checkpoints(two) as checkpointer:
        assert checkpointer.latest_step() == 2
        assert_same_bits(checkpointer.restore(make_state(0)), make_state(2))
        checkpointer.save(3, make_state(3))
    assert sorted(path.name for path in two.iterdir()) == ["1", "2", "3"]


def save_as(directory: Path, step: int, name: str) -> None:
    (directory / str(step)).rename(directory / name)


@pytest.mark.parametrize("name", ["5", "0"])
def test_a_renamed_folder_is_skipped_by_every_reader(
    two: Path, log: io.StringIO, name: str
) -> None:
    save_as(two, 2, name)
    assert checkpoint.saved_config(two) == CONFIG
    with open_checkpoints(two) as checkpointer:
        assert_same_bits(checkpointer.restore(make_state(0)), make_state(1))
        checkpointer.save(2, make_state(2))  # the name is free
    later = int(name) > 1
    assert (f"the folder of step {name} contains step 2" in log.getvalue()) == later
    assert (two / f"damaged_{name}").exists() == later


def test_a_renamed_folder_from_before_its_metadata_named_the_step(two: Path) -> None:
    path = two / "2" / "metadata" / "metadata"
    metadata = json.loads(path.read_text())
    del metadata["step"]
    path.write_text(json.dumps(metadata))
    save_as(two, 2, "5")
    with open_checkpoints(two) as checkpointer:
        assert_same_bits(checkpointer.restore(make_state(0)), make_state(1))


@pytest.mark.slow(fast=["error0-Too many open files"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (MemoryError("no 3 GB"), "no 3 GB"),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "Out of memory"),
        (ValueError("INTERNAL: read failed [os_error_code='24']"), "Too many open files"),
    ],
)
def test_a_transient_failure_does_not_mark_a_checkpoint_as_damaged(
    two: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    with open_checkpoints(two) as checkpointer:
        with monkeypatch.context() as patched:

            def fail(*_: Any, **__: Any) -> None:
                raise error

            patched.setattr(checkpoint, "_restore_arrays", fail)
            with pytest.raises(checkpoint.CheckpointError) as caught:
                checkpointer.restore(make_state(0))
        assert str(caught.value).startswith(f"{two / '2'}: cannot be read now, but may be valid: ")
        assert reason in str(caught.value)
        assert_same_bits(checkpointer.restore(make_state(0)), make_state(2))


@contextlib.contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """Makes the system reject longer writes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_save_does_not_affect_the_next_one(
    two: Path, log: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    with open_checkpoints(two) as checkpointer:
        with no_file_larger_than(1000):
            checkpointer.save(3, make_state(3))
            with pytest.raises(checkpoint.CheckpointError, match=r"File too large; .* of step 2$"):
                checkpointer.wait()
        checkpointer.save(4, make_state(4))
    assert sorted(path.name for path in two.iterdir()) == ["1", "2", "4"]
    with open_checkpoints(two) as checkpointer:
        assert_same_bits(checkpointer.restore(make_state(0)), make_state(4))
    (line,) = log.getvalue().splitlines()
    assert line.endswith("step 3 could not be saved: File too large; the next save will try again")
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_whose_last_save_failed_fails(two: Path) -> None:
    with (
        pytest.raises(checkpoint.CheckpointError, match="step 3 could not be saved: File too"),
        open_checkpoints(two) as checkpointer,
        no_file_larger_than(1000),
    ):
        checkpointer.save(3, make_state(3))
        checkpointer._settle()


def test_a_saved_checkpoint_is_verified(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoints(two) as checkpointer:
        finish = checkpointer._manager.wait_until_finished

        def finish_and_damage() -> None:
            finish()
            for path in (two / "3" / "state").rglob("manifest.ocdbt"):
                delete(path)

        monkeypatch.setattr(checkpointer._manager, "wait_until_finished", finish_and_damage)
        checkpointer.save(3, make_state(3))
        with pytest.raises(checkpoint.CheckpointError, match="3: was saved, but cannot be read"):
            checkpointer.wait()


@pytest.mark.parametrize("name", ["a[b]", "a*b", "a?", "[!x]", "a\\b"])
def test_a_name_with_glob_characters_is_rejected(tmp_path: Path, name: str) -> None:
    for attempt in (open_checkpoints, checkpoint.saved_config):
        with pytest.raises(files.FileError, match="the path of a run must not contain"):
            attempt(tmp_path / name / "checkpoints")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a b", "a#b", "a:b", "ü", "a{b}", "-a", "a%20b", "5", "a'b"])
def test_other_names_round_trip(tmp_path: Path, name: str) -> None:
    with open_checkpoints(tmp_path / name / "checkpoints") as checkpointer:
        checkpointer.save(1, make_state(1))
    with open_checkpoints(tmp_path / name / "checkpoints") as checkpointer:
        assert_same_bits(checkpointer.restore(make_state(0)), make_state(1))


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(files.FileError, match=f"{tmp_path / 'file'}.*: "):
        open_checkpoints(tmp_path / "file" / "checkpoints")


DATA = {
    "tokenizer": "bytes",
    "documents": "d1",
    "held_out": "h1",
    "description": {"documents": 40, "tokens": 1000},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "other"}, "data.tokenizer: its content differs from the tokenizer"),
        ({"documents": "d2", "description": {"documents": 41}}, "documents 40, .*documents 41"),
    ],
)
def test_a_run_resumes_only_with_its_own_data(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    def open_with(data: dict[str, Any] | None) -> checkpoint.Checkpointer:
        return checkpoint.Checkpointer(tmp_path, keep=3, config=CONFIG, data=data)

    with open_with(DATA) as checkpointer:
        checkpointer.save(1, make_state(1))
    assert checkpoint.saved_data(tmp_path) == DATA
    for data in (DATA, None):
        with open_with(data) as checkpointer:
            checkpointer.restore(make_state(0))
    with (
        pytest.raises(ConfigError, match=message),
        open_with(DATA | change) as checkpointer,
    ):
        checkpointer.restore(make_state(0))
    assert (tmp_path / "1").exists()


def test_a_step_is_not_saved_after_a_later_one(two: Path) -> None:
    with (
        open_checkpoints(two) as checkpointer,
        pytest.raises(checkpoint.CheckpointError, match="step 2 cannot follow step 2"),
    ):
        checkpointer.save(2, make_state(2))


def test_another_shape_or_tree_is_reported(two: Path) -> None:
    other = make_state(0)
    other.params["embedding"] = jnp.zeros((512, 9))
    del other.params["final_norm"]
    with open_checkpoints(two) as checkpointer, pytest.raises(checkpoint.CheckpointError) as error:
        checkpointer.restore(other)
    assert "params/embedding: 'float32[512, 8]' -> 'float32[512, 9]'" in str(error.value)
    assert "params/final_norm/weight: 'float32[8]' -> '(absent)'" in str(error.value)
    assert len(str(error.value).splitlines()) == 3


def test_another_configuration_is_rejected_and_not_called_damage(two: Path) -> None:
    config = {"seed": 1, "train": {"num_steps": 10, "log_interval_steps": 7}}
    with (
        open_checkpoints(two, config=config) as checkpointer,
        pytest.raises(ConfigError) as error,
    ):
        checkpointer.restore(make_state(0))
    assert str(error.value).splitlines() == [
        "the checkpoint has a different configuration (saved -> given):",
        "  seed: 0 -> 1",
    ]


def test_runtime_fields_may_differ() -> None:
    saved = to_dict(from_config_dict(base.get_config()))
    config = base.get_config()
    config.train.log_interval_steps = 1
    config.train.tensorboard = False
    config.evaluation.batch_size = 2
    config.generate.seed = 5
    config.mesh.replica = 1
    config.data.num_workers = 3
    config.model.scan_layers = False
    config.model.remat = "full"
    config.model.memory.chunk_tokens = 32
    config.model.memory.product_key_top_k = "xla"
    config.model.memory.value_aggregation = "xla"
    current = to_dict(from_config_dict(config))
    assert len(differing_fields(saved, current)) == 11
    checkpoint.check_config(saved, current)


def test_a_field_newer_than_the_run_has_its_default() -> None:
    saved = to_dict(from_config_dict(base.get_config()))
    current = to_dict(from_config_dict(base.get_config()))
    del saved["model"]["rope_scale"], saved["loss"]
    checkpoint.check_config(saved, current)
    current["model"]["rope_scale"] = 2.0
    with pytest.raises(ConfigError, match=r"model\.rope_scale: 1\.0 -> 2\.0"):
        checkpoint.check_config(saved, current)


def test_every_other_difference_is_one_line() -> None:
    saved = to_dict(from_config_dict(base.get_config()))
    config = base.get_config()
    config.model.memory.top_m = 8
    config.optimizer.learning_rate = 1e-3
    config.train.log_interval_steps = 1
    current = to_dict(from_config_dict(config))
    with pytest.raises(ConfigError) as error:
        checkpoint.check_config(saved, current)
    assert str(error.value).splitlines()[1:] == [
        "  model.memory.top_m: 16 -> 8",
        "  optimizer.learning_rate: 0.0004 -> 0.001",
    ]


def test_runtime_fields_are_fields() -> None:
    config = to_dict(from_config_dict(base.get_config()))
    for field in checkpoint.RUNTIME_FIELDS:
        section: Any = config
        for name in field.removesuffix(".*").split("."):
            section = section[name]


def test_orbax_is_quiet(tmp_path: Path, log: io.StringIO) -> None:
    with open_checkpoints(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1))
        checkpointer.wait()
        checkpointer.restore(make_state(1))
    assert log.getvalue() == ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, Any]:
    """A checkpoint of an actual model: its folder, configuration and state."""
    config_dict = base.get_config()
    config_dict.model.update(hidden_size=16, num_layers=1, num_heads=2, num_key_value_heads=2)
    config_dict.model.update(ffn_size=16, vocab_size=16)
    config_dict.model.memory.update(num_keys=8, key_dim=8, top_m=4, shortlist=4, value_dim=8)
    config = from_config_dict(config_dict)
    random = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(random.integers(0, 100, leaf.shape), leaf.dtype)

    # Compiling the initialisation would take longer than the tests.
    saved = jax.tree.map(fill, state.abstract_state(config))
    directory = tmp_path_factory.mktemp("trained")
    with open_checkpoints(directory, config=to_dict(config)) as checkpointer:
        checkpointer.save(4, saved)
    return directory, config, saved


def test_a_model_is_restored_without_its_optimizer(
    trained: tuple[Path, Config, Any],
) -> None:
    directory, config, saved = trained
    assert from_config_dict(checkpoint.saved_config(directory)) == config
    restored = checkpoint.restore_for_inference(directory, config)
    assert restored.step == 4
    assert_same_bits(restored.weights, saved.weights)


def test_reading_a_run_changes_nothing_in_its_folder(
    trained: tuple[Path, Config, Any], tmp_path: Path
) -> None:
    directory, config, _ = trained
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    shutil.copytree(copy / "4", copy / "5")
    for file in files_of(copy / "5" / "state"):  # the largest may contain only the optimizer
        overwrite(file)
    (copy / "6.orbax-checkpoint-tmp").mkdir()
    before = sorted(copy.rglob("*"))
    assert checkpoint.restore_for_inference(copy, config).step == 4
    assert sorted(copy.rglob("*")) == before


def test_a_model_of_another_size_is_rejected(trained: tuple[Path, Config, Any]) -> None:
    directory, config, _ = trained
    model = dataclasses.replace(config.model, ffn_size=24)
    with pytest.raises(checkpoint.CheckpointError, match=r"blocks/ffn/up: 'float32\[1, 16, 16\]'"):
        checkpoint.restore_for_inference(directory, dataclasses.replace(config, model=model))
