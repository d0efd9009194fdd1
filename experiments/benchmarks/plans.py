"""Plans of the paper's models on pods that are not attached: stores them, writes docs/plans.md.

    python -m experiments.benchmarks.plans              # missing plans, then the page
    python -m experiments.benchmarks.plans --limit=0    # only the page
    python -m experiments.benchmarks.plans --only=paper_1b_7b@v6e:8x8

experiments/results/plans/plans.jsonl has one line of JSON per plan; a search stores every program
that it compiled. Programs are compiled one after the other, which takes minutes each.
"""

import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags, logging

from experiments import cli, measurements
from umv2 import files
from umv2.config.schema import ConfigError

RESULTS = Path("experiments/results/plans/plans.jsonl")
ARITHMETIC = Path("experiments/results/plans/arithmetic.jsonl")
DOCUMENT = Path("docs/plans.md")
MACHINES = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16", "tpu7x:4x4x4", "h200:8")
MODELS = (
    "paper_227m_1b2",
    "paper_430m_5b",
    "paper_500m_6b8",
    "paper_1b_7b",
    "paper_2b5_25b",
    "paper_2b5_60b_top768",
    "paper_2b5_120b_top256",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a machine; where `fields` are given, they are set and nothing is searched."""

    model: str
    machine: str
    fields: tuple[tuple[str, Any], ...] = ()
    step: str = "train"

    @property
    def name(self) -> str:
        """The complete case as text, the key of its stored records."""
        changes = "".join(f" {path}={value}" for path, value in self.fields)
        return f"{self.model}@{self.machine}{'' if self.step == 'train' else ' decode'}{changes}"


def _sharded(size: int, layout: str, accumulation: int) -> tuple[tuple[str, Any], ...]:
    return (
        ("mesh.memory", size),
        ("mesh.parameters", "fsdp_and_memory"),
        ("mesh.table_sharding", layout),
        ("train.gradient_accumulation", accumulation),
    )


# Shown first on the page. One sequence at a time per device.
SHOWN = (
    Case("paper_227m_1b2", "v5e:4x4", _sharded(16, "rows", 48)),
    Case("paper_1b_7b", "v6e:8x8", _sharded(64, "rows", 16)),
    Case("paper_2b5_120b_top256", "v5p:4x4x8", _sharded(128, "rows", 8)),
)
LAYOUTS = tuple(
    Case("paper_1b_7b", "h200:64", _sharded(size, layout, 16))
    for size in (4, 16, 64)
    for layout in ("rows", "columns")
)
# Meshes chosen by hand, because the first ones of the search did not fit.
CHOSEN = {
    ("paper_430m_5b", "h200:8"): _sharded(8, "columns", 24),
    ("paper_500m_6b8", "h200:8"): (  # no fsdp_and_memory: D_k = 524 is not a multiple of eight
        ("mesh.memory", 8),
        ("mesh.table_sharding", "columns"),
        ("train.gradient_accumulation", 24),
    ),
    ("paper_1b_7b", "h200:8"): _sharded(8, "columns", 32),
}
TABLE = tuple(
    Case(model, machine, CHOSEN.get((model, machine), ()))
    for machine in MACHINES
    for model in MODELS
)

_LIMIT = flags.DEFINE_integer("limit", 1000, "Cases to plan before the document is written.", 0)
_ONLY = flags.DEFINE_list("only", [], "Names of cases, such as paper_1b_7b@v6e:8x8; default: all.")
_TRIES = flags.DEFINE_integer("tries", 3, "Most programs that a search compiles.", 1)


def cases() -> Iterator[Case]:
    """Yields every case once."""
    yield from dict.fromkeys((*SHOWN, *LAYOUTS, *TABLE))


def run(case: Case) -> list[dict[str, Any]]:
    """Plans a case; returns a record of each compiled program, best first, or of the error."""
    from umv2.config import from_config_dict
    from umv2.config.schema import UserError
    from umv2.planning import plan, search

    values = importlib.import_module(f"configs.{case.model}").get_config()
    values.update_from_flattened_dict(dict(case.fields))
    config = from_config_dict(values)
    try:
        if case.fields or case.step != "train":
            plans = [plan.plan(case.model, config, case.machine, case.step, timeout_seconds=900)]  # type: ignore[arg-type]  # a step by name
            num_candidates = 1
        else:
            searched = search.search(
                case.model,
                config,
                case.machine,
                limit=_TRIES.value,
                enough=1,
                remat=(config.model.remat,),
            )
            plans, num_candidates = list(searched.plans), searched.num_candidates
    except UserError as error:
        return [{"case": case.name, "error": str(error)}]
    except RuntimeError as error:  # from JAX or a compiler
        lines = [line for line in str(error).splitlines() if re.match(r"\w+(\.\w+)*Error: ", line)]
        return [{"case": case.name, "error": (lines or ["RuntimeError"])[-1][:300]}]
    return [each.as_dict() | {"case": case.name, "candidates": num_candidates} for each in plans]


def estimate(case: Case) -> dict[str, Any]:
    """Returns the estimate of a case by arithmetic, without a compiler."""
    from umv2.config import from_config_dict
    from umv2.planning import ahead_of_time, plan, search_space, topology

    values = importlib.import_module(f"configs.{case.model}").get_config()
    values.update_from_flattened_dict(dict(case.fields))
    config, target = from_config_dict(values), topology.parse(case.machine)
    record: dict[str, Any] = {"case": case.name, "capacity": target.chip.memory_bytes}
    candidates = search_space.candidates(config, target, remat=(config.model.remat,))
    record["candidates"] = len(candidates)
    if not candidates:
        return record | {"least_bytes": search_space.least_bytes(config, target)}
    sizes = search_space.mesh_sizes(candidates[0], target.num_devices)
    parts = ahead_of_time.argument_bytes(candidates[0], sizes, "train")
    return record | {
        "mesh": sizes,
        "fields": plan.fields(candidates[0]),
        "arguments": sum(parts.values()),
        "temporaries": search_space.least_temporaries(candidates[0], sizes, parts, target),
    }


def stored(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the stored records by case name.

    Raises:
      RecordsError: a line is not the record of a case.
      FileError: the file cannot be read.
    """
    records: dict[str, list[dict[str, Any]]] = {}
    for number, record in enumerate(measurements.read(path) if path.exists() else [], start=1):
        if "case" not in record:
            raise measurements.RecordsError(f"{path}: line {number} has no 'case'")
        records.setdefault(record["case"], []).append(record)
    return records


def document(
    planned: dict[str, list[dict[str, Any]]], estimated: dict[str, list[dict[str, Any]]]
) -> str:
    """Returns the text of docs/plans.md."""
    parts = [_INTRODUCTION]
    for case in SHOWN:
        if records := planned.get(case.name):
            parts.append(f"### {case.model} on {case.machine}\n\n{_table([(case.model, records)])}")
    compared = [
        (case.name.partition(" ")[2], planned[case.name])
        for case in LAYOUTS
        if case.name in planned
    ]
    if compared:
        parts.append(_LAYOUTS + _layouts(compared))
    parts.append(_TABLES)
    for machine in MACHINES:
        rows = [
            (case.model, planned.get(case.name) or estimated[case.name])
            for case in TABLE
            if case.machine == machine and (case.name in planned or case.name in estimated)
        ]
        if rows:
            parts.append(f"### {machine}\n\n{_table(rows)}")
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# Plans

Does a model fit on a machine, and what bounds its step? `python main.py --mode=plan` compiles the
real training step, with the state donated, for devices that are not attached, and reads memory,
work and collectives from the compiled program:

    python main.py --mode=plan --config=configs/paper_1b_7b.py --topology=v6e:8x8 --search
    python main.py --mode=plan --config=configs/paper_1b_7b.py --topology=h200:8 \\
        --config.mesh.memory=8 --plan_step=decode

Written by `python -m experiments.benchmarks.plans` from `experiments/results/plans/plans.jsonl`.
**Nothing here was timed**: times are lower bounds, what each resource needs at its peak rate
(compute: FLOPs of the matrix products; HBM: bytes that the instructions read and write; links:
bytes that a device receives, over all its links at once), and the longest of them bounds the step.
Sizes are GiB per device; on a TPU7x a device is one of the two cores of a chip. `v5p:4x4x8` counts
chips: 128 of them, which Cloud calls v5p-256, after their cores. A mesh is replica x fsdp x memory
x tensor; `+` shards dense parameters over memory too. FLOPs are those of the program relative to
those of the model: the excess is rematerialisation, and attention to masked positions. Every model
keeps the paper's batch (768 or 1024 sequences of 4,096 tokens), whatever the size of the machine.
'Planned in' is the wall time and memory of planning, on two shared cores. Where a TPU program
reduce-scatters several arrays at once, it is counted as an all-reduce, which receives twice as
much: 'links' is overestimated there.

Rematerialisation is `full`, as in the configurations. For each model the search compiles the most
promising candidates of its estimate, at most three programs, and stops at the first that fits. So
the tables show what fits, not what is best. Rows that were not compiled yet show the estimate, with
'at least' for the temporaries that no compiler can avoid. The 430M model has 789^2 rows per table,
an odd number, which leaves only columns; the 500M model's 964^2 rows are divisible by at most 16.

## Shown"""
_LAYOUTS = """## Value tables by columns and by rows

The 1B/7B model on 64 H200s, one sequence of 4,096 tokens at a time per device, with its tables
sharded over M devices. Received bytes are those over `memory` in one step. On TPUs sharding by
columns is not an option here: table rows are padded to 128 columns, so that 768 / 64 columns take
ten times the memory.

"""
_TABLES = "## All sizes"


def _table(rows: list[tuple[str, list[dict[str, Any]]]]) -> str:
    lines = [
        "| model | mesh | tables | remat | micro-batches | arguments | temporaries | needed | FLOPs"
        " | compute | HBM | links | planned in | verdict |",
        "|" + " --- |" * 14,
    ]
    for name, records in rows:
        lines += [_row(name.removeprefix("paper_"), record) for record in records[:1]]
    return "\n".join(lines)


def _row(name: str, record: dict[str, Any]) -> str:
    if "measured" not in record:
        return _estimate_row(name, record)
    measured, seconds = record["measured"], record["seconds"]
    fields = dict(field.split("=") for field in record["fields"])
    mesh = "x".join(map(str, measured["mesh"].values()))
    plus = "+" if fields["mesh.parameters"] == "fsdp_and_memory" else ""
    program = measured["program"]
    ratio = f"{program['flops'] / record['model_flops']:.2f}" if program else ""
    cells = [
        name,
        mesh + plus,
        measured["table_sharding"] if measured["mesh"]["memory"] > 1 else "",
        fields["model.remat"],
        fields["train.gradient_accumulation"],
        _gib(measured["arguments"]),
        _gib(record["temporaries"]),
        f"{_gib(measured['needed'])} of {_gib(record['capacity'])}",
        ratio,
        *(_time(seconds.get(resource)) for resource in ("compute", "HBM", "interconnect")),
        f"{measured['seconds']:.0f} s, {_gib(measured['process_bytes'])}",
        "fits" if record["fits"] else "does not fit",
    ]
    return "| " + " | ".join(cells) + " |"


def _estimate_row(name: str, record: dict[str, Any]) -> str:
    """Returns the row of a case that was not compiled, or failed to."""
    if "error" in record:
        return f"| {name} |" + " |" * 12 + f" {record['error']} |"
    if "least_bytes" in record and not record["candidates"]:
        least = f"{_gib(record['least_bytes'])} of {_gib(record['capacity'])}"
        return f"| {name} |" + " |" * 6 + f" at least {least} |" + " |" * 5 + " cannot fit |"
    fields = dict(field.split("=") for field in record["fields"])
    plus = "+" if fields["mesh.parameters"] == "fsdp_and_memory" else ""
    needed = record["arguments"] + record["temporaries"]
    cells = [
        name,
        "x".join(map(str, record["mesh"].values())) + plus,
        fields["mesh.table_sharding"] if record["mesh"]["memory"] > 1 else "",
        fields["model.remat"],
        fields["train.gradient_accumulation"],
        _gib(record["arguments"]),
        f"at least {_gib(record['temporaries'])}",
        f"at least {_gib(needed)} of {_gib(record['capacity'])}",
    ]
    verdict = f"may fit, as {record['candidates']} may; not compiled"
    return "| " + " | ".join(cells) + " |" + " |" * 5 + f" {verdict} |"


def _layouts(rows: list[tuple[str, list[dict[str, Any]]]]) -> str:
    lines = [
        "| M | tables | arguments | temporaries | needed | received, GB | planned in |",
        "|" + " --- |" * 7,
    ]
    for name, (record, *_) in rows:
        fields = dict(field.split("=") for field in name.split())
        size, layout = fields["mesh.memory"], fields["mesh.table_sharding"]
        if "measured" not in record:
            lines.append(f"| {size} | {layout} |" + " |" * 3 + f" {record['error']} | |")
            continue
        measured = record["measured"]
        received = ", ".join(
            f"{part['kind']} {part['bytes'] / 1e9:.2f}"
            for part in measured["collectives"]
            if part["axes"] == ["memory"] and part["bytes"] >= 5e6
        )
        cells = [
            size,
            layout,
            _gib(measured["arguments"]),
            _gib(record["temporaries"]),
            f"{_gib(measured['needed'])} of {_gib(record['capacity'])}",
            received,
            f"{measured['seconds']:.0f} s, {_gib(measured['process_bytes'])}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**30:,.1f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def main(argv: list[str]) -> None:
    """Plans the missing cases and writes the document."""
    del argv
    if unknown := set(_ONLY.value) - {case.name for case in cases()}:
        raise ConfigError(
            f"--only={sorted(unknown)[0]}: unknown case; see experiments/benchmarks/plans.py"
        )

    def store(path: Path, records: list[dict[str, Any]]) -> None:
        measurements.append(path, [about | record for record in records])

    about, estimated = measurements.about(), stored(ARITHMETIC)
    for case in TABLE:
        if case.name not in estimated:
            logging.info("%s: arithmetic", case.name)
            estimated[case.name] = [estimate(case)]
            store(ARITHMETIC, estimated[case.name])
    known, num_planned = stored(RESULTS), 0
    for case in cases():
        if case.name in known or num_planned >= _LIMIT.value:
            continue
        if _ONLY.value and case.name not in _ONLY.value:
            continue
        logging.info("%s", case.name)
        store(RESULTS, run(case))
        num_planned += 1
    files.write_text(DOCUMENT, document(stored(RESULTS), estimated))


if __name__ == "__main__":
    cli.run(main)
