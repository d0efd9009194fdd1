"""Small programs with collectives along every axis, and the bytes that one device receives."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("replica", "fsdp", "memory", "tensor")
DATA_AXES = AXES[:3]

ROWS, WIDTH = 16, 8  # per device, in `every_kind`
LAYERS, HIDDEN, INNER, TOKENS = 6, 512, 2048, 4096  # in `layers`

Totals = dict[tuple[str, tuple[str, ...]], int]


def make_mesh(shape: Sequence[int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with the production axes over these devices, or over the first ones."""
    devices = (devices or jax.devices())[: math.prod(shape)]
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Explicit,) * 4)


def compiled(mesh: Mesh, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """Compiles a function under the mesh."""
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile()


def argument(mesh: Mesh, shape: Sequence[int], dtype: Any, *spec: Any) -> jax.ShapeDtypeStruct:
    """Returns an abstract array with this sharding."""
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def every_kind(mesh: Mesh, axes: tuple[str, ...]) -> tuple[jax.stages.Compiled, Totals]:
    """Compiles each kind of collective along these axes once, in a scan of 3, and in nested scans.

    Returns:
      The program, and the bytes that one device receives in 1 + 3 + 2 * 5 executions of each.
    """
    size = math.prod(mesh.shape[axis] for axis in axes)
    ring = [(i, (i + 1) % size) for i in range(size)]

    def block(x: jax.Array) -> jax.Array:
        gathered = jax.lax.all_gather(x, axes, tiled=True)
        x = jax.lax.psum_scatter(jnp.sin(gathered), axes, tiled=True)
        x = jax.lax.all_to_all(jnp.sin(x), axes, 0, 0, tiled=True)
        x = jax.lax.ppermute(jnp.sin(x), axes, ring)
        return jnp.sin(x) + jax.lax.psum(jnp.cos(x), axes)

    def repeated(function: Callable[[jax.Array], jax.Array], times: int) -> Any:
        return lambda x: jax.lax.scan(lambda x, _: (function(x), None), x, length=times)[0]

    def program(x: jax.Array) -> jax.Array:
        return repeated(repeated(block, 5), 2)(repeated(block, 3)(block(x)))

    spec = PartitionSpec(AXES)
    mapped = jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = argument(mesh, (ROWS * mesh.size, WIDTH), jnp.float32, AXES)
    operand = ROWS * WIDTH * 4
    received = {
        "all-gather": (size - 1) * operand,
        "reduce-scatter": (size - 1) * operand,  # the full operand is `size` times as large
        "all-to-all": (size - 1) * operand // size,
        "collective-permute": operand,
        "all-reduce": 2 * (size - 1) * operand // size,
    }
    totals = {(kind, axes): 14 * num_bytes for kind, num_bytes in received.items()}
    return compiled(mesh, mapped, x), totals


def layers(mesh: Mesh, dtype: Any) -> jax.stages.Compiled:
    """Compiles a training step with weights gathered in the forward and in the backward pass."""

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
            replicated = PartitionSpec(None, None)
            up, down = (jax.sharding.reshard(w.astype(x.dtype), replicated) for w in weights)
            return x + jax.nn.gelu(x @ up) @ down, None

        x, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
        return jnp.mean(x.astype(jnp.float32) ** 2)

    def step(weights: Any, x: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(loss)(weights, x)
        return value, jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients)

    over = ("fsdp", "memory")
    weights = (
        argument(mesh, (LAYERS, HIDDEN, INNER), jnp.float32, None, over, None),
        argument(mesh, (LAYERS, INNER, HIDDEN), jnp.float32, None, None, over),
    )
    return compiled(mesh, step, weights, argument(mesh, (TOKENS, HIDDEN), dtype, DATA_AXES, None))
