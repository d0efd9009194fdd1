"""Compiles product-key top-k for TPUs that are not attached: python tpu_compile_top_k.py CASES

CASES is a JSON list of cases; prints the bytes of temporaries and the kernels of each as JSON.
`aot.py` runs this in a separate process, because only one process at a time can use libtpu.
"""

import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from kernels_pallas.product_key_top_k import product_key_top_k
from kernels_pallas.product_key_top_k.call import TopKCall
from kernels_pallas.product_key_top_k.shapes import Shape
from kernels_pallas.product_key_top_k.tpu import backend as pallas_tpu

KERNELS = ("product_key_top_k_forward", "product_key_top_k_backward")


def compiled(case: dict[str, Any]) -> Any:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=case["topology"])
    shape = Shape("case", "ci", **case["shape"])
    arrays = shape.arguments(case["dtype"])
    named = {**shape.options, "implementation": "pallas_tpu"}

    def top_k(arrays: dict[str, Any]) -> Any:
        return product_key_top_k(**arrays, **named)

    def grads(arrays: dict[str, Any]) -> Any:
        def loss(floats: dict[str, Any]) -> Any:
            return jnp.sum(top_k(arrays | floats)[0] ** 2)

        return jax.grad(loss)({n: arrays[n] for n in ("query", "keys", "cores")})

    if case["what"] == "sharded":
        mesh = Mesh(topology.devices, ("data",))  # in context, it sets the platform

        def specs(name: str) -> PartitionSpec:
            return PartitionSpec(*[None] * 3, "data") if name == "query" else PartitionSpec()

        def sharded(arrays: dict[str, Any]) -> Any:
            run = jax.shard_map(
                lambda arrays: product_key_top_k(**arrays, **named)[0],
                in_specs=({name: specs(name) for name in arrays},),
                out_specs=PartitionSpec("data"),
            )
            return jnp.sum(run(arrays) ** 2)

        with jax.set_mesh(mesh):
            sizes = dict(case["shape"], num_tokens=shape.num_tokens * len(topology.devices))
            placed = {
                name: jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=NamedSharding(mesh, specs(name))
                )
                for name, x in Shape("case", "ci", **sizes).arguments(case["dtype"]).items()
            }
            return jax.jit(jax.grad(sharded)).lower(placed).compile()

    named["platform"] = "tpu"
    sharding = SingleDeviceSharding(topology.devices[0])
    # Let the compiler choose layouts, so that it needs no copies.
    free = Format(Layout.AUTO, sharding)
    if case["what"] == "mapped":
        arrays = {n: jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for n, x in arrays.items()}
        return jax.jit(jax.vmap(top_k), in_shardings=sharding).lower(arrays).compile()
    call = TopKCall(**arrays, **shape.options)
    if case["what"] == "forward":
        jitted = jax.jit(pallas_tpu.forward, in_shardings=free, out_shardings=free)
        return jitted.lower(call).compile()
    if case["what"] == "backward":
        scores, addresses, chosen = jax.eval_shape(
            partial(pallas_tpu.forward, with_chosen=True), call
        )
        jitted = jax.jit(pallas_tpu.backward, in_shardings=free, out_shardings=free)
        return jitted.lower(call, addresses, chosen, scores).compile()
    return jax.jit(grads, in_shardings=free, out_shardings=free).lower(arrays).compile()


def main() -> None:
    results = []
    for case in json.loads(sys.argv[1]):
        program = compiled(case)
        text = program.as_text()
        results.append(
            {
                "temporaries": program.memory_analysis().temp_size_in_bytes,
                "kernels": [name for name in KERNELS if f"%{name}" in text],
            }
        )
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
