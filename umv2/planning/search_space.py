"""What a plan may change of a configuration, and what of it is worth compiling.

Everything here is arithmetic: no compiler, no devices.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from umv2 import sharding
from umv2.config import Config, ConfigError
from umv2.cost import accounting, exchange
from umv2.model.memory.exchange import column_fault, row_fault
from umv2.model.slots import memory_layer
from umv2.planning import ahead_of_time, topology
from umv2.planning.ahead_of_time import Step

# What a search changes, in the order in which it is shown.
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
REMAT = ("none", "dots", "full")


def values(config: Config) -> dict[str, Any]:
    """Returns what a search changes, by path."""
    return {
        path: getattr(getattr(config, path.split(".")[0]), path.split(".")[1]) for path in PATHS
    }


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns the configuration with other values, by path; checked.

    Raises:
      ConfigError: values that contradict each other.
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
    """Yields the configuration with every mesh of all devices, and layout, that it allows."""
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
            if layout != "auto" and not _divides(config, layout, memory):
                continue
            try:
                candidate = changed(config, changes)
            except ConfigError:
                continue
            if (
                _batch(candidate) % sharding.num_batch_shards(mesh_sizes(candidate, num_devices))
                == 0
            ):
                yield candidate


def candidates(
    config: Config, place: topology.Topology, *, remat: Sequence[str] = REMAT
) -> list[Config]:
    """Returns what may fit, the most promising first: meshes, rematerialisation, accumulation."""
    fitting = [
        (predicted_seconds(candidate, mesh_sizes(candidate, place.num_devices), place), candidate)
        for candidate, least in _with_least_bytes(config, place, remat)
        if least <= place.chip.memory_bytes
    ]
    return [candidate for _, candidate in sorted(fitting, key=lambda pair: pair[0])]


def least_bytes(config: Config, place: topology.Topology) -> int:
    """Returns the least that a device needs on any mesh, whatever a compiler does."""
    return min(least for _, least in _with_least_bytes(config, place, REMAT))


def _with_least_bytes(
    config: Config, place: topology.Topology, policies: Sequence[str]
) -> Iterator[tuple[Config, int]]:
    for mesh in meshes(changed(config, {"train.gradient_accumulation": 1}), place.num_devices):
        sizes = mesh_sizes(mesh, place.num_devices)
        try:
            parts = ahead_of_time.argument_bytes(mesh, sizes, "train")
        except ValueError:
            continue
        local_batch = mesh.train.batch_size // sharding.num_batch_shards(sizes)
        accumulations = [size for size in range(1, local_batch + 1) if local_batch % size == 0]
        for remat, accumulation in itertools.product(policies, accumulations):
            changes = {"model.remat": remat, "train.gradient_accumulation": accumulation}
            candidate = changed(mesh, changes)
            least = least_temporaries(candidate, sizes, parts, place)
            yield candidate, sum(parts.values()) + least


def least_temporaries(
    config: Config, sizes: Mapping[str, int], parts: Mapping[str, int], place: topology.Topology
) -> int:
    """Returns bytes of temporaries that no compiler can avoid: gradients, what blocks keep, logits.

    A TPU's compiler copies tables, and adds up their gradients, row by row: padded to 128 columns.

    Args:
      config: of a training step.
      sizes: devices along each axis.
      parts: bytes of the arguments, of which a third of parameters with moments is a gradient.
      place: where it runs.
    """
    model = config.model
    tokens = _batch(config) // sharding.num_batch_shards(sizes) * config.data.sequence_length
    width = jnp.dtype(model.compute_dtype).itemsize
    # Queries, keys, values and their products; gate, up and their product.
    matrices = 4 * model.hidden_size + 3 * model.ffn_size
    scores = model.num_heads * config.data.sequence_length  # of the attention, in both passes
    kept = {
        "full": model.hidden_size,
        "dots": model.hidden_size + matrices // sizes["tensor"],
        "none": model.hidden_size + (matrices + scores) // sizes["tensor"],
    }[model.remat]
    logits = tokens * model.vocab_size * accounting.FLOAT32_BYTES // sizes["tensor"]
    working = tokens * scores * width // sizes["tensor"]
    gradients = (parts["dense"] + parts["sparse"]) // 3
    if config.mesh.table_sharding == "columns" and place.chip.platform == "tpu":
        padded = exchange.table_bytes(model, "columns", sizes["memory"]) // 3
        gradients += max(0, 2 * padded - parts["sparse"] // 3)
    return gradients + model.num_layers * tokens * kept * width + max(logits, working)


def predicted_seconds(config: Config, sizes: Mapping[str, int], place: topology.Topology) -> float:
    """Returns a rough time of a training step, to choose what is compiled first."""
    model, chip, accumulation = config.model, place.chip, config.train.gradient_accumulation
    devices = math.prod(sizes.values())
    tokens = config.train.batch_size * config.data.sequence_length
    again = {"none": 0.0, "dots": 0.1, "full": 1 / 3}[model.remat]
    flops = accounting.training_flops_per_token(config) * tokens / devices * (1 + again)
    counts = accounting.parameter_counts(model)
    float32, width = accounting.FLOAT32_BYTES, jnp.dtype(model.compute_dtype).itemsize
    dense = (counts.total - counts.sparse_values) / sizes["tensor"]
    shards = sizes["fsdp"] * (sizes["memory"] if config.mesh.parameters == "fsdp_and_memory" else 1)
    passes = 2 if model.remat == "none" else 3
    received = 0.0
    if shards > 1:  # gathered in every pass, and their gradients scattered
        received += accumulation * dense * width * (passes + 1)
    if shards < devices:  # the gradient's sum over the others
        received += 2 * float32 * dense / shards * (accumulation if shards > 1 else 1)
    received += _sparse_bytes(config, sizes, counts.sparse_values)
    if sizes["tensor"] > 1:  # four exchanges of activations in each block and pass
        local_tokens = tokens / sharding.num_batch_shards(sizes)
        received += 4 * passes * model.num_layers * local_tokens * model.hidden_size * width
    compute, exchanging = flops / chip.peak_flops, received / chip.link_bandwidth
    return max(compute, exchanging) + 0.1 * exchanging  # no overlap is perfect


def other_layout(config: Config, size: int) -> str | None:
    """Returns the layout of value tables that is not configured, where it is possible."""
    other = {"rows": "columns", "columns": "rows"}.get(config.mesh.table_sharding)
    if not config.model.placements or other is None or not _divides(config, other, size):
        return None
    return other


def next_accumulation(config: Config, sizes: Mapping[str, int]) -> int | None:
    """Returns the next larger number of microbatches that the mesh allows; None: there is none."""
    local_batch, now = (
        config.train.batch_size // sharding.num_batch_shards(sizes),
        config.train.gradient_accumulation,
    )
    return next((size for size in range(now + 1, local_batch + 1) if local_batch % size == 0), None)


def previous_accumulation(config: Config, sizes: Mapping[str, int]) -> int | None:
    """Returns the next smaller number of microbatches that the mesh allows; None: there is none."""
    local_batch, now = (
        config.train.batch_size // sharding.num_batch_shards(sizes),
        config.train.gradient_accumulation,
    )
    return next((size for size in range(now - 1, 0, -1) if local_batch % size == 0), None)


def smaller_arguments(
    config: Config, num_devices: int, step: Step, *, limit: int
) -> tuple[Config, int] | None:
    """Returns the mesh nearest to the given one whose arguments take at most so many bytes.

    Nearest is the one that needs the least factor more of shards; None where there is none.
    """
    now = mesh_sizes(config, num_devices)
    found: list[tuple[float, int, Config]] = []
    for candidate in meshes(config, num_devices):
        sizes = mesh_sizes(candidate, num_devices)
        try:
            size = sum(ahead_of_time.argument_bytes(candidate, sizes, step).values())
        except ValueError:
            continue
        if size <= limit:
            distance = sum(abs(math.log2(sizes[axis] / now[axis])) for axis in sizes)
            distance += 2 * (sizes["tensor"] != now["tensor"])
            distance += 0.5 * (candidate.mesh.parameters != config.mesh.parameters)
            found.append((distance, size, candidate))
    if not found:
        return None
    _, size, nearest = min(found, key=lambda item: item[:2])
    return nearest, size


def _sparse_bytes(config: Config, sizes: Mapping[str, int], count: int) -> float:
    model, size = config.model, sizes["memory"]
    others = sizes["replica"] * sizes["fsdp"]
    gradient = 0.0
    if others > 1:  # tables are replicated along these axes, and so are their gradients
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
    return gradient * config.train.gradient_accumulation + layers * exchanged


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


def _divides(config: Config, layout: str, size: int) -> bool:
    memory = config.model.memory
    if layout == "rows":
        rows = memory_layer(config.model).table_rows(config.model)
        return row_fault(rows, size) is None
    dims = (memory.value_dim, memory.pre_value_dim, memory.num_cores)
    return column_fault(*dims, size) is None


def _batch(config: Config) -> int:
    return config.train.batch_size // config.train.gradient_accumulation
