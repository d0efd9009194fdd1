"""Pages and pictures from stored runs: every number on them is one of the files'."""

from pathlib import Path
from typing import Any

import pytest

from experiments import corpora, figures, records, report
from experiments.ablations import ABLATIONS, configuration
from experiments.comparison import compare


def store(
    results: Path,
    ablation: str,
    arm: str,
    seed: int,
    held_out: float,
    corpus: dict[str, Any] | None = None,
) -> None:
    """Writes the records of a run that never was."""
    values = configuration(ablation, arm, "smoke")
    if corpus is not None:
        corpora.take(values, **corpus)
    config_hash = records.config_hash(values)
    head: dict[str, Any] = {
        "kind": "run",
        "arms": [f"{ablation}/{arm}"],
        "seed": seed,
        "config_hash": config_hash,
        "config": values.to_dict(),
        "corpus": {"source": "standard_library", "hash": "c0ffee"},
        "date": "2026-11-25",
        "versions": {"jax": "0.12.0", "python": "3.12.1"},
        "device": "cpu",
        "tokens": 4096,
        "training_flops": 2e15,
        "active_parameters": 1_234_000,
        "total_parameters": 5_678_000,
        "forward_flops_per_token": 3e6,
        "values_read": 512,
        "decode_bytes": {"1": 2e6, "64": 7e6},
    }
    steps = [
        {"kind": "step", "step": i, "tokens": 100 * i, "loss": held_out + 1 / i, "gradient_norm": 1}
        for i in range(1, 21)
    ]
    evaluation = {"kind": "held_out", "step": 20, "tokens": 2000, "held_out_loss": held_out}
    end = {
        "kind": "end",
        "diverged": None,
        "health": {"coverage/layer_1": 0.25, "coverage/layer_2": 0.75},
        "answers": None,
        "seconds_shared_machine": 90.0,
    }
    records.write(records.run_file(results, config_hash, seed), [head, *steps, evaluation, end])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "smoke"
    for seed, noise in enumerate((0.0, 0.01, -0.01)):
        store(folder, "heads", "one", seed, 4.0 + 10 * noise)
        store(folder, "heads", "two", seed, 4.2 + 11 * noise)
    return tmp_path


def arms(results: Path) -> Any:
    stored = records.read_all(results / "smoke")
    runs = {
        arm: stored[records.config_hash(configuration("heads", arm, "smoke"))]
        for arm in ("one", "two")
    }
    return compare(ABLATIONS["heads"], runs)


def test_a_page_holds_what_the_runs_say(results: Path) -> None:
    text = report.page("heads", "smoke", arms(results), "Looked into: nothing.")
    # Differences 0.2, 0.21, 0.19; t = 4.303, s = 0.01.
    row = "| two | 3     | 4.2000 ± 0.1100           | one           | +0.0008 loss, -0.2 points"
    assert row in text
    assert "+0.2000 ± 0.0248" in text
    assert "same sign" in text
    assert "`model.memory.num_heads` 1 -> 2" in text
    assert "1.234" in text  # million active parameters
    assert "4,096 tokens a run of standard_library (corpus c0ffee)" in text
    assert "| one | 0.5 " in text  # mean coverage
    assert text.rstrip().endswith("Looked into: nothing.")
    assert "section 4.2.3" in text


def test_tables_line_up() -> None:
    lines = report.markdown_table([["a", "long name"], ["1", "x"]]).splitlines()
    assert lines == ["| a | long name |", "| - | --------- |", "| 1 | x         |"]


def test_the_index_counts_what_no_arm_has_any_more(results: Path) -> None:
    text = report.index({"smoke": {"heads": arms(results)}}, {"smoke": 2})
    assert "6 runs, 12.00 PFLOP, 0.1 hours" in text
    assert "median half width of an interval 0.0248" in text
    assert "2 stored runs are of configurations that no arm has any more." in text
    assert "[heads](smoke/heads.md)" in text
    assert "Not run at this scale: value_processing," in text


def test_pictures_are_drawn(results: Path) -> None:
    figures.draw_ablation(ABLATIONS["heads"], arms(results), results / "heads.png")
    figures.draw_overview({"heads": arms(results)}, results / "overview.png")
    for name in ("heads.png", "overview.png"):
        assert (results / name).read_bytes().startswith(b"\x89PNG")


def test_all_pages_are_written(results: Path) -> None:
    store(results / "smoke", "tucker_penalty", "with", 0, 4.1)
    report.write_all(results)
    written = {
        str(path.relative_to(results)) for path in results.rglob("*.*") if "runs" not in str(path)
    }
    # The base of heads is that of others too; those with a second arm that has runs get a page.
    assert written == {
        "README.md",
        "smoke/heads.md",
        "smoke/heads.png",
        "smoke/tucker_penalty.md",
        "smoke/tucker_penalty.png",
        "smoke/overview.png",
    }


def test_runs_on_another_corpus_are_a_scale_of_their_own(results: Path) -> None:
    corpus = {"corpus": "site_packages", "vocab_size": 8192}
    folder = results / "smoke_site_packages_bpe_8192"
    for arm in ("one", "two"):
        store(folder, "heads", arm, 0, 3.0, corpus)
    store(folder, "heads", "one", 1, 3.0)  # of the scale's own corpus: it belongs elsewhere
    records.write(folder / records.CORPUS, [corpus])
    text = report.write_all(results)
    assert "## Scale smoke_site_packages_bpe_8192" in text
    assert (folder / "heads.md").exists()
    assert "1 stored runs are of configurations that no arm has any more." in text
