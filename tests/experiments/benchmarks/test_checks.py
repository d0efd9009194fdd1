"""Measurements made by tests: how they are collected, stored and shown."""

import json
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from experiments import measurements
from experiments.benchmarks import checks, compile_matrix, conformance, meshes, parity
from umv2.config.schema import UserError

RESULTS = Path("experiments/results")


@pytest.fixture(autouse=True)
def parsed_flags() -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


TESTS = """
import json
import pytest

@pytest.mark.parametrize("case", ["one", "two", "refused"])
def test_case(case, record_property):
    record_property("measured", json.dumps({"case": case, "error": float("inf")}))
    if case == "refused":
        pytest.skip("refused")
    assert case == "one"
"""


@pytest.fixture
def tests(tmp_path: Path) -> str:
    (tmp_path / "test_it.py").write_text(TESTS)
    return str(tmp_path / "test_it.py")


def test_measurements_are_collected_from_passing_and_failing_tests(tests: str) -> None:
    outcome = checks.run(tests, parts=[])
    assert [record["case"] for record in outcome.records] == ["one", "two", "refused"]
    assert {"command", "date", "versions"} <= outcome.records[0].keys()
    assert outcome.failed == ["test_case[two]"]
    with pytest.raises(UserError, match=r"1 tests failed: test_case\[two\]"):
        outcome.require_passed()


def test_parts_of_names_select_cases(tests: str) -> None:
    outcome = checks.run(tests, parts=["one", "refu"])
    assert [record["case"] for record in outcome.records] == ["one", "refused"]
    outcome.require_passed()
    with pytest.raises(UserError, match=r"pytest exited with status 5: .*none_such"):
        checks.run(tests, parts=["none_such"])


def test_new_records_replace_those_of_the_same_case(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "records.jsonl"
    old: list[dict[str, Any]] = [{"a": 1, "b": 1, "x": 0}, {"a": 1, "b": 2, "x": 0}]
    assert measurements.merged(path, old, "ab") == old
    measurements.write(path, old)
    new = [{"a": 2, "b": 1, "x": 9}, {"a": 1, "b": 1, "x": 9}]
    assert measurements.merged(path, new, "ab") == [new[1], old[1], new[0]]


def test_a_measurement_records_where_it_comes_from() -> None:
    about = measurements.about() | measurements.device()
    assert about["command"].startswith("python ")
    assert about["versions"].keys() >= {"python", "jax", "jaxlib", "flax"}
    assert about["platform"] == "cpu"
    assert json.loads(json.dumps(about)) == about


@pytest.mark.parametrize("name", ["conformance", "compile_matrix"])
def test_tables_of_kernels_match_the_stored_records(name: str) -> None:
    folder = RESULTS / "kernels"
    stored = measurements.read(folder / f"{name}.jsonl")
    module = {"conformance": conformance, "compile_matrix": compile_matrix}[name]
    assert module.table(stored).strip() == (folder / f"{name}.txt").read_text().strip()


def test_lines_of_the_compile_matrix_are_ordered_by_case() -> None:
    stored = measurements.read(RESULTS / "kernels" / "compile_matrix.jsonl")
    ordered = compile_matrix.ordered(stored)
    assert len(ordered) == len(stored)
    assert compile_matrix.ordered(stored[::-1]) == ordered


def test_stored_layouts_match_the_page() -> None:
    stored = measurements.read(RESULTS / "meshes" / "layouts.jsonl")
    page = (RESULTS / "README.md").read_text()
    for row in meshes.table("layouts", stored).splitlines()[2:]:
        assert row in page


def test_parity_is_shown_by_file() -> None:
    records: list[dict[str, Any]] = [
        {"file": "b", "dtype": "float32", "values": 1e-7, "gradients": 2e-7},
        {"file": "b", "dtype": "float64", "values": 1e-16, "gradients": 2e-16},
        {"file": "a", "dtype": "float32", "gradients": 3e-7},
    ]
    assert parity.table(records).splitlines() == [
        "| file | float32 values | float32 gradients | float64 values | float64 gradients |",
        "| --- | --- | --- | --- | --- |",
        "| a | none | 3.0e-07 | none | none |",
        "| b | 1.0e-07 | 2.0e-07 | 1.0e-16 | 2.0e-16 |",
    ]
