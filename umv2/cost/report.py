"""Compares configurations: parameters, FLOPs, bytes per decode step, training memory."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from umv2 import pictures, tables
from umv2.config import Config
from umv2.cost import accounting, traffic

BATCH_SIZES = (1, 8, 64, 512)
# Of the plots: powers of two.
PLOTTED_BATCH_SIZES = tuple(2**power for power in range(10))

# What a table shows for a part that a configuration lacks.
_ABSENT = "-"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one configuration; `decode_bytes` by batch size, with arrays in `compute_dtype`."""

    compute_dtype: str
    parameters: accounting.ParameterCounts
    forward_flops: dict[str, float]
    decode_flops: dict[str, float]
    training_flops: float
    decode_bytes: dict[int, traffic.DecodeBytes]
    cache_bytes: float
    training_memory: accounting.TrainingMemory

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON, in bytes and in FLOPs per token."""
        return {
            "compute_dtype": self.compute_dtype,
            "parameters": self.parameters.as_dict(),
            "forward_flops_per_token": _with_total(self.forward_flops),
            "decode_flops_per_token": _with_total(self.decode_flops),
            "training_flops_per_token": self.training_flops,
            "decode_bytes_per_step": {
                str(batch_size): bytes_read.as_dict()
                for batch_size, bytes_read in self.decode_bytes.items()
                if batch_size in BATCH_SIZES
            },
            "cache_bytes_per_sequence": self.cache_bytes,
            "training_bytes": self.training_memory.as_dict(),
        }


@dataclasses.dataclass(frozen=True)
class CostReport:
    """Costs by name of the configuration, all at one context length (tokens)."""

    costs: dict[str, Cost]
    context_length: int

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "context_length": self.context_length,
            "configs": {name: cost.as_dict() for name, cost in self.costs.items()},
        }

    def as_json(self) -> str:
        """Returns `as_dict` as JSON text."""
        return json.dumps(self.as_dict(), indent=2)

    def as_text(self, width: int | None = None) -> str:
        """Returns a table with one row per quantity and one column per configuration.

        Bytes per decode step are followed by their ratios to the first configuration. If the table
        is too wide, further configurations are shown below.

        Args:
          width: maximum number of columns of text; None: the width of the terminal.
        """
        context = f"{self.context_length:,}"
        costs = [cost.as_dict() for cost in self.costs.values()]
        rows: list[tuple[str, ...]] = [("", *self.costs)]
        rows.append(("compute dtype", *(cost["compute_dtype"] for cost in costs)))

        def section(title: str, columns: list[dict[str, Any]], text: Callable[[Any], str]) -> None:
            rows.extend([("",), (title,)])
            for name in columns[0]:
                values = [column[name] for column in columns]
                if any(values):
                    cells = [text(value) if value else _ABSENT for value in values]
                    rows.append(("  " + name.replace("_", " "), *cells))

        section("parameters", [cost["parameters"] for cost in costs], "{:,}".format)
        for name, title in (
            ("forward_flops_per_token", f"forward pass, MFLOP/token, {context} tokens"),
            ("decode_flops_per_token", f"decode, MFLOP/token, context {context}"),
        ):
            section(title, [cost[name] for cost in costs], _millions)
        training = [{"total": cost["training_flops_per_token"]} for cost in costs]
        section("training, MFLOP/token", training, _millions)
        for size in BATCH_SIZES:
            title = f"read per decode step, MB, batch {size}, context {context}"
            section(title, [cost["decode_bytes_per_step"][str(size)] for cost in costs], _millions)
            rows += self._ratios(size)
        cache = [{f"a sequence of {context}": cost["cache_bytes_per_sequence"]} for cost in costs]
        section("key-value cache, MB", cache, _millions)
        section("training, MB", [cost["training_bytes"] for cost in costs], _millions)
        return tables.table(rows, width)

    def draw(self, path: Path) -> None:
        """Plots bytes read per decode step over the batch size, and ratios to the first, as PNG.

        The top row excludes the key-value cache (weights, rows and experts only), the bottom row
        includes it.
        """
        compared = len(self.costs) > 1
        figure = pictures.new(12.0 if compared else 7.0, 8.0)
        grid = figure.subplots(2, 2 if compared else 1, squeeze=False)
        first = next(iter(self.costs.values()))
        with_cache = f"with the key-value cache, {self.context_length:,} positions a sequence"
        titles = {"without_cache": "without the key-value cache", "total": with_cache}
        for panels, (attribute, title) in zip(grid, titles.items(), strict=True):
            styles = pictures.curve_styles(len(self.costs))
            for cost, style in zip(self.costs.values(), styles, strict=True):
                curve = _curve(cost, attribute)
                panels[0].plot(PLOTTED_BATCH_SIZES, [value / 1e9 for value in curve], **style)
                if compared:
                    ratios = [a / b for a, b in zip(curve, _curve(first, attribute), strict=True)]
                    panels[1].plot(PLOTTED_BATCH_SIZES, ratios, **style)
            panels[0].set(ylabel="GB read per decode step", yscale="log", title=title)
            if compared:
                panels[1].set(ylabel="ratio to the first", title=title)
                panels[1].set_ylim(0, None)
            for axes in panels:
                axes.set_xscale("log", base=2)
                axes.set_xticks(PLOTTED_BATCH_SIZES, [str(size) for size in PLOTTED_BATCH_SIZES])
                axes.set_xlabel("batch (sequences)")
                axes.grid(alpha=0.3)
        pictures.legend_below(figure, grid[0, 0].lines, list(self.costs))
        pictures.save(figure, path)

    def _ratios(self, batch_size: int) -> list[tuple[str, ...]]:
        if len(self.costs) == 1:
            return []
        rows = []
        for sum_name in ("without_cache", "total"):
            sums = [
                getattr(cost.decode_bytes[batch_size], sum_name) for cost in self.costs.values()
            ]
            name = f"  {sum_name.replace('_', ' ')}, ratio"
            rows.append((name, *(f"{value / sums[0]:.3f}" for value in sums)))
        return rows


def cost_report(
    named_configs: Mapping[str, Config], *, context_length: int | None = None
) -> CostReport:
    """Computes the cost of each configuration, all at one context length.

    Args:
      named_configs: configurations by their names in the report; ratios are to the first.
      context_length: tokens of a forward pass, and positions that a decode step attends to; None:
        the longest `data.sequence_length` of the configurations.

    Raises:
      ValueError: there is no configuration.
    """
    if not named_configs:
        raise ValueError("named_configs is empty: must have at least one configuration")
    if context_length is None:
        context_length = max(config.data.sequence_length for config in named_configs.values())
    costs = {name: _cost(config, context_length) for name, config in named_configs.items()}
    return CostReport(costs=costs, context_length=context_length)


def _cost(config: Config, context_length: int) -> Cost:
    model = config.model
    batch_sizes = sorted({*BATCH_SIZES, *PLOTTED_BATCH_SIZES})
    return Cost(
        compute_dtype=model.compute_dtype,
        parameters=accounting.parameter_counts(model),
        forward_flops=accounting.forward_flops_per_token(model, context_length),
        decode_flops=accounting.decode_flops_per_token(model, context_length),
        training_flops=accounting.training_flops_per_token(config),
        decode_bytes={
            size: traffic.decode_bytes(model, size, context_length) for size in batch_sizes
        },
        cache_bytes=traffic.cache_bytes(model, 1, context_length),
        training_memory=accounting.training_memory(model),
    )


def _curve(cost: Cost, sum_name: str) -> list[float]:
    return [getattr(cost.decode_bytes[size], sum_name) for size in PLOTTED_BATCH_SIZES]


def _with_total(parts: dict[str, float]) -> dict[str, float]:
    return parts | {"total": sum(parts.values())}


def _millions(value: int | float) -> str:
    return f"{value / 1e6:,.3f}"
