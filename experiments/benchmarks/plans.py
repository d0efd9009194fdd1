"""Plans of the paper's models on pods that are not attached: stores them, writes docs/plans.md.

    python -m experiments.benchmarks.plans              # missing and outdated plans, then the page
    python -m experiments.benchmarks.plans --limit=0    # only the page
    python -m experiments.benchmarks.plans --only=paper_1b_7b@v6e:8x8

experiments/results/plans/plans.jsonl has one line of JSON per plan; a search stores every program
that it compiled. Cases are planned side by side and stored as they end, so a run that was
interrupted continues where it stopped. A case is planned again if its configuration or `_REVISION`
has changed.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from experiments import cli, measurements
from umv2 import files
from umv2.config.schema import ConfigError

RESULTS = Path("experiments/results/plans/plans.jsonl")
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


def _sharded(
    size: int, layout: str, accumulation: int, fsdp: int = 1
) -> tuple[tuple[str, Any], ...]:
    return (
        ("mesh.fsdp", fsdp),
        ("mesh.memory", size),
        ("mesh.parameters", "fsdp_and_memory"),
        ("mesh.table_sharding", layout),
        ("train.gradient_accumulation", accumulation),
    )


def _replicated(size: int, accumulation: int) -> tuple[tuple[str, Any], ...]:
    return (("mesh.replica", size), ("train.gradient_accumulation", accumulation))


# Shown first on the page, with the work of a step by its parts.
SHOWN = (
    Case("paper_227m_1b2", "v5e:4x4", _sharded(4, "rows", 48, fsdp=4)),
    Case("paper_227m_1b2", "v5p:2x2x1", _replicated(4, 12)),
    Case("paper_227m_1b2", "h200:8", _replicated(8, 12)),
    Case("paper_1b_7b", "h200:8", _sharded(8, "columns", 64)),
    Case("paper_1b_7b", "v6e:8x8", _sharded(8, "rows", 16, fsdp=8)),
    Case("paper_2b5_120b_top256", "v5p:4x4x8", _sharded(64, "rows", 8, fsdp=2)),
)
LAYOUTS = tuple(
    Case("paper_1b_7b", "h200:64", _sharded(size, layout, 16))
    for size in (4, 16, 64)
    for layout in ("rows", "columns")
)
TABLE = tuple(Case(model, machine) for machine in MACHINES for model in MODELS)
# Raise it when the training step changes, so that all cases are planned again.
_REVISION = 3

_LIMIT = flags.DEFINE_integer("limit", 1000, "Cases to plan before the document is written.", 0)
_ONLY = flags.DEFINE_list("only", [], "Names of cases, such as paper_1b_7b@v6e:8x8; default: all.")
_TRIES = flags.DEFINE_integer("tries", 8, "Most programs that a search compiles.", 1)
_WORKERS = flags.DEFINE_integer(
    "workers", None, "Cases planned at a time; default: as many as cores and memory allow.", 1
)
# A search stops after this many meshes that fit.
_ENOUGH = 4


def cases() -> Iterator[Case]:
    """Yields every case once."""
    yield from dict.fromkeys((*SHOWN, *LAYOUTS, *TABLE))


def identity(case: Case) -> str:
    """Returns a digest of what the plans of a case depend on."""
    from umv2.config import to_dict

    text = json.dumps([_REVISION, to_dict(_config(case))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _config(case: Case) -> Any:
    from umv2.config import from_config_dict

    values = importlib.import_module(f"configs.{case.model}").get_config()
    values.update_from_flattened_dict(dict(case.fields))
    return from_config_dict(values)


def run(case: Case) -> list[dict[str, Any]]:
    """Plans a case.

    Returns:
      A record of each compiled program, best first; if there is none, one of the error, or of the
      memory that the model needs at least.

    Raises:
      Killed: a compiler was killed, probably because this machine ran out of memory.
    """
    from umv2.config.schema import UserError
    from umv2.planning import ahead_of_time, plan, search, topology

    config = _config(case)
    about: dict[str, Any] = {"case": case.name, "identity": identity(case)}
    try:
        if case.fields or case.step != "train":
            step: Any = case.step
            planned = plan.plan(case.model, config, case.machine, step, timeout_seconds=900)
            return [planned.as_dict() | about | {"candidates": 1}]
        searched = search.search(
            case.model,
            config,
            case.machine,
            limit=_TRIES.value,
            enough=_ENOUGH,
            remat=(config.model.remat,),
            max_workers=1,  # other cases run beside it
        )
    except ahead_of_time.Killed:
        raise
    except UserError as error:
        return [about | {"error": str(error)}]
    except RuntimeError as error:  # from JAX or a compiler
        lines = [line for line in str(error).splitlines() if re.match(r"\w+(\.\w+)*Error: ", line)]
        return [about | {"error": (lines or ["RuntimeError"])[-1][:300]}]
    about["candidates"] = searched.num_candidates
    if not searched.plans:
        capacity = topology.parse(case.machine).chip.memory_bytes
        return [about | {"least_bytes": searched.least_bytes, "capacity": capacity}]
    return [each.as_dict() | about for each in searched.plans]


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


def document(planned: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the text of docs/plans.md."""
    parts = [_INTRODUCTION]
    for case in SHOWN:
        if records := planned.get(case.name):
            parts.append(f"### {case.model} on {case.machine}\n\n{_table([(case.model, records)])}")
            if records[0].get("measured", {}).get("program", {}).get("sources"):
                parts.append(_breakdown(records[0]))
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
            (case.model, planned.get(case.name) or [{"error": "not planned yet"}])
            for case in TABLE
            if case.machine == machine
        ]
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

The compiler runs until it has optimised the program and assigned its buffers, and stops before it
generates code, which would take minutes: add `--plan_code` for the compiler's own estimate of the
time, and to see that it accepts every kernel.

Rematerialisation is `kernels`, as in the configurations. For each model the search compiles at most
eight candidates, of each size of `mesh.memory` first the one that its estimate prefers, with as few
microbatches as fit, and stops after four meshes that fit. So the tables show the best of a few. The
430M model has 789^2 rows per table, an odd number, which leaves only columns; the 500M model's
964^2 rows are divisible by at most 16.

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
        return _row_without_plan(name, record)
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


def _row_without_plan(name: str, record: dict[str, Any]) -> str:
    if "error" in record:
        return f"| {name} |" + " |" * 12 + f" {record['error']} |"
    least = f"{_gib(record['least_bytes'])} of {_gib(record['capacity'])}"
    verdict = "cannot fit" if not record["candidates"] else "nothing expected to fit"
    return f"| {name} |" + " |" * 6 + f" at least {least} |" + " |" * 5 + f" {verdict} |"


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


def _breakdown(record: dict[str, Any]) -> str:
    """Returns what moves the bytes of a step, in GB per device, by part of the model and by phase.

    Parts that move less than one per cent are summed.
    """
    program, seconds = record["measured"]["program"], record["seconds"]
    whole = program["bytes"]
    lines = [
        "| part | forward | again | backward | GB | share |",
        "|" + " --- |" * 6,
    ]
    rest = 0
    for source in program["sources"]:
        total = sum(source["bytes"].values())
        if total < whole / 100:
            rest += total
            continue
        phases = (source["bytes"].get(phase, 0) for phase in ("forward", "remat", "backward"))
        cells = [f"{size / 1e9:,.0f}" if size else "" for size in (*phases, total)]
        lines.append(f"| {' | '.join([source['source'], *cells])} | {total / whole:.0%} |")
    lines.append(f"| other | | | | {rest / 1e9:,.0f} | {rest / whole:.0%} |")
    ratio = seconds["HBM"] / seconds["compute"]
    padded = program["bytes"] / program["unpadded_bytes"]
    share = record["model_flops"] / program["flops"]
    faults = sum(record["measured"]["faults"].values())
    return "\n".join([
        *lines,
        "",
        f"HBM over compute: {ratio:.2f}; links over compute:"
        f" {seconds['interconnect'] / seconds['compute']:.2f}; padded over unpadded bytes:"
        f" {padded:.2f}; FLOPs of the model over those of the program: {share:.2f}; score arrays,"
        " table-sized slices and reductions in the layer loop, and sorts and kernels that run"
        f" again: {faults or 'none'}.",
    ])  # fmt: skip


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**30:,.1f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def main(argv: list[str]) -> None:
    """Plans the missing and the outdated cases and writes the document."""
    del argv
    from umv2.planning import search

    if unknown := set(_ONLY.value) - {case.name for case in cases()}:
        raise ConfigError(
            f"--only={sorted(unknown)[0]}: unknown case; see experiments/benchmarks/plans.py"
        )
    known = stored(RESULTS)
    missing = [
        case
        for case in cases()
        if (not _ONLY.value or case.name in _ONLY.value)
        and all(record.get("identity") != identity(case) for record in known.get(case.name, []))
    ]
    missing = missing[: _LIMIT.value]
    killed = _plan(missing, _WORKERS.value or search.num_workers())
    for case in _plan(killed, 1):  # each alone has more memory
        logging.error("%s: killed, probably for lack of memory; run this again", case.name)
    files.write_text(DOCUMENT, document(stored(RESULTS)))


def _plan(chosen: Sequence[Case], num_workers: int) -> list[Case]:
    """Plans cases side by side and stores each as it ends; returns those that were killed."""
    from umv2.planning import ahead_of_time

    killed = []
    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        runs = {pool.submit(run, case): case for case in chosen}
        try:
            for ended in concurrent.futures.as_completed(runs):
                case = runs[ended]
                try:
                    records = ended.result()
                except ahead_of_time.Killed as error:
                    logging.warning("%s: %s", case.name, error)
                    killed.append(case)
                    continue
                _store(case, records)
                logging.info("%s: %s", case.name, _outcome(records[0]))
        finally:  # an interruption ends the cases that run, and starts no other
            for each in runs:
                each.cancel()
    return killed


def _store(case: Case, records: Sequence[dict[str, Any]]) -> None:
    """Replaces the stored records of a case; drops those of cases that no longer exist."""
    names = {each.name for each in cases()} - {case.name}
    kept = [record for name, old in stored(RESULTS).items() if name in names for record in old]
    about = measurements.about()
    measurements.write(RESULTS, [*kept, *(about | record for record in records)])


def _outcome(record: dict[str, Any]) -> str:
    return str(record.get("verdict") or record.get("error") or "cannot fit")


if __name__ == "__main__":
    cli.run(main)
