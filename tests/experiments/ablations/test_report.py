"""Pages and figures from stored runs: every number on them comes from the files."""

import filecmp
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments import measurements
from experiments.ablations import corpora, figures, records, report
from experiments.ablations.catalogue import ABLATIONS, configuration
from experiments.ablations.comparison import compare
from tests.experiments.ablations.test_records import HEAD


def store(
    results: Path,
    ablation: str,
    arm: str,
    seed: int,
    held_out: float,
    corpus: dict[str, Any] | None = None,
) -> None:
    """Writes the records of a made-up run."""
    values = configuration(ablation, arm, "smoke")
    if corpus is not None:
        corpora.use(values, **corpus)
    head = HEAD | {
        "arms": [f"{ablation}/{arm}"],
        "seed": seed,
        "config": records.plain(values),
        "active_parameters": 1_234_000,
        "total_parameters": 5_678_000,
        "values_read": 512,
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
    path = records.run_file(results, f"{ablation}/{arm}", seed)
    measurements.write(path, [head, *steps, evaluation, end])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "smoke"
    for seed, noise in enumerate((0.0, 0.01, -0.01)):
        store(folder, "heads", "one", seed, 4.0 + 10 * noise)
        store(folder, "heads", "two", seed, 4.2 + 11 * noise)
    return tmp_path


def arms(results: Path) -> Any:
    stored = records.Stored(results / "smoke")
    runs = {arm: stored.find(configuration("heads", arm, "smoke")) for arm in ("one", "two")}
    return compare(ABLATIONS["heads"], runs)


def test_a_page_shows_the_results_of_the_runs(results: Path) -> None:
    text = report.page("heads", "smoke", arms(results), "Looked into: nothing.")
    # Differences 0.2, 0.21, 0.19; t = 4.303, s = 0.01.
    row = "| two | 3     | 4.2000 ± 0.1100           | one           | +0.0008 loss, -0.2 points"
    assert row in text
    assert "+0.2000 ± 0.0248" in text
    assert "same sign" in text
    assert "`model.memory.num_heads` 1 -> 2" in text
    assert "1.234" in text  # million active parameters
    assert "4,096 tokens per run of standard_library (corpus c0ffee)" in text
    assert "| one | 0.5 " in text  # mean coverage
    assert text.rstrip().endswith("Looked into: nothing.")
    assert "section 4.2.3" in text


def test_tables_are_aligned() -> None:
    lines = report.markdown_table([["a", "long name"], ["1", "x"]]).splitlines()
    assert lines == ["| a | long name |", "| - | --------- |", "| 1 | x         |"]


def test_the_index_counts_runs_without_an_arm(results: Path) -> None:
    runs = list(records.Stored(results / "smoke").runs.values())
    scale = report.Scale({"heads": arms(results)}, {"selection": "1"}, runs, 2)
    text = report.index({"smoke": scale})
    assert "6 runs, 12.00 PFLOP, 0.1 process hours" in text
    assert "median half-width of an interval 0.0248" in text
    assert "2 stored runs have configurations that no arm has any longer." in text
    assert "[heads](smoke/heads.md)" in text
    assert "Only one arm has runs, with nothing to compare it to: selection (1)." in text
    assert "Not run at this scale: value_processing," in text


def test_figures_are_drawn(results: Path) -> None:
    figures.draw_ablation(ABLATIONS["heads"], arms(results), results / "heads.png")
    figures.draw_overview({"heads": arms(results)}, results / "overview.png")
    for name in ("heads.png", "overview.png"):
        assert (results / name).read_bytes().startswith(b"\x89PNG")


def test_all_pages_are_written(results: Path) -> None:
    store(results / "smoke", "tucker_penalty", "with", 0, 4.1)
    report.write_all(results)
    written = {
        str(path.relative_to(results)) for path in results.rglob("*.*") if path.suffix != ".jsonl"
    }
    # Other ablations share the baseline of heads; those with runs of a second arm get a page.
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
    store(folder, "heads", "one", 1, 3.0)  # on the scale's own corpus, so in the wrong folder
    measurements.write(folder / records.CORPUS, [corpus])
    text = report.write_all(results)
    assert "## Scale smoke_site_packages_bpe_8192" in text
    assert (folder / "heads.md").exists()
    assert "1 stored runs have configurations that no arm has any longer." in text


def test_one_arm_of_two_with_one_seed(tmp_path: Path) -> None:
    store(tmp_path / "smoke", "heads", "two", 0, 4.2)
    text = report.write_all(tmp_path)
    assert "1 runs, 2.00 PFLOP" in text
    assert "nothing to compare it to: heads (two)." in text
    assert not list(tmp_path.rglob("*.png"))


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    for arm in ("one", "two"):
        store(tmp_path / "smoke", "heads", arm, 0, 4.2)
    report.write_all(tmp_path)
    page = (tmp_path / "smoke" / "heads.md").read_text()
    assert "| one | 1     | 4.2000 " in page
    assert "nan" not in page


def test_pages_of_runs_that_diverged_or_have_non_finite_values(tmp_path: Path) -> None:
    store(tmp_path / "smoke", "heads", "one", 0, 4.2)
    store(tmp_path / "smoke", "heads", "two", 0, float("nan"))
    report.write_all(tmp_path)
    page = (tmp_path / "smoke" / "heads.md").read_text()
    assert "nan" not in page
    assert "too few seeds" in page


def test_figures_are_redrawn_only_if_their_data_changed(results: Path) -> None:
    report.write_all(results)
    pictures = {path: path.read_bytes() for path in results.rglob("*.png")}
    for path, content in pictures.items():
        path.write_bytes(content + b"drawn by another version")
    report.write_all(results)
    assert all(path.read_bytes() != content for path, content in pictures.items())
    store(results / "smoke", "heads", "two", 3, 4.1)
    store(results / "smoke", "heads", "one", 3, 4.1)
    report.write_all(results)
    for path, content in pictures.items():
        assert path.read_bytes() != content
        assert b"another version" not in path.read_bytes()


@pytest.mark.parametrize("content", [None, "seed_0.json"])
def test_no_index_is_written_without_runs(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / content).write_text("")
    (tmp_path / "README.md").write_text("committed")
    with pytest.raises(measurements.RecordsError, match=f"{tmp_path}: has no runs"):
        report.write_all(tmp_path)
    assert (tmp_path / "README.md").read_text() == "committed"


def test_no_index_is_written_if_no_run_belongs_to_an_arm(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (results / "README.md").write_text("committed")

    def changed(ablation: str, arm: str, scale: str) -> Any:
        values = configuration(ablation, arm, scale)
        values.train.num_steps = 7
        return values

    monkeypatch.setattr(report, "configuration", changed)
    message = r"none of its 6 runs .*; heads/one, stored and now: train.num_steps: 6 -> 7"
    with pytest.raises(measurements.RecordsError, match=message):
        report.write_all(results)
    assert (results / "README.md").read_text() == "committed"


def test_a_folder_of_runs_must_be_named_after_a_scale(results: Path) -> None:
    (results / "smoke").rename(results / "smok")
    with pytest.raises(
        measurements.RecordsError, match=r"smok: .* must begin with one of smoke, cpu"
    ):
        report.write_all(results)


@pytest.mark.parametrize("text", ["", "{", '{"corpus": "site_packages"}\n'])
def test_a_damaged_corpus_is_named(results: Path, text: str) -> None:
    path = results / "smoke" / records.CORPUS
    path.write_text(text)
    with pytest.raises(measurements.RecordsError, match=str(path)):
        report.write_all(results)


def test_the_committed_pages_match_the_committed_runs(tmp_path: Path) -> None:
    """If this fails, run `python -m experiments.ablations.report` and commit the pages."""
    committed = Path(records.__file__).parents[1] / "results" / "ablations"
    copy = tmp_path / "ablations"
    shutil.copytree(committed, copy)
    report.write_all(copy)
    written = {path.relative_to(copy) for path in copy.rglob("*") if path.is_file()}
    assert written == {
        path.relative_to(committed) for path in committed.rglob("*") if path.is_file()
    }
    different = [
        path for path in written if not filecmp.cmp(committed / path, copy / path, shallow=False)
    ]
    assert not different
