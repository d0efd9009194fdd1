"""The named configurations: their golden texts, counts against the parameter tree, and imports."""

import difflib
import functools
import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from configs import base
from umv2.config import from_config_dict
from umv2.training import inspection

CONFIGS_DIR = Path(base.__file__).parent
GOLDEN_DIR = Path(__file__).parent / "golden_text"
NAMES = sorted(
    path.stem
    for path in CONFIGS_DIR.glob("*.py")
    if path.stem not in ("base", "families", "__init__")
)

# The part under which a parameter is counted, by its name.
PARTS = {
    "embedding": r"params/embedding",
    "head": r"params/head",
    "attention": r"params/blocks/attention/(query|key|value|output)",
    "ffn": r"params/blocks/ffn/(gate|up|down)",
    "norms": r"params/(final_norm|blocks/(\w+/)?\w+_norm)/weight",
    "sparse_projections": r"params/memory/(query|pre|output)",
    "routing": r"params/memory/(keys|cores|query_norm|key_norm)",
    "sparse_values": r"store/(values|pre_values)",
}


@functools.cache
def inspected(name: str) -> inspection.Inspection:
    return inspection.inspect(
        from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    )


def counted_by_part(listed: inspection.Inspection) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for parameter in listed.parameters:
        if parameter.name.startswith("buffers/"):
            continue
        (part,) = (part for part, name in PARTS.items() if re.fullmatch(name, parameter.name))
        counts[part] += parameter.size
    return {part: counts[part] for part in PARTS}


def assert_counts_are_those_of_the_tree(listed: inspection.Inspection) -> None:
    counts, by_part = listed.counts, counted_by_part(listed)
    assert {part: getattr(counts, part) for part in PARTS} == by_part
    assert counts.total == sum(by_part.values())
    without = counts.total - by_part["embedding"] - by_part["head"]
    assert counts.total_without_embeddings == without
    unused = by_part["sparse_values"] - counts.selected
    assert counts.active == counts.total - unused
    assert counts.active_without_embeddings == without - unused


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_matches_its_golden_text(name: str) -> None:
    text = inspected(name).as_text(width=200) + "\n"
    path = GOLDEN_DIR / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    golden = path.read_text() if path.exists() else ""
    if text != golden:
        lines = (golden.splitlines(), text.splitlines())
        difference = "\n".join(difflib.unified_diff(*lines, "golden", "now", n=0, lineterm=""))
        pytest.fail(
            f"{name} differs from {path}; if this is intended, run the test with UPDATE_GOLDEN=1"
            f" and commit the file:\n{difference}"
        )


def test_every_golden_text_has_a_configuration() -> None:
    assert sorted(path.stem for path in GOLDEN_DIR.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_counts_match_the_tree(name: str) -> None:
    assert_counts_are_those_of_the_tree(inspected(name))


def test_selected_values_by_hand() -> None:
    config = base.get_config()  # 4 layers, 16 values of width 48 + 16
    config.model.memory.num_heads = 2
    counts = inspection.inspect(from_config_dict(config)).counts
    assert counts.selected == 4 * 2 * 16 * (48 + 16)


def test_the_smallest_published_size_matches_the_paper() -> None:
    counts = inspected("paper_227m_1b2").as_dict()["counts"]
    # Table 10: 1.18B parameters, 225M of them active with one embedding matrix.
    assert counts["total_without_embeddings"] == pytest.approx(1.18e9, rel=0.01)
    assert counts["active_one_embedding"] == pytest.approx(225e6, rel=0.01)


def test_every_parameter_is_listed_with_its_group() -> None:
    listed = {p.name: p for p in inspected("tiny").parameters}
    values = listed["store/values"]
    assert (values.shape, values.dtype, values.group) == ((4, 64 * 64, 48), "float32", "values")
    assert listed["params/memory/keys"].group == "keys"
    assert listed["params/embedding"].group == "embeddings"
    buffers = {name for name, p in listed.items() if p.group == "(buffer)"}
    assert buffers == {name for name in listed if name.startswith("buffers/")} != set()


def test_the_sharding_of_every_parameter_is_listed() -> None:
    values = importlib.import_module("configs.paper_1b_7b").get_config()
    values.mesh.update(fsdp=4, memory=16, tensor=2, table_sharding="rows")
    listed = {p.name: p.sharding for p in inspection.inspect(from_config_dict(values)).parameters}
    assert listed["store/values"] == "- x memory x -"
    assert listed["params/blocks/ffn/down"] == "- x tensor x fsdp"
    assert listed["params/embedding"] == "tensor x fsdp"
    assert listed["params/final_norm/weight"] == "replicated"


def test_every_field_of_the_base_configuration_has_a_comment() -> None:
    """A field has its own comment, or is in the group below a comment."""
    lines = [line.strip() for line in (CONFIGS_DIR / "base.py").read_text().splitlines()]
    in_group = False
    for line in lines[lines.index("config = ConfigDict()") + 1 : lines.index("return config")]:
        commented = "# " in line
        if not line or line.endswith("= ConfigDict()"):
            in_group = False
        elif line.startswith("#") or "= ConfigDict()  #" in line:
            in_group = True
        else:
            assert commented or in_group, f"no comment with unit, source or meaning: {line}"
            in_group = in_group and not commented


def test_loading_configurations_imports_no_jax() -> None:
    imports = "; ".join(f"import configs.{name}" for name in NAMES)
    loads = "; ".join(f"from_config_dict(configs.{name}.get_config())" for name in NAMES)
    program = (
        f"import sys; {imports}; from umv2.config import from_config_dict; {loads};"
        " heavy = {'jax', 'flax', 'numpy', 'optax', 'orbax'} & set(sys.modules);"
        " sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=CONFIGS_DIR.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
