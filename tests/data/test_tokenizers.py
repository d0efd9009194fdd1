import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from umv2 import files
from umv2.data.paths import DataError
from umv2.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

TEXTS = ["the cat sat on the mat. ", "grüße an die 世界! ", "def main() -> None:\n    pass\n"] * 20
UNSEEN = "Ünseen\ttext 🎉 with  spaces\nand <|endoftext|> </s> spelled out"
# Text without surrogates, which UTF-8 cannot encode.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "new" / "tokenizer.json"
    train_bpe(TEXTS, 300, path)
    return path


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def metaspace_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenizers` file in Llama's style: spaces as U+2581, bytes as <0xFF>."""
    pieces = ["</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "ü", "▁a"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    path = tmp_path_factory.mktemp("metaspace") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(params=["bytes", "bpe_path", "sentencepiece_path", "metaspace_path"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    is_path = request.param.endswith("_path")
    name = str(request.getfixturevalue(request.param)) if is_path else request.param
    loaded = load_tokenizer(name)
    assert loaded is not None
    return loaded


@pytest.mark.parametrize("text", ["", *TEXTS[:3], UNSEEN, "ascii only"])
def test_text_round_trips_and_its_bytes_are_counted(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.end_of_text_id not in ids, "a document cannot end itself"
    assert np.all(ids < tokenizer.vocab_size)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode("utf-8"))


def test_end_of_text_counts_no_bytes_and_decodes_to_nothing(tokenizer: Tokenizer) -> None:
    sizes = tokenizer.token_bytes()
    assert sizes.dtype == np.int32 and sizes.shape == (tokenizer.vocab_size,)
    assert sizes[tokenizer.end_of_text_id] == 0
    ids = [*tokenizer.encode("ab").tolist(), tokenizer.end_of_text_id]
    assert tokenizer.decode(ids) == "ab"


def test_ids_beyond_the_tokenizer_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("ab").tolist(), tokenizer.vocab_size, tokenizer.vocab_size + 100]
    assert tokenizer.decode(ids) == "ab"


@given(ANY_TEXT)
def test_a_byte_level_bpe_counts_the_bytes_of_any_text(bpe_path: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(bpe_path))
    assert tokenizer is not None
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


@pytest.fixture
def with_added_tokens(bpe_path: Path, tmp_path: Path) -> Tokenizer:
    """Added tokens that are in the vocabulary: complete words, and the piece of a single byte."""
    library = tokenizers.Tokenizer.from_file(str(bpe_path))
    library.add_tokens(["世界", "née", " ", "\n\n", "ĠĠx", "ü", "é", "the", "Ġthe"])
    library.add_special_tokens(["<|spé|>"])
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize(
    "text",
    [
        *("aüb", "ü", "née, 世界!", "the end\n\nof the é", "ĠĠx", "<|spé|> spelled out"),
        *(UNSEEN, *TEXTS[:3]),
    ],
)
def test_added_tokens_decode_to_themselves(with_added_tokens: Tokenizer, text: str) -> None:
    ids = with_added_tokens.encode(text)
    assert with_added_tokens.decode(ids) == text
    assert with_added_tokens.token_bytes()[ids].sum() == len(text.encode())


def test_a_byte_that_is_also_an_added_token_is_still_a_byte(with_added_tokens: Tokenizer) -> None:
    text = "額 and é"  # the first begins with the byte that the vocabulary writes as é
    assert with_added_tokens.decode(with_added_tokens.encode(text)) == text
    lone = with_added_tokens.encode("é")
    assert with_added_tokens.decode(np.concatenate([lone, lone])) == "éé"


def test_special_tokens_decode_to_nothing(with_added_tokens: Tokenizer, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    special = library.get_vocab()["<|spé|>"]
    (text,) = with_added_tokens.encode("a")
    for ids in ([special, text, special], [text], [int(text)], np.array([text, special])):
        assert with_added_tokens.decode(ids) == "a"
    assert with_added_tokens.token_bytes()[special] == 0


@given(st.lists(st.integers(0, 299), max_size=12))
def test_any_ids_decode_as_in_the_library(bpe_path: Path, ids: list[int]) -> None:
    tokenizer = load_tokenizer(str(bpe_path))
    assert tokenizer is not None
    library = tokenizers.Tokenizer.from_file(str(bpe_path))
    assert tokenizer.decode(ids) == library.decode(ids)


def test_bytes_are_their_own_ids() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aü").tolist() == [97, 195, 188]
    assert tokenizer.vocab_size == 257 and tokenizer.end_of_text_id == 256
    assert tokenizer.decode([97, 195, 256]) == "a\ufffd"


def test_a_trained_bpe_has_merges_and_every_byte(bpe_path: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_path))
    assert tokenizer is not None
    assert tokenizer.vocab_size == 300 and tokenizer.end_of_text_id == 0
    assert len(tokenizer.encode("the cat")) < len("the cat")
    assert sorted(set(tokenizer.token_bytes()[:257].tolist())) == [0, 1]
    assert tokenizer.token_bytes()[257:].min() > 1


@pytest.mark.parametrize("vocab_size", [-1, 256, 2**31, 2**70])
def test_a_bpe_vocabulary_must_hold_all_bytes(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(DataError, match=f"vocab_size={vocab_size}: a byte-level BPE needs at leas"):
        train_bpe(TEXTS, vocab_size, tmp_path / "tokenizer.json")


def test_a_tokenizer_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(files.FileError, match=r"file: cannot be created"):
        train_bpe(TEXTS, 300, tmp_path / "file" / "tokenizer.json")


def test_an_error_in_the_text_stops_training(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield "one"
        raise DataError("a.txt: not UTF-8")

    with pytest.raises(DataError, match=r"a\.txt: not UTF-8"):
        train_bpe(texts(), 300, tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_path_may_have_any_case_and_start_at_the_home_folder(
    bpe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "BPE.JSON").write_bytes(bpe_path.read_bytes())
    home, given = load_tokenizer("~/BPE.JSON"), load_tokenizer(str(bpe_path))
    assert home and given and home.fingerprint == given.fingerprint
    with pytest.raises(files.FileError, match=r"data\.tokenizer=gs://bucket/tokenizer\.json: must"):
        load_tokenizer("gs://bucket/tokenizer.json")


def test_fingerprints_distinguish_tokenizers(bpe_path: Path, metaspace_path: Path) -> None:
    names = ["bytes", str(bpe_path), str(metaspace_path)]
    first, second = ([load_tokenizer(name) for name in names] for _ in range(2))
    prints = [tokenizer.fingerprint for tokenizer in first if tokenizer]
    assert prints == [tokenizer.fingerprint for tokenizer in second if tokenizer]
    assert len(set(prints)) == 3


def test_a_fingerprint_depends_on_content_and_end_of_text(
    bpe_path: Path, sentencepiece_path: Path, tmp_path: Path
) -> None:
    def fingerprint(path: Path, end_of_text_id: int) -> str:
        tokenizer = load_tokenizer(str(path), end_of_text_id)
        assert tokenizer is not None
        return tokenizer.fingerprint

    for path, own in ((bpe_path, 0), (sentencepiece_path, 2)):
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        assert fingerprint(path, -1) == fingerprint(copy, -1) == fingerprint(path, own)
        assert fingerprint(path, 7) != fingerprint(path, -1)


def test_end_of_text_can_be_configured(bpe_path: Path, sentencepiece_path: Path) -> None:
    for path in (bpe_path, sentencepiece_path):
        tokenizer = load_tokenizer(str(path), end_of_text_id=7)
        assert tokenizer is not None and tokenizer.end_of_text_id == 7
        with pytest.raises(DataError, match="end-of-text id 5000 is not among its"):
            load_tokenizer(str(path), end_of_text_id=5000)
    with pytest.raises(DataError, match="the byte tokenizer has its own, 256"):
        load_tokenizer("bytes", end_of_text_id=0)


def test_none_means_no_tokenizer() -> None:
    assert load_tokenizer("none") is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gpt2", None, "must be 'bytes', 'none' or a path that ends in .json"),
        ("gone.json", None, "gone.json.*cannot be read"),
        ("gone.model", None, "gone.model.*cannot be read"),
        ("bad.json", "{}", "bad.json: not a tokenizers file"),
        ("bad.model", "hello", "bad.model: not a SentencePiece model"),
    ],
)
def test_an_invalid_tokenizer_file_is_named(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(name if name == "gpt2" else str(tmp_path / name))


def test_a_tokenizer_without_end_of_text_asks_for_one(bpe_path: Path, tmp_path: Path) -> None:
    content = json.loads(bpe_path.read_text())
    content["added_tokens"] = []
    content["model"]["vocab"]["nothing"] = content["model"]["vocab"].pop("<|endoftext|>")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"set\s+data.end_of_text_id"):
        load_tokenizer(str(path))


def test_a_decoder_that_hides_its_bytes_is_rejected(bpe_path: Path, tmp_path: Path) -> None:
    content = json.loads(bpe_path.read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"'WordPiece'.*must be ByteLevel, Metaspace"):
        load_tokenizer(str(path))
