"""Stored runs are found by configuration, even if fields, arms or files change."""

import json
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import base
from experiments import measurements
from experiments.ablations import records, run
from experiments.ablations.catalogue import configuration

COMMITTED = Path(records.__file__).parents[1] / "results" / "ablations"
HEAD: dict[str, Any] = {
    "kind": "run",
    "seed": 0,
    "config": {},
    "corpus": {"source": "standard_library", "hash": "c0ffee"},
    "date": "2026-11-25",
    "versions": {"jax": "0.12.0", "python": "3.12.1"},
    "device": "cpu",
    "tokens": 4096,
    "training_flops": 2e15,
    "active_parameters": 1,
    "total_parameters": 2,
    "forward_flops_per_token": 3e6,
    "values_read": None,
    "decode_bytes": {"1": 2e6, "64": 7e6},
}
END: dict[str, Any] = {
    "kind": "end",
    "diverged": None,
    "health": {},
    "answers": None,
    "seconds_shared_machine": 1.0,
}
HELD_OUT: dict[str, Any] = {"kind": "held_out", "held_out_loss": 4.0}


def store(folder: Path, arm: str, values: ConfigDict, seed: int = 0) -> Path:
    path = records.run_file(folder, arm, seed)
    head = HEAD | {"seed": seed, "config": records.plain(values)}
    measurements.write(path, [head, {"kind": "step", "tokens": 1, "loss": 4.0}, HELD_OUT, END])
    return path


@pytest.fixture
def heads() -> ConfigDict:
    return configuration("heads", "two", "smoke")


def extended(monkeypatch: pytest.MonkeyPatch, default: int) -> None:
    """Adds a field and a section to the base configuration."""
    get_config = base.get_config

    def with_more() -> ConfigDict:
        config = get_config()
        config.model.memory.new_field = default
        config.new_section = ConfigDict({"inner": ConfigDict({"names": ("a", "b")})})
        return config

    monkeypatch.setattr(base, "get_config", with_more)


def test_adding_a_field_orphans_no_run(
    heads: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, "heads/two", heads)
    extended(monkeypatch, default=3)
    now = configuration("heads", "two", "smoke")
    assert now.model.memory.new_field == 3
    stored = records.Stored(tmp_path)
    assert list(stored.find(now)) == [0]
    now.model.memory.new_field = 4
    assert not stored.find(now)


def test_a_run_of_a_newer_configuration_matches_an_older_one(
    heads: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extended(monkeypatch, default=3)
    store(tmp_path, "heads/two", configuration("heads", "two", "smoke"))
    assert records.Stored(tmp_path).find(heads)  # which lacks the field


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.ffn_size", 63),
        ("model.memory.scoring", "sum"),
        ("model.memory.read_layers", (1,)),
        ("optimizer.learning_rate", 1e-9),
        ("data.paths", ("x",)),
    ],
)
def test_another_value_is_another_run(
    heads: ConfigDict, tmp_path: Path, path: str, value: Any
) -> None:
    store(tmp_path, "heads/two", heads)
    changed = heads.copy_and_resolve_references()
    changed.update_from_flattened_dict({path: value})
    stored = records.Stored(tmp_path)
    assert stored.find(heads)
    assert not stored.find(changed)
    (difference,) = records.differences(records.plain(heads), records.plain(changed))
    assert difference.startswith(f"{path}: ")


def test_removing_a_field_keeps_the_runs_with_its_fixed_value(
    heads: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, value in enumerate((7, 8)):
        old = heads.copy_and_resolve_references()
        old.model.removed = value
        store(tmp_path, "heads/two", old, seed)
    assert not records.Stored(tmp_path).find(heads)  # the effect of the field is unknown
    monkeypatch.setattr(records, "_REMOVED", {"model.removed": 7})
    assert list(records.Stored(tmp_path).find(heads)) == [0]


def test_a_run_is_found_wherever_it_is_stored(heads: ConfigDict, tmp_path: Path) -> None:
    store(tmp_path, "an_old_name/of_the_arm", heads, 0)
    store(tmp_path, "runs/610a7282cc0a", heads, 1)
    assert list(records.Stored(tmp_path).find(heads)) == [0, 1]


def test_two_files_of_one_run_are_named(heads: ConfigDict, tmp_path: Path) -> None:
    first, second = (store(tmp_path, arm, heads) for arm in ("heads/one", "heads/two"))
    with pytest.raises(measurements.RecordsError, match=f"{second}: the same run as {first}"):
        records.Stored(tmp_path)


def test_every_committed_run_belongs_to_an_arm_and_is_where_a_sweep_stores_it() -> None:
    for folder in COMMITTED.iterdir():
        if folder.is_dir():
            stored = records.Stored(folder)
            belong = {
                path: records.run_file(folder, job.names[0], seed)
                for job in dict.fromkeys(run.jobs_of(folder.name).values())
                for seed, path in stored.paths(job.values).items()
            }
            assert belong == {path: path for path in stored.runs}


def changed(record: dict[str, Any], **fields: Any) -> str:
    return json.dumps(record | fields)


def without(record: dict[str, Any], field: str) -> str:
    return json.dumps({name: value for name, value in record.items() if name != field})


GOOD = [json.dumps(record) for record in (HEAD, HELD_OUT, END)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "0 lines of kind 'run' instead of one"),
        (["not JSON"], "line 1 is not JSON"),
        (["[1]"], "line 1 is not a JSON object"),
        (["[" * 100_000], "line 1 is not JSON"),
        (["\udce9\udcff"], "line 1 is not JSON"),
        ([GOOD[0], GOOD[1], GOOD[2][:30]], "line 3 is not JSON"),
        (GOOD[:2], "0 lines of kind 'end' instead of one"),
        ([*GOOD, GOOD[0]], "2 lines of kind 'run' instead of one"),
        ([GOOD[0], GOOD[2]], "no line of kind 'held_out'"),
        (['{"loss": 1}'], "line 1: kind=None: must be one of run, step"),
        ([without(HEAD, "config"), *GOOD[1:]], "line 1: config: missing"),
        ([changed(HEAD, seed="one"), *GOOD[1:]], "line 1: seed: 'one'"),
        ([changed(HEAD, versions={"jax": "1"}), *GOOD[1:]], "line 1: versions.python: missing"),
        ([changed(HEAD, decode_bytes={"1": 2}), *GOOD[1:]], "line 1: decode_bytes.64: missing"),
        ([GOOD[0], '{"kind": "held_out", "held_out_loss": "4"}', GOOD[2]], "held_out_loss: '4'"),
        ([*GOOD[:2], without(END, "diverged")], "line 3: diverged: missing"),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "heads" / "one" / "seed_0.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(line + "\n" for line in lines), errors="surrogateescape")
    with pytest.raises(measurements.RecordsError) as raised:
        records.Stored(tmp_path)
    text = str(raised.value)
    assert text.startswith(f"{path}: not the records of a finished run: ")
    assert message in text


def test_values_that_are_not_numbers_are_null(tmp_path: Path) -> None:
    path = tmp_path / "a" / "results.jsonl"
    measurements.append(
        path, [{"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}}]
    )
    measurements.append(path, [{"a": 1}])
    assert measurements.read(path) == [{"a": None, "b": [None, 1.5], "c": {"d": None}}, {"a": 1}]
