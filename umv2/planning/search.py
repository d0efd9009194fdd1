"""Searches the mesh, rematerialisation and gradient accumulation for a training step."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import tqdm
from absl import logging

from umv2 import tables
from umv2.config import Config
from umv2.planning import ahead_of_time, plan, search_space, topology

# Expected temporaries of a program, relative to the lower bound: of the first program ...
_FIRST_FACTOR = 2.0
# ... and of later ones, relative to the ratio of the last compiled program.
_SLACK = 0.8
# A compiler that runs out of memory may take very long trying to need less.
_TIMEOUT_SECONDS = 600.0


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
) -> Search:
    """Compiles the training step for the most promising candidates, one at a time.

    Searches over meshes of all devices, layouts of value tables, the axes that shard dense
    parameters, rematerialisation policies, and gradient accumulation. Skips candidates that cannot
    fit by arithmetic, or that are expected not to fit given the programs compiled so far.

    Args:
      name: of the configuration, for the report.
      config: fixes everything that is not searched.
      topology_name: see `topology.parse`.
      limit: maximum number of programs to compile.
      enough: stops after this many programs that fit; None: does not stop early.
      remat: rematerialisation policies to try.

    Raises:
      UserError: the topology is unknown, or its compiler is not installed.
    """
    target = topology.parse(topology_name)
    queue = search_space.candidates(config, target, remat=remat)
    num_candidates, plans, num_timeouts = len(queue), list[plan.Plan](), 0
    # Meshes and policies of which a program fits, with the fewest microbatches: these come first.
    num_fitting, done = 0, set[Any]()
    factors: dict[str, float] = {}  # by policy: temporaries of a program / their lower bound
    with tqdm.tqdm(total=min(limit, num_candidates), disable=not sys.stderr.isatty()) as bar:
        while queue and len(plans) + num_timeouts < limit and num_fitting != enough:
            candidate = queue.pop(0)
            if (candidate.mesh, candidate.model.remat) in done:
                continue
            sizes = search_space.mesh_sizes(candidate, target.num_devices)
            parts = ahead_of_time.argument_bytes(candidate, sizes, "train")
            least = search_space.least_temporaries(candidate, sizes, parts, target)
            factor = factors.get(candidate.model.remat)
            expected = least * (_FIRST_FACTOR if factor is None else max(1.0, _SLACK * factor))
            if sum(parts.values()) + expected > target.chip.memory_bytes:
                continue
            bar.update()
            try:
                plan_ = plan.plan(name, candidate, topology_name, timeout_seconds=_TIMEOUT_SECONDS)
            except ahead_of_time.TooSlow as error:
                logging.info("%s: %s", " ".join(plan.fields(candidate)), error)
                num_timeouts += 1
                continue
            plans.append(plan_)
            if plan_.fits:
                num_fitting += 1
                done.add((candidate.mesh, candidate.model.remat))
            if plan_.measured.temporaries is not None:
                factors[candidate.model.remat] = plan_.measured.temporaries / least
            logging.info("%s: %s", " ".join(plan.fields(candidate)), plan_.verdict)
    plans.sort(key=lambda plan_: (not plan_.fits, *_time(plan_)))
    least_bytes = search_space.least_bytes(config, target)
    return Search(plans=tuple(plans), num_candidates=num_candidates, least_bytes=least_bytes)


def _time(plan_: plan.Plan) -> tuple[float, float]:
    """Returns the bound; the sum over resources breaks ties."""
    return plan_.bound_seconds or 0.0, sum(plan_.seconds.values())


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"
