"""Parameters, FLOPs and training memory, against the parameter tree and the traced program."""

import dataclasses
import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval

from tests.cost import published
from tests.cost.counting import matmul_flops
from umv2.config import Config, ModelConfig
from umv2.cost import accounting
from umv2.model import weights
from umv2.model.parameter import ABSTRACT
from umv2.model.transformer import Transformer, create_store
from umv2.training.state import abstract_state

SUM = {"scoring": "sum", "tucker_rank": 1, "num_cores": 1, "score_activation": "softmax"}
PLAIN_VALUES = {"pre_value_dim": 0, "value_dim": 32, "projection": "none"}
# Models of hidden size 32: each family, and each option by itself.
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"slots": "dense"},
    "dense, untied": {"slots": "dense", "tie_embeddings": False},
    "dense, grouped heads": {"slots": "dense", "num_key_value_heads": 2},
    "dense, no query/key norm": {"slots": "dense", "query_key_norm": False},
    "experts": {"slots": "moe", "ffn_size": 0},
    "experts and a shared one": {"slots": "moe"},
    "experts and a memory": {"slots": "both", "ffn_size": 0},
    "a memory and no FFN": {"ffn": "none", "ffn_size": 0},
    "UltraMemV2": {},
    "UltraMem V1": {
        "memory": {
            "read_layers": (1, 2),
            "write_layers": (2, 4),
            "query": "shared",
            "num_heads": 2,
            "key_expansion": 2,
            "projection": "per_block",
            "pre_value_dim": 0,
        }
    },
    "Memory+": {
        "memory": SUM
        | {
            "query": "per_head",
            "num_heads": 2,
            "key_norm": "none",
            "query_norm": "none",
            "pre_value_dim": 0,
            "value_dim": 32,
            "output_gate": "silu",
            "sharing": "block",
            "share_group": 4,
        }
    },
    "PKM": {
        "memory": SUM
        | PLAIN_VALUES
        | {"query": "per_head", "num_heads": 4, "query_norm": "layer", "key_norm": "none"}
        | {"bias": True, "shuffle": False}
    },
    "PEER": {
        "memory": SUM
        | PLAIN_VALUES
        | {"query": "per_head", "num_heads": 3, "pre_value_dim": 32, "pre_projection": False}
        | {"activation": "gelu", "query_norm": "layer", "key_norm": "none"}
    },
    "Memory+, gated": {
        "memory": {"layer": "umv2.model.memory.gated:GatedMemory", "query": "per_head"}
    },
    "PEER, own experts": {
        "memory": {
            "layer": "umv2.model.memory.own_experts:OwnExperts",
            "query": "per_head",
            "num_heads": 3,
        }
    },
    "released query, 3 heads": {"memory": {"query": "released", "num_heads": 3}},
    "all biases": {"memory": {"bias": True, "output_gate": "silu"}},
    "all biases, per block": {
        "memory": {"bias": True, "projection": "per_block", "key_expansion": 2}
        | {"output_gate": "silu"}
    },
    "ring": {"memory": {"sharing": "ring", "share_group": 2}},
}
PARTS = {
    "embedding": r"params/embedding",
    "head": r"params/head",
    "attention": r"params/blocks/attention/(query|key|value|output)",
    "ffn": r"params/blocks/ffn/\w+",
    "norms": r"params/(final_norm|blocks/(\w+/)?\w+_norm)/weight",
    "sparse_projections": r"params/memory/(query|pre|output|output_gate|gate)(_bias)?",
    "routing": (
        r"params/memory/(keys|cores|query_norm|query_norm_bias|key_norm)|params/blocks/moe/router"
    ),
    "sparse_values": r"store/(values|pre_values)|params/blocks/moe/(gate|up|down)",
}


def small(**model: Any) -> Config:
    """Four blocks of hidden size 32."""
    memory = {"num_keys": 16, "key_dim": 8, "top_m": 6, "shortlist": 5} | model.pop("memory", {})
    moe = {"num_experts": 6, "top_k": 2, "expert_size": 8}
    sizes = {"hidden_size": 32, "ffn_size": 48, "vocab_size": 40}
    return published.config(**sizes | {"memory": memory, "moe": moe} | model)


def parameters(config: Config) -> dict[str, int]:
    """Returns the number of entries of every trained array by name."""
    named, declared = weights.abstract(config.model).named(), weights.declarations(config.model)
    return {n: math.prod(leaf.shape) for n, leaf in named.items() if declared[n].group is not None}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_match_the_parameter_tree(name: str) -> None:
    config = small(**MODELS[name])
    counts, real = accounting.parameter_counts(config.model), parameters(config)
    by_part: Counter[str] = Counter()
    for path, size in real.items():
        (part,) = (part for part, pattern in PARTS.items() if re.fullmatch(pattern, path))
        by_part[part] += size
    assert {part: getattr(counts, part) for part in PARTS} == {p: by_part[p] for p in PARTS}
    assert counts.total == sum(real.values())


def test_sums_over_parts_by_hand() -> None:
    counts = accounting.ParameterCounts(
        embedding=1,
        head=10,
        attention=100,
        ffn=1_000,
        norms=10_000,
        sparse_projections=100_000,
        routing=1_000_000,
        sparse_values=50_000_000,
        selected=20_000_000,
    )
    sums = {
        "active": 21_111_111,
        "active_one_embedding": 21_111_101,
        "active_without_embeddings": 21_111_100,
        "total": 51_111_111,
        "total_without_embeddings": 51_111_100,
    }
    assert counts.as_dict() == dataclasses.asdict(counts) | sums


def test_selected_by_hand() -> None:
    experts = accounting.parameter_counts(small(**MODELS["experts"]).model)
    assert experts.selected == 4 * 2 * (3 * 32 * 8)
    assert experts.sparse_values == 3 * experts.selected
    memory = accounting.parameter_counts(small(**MODELS["released query, 3 heads"]).model)
    assert memory.selected == 4 * 3 * 6 * (48 + 16)


@pytest.mark.parametrize(
    ("create", "active", "total"),
    [
        # Table 10, in millions: active with one embedding, total with none.
        (published.olmoe_227m, 227, 1180),
        (published.ultramem_v2_227m, 225, 1180),
    ],
)
def test_the_227m_sizes_match_the_paper(create: Any, active: int, total: int) -> None:
    counts = accounting.parameter_counts(create().model)
    assert counts.active_one_embedding / 1e6 == pytest.approx(active, rel=0.01)
    assert counts.total_without_embeddings / 1e6 == pytest.approx(total, rel=0.01)


def test_the_1b_sizes_match_the_paper_where_its_table_adds_up() -> None:
    experts = accounting.parameter_counts(published.olmoe_1b().model)
    assert experts.active_without_embeddings / 1e6 == pytest.approx(1070, rel=0.01)
    assert experts.total_without_embeddings / 1e6 == pytest.approx(6710, rel=0.01)
    # Table 10: 1079M and 6.70B.
    memory = accounting.parameter_counts(published.ultramem_v2_1b().model)
    assert memory.active_one_embedding / 1e6 == pytest.approx(1049.8, abs=0.1)
    assert memory.total_without_embeddings / 1e6 == pytest.approx(6082.9, abs=0.1)


# --- FLOPs ---

BATCH, LENGTH = 2, 64
# Large enough for matrix products to dominate.
WIDE: dict[str, dict[str, Any]] = {
    name: MODELS[name]
    for name in ("dense", "experts", "experts and a shared one", "experts and a memory")
} | {
    "UltraMemV2": {},
    # With a projection per block, as in V1, XLA would aggregate every row in each block, with a
    # weight of 0 in all blocks but its own.
    "UltraMem V1, one projection": {
        "memory": {"query": "shared", "num_heads": 2, "pre_value_dim": 0, "key_expansion": 2}
    },
    "PKM": {"memory": MODELS["PKM"]["memory"] | {"value_dim": 256}},
    "PEER": {"memory": MODELS["PEER"]["memory"] | {"value_dim": 256, "pre_value_dim": 256}},
    "Memory+": {"memory": MODELS["Memory+"]["memory"] | {"value_dim": 256, "share_group": 2}},
}


def wide(name: str) -> ModelConfig:
    """Two unrolled blocks of hidden size 256."""
    changes = dict(WIDE[name])
    memory: dict[str, Any] = {"num_keys": 32, "key_dim": 64, "top_m": 8, "shortlist": 8}
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "ffn_size": 512,
        "vocab_size": 512,
        "num_layers": 2,
    }
    sizes |= {"compute_dtype": "float32", "scan_layers": False}
    moe = {"num_experts": 4, "top_k": 2, "expert_size": 128}
    memory |= changes.pop("memory", {})
    return published.config(**sizes | {"memory": memory, "moe": moe} | changes).model


def forward_pass(config: ModelConfig) -> tuple[Any, tuple[Any, ...]]:
    model, store = Transformer(config, init=ABSTRACT), create_store(config, init=ABSTRACT)
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    return lambda model, store, x: model(x, store=store).logits, (model, store, tokens)


def analytic(config: ModelConfig) -> float:
    """Returns the FLOPs of a batch; attention computes all pairs before masking, as XLA does."""
    per_token = accounting.decode_flops_per_token(config, LENGTH)
    return BATCH * LENGTH * sum(per_token.values())


def sum_flops(config: ModelConfig) -> int:
    """Returns the counted FLOPs outside matrix products: sums over ranks, per key and per pair.

    S u and S v of all keys, S_row C of the shortlisted keys, and the pairs of the grid; for
    additive scores the pairs, and the selected pairs once more.
    """
    if not config.placements:
        return 0
    memory = config.memory
    rank, pairs = memory.tucker_rank, memory.shortlist**2
    tucker = 2 * rank * (2 * memory.keys_per_side + memory.shortlist * rank + pairs)
    a_head = tucker if memory.scoring == "tucker" else pairs + memory.top_m
    return BATCH * LENGTH * len(config.placements) * memory.num_heads * a_head


@pytest.mark.parametrize("name", WIDE)
def test_matmul_flops_match_the_traced_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # CPUs and GPUs loop over (expert, block of rows) with a dynamic trip count; the ragged products
    # of TPUs do the same work in a static size.
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, tpu, **_: tpu(*arguments))
    config = wide(name)
    function, arguments = forward_pass(config)
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    # Statistics that the logits do not need are traced but not computed.
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    assert matmul_flops(live) + sum_flops(config) == analytic(config)


@pytest.mark.parametrize("name", ["dense", "UltraMemV2", "PKM"])
def test_the_compiler_counts_few_other_flops(name: str) -> None:
    """FLOPs not counted (norms, softmaxes, activations, rotations) are below 2 % at this width.

    Experts are excluded: XLA counts a loop body once, independent of the trip count.
    """
    config = wide(name)
    function, arguments = forward_pass(config)
    counted = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert counted is not None
    assert 1 <= counted["flops"] / analytic(config) < 1.02


def test_parts_of_flops_by_hand() -> None:
    config = small(tie_embeddings=False, num_key_value_heads=2).model  # 4 blocks, 4 heads of 8
    flops = accounting.decode_flops_per_token(config, 10)
    assert flops["attention"] == 4 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 10 * 32)
    assert flops["ffn"] == 4 * 2 * 3 * 32 * 48
    assert flops["head"] == 2 * 40 * 32
    # Rank 2: one query per side and rank; W_p; W_v.
    assert flops["sparse_projections"] == 4 * 2 * 32 * (4 * 8 + 16 + 48)
    # 6 rows of 48 + 16.
    assert flops["sparse_values"] == 4 * 2 * 6 * (48 + 16)
    # 2 sides x 2 ranks x 16 keys; their rank-1 scores; the core for 5 rows; the grid; 2 cores for
    # 6 pairs.
    multiply_adds = 64 * 8 + 64 + 5 * 4 + 25 * 2 + 6 * 2 * (4 + 2)
    assert flops["routing"] == 4 * 2 * multiply_adds
    assert set(flops) < set(accounting.parameter_counts(config).as_dict())


def test_a_causal_sequence_attends_to_half_of_itself() -> None:
    config = small().model
    mean = sum(
        accounting.decode_flops_per_token(config, position)["attention"]
        for position in range(1, 17)
    )
    assert accounting.forward_flops_per_token(config, 16)["attention"] == pytest.approx(mean / 16)


def test_training_is_three_forward_passes() -> None:
    config = small(slots="moe", ffn_size=0)
    forward = accounting.forward_flops_per_token(config.model, config.data.sequence_length)
    assert accounting.training_flops_per_token(config) == 3 * sum(forward.values())
    assert forward["ffn"] == forward["sparse_projections"] == 0 < forward["sparse_values"]


# --- training memory ---


@pytest.mark.parametrize("name", [name for name in MODELS if "biases" not in name])
def test_training_memory_matches_the_training_state(name: str) -> None:
    config = small(**MODELS[name])
    state = abstract_state(config)

    def held(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    memory = accounting.training_memory(config.model)
    assert memory.parameters == memory.gradients == held((state.params, state.store))
    assert memory.buffers == held(state.buffers)
    assert memory.usage == held(state.usage)
    counters = held([leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim == 0])
    assert memory.moments == held(state.optimizer) - counters
    assert memory.checkpoint == held(state) - counters - held(state.step)
    assert memory.total == memory.checkpoint + memory.gradients
    assert counters + held(state.step) == 20
