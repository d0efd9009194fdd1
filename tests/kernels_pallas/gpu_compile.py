"""Compiles an operator for an H200 that is not attached: python gpu_compile.py CASES

CASES is a JSON list of cases. For each, it prints as JSON the bytes of temporaries and arguments,
the costs that its Mosaic GPU kernels declare, and by name their registers and spilled bytes per
thread, as reported by ptxas (the maximum over kernels of the same name). Compilation is complete,
down to machine code for sm_90a. A case has

    operator        "value_aggregation", "product_key_top_k" or "row_products"
    arguments       for each argument its [shape, dtype], or null
    implementation  one of the operator's
    options         keyword arguments that are not arrays; optional
    what            "forward"; "grads", of the sum of squares of its first floating-point result;
                    "mapped", the forward under vmap, with two of every array; or "sharded", the
                    gradients with the arguments in `sharded` sharded over 4 devices on axis 0
    wrt             arguments to differentiate with respect to; by default all floating-point ones
    remat           whether the backward pass recomputes the forward pass; optional
    sharded         names of arguments, only for "sharded"
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.kernels_pallas.aot import declared_costs
from umv2.planning.topology import H200

NUM_DEVICES = 4


def compiled(case: dict[str, Any]) -> Any:
    """Compiles the program of a case."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from kernels_pallas import product_key_top_k, row_products, value_aggregation

    operators: dict[str, Any] = {
        "value_aggregation": value_aggregation,
        "product_key_top_k": product_key_top_k,
        "row_products": row_products,
    }
    operator = operators[case["operator"]]
    what, sharded = case["what"], case.get("sharded", ())
    num_devices = NUM_DEVICES if what == "sharded" else 1
    topology = topologies.get_topology_desc(
        "h200", platform="cuda", topology=f"1x1x{num_devices}", target_config=H200
    )
    mesh = jax.sharding.Mesh(topology.devices, ("data",))
    specs: dict[str, Any] = {
        name: None if description is None else PartitionSpec("data" if name in sharded else None)
        for name, description in case["arguments"].items()
    }
    arguments: dict[str, Any] = {}
    for name, description in case["arguments"].items():
        arguments[name] = None
        if description is not None:
            shape, dtype = description
            arguments[name] = jax.ShapeDtypeStruct(
                (2, *shape) if what == "mapped" else tuple(shape),
                jnp.dtype(dtype),
                sharding=NamedSharding(mesh, specs[name]),
            )
    wrt = case.get("wrt") or [
        name
        for name, argument in arguments.items()
        if argument is not None and jnp.issubdtype(argument.dtype, jnp.floating)
    ]

    # The operator takes its target from the mesh in context.
    def forward(arguments: dict[str, Any]) -> Any:
        return operator(
            **arguments, **case.get("options", {}), implementation=case["implementation"]
        )

    def first(arguments: dict[str, Any]) -> Any:
        return jax.tree.leaves(forward(arguments))[0]

    def first_sharded(arguments: dict[str, Any]) -> Any:
        return jax.shard_map(first, in_specs=(specs,), out_specs=PartitionSpec("data"))(arguments)

    def grads(arguments: dict[str, Any]) -> Any:
        result = first_sharded if what == "sharded" else first
        result = jax.checkpoint(result) if case.get("remat", False) else result
        chosen = {name: arguments[name] for name in wrt}
        return jax.grad(lambda chosen: jnp.sum(result(arguments | chosen) ** 2))(chosen)

    function = {"forward": forward, "mapped": jax.vmap(forward), "grads": grads, "sharded": grads}
    with jax.set_mesh(mesh):
        return jax.jit(function[what]).lower(arguments).compile()


def kernel_reports(reports: Path) -> dict[str, dict[str, int]]:
    """The ptxas report of each compiled kernel, by kernel name."""
    found: dict[str, dict[str, int]] = {}
    for path in reports.glob("*.ptxas"):
        report = path.read_text()
        name = re.search(r"entry function '(\w+)_mosaic_gpu_kernel'", report)
        registers = re.search(r"Used (\d+) registers", report)
        spilled = re.search(r"(\d+) bytes spill stores", report)
        assert name and registers and spilled, report
        others = found.get(name[1], {"registers": 0, "spilled": 0})
        found[name[1]] = {
            "registers": max(others["registers"], int(registers[1])),
            "spilled": max(others["spilled"], int(spilled[1])),
        }
    return found


def main() -> None:
    results = []
    known: dict[str, dict[str, int]] = {}
    for case in json.loads(sys.argv[1]):
        with tempfile.TemporaryDirectory() as reports:
            # Mosaic reads these variables when it compiles.
            os.environ |= {"MOSAIC_GPU_DUMP_TO": reports, "MOSAIC_GPU_DUMP_PTXAS": "1"}
            program = compiled(case)
            # A kernel of an earlier case is cached and not compiled again, so keep its report.
            known |= kernel_reports(Path(reports))
        text, memory = program.as_text(), program.memory_analysis()
        results.append(
            {
                "temporaries": memory.temp_size_in_bytes,
                "arguments": memory.argument_size_in_bytes,
                "costs": declared_costs(text),
                "kernels": {
                    name: report for name, report in known.items() if f"{name}_mosaic_gpu" in text
                },
            }
        )
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
