"""Compiles umv2's training step with its kernels for chips that are not attached.

Usage: python train_step_compile.py CASES. CASES is a JSON list of {topology, fields}, with topology
names of umv2/planning/topology.py; prints the names of the kernels in each compiled program as
JSON.
"""

import json
import sys
from typing import Any

from configs import tiny
from umv2 import sharding
from umv2.config import from_config_dict
from umv2.cost import exchange
from umv2.planning import ahead_of_time, topology

KERNELS = [
    f"{operator}_{part}"
    for operator in ("product_key_top_k", "value_aggregation")
    for part in ("forward", "backward")
] + ["splash_mha", "__cudnn$fmha"]


def compiled(case: dict[str, Any]) -> Any:
    values = tiny.get_config("ultramem_v2")
    values.update_from_flattened_dict(case["fields"])
    config = from_config_dict(values)
    devices = topology.parse(case["topology"]).devices()
    mesh = sharding.create_mesh(config.mesh, devices=devices)
    config = exchange.resolve_mesh(config, mesh.shape, num_tokens=1024)
    return ahead_of_time.lower(config, mesh, "train").compile()


def main() -> None:
    results = []
    for case in json.loads(sys.argv[1]):
        text = compiled(case).as_text()
        results.append([name for name in KERNELS if name in text])
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
