"""Searches the mesh, rematerialisation and gradient accumulation for a training step."""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import tqdm
from absl import logging

from umv2 import tables
from umv2.config import Config
from umv2.config.schema import UserError
from umv2.planning import ahead_of_time, plan, search_space, topology

# Temporaries of the first program relative to their lower bound, as expected.
_FIRST_FACTOR = 1.5
# The most that one program makes others expect: theirs may be much smaller.
_MOST_FACTOR = 4.0
# A compiler that runs out of memory may take very long trying to need less.
_TIMEOUT_SECONDS = 600.0
# Memory of the first process that compiles, as expected: the 120B model for 128 chips takes 1.2 GiB
# without code.
_PROCESS_BYTES = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Search:
    """Compiled plans of a training step: those that fit first, then sorted by time bound.

    Attributes:
      plans: the compiled candidates.
      num_candidates: number of candidates that may fit by arithmetic; only the most promising ones
        were compiled.
      least_bytes: lower bound of the memory per device, on the mesh that needs the least.
    """

    plans: tuple[plan.Plan, ...]
    num_candidates: int
    least_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "num_candidates": self.num_candidates,
            "least_bytes": self.least_bytes,
            "plans": [plan_.as_dict() for plan_ in self.plans],
        }

    def as_json(self) -> str:
        """Returns `as_dict` as JSON text."""
        return json.dumps(self.as_dict(), indent=2)

    def as_text(self, width: int | None = None) -> str:
        """Returns a table with one row per program, and the flags of the best one that fits.

        Args:
          width: maximum number of columns of text; None: the width of the terminal.
        """
        short = [path.rpartition(".")[2] for path in search_space.PATHS]
        rows: list[tuple[str, ...]] = [
            ("", *short, "needed GiB", "compute ms", "HBM ms", "links ms", "compiler's ms")
        ]
        for rank, plan_ in enumerate(self.plans, start=1):
            times = [_milliseconds(plan_.seconds.get(name)) for name in _RESOURCES]
            needed = plan_.measured.needed
            rows.append(
                (
                    f"{rank} {'fits' if plan_.fits else 'too large'}",
                    *map(str, search_space.values(plan_.config).values()),
                    "?" if needed is None else f"{needed / 2**30:,.1f}",
                    *times,
                    _milliseconds(plan_.estimated_seconds),
                )
            )
        best = self.plans[0] if self.plans else None
        explained = (
            f"Compiled {len(self.plans)} of {self.num_candidates} that may fit. Times are the least"
            " that each resource needs, and the compiler's estimate without collectives: nothing"
            " was timed."
        )
        lines = [tables.table(rows, width), "", tables.paragraph(explained, width)]
        if best is None or not best.fits:
            nothing = (
                "Nothing that was compiled fits: take more devices, or a smaller batch. By"
                f" arithmetic a device needs at least {self.least_bytes / 2**30:,.1f} GiB."
            )
            lines.append(tables.paragraph(nothing, width))
        else:
            lines.append(tables.command_line(plan.flags_of(best.config), width))
        return "\n".join(lines)


_RESOURCES = ("compute", "HBM", "interconnect")


def search(
    name: str,
    config: Config,
    topology_name: str,
    *,
    limit: int,
    enough: int | None = None,
    remat: Sequence[str] = search_space.REMAT,
    code: bool = False,
    max_workers: int | None = None,
) -> Search:
    """Compiles the training step for the most promising candidates, some at a time.

    Searches over meshes of all devices, layouts of value tables, the axes that shard dense
    parameters, rematerialisation policies, and gradient accumulation. Skips candidates that cannot
    fit by arithmetic, or that are expected not to fit given the programs compiled so far. The best
    of each size of `mesh.memory` come first. Of each mesh and policy it seeks the fewest
    microbatches that fit. Candidates that fail to compile are logged and skipped.

    Args:
      name: of the configuration, for the report.
      config: fixes everything that is not searched.
      topology_name: see `topology.parse`.
      limit: maximum number of programs to compile.
      enough: stops after this many meshes and policies that fit; None: does not stop early.
      remat: rematerialisation policies to try.
      code: whether the compiler generates code; see `ahead_of_time.measure`.
      max_workers: programs compiled at a time; None: as many as cores and memory allow.

    Raises:
      UserError: the topology is unknown, its compiler is not installed, or no candidate compiles.
      RuntimeError: no candidate compiles.
    """
    target = topology.parse(topology_name)
    candidates = search_space.candidates(config, target, remat=remat)
    queue = _Queue(candidates, target.chip.memory_bytes)
    plans, failures, num_tries = list[plan.Plan](), list[Exception](), 0

    def compile_plan(candidate: Config) -> plan.Plan:
        return plan.plan(
            name, candidate, topology_name, code=code, timeout_seconds=_TIMEOUT_SECONDS
        )

    with tqdm.tqdm(total=min(limit, len(candidates)), disable=not sys.stderr.isatty()) as bar:
        while num_tries < limit and (enough is None or queue.num_fitting < enough):
            size = min(max_workers or num_workers(plans), limit - num_tries)
            batch = queue.next(size)
            if not batch:
                break
            with concurrent.futures.ThreadPoolExecutor(len(batch)) as pool:
                compilations = [pool.submit(compile_plan, candidate) for candidate in batch]
            for candidate, compilation in zip(batch, compilations, strict=True):
                error = compilation.exception()
                if isinstance(error, ahead_of_time.Killed) and len(batch) > 1:
                    max_workers = 1  # not enough memory for several; it gets another try alone
                    continue
                num_tries += 1
                bar.update()
                if error is None:
                    plans.append(compilation.result())
                    queue.record(candidate, plans[-1])
                    logging.info("%s: %s", " ".join(plan.fields(candidate)), plans[-1].verdict)
                elif isinstance(error, (UserError, RuntimeError)):
                    failures.append(error)
                    queue.discard(candidate)
                    logging.warning("%s: %s", " ".join(plan.fields(candidate)), error)
                else:
                    raise error
    if failures and not plans:
        raise failures[0]
    plans.sort(key=lambda plan_: (not plan_.fits, *_time(plan_)))
    least_bytes = search_space.least_bytes(config, target)
    return Search(tuple(plans), len(candidates), least_bytes)


@dataclasses.dataclass
class _Group:
    """Candidates that differ in the number of microbatches only, fewest first.

    Attributes:
      candidates: those that may still be the first to fit.
      points: the lower bound and the temporaries of each program that was compiled.
      fits: whether any program fits.
    """

    candidates: list[search_space.Candidate]
    points: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    fits: bool = False

    def expected(self, least: int, factor: float) -> float:
        """Returns the expected temporaries of a candidate whose lower bound is `least`.

        They lie on the line through the last two programs. With one, they are proportional to the
        lower bound; with none, `factor` times the lower bound.
        """
        if not self.points:
            return factor * least
        (x0, y0), (x1, y1) = ((0, 0), *self.points)[-2:]
        slope = max(0.0, (y1 - y0) / (x1 - x0)) if x1 != x0 else 0.0
        return y1 + slope * (least - x1)


class _Queue:
    """Decides which candidates to compile, from the programs compiled so far."""

    def __init__(self, candidates: Sequence[search_space.Candidate], capacity: int):
        """Initialises the queue.

        Args:
          candidates: fastest predicted first.
          capacity: bytes of memory of a device.
        """
        self._capacity = capacity
        self._factors: dict[str, float] = {}  # by policy, of the last program
        self._groups: dict[Hashable, _Group] = {}
        for candidate in candidates:
            key = _key(candidate.config)
            self._groups.setdefault(key, _Group([])).candidates.append(candidate)
        for group in self._groups.values():
            group.candidates.sort(key=lambda each: each.config.train.gradient_accumulation)
        ranks = collections.Counter[int]()  # by size of `mesh.memory`
        order = dict[Hashable, int]()
        for key, group in self._groups.items():
            size = group.candidates[0].config.mesh.memory
            order[key], ranks[size] = ranks[size], ranks[size] + 1
        self._order = sorted(self._groups, key=order.__getitem__)  # stable

    @property
    def num_fitting(self) -> int:
        """The number of meshes and policies of which a program fits."""
        return sum(group.fits for group in self._groups.values())

    def next(self, count: int) -> list[Config]:
        """Returns up to `count` candidates to compile, of different meshes or policies."""
        nexts = (self._next(self._groups[key]) for key in self._order)
        return list(itertools.islice((each for each in nexts if each is not None), count))

    def _next(self, group: _Group) -> Config | None:
        for candidate in group.candidates:
            factor = self._factors.get(candidate.config.model.remat, _FIRST_FACTOR)
            expected = group.expected(candidate.temporaries, factor)
            if candidate.arguments + expected <= self._capacity:
                return candidate.config
        return None

    def record(self, config: Config, plan_: plan.Plan) -> None:
        """Records the plan of a candidate."""
        group = self._groups[_key(config)]
        index = [each.config for each in group.candidates].index(config)
        tried = group.candidates[index]
        if (temporaries := plan_.measured.temporaries) is not None:
            group.points.append((tried.temporaries, temporaries))
            factor = temporaries / tried.temporaries
            self._factors[config.model.remat] = min(max(1.0, factor), _MOST_FACTOR)
        if plan_.fits:
            group.candidates, group.fits = group.candidates[:index], True
        else:
            group.candidates = group.candidates[index + 1 :]

    def discard(self, config: Config) -> None:
        """Removes a candidate that does not compile, and all with its mesh and policy."""
        self._groups[_key(config)].candidates = []


def _key(config: Config) -> Hashable:
    return config.mesh, config.model.remat


def num_workers(plans: Sequence[plan.Plan] = ()) -> int:
    """Returns how many programs to compile at a time, given how much memory some plans took."""
    most = max((plan_.measured.process_bytes for plan_ in plans), default=_PROCESS_BYTES)
    return max(1, min(os.cpu_count() or 1, _available_bytes() // most))


def _available_bytes() -> int:
    """Returns the memory that new processes can use, on Linux; 0 if it is unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    sizes = dict(line.split(":") for line in lines)
    return int(sizes.get("MemAvailable", "0 kB").split()[0]) * 1024


def _time(plan_: plan.Plan) -> tuple[float, float]:
    """Returns the bound; the sum over resources breaks ties."""
    return plan_.bound_seconds or 0.0, sum(plan_.seconds.values())


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"
