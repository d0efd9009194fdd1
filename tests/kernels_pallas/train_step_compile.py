"""Compiles umv2's training step with its kernels for chips that are not attached.

python train_step_compile.py CASES: JSON, a list of {topology, devices, fields}, the topology one
of TPUs or "h200"; prints, as JSON, the names of the kernels in each compiled program.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from configs import tiny
from umv2 import parallel
from umv2.config import from_config_dict
from umv2.cost.topology import H200
from umv2.training import optim
from umv2.training import train as training
from umv2.training.state import abstract_state, model_structure
from umv2.types import Batch

KERNELS = [
    f"{operator}_{part}"
    for operator in ("product_key_top_k", "value_aggregation")
    for part in ("forward", "backward")
]


def compiled(case: dict[str, Any]) -> Any:
    if case["topology"] == "h200":
        topology = topologies.get_topology_desc(
            "h200", platform="cuda", topology=f"1x1x{case['devices']}", target_config=H200
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=case["topology"])
    values = tiny.get_config("ultramem_v2")
    values.model.memory.initialization = "released"  # spares the calibration
    values.update_from_flattened_dict(case["fields"])
    config = from_config_dict(values)
    optimizer = optim.Optimizer(config.optimizer, config.train.num_steps)
    mesh = parallel.create_mesh(config.mesh, devices=topology.devices[: case["devices"]])
    # What runs at once, and not in the step, has to stand outside of a mesh without devices.
    example = Batch(*(jnp.ones((1, 1), kind) for kind in (int, int, int, float)))
    with jax.set_mesh(mesh):
        state = abstract_state(config, optimizer)
        step = training.make_train_step(config, model_structure(config.model), optimizer)
        sharding = parallel.batch_sharded(mesh)
        shape = (config.train.batch_size, config.data.sequence_length)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
        weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        batch = jax.tree.unflatten(jax.tree.structure(example), [ids, ids, ids, weights])
        return jax.jit(step).lower(state, batch).compile()


def main() -> None:
    results = []
    for case in json.loads(sys.argv[1]):
        text = compiled(case).as_text()
        results.append([name for name in KERNELS if name in text])
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
