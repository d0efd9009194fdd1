"""What a configuration builds: every parameter, and how many there are by part."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax

from umv2 import sharding, tables
from umv2.config import Config, to_dict
from umv2.cost import accounting, exchange
from umv2.training import optim
from umv2.training.state import TrainState, abstract_state


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of the model, its buffers or its store."""

    path: str
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
    """The resolved configuration, its parameters and their counts."""

    config: Config
    parameters: tuple[Parameter, ...]
    counts: accounting.ParameterCounts
    flops_per_token: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return {
            "config": to_dict(self.config),
            "parameters": [dataclasses.asdict(parameter) for parameter in self.parameters],
            "counts": self.counts.as_dict(),
            "forward_flops_per_token": self.flops_per_token,
        }

    def as_text(self, width: int | None = None) -> str:
        """Returns the configuration and tables of parameters and of counts.

        Args:
          width: columns that they take at most; None: as many as the terminal has.
        """
        rows = [("parameter", "shape", "dtype", "sharding", "optimizer group", "entries")]
        for p in self.parameters:
            shape = " x ".join(map(str, p.shape)) or "scalar"
            rows.append((p.path, shape, p.dtype, p.sharding, p.group, f"{p.size:,}"))
        counts = [("count", "parameters")]
        counts += [(name, f"{value:,}") for name, value in self.counts.as_dict().items()]
        flops = [("forward pass", "MFLOP/token")]
        flops += [(name, f"{value / 1e6:,.3f}") for name, value in self.flops_per_token.items()]
        config = [tables.paragraph(line, width) for line in _lines(to_dict(self.config))]
        parts = [tables.table(rows, width, left=range(5), rule=True)]
        parts += [tables.table(each, width, rule=True) for each in (counts, flops)]
        return "\n\n".join(["\n".join(config), *parts])


def inspect(config: Config) -> Inspection:
    """Lists what the configuration would build, without building it.

    Raises:
      ConfigError: a mesh that cannot divide the value tables.
    """
    sizes = sharding.axis_sizes(config.mesh, num_devices=1)
    num_tokens = config.train.batch_size * config.data.sequence_length
    config = exchange.with_layout(config, sizes, num_tokens)
    optimizer = optim.Optimizer(config.optimizer, config.train.num_steps)
    state = abstract_state(config, optimizer)
    return Inspection(
        config=config,
        parameters=tuple(_parameters(state, sharding.rules(config.mesh), sizes)),
        counts=accounting.parameter_counts(config.model),
        flops_per_token=accounting.forward_flops_per_token(
            config.model, config.data.sequence_length
        ),
    )


def _parameters(
    state: TrainState, rules: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int]
) -> list[Parameter]:
    def parameter(path: str, leaf: Any, group: str) -> Parameter:
        spec = sharding.partition(path, leaf.shape, rules, sizes)
        divided = [" and ".join(sharding.axes_of(entry)) or "-" for entry in spec]
        return Parameter(
            path=path,
            shape=tuple(leaf.shape),
            dtype=str(leaf.dtype),
            sharding=" x ".join(divided) if set(divided) - {"-"} else "replicated",
            group=group,
        )

    trained = optim.named_parameters(state.params, state.store)
    groups = optim.parameter_groups(list(trained))
    listed = [parameter(path, leaf, groups[path]) for path, leaf in trained.items()]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.buffers):
        name = "buffers/" + "/".join(str(entry.key) for entry in path)
        listed.append(parameter(name, leaf, "(buffer)"))
    return listed


def _lines(section: dict[str, Any], path: str = "") -> list[str]:
    lines: list[str] = []
    for name, value in section.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{path}{name}.")
        else:
            lines.append(f"{path}{name} = {json.dumps(value)}")
    return lines
