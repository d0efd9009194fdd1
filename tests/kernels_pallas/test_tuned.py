"""Tuned block sizes: which calls get them, and errors for files that do not match."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from kernels_pallas import product_key_top_k, tuned, value_aggregation
from kernels_pallas.product_key_top_k.shapes import SHAPES as TOP_K_SHAPES
from kernels_pallas.tuned import Chunks, Key, TunedFileError
from kernels_pallas.value_aggregation.shapes import SHAPES

RAGGED, TUCKER = SHAPES[0], TOP_K_SHAPES[0]
KEY = Key.of("value_aggregation", "xla", "both", {"num_tokens": 8}, "float32")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KERNELS_PALLAS_TUNED", str(tmp_path))
    return tmp_path


def aggregate(num_tokens: int | None = None, **options: Any) -> str:
    """The jaxpr of value aggregation on all or the first tokens of a shape."""
    arrays: dict[str, Any] = RAGGED.inputs()
    for name in ("indices", "scores", "pre_inputs"):
        arrays[name] = arrays[name][:num_tokens]
    return str(jax.make_jaxpr(lambda: value_aggregation(**arrays, **RAGGED.options, **options))())


def top_k() -> str:
    return str(jax.make_jaxpr(lambda: product_key_top_k(**TUCKER.inputs(), **TUCKER.options))())


def keep(blocks: Any, request: tuned.Request) -> Path:
    kind = tuned.device_kind("cpu")
    assert kind is not None
    path = tuned.file_of(kind)
    tuned.save(path, kind, {request.key: (blocks, {"seconds": 1.0})})
    return path


def entry(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    content = json.loads(path.read_text())
    return content, content["entries"][0]


def test_only_calls_with_a_tuned_key_get_tuned_blocks() -> None:
    with tuned.recording() as requests:
        before = aggregate(), top_k()
    assert "scan" not in "".join(before)
    keep(Chunks(4), requests[0])
    assert "scan" in aggregate()
    assert aggregate() == aggregate(chunk_size=4)
    assert "scan" not in aggregate(num_tokens=18)
    assert "scan" not in aggregate(chunk_size=100)
    assert top_k() == before[1]
    keep(Chunks(4), requests[1])
    assert "scan" in top_k()
    assert "scan" in aggregate()


def test_tuned_chunks_of_xla_do_not_apply_to_other_backends() -> None:
    with tuned.recording() as requests:
        aggregate(platform="tpu", implementation="pallas_tpu")
    assert not [request for request in requests if request.key.implementation == "xla"]


def test_a_key_contains_every_size_the_dtype_and_the_pass() -> None:
    with tuned.recording() as requests:
        aggregate()
    (request,) = requests
    sizes = dict(request.key.shape)
    assert request.key[:3] == ("value_aggregation", "xla", "both")
    assert (sizes["num_tokens"], sizes["num_selected"], sizes["num_cores"]) == (19, 5, 3)
    assert request.key.dtype == "float32"
    assert request.platform == "cpu"
    assert isinstance(request.default, Chunks)


def test_forced_blocks_take_precedence_inside_the_context() -> None:
    with tuned.recording() as requests:
        aggregate()
    keep(Chunks(4), requests[0])
    with tuned.forcing({requests[0].key: Chunks(100)}):
        assert "scan" not in aggregate()
    assert "scan" in aggregate()


def test_tuning_again_replaces_an_entry() -> None:
    with tuned.recording() as requests:
        aggregate()
    keep(Chunks(4), requests[0])
    path = keep(Chunks(8), requests[0])
    content, _ = entry(path)
    assert [e["blocks"] for e in content["entries"]] == [{"chunk_size": 8}]
    assert aggregate() == aggregate(chunk_size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, e: c.update(author="me"), "the file has the fields .*'author'"),
        (lambda c, e: c.update(device_kind="TPU v9"), "device_kind is 'TPU v9', the device is"),
        (lambda c, e: e.update(note="fast"), "entry 0 has the fields .*'note'"),
        (lambda c, e: e.pop("dtype"), "entry 0 has the fields"),
        (lambda c, e: e.update(operator="gather"), "entry 0: operator is 'gather', must be one"),
        (lambda c, e: e["blocks"].update(warps=4), r"blocks has \['chunk_size', 'warps'\], the"),
        (lambda c, e: e["blocks"].pop("chunk_size"), r"blocks has \[\], the code has \['chunk_"),
        (
            lambda c, e: e["shape"].pop("num_selected"),
            "value_aggregation, xla, both: shape has .*bench",
        ),
        (lambda c, e: c["entries"].append(e), "entry 1 repeats the key"),
    ],
)
def test_a_file_that_does_not_match_the_code_is_rejected(change: Any, message: str) -> None:
    with tuned.recording() as requests:
        aggregate()
    path = keep(Chunks(4), requests[0])
    content, first = entry(path)
    change(content, first)
    path.write_text(json.dumps(content))
    with pytest.raises(TunedFileError, match=message) as error:
        aggregate()
    assert str(path) in str(error.value)


def test_the_device_kind_comes_from_the_mesh_or_is_unknown() -> None:
    assert tuned.device_kind("tpu") is None
    assert tuned.lookup(Chunks(4), KEY, platform="tpu") is None
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert tuned.device_kind("tpu") == "TPU v5 lite"
        assert tuned.device_kind("cpu") is None
    assert tuned.file_of("TPU v5 lite").name == "tpu_v5_lite.json"
