"""Training steps, compiled and ready to be timed, and how benchmarks take turns with them."""

import datetime
import os
import platform
import time
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

_WARM_UP_ROUNDS = 2


class Step:
    """A compiled training step with a state and a batch to run it on."""

    def __init__(self, values: ConfigDict):
        import jax

        from umv2 import sharding
        from umv2.config import from_config_dict
        from umv2.cost import accounting
        from umv2.data import loader
        from umv2.data.corpus import open_corpus
        from umv2.training import optim, train
        from umv2.training.state import create_state, model_structure

        config = from_config_dict(values)
        corpus = open_corpus(config.data, config.model.vocab_size)
        batches = loader.train_batches(
            corpus, config.data, batch_size=config.train.batch_size, start_step=0
        )
        optimizer = optim.Optimizer(config.optimizer, config.train.num_steps)
        self._mesh = sharding.create_mesh(config.mesh, config.train.batch_size)
        with jax.set_mesh(self._mesh):
            self._state = jax.jit(lambda: create_state(config, optimizer))()
            self._batch = sharding.local_to_global(self._mesh, next(batches))
            step = train.make_train_step(config, model_structure(config.model), optimizer)
            start = time.perf_counter()
            lowered = jax.jit(step, donate_argnums=0).lower(self._state, self._batch)
            self._compiled = lowered.compile()
            self.compile_seconds = time.perf_counter() - start
        batches.close()
        memory = self._compiled.memory_analysis()
        assert memory is not None  # every XLA backend of jax reports it
        self.temporary_bytes = memory.temp_size_in_bytes
        self.peak_bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        self.active_parameters = accounting.parameter_counts(config.model).active
        self.seconds: list[float] = []

    def run(self, *, timed: bool) -> None:
        """Takes one step."""
        import jax

        start = time.perf_counter()
        with jax.set_mesh(self._mesh):
            self._state, metrics = self._compiled(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        if timed:
            self.seconds.append(time.perf_counter() - start)


def in_turns(steps: Mapping[str, Step], rounds: int, *, base: str, label: str) -> dict[str, Any]:
    """Takes steps in turns and returns medians, quartiles, memory, and ratios to one of them.

    Ratios, under `ratio_to_{label}`, are within a round: what disturbs the machine then disturbs
    all alike. What it ran on stands beside them.
    """
    import jax
    import numpy as np

    for round_index in range(_WARM_UP_ROUNDS + rounds):
        for step in steps.values():
            step.run(timed=round_index >= _WARM_UP_ROUNDS)
    variants = {}
    for name, step in steps.items():
        low, median, high = np.percentile(step.seconds, [25, 50, 75])
        ratios = np.percentile(np.divide(step.seconds, steps[base].seconds), [25, 50, 75])
        variants[name] = {
            "median_seconds": median,
            "quartile_seconds": [low, high],
            f"ratio_to_{label}": ratios[1],
            "ratio_quartiles": [ratios[0], ratios[2]],
            "compile_seconds": step.compile_seconds,
            "temporary_bytes": step.temporary_bytes,
            "peak_bytes": step.peak_bytes,
            "active_parameters": step.active_parameters,
        }
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "rounds": rounds,
        "variants": variants,
    }
