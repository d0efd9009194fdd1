import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from configs import base
from tests.tiny_run import logged
from umv2.config import DataConfig, from_config_dict
from umv2.data.tokenizers import load_tokenizer, train_bpe
from umv2.interop import tokenizer_files

DATA = from_config_dict(base.get_config()).data
TEXTS = [
    "The square of 12 is 144, don't you  know?",
    "def f(x):\n    return x**2  # no\n\tpass\r\n",
    "Grüße, déjà vu: e\u0301, Ⅷ, ﬁne, ½, ＡＢ１２",
    "日本語\u3000テキスト 🙂👍 \x00",
    "",
    " ",
    "\n",
    "  ",
]
# Options of SentencePiece's trainer, by name.
MODELS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe"},
    "bpe of bytes": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    },
    "bpe without prefix": {
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "nmt_nfkc_cf",
        "user_defined_symbols": ["<tool>", "\n"],
    },
    "unigram": {"model_type": "unigram"},
    "unigram of bytes": {
        "model_type": "unigram",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    },
    "characters": {"model_type": "char"},
}
# Options that the tokenizers library cannot express.
INEXACT: dict[str, dict[str, Any]] = {
    "suffix": {"model_type": "unigram", "treat_whitespace_as_suffix": True},
    "word": {"model_type": "word"},
    "symbols after a prefix": {"model_type": "bpe", "user_defined_symbols": ["<tool>"]},
}


def sentence_piece(path: Path, **options: Any) -> str:
    lines = [line for text in TEXTS for line in text.splitlines() if line.strip()] * 20
    lines += [f"Document {i}: the square of {i} is {i * i}" for i in range(200)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return str(path)


def bpe(path: Path) -> str:
    train_bpe(TEXTS * 3, 300, path)
    return str(path)


def written(config: DataConfig) -> dict[str, bytes]:
    return tokenizer_files.file_contents(tokenizer_files.load_for_export(config), config)


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def named(tokenizer: str, **changes: Any) -> DataConfig:
    return dataclasses.replace(DATA, tokenizer=tokenizer, **changes)


def assert_same_tokenizer(contents: dict[str, bytes], config: DataConfig) -> None:
    """The exported file gives the ids and the text that the run's tokenizer gives."""
    ours = load_tokenizer(config.tokenizer, config.end_of_text_id)
    assert ours is not None
    theirs = tokenizers.Tokenizer.from_buffer(contents["tokenizer.json"])
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text).ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)
    described = json.loads(contents["tokenizer_config.json"])
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert theirs.token_to_id(described["eos_token"]) == ours.end_of_text_id
    assert described["bos_token"] == described["eos_token"]
    assert described["model_max_length"] == config.sequence_length
    assert described["clean_up_tokenization_spaces"] is False


def test_the_byte_tokenizer_is_exported_as_a_bpe_without_merges() -> None:
    contents = written(DATA)
    assert_same_tokenizer(contents, DATA)
    theirs = tokenizers.Tokenizer.from_buffer(contents["tokenizer.json"])
    assert theirs.get_vocab_size() == 257
    assert theirs.encode("a<|endoftext|>").ids == [97, 256]
    every = bytes(range(256))
    assert theirs.decode(list(every)) == every.decode("utf-8", "replace")


def test_a_tokenizers_file_is_exported_unchanged(tmp_path: Path) -> None:
    config = named(bpe(tmp_path / "bpe.json"))
    contents = written(config)
    assert contents["tokenizer.json"] == (tmp_path / "bpe.json").read_bytes()
    assert_same_tokenizer(contents, config)


@pytest.mark.parametrize("changed", ["marks", "truncation", "padding"])
def test_options_that_change_the_number_of_ids_are_not_exported(
    tmp_path: Path, changed: str
) -> None:
    path = bpe(tmp_path / "bpe.json")
    tokenizer = tokenizers.Tokenizer.from_file(path)
    match changed:
        case "marks":
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
                single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
            )
        case "truncation":
            tokenizer.enable_truncation(3)
        case "padding":
            tokenizer.enable_padding(length=64)
    tokenizer.save(path)
    assert_same_tokenizer(written(named(path)), named(path))


def test_a_configured_end_of_text_is_kept(tmp_path: Path) -> None:
    config = named(bpe(tmp_path / "bpe.json"), end_of_text_id=7)
    assert_same_tokenizer(written(config), config)


@pytest.mark.parametrize("name", MODELS)
def test_a_sentence_piece_model_is_converted(tmp_path: Path, name: str) -> None:
    config = named(sentence_piece(tmp_path / "tokens.model", **MODELS[name]))
    contents = written(config)
    assert_same_tokenizer(contents, config)
    assert contents["sentencepiece.model"] == (tmp_path / "tokens.model").read_bytes()


@pytest.mark.parametrize("name", INEXACT)
def test_a_tokenizer_that_cannot_be_converted_makes_auto_tokenizer_fail(
    tmp_path: Path, name: str
) -> None:
    config = named(sentence_piece(tmp_path / "tokens.model", **INEXACT[name]))
    with logged() as messages:
        contents = written(config)
    assert messages == [
        f"{config.tokenizer} has no exact AutoTokenizer equivalent: exporting only the file itself,"
        " as sentencepiece.model"
    ]
    assert contents.keys() == {"sentencepiece.model", "tokenizer_config.json"}
    assert json.loads(contents["tokenizer_config.json"]) == {
        "tokenizer_class": "NoTokenizerWasExported"
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (named("none", end_of_text_id=0), "exporting no tokenizer: data.tokenizer='none'"),
        (named("/nowhere/bpe.json"), "exporting no tokenizer: data.tokenizer='/nowhere/bpe.json'"),
        (named("/nowhere/bpe.model"), "exporting no tokenizer: data.tokenizer='/nowhere/bpe.mod"),
    ],
)
def test_a_run_without_tokenizer_logs_that(config: DataConfig, message: str) -> None:
    with logged() as messages:
        contents = written(config)
    assert len(messages) == 1
    assert messages[0].startswith(message)
    assert contents.keys() == {"tokenizer_config.json"}
    assert json.loads(contents["tokenizer_config.json"]) == {
        "tokenizer_class": "NoTokenizerWasExported"
    }


def test_a_tokenizer_that_changed_since_training_is_not_exported(tmp_path: Path) -> None:
    config = named(bpe(tmp_path / "bpe.json"))
    tokenizer = tokenizer_files.load_for_export(config)
    assert tokenizer is not None
    assert tokenizer_files.load_for_export(config, tokenizer.fingerprint) is not None
    train_bpe(["other text"] * 9, 290, tmp_path / "bpe.json")
    with logged() as messages:
        assert tokenizer_files.load_for_export(config, tokenizer.fingerprint) is None
    assert "has changed since the run was trained" in messages[0]


@pytest.mark.parametrize("kind", ["bytes", "tokenizers", "sentence piece"])
def test_a_tokenizer_round_trips(tmp_path: Path, kind: str) -> None:
    config = {
        "bytes": lambda: DATA,
        "tokenizers": lambda: named(bpe(tmp_path / "bpe.json")),
        "sentence piece": lambda: named(sentence_piece(tmp_path / "a.model", **MODELS["bpe"])),
    }[kind]()
    folder = write(tmp_path / "out", written(config))
    assert tokenizer_files.adopt(config, folder, -1, 1024) == (config, None)
    other = named(bpe(tmp_path / "other.json") if kind == "bytes" else "bytes")
    adopted, file = tokenizer_files.adopt(other, folder, -1, 1024)
    ours, theirs = (load_tokenizer(c.tokenizer, c.end_of_text_id) for c in (config, adopted))
    assert ours is not None
    assert theirs is not None
    assert ours.fingerprint == theirs.fingerprint
    assert file == (None if kind == "bytes" else Path(adopted.tokenizer))


def test_the_tokenizer_of_the_folder_replaces_a_missing_one(tmp_path: Path) -> None:
    config = named(bpe(tmp_path / "bpe.json"))
    folder = write(tmp_path / "out", written(config))
    (tmp_path / "bpe.json").unlink()
    adopted, file = tokenizer_files.adopt(config, folder, -1, 1024)
    assert file == folder / "tokenizer.json"
    assert adopted == dataclasses.replace(config, tokenizer=str(file))


@pytest.mark.parametrize(
    ("end_of_text_id", "expected"),
    [(0, 0), (299, 299), (-1, -1), (1024, -1), (None, -1), ([0], -1)],
)
def test_the_folder_defines_end_of_text(tmp_path: Path, end_of_text_id: Any, expected: int) -> None:
    bpe(tmp_path / "tokenizer.json")
    adopted, _ = tokenizer_files.adopt(DATA, tmp_path, end_of_text_id, 1024)
    assert adopted.end_of_text_id == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no tokenizer; keeping data.tokenizer='bytes'"),
        (b"{", "keeping data.tokenizer='bytes': .*tokenizer.json: not a tokenizers file"),
        (b"[" * 100_000, "keeping data.tokenizer='bytes': .*tokenizer.json: not a tokenizers file"),
        ("large", "keeping data.tokenizer='bytes': .*tokenizer.json: its 300 ids do not fit"),
    ],
)
def test_an_unusable_tokenizer_is_ignored(
    tmp_path: Path, content: bytes | str | None, message: str
) -> None:
    match content:
        case bytes():
            (tmp_path / "tokenizer.json").write_bytes(content)
        case str():
            bpe(tmp_path / "tokenizer.json")
    with logged() as messages:
        assert tokenizer_files.adopt(DATA, tmp_path, -1, 299) == (DATA, None)
    assert len(messages) == 1
    assert re.search(message, messages[0])


def test_token_files_need_no_tokenizer(tmp_path: Path) -> None:
    bpe(tmp_path / "tokenizer.json")
    config = named("none", end_of_text_id=0)
    assert tokenizer_files.adopt(config, tmp_path, -1, 1024) == (config, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bytes", "bpe", "none", *MODELS])
def test_auto_tokenizer_reads_what_was_written(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra reference")
    match name:
        case "bytes":
            config = DATA
        case "none":
            config = named("none", end_of_text_id=0)
        case "bpe":
            config = named(bpe(tmp_path / "bpe.json"))
        case _:
            config = named(sentence_piece(tmp_path / "tokens.model", **MODELS[name]))
    folder = write(tmp_path / "out", written(config))
    (folder / "config.json").write_text('{"model_type": "olmoe"}')
    if name == "none":
        with pytest.raises(ValueError, match="tokenizer"):
            transformers.AutoTokenizer.from_pretrained(str(folder))
        return
    ours = load_tokenizer(config.tokenizer)
    assert ours is not None
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_text_id
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == ours.decode(ids)
