"""Compiles gradients of tables for absent TPUs: python table_gradient_compile.py CASES

CASES is a JSON list of cases; prints the bytes of temporaries and the kernels of each as JSON. A
case compiles `value_aggregation_row_gradients` ("rows"), its dense form ("dense"), or only the sums
of one table from sorted selections ("sums").
"""

import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kernels_pallas.table_gradient.tpu.backend import sum_by_row
from kernels_pallas.value_aggregation import value_aggregation_row_gradients
from kernels_pallas.value_aggregation.api import BACKENDS
from kernels_pallas.value_aggregation.call import AggregationCall
from tests.kernels_pallas.tpu_compile import arguments, row_major


def compiled(case: dict[str, Any]) -> Any:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=case["topology"])
    sharding = SingleDeviceSharding(topology.devices[0])
    if case["what"] == "sums":
        return compiled_sums(case, sharding)
    inputs = arguments(case)
    output_grad = jax.ShapeDtypeStruct((case["num_tokens"], case["value_dim"]), jnp.float32)
    inputs["output_grad"] = output_grad

    def rows(inputs: dict[str, Any]) -> Any:
        return value_aggregation_row_gradients(
            **inputs, implementation="pallas_tpu", platform="tpu", max_rows=case.get("max_rows")
        )

    def dense(inputs: dict[str, Any]) -> Any:
        arrays = {name: x for name, x in inputs.items() if name != "output_grad"}
        return BACKENDS["pallas_tpu"].backward(AggregationCall(**arrays), inputs["output_grad"])

    function = {"rows": rows, "dense": dense}[case["what"]]
    reverse = ("indices", "scores")
    formats = {
        name: row_major(x.ndim, x.dtype, sharding, reverse=name in reverse)
        for name, x in inputs.items()
    }
    outs = jax.tree.map(
        lambda x: row_major(x.ndim, x.dtype, sharding, reverse=x.ndim == 3) if x.ndim > 1 else None,
        jax.eval_shape(function, inputs),
    )
    program = jax.jit(function, in_shardings=(formats,), out_shardings=outs)
    return program.lower(inputs).compile()


def compiled_sums(case: dict[str, Any], sharding: Any) -> Any:
    num_tokens, dtype = case["num_tokens"], jnp.dtype(case["table_dtype"])
    selections = (num_tokens * case["num_selected"],)
    ids = jax.ShapeDtypeStruct(selections, jnp.int32)
    weights = [jax.ShapeDtypeStruct(selections, jnp.float32)] * case["num_cores"]
    factors = jax.ShapeDtypeStruct((num_tokens, case["dim"]), jnp.float32)

    def sums(ids: Any, tokens: Any, weights: Any, factors: Any) -> Any:
        return sum_by_row(ids, tokens, weights, factors, case["num_values"], dtype)

    function = jax.jit(sums, in_shardings=sharding, out_shardings=row_major(2, dtype, sharding))
    return function.lower(ids, ids, weights, factors).compile()


def main() -> None:
    results = []
    for case in json.loads(sys.argv[1]):
        program = compiled(case)
        memory = program.memory_analysis()
        kernels = re.findall(r"%(value_aggregation_\w+)[.\d]* = ", program.as_text())
        results.append({"temporaries": memory.temp_size_in_bytes, "kernels": kernels})
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
