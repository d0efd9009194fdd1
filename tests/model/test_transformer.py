"""The decoder: causality, equivalent ways to run it, and the placement of memory layers."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base
from tests import slots
from tests.model.drawn import drawn
from umv2.config import ModelConfig, from_config_dict
from umv2.model import attention, layers, stack, transformer
from umv2.model.memory.store import StoreWindow, ValueStore
from umv2.model.parameter import ABSTRACT
from umv2.model.slots import Observe

_LENGTH = 6


def _config(num_layers: int = 4, **fields: Any) -> ModelConfig:
    """A small model; `slots` is as in tests/slots.py, memory_... are fields of `model.memory`."""
    config = base.get_config()
    slots.fill(config, fields.pop("slots", "memory"))
    config.model.update(
        vocab_size=24,
        hidden_size=16,
        num_layers=num_layers,
        num_heads=4,
        num_key_value_heads=2,
        compute_dtype="float32",
        tie_embeddings=False,
    )
    if config.model.ffn == "dense":
        config.model.ffn_size = 24
    config.model.moe.update(num_experts=6, top_k=2, expert_size=8)
    config.model.memory.update(
        num_keys=4,
        key_dim=8,
        value_dim=12,
        pre_value_dim=4,
        top_m=3,
        shortlist=3,
    )
    for name, value in fields.items():
        if name.startswith("memory_"):
            config.model.memory[name.removeprefix("memory_")] = value
        else:
            config.model[name] = value
    return from_config_dict(config).model


def _model(config: ModelConfig) -> transformer.Transformer:
    return drawn(transformer.Transformer(config, init=ABSTRACT))


def _store(config: ModelConfig) -> ValueStore | None:
    if not config.placements:
        return None
    rows, sizes = (len(config.placements), config.memory.num_values), config.memory
    generator = np.random.default_rng(1)
    values = generator.normal(size=(*rows, sizes.value_dim)).astype(np.float32)
    pre_values = generator.normal(size=(*rows, sizes.pre_value_dim)).astype(np.float32)
    return ValueStore(
        values=jnp.asarray(values),
        pre_values=jnp.asarray(pre_values) if sizes.pre_value_dim else None,
    )


def _tokens(length: int = _LENGTH) -> jax.Array:
    tokens = np.random.default_rng(2).permutation(24)[: 2 * length]
    return jnp.asarray(tokens.reshape(2, length), jnp.int32)


def _trace(function: Callable[..., Any], *arguments: Any) -> tuple[Any, list[jax.Array]]:
    """Traces a function of the leaves of its arguments, and also returns the leaves.

    Tracing replaces arrays with ShapeDtypeStructs, which typed dataclasses reject.
    """
    leaves = jax.tree.leaves(arguments)
    structure: Any = jax.tree.structure(arguments)
    flat = jax.jit(lambda *leaves: jax.tree.leaves(function(*structure.unflatten(leaves))))
    return flat.trace(*leaves), leaves


def _loss(model: transformer.Transformer, store: ValueStore | None, tokens: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(model(tokens, store=store).logits))


@functools.cache
def _value_and_gradients(config: ModelConfig) -> tuple[str, list[jax.Array]]:
    """Returns the jaxpr of the differentiated loss, and its values."""
    graph, *states = nnx.split(_model(config), nnx.Param, nnx.Variable)
    parameters, rest = states

    def loss(parameters: Any, store: Any) -> jax.Array:
        return _loss(nnx.merge(graph, parameters, rest), store, _tokens())

    function = jax.value_and_grad(loss, argnums=(0, 1))
    traced, leaves = _trace(function, parameters, _store(config))
    return str(traced.jaxpr), traced.lower().compile()(*leaves)


def _assert_close(left: Any, right: Any) -> None:
    left, right = jax.tree.leaves(left), jax.tree.leaves(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5 * float(jnp.abs(b).max()) + 1e-12)


# --- dependencies between positions ---


def _influence(segment_ids: np.ndarray) -> np.ndarray:
    """Whether the logits at a position depend on the token at another: [position, token]."""
    tokens = _tokens()[:1]
    jacobian = _jacobian()(tokens, jnp.asarray(segment_ids[None], jnp.int32))  # [t, vocab, d]
    return np.any(np.asarray(jacobian)[:, np.asarray(tokens[0])] != 0, axis=-1)


@functools.cache
def _jacobian() -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the Jacobian of a score of each position's logits with respect to the embedding."""
    config = _config(num_layers=2)
    store = _store(config)
    graph, *states = nnx.split(_model(config), nnx.PathContains("embedding"), nnx.Variable)
    embedding, rest = states

    @jax.jit
    def jacobian(tokens: jax.Array, ids: jax.Array) -> jax.Array:
        def scores(embedding: Any) -> jax.Array:
            model = nnx.merge(graph, embedding, rest)
            logits = model(tokens, store=store, segment_ids=ids).logits
            return jnp.square(logits[0]).sum(axis=-1)

        return jax.tree.leaves(jax.jacrev(scores)(embedding))[0]

    return jacobian


def test_positions_depend_on_all_earlier_and_no_later_positions() -> None:
    one_document = np.zeros(_LENGTH, int)
    np.testing.assert_array_equal(_influence(one_document), np.tri(_LENGTH, dtype=bool))


def test_positions_depend_only_on_their_own_document() -> None:
    ids = np.asarray([0, 0, 1, 1, 1, 2])
    expected = np.tri(_LENGTH, dtype=bool) & (ids[:, None] == ids[None, :])
    np.testing.assert_array_equal(_influence(ids), expected)


def test_without_documents_a_sequence_is_one_document() -> None:
    config = _config()
    model, store, tokens = _model(config), _store(config), _tokens()
    forward = jax.jit(lambda ids: model(tokens, store=store, segment_ids=ids).logits)
    _assert_close(forward(None), forward(jnp.full_like(tokens, 3)))
    separate = jnp.asarray([[0, 0, 0, 1, 1, 1]] * 2, jnp.int32)
    assert not np.allclose(forward(None), forward(separate), atol=1e-3)


# --- ways to run it ---


@pytest.mark.slow
def test_scanned_and_unrolled_layers_agree() -> None:
    scanned, unrolled = _config(num_layers=2), _config(num_layers=2, scan_layers=False)
    (looped, left), (flat, right) = map(_value_and_gradients, (scanned, unrolled))
    assert looped.count("scan[") > flat.count("scan[")
    _assert_close(left, right)


def test_few_blocks_are_unrolled_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def scans(num_layers: int) -> bool:
        config = _config(num_layers)
        traced, _ = _trace(_loss, _model(config), _store(config), _tokens())
        return "scan[" in str(traced.jaxpr)

    assert scans(2)
    monkeypatch.setattr(stack, "MAX_UNROLLED_ON_CPU", 3)
    assert not scans(3)
    assert scans(4)


@pytest.mark.slow(fast=["kernels"])
@pytest.mark.parametrize("remat", ["full", "dots", "kernels"])
def test_rematerialisation_changes_no_result(remat: str) -> None:
    (plain, left), (checkpointed, right) = map(
        _value_and_gradients, (_config(num_layers=2), _config(num_layers=2, remat=remat))
    )
    assert "remat2[" not in plain
    assert "remat2[" in checkpointed
    assert ("policy=None" in checkpointed) == (remat == "full")
    _assert_close(left, right)


def test_the_backward_pass_retrieves_again_only_if_nothing_is_kept() -> None:
    def retrievals(remat: str) -> int:
        text, _ = _value_and_gradients(_config(num_layers=2, remat=remat))
        return text.count(" top_k[")

    once = retrievals("none")
    assert once > 0
    assert retrievals("kernels") == retrievals("dots") == once
    assert retrievals("full") == 2 * once


def test_program_size_does_not_grow_with_depth() -> None:
    def lines(num_layers: int) -> int:
        config = _config(num_layers)
        function = jax.grad(_loss, argnums=1)
        traced, _ = _trace(function, _model(config), _store(config), _tokens())
        return len(traced.lower().as_text().splitlines())

    assert lines(2) == lines(8)


@pytest.mark.slow
@pytest.mark.parametrize("prefill", [True, False])
def test_prefill_and_decode_equal_the_full_forward_pass(prefill: bool) -> None:
    config = _config(memory_read_layers=(1, 3), memory_write_layers=(2, 3))
    model, store, tokens = _model(config), _store(config), _tokens(8)
    full = jax.jit(lambda model: model(tokens, store=store))(model)
    assert full.cache is None

    @functools.partial(jax.jit, static_argnames="prefill")
    def step(model: Any, tokens: Any, cache: Any, position: Any, *, prefill: bool = False) -> Any:
        return model(tokens, store=store, cache=cache, position=position, prefill=prefill)

    empty, start = model.empty_cache(2, 10), jnp.zeros(1, jnp.int32)
    output = step(model, tokens[:, :5], empty, start, prefill=prefill)
    logits = [output.logits]
    for position in range(5, 8):
        token = tokens[:, position : position + 1]
        output = step(model, token, output.cache, jnp.full(1, position))
        logits.append(output.logits)
    _assert_close(jnp.concatenate(logits, axis=1), full.logits)


@pytest.mark.slow(fast=["logits"])
@pytest.mark.parametrize("output", ["statistics", "logits"])
def test_a_compiled_decode_step_counts_rows_only_on_request(output: str) -> None:
    config = _config()
    model, store = _model(config), _store(config)
    observe = Observe(health=output == "statistics")

    def step(model: transformer.Transformer, cache: Any, token: jax.Array) -> Any:
        output = model(token, store=store, cache=cache, position=jnp.full(1, 3), observe=observe)
        return output.logits, output.cache, output.stats

    traced, _ = _trace(step, model, model.empty_cache(2, 8), _tokens(1))
    program = traced.lower().compile().as_text() or ""
    # A scatter into a vector, with a count per row; writing the cache is a scatter, too.
    counted = re.search(r"\[\d+\]\{0\} scatter\(", program)
    assert (counted is not None) == (output == "statistics")


# --- parts ---


@pytest.mark.slow
def test_grouped_queries_equal_repeated_key_value_heads() -> None:
    grouped = drawn(attention.Attention(_config(), init=ABSTRACT))
    config = _config(num_key_value_heads=4)
    repeated = drawn(attention.Attention(config, init=ABSTRACT))
    assert grouped.key.shape == (16, 8)
    for name in ("key", "value"):
        heads = getattr(grouped, name)[...].reshape(16, 2, 4)
        getattr(repeated, name)[...] = jnp.repeat(heads, 2, axis=1).reshape(16, 16)
    norm_weights = grouped.key_norm.weight[...].reshape(2, 4)
    repeated.key_norm.weight[...] = jnp.repeat(norm_weights, 2, axis=0).reshape(16)
    x = jax.random.normal(jax.random.key(3), (2, _LENGTH, 16))
    _assert_close(repeated(x)[0], grouped(x)[0])


def test_attention_depends_only_on_relative_positions() -> None:
    layer = drawn(attention.Attention(_config(), init=ABSTRACT))
    x = jax.random.normal(jax.random.key(3), (2, _LENGTH, 16))
    _assert_close(layer(x, position=jnp.full(1, 7))[0], layer(x)[0])
    turned, _ = layer(x[:, ::-1])
    assert not np.allclose(turned[:, ::-1], layer(x)[0], atol=1e-3)


def test_tied_embeddings_are_the_head() -> None:
    tied, untied = _config(tie_embeddings=True), _config(tie_embeddings=False)
    left, right = _model(tied), _model(untied)
    assert not hasattr(left, "head")
    store, tokens, loss = _store(tied), _tokens(), jax.jit(_loss)
    assert not np.allclose(loss(left, store, tokens), loss(right, store, tokens))
    right.head[...] = right.embedding[...]
    _assert_close(loss(left, store, tokens), loss(right, store, tokens))


_PRODUCT_KEYS = {
    "memory_scoring": "sum",
    "memory_score_activation": "softmax",
    "memory_tucker_rank": 1,
    "memory_num_cores": 1,
    "memory_query": "per_head",
    "memory_key_norm": "none",
    "memory_shuffle": False,
    "memory_value_dim": 16,
    "memory_pre_value_dim": 0,
    "memory_num_heads": 2,
    "memory_read_layers": (2,),
    "memory_write_layers": (3,),
}


@pytest.mark.slow(fast=["{'slots': 'both'}"])
@pytest.mark.parametrize(
    "fields",
    [
        {"memory_query": "per_rank", "memory_sharing": "ring", "memory_share_group": 4},
        pytest.param(
            {"memory_query": "shared", "memory_sharing": "block", "memory_share_group": 2},
            marks=pytest.mark.slow,
        ),
        {
            "memory_query": "released",
            "memory_sharing": "no_ring",
            "memory_share_group": 2,
            "memory_num_heads": 4,
            "memory_key_expansion": 2,
            "memory_projection": "per_block",
            "memory_pre_value_dim": 0,
        },
        pytest.param(
            {
                "memory_scoring": "sum",
                "memory_tucker_rank": 1,
                "memory_num_cores": 1,
                "memory_activation": "gelu",
            },
            marks=pytest.mark.slow,
        ),
        {"slots": "dense"},
        {"slots": "moe"},
        pytest.param({"slots": "moe", "ffn_size": 24}, marks=pytest.mark.slow),
        {"slots": "both"},
        pytest.param({"slots": "memory", "ffn": "none", "ffn_size": 0}, marks=pytest.mark.slow),
        _PRODUCT_KEYS | {"memory_query_norm": "layer", "memory_projection": "none"},
        pytest.param(
            _PRODUCT_KEYS
            | {
                "memory_query_norm": "none",
                "memory_projection": "none",
                "memory_pre_value_dim": 16,
                "memory_pre_projection": False,
            },
            marks=pytest.mark.slow,
        ),
        _PRODUCT_KEYS
        | {
            "memory_output_gate": "silu",
            "memory_bias": True,
            "memory_read_layers": (),
            "memory_write_layers": (),
            "memory_sharing": "block",
            "memory_share_group": 4,
        },
    ],
    ids=str,
)
def test_every_kind_of_layer_trains_every_parameter(fields: dict[str, Any]) -> None:
    config = _config(**fields)
    graph, *states = nnx.split(_model(config), nnx.Param, nnx.Variable)
    parameters, rest = states

    def loss(parameters: Any, store: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, parameters, rest)
        output = model(_tokens(), store=store, observe=Observe(health=True, key_balance=True))
        return jnp.mean(jnp.square(output.logits)), output.stats

    (_, stats), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        parameters, _store(config)
    )
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), jax.tree_util.keystr(path)
        assert np.any(gradient != 0), jax.tree_util.keystr(path)
    assert stats.feed_forward.ffn_variance.shape == (4,)
    assert (np.asarray(stats.feed_forward.ffn_variance) > 0).all() == (config.ffn_size > 0)
    assert (stats.memory is None) == (not config.placements)
    assert (stats.feed_forward.router is None) == (config.ffn != "moe")
    # Per slot: its statistics, number of layers, number of choices, and selections per token.
    memory, moe = config.memory, config.moe
    for slot, count, choices, selected in (
        (stats.memory, len(config.placements), memory.num_visible, memory.num_selected),
        (stats.feed_forward.router, 4, moe.num_experts, moe.top_k),
    ):
        if slot is not None:
            hits = np.asarray(slot.hits)
            assert hits.shape == (count, choices)
            assert (hits.sum(axis=1) == 2 * _LENGTH * selected).all()
            assert slot.balance_loss.shape == (count,)


def test_core_vectors_of_all_layers_are_refreshed() -> None:
    model = _model(_config())
    model.refresh()
    model.memory.cores[...] = model.memory.cores[...].at[2].set(jnp.diag(jnp.asarray([1.0, 4.0])))
    before = model.memory.core_u[...]
    model.refresh()
    after = np.asarray(model.memory.core_u[...])
    np.testing.assert_allclose(np.abs(after[2]), [[0, 1]], atol=1e-6)
    np.testing.assert_allclose(np.delete(after, 2, 0), np.delete(before, 2, 0), atol=1e-5)


# --- placement of memory layers ---


def _plan(num_layers: int, *placements: tuple[int, int]) -> list[tuple]:
    """Returns (start, period, repeats, memory_start, placements) per segment; blocks start at 1."""
    from_zero = tuple((read - 1, write - 1) for read, write in placements)
    return [dataclasses.astuple(s) for s in stack.plan_segments(num_layers, from_zero)]


def test_plan_of_a_memory_layer_in_every_block() -> None:
    assert _plan(6, *((i, i) for i in range(1, 7))) == [(0, 1, 6, 0, ((0, 0),))]


def test_plan_of_a_dense_model() -> None:
    assert _plan(6) == [(0, 1, 6, 0, ())]


def test_plan_of_ultramem_with_skips() -> None:
    assert _plan(20, (2, 5), (6, 9), (10, 13), (14, 17)) == [
        (0, 1, 1, 0, ()),
        (1, 4, 4, 0, ((0, 3),)),
        (17, 1, 3, 4, ()),
    ]


def test_plan_of_memory_plus() -> None:
    every_fourth = [(4, 4), (8, 8), (12, 12), (16, 16)]
    assert _plan(16, *every_fourth) == [(0, 4, 4, 0, ((3, 3),))]
    assert _plan(20, *every_fourth) == [(0, 4, 4, 0, ((3, 3),)), (16, 1, 4, 4, ())]


def test_plan_keeps_overlapping_placements_in_one_group() -> None:
    assert _plan(4, (1, 3), (2, 4)) == [(0, 4, 1, 0, ((0, 2), (1, 3)))]
    assert _plan(8, (1, 3), (2, 4), (5, 7), (6, 8)) == [(0, 4, 2, 0, ((0, 2), (1, 3)))]
    assert _plan(5, (1, 4), (2, 3)) == [(0, 4, 1, 0, ((0, 3), (1, 2))), (4, 1, 1, 2, ())]


@hypothesis.given(st.integers(1, 12), st.data())
def test_plans_contain_every_block_and_every_placement_once(
    num_layers: int, data: st.DataObject
) -> None:
    reads = sorted(data.draw(st.sets(st.integers(0, num_layers - 1))))
    placements = tuple((r, data.draw(st.integers(r, num_layers - 1))) for r in reads)
    end = 0
    seen: list[tuple[int, int]] = []
    for segment in stack.plan_segments(num_layers, placements):
        assert segment.start == end
        assert segment.memory_start == len(seen)
        for copy in range(segment.repeats):
            offset = segment.start + copy * segment.period
            seen += [(read + offset, write + offset) for read, write in segment.placements]
        end += segment.period * segment.repeats
    assert end == num_layers
    assert tuple(seen) == placements


@pytest.mark.slow(fast=["reads0-writes0-none"])
@pytest.mark.parametrize(
    ("reads", "writes", "sharing"),
    [((1, 2), (3, 3), "none"), ((1, 2), (1, 3), "ring")],
)
def test_memory_is_read_and_added_where_it_is_placed(
    reads: tuple[int, ...], writes: tuple[int, ...], sharing: str
) -> None:
    config = _config(
        num_layers=3,
        memory_read_layers=reads,
        memory_write_layers=writes,
        memory_sharing=sharing,
        memory_share_group=2 if sharing == "ring" else 1,
    )
    model, store, tokens = _model(config), _store(config), _tokens()
    assert store is not None

    def member(tree: Any, index: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[index], tree)

    @jax.jit
    def by_hand(model: transformer.Transformer) -> jax.Array:
        x = model.embedding[...][tokens]
        outputs: dict[int, jax.Array] = {}
        for index in range(3):
            block = member(model.blocks, index)
            attended, _ = block.attention(block.attention_norm(x))
            x = x + attended
            y = block.ffn_norm(x)
            if index + 1 in reads:
                place = reads.index(index + 1)
                outputs[place], _ = member(model.memory, place)(
                    y, window=StoreWindow(store=store, start=16 * place), observe=Observe()
                )
            x = x + block.ffn(y)
            for place, write in enumerate(writes):
                if write == index + 1:
                    x = x + outputs[place]
        return layers.linear(model.final_norm(x), model.head[...].T)

    forward = jax.jit(lambda model, store: model(tokens, store=store).logits)
    _assert_close(forward(model, store), by_hand(model))
    without = jax.tree.map(jnp.zeros_like, store)
    assert not np.allclose(forward(model, without), by_hand(model), atol=1e-3)
