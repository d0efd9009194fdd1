"""Step time and memory of a configuration beside its dense and unrolled counterparts.

    python -m experiments.step_time --config=configs/tiny.py --output=experiments/results

Three training steps are compiled: the configuration as it is, with `scan_layers=False`, and dense
with the FFN widened to the same active parameters. They then take turns, so that whatever else the
machine does meets all alike; what counts is the ratio of medians. Appends a JSON line to
OUTPUT/step_time.jsonl and prints a table.
"""

from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments import cli, json_lines
from experiments.compiled_step import Step, in_turns

_CONFIG = cli.define_config("config", "Configuration to measure.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for step_time.jsonl; none: print only.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Steps of each variant that are timed.", 1)


def variants(config: ConfigDict) -> dict[str, ConfigDict]:
    """Returns the configurations to compare, by name; the first is the reference."""
    from umv2.config import from_config_dict
    from umv2.cost import accounting

    unrolled, dense = config.copy_and_resolve_references(), config.copy_and_resolve_references()
    unrolled.model.scan_layers = not config.model.scan_layers
    dense.model.family = "dense"
    active = accounting.parameter_counts(from_config_dict(config).model).active
    missing = active - accounting.parameter_counts(from_config_dict(dense).model).active
    dense.model.ffn_size += round(
        missing / (3 * config.model.hidden_size * config.model.num_layers)
    )
    return {
        "as configured": config,
        f"scan_layers={unrolled.model.scan_layers}": unrolled,
        f"dense, ffn_size={dense.model.ffn_size}": dense,
    }


def measure(config: ConfigDict, rounds: int) -> dict[str, Any]:
    """Returns medians, quartiles, ratios to the dense step, and memory of every variant."""
    steps = {name: Step(values) for name, values in variants(config).items()}
    *_, dense = steps
    tokens = config.train.batch_size * config.data.sequence_length
    return {"tokens_per_step": tokens} | in_turns(steps, rounds, base=dense, label="dense")


def table(results: dict[str, Any]) -> str:
    """Returns the measurements as lined-up columns."""
    lines = [
        f"{'variant':<26}{'ratio to dense':>22}{'quartiles':>16}{'compile s':>11}"
        f"{'temporary MiB':>15}{'peak MiB':>10}{'active':>12}"
    ]
    for name, row in results["variants"].items():
        low, high = row["ratio_quartiles"]
        lines.append(
            f"{name:<26}{row['ratio_to_dense']:>22.3f}{f'{low:.3f}-{high:.3f}':>16}"
            f"{row['compile_seconds']:>11.1f}{row['temporary_bytes'] / 2**20:>15.1f}"
            f"{row['peak_bytes'] / 2**20:>10.1f}{row['active_parameters']:>12,}"
        )
    return "\n".join(lines)


def main(_: list[str]) -> None:
    """Measures, prints and records."""
    config, output = cli.configuration(_CONFIG), cli.output(_OUTPUT, "step_time.jsonl")
    results = measure(config, _ROUNDS.value)
    print(table(results))
    if output:
        json_lines.append(output, [{"config": _CONFIG.value} | results])


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
