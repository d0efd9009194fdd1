"""Which mesh, rematerialisation and gradient accumulation to rent a machine with."""

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

# Temporaries of programs, of the least possible: what is expected of the first program ...
_FIRST_FACTOR = 2.0
# ... and how far others may fall below those that were compiled.
_DOUBT = 0.8
# Compilers that run out of memory try for long to need less.
_TIMEOUT_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Search:
    """Plans of a training step, those that fit first, each group by its bound.

    `num_candidates` is how many may fit by arithmetic; of these the most promising were compiled.
    `least_bytes` is what a device needs by arithmetic on the mesh that takes the least.
    """

    plans: tuple[plan.Plan, ...]
    num_candidates: int
    least_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "num_candidates": self.num_candidates,
            "least_bytes": self.least_bytes,
            "plans": [found.as_dict() for found in self.plans],
        }

    def as_json(self) -> str:
        """Returns `as_dict` as text."""
        return json.dumps(self.as_dict(), indent=2)

    def as_text(self, width: int | None = None) -> str:
        """Returns a table, a row for each program, and the flags of the best that fits.

        Args:
          width: columns that they take at most; None: as many as the terminal has.
        """
        short = [path.rpartition(".")[2] for path in search_space.PATHS]
        rows: list[tuple[str, ...]] = [
            ("", *short, "needed GiB", "compute ms", "HBM ms", "links ms", "compiler's ms")
        ]
        for rank, found in enumerate(self.plans, start=1):
            times = [_milliseconds(found.seconds.get(name)) for name in _RESOURCES]
            needed = found.measured.needed
            rows.append(
                (
                    f"{rank} {'fits' if found.fits else 'too large'}",
                    *map(str, search_space.values(found.config).values()),
                    "?" if needed is None else f"{needed / 2**30:,.1f}",
                    *times,
                    _milliseconds(found.estimated_seconds),
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
    """Compiles the training step with what is most promising, one program after the other.

    Tries meshes over all devices, layouts of value tables, what shards dense parameters, policies
    of rematerialisation, and gradient accumulation. What cannot fit by arithmetic is left out, and
    so is what the programs compiled so far lead to expect too large.

    Args:
      name: of the configuration, for the report.
      config: all but what is tried stays as it is.
      topology_name: as `topology.parse` takes it.
      limit: programs to compile.
      enough: of those that fit; None: all.
      remat: policies of rematerialisation to try.

    Raises:
      UserError: an unknown topology, or a compiler that is missing.
    """
    place = topology.parse(topology_name)
    waiting = search_space.candidates(config, place, remat=remat)
    num_candidates, plans, given_up = len(waiting), list[plan.Plan](), 0
    fitting, settled = 0, set[Any]()  # meshes and policies that fit: fewer microbatches came first
    factors: dict[str, float] = {}  # by policy: temporaries of programs, of the least possible
    with tqdm.tqdm(total=min(limit, num_candidates), disable=not sys.stderr.isatty()) as bar:
        while waiting and len(plans) + given_up < limit and fitting != enough:
            candidate = waiting.pop(0)
            if (candidate.mesh, candidate.model.remat) in settled:
                continue
            sizes = search_space.mesh_sizes(candidate, place.num_devices)
            parts = ahead_of_time.argument_bytes(candidate, sizes, "train")
            least = search_space.least_temporaries(candidate, sizes, parts, place)
            factor = factors.get(candidate.model.remat)
            expected = least * (_FIRST_FACTOR if factor is None else max(1.0, _DOUBT * factor))
            if sum(parts.values()) + expected > place.chip.memory_bytes:
                continue
            bar.update()
            try:
                found = plan.plan(name, candidate, topology_name, timeout_seconds=_TIMEOUT_SECONDS)
            except ahead_of_time.TooSlow as error:
                logging.info("%s: %s", " ".join(plan.fields(candidate)), error)
                given_up += 1
                continue
            plans.append(found)
            if found.fits:
                fitting += 1
                settled.add((candidate.mesh, candidate.model.remat))
            if found.measured.temporaries is not None:
                factors[candidate.model.remat] = found.measured.temporaries / least
            logging.info("%s: %s", " ".join(plan.fields(candidate)), found.verdict)
    plans.sort(key=lambda found: (not found.fits, *_time(found)))
    least_bytes = search_space.least_bytes(config, place)
    return Search(plans=tuple(plans), num_candidates=num_candidates, least_bytes=least_bytes)


def _time(found: plan.Plan) -> tuple[float, float]:
    """The bound, and among equals the sum over resources."""
    return found.bound_seconds or 0.0, sum(found.seconds.values())


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"
