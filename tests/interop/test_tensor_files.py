import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from umv2 import files
from umv2.interop import tensor_files
from umv2.interop.tensor_files import InteropError, TensorFolder, write_folder

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 3, 4), "d": (), "e": (40,), "f": (0, 2)}


def drawn() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert (array.dtype, array.shape) == (right[name].dtype, right[name].shape), name
        assert array.tobytes() == right[name].tobytes(), name


def sharded(folder: Path) -> Path:
    write_folder(folder, {"kind": "test"}, drawn(), max_shard_bytes=100)
    return folder


def test_a_single_file_round_trips(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", {"kind": "test"}, drawn())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert tensor_files.read_json(tmp_path / "out" / "config.json") == {"kind": "test"}
    assert_same(dict(TensorFolder(tmp_path / "out")), drawn())
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), drawn())


def test_shards_respect_the_size_limit_and_the_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "out")
    assert_same(dict(TensorFolder(folder)), drawn())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    sizes = []
    for path in files:
        arrays = load_file(path)
        assert {name: path.name for name in arrays}.items() <= index["weight_map"].items()
        sizes.append(sum(array.nbytes for array in arrays.values()))
        assert sizes[-1] <= 100 or len(arrays) == 1  # a larger tensor gets its own shard
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
    assert max(sizes) > 100
    assert sum(sizes) == index["metadata"]["total_size"]


def test_at_most_one_shard_is_copied_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[int] = []

    def watch(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
        copies.append(sum(array.nbytes for array in tensors.values()))
        save_file(tensors, path, metadata)

    monkeypatch.setattr(tensor_files, "save_file", watch)
    matrices = {str(i): np.full((8, 16), i, np.float32).T for i in range(6)}
    write_folder(tmp_path / "out", {}, matrices, max_shard_bytes=1100)
    assert copies == [1024, 1024, 1024]
    assert_same(dict(TensorFolder(tmp_path / "out")), {k: v.copy() for k, v in matrices.items()})


def test_non_contiguous_views_are_written_in_row_major_order(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    write_folder(tmp_path / "out", {}, {"view": array[1].T})
    ((_, read),) = TensorFolder(tmp_path / "out")
    np.testing.assert_array_equal(read, array[1].T)


def test_bfloat16_is_rounded_when_written_and_read_unchanged(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", {}, drawn(), dtype="bfloat16")
    folder = TensorFolder(tmp_path / "out")
    assert set(folder.dtypes.values()) == {"bfloat16"}
    assert_same(dict(folder), {n: a.astype(jnp.bfloat16) for n, a in drawn().items()})


def test_a_folder_in_use_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InteropError, match="already exists"):
        write_folder(tmp_path, {}, drawn())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", {}, drawn())
    assert TensorFolder(tmp_path / "empty").shapes["a"] == (3, 4)


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


def test_files_and_folders_have_the_modes_of_the_umask(tmp_path: Path, umask: int) -> None:
    folder = sharded(tmp_path / "a" / "out")
    write_folder(tmp_path / "single", {}, drawn(), others={"tokenizer.json": b"{}"})
    for path in (folder, folder.parent, tmp_path / "single"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask
    written = [*folder.iterdir(), *(tmp_path / "single").iterdir()]
    assert len(written) > 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~umask}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("No space left on device"),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        KeyboardInterrupt(),
    ],
)
def test_an_interrupted_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (tmp_path / "out").mkdir()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", fail)
        expected = InteropError if isinstance(error, Exception) else KeyboardInterrupt
        message = rf"^{tmp_path}/out: cannot be written: {error.args[-1]}$" if error.args else None
        with pytest.raises(expected, match=message):
            write_folder(tmp_path / "out", {}, drawn())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not any((tmp_path / "out").iterdir())


def test_leftovers_of_a_killed_process_are_no_obstacle(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "model-00001-of-00003.safetensors").write_text("half")
    (left / "lock").write_text("process 1 on a machine (export)")
    write_folder(tmp_path / "out", {}, drawn())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same(dict(TensorFolder(tmp_path / "out")), drawn())


def test_two_processes_cannot_write_the_same_folder(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    with files.locked(partial / "lock", "export"):
        (partial / "model.safetensors").write_text("of the first")
        with pytest.raises(
            files.InUse, match=rf"is in use by process {os.getpid()} on .* \(export\)"
        ):
            write_folder(tmp_path / "out", {}, drawn())
        assert (partial / "model.safetensors").read_text() == "of the first"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "file: already exists; name a new or empty folder"),
        ("file/out", "file/out: cannot be "),
        ("x" * 300, "cannot be used: File name too long"),
        ("x" * 250, "cannot be written: .*File name too long"),
        ("loop/out", "loop/out: cannot be "),
    ],
)
def test_an_unwritable_path_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((InteropError, files.FileError), match=message):
        write_folder(tmp_path / name, {}, drawn())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")
    write_folder(tmp_path / "out", {}, drawn())
    assert (tmp_path / "out").is_symlink()
    assert_same(dict(TensorFolder(tmp_path / "disk" / "model")), drawn())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_non_finite_values_are_neither_written_nor_read(
    tmp_path: Path, value: float, dtype: str | None
) -> None:
    tensors = drawn() | {"g": np.zeros(200_000, np.float32)}
    write_folder(tmp_path / "good", {}, tensors)
    tensors["g"][-1] = value
    with pytest.raises(InteropError, match=r"^g: holds NaN or infinity$"):
        write_folder(tmp_path / "out", {}, tensors, dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    path = tmp_path / "good" / "model.safetensors"
    save_file({n: a.astype(dtype or a.dtype) for n, a in tensors.items()}, path)
    with pytest.raises(InteropError, match=rf"{path}: g: holds NaN or infinity"):
        dict(TensorFolder(tmp_path / "good"))


@pytest.mark.parametrize("change", ["none", "value", "scalar", "name", "shape", "dtype"])
def test_an_index_next_to_a_single_file_must_agree_with_it(tmp_path: Path, change: str) -> None:
    folder, tensors = sharded(tmp_path / "out"), drawn()
    match change:
        case "value":
            tensors["e"][-1] += 1
        case "scalar":
            tensors["d"] = np.array(-tensors["d"])
        case "name":
            tensors["g"] = tensors.pop("a")
        case "shape":
            tensors["c"] = tensors["c"].reshape(4, 3, 2)
        case "dtype":
            tensors["b"] = tensors["b"].astype(np.float16)
    save_file(tensors, folder / "model.safetensors")
    if change == "none":
        assert_same(dict(TensorFolder(folder)), drawn())
        return
    named = {"value": "e", "scalar": "d", "name": "a, g", "shape": "c", "dtype": "b"}[change]
    message = rf"model\.safetensors and model\.safetensors\.index\.json disagree about {named};"
    with pytest.raises(InteropError, match=message):
        TensorFolder(folder)


def test_an_index_whose_shards_are_gone_is_ignored_next_to_a_single_file(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "out")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    save_file(drawn(), folder / "model.safetensors")
    (folder / "pytorch_model.bin").touch()
    assert_same(dict(TensorFolder(folder)), drawn())


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert_same(dict(TensorFolder(tmp_path / "snapshot")), drawn())


def test_a_tensor_in_two_shards_is_rejected(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "out")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: np.zeros(1, np.float32)}, second)
    with pytest.raises(InteropError, match=rf"{second.name}: {name} is in {first.name} as well"):
        TensorFolder(folder)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"])
def test_unsupported_dtypes_are_named(tmp_path: Path, dtype: str) -> None:
    header = json.dumps({"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(4)
    )
    with pytest.raises(InteropError, match=f"a is {dtype}, not float32"):
        TensorFolder(tmp_path).check({"a": (4,)}, {"a": ("float32",)})


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InteropError, match=r"nowhere: has neither model\.safetensors nor"):
        TensorFolder(tmp_path / "nowhere")

    first = sorted(sharded(tmp_path / "gone").glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(InteropError, match=rf"names shards that are missing: {first.name}"):
        TensorFolder(tmp_path / "gone")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 64, b"\xff" * 64, "cut", "longer"])
def test_a_damaged_shard_is_named(tmp_path: Path, content: bytes | str) -> None:
    shard = sorted(sharded(tmp_path / "out").glob("*.safetensors"))[1]
    original = shard.read_bytes()
    damaged = {"cut": original[:-1], "longer": original + b"\0"}
    shard.write_bytes(content if isinstance(content, bytes) else damaged[content])
    with pytest.raises(InteropError, match=rf"{shard.name}: damaged"):
        TensorFolder(tmp_path / "out")


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    sharded(tmp_path / "out")
    monkeypatch.setattr(tensor_files, "safe_open", refuse)
    with pytest.raises(InteropError, match=r"safetensors: cannot be read: Permission denied$"):
        TensorFolder(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"\x80", "damaged"),
        (b"[" * 100_000, "damaged: nested too deep"),
        (b'{"a":' * 100_000, "damaged: nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "damaged"),
        (b"[1]", "damaged: not a mapping"),
        (b"null", "damaged: not a mapping"),
    ],
)
def test_invalid_json_is_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InteropError, match=rf"config\.json: {message}"):
        tensor_files.read_json(tmp_path / "config.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InteropError, match=r"folder\.json: cannot be read: Is a directory"):
        tensor_files.read_json(tmp_path / "folder.json")


def test_json_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert tensor_files.read_json(tmp_path / "config.json") == {"a": "é"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "not a mapping"),
        ('{"weight_map": {}}', "weight_map must"),
        ('{"weight_map": [1]}', "weight_map must"),
        ('{"weight_map": {"a": ""}}', "weight_map must"),
        ('{"weight_map": {"a": ".."}}', "weight_map must"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "weight_map must"),
        ('{"weight_map": {"a": "b\\u0000c"}}', "names shards that are missing"),
        ('{"weight_map": {"a": "\\ud800"}}', "names shards that are missing"),
        ("{}", "weight_map must"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "weight_map must"),
        ('{"weight_map": {"a": 1}}', "weight_map must"),
    ],
)
def test_an_invalid_index_is_rejected(tmp_path: Path, text: str, message: str) -> None:
    index = sharded(tmp_path / "out") / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(InteropError, match=message):
        TensorFolder(tmp_path / "out")


@pytest.mark.parametrize("change", ["missing", "extra", "moved"])
def test_an_index_that_disagrees_with_its_shards_is_rejected(tmp_path: Path, change: str) -> None:
    path = sharded(tmp_path / "out") / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    weight_map = index["weight_map"]
    match change:
        case "missing":
            del weight_map["a"]
        case "extra":
            weight_map["g"] = weight_map["a"]
        case "moved":
            weight_map["a"] = weight_map["e"]
    assert set(weight_map.values()) == {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    path.write_text(json.dumps(index))
    with pytest.raises(InteropError, match=r"disagrees with its shards about [ag]$"):
        TensorFolder(tmp_path / "out")


def test_all_errors_of_the_tensors_are_reported_at_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", {}, drawn())
    folder = TensorFolder(tmp_path / "out")
    shapes = dict(SHAPES)
    dtypes: dict[str, tuple[str, ...]] = dict.fromkeys(shapes, ("float32",))
    folder.check(shapes, dtypes)

    del shapes["a"]
    shapes |= {"b": (6,), "v": (), "w": (), "x": (), "y": (), "z": ()}
    dtypes |= {"c": ("int32", "bfloat16")}
    with pytest.raises(InteropError) as error:
        folder.check(shapes, dtypes)
    assert str(error.value) == (
        f"{tmp_path / 'out'}: tensors: missing: v, w, x and 2 more; not of this model: a;"
        " b has shape [5], not [6]; c is float32, not int32 or bfloat16"
    )
