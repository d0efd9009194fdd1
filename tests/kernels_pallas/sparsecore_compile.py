"""Compiles value aggregation for SparseCores that are not attached: python this_file.py CASES

CASES is a JSON list of cases; prints the compiler's report on each as JSON. `aot.py` runs this in a
separate process, because only one process at a time can use libtpu.
"""

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
    use_abstract_mesh,
)

from kernels_pallas.value_aggregation import value_aggregation
from kernels_pallas.value_aggregation.call import AggregationCall
from kernels_pallas.value_aggregation.sparsecore import backend as pallas_sparsecore
from tests.kernels_pallas.aot import declared_costs
from tests.kernels_pallas.tpu_compile import TABLES
from tests.kernels_pallas.tpu_compile import arguments as natural_arguments

KERNELS = ("value_aggregation_forward", "value_aggregation_backward")


def arguments(case: dict[str, Any], num_devices: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    inputs = natural_arguments(case, num_devices)
    num_tokens, num_selected, num_cores = inputs["scores"].shape
    by_core = jax.ShapeDtypeStruct((num_tokens, num_cores, num_selected), jnp.float32)
    return inputs | {"scores": by_core}


def contiguous(array: Any, sharding: Any) -> Format:
    """The layout that the kernels read: contiguous rows, padded to 32 bytes."""
    order = tuple(range(len(array.shape)))
    return Format(Layout(order, tiling=((32 // array.dtype.itemsize,),)), sharding)


def compiled(case: dict[str, Any]) -> Any:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=case["topology"])
    device = topology.devices[0]

    def forward(inputs: dict[str, Any]) -> Any:
        # Scores are passed as [T, c, K], the kernel layout: XLA would copy them to transpose.
        scores = jnp.swapaxes(inputs["scores"], 1, 2)
        return value_aggregation(
            **inputs | {"scores": scores},
            activation=case.get("activation"),
            implementation="pallas_sparsecore",
        )

    def grads(names: tuple[str, ...], inputs: dict[str, Any]) -> Any:
        chosen = {name: inputs[name] for name in names if name in inputs}
        return jax.grad(lambda chosen: jnp.sum(forward(inputs | chosen) ** 2))(chosen)

    def token_grads(inputs: dict[str, Any]) -> Any:
        """The gradients that need the rows: only the backward kernel."""
        arrays = {n: x for n, x in inputs.items() if n not in ("scores", "output_grad")}
        call = AggregationCall(
            **arrays,
            scores=jnp.swapaxes(inputs["scores"], 1, 2),
            activation=case.get("activation"),
        )
        found = pallas_sparsecore.token_gradients(call, inputs["output_grad"])
        by_selection = [found.scores, *(term.weights for term in found.terms)]
        return [jnp.swapaxes(x, 1, 2) for x in by_selection], found.pre_inputs

    what = case["what"]
    if what == "sharded":
        mesh = Mesh(topology.devices, ("data",))
        specs = {n: PartitionSpec(None if n in TABLES else "data") for n in arguments(case)}

        def sharded(inputs: dict[str, Any]) -> Any:
            return jax.shard_map(forward, in_specs=(specs,), out_specs=PartitionSpec("data"))(
                inputs
            )

        def all_grads(inputs: dict[str, Any]) -> Any:
            floats = {n: x for n, x in inputs.items() if n != "indices"}
            return jax.grad(lambda floats: jnp.sum(sharded(inputs | floats) ** 2))(floats)

        with jax.set_mesh(mesh):
            placed = {
                n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[n]))
                for n, x in arguments(case, len(topology.devices)).items()
            }
            return jax.jit(all_grads).lower(placed).compile()

    sharding = SingleDeviceSharding(device)
    inputs = arguments(case)
    if what == "packed":
        # In rows of 128, a float32 table has the same bytes in the default layout.
        shapes = {n: (x.size // 128, 128) if n in TABLES else x.shape for n, x in inputs.items()}
        formats = jax.tree.map(lambda x: contiguous(x, sharding), inputs)
        formats |= {n: Format(None, sharding) for n in TABLES if n in inputs}
        packed = {n: jax.ShapeDtypeStruct(shapes[n], x.dtype) for n, x in inputs.items()}

        def unpacked(packed: dict[str, Any]) -> Any:
            return forward({n: packed[n].reshape(x.shape) for n, x in inputs.items()})

        with use_abstract_mesh(chip_mesh(device)):
            out = contiguous(jax.eval_shape(forward, inputs), sharding)
            jitted = jax.jit(unpacked, in_shardings=(formats,), out_shardings=out)
            return jitted.lower(packed).compile()
    if what == "beside_products":

        def beside_products(inputs: dict[str, Any], x: jax.Array) -> Any:
            return forward(inputs), x @ x @ x

        with use_abstract_mesh(chip_mesh(device)):
            square = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16)
            formats = jax.tree.map(lambda x: contiguous(x, sharding), inputs)
            jitted = jax.jit(beside_products, in_shardings=(formats, sharding))
            return jitted.lower(inputs, square).compile()
    if what == "mapped":
        inputs = {n: jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for n, x in inputs.items()}
        with use_abstract_mesh(chip_mesh(device)):
            return jax.jit(jax.vmap(forward), in_shardings=sharding).lower(inputs).compile()

    with use_abstract_mesh(chip_mesh(device)):
        function: Any = forward
        if what == "token_grads":
            function, inputs = (
                token_grads,
                inputs | {"output_grad": jax.eval_shape(forward, inputs)},
            )
        elif what == "grads":
            function = functools.partial(grads, ("scores", "pre_inputs", *TABLES))
        outs = jax.tree.map(lambda x: contiguous(x, sharding), jax.eval_shape(function, inputs))
        formats = jax.tree.map(lambda x: contiguous(x, sharding), inputs)
        jitted = jax.jit(function, in_shardings=(formats,), out_shardings=outs)
        return jitted.lower(inputs).compile()


def chip_mesh(device: Any) -> AbstractMesh:
    """A mesh that tells JAX the chip when it is in context."""
    abstract = AbstractDevice(device.device_kind, device.num_cores, "tpu")
    return AbstractMesh((1,), ("x",), abstract_device=abstract, axis_types=(AxisType.Auto,))


def has_products_meanwhile(text: str) -> bool:
    """Whether a matrix product is scheduled between the start and the end of a kernel."""
    schedule = text.partition("ENTRY")[2]
    _, started, rest = schedule.partition(".call-update = ")
    meanwhile, ended, _ = rest.partition("call-done(")  # or custom-call-done, by version
    return bool(started and ended) and "dot_general" in meanwhile


def main() -> None:
    results = []
    for case in json.loads(sys.argv[1]):
        program = compiled(case)
        memory = program.memory_analysis()
        text = program.as_text()
        results.append(
            {
                "temporaries": memory.temp_size_in_bytes,
                "arguments": memory.argument_size_in_bytes,
                "costs": declared_costs(text),
                "kernels": [name for name in KERNELS if name in text],
                "products_meanwhile": has_products_meanwhile(text),
            }
        )
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
