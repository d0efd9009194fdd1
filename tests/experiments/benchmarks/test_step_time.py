"""The step in PyTorch that takes turns with ours."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from configs import tiny
from experiments.benchmarks import step_time
from umv2.config.schema import ConfigError


@pytest.fixture(autouse=True)
def parsed_flags() -> Iterator[None]:
    """Flags at their defaults."""
    with flagsaver.flagsaver():
        flags.FLAGS.mark_as_parsed()
        yield


def interpreter(folder: Path, script: str) -> str:
    """Writes an executable that takes the place of Python with torch."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def pytorch_step(python: str) -> step_time.Step:
    variants = step_time.variants(["pytorch"], tiny.get_config(), "tiny")
    with flagsaver.flagsaver(pytorch=python):
        return step_time.compile_step("pytorch", variants["pytorch"])


def test_the_process_gets_the_sizes_of_the_dense_model_and_reports_its_seconds(
    tmp_path: Path,
) -> None:
    sizes = tmp_path / "sizes.json"
    script = f'read sizes; echo "$sizes" > {sizes}; echo ready\nwhile read line; do echo 0.5; done'
    step = pytorch_step(interpreter(tmp_path, script))
    for timed in (False, True, True):
        step.run(timed=timed)
    assert step.seconds == [0.5, 0.5]
    assert '"hidden_size": 128' in sizes.read_text()
    results = step_time.time_interleaved({"pytorch": step}, rounds=2)
    _, row = step_time.table(results).splitlines()
    assert row.split()[:5] == ["pytorch", "0.500", "1.000", "1.000-1.000", "-"]


@pytest.mark.parametrize("script", ["exit 1", "echo No module named torch", None])
def test_a_python_that_cannot_run_it_is_named(script: str | None, tmp_path: Path) -> None:
    python = str(tmp_path / "none") if script is None else interpreter(tmp_path, script)
    with pytest.raises(ConfigError, match=f"--pytorch={python}"):
        pytorch_step(python)
