"""The copy of its tokenizer that a run keeps."""

import dataclasses
from pathlib import Path

import pytest

from configs import base
from umv2.config import DataConfig, from_config_dict
from umv2.data import kept_tokenizer


def with_tokenizer(name: str) -> DataConfig:
    return dataclasses.replace(from_config_dict(base.get_config()).data, tokenizer=name)


@pytest.mark.parametrize("suffix", [".json", ".model"])
def test_a_run_finds_its_copy_where_the_file_is_gone(tmp_path: Path, suffix: str) -> None:
    original, run = tmp_path / f"bpe{suffix}", tmp_path / "run"
    original.write_bytes(b"first")
    config = with_tokenizer(str(original))
    kept_tokenizer.keep(config.tokenizer, run)
    assert kept_tokenizer.found(config, run) == config
    original.rename(tmp_path / "elsewhere")
    found = kept_tokenizer.found(config, run)
    assert found == dataclasses.replace(config, tokenizer=str(run / f"tokenizer{suffix}"))
    assert Path(found.tokenizer).read_bytes() == b"first"
    kept_tokenizer.keep(found.tokenizer, run)  # of itself
    kept_tokenizer.keep(config.tokenizer, run)  # of what is gone
    assert Path(found.tokenizer).read_bytes() == b"first"


def test_a_tokenizer_without_a_file_has_no_copy(tmp_path: Path) -> None:
    for name in ("bytes", "none"):
        kept_tokenizer.keep(name, tmp_path)
        assert kept_tokenizer.found(with_tokenizer(name), tmp_path).tokenizer == name
    assert not list(tmp_path.iterdir())
    missing = with_tokenizer(str(tmp_path / "none.json"))
    assert kept_tokenizer.found(missing, tmp_path) == missing
