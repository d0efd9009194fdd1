"""Step time of the mixture of experts beside a plain one, and beside another configuration.

    python -m experiments.moe_step_time --config=configs/tiny.py:moe --reference=configs/tiny.py \
        --output=experiments/results

Training steps are compiled of the configuration as it is, of the same with its experts written
plainly (`jax.lax.ragged_dot`, `jnp.take` and `lax.top_k`, differentiated by JAX), and of
--reference, if there is one. They then take turns, so that whatever else the machine does meets
all alike; what counts are the ratios within a round. Appends a JSON line to
OUTPUT/moe_step_time.jsonl and prints a table.
"""

from typing import Any
from unittest import mock

from absl import flags
from ml_collections import ConfigDict

from experiments import cli, compiled_step, json_lines
from umv2.config.schema import ConfigError

_CONFIG = cli.define_config("config", "Configuration to measure.")
_REFERENCE = cli.define_config("reference", "Configuration to compare with; none: no other.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the results; none: print only.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Steps of each variant that are timed.", 1)


def plain_mixture(x: Any, weights: Any, dispatch: Any, into: Any, down: Any) -> Any:
    """Does the work of `umv2.model.moe.experts.mixture` without a derivative of its own."""
    import jax
    import jax.numpy as jnp

    def product(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, matrices.astype(rows.dtype), dispatch.group_sizes)

    gate, up = into
    rows = jnp.take(x, dispatch.pairs // weights.shape[1], axis=0)
    out = product(jax.nn.silu(product(rows, gate)) * product(rows, up), down)
    return jnp.einsum("tkd,tk->td", jnp.take(out, dispatch.rows, axis=0), weights.astype(x.dtype))


def plain_step(config: ConfigDict) -> compiled_step.Step:
    """Compiles a training step with the plain mixture in place of the layer's own."""
    import jax

    from umv2.model.moe import experts, layer

    with (
        mock.patch.object(experts, "mixture", side_effect=plain_mixture) as mixture,
        mock.patch.object(layer, "_largest", side_effect=jax.lax.top_k) as largest,
    ):
        step = compiled_step.Step(config)
    assert mixture.called
    assert largest.called
    return step


def measure(config: ConfigDict, reference: ConfigDict | None, rounds: int) -> dict[str, Any]:
    """Returns medians, quartiles, ratios to the configuration's step, and memory of all steps."""
    if config.model.family != "moe":
        raise ConfigError(f"model.family={config.model.family!r}: must be 'moe' in --config")
    steps = {"moe": compiled_step.Step(config), "moe, plain": plain_step(config)}
    if reference is not None:
        steps[f"reference, {reference.model.family}"] = compiled_step.Step(reference)
    settings = {
        "moe": config.model.moe.to_dict(),
        "tokens_per_step": config.train.batch_size * config.data.sequence_length,
    }
    return settings | compiled_step.in_turns(steps, rounds, base="moe", label="moe")


def table(results: dict[str, Any]) -> str:
    """Returns the measurements as lined-up columns."""
    lines = [
        f"{'variant':<22}{'seconds':>9}{'ratio to moe':>14}{'quartiles':>16}{'compile s':>11}"
        f"{'temporary MiB':>15}{'active':>12}"
    ]
    for name, row in results["variants"].items():
        low, high = row["ratio_quartiles"]
        lines.append(
            f"{name:<22}{row['median_seconds']:>9.3f}{row['ratio_to_moe']:>14.3f}"
            f"{f'{low:.3f}-{high:.3f}':>16}{row['compile_seconds']:>11.1f}"
            f"{row['temporary_bytes'] / 2**20:>15.1f}{row['active_parameters']:>12,}"
        )
    return "\n".join(lines)


def main(_: list[str]) -> None:
    """Measures, prints and records."""
    given = [flag for flag in (_CONFIG, _REFERENCE) if flag.value is not None]
    config, *reference = map(cli.configuration, given)
    output = cli.output(_OUTPUT, "moe_step_time.jsonl")
    results = measure(config, reference[0] if reference else None, _ROUNDS.value)
    print(table(results))
    if output:
        json_lines.append(output, [{flag.name: flag.value for flag in given} | results])


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
