"""Catalogue of all ablations of the paper and Table 3; see also ladder.py and beyond_paper.py.

    python main.py --config=experiments/ablations/catalogue.py:heads/two --workdir=runs/two_heads
    python -m experiments.ablations.run --ablation=heads --scale=cpu --seeds=3
    python -m experiments.ablations.report

An arm is named ABLATION/ARM, or ABLATION/ARM/SCALE with a scale of scales.py (default: cpu).
Sections and tables are those of UltraMemV2 (arXiv 2508.18756) unless V1 (UltraMem, arXiv
2411.12364) is named. The paper's results are differences to the compared arm: losses in nats per
token, accuracies in points.
"""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import families
from experiments import cli
from experiments.ablations import scales
from experiments.ablations.arms import (
    ALL,
    BUDGET,
    COMPUTE,
    CONSTANT_1,
    FALLING_4_TO_1,
    Ablation,
    Arm,
    apply,
    fraction_of_hidden,
    fraction_of_steps,
    half_of_row,
    layers,
    placed,
    row_split,
    skips,
    times,
    top_m,
)
from experiments.ablations.beyond_paper import BEYOND
from experiments.ablations.ladder import LADDER
from umv2.config.schema import ConfigError

# Written by `python -m experiments.ablations.sizes`: {scale: {"ablation/arm": {path: value}}}.
SIZES_FILE = Path(__file__).parent / "sizes.json"


def _compute_share(key_dim: int) -> Arm:
    """An arm of Table 4, by its D_k; that of the best arm is 524."""
    return Arm({"model.memory.key_dim": times(key_dim / 524)}, "17 % is best", expected="higher")


def _window(kind: str, group: int, paper: str) -> Arm:
    """An arm with other tables visible to a layer, paper section 4.2.8."""
    diff = {"model.memory.sharing": kind, "model.memory.share_group": group}
    return Arm(diff, paper, expected="lower")


_CONTINUED = {
    "optimizer.schedule": "constant_then_cosine",
    "optimizer.decay_start_step": fraction_of_steps(2 / 3),
    "train.evaluation_interval_steps": fraction_of_steps(2 / 3),
}

ABLATIONS: dict[str, Ablation] = {
    "value_processing": Ablation(
        question="Do values that a token computes with (PEER) beat plain value rows?",
        source="section 4.2.1, Figure 2",
        finding="PEER values: loss lower by 0.02 to 0.03, and higher accuracy",
        arms={
            "peer": Arm(
                row_split(1, 1),
                published={
                    "model.memory.num_keys": 558,
                    "model.memory.value_dim": 288,
                    "model.memory.pre_value_dim": 288,
                    "model.memory.top_m": 24,
                    "model.memory.shortlist": 24,
                },
            ),
            "plain": Arm(
                half_of_row(),
                "+0.02 to +0.03 loss",
                expected="higher",
                paper_difference=0.025,
                published={
                    "model.memory.num_keys": 789,
                    "model.memory.value_dim": 288,
                    "model.memory.top_m": 48,
                    "model.memory.shortlist": 48,
                },
            ),
            "plain_wide": Arm(row_split(0, 1), "not stated"),
        },
        fixed=BUDGET,
        free=("ffn_size", "memory.num_keys", "memory.top_m"),
        paper_file="paper_430m_5b",
        explanation="plain has twice the rows and reads twice as many, each as wide as a PEER row's"
        " Value; plain_wide has as many rows and reads as many, each twice as wide.",
    ),
    "projector_and_queries": Ablation(
        question="One output projection and a query per Tucker rank, or a projection per virtual"
        " block and a shared query?",
        source="section 4.2.2, Figure 3",
        finding="one projection and a query per rank: loss -0.0026, +0.7 points after 1.5T tokens",
        arms={
            "single_projector": Arm(),
            "multi_projector": Arm(
                {
                    "model.memory.key_expansion": 2,
                    "model.memory.projection": "per_block",
                    "model.memory.query": "shared",
                },
                "+0.0026 loss, -0.7 points",
                expected="higher",
                paper_difference=0.0026,
            ),
        },
        fixed=ALL,
        paper_file="paper_430m_5b",
    ),
    "heads": Ablation(
        question="One retrieval head, or two of half the key width and half the selection?",
        source="section 4.2.3, Figure 4",
        finding="one head: loss -0.0008, +0.2 points",
        arms={
            "one": Arm(),
            "two": Arm(
                {
                    "model.memory.num_heads": 2,
                    "model.memory.key_dim": times(1 / 2),
                    **top_m(1 / 2),
                },
                "+0.0008 loss, -0.2 points",
                expected="higher",
                paper_difference=0.0008,
            ),
        },
        fixed=ALL,
        paper_file="paper_430m_5b",
    ),
    "compute_share": Ablation(
        question="Which fraction of the compute should retrieval and memory have?",
        source="section 4.2.4, Table 4, Figure 5",
        finding="17 % (D_k 524 of h 1152) is best of 12 to 27.5 %",
        arms={
            "17": Arm(),
            "12": _compute_share(344),
            "14.5": _compute_share(432),
            "19.5": _compute_share(610),
            "23": _compute_share(730),
            "25": _compute_share(796),
            "27.5": _compute_share(880),
        },
        fixed=ALL,
        explanation="Arms are named by the paper's fractions in per cent; D_k is scaled by the same"
        " factors at every scale, and the FFN shrinks as it grows. By our count, 17 % is 21 % of"
        " the FLOPs without the head.",
    ),
    "value_width": Ablation(
        question="Few wide rows, or many narrow ones?",
        source="section 4.2.5, Figure 6 left",
        finding="D_v = D_p = h / 8 instead of h / 4: loss about -0.02",
        arms={
            "eighth": Arm(
                {
                    "model.memory.value_dim": fraction_of_hidden(1 / 8),
                    "model.memory.pre_value_dim": fraction_of_hidden(1 / 8),
                }
            ),
            "quarter": Arm(
                {
                    "model.memory.value_dim": fraction_of_hidden(1 / 4),
                    "model.memory.pre_value_dim": fraction_of_hidden(1 / 4),
                },
                "about +0.02 loss",
                expected="higher",
                paper_difference=0.02,
            ),
        },
        fixed=BUDGET,
        free=("ffn_size", "memory.num_keys", "memory.top_m"),
    ),
    "row_split": Ablation(
        question="How should a row be split into Pre-value and Value (D_p : D_v)?",
        source="section 4.2.5, Table 5, Figure 6 right",
        finding="1 : 3 is best of 1 : 1, 1 : 3 and 1 : 8",
        arms={
            "1_3": Arm(),
            "1_1": Arm(row_split(1, 1), "1 : 3 is best", expected="higher"),
            "1_8": Arm(row_split(1, 8), "1 : 3 is best", expected="higher"),
        },
        fixed=ALL,
        free=(),
        explanation="Where 9 does not divide the width of a row, 1 : 8 takes the nearest even D_v.",
    ),
    "number_of_layers": Ablation(
        question="How many blocks need a memory layer, at constant top-m x layers?",
        source="section 4.2.6, Figure 7",
        finding="from 2 over 5 and 10 to 20 layers of 20 the held-out loss is soon flat, while"
        " accuracy gains 2.3, 0.9 and 1.1 points",
        arms={
            "every": Arm(),
            "half": Arm(layers(1 / 2), "loss flat, -1.1 points", expected="equal"),
            "quarter": Arm(layers(1 / 4), "loss flat, -2.0 points", expected="equal"),
            "tenth": Arm(layers(1 / 10), "-4.3 points", expected="higher"),
        },
        fixed=BUDGET,
        free=("ffn_size", "memory.num_keys"),
        paper_file="paper_430m_5b",
        scaled={
            "smoke": {"model.num_layers": 8},
            "cpu": {
                "model.num_layers": 8,
                "model.hidden_size": 48,
                "model.ffn_size": 120,
                "model.memory.key_dim": 12,
            },
        },
        explanation="Total parameters are constant: fewer layers have larger tables, and more keys"
        " to search; the FFN shrinks to pay for that.",
    ),
    "continued_training": Ablation(
        question="How much does each model gain from the decay of the learning rate?",
        source="section 4.2.6, Table 6",
        finding="points gained by continued training: MoE +7.1 to +7.8, memory in every layer +8.0"
        " to +8.3, in 4 layers +5.7",
        arms={
            "every_layer": Arm(_CONTINUED),
            "four_layers": Arm(
                {**_CONTINUED, **layers(1 / 5)}, "-2.3 points gained", expected="lower"
            ),
            "moe": Arm(_CONTINUED, "-0.5 to -0.9 points gained", "equal", make=families.moe),
        },
        fixed=ALL,
        free=("ffn_size", "memory.num_keys", "moe.num_experts", "moe.expert_size"),
        paper_file="paper_430m_5b",
        measure="decay_gain",
        explanation="The gain is the drop of the held-out loss from the start of the decay to the"
        " end. The paper's continued training also switches to better data; here the data are the"
        " same, so that part of the effect is missing. Four layers of 20 are a fifth of them.",
    ),
    "tucker_penalty": Ablation(
        question="Does the penalty on all but the first singular value of the cores help?",
        source="section 4.2.7, Figure 8",
        finding="without it +0.3 points; lambda_1 > 4 lambda_2 by itself",
        arms={
            "without": Arm(),
            "with": Arm({"loss.tucker_penalty": 0.001}, "-0.3 points", expected="higher"),
        },
    ),
    "balance_loss": Ablation(
        question="Does balancing the use of keys help, at half and at full top-m?",
        source="section 4.2.7, Figure 9",
        finding="helps at top-m 47, harms at top-m 94",
        arms={
            "whole": Arm(),
            "whole_balanced": Arm({"loss.balance_loss": 0.001}, "harms", expected="higher"),
            "half": Arm(top_m(1 / 2)),
            "half_balanced": Arm(
                {"loss.balance_loss": 0.001, **top_m(1 / 2)},
                "helps",
                expected="lower",
                versus="half",
            ),
        },
    ),
    "sharing": Ablation(
        question="Should layers see the tables of their neighbours?",
        source="section 4.2.8, Table 7, Figures 10 to 12",
        finding="a ring of 9: +1 point, as good as 16; block of 6 close; no ring: lower training"
        " loss, but -1 point",
        arms={
            "none": Arm(),
            "s4_ring": _window("ring", 4, "between none and S9"),
            "s9_ring": _window("ring", 9, "+1 point"),
            "s16_ring": _window("ring", 16, "as S9"),
            "s9_no_ring": _window("no_ring", 9, "lower training loss; 1 point below S9-ring"),
            "s6_block": _window("block", 6, "slightly below S9-ring"),
        },
        fixed=COMPUTE,
        scaled={
            "smoke": {
                "model.num_layers": 18,
                "model.ffn_size": 128,
                "model.memory.num_keys": 16,
            },
            "cpu": {
                "model.num_layers": 18,
                "model.hidden_size": 32,
                "model.ffn_size": 112,
                "model.memory.num_keys": 32,
                "model.memory.key_dim": 8,
                "model.memory.value_dim": 12,
                "model.memory.pre_value_dim": 4,
                **top_m(1 / 2),
                "train.num_steps": 240,
                "train.checkpoint_interval_steps": 120,
                "train.evaluation_interval_steps": 240,
            },
            "gpu": {"model.num_layers": 18},
        },
        explanation="A layer that sees g tables searches n sqrt(g) keys a side; the FFN shrinks to"
        " pay for them. The paper's gain is in accuracy; its figures show no loss for the rings.",
    ),
    "value_learning_rate": Ablation(
        question="Which learning rate should value tables have, relative to the other parameters?",
        source="section 4.2.9, Figure 13",
        finding="4x falling to 1x leads early; constant 1x wins by 0.4 points at 1.4T tokens",
        arms={
            "constant_1": Arm(CONSTANT_1),
            "falling_4_to_1": Arm(
                FALLING_4_TO_1,
                "leads early, loses 0.4 points late",
                expected="lower",
            ),
            "constant_1.5": Arm(
                {"optimizer.values_multiplier": 1.5, "optimizer.values_final_multiplier": 1.5},
                "not stated",
            ),
        },
        explanation="The expected sign is the paper's for short runs, as all of ours are short.",
    ),
    "activation_density": Ablation(
        question="Read many values of a smaller table, or fewer values of one twice as large?",
        source="Table 1",
        finding="top-256 of 120B against top-768 of 60B: held-out loss -0.020 at 1.6T tokens;"
        " +0.033 and -0.8 points after continued training, where density wins",
        arms={
            "many_read": Arm(top_m(3), published_file="paper_2b5_60b_top768"),
            "many_stored": Arm(
                {"model.memory.num_keys": times(2**0.5)},
                "-0.020 held-out loss before, +0.033 after continued training",
                expected="lower",
                paper_difference=-0.020,
                published_file="paper_2b5_120b_top256",
            ),
        },
        fixed=COMPUTE,
        paper_file="paper_2b5_60b_top768",
        explanation="The expected sign is that of the stage before continued training.",
    ),
    "initialization": Ablation(
        question="Does a memory layer need the paper's initialisation?",
        source="section 3.5, appendix A",
        finding="a naive one diverges",
        arms={
            "principled": Arm(),
            "released": Arm({"model.memory.initialization": "released"}, "not stated"),
            "naive": Arm({"model.memory.initialization": "unit"}, "diverges", expected="higher"),
        },
        explanation="naive: values of standard deviation 1; released: the constants of the"
        " published code.",
    ),
    "families": Ablation(
        question="Which family is best at equal parameters, FLOPs and values read?",
        source="Table 3",
        finding="held-out loss of 227M/1.2B after 500B tokens: OLMoE 2.845, UltraMemV2 2.853,"
        " UltraMem 2.885, Memory+ 2.920",
        arms={
            "ultramem_v2": Arm(),
            "moe": Arm(
                {},
                "-0.008 held-out loss, -0.018 training loss",
                "lower",
                paper_difference=-0.008,
                make=families.moe,
                published_file="paper_227m_1b2:moe",
            ),
            "ultramem": Arm(
                skips(),
                "+0.032 held-out loss, +0.028 training loss",
                "higher",
                paper_difference=0.032,
                make=families.ultramem,
                published_file="paper_227m_1b2:ultramem",
            ),
            "memory_plus": Arm(
                placed(4),
                "+0.067 held-out loss, +0.066 training loss",
                "higher",
                paper_difference=0.067,
                make=families.memory_plus,
                published_file="paper_227m_1b2:memory_plus",
            ),
            "dense": Arm({}, "V1: dense is worse by 0.29 (151M)", "higher", make=families.dense),
            "pkm": Arm(placed(1), "not stated", make=families.pkm),
            "peer": Arm(placed(1), "not stated", make=families.peer),
        },
        fixed=ALL,
        free=(
            "ffn_size",
            "memory.num_keys",
            "memory.top_m",
            "moe.num_experts",
            "moe.expert_size",
        ),
        paper_file="paper_227m_1b2",
    ),
    "v1_ladder": LADDER,
    **BEYOND,
}


def configuration(ablation: str, arm: str, scale: str) -> ConfigDict:
    """Returns the configuration of an arm, with the stored sizes of the solver."""
    config = ABLATIONS[ablation].unsized(arm, scale)
    sizes: dict[str, Any] = json.loads(SIZES_FILE.read_text())
    apply(config, sizes.get(scale, {}).get(f"{ablation}/{arm}", {}))
    return config


def get_config(name: str = "") -> ConfigDict:
    """Returns the configuration of ABLATION/ARM or ABLATION/ARM/SCALE.

    Raises:
      ConfigError: the name is unknown; the message lists the known ones.
    """
    ablation, arm, scale = (*name.split("/"), "", "", "")[:3]
    cli.require(f"ablation {ablation!r}", ablation, ABLATIONS)
    cli.require(f"arm of {ablation} {arm!r}", arm, ABLATIONS[ablation].arms)
    scale = scale or "cpu"
    cli.require(f"scale {scale!r}", scale, scales.SCALES)
    if name.count("/") > 2:
        raise ConfigError(f"{name!r}: must be ABLATION/ARM or ABLATION/ARM/SCALE")
    return configuration(ablation, arm, scale)
