"""Compiles `layers` for a TPU topology that is not attached: argv[1], such as v5e:2x4, and a mesh.

Prints the compiled text, the memory and the estimate as JSON. `test_collectives.py` runs this in a
separate process, because libtpu serves one process at a time.
"""

import json
import sys

import jax.numpy as jnp
from jax.experimental import topologies

from tests.planning import collective_programs
from umv2.planning.program import estimate, memory

if __name__ == "__main__":
    topology, shape = sys.argv[1], json.loads(sys.argv[2])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    program = collective_programs.layers(
        collective_programs.make_mesh(shape, devices), jnp.bfloat16
    )
    stats, work = memory(program), estimate(program)
    assert stats is not None
    answer = {"text": program.as_text(), "memory": stats.as_dict(), "estimate": work.as_dict()}
    sys.stdout.write(json.dumps(answer))
