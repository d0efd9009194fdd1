"""The copy of its tokenizer that a run keeps."""

import dataclasses
from pathlib import Path

import pytest

from configs import base
from umv2.config import DataConfig, from_config_dict
from umv2.data import tokenizer_copy


def with_tokenizer(name: str) -> DataConfig:
    return dataclasses.replace(from_config_dict(base.get_config()).data, tokenizer=name)


@pytest.mark.parametrize("suffix", [".json", ".model"])
def test_a_run_uses_its_copy_if_the_file_is_gone(tmp_path: Path, suffix: str) -> None:
    original, run = tmp_path / f"bpe{suffix}", tmp_path / "run"
    original.write_bytes(b"first")
    config = with_tokenizer(str(original))
    tokenizer_copy.save(config.tokenizer, run)
    assert tokenizer_copy.resolve(config, run) == config
    original.rename(tmp_path / "elsewhere")
    resolved = tokenizer_copy.resolve(config, run)
    assert resolved == dataclasses.replace(config, tokenizer=str(run / f"tokenizer{suffix}"))
    assert Path(resolved.tokenizer).read_bytes() == b"first"
    tokenizer_copy.save(resolved.tokenizer, run)  # of itself
    tokenizer_copy.save(config.tokenizer, run)  # of what is gone
    assert Path(resolved.tokenizer).read_bytes() == b"first"


def test_a_tokenizer_without_a_file_has_no_copy(tmp_path: Path) -> None:
    for name in ("bytes", "none"):
        tokenizer_copy.save(name, tmp_path)
        assert tokenizer_copy.resolve(with_tokenizer(name), tmp_path).tokenizer == name
    assert not list(tmp_path.iterdir())
    missing = with_tokenizer(str(tmp_path / "none.json"))
    assert tokenizer_copy.resolve(missing, tmp_path) == missing
