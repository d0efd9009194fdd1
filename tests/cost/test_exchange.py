"""The analytic byte counts of exchanges match the compiled programs."""

import collections
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs import base, paper_1b_7b, paper_2b5_60b_top768, paper_227m_1b2
from umv2.config import ConfigError, ModelConfig, from_config_dict
from umv2.cost import exchange
from umv2.model.memory import exchange as model_exchange
from umv2.planning.hlo import collectives

_SIZE, _NUM_TOKENS = 4, 64
_TABLES = {
    "columns": PartitionSpec(None, None, "memory"),
    "rows": PartitionSpec(None, "memory", None),
}


def _config(**memory: Any) -> ModelConfig:
    config = base.get_config()
    config.model.compute_dtype = "float32"
    config.model.memory.update(memory)
    return from_config_dict(config).model


def _compiled(config: ModelConfig, layout: exchange.Layout, what: str) -> collections.Counter[str]:
    """Returns the bytes that a device receives by kind of collective, for one memory layer."""
    memory = config.memory
    mesh = Mesh(np.asarray(jax.devices()[:_SIZE]), ("memory",), axis_types=(AxisType.Explicit,))

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        spec = _TABLES[layout] if shape[0] == 1 else PartitionSpec("memory")
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    tokens, selected = _SIZE * _NUM_TOKENS, memory.num_selected
    rows = array(tokens, selected, dtype=jnp.int32)
    floats = {
        "values": array(1, memory.num_values, memory.value_dim),
        "weights": array(tokens, selected, memory.num_cores),
        "pre_values": None,
        "pre_inputs": None,
    }
    if memory.pre_value_dim:
        floats["pre_values"] = array(1, memory.num_values, memory.pre_value_dim)
        floats["pre_inputs"] = array(tokens, memory.pre_value_dim)

    def pool(floats: Any, rows: jax.Array, slots: jax.Array | None) -> jax.Array:
        return model_exchange.aggregate(
            layout,
            rows=rows,
            slots=slots,
            **floats,
            activation=None,
            num_slots=memory.num_slots,
            chunk_size=None,
            implementation="auto",
            dtype=jnp.float32,
        )

    @functools.partial(jax.shard_map, out_specs=PartitionSpec("memory"))
    def run(floats: Any, rows: jax.Array, slots: jax.Array | None) -> Any:
        if what == "forward":
            return pool(floats, rows, slots)

        def layer(floats: Any) -> jax.Array:
            return jnp.tanh(pool(floats, rows, slots))

        layer = jax.checkpoint(layer) if what == "with remat" else layer
        pooled, vjp = jax.vjp(layer, floats)
        # The gradients of arrays sharded like tokens, and of tables, with the tables' shape.
        return jax.tree.map(lambda x: x.reshape(-1), (pooled, vjp(jnp.cos(pooled))))

    with jax.set_mesh(mesh):
        slots = rows if memory.num_slots > 1 else None
        text = jax.jit(run).lower(floats, rows, slots).compile().as_text()
    assert text is not None
    received: collections.Counter[str] = collections.Counter()
    for (kind, axes), num_bytes in collectives.totals(collectives.read(text, mesh)).items():
        assert axes == ("memory",)
        received[kind] += num_bytes
    return received


@pytest.mark.slow(fast=["cores and slots"])
@pytest.mark.parametrize("layout", ["columns", "rows"])
@pytest.mark.parametrize(
    ("memory", "step"),
    [
        pytest.param({"num_cores": 2}, "with remat", id="two cores"),
        pytest.param({"num_cores": 1, "pre_value_dim": 0}, "with remat", id="no pre-values"),
        pytest.param(
            {"num_cores": 8, "key_expansion": 2, "projection": "per_block"},
            "without remat",
            id="cores and slots",
        ),
    ],
)
def test_bytes_match_the_compiled_program(
    layout: exchange.Layout, memory: dict[str, Any], step: str
) -> None:
    sizes = {"num_keys": 12, "top_m": 16, "shortlist": 8}
    config = _config(**(sizes | memory))
    for what in ("forward", step):
        modelled = exchange.exchanged_bytes(
            config.memory,
            layout,
            size=_SIZE,
            num_tokens=_NUM_TOKENS,
            itemsize=4,
            remat=what == "with remat",
        )
        expected = collections.Counter(modelled.forward)
        if what != "forward":
            expected += collections.Counter(modelled.backward)
            assert sum(expected.values()) == modelled.total
        received = _compiled(config, layout, what)
        assert received.keys() == expected.keys()
        for kind in received:
            assert received[kind] == pytest.approx(expected[kind], rel=1e-3), (what, kind)


def test_one_device_exchanges_nothing() -> None:
    config = _config()
    for layout in ("columns", "rows"):
        modelled = exchange.exchanged_bytes(
            config.memory, layout, size=1, num_tokens=64, itemsize=2, remat=True
        )
        assert modelled.total == 0


def test_bytes_by_hand() -> None:
    # 1B/7B: 128 rows a token, D_v = 768, D_p = 384, two cores; 4 devices with 1000 tokens each.
    config = from_config_dict(paper_1b_7b.get_config()).model
    options: dict[str, Any] = {"size": 4, "num_tokens": 1000, "itemsize": 2, "remat": False}
    columns = exchange.exchanged_bytes(config.memory, "columns", **options)
    # From each of the other three devices: ids, pre-scores, weights of one core, a quarter of the
    # columns.
    per_token = {
        "all-gather": 3 * 128 * 4,
        "reduce-scatter": 3 * 128 * 2,
        "all-to-all": 3 * (128 * 2 + (768 + 384) // 4 * 2),
    }
    assert columns.forward == {kind: 1000 * size for kind, size in per_token.items()}
    rows = exchange.exchanged_bytes(config.memory, "rows", **options)
    # From each of the other three devices: per token 32 selections, all in one group of 40 in 96 %
    # of the cases, and five standard deviations more capacity; an id and two weights per selection,
    # and a pre-input and a pooled value per group.
    groups = model_exchange.groups(1000, 128, 1, 4)
    assert groups.size == 40
    assert groups.capacity == pytest.approx(1000 * 1.04 + 5 * 1040**0.5, rel=0.01)
    assert rows.forward == {
        "all-to-all": 3 * groups.capacity * (40 * (4 + 2 * 2) + (384 + 768) * 2),
        "all-reduce": 6,
    }
    assert rows.backward == {"all-to-all": 3 * groups.capacity * (40 * 2 * 2 + (384 + 768) * 2)}


def test_narrow_columns_are_padded_to_the_lanes_of_a_tpu() -> None:
    config = from_config_dict(paper_227m_1b2.get_config()).model
    one_row = 3 * 20 * 4  # values and two moments, 20 layers, float32
    assert exchange.table_bytes(config, "rows", 4) == 360**2 // 4 * (256 + 256) * one_row
    assert exchange.table_bytes(config, "columns", 4) == 360**2 * (128 + 128) * one_row
    assert exchange.table_bytes(config, "columns", 64) == 360**2 * (128 + 128) * one_row


# --- the choice ---


def test_the_layout_with_fewer_bytes_is_chosen_and_the_reason_is_logged() -> None:
    small = from_config_dict(paper_227m_1b2.get_config()).model
    large = from_config_dict(paper_2b5_60b_top768.get_config()).model
    layout, why = exchange.choose_layout(small, 4, 4096)
    assert layout == "columns"
    assert why == (
        "mesh.table_sharding: columns over mesh.memory=4 (14.9 MB a layer, tables of 7.96 GB; rows:"
        " 36.5 MB a layer, tables of 3.98 GB). Received by a device with 4,096 tokens, forward and"
        " backward; tables with moments, as padded on a TPU"
    )
    # With more selected rows per token, sending every selection to all devices costs more.
    assert exchange.choose_layout(large, 4, 4096)[0] == "rows"
    # Rows are chosen if columns do not fit.
    layout, why = exchange.choose_layout(small, 4, 4096, capacity=5 * 10**9)
    assert layout == "rows"
    assert "requires 7.96 GB per device for tables and moments, but a device has 5.00 GB" in why
    assert "no number of devices would do" in why


@pytest.mark.parametrize(("size", "layout"), [(32, "columns"), (9, "rows")])
def test_the_only_possible_layout_is_chosen(size: int, layout: Literal["columns", "rows"]) -> None:
    config = _config(num_keys=36, value_dim=64, pre_value_dim=32)  # 1296 = 2^4 3^4 rows
    chosen, why = exchange.choose_layout(config, size, 512)
    assert chosen == layout
    assert f"mesh.memory={size} must divide" in why
    assert "\n" not in why


def test_if_no_layout_is_possible_the_error_suggests_sizes() -> None:
    config = _config(num_keys=36, value_dim=64, pre_value_dim=32, num_cores=1)
    with pytest.raises(ConfigError) as error:
        exchange.choose_layout(config, 7, 512)
    assert str(error.value) == (
        "mesh.memory=7: cannot shard the value tables. By columns: must divide value_dim=64 and"
        " pre_value_dim=32; 8 would do; by rows: must divide the 1296 rows of a table; 6 would do"
    )
    with pytest.raises(ConfigError, match=r"by rows: requires .* 162 devices would do"):
        held = exchange.table_bytes(config, "rows", 162)
        exchange.choose_layout(config, 2, 512, capacity=held)
