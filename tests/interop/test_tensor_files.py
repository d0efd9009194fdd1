import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

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


def test_one_file_holds_what_was_written(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", {"kind": "test"}, drawn())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert tensor_files.read_json(tmp_path / "out" / "config.json") == {"kind": "test"}
    assert_same(dict(TensorFolder(tmp_path / "out")), drawn())
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), drawn())


def test_shards_keep_to_their_size_and_to_the_index(tmp_path: Path) -> None:
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
        assert sizes[-1] <= 100 or len(arrays) == 1  # a larger tensor stands alone
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
    assert max(sizes) > 100
    assert sum(sizes) == index["metadata"]["total_size"]


def test_no_more_than_a_shard_is_copied_at_a_time(
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


def test_views_are_written_in_the_order_of_their_axes(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    write_folder(tmp_path / "out", {}, {"view": array[1].T})
    ((_, read),) = TensorFolder(tmp_path / "out")
    np.testing.assert_array_equal(read, array[1].T)


def test_bfloat16_is_written_rounded_and_read_as_it_is(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", {}, drawn(), dtype="bfloat16")
    folder = TensorFolder(tmp_path / "out")
    assert set(folder.dtypes.values()) == {"bfloat16"}
    assert_same(dict(folder), {n: a.astype(jnp.bfloat16) for n, a in drawn().items()})


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InteropError, match="exists already"):
        write_folder(tmp_path, {}, drawn())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", {}, drawn())
    assert TensorFolder(tmp_path / "empty").shapes["a"] == (3, 4)


def test_an_interrupted_write_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            tensor_files, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28))
        )
        with pytest.raises(InteropError, match="cannot be written"):
            write_folder(tmp_path / "out", {}, drawn())
    assert not any(tmp_path.iterdir())
    (tmp_path / ".out.partial").mkdir()  # as a killed process leaves it
    write_folder(tmp_path / "out", {}, drawn())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_damaged_or_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InteropError, match=r"nowhere: holds neither model\.safetensors nor"):
        TensorFolder(tmp_path / "nowhere")

    first = sorted(sharded(tmp_path / "truncated").glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(InteropError, match=rf"{first.name}: damaged"):
        TensorFolder(tmp_path / "truncated")

    first = sorted(sharded(tmp_path / "gone").glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(InteropError, match=rf"names shards that are missing: {first.name}"):
        TensorFolder(tmp_path / "gone")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "holds no mapping"),
        ("{}", "weight_map must"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "weight_map must"),
        ('{"weight_map": {"a": 1}}', "weight_map must"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    index = sharded(tmp_path / "out") / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(InteropError, match=message):
        TensorFolder(tmp_path / "out")


@pytest.mark.parametrize("change", ["missing", "extra", "moved"])
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path, change: str) -> None:
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


def test_all_faults_of_the_tensors_are_told_at_once(tmp_path: Path) -> None:
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
