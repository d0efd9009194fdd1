"""The ladder of ablations from product-key memory to UltraMem (V1, arXiv 2411.12364)."""

from ml_collections import ConfigDict

from configs import families
from experiments.ablations.arms import (
    BUDGET,
    CONSTANT_1,
    FALLING_4_TO_1,
    Ablation,
    Arm,
    Diff,
    Expected,
    apply,
    placed,
    skips,
)

# Each step adds to the previous ones: name, diff, training and validation loss reported by V1.
_STEPS: tuple[tuple[str, Diff, float, float], ...] = (
    ("pkm", {}, 2.604, 2.828),
    ("no_softmax", {"model.memory.score_activation": "none"}, 2.570, 2.822),
    (
        "half_value_width",
        {
            "model.memory.value_dim": lambda config, path: config.model.hidden_size // 2,
            "model.memory.projection": "single",
        },
        2.556,
        2.800,
    ),
    ("shared_query", {"model.memory.query": "shared"}, 2.560, 2.803),
    ("several_memories", skips(), 2.554, 2.788),
    ("norms", {"model.memory.query_norm": "rms", "model.memory.key_norm": "rms"}, 2.553, 2.789),
    (
        "implicit_value_expansion",
        {
            "model.memory.key_expansion": 2,
            "model.memory.projection": "per_block",
            "model.memory.shuffle": True,
        },
        2.544,
        2.772,
    ),
    (
        "tucker_scores",
        {
            "model.memory.scoring": "tucker",
            "model.memory.tucker_rank": 2,
            "loss.tucker_penalty": 0.001,
        },
        2.538,
        2.764,
    ),
    ("two_cores", {"model.memory.num_cores": 2}, 2.521, 2.761),
    ("initialization", {"model.memory.initialization": "principled"}, 2.518, 2.758),
    ("value_learning_rate", FALLING_4_TO_1, 2.494, 2.736),
)


def _product_key_memory(config: ConfigDict) -> None:
    """The first rung: PKM in the middle block, without the norms and constants of later rungs."""
    families.pkm(config)
    apply(config, placed(1))
    config.model.memory.num_heads = 2  # as in UltraMem
    config.model.memory.query_norm = "none"
    config.model.memory.initialization = "released"
    apply(config, CONSTANT_1)


def _arms() -> dict[str, Arm]:
    arms: dict[str, Arm] = {}
    diff: Diff = {}
    previous = ("", 0.0, 0.0)
    for name, step, training, validation in _STEPS:
        diff = {**diff, **step}
        last, last_training, last_validation = previous
        expected: Expected = "lower" if validation < last_validation else "higher"
        paper = (
            f"{validation - last_validation:+.3f} held-out loss,"
            f" {training - last_training:+.3f} training loss"
        )
        arms[name] = Arm(
            diff,
            paper if last else "",
            expected=expected if last else "not stated",
            paper_difference=round(validation - last_validation, 3) if last else None,
            versus=last,
            make=_product_key_memory,
        )
        previous = (name, training, validation)
    return arms


LADDER = Ablation(
    question="What does each step from PKM to UltraMem gain?",
    source="V1, ablation of 151M active parameters",
    finding="loss falls from 2.604 (held-out 2.828) to 2.494 (2.736); most by leaving out the"
    " softmax, by the decay of the value learning rate and by several cores",
    arms=_arms(),
    fixed=BUDGET,
    free=("ffn_size", "memory.num_keys", "memory.top_m"),
    paper_file="paper_227m_1b2",
    explanation="Each arm is compared with the step before it.",
)
