"""The training step with its kernels, compiled for chips that are not attached."""

from typing import Literal

import pytest

from tests.kernels_pallas.aot import CHIPS, run_cases

BOTH = {
    f"{operator}_{part}"
    for operator in ("product_key_top_k", "value_aggregation")
    for part in ("forward", "backward")
}
AGGREGATION = {"value_aggregation_forward", "value_aggregation_backward"}
SPLASH, CUDNN = {"splash_mha"}, {"__cudnn$fmha"}
# On a GPU the backward pass of product-key top-k is plain XLA.
ON_GPU = BOTH - {"product_key_top_k_backward"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "topology", "top_k", "aggregation", "kernels"),
    [
        ("tpu", "v5e:2x2", "xla", "xla", SPLASH),
        ("tpu", "v5e:2x2", "pallas_tpu", "pallas_tpu", BOTH | SPLASH),
        ("tpu", "v5p:2x2x1", "xla", "pallas_sparsecore", AGGREGATION | SPLASH),
        ("h200", "h200:4", "pallas_gpu", "pallas_gpu", ON_GPU),  # cuDNN takes no float32
    ],
)
def test_the_step_compiles_with_the_configured_kernels_on_four_devices(
    compiler: Literal["tpu", "h200"],
    topology: str,
    top_k: str,
    aggregation: str,
    kernels: set[str],
) -> None:
    fields = {
        "model.memory.product_key_top_k": top_k,
        "model.memory.value_aggregation": aggregation,
    }
    case = {"topology": topology, "fields": fields}
    (used,) = run_cases("train_step_compile.py", case, compiler=compiler)
    assert set(used) == kernels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "topology", "kernels"),
    [
        *(("tpu", chip, BOTH | SPLASH) for chip in CHIPS),
        ("h200", "h200:4", ON_GPU | CUDNN),
    ],
)
def test_the_defaults_of_every_chip_compile(
    compiler: Literal["tpu", "h200"], topology: str, kernels: set[str]
) -> None:
    fields = {"model.compute_dtype": "bfloat16", "model.memory.read_dtype": "compute"}
    case = {"topology": topology, "fields": fields}
    (used,) = run_cases("train_step_compile.py", case, compiler=compiler)
    assert set(used) == kernels


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["columns", "rows"])
def test_the_step_compiles_with_kernels_on_sharded_tables(layout: str) -> None:
    fields = {
        "mesh.memory": 4,
        "mesh.table_sharding": layout,
        "model.memory.product_key_top_k": "pallas_gpu",
        "model.memory.value_aggregation": "pallas_gpu",
    }
    case = {"topology": "h200:4", "fields": fields}
    (used,) = run_cases("train_step_compile.py", case, compiler="h200")
    assert {"product_key_top_k_forward", *AGGREGATION} <= set(used)
