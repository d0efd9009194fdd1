"""Inspection of a configuration: its parameters, their counts, and FLOPs."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from umv2 import sharding, tables
from umv2.config import Config, to_dict
from umv2.cost import accounting, exchange
from umv2.model import weights


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of the weights."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sharding: str
    group: str

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The resolved configuration, its parameters, their counts, and FLOPs per token."""

    config: Config
    parameters: tuple[Parameter, ...]
    counts: accounting.ParameterCounts
    flops_per_token: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Returns all fields as plain values, for JSON."""
        return {
            "config": to_dict(self.config),
            "parameters": [dataclasses.asdict(parameter) for parameter in self.parameters],
            "counts": self.counts.as_dict(),
            "forward_flops_per_token": self.flops_per_token,
        }

    def as_text(self, width: int | None = None) -> str:
        """Returns the configuration and tables of parameters, counts and FLOPs.

        Args:
          width: maximum width in columns; None: that of the terminal.
        """
        rows = [("parameter", "shape", "dtype", "sharding", "optimizer group", "entries")]
        for p in self.parameters:
            shape = " x ".join(map(str, p.shape)) or "scalar"
            rows.append((p.name, shape, p.dtype, p.sharding, p.group, f"{p.size:,}"))
        counts = [("count", "parameters")]
        counts += [(name, f"{value:,}") for name, value in self.counts.as_dict().items()]
        flops = [("forward pass", "MFLOP/token")]
        flops += [(name, f"{value / 1e6:,.3f}") for name, value in self.flops_per_token.items()]
        config = [tables.paragraph(line, width) for line in _lines(to_dict(self.config))]
        parts = [tables.table(rows, width, left=range(5), rule=True)]
        parts += [tables.table(each, width, rule=True) for each in (counts, flops)]
        return "\n\n".join(["\n".join(config), *parts])


def inspect(config: Config) -> Inspection:
    """Lists the parameters of a configuration, without creating them.

    Raises:
      ConfigError: the mesh cannot shard the value tables.
    """
    sizes = sharding.axis_sizes(config.mesh, num_devices=1)
    num_tokens = config.train.batch_size * config.data.sequence_length
    config = exchange.resolve_mesh(config, sizes, num_tokens)
    return Inspection(
        config=config,
        parameters=tuple(_parameters(config, sizes)),
        counts=accounting.parameter_counts(config.model),
        flops_per_token=accounting.forward_flops_per_token(
            config.model, config.data.sequence_length
        ),
    )


def _parameters(config: Config, sizes: Mapping[str, int]) -> list[Parameter]:
    declared, rules = weights.declarations(config.model), sharding.rules(config.resolved_mesh)
    listed = []
    for name, leaf in weights.abstract(config.model).named().items():
        spec = sharding.partition(declared[name].axes, rules, sizes, name=name)
        axes = [" and ".join(sharding.axes_of(entry)) or "-" for entry in spec]
        listed.append(
            Parameter(
                name=name,
                shape=tuple(leaf.shape),
                dtype=str(leaf.dtype),
                sharding=" x ".join(axes) if set(axes) - {"-"} else "replicated",
                group=declared[name].group or "(buffer)",
            )
        )
    return listed


def _lines(section: dict[str, Any], path: str = "") -> list[str]:
    lines: list[str] = []
    for name, value in section.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{path}{name}.")
        else:
            lines.append(f"{path}{name} = {json.dumps(value)}")
    return lines
