"""Ablations of questions that the paper leaves open or does not ask."""

from configs import families
from experiments.ablations import scales
from experiments.ablations.arms import (
    ALL,
    BUDGET,
    COMPUTE,
    CONSTANT_1,
    FALLING_4_TO_1,
    Ablation,
    Arm,
    Expected,
    half_of_row,
    row_split,
    times,
    top_m,
)

# The multi-hop documents of experiments/ablations/corpora.py, as bytes.
_MULTI_HOP = {
    "model.vocab_size": 264,
    "data.source": "text",
    "data.paths": (scales.MULTI_HOP_TEXT,),
    "data.tokenizer": "bytes",
    "data.sequence_length": 128,
    "train.batch_size": 32,
}


def _rows(factor: float, expected: Expected) -> Arm:
    """An arm with another number of keys per side, so with its square in rows."""
    return Arm({"model.memory.num_keys": times(factor)}, "not stated", expected)


BEYOND: dict[str, Ablation] = {
    "early_training": Ablation(
        question="How does the gap to a mixture of experts change over training?",
        source="our own; section 5 says that UltraMemV2 trails early",
        finding="UltraMemV2 trails early and catches up with continued training",
        arms={
            "ultramem_v2": Arm({"train.num_steps": times(4), **CONSTANT_1}),
            "ultramem_v2_4x": Arm(
                {"train.num_steps": times(4), **FALLING_4_TO_1},
                "leads 1x early",
                "lower",
            ),
            "moe": Arm({"train.num_steps": times(4)}, "leads early", "lower", make=families.moe),
        },
        fixed=ALL,
        free=("moe.num_experts", "moe.expert_size"),
        paper_file="paper_227m_1b2",
        explanation="Runs are four times as long as usual; the result is the curve of differences.",
    ),
    "longer_value_processing": Ablation(
        question="Does the gap between PEER values and plain ones change with more training?",
        source="our own, on section 4.2.1",
        finding="PEER values win after hundreds of billions of tokens",
        arms={
            "peer": Arm({"train.num_steps": times(4), **row_split(1, 1)}),
            "plain": Arm(
                {"train.num_steps": times(4), **half_of_row()},
                "+0.02 to +0.03 loss",
                expected="higher",
                paper_difference=0.025,
            ),
        },
        fixed=BUDGET,
        free=("ffn_size", "memory.num_keys", "memory.top_m"),
        paper_file="paper_430m_5b",
        explanation="The arms of value_processing, trained for four times as many steps.",
    ),
    "multi_hop": Ablation(
        question="Do memory layers help or hurt multi-hop reasoning?",
        source="our own; Table 2 has 17.7 for UltraMemV2 against 34.8 for MoE, unexplained",
        finding="UltraMemV2 answers half as many multi-hop questions as MoE",
        arms={
            "moe": Arm(_MULTI_HOP, make=families.moe),
            "ultramem_v2": Arm(_MULTI_HOP, "-17.1 points", "lower"),
            "dense": Arm(_MULTI_HOP, "not stated", make=families.dense),
        },
        fixed=ALL,
        free=("ffn_size", "memory.num_keys", "moe.num_experts", "moe.expert_size"),
        paper_file="paper_227m_1b2",
        scaled={scale: {"train.num_steps": times(2)} for scale in ("cpu",)},
        measure="answer_accuracy",
        explanation="Facts 'a is in b' in shuffled order, then questions for the place 1 to 4 hops"
        " away; teacher-forced accuracy over all held-out questions.",
    ),
    "table_rows": Ablation(
        question="What do more rows bring at fixed active compute?",
        source="our own",
        finding="not in the paper; V1 sees the loss fall with the logarithm of the rows",
        arms={
            "1": Arm(),
            "1_16": _rows(1 / 4, "higher"),
            "1_4": _rows(1 / 2, "higher"),
            "4": _rows(2, "lower"),
            "16": _rows(4, "lower"),
        },
        fixed=COMPUTE,
        scaled={
            "smoke": {"model.ffn_size": 128, "model.memory.num_keys": 32},
            "gpu": {"model.memory.num_keys": 192},  # 16 times the rows still fit one H200
        },
        explanation="Arms are named by the number of rows relative to the base.",
    ),
    "selection": Ablation(
        question="What does a larger top-m bring at fixed active compute?",
        source="our own",
        finding="not in the paper at fixed tables; Table 1 favours density",
        arms={
            "1": Arm(),
            "1_4": Arm(top_m(1 / 4), "not stated", "higher"),
            "1_2": Arm(top_m(1 / 2), "not stated", "higher"),
            "2": Arm(top_m(2), "not stated", "lower"),
            "4": Arm(top_m(4), "not stated", "lower"),
        },
        fixed=COMPUTE,
        explanation="Arms are named by top-m relative to the base; the FFN size makes up for it.",
    ),
}
