"""The report of several configurations: its table, its JSON and its figure."""

import json
from pathlib import Path

import pytest

from tests.cost import published
from umv2 import tables
from umv2.config import Config
from umv2.cost import accounting, report, traffic


def named() -> dict[str, Config]:
    """Returns one configuration of each family."""
    return {
        "experts": published.olmoe_227m(),
        "ultramem_v2": published.ultramem_v2_227m(),
        "dense": published.config(slots="dense"),
    }


def table(text: str) -> dict[str, dict[str, list[str]]]:
    """Parses a table: cells by section and row."""
    sections: dict[str, dict[str, list[str]]] = {}
    rows: dict[str, list[str]] = {}
    for line in text.splitlines()[2:]:
        if line and not line.startswith(" "):
            rows = sections.setdefault(line, {})
        elif line:
            cells = line.split()
            name = " ".join(cell for cell in cells[:-3])
            rows[name] = cells[-3:]
    return sections


def test_the_table_has_a_column_per_configuration_and_the_numbers_of_accounting() -> None:
    configs = named()
    text = report.cost_report(configs, context_length=4096).as_text(200)
    assert text.splitlines()[0].split() == list(configs)
    read = table(text)
    counts = {n: accounting.parameter_counts(c.model) for n, c in configs.items()}
    parameters = read["parameters"]
    assert parameters["total"] == [f"{count.total:,}" for count in counts.values()]
    assert parameters["routing"][2] == parameters["ffn"][0] == "-"
    step = traffic.decode_bytes(configs["ultramem_v2"].model, 64, 4096)
    section = read["read per decode step, MB, batch 64, context 4,096"]
    assert section["sparse values"][1] == f"{step.sparse_values / 1e6:,.3f}" == "31.457"
    # Keys and values: 20 layers x 4096 positions x 768 entries of 2 bytes, for 64 sequences.
    assert read["key-value cache, MB"]["a sequence of 4,096"][0] == "251.658"
    assert section["cache"][0] == "16,106.127"
    assert section["without cache, ratio"][:2] == ["1.000", "0.197"]
    forward_pass = read["forward pass, MFLOP/token, 4,096 tokens"]
    forward = accounting.forward_flops_per_token(configs["experts"].model, 4096)
    assert forward_pass["total"][0] == f"{sum(forward.values()) / 1e6:,.3f}"
    training = read["training, MB"]["total"][0]
    assert training == f"{accounting.training_memory(configs['experts'].model).total / 1e6:,.3f}"


def test_numbers_align_with_the_names() -> None:
    lines = report.cost_report(named()).as_text(200).splitlines()
    ends = {len(line) for line in lines if line.startswith("  ")}
    assert ends == {len(lines[0])}
    assert any("dense" in line for line in lines)


def test_a_single_configuration_has_no_comparison() -> None:
    one = report.cost_report({"dense": published.config(slots="dense")})
    assert "ratio" not in one.as_text()
    assert "ratio" in report.cost_report(named()).as_text()
    with pytest.raises(ValueError, match="at least one configuration"):
        report.cost_report({})


def test_json_has_the_same_numbers() -> None:
    configs = named()
    cost_report = report.cost_report(configs, context_length=100)
    read = json.loads(json.dumps(cost_report.as_dict()))
    assert read["context_length"] == 100
    assert list(read["configs"]) == list(configs)
    for name, config in configs.items():
        cost, model = read["configs"][name], config.model
        assert cost["parameters"] == accounting.parameter_counts(model).as_dict()
        steps = cost["decode_bytes_per_step"]
        assert list(steps) == ["1", "8", "64", "512"]
        assert steps["8"] == traffic.decode_bytes(model, 8, 100).as_dict()
        decode = cost["decode_flops_per_token"]
        assert decode.pop("total") == sum(decode.values())
        assert decode == accounting.decode_flops_per_token(model, 100)
        assert cost["training_bytes"]["total"] == accounting.training_memory(model).total
        # Training has its own sequence length.
        assert cost["training_flops_per_token"] == accounting.training_flops_per_token(config)


def test_the_context_is_the_longest_sequence_unless_given() -> None:
    cost_report = report.cost_report(named())
    assert cost_report.context_length == max(
        config.data.sequence_length for config in named().values()
    )
    longer = report.cost_report(named(), context_length=2 * cost_report.context_length)
    for short, long in zip(cost_report.costs.values(), longer.costs.values(), strict=True):
        assert long.cache_bytes == 2 * short.cache_bytes
        assert long.training_flops == short.training_flops


def test_the_figure_shows_the_configurations(tmp_path: Path) -> None:
    configs = named()
    drawn = {}
    for name, others in {
        "two": {"other": configs["ultramem_v2"]},
        "same": {"other": configs["ultramem_v2"]},
        "changed": {"other": configs["dense"]},
        "one": {},
    }.items():
        path = tmp_path / f"{name}.png"
        report.cost_report({"first": configs["experts"]} | others).draw(path)
        drawn[name] = path.read_bytes()
        assert drawn[name].startswith(b"\x89PNG")
    assert drawn["two"] == drawn["same"] != drawn["changed"] != drawn["one"]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize(
    "name", ["{}", "a_long_name_of_a_configuration/" * 3 + "{}", "模型" * 20 + "{}"]
)
@pytest.mark.parametrize("count", [1, 2, 6, 10])
def test_any_number_of_configurations_fits_the_terminal(count: int, name: str, width: int) -> None:
    families = list(named().values())
    configs = {name.format(i): families[i % len(families)] for i in range(count)}
    text = report.cost_report(configs).as_text(width)
    assert max(map(tables.display_width, text.splitlines())) <= width
    rows = [line.split()[1:] for line in text.splitlines() if line.startswith("  total  ")]
    counts = [f"{accounting.parameter_counts(config.model).total:,}" for config in configs.values()]
    shown = [cell for row in rows for cell in row]
    assert [cell for cell in shown if cell in counts] == counts


def test_curves_meet_the_table_at_its_batches() -> None:
    cost = report.cost_report({"experts": published.olmoe_227m()}).costs["experts"]
    assert set(report.BATCH_SIZES) <= set(report.PLOTTED_BATCH_SIZES) == set(cost.decode_bytes)
    assert (min(cost.decode_bytes), max(cost.decode_bytes)) == (1, 512)
