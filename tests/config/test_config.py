"""A mistake in a configuration is one error that names the field, value and rule."""

import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from ml_collections import ConfigDict

from configs import base
from umv2.config import Config, ConfigError, from_config_dict, to_dict
from umv2.config.schema import Interval, build, differing_fields, nearest_name


def base_dict(**changes: Any) -> dict[str, Any]:
    """Returns the base configuration as plain dicts; changes are by path, with __ for a dot."""
    config = base.get_config().to_dict()
    for path, value in changes.items():
        *sections, name = path.split("__")
        section = config
        for key in sections:
            section = section[key]
        section[name] = value
    return config


def with_changes(changes: dict[str, Any]) -> dict[str, Any]:
    return base_dict(**{path.replace(".", "__"): value for path, value in changes.items()})


def leaf_hints(cls: type = Config, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the path and annotation of every field that is not a section."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from leaf_hints(typing.cast(type, hint), f"{path}{name}.")
        else:
            yield path + name, hint


def error_of(changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        from_config_dict(with_changes(changes))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_base_configuration_is_valid() -> None:
    config = from_config_dict(base.get_config())
    assert config.model.memory.num_keys == 64
    assert from_config_dict(base_dict()) == config


# One value just outside each end of the interval, by the rule as users see it.
OUT_OF_RANGE = {
    "must be >= 1": (
        0,
        "model.rope_scale evaluation.long_context.num_examples"
        " evaluation.long_context.batch_tokens"
        " model.memory.num_keys model.memory.key_dim model.memory.tucker_rank"
        " model.memory.num_cores model.memory.num_heads model.memory.top_m model.memory.shortlist"
        " model.memory.key_expansion model.memory.value_dim model.memory.share_group"
        " model.vocab_size model.hidden_size model.num_layers model.num_heads"
        " model.num_key_value_heads model.moe.num_experts model.moe.top_k model.moe.expert_size"
        " data.prefetch_batches train.num_steps"
        " train.batch_size train.gradient_accumulation train.log_interval_steps"
        " train.evaluation_interval_steps train.checkpoint_interval_steps"
        " train.num_checkpoints_kept evaluation.batch_size generate.max_new_tokens"
        " mesh.fsdp mesh.memory mesh.tensor",
    ),
    "must be >= 0": (
        -1,
        "seed model.attention_window data.long_context.num_documents data.long_context.seed"
        " data.long_context.warm_up_steps"
        " evaluation.long_context.seed model.ffn_size"
        " model.memory.pre_value_dim model.memory.chunk_tokens"
        " data.num_workers data.seed"
        " optimizer.warmup_steps optimizer.decay_start_step optimizer.weight_decay.embeddings"
        " optimizer.weight_decay.norms optimizer.weight_decay.matrices"
        " optimizer.weight_decay.keys optimizer.weight_decay.values loss.z_loss"
        " loss.tucker_penalty loss.tucker_margin loss.balance_loss loss.load_balance"
        " loss.router_z_loss generate.temperature"
        " generate.top_k generate.seed",
    ),
    "must be > 0": (
        0.0,
        "model.norm_epsilon optimizer.learning_rate optimizer.epsilon optimizer.clip_norm"
        " optimizer.values_learning_rate optimizer.values_multiplier"
        " optimizer.values_final_multiplier",
    ),
    "must be > 1": (1.0, "model.rope_theta"),
    "must be >= 2": (1, "data.sequence_length"),
    "must be > 0 and < 1": (1.0, "data.held_out_fraction"),
    "must be >= 0 and <= 1": (
        1.01,
        "optimizer.final_fraction data.long_context.context_weight",
    ),
    "must be >= 0 and < 1": (
        1.0,
        "optimizer.beta1 optimizer.beta2 data.long_context.text_fraction",
    ),
    "must be >= 0 and <= 2147483647": (
        2**31,
        "seed data.seed generate.seed data.long_context.seed evaluation.long_context.seed",
    ),
    "must be >= 1 and <= 100000": (10**12, "model.num_layers"),
    "must be > 0 and <= 1": (0.0, "optimizer.values_decay_fraction generate.top_p"),
}


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        (field, value, rule)
        for rule, (value, fields) in OUT_OF_RANGE.items()
        for field in fields.split()
    ],
)
def test_an_out_of_range_number_is_named_with_its_range(
    field: str, value: float, rule: str
) -> None:
    message = error_of({field: value})
    assert message.startswith(f"{field}=")
    assert float(message.partition("=")[2].partition(":")[0]) == value
    assert message.endswith(f": {rule}")


def test_every_number_without_a_special_value_has_a_range() -> None:
    numbers = {path: hint for path, hint in leaf_hints() if hint in (int, float)}
    assert set(numbers) == {"data.end_of_text_id", "mesh.replica"}
    ranged = {path for path, hint in leaf_hints() if typing.get_origin(hint) is Annotated}
    assert ranged == {field for _, fields in OUT_OF_RANGE.values() for field in fields.split()}


def test_closed_intervals_include_their_endpoints() -> None:
    closed, open_ = Interval(0, 1), Interval(0, 1, includes_low=False, includes_high=False)
    assert [closed.holds(x) for x in (-0.1, 0, 0.5, 1, 1.1)] == [False, True, True, True, False]
    assert [open_.holds(x) for x in (0, 0.5, 1)] == [False, True, False]
    assert not closed.holds(float("nan"))
    assert Interval(1).holds(10**9)


MEMORY = "model.memory."
CONTRADICTIONS = [
    ({MEMORY + "shortlist": 65}, "shortlist=65: must be at most the keys per side, 64"),
    (
        {MEMORY + "shortlist": 4, MEMORY + "top_m": 17},
        r"top_m=17: must be at most shortlist\*\*2 = 16",
    ),
    ({MEMORY + "value_dim": 49}, "value_dim=49: must be a multiple of num_cores = 2"),
    (
        {MEMORY + "score_activation": "softmax"},
        r"score_activation='softmax': needs num_cores = 1 \(it is 2\)",
    ),
    (
        {MEMORY + "pre_projection": False},
        "pre_projection=False: .* pre_value_dim = 16 must be model.hidden_size = 256",
    ),
    (
        {MEMORY + "projection": "none"},
        "projection='none': .* value_dim = 48 must be model.hidden_size = 256",
    ),
    (
        {"model.rope_scale": 2.0},
        r"model\.rope_scale=2\.0: must be 1 if rope_scaling is 'none'",
    ),
    ({"generate.stop": ("",)}, "generate.stop=.*must not contain an empty string"),
    (
        {"evaluation.long_context.lengths": (32,)},
        "evaluation.long_context.lengths=.*each >= 64",
    ),
    ({"evaluation.long_context.tasks": ()}, "evaluation.long_context.tasks=.*must name tasks"),
    (
        {
            "data.long_context.num_documents": 1,
            "data.long_context.tasks": ("needle",),
            "data.sequence_length": 63,
        },
        "data.sequence_length=63: must be >= 64 for documents of data.long_context",
    ),
    (
        {"data.long_context.warm_up_steps": 1},
        "data.long_context.warm_up_steps=1: must be 0 without long-context documents",
    ),
    (
        {
            "data.long_context.num_documents": 1,
            "data.long_context.tasks": ("needle",),
            "data.long_context.warm_up_steps": 7,
            "train.num_steps": 7,
            "optimizer.warmup_steps": 2,
        },
        "data.long_context.warm_up_steps=7: must be < train.num_steps = 7",
    ),
    (
        {"data.long_context.num_documents": 1},
        r"data.long_context.tasks=\(\): must name tasks, since num_documents = 1",
    ),
    (
        {
            "data.long_context.num_documents": 1,
            "data.long_context.tasks": ("needle",),
            "data.source": "hugging_face",
            "data.hugging_face_name": "x",
        },
        "data.long_context.num_documents=1: needs a text source to mix documents into",
    ),
    ({"model.ffn_size": 0}, "model.ffn_size=0: must be >= 1 if model.ffn is 'dense'"),
    (
        {MEMORY + "layer": "none", "model.ffn_size": 0},
        "model.ffn_size=0: must be >= 1 if model.ffn is 'dense'",
    ),
    ({"model.ffn": "none"}, "model.ffn_size=512: must be 0 if model.ffn is 'none'"),
    (
        {"model.ffn": "none", "model.ffn_size": 0, MEMORY + "layer": "none"},
        "model.ffn='none': a block needs an FFN or a memory layer, but model.memory.layer",
    ),
    (
        {"model.ffn": "moe", "model.moe.top_k": 65},
        "model.moe.top_k=65: must be at most num_experts = 64",
    ),
    ({"loss.load_balance": 0.1}, "loss.load_balance=0.1: needs experts, but model.ffn is 'dense'"),
    ({"loss.router_z_loss": 0.1}, "loss.router_z_loss=0.1: needs experts"),
    (
        {"model.ffn": "moe", MEMORY + "layer": "none", "loss.balance_loss": 0.1},
        "loss.balance_loss=0.1: needs memory layers, but model.memory.layer is 'none'",
    ),
    ({MEMORY + "scoring": "sum"}, "scoring='sum': .* tucker_rank = 1 and num_cores = 1"),
    (
        {MEMORY + "scoring": "sum", MEMORY + "tucker_rank": 1},
        "scoring='sum': .* tucker_rank = 1 and num_cores = 1",
    ),
    (
        {MEMORY + "query": "released", MEMORY + "tucker_rank": 3},
        "query='released': .* tucker_rank = 2 and at most 4 heads",
    ),
    (
        {MEMORY + "query": "released", MEMORY + "num_heads": 5},
        "query='released': .* tucker_rank = 2 and at most 4 heads",
    ),
    (
        {MEMORY + "activation": "gelu", MEMORY + "pre_value_dim": 0},
        "activation='gelu': .*pre_value_dim must be > 0",
    ),
    ({MEMORY + "share_group": 2}, "share_group=2: must be 1 exactly when sharing is 'none'"),
    ({MEMORY + "sharing": "ring"}, r"share_group=1: must be 1 exactly .* \(it is 'ring'\)"),
    (
        {MEMORY + "num_keys": 23171, MEMORY + "key_expansion": 2},
        r"num_keys=23171: gives 2147580964 addresses per layer; .* fewer than 2\*\*31",
    ),
    (
        {MEMORY + "num_keys": 23171},
        r"num_keys=23171: gives a store of 2147580964 rows; .* fewer than 2\*\*31",
    ),
    (
        {MEMORY + "sharing": "ring", MEMORY + "share_group": 5},
        "share_group=5: must be at most the number of memory layers, 4",
    ),
    (
        {MEMORY + "sharing": "block", MEMORY + "share_group": 3},
        "share_group=3: must divide the number of memory layers, 4, if sharing is 'block'",
    ),
    (
        {MEMORY + "read_layers": (1, 2), MEMORY + "write_layers": (2,)},
        r"write_layers=\(2,\): must have as many entries as read_layers = \(1, 2\)",
    ),
    (
        {MEMORY + "read_layers": (2,), MEMORY + "write_layers": (1,)},
        r"read_layers=\(2,\): .* 1 <= read <= write <= num_layers = 4 \(got 2 -> 1\)",
    ),
    (
        {MEMORY + "read_layers": (0,), MEMORY + "write_layers": (1,)},
        r"read_layers=\(0,\): .* \(got 0 -> 1\)",
    ),
    (
        {MEMORY + "read_layers": (1,), MEMORY + "write_layers": (5,)},
        r"read_layers=\(1,\): .* \(got 1 -> 5\)",
    ),
    (
        {MEMORY + "read_layers": (1, 1), MEMORY + "write_layers": (2, 3)},
        r"read_layers=\(1, 1\): must be strictly increasing",
    ),
    ({"model.num_heads": 3}, "model.num_heads=3: must divide hidden_size = 256"),
    ({"model.hidden_size": 4}, "model.num_heads=4: .* heads of even width"),
    ({"model.num_key_value_heads": 3}, "num_key_value_heads=3: must divide num_heads = 4"),
    ({"data.source": "text"}, r"data.paths=\(\): source 'text' needs globs"),
    ({"data.source": "array_record"}, r"data.paths=\(\): source 'array_record' needs globs"),
    ({"data.source": "memmap"}, r"data.paths=\(\): source 'memmap' needs globs"),
    (
        {"data.source": "hugging_face"},
        "data.hugging_face_name='': source 'hugging_face' needs the name",
    ),
    ({"data.tokenizer": "none"}, "data.tokenizer='none': only token files"),
    (
        {"data.source": "memmap", "data.paths": ("a",), "data.tokenizer": "none"},
        r"data.end_of_text_id=-1: must be given \(>= 0\)",
    ),
    ({"optimizer.warmup_steps": 200}, "optimizer.warmup_steps=200: must be < .*num_steps = 200"),
    (
        {"optimizer.schedule": "constant_then_cosine", "optimizer.decay_start_step": 19},
        r"decay_start_step=19: must be in \[warmup_steps = 20, train.num_steps = 200\)",
    ),
    (
        {"optimizer.schedule": "constant_then_cosine", "optimizer.decay_start_step": 200},
        "decay_start_step=200: must be in",
    ),
    (
        {"train.gradient_accumulation": 3},
        "train.gradient_accumulation=3: must divide train.batch_size = 16",
    ),
    ({"mesh.replica": 0}, "mesh.replica=0: must be >= 1, or -1 for all devices"),
    ({"mesh.replica": -2}, "mesh.replica=-2: must be >= 1, or -1 for all devices"),
    (
        {MEMORY + "layer": "none", "loss.balance_loss": 0.1},
        "loss.balance_loss=0.1: needs memory layers, but model.memory.layer is 'none'",
    ),
    (
        {MEMORY + "layer": "none", "loss.tucker_penalty": 0.1},
        "loss.tucker_penalty=0.1: needs memory layers",
    ),
    (
        {MEMORY + "tucker_rank": 1, "loss.tucker_penalty": 0.1},
        "loss.tucker_penalty=0.1: needs Tucker scoring of rank > 1",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), CONTRADICTIONS)
def test_inconsistent_values_are_named(changes: dict[str, Any], expected: str) -> None:
    assert re.search(expected, error_of(changes))


@pytest.mark.parametrize(
    "changes",
    [
        {MEMORY + "shortlist": 64},
        {MEMORY + "shortlist": 128, MEMORY + "key_expansion": 2},
        {MEMORY + "shortlist": 4},  # top_m = 16 = 4^2
        {MEMORY + "scoring": "sum", MEMORY + "tucker_rank": 1, MEMORY + "num_cores": 1},
        {MEMORY + "sharing": "block", MEMORY + "share_group": 4},
        {MEMORY + "read_layers": (1, 3), MEMORY + "write_layers": (4, 4)},
        {MEMORY + "layer": "none", MEMORY + "shortlist": 1000},  # unused
        {"model.moe.top_k": 65},  # unused, too
        {"model.ffn": "moe"},  # with a shared expert of ffn_size
        {"model.ffn": "moe", "model.ffn_size": 0},
        {"model.ffn": "moe", "loss.load_balance": 0.1, "loss.balance_loss": 0.1},
        {"model.ffn": "none", "model.ffn_size": 0},
        {"optimizer.warmup_steps": 199},
        {
            "optimizer.schedule": "constant_then_cosine",
            "optimizer.decay_start_step": 20,
        },
        {"mesh.replica": 1},
    ],
)
def test_values_at_a_limit_are_accepted(changes: dict[str, Any]) -> None:
    assert from_config_dict(with_changes(changes)) != from_config_dict(base_dict())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.memory.top_n": 3}, "model.memory.top_n: unknown field (nearest: top_m)"),
        ({"modle": {}}, "modle: unknown field (nearest: model)"),
        ({"optimizer.zzz": 3}, "optimizer.zzz: unknown field"),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest_one(
    changes: dict[str, Any], expected: str
) -> None:
    assert error_of(changes) == expected


def test_a_missing_field_is_named() -> None:
    config = base_dict()
    del config["model"]["memory"]["top_m"]
    expected = "model.memory.top_m: missing; configs/base.py gives it a value"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        from_config_dict(config)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        (MEMORY + "top_m", True, "must be of type int, not bool"),
        (MEMORY + "top_m", 1.0, "must be of type int, not float"),
        ("model.tie_embeddings", 1, "must be of type bool, not int"),
        ("optimizer.learning_rate", "fast", "must be of type float, not str"),
        ("optimizer.learning_rate", True, "must be of type float, not bool"),
        ("data.tokenizer", None, "must be of type str, not NoneType"),
        ("data.paths", "a.txt", "must be a tuple of str"),
        ("data.paths", (1,), "must be of type str, not int"),
        (MEMORY + "read_layers", 1, "must be a tuple of int"),
        (MEMORY + "read_layers", (True,), "must be of type int, not bool"),
        ("model.memory", 3, "must be a section, not a value"),
    ],
)
def test_a_wrong_type_is_named(field: str, value: object, expected: str) -> None:
    element = value[0] if isinstance(value, tuple) else value
    assert error_of({field: value}) == f"{field}={element!r}: {expected}"


def test_integers_become_floats_and_lists_become_tuples() -> None:
    config = from_config_dict(
        with_changes({"optimizer.clip_norm": 2, "data.paths": ["a"], "data.source": "text"})
    )
    assert (type(config.optimizer.clip_norm), config.optimizer.clip_norm) == (float, 2.0)
    assert config.data.paths == ("a",)


CHOICES = {p: typing.get_args(h) for p, h in leaf_hints() if typing.get_origin(h) is Literal}


@pytest.mark.parametrize(("field", "choices"), CHOICES.items())
def test_a_misspelt_choice_is_named_with_all_choices_and_the_nearest_one(
    field: str, choices: tuple[str, ...]
) -> None:
    longest = max(choices, key=len)
    misspelt = longest[:-1] + "_"
    message = error_of({field: misspelt})
    listed = ", ".join(repr(choice) for choice in choices)
    assert message.startswith(f"{field}={misspelt!r}: must be one of {listed} (nearest: ")


def test_the_nearest_choice_is_suggested() -> None:
    assert error_of({"model.memory.scoring": "tuker"}).endswith("(nearest: tucker)")
    assert error_of({"model.remat": "qqqq"}).endswith("'none', 'dots', 'kernels', 'full'")
    assert nearest_name("shortlst", ["top_m", "shortlist"]) == " (nearest: shortlist)"


def test_sections_fill_nested_dataclasses() -> None:
    @dataclasses.dataclass(frozen=True)
    class Inner:
        size: int

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner
        name: Literal["a", "b"]

    assert build(Outer, {"inner": {"size": 3}, "name": "a"}) == Outer(Inner(3), "a")
    assert build(Outer, ConfigDict({"inner": {"size": 3}, "name": "a"})) == Outer(Inner(3), "a")
    with pytest.raises(ConfigError, match=r"^inner.size='3': must be of type int, not str$"):
        build(Outer, {"inner": {"size": "3"}, "name": "a"})


def test_a_configuration_round_trips_through_json() -> None:
    config = from_config_dict(
        with_changes({MEMORY + "read_layers": (1, 2), MEMORY + "write_layers": (2, 3)})
    )
    plain = json.loads(json.dumps(to_dict(config)))
    assert plain["model"]["memory"]["read_layers"] == [1, 2]
    assert plain == to_dict(config)
    assert from_config_dict(plain) == config


def test_differing_fields_are_listed_by_path() -> None:
    left = {"a": 1, "b": {"c": 2, "d": [3]}, "gone": 0}
    right = {"a": 1, "b": {"c": 5, "d": [3]}, "new": None}
    assert differing_fields(left, right) == [
        "b.c: 2 -> 5",
        "gone: 0 -> '(absent)'",
        "new: '(absent)' -> None",
    ]
    assert differing_fields(left, left) == []


def test_derived_sizes() -> None:
    config = from_config_dict(
        with_changes(
            {
                MEMORY + "num_keys": 8,
                MEMORY + "key_expansion": 2,
                MEMORY + "sharing": "ring",
                MEMORY + "share_group": 2,
                MEMORY + "num_heads": 3,
                MEMORY + "projection": "per_block",
            }
        )
    ).model.memory
    # 2 tables of 64 rows: 128 rows, of which a square of 11 x 11 = 121 is visible.
    assert (config.num_values, config.visible_keys, config.num_visible) == (64, 11, 121)
    assert (config.keys_per_side, config.num_blocks, config.num_slots) == (22, 4, 4)
    assert config.num_selected == 3 * 16


def test_placements_count_from_zero_and_default_to_every_block() -> None:
    assert from_config_dict(base_dict()).model.placements == ((0, 0), (1, 1), (2, 2), (3, 3))
    placed = with_changes({MEMORY + "read_layers": (1, 2), MEMORY + "write_layers": (2, 4)})
    assert from_config_dict(placed).model.placements == ((0, 1), (1, 3))
    assert from_config_dict(with_changes({MEMORY + "layer": "none"})).model.placements == ()


def test_infinite_numbers_are_rejected() -> None:
    assert error_of({"optimizer.learning_rate": float("inf")}).endswith(": must be finite")
    assert error_of({"generate.temperature": float("nan")}).endswith(": must be >= 0")
