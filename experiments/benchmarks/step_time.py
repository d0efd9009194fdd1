r"""Time and memory of training steps, interleaved.

    python -m experiments.benchmarks.step_time --config=tiny --variants=dense,config,unrolled
    python -m experiments.benchmarks.step_time --config=tiny --variants=config,families
    python -m experiments.benchmarks.step_time --config=tiny --variants=pytorch,dense,config
    python -m experiments.benchmarks.step_time --config=tiny:moe \
        --variants=config,plain_experts,tiny

Other load on the machine affects all variants alike, so the figure to compare is the ratio to the
first variant within a round. A variant is one of

    config           the configuration as it is
    unrolled         with the other value of `model.scan_layers` (on a CPU, both may be unrolled)
    dense            without sparse layers, the FFN widened to the same number of active parameters
    plain_experts    the MoE with `jax.lax.ragged_dot`, `jnp.take` and `lax.top_k` in its experts,
                     differentiated by JAX
    families         every family at the configuration's scale, with the sizes in configs/
    pytorch          the dense step in eager PyTorch (the extra `reference`, or the interpreter
                     named by --pytorch), stopped while the others run: its threads spin
    FILE[:ARGUMENT]  another configuration

Prints a table, and with --output appends a line to OUTPUT/step_time.jsonl.
"""

import atexit
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

from absl import flags
from ml_collections import ConfigDict

from configs import families
from experiments import cli, measurements
from umv2 import command
from umv2.config.schema import ConfigError

_CONFIG = cli.define_config("config", "Configuration to measure.")
_VARIANTS = flags.DEFINE_list(
    "variants", ["config", "dense"], "Steps to time; ratios are to the first."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder of step_time.jsonl; default: print only.")
_PYTORCH = flags.DEFINE_string(
    "pytorch", sys.executable, "Python with torch, for the variant pytorch."
)
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed steps of each variant.", 1)

_WARM_UP_ROUNDS = 2
_PLAIN_EXPERTS = "plain_experts"
_PYTORCH_STEP = "pytorch"


class Step(Protocol):
    """A training step with a state and a batch to run it on.

    Seconds and bytes that a step does not report are None.
    """

    seconds: list[float]
    active_parameters: int
    compile_seconds: float | None
    temporary_bytes: int | None
    peak_bytes: int | None

    def run(self, *, timed: bool) -> None:
        """Takes one step."""


class CompiledStep:
    """The step of a configuration, compiled."""

    def __init__(self, values: ConfigDict):
        import jax

        from umv2 import sharding
        from umv2.config import from_config_dict
        from umv2.cost import accounting
        from umv2.data import loader
        from umv2.data.corpus import open_corpus
        from umv2.training import train
        from umv2.training.state import create_state

        config = from_config_dict(values)
        corpus = open_corpus(config.data, config.model.vocab_size)
        batches = loader.train_batches(
            corpus, config.data, batch_size=config.train.batch_size, start_step=0
        )
        self._mesh = sharding.create_mesh(config.mesh, config.train.batch_size)
        with jax.set_mesh(self._mesh):
            self._state = jax.jit(lambda: create_state(config))()
            self._batch = sharding.local_to_global(self._mesh, next(batches))
            step = train.make_train_step(config)
            start = time.perf_counter()
            lowered = jax.jit(step, donate_argnums=0).lower(self._state, self._batch)
            self._compiled = lowered.compile()
            self.compile_seconds: float | None = time.perf_counter() - start
        batches.close()
        memory = self._compiled.memory_analysis()
        assert memory is not None  # every XLA backend of jax reports it
        self.temporary_bytes: int | None = memory.temp_size_in_bytes
        self.peak_bytes: int | None = memory.temp_size_in_bytes + memory.argument_size_in_bytes
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


class PyTorchStep:
    """The step of a dense configuration in eager PyTorch, in a process that is stopped meanwhile.

    Raises:
      ConfigError: the Python that --pytorch names cannot run it.
    """

    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None

    def __init__(self, values: ConfigDict):
        from umv2.config import from_config_dict
        from umv2.cost import accounting

        config = from_config_dict(values)
        model = config.model
        sizes = {
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "num_layers": model.num_layers,
            "num_heads": model.num_heads,
            "ffn_size": model.ffn_size,
            "norm_epsilon": model.norm_epsilon,
            "rope_theta": model.rope_theta,
            "batch_size": config.train.batch_size,
            "sequence_length": config.data.sequence_length,
        }
        self.active_parameters = accounting.parameter_counts(model).active
        self.seconds: list[float] = []
        command = [_PYTORCH.value, str(Path(__file__).with_name("pytorch_step.py"))]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        except OSError as error:
            raise ConfigError(f"--pytorch={_PYTORCH.value}: {error.strerror}") from None
        atexit.register(self._process.kill)
        if self._ask(json.dumps(sizes)) != "ready":
            raise ConfigError(f"--pytorch={_PYTORCH.value}: cannot run {command[1]}; see above")
        self._process.send_signal(signal.SIGSTOP)

    def run(self, *, timed: bool) -> None:
        """Takes one step."""
        self._process.send_signal(signal.SIGCONT)
        seconds = float(self._ask(""))
        self._process.send_signal(signal.SIGSTOP)
        if timed:
            self.seconds.append(seconds)

    def _ask(self, line: str) -> str:
        """Sends a line and returns the answer; empty if the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        return self._process.stdout.readline().strip()


def variants(names: list[str], config: ConfigDict, given: str) -> dict[str, ConfigDict]:
    """Returns the configurations of the variants, by their names in the results.

    Args:
      names: the entries of --variants.
      config: the configuration that they vary.
      given: the value of --config, for messages.

    Raises:
      ConfigError: an unknown variant, or no variants.
    """
    from umv2.config import files as config_files

    variants_by_name: dict[str, ConfigDict] = {}
    for name in names:
        copy = config.copy_and_resolve_references()
        match name:
            case "config":
                variants_by_name["config"] = copy
            case "unrolled":
                copy.model.scan_layers = not config.model.scan_layers
                variants_by_name[f"scan_layers={copy.model.scan_layers}"] = copy
            case "dense":
                widen_to_active_parameters(copy, config)
                variants_by_name[f"dense, ffn_size={copy.model.ffn_size}"] = copy
            case "plain_experts":
                if config.model.ffn != "moe":
                    raise ConfigError(
                        f"--variants={name}: --config={given} has no experts; name one of moe"
                    )
                variants_by_name[_PLAIN_EXPERTS] = copy
            case "pytorch":
                widen_to_active_parameters(copy, config)
                variants_by_name[_PYTORCH_STEP] = copy
            case "families":
                sizes = cli.sizes_of_families(_CONFIG)
                for family in sizes:
                    copy = config.copy_and_resolve_references()
                    variants_by_name[family] = families.switch(copy, family, sizes)
            case "":
                raise ConfigError("--variants: must name one")
            case _:
                variants_by_name[config_files.label(name)] = config_files.load(name, "--variants")
    if not variants_by_name:
        raise ConfigError("--variants: must name one")
    return variants_by_name


def widen_to_active_parameters(dense: ConfigDict, config: ConfigDict) -> None:
    """Makes `dense`, a copy of `config`, dense with the same number of active parameters."""
    from umv2.config import from_config_dict
    from umv2.cost import accounting

    dense.model.ffn = "dense"
    dense.model.memory.layer = "none"
    dense.model.ffn_size = max(1, dense.model.ffn_size)
    active = accounting.parameter_counts(from_config_dict(config).model).active
    missing = active - accounting.parameter_counts(from_config_dict(dense).model).active
    dense.model.ffn_size += round(
        missing / (3 * config.model.hidden_size * config.model.num_layers)
    )


def compile_step(name: str, config: ConfigDict) -> Step:
    """Compiles the training step of a variant."""
    if name == _PYTORCH_STEP:
        return PyTorchStep(config)
    if name != _PLAIN_EXPERTS:
        return CompiledStep(config)
    with contextlib.ExitStack() as stack:
        mocks = [stack.enter_context(each) for each in _plain_experts()]
        step = CompiledStep(config)
    assert all(each.called for each in mocks)
    return step


def _plain_experts() -> list[Any]:
    """Returns the patches that replace the MoE's operators with plain ones."""
    import jax

    from umv2.model.moe import experts, layer

    return [
        mock.patch.object(experts, "mixture", side_effect=plain_mixture),
        mock.patch.object(layer, "_top_k", side_effect=jax.lax.top_k),
    ]


def plain_mixture(x: Any, weights: Any, dispatch: Any, into: Any, down: Any) -> Any:
    """Computes `umv2.model.moe.experts.mixture` without a custom derivative."""
    import jax
    import jax.numpy as jnp

    def product(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, matrices.astype(rows.dtype), dispatch.group_sizes)

    gate, up = into
    rows = jnp.take(x, dispatch.pairs // weights.shape[1], axis=0)
    out = product(jax.nn.silu(product(rows, gate)) * product(rows, up), down)
    return jnp.einsum("tkd,tk->td", jnp.take(out, dispatch.rows, axis=0), weights.astype(x.dtype))


def time_interleaved(steps: Mapping[str, Step], rounds: int) -> dict[str, Any]:
    """Times interleaved steps; returns medians, quartiles, memory, and ratios to the first."""
    import numpy as np

    for round_index in range(_WARM_UP_ROUNDS + rounds):
        for step in steps.values():
            step.run(timed=round_index >= _WARM_UP_ROUNDS)
    base = next(iter(steps))
    results = {}
    for name, step in steps.items():
        low, median, high = np.percentile(step.seconds, [25, 50, 75])
        ratios = np.percentile(np.divide(step.seconds, steps[base].seconds), [25, 50, 75])
        results[name] = {
            "median_seconds": median,
            "quartile_seconds": [low, high],
            "ratio": ratios[1],
            "ratio_quartiles": [ratios[0], ratios[2]],
            "compile_seconds": step.compile_seconds,
            "temporary_bytes": step.temporary_bytes,
            "peak_bytes": step.peak_bytes,
            "active_parameters": step.active_parameters,
        }
    return {"rounds": rounds, "ratios_to": base, "variants": results}


def table(results: dict[str, Any]) -> str:
    """Returns the measurements as text in aligned columns."""
    width = 2 + max(map(len, ("variant", *results["variants"])))
    lines = [
        f"{'variant':<{width}}{'seconds':>9}{'ratio':>8}{'quartiles':>16}{'compile s':>11}"
        f"{'temporary MiB':>15}{'peak MiB':>10}{'active':>15}"
    ]
    for name, row in results["variants"].items():
        low, high = row["ratio_quartiles"]
        lines.append(
            f"{name:<{width}}{row['median_seconds']:>9.3f}{row['ratio']:>8.3f}"
            f"{f'{low:.3f}-{high:.3f}':>16}{_cell(row['compile_seconds']):>11}"
            f"{_cell(row['temporary_bytes'], 2**20):>15}{_cell(row['peak_bytes'], 2**20):>10}"
            f"{row['active_parameters']:>15,}"
        )
    return "\n".join(lines)


def _cell(value: float | None, unit: float = 1) -> str:
    return "-" if value is None else f"{value / unit:.1f}"


def main(_: list[str]) -> None:
    """Measures, prints and stores the results."""
    config, output = cli.configuration(_CONFIG), cli.output(_OUTPUT, "step_time.jsonl")
    configs = variants(_VARIANTS.value, config, _CONFIG.value)
    command.use_huge_pages()
    steps = {name: compile_step(name, values) for name, values in configs.items()}
    results = {
        "config": _CONFIG.value,
        "tokens_per_step": config.train.batch_size * config.data.sequence_length,
    } | time_interleaved(steps, _ROUNDS.value)
    print(table(results))
    if output:
        measurements.append(output, [measurements.about() | measurements.device() | results])


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
