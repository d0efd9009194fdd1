"""Output of the modes fits the terminal: no line is wider, and no number is lost."""

import dataclasses
import functools
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs import tiny
from tests.extras import needs_libtpu
from umv2 import tables
from umv2.config import Config, from_config_dict
from umv2.evaluation.long_context import LongContextReport, Score
from umv2.evaluation.report import Report
from umv2.planning import ahead_of_time, plan, search, topology
from umv2.training import inspection
from umv2.training.held_out import HeldOut

PLANS = Path(__file__).parent.parent / "experiments" / "results" / "plans" / "plans.jsonl"
WIDTHS = (60, 80, 100, 200)
LONG = "a_name_that_is_longer_than_any_terminal/" * 8

at_every_width = pytest.mark.parametrize("width", WIDTHS)


def assert_fits(text: str, width: int, *expected: str) -> None:
    for line in text.splitlines():
        assert tables.display_width(line) <= width, line
    squeezed = re.sub(r"\s", "", text)
    for figure in expected:
        assert re.sub(r"\s", "", figure) in squeezed, figure


@functools.cache
def inspected(name: str) -> inspection.Inspection:
    config = importlib.import_module(f"configs.{name}").get_config()
    return inspection.inspect(from_config_dict(config))


@at_every_width
@pytest.mark.parametrize("name", ["tiny", "paper_227m_1b2"])
def test_inspect(name: str, width: int) -> None:
    listed = inspected(name)
    sizes = [f"{parameter.size:,}" for parameter in listed.parameters]
    counts = [f"{count:,}" for count in listed.counts.as_dict().values()]
    assert_fits(listed.as_text(width), width, *sizes, *counts)


@at_every_width
def test_inspect_with_names_of_any_length(width: int) -> None:
    listed = inspected("tiny")
    (first, *_) = listed.parameters
    changed = dataclasses.replace(first, name=LONG, shape=(2**62,) * 9, sharding="模型 x " * 40)
    for parameters in ((), (changed,), (changed, *listed.parameters)):
        text = dataclasses.replace(listed, parameters=parameters).as_text(width)
        assert_fits(text, width, *(["模型"] if parameters else []))


@functools.cache
def plans() -> tuple[plan.Plan, ...]:
    """Returns all stored plans."""
    stored = []
    for record in map(json.loads, PLANS.read_text().splitlines()):
        if "measured" in record:
            name, _, rest = record["case"].partition("@")
            config = with_fields(name, tuple(record["fields"]))
            place = topology.parse(rest.split()[0])
            if program := record["measured"]["program"]:
                program.setdefault("heaviest", [("value_aggregation/" * 9, 10**12)])
            measured = ahead_of_time.from_dict(record["measured"])
            stored.append(plan.Plan(name, config, place, record["step"], measured))
    return tuple(stored)


@functools.cache
def with_fields(name: str, fields: tuple[str, ...]) -> Config:
    values = importlib.import_module(f"configs.{name}").get_config()
    for path, value in (field.split("=") for field in fields):
        section, _, key = path.rpartition(".")
        inner = values.get(section, values)
        inner[key] = type(inner[key])(value)
    return from_config_dict(values)


@needs_libtpu
@at_every_width
def test_plan(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Advice searches for other meshes, which takes seconds.
    monkeypatch.setattr(plan.Plan, "advice", lambda _: ["model.remat='full': " + "words " * 40])
    assert len(plans()) > 9
    for each in plans():
        flags = " \\ ".join(f"--config.{field}" for field in plan.fields(each.config))
        text = each.as_text(width)
        assert_fits(text, width, each.name, "verdict")
        assert flags.replace(" \\", "") in text.replace(" \\\n", " ")
        assert_fits(dataclasses.replace(each, name=LONG).as_text(width), width)


@needs_libtpu
@at_every_width
@pytest.mark.parametrize("count", [0, 1, 9])
def test_a_search(count: int, width: int) -> None:
    result = search.Search(plans=plans()[:count], num_candidates=1000, least_bytes=2**40)
    text = result.as_text(width)
    needed = [
        f"{each.measured.needed / 2**30:,.1f}" for each in plans()[:count] if each.measured.needed
    ]
    assert_fits(text, width, "compiler'sms" if width == 200 else "compiler", *needed)
    assert_fits(text, width, f"Compiled {count} of 1000 that may fit.")


@at_every_width
@pytest.mark.parametrize(
    ("value", "shown"), [(1.5, "1.500"), (float("nan"), "nan"), (1e300, "1.000e+300")]
)
def test_evaluate(value: float, shown: str, width: int) -> None:
    held_out = HeldOut(value, value, value, 10**15, 10**15)
    report = Report(step=10**12, held_out=held_out, compressors={"gzip -9": 1.0, LONG: value})
    assert_fits(report.table(width), width, f"{10**15:,}", f"perplexity {shown}")


@at_every_width
@pytest.mark.parametrize("lengths", [(), (64,), (64, 1_048_576)])
def test_the_long_context_suite(lengths: tuple[int, ...], width: int) -> None:
    values: dict[str, Any] = {"example": 0, "depth": 0.1, "chance": 0.25, "exact": True}
    scores = tuple(
        Score(task=task, length=length, log_likelihood=-2.5, num_tokens=1, **values)
        for task in ("needle", "multi_round")
        for length in lengths
    )
    report = LongContextReport(10**9, 4096, "window", scores)
    assert_fits(report.table(width), width, *(f"{length:,}" for length in lengths), "exact")


def test_numbers_that_json_cannot_represent_are_null() -> None:
    score = Score(
        "needle", 64, 0, 0.1, 0.25, exact=False, log_likelihood=float("nan"), num_tokens=1
    )
    metrics = LongContextReport(1, 64, "none", (score,)).metrics()
    assert metrics["cells"][0]["nats_per_token"] is None
    json.dumps(metrics, allow_nan=False)


def test_the_default_width_is_that_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = inspection.inspect(from_config_dict(tiny.get_config()))
    for width in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(width))
        assert listed.as_text() == listed.as_text(width)
