r"""Training steps of every family of a configuration, timed in turns in one process.

    python -m experiments.family_step_time --config=configs/tiny.py \
        --output=experiments/results/families_tiny

OUTPUT/step_time.json holds medians, quartiles, memory, and ratios to UltraMemV2's
step of the same round.
"""

import json

from absl import flags

from configs import families
from experiments import cli
from experiments.compiled_step import Step, in_turns
from umv2 import files

_CONFIG = cli.define_config("config", "Configuration of the reference.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of step_time.json; none: print only.")
_FAMILIES = flags.DEFINE_list("families", None, "Families to time; default: all of the scale.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Steps of each family that are timed.", 1)


def main(_: list[str]) -> None:
    """Compiles the steps, takes turns with them, prints and stores."""
    config, sizes = cli.configuration(_CONFIG), cli.sizes_of_families(_CONFIG)
    names = cli.families(_FAMILIES, sizes)
    output = cli.output(_OUTPUT, "step_time.json")
    steps = {
        family: Step(families.switch(config.copy_and_resolve_references(), family, sizes))
        for family in dict.fromkeys([families.REFERENCE, *names])
    }
    results = in_turns(steps, _ROUNDS.value, base=families.REFERENCE, label="reference")
    for family, timing in results["variants"].items():
        low, high = timing["ratio_quartiles"]
        print(f"{family:<13}{timing['ratio_to_reference']:>6.2f} ({low:.2f}-{high:.2f})")
    if output:
        files.write_text(output, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
