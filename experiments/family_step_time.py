r"""Training steps of every family of a configuration, timed in turns in one process.

    python -m experiments.family_step_time --config=configs/tiny.py \
        --output=experiments/results/families_tiny

OUTPUT/step_time.json holds medians, quartiles, memory, and ratios to UltraMemV2's
step of the same round.
"""

import importlib
import json
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from configs import families
from experiments.compiled_step import Step, in_turns

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration of the reference.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of step_time.json; none: print only.")
_FAMILIES = flags.DEFINE_list("families", None, "Families to time; default: all of the scale.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Steps of each family that are timed.", 1)


def main(argv: list[str]) -> None:
    """Compiles the steps, takes turns with them, prints and stores."""
    del argv
    file = Path(str(config_flags.get_config_filename(flags.FLAGS["config"])))
    sizes = importlib.import_module(f"configs.{file.stem}").SIZES
    steps = {
        family: Step(families.switch(_CONFIG.value.copy_and_resolve_references(), family, sizes))
        for family in _FAMILIES.value or [families.REFERENCE, *sizes]
    }
    results = in_turns(steps, _ROUNDS.value, base=families.REFERENCE, label="reference")
    for family, timing in results["variants"].items():
        low, high = timing["ratio_quartiles"]
        print(f"{family:<13}{timing['ratio_to_reference']:>6.2f} ({low:.2f}-{high:.2f})")
    if _OUTPUT.value:
        path = Path(_OUTPUT.value) / "step_time.json"
        path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
