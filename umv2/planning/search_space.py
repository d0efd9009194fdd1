"""The search space of a plan, and an analytic ranking of which candidates to compile.

Needs neither a compiler nor devices.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp

from umv2 import sharding
from umv2.config import Config, ConfigError, ModelConfig, Rematerialization
from umv2.cost import accounting, exchange
from umv2.model.memory.exchange import column_fault, row_fault
from umv2.model.slots import memory_layer
from umv2.planning import ahead_of_time, topology
from umv2.planning.ahead_of_time import Step
from umv2.training import losses

# The fields that a search changes, in the order of the report.
PATHS = (
    "mesh.replica",
    "mesh.fsdp",
    "mesh.memory",
    "mesh.tensor",
    "mesh.parameters",
    "mesh.table_sharding",
    "model.remat",
    "train.gradient_accumulation",
)
_MOST_TENSOR = 8
# Reads and writes per microbatch of value tables, and of their gradients and the sums of these.
_TABLE_PASSES = 8
# Reads and writes of a selected row's gradient.
_GRADIENT_PASSES = 2
REMAT: tuple[str, ...] = get_args(Rematerialization)


def values(config: Config) -> dict[str, Any]:
    """Returns the values of the searched fields, by path."""
    return {
        path: getattr(getattr(config, path.split(".")[0]), path.split(".")[1]) for path in PATHS
    }


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns the configuration with values replaced by path; validates it.

    Raises:
      ConfigError: the values contradict each other.
    """
    sections: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        section, _, field = path.partition(".")
        sections.setdefault(section, {})[field] = value
    replaced: dict[str, Any] = {
        section: dataclasses.replace(getattr(config, section), **fields)
        for section, fields in sections.items()
    }
    result = dataclasses.replace(config, **replaced)
    result.validate()
    return result


def mesh_sizes(config: Config, num_devices: int) -> dict[str, int]:
    """Returns the devices along each axis of the mesh of a configuration."""
    return sharding.axis_sizes(config.mesh, num_devices)


def meshes(config: Config, num_devices: int) -> Iterator[Config]:
    """Yields the configuration with every valid mesh of all devices and layout of tables."""
    divisors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    memory_sizes = divisors if config.model.placements or config.model.ffn == "moe" else [1]
    for fsdp, memory, tensor in itertools.product(divisors, memory_sizes, divisors):
        if num_devices % (fsdp * memory * tensor) or tensor > _MOST_TENSOR:
            continue
        layouts = ("columns", "rows") if config.model.placements and memory > 1 else ("auto",)
        parameters = ("fsdp", "fsdp_and_memory") if memory > 1 else ("fsdp",)
        for layout, dense in itertools.product(layouts, parameters):
            changes = {
                "mesh.replica": num_devices // (fsdp * memory * tensor),
                "mesh.fsdp": fsdp,
                "mesh.memory": memory,
                "mesh.tensor": tensor,
                "mesh.parameters": dense,
                "mesh.table_sharding": layout,
            }
            if layout != "auto" and not _can_shard(config, layout, memory):
                continue
            try:
                candidate = with_changes(config, changes)
            except ConfigError:
                continue
            if (
                _batch(candidate) % sharding.num_batch_shards(mesh_sizes(candidate, num_devices))
                == 0
            ):
                yield candidate


class Candidate(NamedTuple):
    """A configuration of a training step that may fit.

    Attributes:
      config: the configuration.
      arguments: bytes of a device's arguments.
      temporaries: lower bound of the bytes of a device's temporaries.
      seconds: predicted time of a step, to rank candidates.
    """

    config: Config
    arguments: int
    temporaries: int
    seconds: float


def candidates(
    config: Config, target: topology.Topology, *, remat: Sequence[str] = REMAT
) -> list[Candidate]:
    """Returns the candidates that may fit, fastest predicted first."""
    fitting = [
        Candidate(candidate, arguments, temporaries, predicted_seconds(candidate, sizes, target))
        for candidate, sizes, arguments, temporaries in _with_least_bytes(config, target, remat)
        if arguments + temporaries <= target.chip.memory_bytes
    ]
    return sorted(fitting, key=lambda candidate: candidate.seconds)


def least_bytes(config: Config, target: topology.Topology) -> int:
    """Returns a lower bound, over all meshes and compilers, of the memory that a device needs."""
    return min(
        arguments + temporaries
        for _, _, arguments, temporaries in _with_least_bytes(config, target, ("full",))
    )


def _with_least_bytes(
    config: Config, target: topology.Topology, policies: Sequence[str]
) -> Iterator[tuple[Config, dict[str, int], int, int]]:
    """Yields candidates with their mesh, bytes of arguments, and least bytes of temporaries."""
    one_batch = with_changes(config, {"train.gradient_accumulation": 1})
    for mesh in meshes(one_batch, target.num_devices):
        sizes = mesh_sizes(mesh, target.num_devices)
        try:
            parts = ahead_of_time.argument_bytes(mesh, sizes, "train")
        except ValueError:
            continue
        local_batch = mesh.train.batch_size // sharding.num_batch_shards(sizes)
        accumulations = [size for size in range(1, local_batch + 1) if local_batch % size == 0]
        for remat, accumulation in itertools.product(policies, accumulations):
            changes = {"model.remat": remat, "train.gradient_accumulation": accumulation}
            candidate = with_changes(mesh, changes)
            least = least_temporaries(candidate, sizes, parts, target)
            yield candidate, sizes, sum(parts.values()), least


def least_temporaries(
    config: Config, sizes: Mapping[str, int], parts: Mapping[str, int], target: topology.Topology
) -> int:
    """Returns a lower bound of the temporaries: gradients, residuals of the blocks, and logits.

    Scores of attention may be computed in blocks, so they do not count. TPU compilers
    copy tables and accumulate their gradients with rows padded to 128 columns.

    Args:
      config: of a training step.
      sizes: devices along each axis.
      parts: bytes of the arguments; gradients take a third of parameters and moments.
      target: the topology to run on.
    """
    model = config.model
    tokens = _batch(config) // sharding.num_batch_shards(sizes) * config.data.sequence_length
    width = jnp.dtype(model.compute_dtype).itemsize
    residuals = model.hidden_size
    if model.remat in ("none", "dots"):
        residuals += _activations(model) // sizes["tensor"]
    gradients = (parts["dense"] + parts["sparse"]) // 3
    if config.mesh.table_sharding == "columns" and target.chip.platform == "tpu":
        padded = exchange.table_bytes(model, "columns", sizes["memory"]) // 3
        gradients += max(0, 2 * padded - parts["sparse"] // 3)
    logits = tokens * model.vocab_size * accounting.FLOAT32_BYTES // sizes["tensor"]
    logits = min(logits, losses.MAX_LOGITS_BYTES)
    return gradients + model.num_layers * tokens * residuals * width + logits


def _activations(model: ModelConfig) -> int:
    """Returns the elements of a block's activations per token: of its attention and its FFN."""
    # Queries, keys, values and their products; gate, up and their product.
    return 4 * model.hidden_size + 3 * model.ffn_size


def predicted_seconds(config: Config, sizes: Mapping[str, int], target: topology.Topology) -> float:
    """Returns a rough estimate of the time of a training step, to rank candidates."""
    model, chip, accumulation = config.model, target.chip, config.train.gradient_accumulation
    devices = math.prod(sizes.values())
    tokens = config.train.batch_size * config.data.sequence_length
    recomputed = {"none": 0.0, "dots": 0.1, "kernels": 0.25, "full": 1 / 3}[model.remat]
    flops = accounting.training_flops_per_token(config) * tokens / devices * (1 + recomputed)
    counts = accounting.parameter_counts(model)
    float32, width = accounting.FLOAT32_BYTES, jnp.dtype(model.compute_dtype).itemsize
    dense = (counts.total - counts.sparse_values) / sizes["tensor"]
    shards = sizes["fsdp"] * (sizes["memory"] if config.mesh.parameters == "fsdp_and_memory" else 1)
    passes = 2 if model.remat == "none" else 3
    received = 0.0
    if shards > 1:  # all-gather of the parameters in every pass, reduce-scatter of the gradients
        received += accumulation * dense * width * (passes + 1)
    if shards < devices:  # all-reduce of the gradients over the other devices
        received += 2 * float32 * dense / shards * (accumulation if shards > 1 else 1)
    received += _sparse_bytes(config, sizes, counts.sparse_values)
    if sizes["tensor"] > 1:  # four collectives on activations in each block and pass
        local_tokens = tokens / sharding.num_batch_shards(sizes)
        received += 4 * passes * model.num_layers * local_tokens * model.hidden_size * width
    compute, communication = flops / chip.peak_flops, received / chip.link_bandwidth
    hbm = _hbm_bytes(config, sizes, target) / chip.memory_bandwidth
    # Overlap is never perfect.
    return max(compute, communication, hbm) + 0.1 * (communication + hbm)


def _hbm_bytes(config: Config, sizes: Mapping[str, int], target: topology.Topology) -> float:
    """Returns a rough estimate of the bytes of main memory that a device moves in a step."""
    model, accumulation = config.model, config.train.gradient_accumulation
    counts = accounting.parameter_counts(model)
    float32, width = accounting.FLOAT32_BYTES, jnp.dtype(model.compute_dtype).itemsize
    tokens = config.train.batch_size * config.data.sequence_length
    tokens_per_shard = tokens / sharding.num_batch_shards(sizes)
    passes = 2 if model.remat == "none" else 3
    tables = counts.sparse_values * float32 / sizes["memory"]
    if model.placements and target.chip.platform == "tpu":
        layout: exchange.Layout = "columns" if config.mesh.table_sharding == "columns" else "rows"
        tables = exchange.table_bytes(model, layout, sizes["memory"]) / 3
    dense = (counts.total - counts.sparse_values) * width / sizes["tensor"]
    rows = counts.selected * float32 * tokens / math.prod(sizes.values())
    activations = model.num_layers * _activations(model) * width * tokens_per_shard
    return (
        accumulation * (_TABLE_PASSES * tables + (passes + 1) * dense)
        + ((3 if model.remat == "full" else 2) + _GRADIENT_PASSES) * rows
        + 2 * passes * activations / sizes["tensor"]
    )


def other_layout(config: Config, size: int) -> str | None:
    """Returns the layout of value tables that is not configured; None if it is impossible."""
    other = {"rows": "columns", "columns": "rows"}.get(config.mesh.table_sharding)
    if not config.model.placements or other is None or not _can_shard(config, other, size):
        return None
    return other


def next_accumulation(config: Config, sizes: Mapping[str, int]) -> int | None:
    """Returns the next larger number of microbatches that the mesh allows; None if none."""
    local_batch = config.train.batch_size // sharding.num_batch_shards(sizes)
    larger = range(config.train.gradient_accumulation + 1, local_batch + 1)
    return next((size for size in larger if local_batch % size == 0), None)


def previous_accumulation(config: Config, sizes: Mapping[str, int]) -> int | None:
    """Returns the next smaller number of microbatches that the mesh allows; None if none."""
    local_batch = config.train.batch_size // sharding.num_batch_shards(sizes)
    smaller = range(config.train.gradient_accumulation - 1, 0, -1)
    return next((size for size in smaller if local_batch % size == 0), None)


def smaller_arguments(
    config: Config, num_devices: int, step: Step, *, limit: int
) -> tuple[Config, int] | None:
    """Returns the most similar mesh whose arguments take at most `limit` bytes, and their size.

    The distance of two meshes is the sum over axes of |log2| of the ratio of their sizes, with
    penalties for changes of `tensor` and `parameters`. Returns None if there is no such mesh.
    """
    current = mesh_sizes(config, num_devices)
    fitting: list[tuple[float, int, Config]] = []
    for candidate in meshes(config, num_devices):
        sizes = mesh_sizes(candidate, num_devices)
        try:
            size = sum(ahead_of_time.argument_bytes(candidate, sizes, step).values())
        except ValueError:
            continue
        if size <= limit:
            distance = sum(abs(math.log2(sizes[axis] / current[axis])) for axis in sizes)
            distance += 2 * (sizes["tensor"] != current["tensor"])
            distance += 0.5 * (candidate.mesh.parameters != config.mesh.parameters)
            fitting.append((distance, size, candidate))
    if not fitting:
        return None
    _, size, nearest = min(fitting, key=lambda item: item[:2])
    return nearest, size


def _sparse_bytes(config: Config, sizes: Mapping[str, int], count: int) -> float:
    model, size = config.model, sizes["memory"]
    others = sizes["replica"] * sizes["fsdp"]
    gradient = 0.0
    if others > 1:  # these axes replicate tables, so gradients are all-reduced over them
        gradient = 2.0 * accounting.FLOAT32_BYTES * count / size
    if not model.placements or size == 1:
        return gradient
    tokens = (
        _batch(config)
        // sharding.num_batch_shards(sizes)
        * config.data.sequence_length
        // sizes["tensor"]
    )
    layout = config.mesh.table_sharding
    exchanged = _exchanged(model, "rows" if layout == "rows" else "columns", size, tokens)
    layers = len(model.placements) * config.train.gradient_accumulation
    return gradient + layers * exchanged


@functools.cache
def _exchanged(model: Any, layout: Any, size: int, tokens: int) -> int:
    return exchange.exchanged_bytes(
        model.memory,
        layout,
        size=size,
        num_tokens=tokens,
        itemsize=jnp.dtype(model.compute_dtype).itemsize,
        remat=model.remat != "none",
    ).total


def _can_shard(config: Config, layout: str, size: int) -> bool:
    memory = config.model.memory
    if layout == "rows":
        rows = memory_layer(config.model).table_rows(config.model)
        return row_fault(rows, size) is None
    dims = (memory.value_dim, memory.pre_value_dim, memory.num_cores)
    return column_fault(*dims, size) is None


def _batch(config: Config) -> int:
    return config.train.batch_size // config.train.gradient_accumulation
