"""The benchmark: costs, reports, and the search for block sizes."""

import errno
import functools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from kernels_pallas import bench, tuned
from kernels_pallas.benchmark import measure, report, tune
from kernels_pallas.benchmark.measure import Program, Times
from kernels_pallas.benchmark.workloads import OPERATORS, Workload, named_shapes
from kernels_pallas.value_aggregation.shapes import Shape, draw_ids
from tests.kernels_pallas.conformance import REFERENCES, compare, results

AGGREGATION, TOP_K = OPERATORS.values()


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        (AGGREGATION, "ragged"),
        (AGGREGATION, "slots"),
        (TOP_K, "tucker"),
        (TOP_K, "additive"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_plain_implementation_matches_the_reference(operator: Any, name: str) -> None:
    (shape,) = named_shapes(operator, name)
    arrays = shape.inputs()
    got = results(operator, operator.plain, arrays, shape.options)
    want = results(operator, REFERENCES[operator.name], arrays, shape.options)
    for pass_name, arrays in want.items():
        assert compare(got[pass_name], arrays, reduction=1000).share <= 1, pass_name


def test_bytes_and_flops_of_a_tiny_workload_by_hand() -> None:
    # 2 tokens with 3 selections: 6 rows of 8 + 4 bfloat16 numbers. At 4 bytes each: 6 ids, 12
    # scores, 2 pre-inputs of 4 and 2 outputs of 8.
    shape = Shape("tiny", "ci", 2, 3, 10, 8, 4, num_cores=2)
    workload = Workload(AGGREGATION, shape, "bfloat16", "uniform")
    forward = 6 * 12 * 2 + 4 * (6 + 12 + 8 + 16)
    assert workload.cost("forward") == (forward, 2 * 6 * 12)
    # Scores and pre-inputs are read, and their gradients and those of all 10 rows are written.
    backward = 6 * 12 * 2 + 4 * (6 + 24 + 16 + 16) + 10 * 12 * 2
    assert workload.cost("backward") == (backward, 2 * 6 * (2 * 8 + 3 * 4))
    assert workload.cost("both") == (forward + backward, 2 * 6 * (12 + 28))


def test_ids_have_the_named_distribution() -> None:
    rng = np.random.default_rng(0)
    drawn = {
        kind: draw_ids(kind, (4000, 5), 100, rng) for kind in ("uniform", "zipf", "equal", "ends")
    }
    assert all(ids.min() >= 0 and ids.max() < 100 for ids in drawn.values())
    assert np.unique(drawn["equal"]).size == 1
    assert set(np.unique(drawn["ends"])) == {0, 99}
    most, second = (np.sort(np.bincount(drawn["zipf"].ravel()))[-i] for i in (1, 2))
    # ln 2 / ln 101 and ln 3/2 / ln 101.
    assert most / 20000 == pytest.approx(0.150, abs=0.01)
    assert second / 20000 == pytest.approx(0.088, abs=0.01)
    assert np.bincount(drawn["uniform"].ravel()).max() < 300


def test_measurements_are_interleaved_and_rotate() -> None:
    order: list[str] = []
    programs = {
        name: Program(functools.partial(order.append, name), 0.0, 0, 0) for name in ("a", "b")
    }
    times = measure.interleaved_times(programs, 3)
    assert order == ["a", "a", "b", "b", "a", "b", "b", "a", "a", "b"]
    assert len(times["a"].seconds) == 3


def test_speedups_compare_times_within_a_round() -> None:
    noisy, twice = Times((1.0, 10.0, 1.0)), Times((2.0, 20.0, 2.0))
    assert noisy.speedup_over(twice) == (2.0, (2.0, 2.0))


@pytest.mark.slow
def test_a_run_writes_records_a_table_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "--op=value_aggregation --shapes=one_token --repeats=2 --ids=uniform"
    names = "--implementation=xla,pallas_tpu,plain --passes=forward,backward"
    bench.main([*command.split(), *names.split(), f"--output={tmp_path}"])
    records = [json.loads(x) for x in (tmp_path / "value_aggregation.jsonl").open()]
    assert [(x["pass"], x["implementation"]) for x in records] == [
        (pass_name, name)
        for pass_name in ("forward", "backward")
        for name in ("xla", "pallas_tpu", "plain")
    ]
    xla, pallas, plain = records[3:]
    assert pallas["reason"] == "it compiles for TPU, not for cpu"
    assert xla["speedup_over_plain"] > 0
    assert plain["difference"] < 1e-5
    assert xla["bytes_per_second"] == pytest.approx(xla["bytes"] / xla["median_seconds"])
    assert xla["versions"]["jax"] == jax.__version__
    assert "no: it compiles for TPU, not for cpu" in capsys.readouterr().out
    assert (tmp_path / "value_aggregation.png").read_bytes().startswith(b"\x89PNG")


def record(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"operator": "value_aggregation", "device": "cpu", "dtype": "float32"}
    values |= {"shape": {"name": "cpu_384", "ids": "uniform"}, "pass": "forward"}
    values |= {
        "implementation": "xla",
        "quartiles_seconds": (1e-3, 2e-3),
        "bytes": 100,
        "flops": 50,
    }
    values |= {"median_seconds": 1e-3, "bytes_per_second": 1e9, "share_of_copy": 0.5}
    values |= {"flops_per_second": 1e9, "temporary_bytes": 2**20, "compile_seconds": 1.0}
    values |= {"copy_bytes_per_second": 1e10, "matrix_flops_per_second": 1e12}
    return values | changes


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_table_fits_the_terminal_and_is_complete(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = record(implementation="pallas_tpu", reason="it compiles for TPU, " * 20)
    for records in ([record()], [refused], [record(), refused, record(dtype="bfloat16")], []):
        text = report.table(records, width)
        assert all(len(line) <= width for line in text.splitlines())
        squeezed = "".join(text.split())
        for one in records:
            assert one["implementation"] in squeezed
            expected = "it compiles for TPU" if "reason" in one else "1-2"
            assert "".join(expected.split()) in squeezed
        monkeypatch.setenv("COLUMNS", str(width))
        assert report.table(records) == text


def test_labels_of_a_roofline_do_not_overlap(tmp_path: Path) -> None:
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    points = [(2.0, 5.0)] * 6 + [(2.0, 5.1), (7.0, 5.0)]
    report._annotate(axes, [(point, str(number)) for number, point in enumerate(points)])
    figure.savefig(tmp_path / "labels.png")
    boxes = [
        Text.get_window_extent(label) for label in axes.texts
    ]  # without the lines that connect them to their points
    assert len(boxes) == len(points)
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:i])


@pytest.mark.slow
def test_the_same_records_give_the_same_roofline_file(tmp_path: Path) -> None:
    shapes = [{"name": name, "ids": "uniform"} for name in ("small", "large")]
    records = [
        record(shape=shape, implementation=name, flops_per_second=1e9 * factor)
        for factor, shape in enumerate(shapes, start=1)
        for name in ("xla", "plain")
    ]
    for name in ("one.png", "two.png"):
        report.roofline(records, tmp_path / name)
    content = (tmp_path / "one.png").read_bytes()
    assert content == (tmp_path / "two.png").read_bytes()
    assert b"Software" not in content
    report.roofline([record(reason="no")], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_program_that_exceeds_memory_is_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "available_bytes", lambda: 100)
    (shape,) = named_shapes(TOP_K, "one_token")
    workload = Workload(TOP_K, shape, "float32")
    found = measure.program_of(workload, "plain", "forward", workload.inputs())
    assert found == "needs 0.0 GiB, only 0.0 GiB are available"


def test_arguments_can_have_layouts_chosen_by_the_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (shape,) = named_shapes(AGGREGATION, "one_token")
    workload = Workload(AGGREGATION, shape, "float32", "uniform")
    found = []
    for chosen in (True, False):
        monkeypatch.setattr(measure, "layouts_are_chosen", lambda chosen=chosen: chosen)
        program = measure.program_of(workload, "xla", "backward", workload.inputs())
        assert isinstance(program, Program)
        found.append(program.run())
    assert measure.difference(*found) < 1e-6


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--shapes=huge", "--shapes: got 'huge', must be one of all, ci, model, "),
        ("--implementation=fast", "--implementation: got 'fast', must be one of xla"),
        ("--passes=sideways", "--passes: got 'sideways', must be one of forward, backward, both"),
        ("--ids=zipf", "--ids: product_key_top_k takes no ids"),
        ("--repeats=0", "--repeats: got 0, must be at least 1"),
    ],
)
def test_a_wrong_argument_is_rejected(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.arguments(["--op=product_key_top_k", argument])
    assert message in capsys.readouterr().err


def test_tuning_finds_and_stores_the_fastest_blocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KERNELS_PALLAS_TUNED", str(tmp_path))

    def program(workload: Any, name: str, request: Any, blocks: Any, arrays: Any) -> Any:
        result = jnp.full(3, float("nan") if blocks.chunk_size == 32 else 1.0)
        return "too small" if blocks.chunk_size < 8 else Program(lambda: result, 0.0, 0, 0)

    def times(programs: dict[Any, Program], rounds: int) -> dict[Any, Times]:
        # 16 is the fastest correct size; the heuristic says 8192.
        return {b: Times((float(abs(np.log2(b.chunk_size) - 4) + 1),) * rounds) for b in programs}

    monkeypatch.setattr(tune, "_program", program)
    monkeypatch.setattr(tune, "interleaved_times", times)
    command = "--op=value_aggregation --implementation=xla --shapes=ragged --ids=uniform --tune"
    bench.main(command.split())
    (path,) = tmp_path.iterdir()
    (entry,) = json.loads(path.read_text())["entries"]
    assert entry["blocks"] == {"chunk_size": 16}
    assert entry["measured"]["heuristic"] == {"chunk_size": 8192}
    assert entry["measured"]["speedup_over_heuristic"] == pytest.approx(10)
    output = capsys.readouterr().out
    assert "no: too small" in output
    assert "Chunks(chunk_size=32): no: its result differs by nan" in output
    kind = tuned.device_kind("cpu")
    assert kind is not None
    assert [b for b in tuned.load(path, kind).values()] == [{"chunk_size": 16}]


@pytest.mark.slow
def test_candidate_blocks_are_the_ones_compiled() -> None:
    (shape,) = named_shapes(AGGREGATION, "ragged")
    workload = Workload(AGGREGATION, shape, "float32", "uniform")
    (request,) = tune.requests(workload, "xla")
    arrays = workload.inputs()
    temporary_bytes = set()
    for size in (2, 8192):
        program = tune._program(workload, "xla", request, tuned.Chunks(size), arrays)
        assert isinstance(program, Program)
        temporary_bytes.add(program.temporary_bytes)
    assert len(temporary_bytes) == 2


BENCH = (sys.executable, "-m", "kernels_pallas.bench")
ONE_CASE = ["--op=value_aggregation", "--shapes=one_token", "--ids=uniform", "--implementation=xla"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --op"),
        (["--op=sort"], "argument --op: invalid choice: 'sort'"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["--repeats=many"], "argument --repeats: invalid int value: 'many'"),
        (["--ids="], "--ids: got '', must be one of uniform"),
        (["--output="], "--output: got '', must be a local folder"),
        (["--output=gs://bucket/x"], "--output: got 'gs://bucket/x', must be a local folder"),
        (
            ["--tune", "--output=x"],
            "--output: --tune only writes to the folder of KERNELS_PALLAS_TUNED",
        ),
        (
            ["--tune", "--implementation=plain"],
            "--tune: the plain implementation has no block sizes",
        ),
    ],
    ids=str,
)
def test_a_command_line_error_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.arguments([*ONE_CASE, *arguments] if arguments else [])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_benchmarks_reject_id_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for value, message in (
        ("1", "checks would distort timings"),
        ("yes", "got 'yes', must be 0 or 1"),
    ):
        monkeypatch.setenv("KERNELS_PALLAS_CHECK_IDS", value)
        with pytest.raises(SystemExit):
            bench.arguments(ONE_CASE)
        assert message in capsys.readouterr().err


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, list[str]]:
    """The exit status of a command that ends before it measures, and the lines it writes."""
    monkeypatch.setattr(sys, "argv", ["bench", *ONE_CASE, *arguments])
    monkeypatch.setattr(bench, "measured", lambda *_: pytest.fail("it measures"))
    with pytest.raises(SystemExit) as stopped:
        bench.run()
    printed = capsys.readouterr().err.splitlines()
    if isinstance(stopped.value.code, str):  # Python prints it and exits with status 1
        return 1, [*printed, *stopped.value.code.splitlines()]
    return stopped.value.code, printed


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/new", "long"])
def test_an_unwritable_folder_is_rejected_before_measuring(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    folder = str(tmp_path / (place if place != "long" else "x" * 300))
    status, (line,) = run(monkeypatch, capsys, f"--output={folder}")
    assert status == 1
    assert line.startswith(f"error: --output: cannot write to {folder}: ")
    monkeypatch.setenv("KERNELS_PALLAS_TUNED", folder)
    monkeypatch.setattr(tune, "fastest", lambda *_: pytest.fail("it measures"))
    status, (line,) = run(monkeypatch, capsys, "--tune")
    assert status == 1
    assert line.startswith("error: ")
    assert folder in line


@pytest.mark.parametrize(
    "content",
    [b"not json", b"\xff\xfe", b"[]", b'{"device_kind": 1, "entries": []}', b'{"entries": 1}'],
)
def test_a_corrupt_file_of_block_sizes_is_reported_in_one_line(
    content: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KERNELS_PALLAS_TUNED", str(tmp_path))
    kind = tuned.device_kind("cpu")
    assert kind is not None
    path = tuned.file_of(kind)
    path.write_bytes(content)
    status, (line,) = run(monkeypatch, capsys, "--tune")
    assert status == 1
    assert line.startswith(f"error: {path}: ")
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device"),
        (OSError(errno.EIO, "I/O error", "x.jsonl"), 1, "error: x.jsonl: I/O error"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_interrupted_measurement_is_reported_in_one_line(
    raised: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(bench, "main", stop)
    assert run(monkeypatch, capsys) == (status, [line])


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ValueError("a bug"), OSError(errno.EINVAL, "a bug")):
        monkeypatch.setattr(bench, "main", lambda error=error: raise_(error))
        with pytest.raises(type(error), match="a bug"):
            bench.run()


def raise_(error: Exception) -> None:
    raise error


def test_tuning_says_why_a_backend_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([*ONE_CASE, "--implementation=pallas_tpu", "--tune"])
    assert capsys.readouterr().out.endswith("pallas_tpu: no: it compiles for TPU, not for cpu\n")


@pytest.mark.parametrize(
    ("variable", "redirection", "status", "lines"),
    [
        ("JAX_PLATFORMS=abacus", "", 2, 1),
        ("PYTHONIOENCODING=ascii", "> /dev/full", 1, 1),
        ("PYTHONIOENCODING=ascii", ">&-", 0, 0),
        ("PYTHONIOENCODING=ascii", "| true", 141, 0),
    ],
)
def test_the_command_handles_platform_and_output_errors(
    variable: str, redirection: str, status: int, lines: int
) -> None:
    arguments = [*ONE_CASE, "--repeats=1", "--passes=forward"]
    command = f"set -o pipefail; {shlex.join([*BENCH, *arguments])} {redirection}"
    name, value = variable.split("=")
    environment = os.environ | {name: value}
    finished = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, check=False
    )
    assert finished.returncode == status, finished.stderr
    assert len(finished.stderr.splitlines()) == lines, finished.stderr
