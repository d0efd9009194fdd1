"""Whether a configuration fits on a topology that is not attached, and what bounds its step."""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

from umv2 import tables
from umv2.config import Config
from umv2.cost import accounting
from umv2.planning import ahead_of_time, search_space, topology
from umv2.planning.ahead_of_time import Measurement, Step
from umv2.planning.hlo import breakdown
from umv2.planning.hlo.workload import Work

_GIB = 2**30
# What a plan calls the fields of `faults.Faults`.
_FAULTS = {
    "scores": "arrays of attention scores",
    "table_slices": "copies of whole tables in layers",
    "table_reductions": "reductions of whole tables in layers",
    "rematerialised_sorts": "sorts in rematerialised code",
    "rematerialised_kernels": "kernels in rematerialised code",
}
_LESS_REMATERIALISED = {"full": "dots", "dots": "none"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step of a configuration, compiled for a topology; all figures are per device.

    Seconds are bounds and estimates. Nothing here was timed.
    """

    name: str
    config: Config
    target: topology.Topology
    step: Step
    measured: Measurement

    @property
    def num_devices(self) -> int:
        """The number of devices of the mesh."""
        return math.prod(self.measured.mesh.values())

    @property
    def capacity(self) -> int:
        """Bytes of memory that a program may use."""
        return self.measured.available or self.target.chip.memory_bytes

    @property
    def fits(self) -> bool:
        """Whether the step compiles and fits in memory."""
        needed = self.measured.needed
        return self.measured.program is not None and needed is not None and needed <= self.capacity

    @property
    def model_flops(self) -> float:
        """FLOPs of the model by `cost.accounting`, i.e. without rematerialisation."""
        model, length = self.config.model, self.config.data.sequence_length
        if self.step == "train":
            per_token = accounting.training_flops_per_token(self.config)
            return per_token * self.config.train.batch_size * length / self.num_devices
        per_token = sum(accounting.decode_flops_per_token(model, length).values())
        return per_token * self.config.evaluation.batch_size / self.num_devices

    @property
    def seconds(self) -> dict[str, float]:
        """Lower bound of the time that each resource needs; empty if there is no program."""
        program, chip = self.measured.program, self.target.chip
        if program is None:
            return {}
        received = sum(part.bytes for part in self.measured.collectives)
        return {
            "compute": max(program.flops, self.model_flops) / chip.peak_flops,
            "HBM": program.bytes / chip.memory_bandwidth,
            "interconnect": received / chip.link_bandwidth,
        }

    @property
    def bound_seconds(self) -> float | None:
        """The maximum of `seconds`: the step time if all resources overlap perfectly."""
        return max(self.seconds.values(), default=None)

    @property
    def dominant(self) -> str | None:
        """The resource with the largest of `seconds`."""
        return max(self.seconds, key=self.seconds.__getitem__, default=None)

    @property
    def estimated_seconds(self) -> float | None:
        """The compiler's estimate without collectives, from its cycles; None if it has none."""
        program, chip = self.measured.program, self.target.chip
        if program is None or program.cycles is None or chip.flops_per_cycle is None:
            return None
        return program.cycles * chip.flops_per_cycle / chip.peak_flops

    @property
    def verdict(self) -> str:
        """One line that says whether the step fits, and what dominates."""
        measured = self.measured
        if measured.needed is None:
            return f"does not compile: {measured.refusal}"
        filled = f"{_gib(measured.needed)} of {_gib(self.capacity)} GiB"
        if not self.fits:
            largest = max(self._memory_parts(), key=lambda part: part[1])
            return f"does not fit: {filled}; {largest[0]} take {_gib(largest[1])} GiB"
        return f"fits: {filled}; {self.dominant} is the longest bound"

    def advice(self) -> list[str]:
        """Returns suggested changes, each as fields to set and the reason."""
        return list(self._smaller() if not self.fits else self._faster())

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON."""
        return {
            "name": self.name,
            "topology": self.target.name,
            "step": self.step,
            "num_devices": self.num_devices,
            "batch_size": self._batch_size,
            "sequence_length": self.config.data.sequence_length,
            "fields": fields(self.config),
            "measured": dataclasses.asdict(self.measured),
            "temporaries": self.measured.temporaries,
            "capacity": self.capacity,
            "fits": self.fits,
            "model_flops": self.model_flops,
            "seconds": self.seconds,
            "bound_seconds": self.bound_seconds,
            "estimated_seconds": self.estimated_seconds,
            "verdict": self.verdict,
            "advice": self.advice(),
        }

    def as_json(self) -> str:
        """Returns `as_dict` as JSON text."""
        return json.dumps(self.as_dict(), indent=2)

    def as_text(self, width: int | None = None) -> str:
        """Returns the report: memory, work and time of one device, the verdict, and the flags.

        Args:
          width: maximum number of columns of text; None: the width of the terminal.
        """
        measured, chip = self.measured, self.target.chip
        sizes = " x ".join(f"{axis} {size}" for axis, size in measured.mesh.items())
        if measured.mesh["memory"] > 1 and self.config.model.placements:
            sizes += f", tables by {measured.table_sharding}"
        rows: list[tuple[str, ...]] = [
            (f"{self.step} step of {self.name}", f"{self._batch_size} sequences of"
             f" {self.config.data.sequence_length:,} tokens"),
            ("on", f"{self.target.name}: {self.num_devices} x {measured.device_kind}"),
            ("mesh", sizes),
            ("",),
            ("memory of one device",),
            *((f"  {name}", f"{_gib(size)} GiB") for name, size in self._memory_parts()),
            ("  needed", f"{_gib(measured.needed)} of {_gib(self.capacity)} GiB"),
        ]  # fmt: skip
        if program := measured.program:
            times = program.flops / self.model_flops
            rows += [
                ("",),
                ("work of one device",),
                ("  FLOPs of the model", f"{self.model_flops:.4g}"),
                ("  FLOPs of the program", f"{program.flops:.4g} ({times:.2f} times)"),
                ("  bytes of HBM", f"{program.bytes / 1e9:,.2f} GB{_padding(program)}"),
            ]
            rows += [
                (
                    f"  {part.kind} over {' x '.join(part.axes)}",
                    f"{part.bytes / 1e9:,.4f} GB, {part.overlapped / (part.bytes or 1):.0%} of it"
                    " during other work",
                )
                for part in measured.collectives
            ]
            rows += [
                (f"  HBM in {source}", f"{size / 1e9:,.2f} GB") for source, size in program.heaviest
            ]
            rows += [
                (f"  {_FAULTS[name]}", str(count))
                for name, count in measured.faults.items()
                if self.step == "train"
            ]
            rates = {
                "compute": f"{chip.peak_flops / 1e12:,.0f} TFLOP/s",
                "HBM": f"{chip.memory_bandwidth / 1e9:,.0f} GB/s",
                "interconnect": f"{chip.link_bandwidth / 1e9:,.0f} GB/s received",
            }
            rows += [("",), ("time of a step", "no measurement")]
            rows += [
                (f"  {name}, at least", f"{_milliseconds(seconds)} at {rates[name]}")
                for name, seconds in self.seconds.items()
            ]
            estimate = self.estimated_seconds
            rows.append((
                "  the compiler's estimate",
                "none" if estimate is None else f"{_milliseconds(estimate)} without collectives",
            ))  # fmt: skip
        rows += [
            ("",),
            ("planned in", f"{measured.seconds:.0f} s and {_gib(measured.process_bytes)} GiB"),
            ("verdict", self.verdict),
            *(("try", advice) for advice in self.advice()),
        ]
        parts = [tables.table(rows, width, left=(0, 1))]
        if measured.program and measured.program.sources:
            parts.append(breakdown.as_text(measured.program, width))
        return "\n\n".join([*parts, tables.command_line(flags_of(self.config), width)])

    @property
    def _batch_size(self) -> int:
        train = self.step == "train"
        return self.config.train.batch_size if train else self.config.evaluation.batch_size

    def _memory_parts(self) -> list[tuple[str, int]]:
        """Returns the (name, bytes) of the parts of a device's memory."""
        measured = self.measured
        moments = " and their moments" if self.step == "train" else ""
        model = self.config.model
        layers = ((model.placements, "value tables"), (model.ffn == "moe", "experts"))
        sparse = " and ".join(name for present, name in layers if present)
        data = "batch and counters" if self.step == "train" else "cache"
        names = {"dense": f"dense parameters{moments}", "sparse": sparse + moments, "data": data}
        parts = [(names[part], size) for part, size in measured.parts.items() if size]
        padding = measured.arguments - sum(measured.parts.values())
        parts.append(("padding of these", max(0, padding)))
        if measured.temporaries is not None:
            parts.append(("temporaries", measured.temporaries))
        return parts

    def _smaller(self) -> Iterator[str]:
        config, measured = self.config, self.measured
        if measured.arguments > self.capacity / 2:
            change = search_space.smaller_arguments(
                config, self.target.num_devices, self.step, limit=self.capacity // 2
            )
            if change is not None:
                changed, size = change
                yield f"{_changes(config, changed)}: arguments of {_gib(size)} GiB"
            else:
                yield (
                    f"more devices than {self.target.num_devices}: no mesh of these leaves half of"
                    " the memory to temporaries"
                )
        if self.step == "train":
            memory = measured.mesh["memory"]
            if memory > 1 and (other := search_space.other_layout(config, memory)):
                yield f"mesh.table_sharding={other!r}: other temporaries in the memory layers"
            if config.model.remat != "full":
                yield "model.remat='full': keeps the inputs of blocks only"
            if (accumulation := search_space.next_accumulation(config, measured.mesh)) is not None:
                yield (
                    f"train.gradient_accumulation={accumulation}: temporaries of"
                    f" {config.train.batch_size // accumulation} sequences at a time"
                )
            elif measured.mesh["tensor"] == 1 and (measured.temporaries or 0) > self.capacity / 2:
                yield "mesh.tensor=2: each device has one sequence at a time, and would have half"

    def _faster(self) -> Iterator[str]:
        config, measured = self.config, self.measured
        assert measured.needed is not None
        free = self.capacity - measured.needed
        if self.step == "train" and config.train.gradient_accumulation > 1:
            temporaries = measured.temporaries or 0
            fewer = search_space.previous_accumulation(config, measured.mesh)
            grown = temporaries * config.train.gradient_accumulation / (fewer or 1)
            if fewer is not None and grown - temporaries < free:
                yield f"train.gradient_accumulation={fewer}: parameters are gathered less often"
        less = _LESS_REMATERIALISED.get(config.model.remat)
        if self.step == "train" and less and free > self.capacity / 2:
            yield f"model.remat={less!r}: {_gib(free)} GiB are free, and less is computed again"
        if self.dominant == "interconnect":
            part = measured.collectives[0]
            axes = " and ".join(f"mesh.{axis}" for axis in part.axes)
            received = f"{part.kind} over them receives {part.bytes / 1e9:,.2f} GB"
            yield f"smaller {axes}: {received}, most of it in {part.source or 'a fusion'}"


def plan(
    name: str,
    config: Config,
    topology_name: str,
    step: Step = "train",
    *,
    code: bool = False,
    timeout_seconds: float | None = None,
) -> Plan:
    """Compiles a step for a topology, which need not be attached.

    Args:
      name: of the configuration, for the report.
      config: with the mesh to use.
      topology_name: see `topology.parse`.
      step: "train", or "decode" for `evaluation.batch_size` sequences with a full cache.
      code: whether the compiler generates code; see `ahead_of_time.measure`.
      timeout_seconds: limit for the compiler; None: unlimited.

    Raises:
      UserError: the topology is unknown, its compiler is not installed or too slow, or the mesh is
        impossible.
    """
    target = topology.parse(topology_name)
    measured = ahead_of_time.measure(
        config, target, step, code=code, timeout_seconds=timeout_seconds
    )
    return Plan(name=name, config=config, target=target, step=step, measured=measured)


def fields(config: Config) -> list[str]:
    """Returns the searched fields, as 'path=value'."""
    return [f"{path}={value}" for path, value in search_space.values(config).items()]


def flags_of(config: Config) -> list[str]:
    """Returns the command-line flags that set the searched fields."""
    return [f"--config.{field}" for field in fields(config)]


def _changes(before: Config, after: Config) -> str:
    old, new = search_space.values(before), search_space.values(after)
    return " ".join(f"{path}={value}" for path, value in new.items() if old[path] != value)


def _padding(program: Work) -> str:
    """Returns how many times its bytes without padding a program moves, if it pads."""
    if not program.unpadded_bytes or program.bytes == program.unpadded_bytes:
        return ""
    return f" ({program.bytes / program.unpadded_bytes:.2f} times those without padding)"


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / _GIB:,.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:,.2f} s"
