"""Reports of the long-context suite and of decode latency, from made-up measurements."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from absl.testing import flagsaver
from matplotlib.image import imread

from experiments import measurements
from experiments.benchmarks import latency_report, long_context, plans, redraw
from umv2.config.schema import UserError


@pytest.fixture(autouse=True)
def parsed_flags() -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def write_answers(path: Path, accuracy: float) -> None:
    answers = [
        {
            "task": task,
            "length": length,
            "depth": i / 10,
            "exact": i < accuracy * 10,
            "chance": 0.25,
            "log_likelihood": -1.5,
            "num_tokens": 2,
        }
        for task in ("needle", "key_value")
        for length in (512, 256)
        for i in range(10)
    ]
    records: list[dict[str, Any]] = [{"step": 1}, *answers]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    heading, *cells = long_context.summary(path)
    assert heading["step"] == 1
    assert {"command", "date", "versions"} <= heading.keys()
    assert len(cells) == 2 * 2 * 5
    assert {(cell["answers"], cell["log_likelihood"]) for cell in cells} == {(2, -3.0)}
    measurements.write(path, [heading, *cells])


def test_results_are_reported_as_mean_and_range_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_context, "RESULTS", tmp_path)
    for seed, accuracy in enumerate((0.2, 0.4)):
        write_answers(tmp_path / f"moe_{seed}.jsonl", accuracy)
    long_context.report()
    text = (tmp_path / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| needle", "| key_value"))]
    assert rows[0] == "| needle | 256 | 25.0 | 30.0 (20.0 to 40.0) |"
    assert [row.split("|")[2].strip() for row in rows] == ["256", "512"] * 2
    assert "| moe | 2 |" in text
    assert "![moe](moe.png)" in text
    images = [(tmp_path / name).read_bytes() for name in ("accuracy.png", "moe.png")]
    long_context.report()
    assert images == [(tmp_path / name).read_bytes() for name in ("accuracy.png", "moe.png")]


def test_families_with_a_common_prefix_are_not_confused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_context, "RESULTS", tmp_path)
    for name in ("moe_10", "moe_2", "moe_2_of_16_0", "moe_x", "dense_0"):
        (tmp_path / f"{name}.jsonl").touch()
    assert list(long_context._stored("moe")) == [2, 10]
    assert list(long_context._stored("moe_2_of_16")) == [0]
    assert not long_context._stored("pkm")


def test_a_report_without_runs_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_context, "RESULTS", tmp_path)
    with pytest.raises(UserError, match="no run of ultramem_v2, moe, dense is stored there"):
        long_context.report()
    assert not list(tmp_path.iterdir())


def test_a_non_finite_likelihood_makes_the_sum_null() -> None:
    assert long_context._sum([1.0, None]) is None
    assert long_context._sum([1.0, -2.0, 0.0]) == -1.0


def record(family: str, seconds: list[float], **changes: Any) -> dict[str, Any]:
    return {
        "kind": "decode",
        "size": "227m_1b2",
        "family": family,
        "batch": 8,
        "context": 256,
        "seconds": seconds,
        "traffic_bytes": 4e9,
        "read_bytes_per_second": [8e9],
        "memory": {"needed": 1e9},
    } | changes


def test_ratios_of_a_step_are_taken_round_by_round() -> None:
    # The machine became slower in the last rounds, for both.
    reference = record("ultramem_v2", [1.0, 1.0, 4.0, 4.0])
    other = record("moe", [2.0, 2.0, 8.0, 8.0], traffic_bytes=6e9)
    assert latency_report.ratio(other, reference) == (2.0, 2.0, 2.0)
    cells = latency_report.decode_cells([reference, other, record("moe", [9.0])])
    rows = latency_report.table(cells["227m_1b2", 256])[2:]
    assert rows[1].split(" | ")[2:4] == ["2.00 (2.00 to 2.00)", "1.50"]
    # 4 GB in 2.5 s, where a pass over memory reads 8 GB/s.
    assert rows[0].split(" | ")[4:] == ["2500.0", "3", "1.6", "20 % |"]


def written(folder: Path, records: list[dict[str, Any]]) -> str:
    """Returns the report of records."""
    path = folder / "latency.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    with flagsaver.flagsaver(latency_file=str(path)):
        latency_report.main([])
    return (folder / "README.md").read_text()


MACHINE = {"device": "cpu", "platform": "cpu", "versions": {"jax": "1"}, "date": "today"}


def test_a_sweep_is_drawn_reproducibly(tmp_path: Path) -> None:
    records = [
        record(family, [seconds * batch], batch=batch, **MACHINE)
        for batch in (1, 8)
        for family, seconds in (("ultramem_v2", 1.0), ("moe", 2.0), ("$x_$", 2.0))
    ]
    records.append(record("dense", [1.0], batch=64, **MACHINE))  # without the reference
    assert "![ratios](latency.png)" in written(tmp_path, records)
    image = (tmp_path / "latency.png").read_bytes()
    written(tmp_path, records)
    assert image == (tmp_path / "latency.png").read_bytes()


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_report_of_one_measurement_has_no_figure(kind: str, tmp_path: Path) -> None:
    text = written(tmp_path, [record("moe", [1.0], kind=kind, **MACHINE)])
    assert "latency.png" not in text
    assert "| moe |" in text
    assert not (tmp_path / "latency.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no measurements"),
        ('{"kind": "dec', "line 1 is not JSON"),
        ('{"kind": "run"}', "line 1 is not a record .*: no 'size'"),
    ],
)
def test_a_file_without_measurements_is_a_one_line_error(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "latency.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"latency\.jsonl: {message}"):
        latency_report.read(path)
    with pytest.raises(UserError, match=r"missing\.jsonl: cannot be read: No such file"):
        latency_report.read(tmp_path / "missing.jsonl")


def test_redrawing_reproduces_the_stored_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = redraw.RESULTS.absolute()
    for name in ("cpu_small", "kernels"):
        shutil.copytree(stored / name, tmp_path / name)
    images = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    redraw.loss(tmp_path / "cpu_small")
    redraw.rooflines(tmp_path / "kernels" / "cpu")
    assert images.keys() == set(tmp_path.rglob("*.png"))
    # Versions of matplotlib draw slightly differently.
    for path, content in images.items():
        assert imread(path).shape == imread(io.BytesIO(content)).shape
    redraw.cost("227m_1b2", tmp_path / "cost")
    table = (tmp_path / "cost" / "table.txt").read_text()
    assert table == (stored / "cost_227m_1b2" / "table.txt").read_text()
    monkeypatch.setattr(redraw, "RESULTS", tmp_path / "none")
    with pytest.raises(UserError, match="none: no such folder here"):
        redraw.main([])


def test_an_unknown_case_is_rejected_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RESULTS", "DOCUMENT"):
        monkeypatch.setattr(plans, name, tmp_path / name)
    with (
        flagsaver.flagsaver(only=["paper_1b_7b@v6e:8x9"]),
        pytest.raises(UserError, match=r"--only=paper_1b_7b@v6e:8x9: unknown case"),
    ):
        plans.main([])
    assert not list(tmp_path.iterdir())


def test_stored_plans_are_read_and_invalid_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "plans.jsonl"
    assert plans.stored(path) == {}
    records: list[dict[str, Any]] = [{"case": "a", "x": 1}, {"case": "b"}, {"case": "a", "x": 2}]
    measurements.append(path, records[:1])
    measurements.append(path, records[1:])
    assert plans.stored(path) == {"a": [records[0], records[2]], "b": [records[1]]}
    measurements.append(path, [{"other": 1}])
    with pytest.raises(UserError, match=r"plans\.jsonl: line 4 has no 'case'"):
        plans.stored(path)


def test_the_document_of_plans_matches_the_stored_plans() -> None:
    assert plans.document(plans.stored(plans.RESULTS)) == plans.DOCUMENT.read_text()
