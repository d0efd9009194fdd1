"""Compiles value aggregation for TPUs that are not attached: python tpu_compile.py CASES

CASES is a JSON list of cases; prints the bytes of temporaries and arguments of each, and the costs
that its kernels declare, as JSON.
`aot.py` runs this in a separate process, because only one process at a time can use libtpu.
"""

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import PartitionSpec, SingleDeviceSharding

from kernels_pallas import row_products
from kernels_pallas.value_aggregation import value_aggregation
from tests.kernels_pallas.aot import declared_costs

TABLES = ("values", "pre_values")


def arguments(case: dict[str, Any], num_devices: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    num_tokens, num_selected = case["num_tokens"] * num_devices, case["num_selected"]
    num_values, num_cores = case["num_values"], case["num_cores"]
    shapes = {
        "values": (num_values, case["value_dim"]),
        "indices": (num_tokens, num_selected),
        "scores": (num_tokens, num_selected, num_cores),
    }
    if case["pre_value_dim"]:
        shapes["pre_values"] = (num_values, case["pre_value_dim"])
        shapes["pre_inputs"] = (num_tokens, case["pre_value_dim"])
    dtypes = dict.fromkeys(TABLES, jnp.dtype(case["table_dtype"])) | {"indices": jnp.int32}
    return {
        name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.float32))
        for name, shape in shapes.items()
    }


def row_major(rank: int, dtype: Any, sharding: Any, reverse: bool = False) -> Format:
    """The layout that the kernel reads, so that XLA needs no copy."""
    order = tuple(range(rank))
    tiling = ((8, 128), (2, 1)) if dtype == jnp.bfloat16 else ((8, 128),)
    return Format(Layout(major_to_minor=order[::-1] if reverse else order, tiling=tiling), sharding)


def compiled(case: dict[str, Any]) -> Any:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=case["topology"])
    options: dict[str, Any] = {"platform": "tpu", "activation": case.get("activation")}

    def forward(inputs: dict[str, Any]) -> Any:
        return value_aggregation(**inputs, **options, implementation="pallas_tpu")

    def grads(names: tuple[str, ...], inputs: dict[str, Any]) -> Any:
        chosen = {name: inputs[name] for name in names if name in inputs}
        return jax.grad(lambda chosen: jnp.sum(forward(inputs | chosen) ** 2))(chosen)

    what = case["what"]
    if what == "sharded":
        devices = jax.sharding.Mesh(topology.devices, ("data",))
        specs = {n: PartitionSpec(None if n in TABLES else "data") for n in arguments(case)}
        del options["platform"]  # taken from the mesh in context

        def sharded(inputs: dict[str, Any]) -> Any:
            return jax.shard_map(forward, in_specs=(specs,), out_specs=PartitionSpec("data"))(
                inputs
            )

        def all_grads(inputs: dict[str, Any]) -> Any:
            floats = {n: x for n, x in inputs.items() if n != "indices"}
            return jax.grad(lambda floats: jnp.sum(sharded(inputs | floats) ** 2))(floats)

        with jax.set_mesh(devices):
            placed = {
                n: jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=jax.sharding.NamedSharding(devices, specs[n])
                )
                for n, x in arguments(case, len(topology.devices)).items()
            }
            return jax.jit(all_grads).lower(placed).compile()

    sharding = SingleDeviceSharding(topology.devices[0])
    inputs = arguments(case)
    formats = {
        name: row_major(x.ndim, x.dtype, sharding, reverse=name in ("indices", "scores"))
        for name, x in inputs.items()
    }
    if what == "row_products":
        products = functools.partial(row_products, implementation="pallas_tpu", platform="tpu")
        operands = [(inputs[n], formats[n]) for n in ("pre_values", "indices", "pre_inputs")]
        shapes, in_shardings = zip(*operands, strict=True)
        return jax.jit(products, in_shardings=in_shardings).lower(*shapes).compile()
    if what == "mapped":
        inputs = {n: jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for n, x in inputs.items()}
        return jax.jit(jax.vmap(forward), in_shardings=sharding).lower(inputs).compile()
    if what == "forward":
        out = row_major(2, jnp.float32, sharding)
        lowered = jax.jit(forward, in_shardings=(formats,), out_shardings=out).lower(inputs)
        return lowered.compile()
    names = ("scores", "pre_inputs") if what == "token_grads" else (*TABLES, "scores", "pre_inputs")
    outs = {name: formats[name] for name in names if name in inputs}
    function = jax.jit(
        lambda inputs: grads(names, inputs), in_shardings=(formats,), out_shardings=outs
    )
    return function.lower(inputs).compile()


def main() -> None:
    results = []
    for case in json.loads(sys.argv[1]):
        program = compiled(case)
        memory = program.memory_analysis()
        results.append(
            {
                "temporaries": memory.temp_size_in_bytes,
                "arguments": memory.argument_size_in_bytes,
                "costs": declared_costs(program.as_text()),
                "kernels": [
                    name
                    for name in ("value_aggregation_forward", "value_aggregation_backward")
                    if f"%{name}" in program.as_text()
                ],
            }
        )
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
