"""Tokenizer files of exported and imported models, in the format of Hugging Face transformers.

`tokenizer.json` encodes text to the same ids as our tokenizer, with one exception: transformers
parses the names of special tokens inside text as these tokens, and ours treats them as text.
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import tokenizers
from absl import logging
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers

from umv2 import files
from umv2.config import DataConfig
from umv2.data.paths import DataError
from umv2.data.tokenizers import (
    END_OF_TEXT,
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
# Not tokenizer.model: without a tokenizer.json, transformers would convert a file of that name
# itself, and its conversion encodes consecutive spaces differently.
SENTENCE_PIECE = "sentencepiece.model"
# Files that a folder may contain, in order of preference.
_CANDIDATES = (SENTENCE_PIECE, TOKENIZER, "tokenizer.model")
# No class has this name, so AutoTokenizer fails instead of guessing a tokenizer.
_NO_CLASS = "NoTokenizerWasExported"
_SPACE = "\u2581"  # how SentencePiece writes a space
# What conversions get wrong: spaces, line ends, composed, wide and unknown characters.
_PROBES = (
    "",
    " ",
    "  two  spaces  each  ",
    "a\nb\n\n  c\r\n\td \n",
    "def f(x):\n    return x**2  # no\n",
    "1234567890 3.14",
    "Grüße, déjà vu: e\u0301, Ⅷ, ﬁne, ½, ＡＢ１２",
    "日本語\u3000テキスト\u00a0x\u200by",
    "🙂👍 \x00\x7f",
    "x" * 50,
)
_NUM_PROBES, _PIECES = 500, 20  # number of random probes, and vocabulary pieces in each


def load_for_export(config: DataConfig, fingerprint: str = "") -> Tokenizer | None:
    """Returns a run's tokenizer; None, and logs why, if it cannot be exported with the model.

    Args:
      config: of the run.
      fingerprint: of the tokenizer that the run was trained with; "" if unknown.
    """
    try:
        tokenizer = load_tokenizer(config.tokenizer, config.end_of_text_id)
    except DataError as error:
        logging.warning("exporting no tokenizer: %s", error)
        return None
    if tokenizer is None:
        logging.info("exporting no tokenizer: data.tokenizer='none'")
    elif fingerprint and tokenizer.fingerprint != fingerprint:
        logging.warning(
            "exporting no tokenizer: data.tokenizer=%r has changed since the run was trained",
            config.tokenizer,
        )
        return None
    return tokenizer


def file_contents(tokenizer: Tokenizer | None, config: DataConfig) -> dict[str, bytes]:
    """Returns the content of the files, by name, that AutoTokenizer reads.

    If there is no tokenizer, or it cannot be converted exactly, they make AutoTokenizer fail.

    Args:
      tokenizer: of the run.
      config: gives the path of the tokenizer file.
    """
    contents: dict[str, bytes] = {}
    converted: tokenizers.Tokenizer | None = None
    if isinstance(tokenizer, ByteTokenizer):
        converted = _byte_tokenizer()
    elif isinstance(tokenizer, SentencePieceTokenizer):
        contents[SENTENCE_PIECE] = _read(config)
        converted = _converted(contents[SENTENCE_PIECE], tokenizer)
        if converted is None:
            logging.warning(
                "%s has no exact AutoTokenizer equivalent: exporting only the file itself, as %s",
                config.tokenizer,
                SENTENCE_PIECE,
            )
    elif tokenizer is not None:
        contents[TOKENIZER] = _without_extra_ids(_read(config))
        converted = tokenizers.Tokenizer.from_buffer(contents[TOKENIZER])
    if tokenizer is None or converted is None:
        return contents | {TOKENIZER_CONFIG: _json({"tokenizer_class": _NO_CLASS})}
    contents.setdefault(TOKENIZER, converted.to_str(pretty=True).encode())
    end_of_text = converted.id_to_token(tokenizer.end_of_text_id)
    contents[TOKENIZER_CONFIG] = _json(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end_of_text,
            "bos_token": end_of_text,  # in training, end-of-text precedes each document
            "model_max_length": config.sequence_length,
            "clean_up_tokenization_spaces": False,
        }
    )
    return contents


def adopt(
    config: DataConfig, folder: Path, end_of_text_id: Any, vocab_size: int
) -> tuple[DataConfig, Path | None]:
    """Returns the configuration with the tokenizer of a model's folder, and the tokenizer's file.

    The file is None if the configuration already names this tokenizer, or if the folder has no
    usable one, which is logged. `data.tokenizer="none"` is kept: token files need no tokenizer.

    Args:
      config: of the new run.
      folder: of the model.
      end_of_text_id: according to the folder; if it is not a valid id, the tokenizer's own is used.
      vocab_size: of the model.
    """
    if config.tokenizer == "none":
        return config, None
    path = next((folder / name for name in _CANDIDATES if (folder / name).is_file()), None)
    if path is None:
        logging.info("%s has no tokenizer; keeping data.tokenizer=%r", folder, config.tokenizer)
        return config, None
    if type(end_of_text_id) is not int or not 0 <= end_of_text_id < vocab_size:
        end_of_text_id = -1
    try:
        name = "bytes" if _is_byte_tokenizer(path) else str(path)
        tokenizer = load_tokenizer(name, end_of_text_id)
        assert tokenizer is not None
        if tokenizer.vocab_size > vocab_size:
            raise DataError(f"{path}: its {tokenizer.vocab_size} ids do not fit the model")
    except DataError as error:
        logging.warning("keeping data.tokenizer=%r: %s", config.tokenizer, error)
        return config, None
    if _fingerprint(config) == tokenizer.fingerprint:
        return config, None
    config = dataclasses.replace(config, tokenizer=name, end_of_text_id=end_of_text_id)
    return config, None if name == "bytes" else path


def _read(config: DataConfig) -> bytes:
    path = files.user_path(config.tokenizer, "data.tokenizer")
    with files.errors(path, "cannot be read"):
        return path.read_bytes()


def _fingerprint(config: DataConfig) -> str | None:
    try:
        tokenizer = load_tokenizer(config.tokenizer, config.end_of_text_id)
    except DataError:
        return None
    return tokenizer.fingerprint if tokenizer else None


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _byte_tokenizer() -> tokenizers.Tokenizer:
    """Returns `ByteTokenizer` as a BPE without merges, so that each byte is a token."""
    # GPT-2's byte alphabet: printable bytes map to themselves, the others to 256 and up.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable}
    vocabulary |= {chr(0x100 + i): byte for i, byte in enumerate(others)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, normalized=False)])
    return tokenizer


def _is_byte_tokenizer(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_bytes()) == json.loads(_byte_tokenizer().to_str()))
    except (OSError, ValueError, RecursionError):  # loading it reports the error
        return False


def _without_extra_ids(content: bytes) -> bytes:
    """Returns a `tokenizers` file without post-processor, padding and truncation.

    We train without them, whatever the file says. A file that has none of them is returned
    unchanged, which keeps its fingerprint.
    """
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    if not (
        tokenizer.num_special_tokens_to_add(False) or tokenizer.truncation or tokenizer.padding
    ):
        return content
    nothing = dict.fromkeys(("post_processor", "truncation", "padding"))
    return _json(json.loads(content) | nothing)


def _converted(content: bytes, original: SentencePieceTokenizer) -> tokenizers.Tokenizer | None:
    """Converts a SentencePiece model to `tokenizers`; None if the two differ on a probe."""
    schema: Any = sentencepiece_model_pb2  # its classes are created on import
    proto = schema.ModelProto.FromString(content)
    types, trainer, spec = type(proto.pieces[0]), proto.trainer_spec, proto.normalizer_spec
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == types.UNKNOWN)
    unknown_piece = proto.pieces[unknown].piece
    if trainer.model_type == trainer.UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        tokenizer = tokenizers.Tokenizer(models.Unigram(scores, unknown, trainer.byte_fallback))
    else:
        tokenizer = tokenizers.Tokenizer(
            models.BPE(
                {piece.piece: i for i, piece in enumerate(proto.pieces)},
                _merges(proto) if trainer.model_type == trainer.BPE else [],
                unk_token=unknown_piece,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )
        )
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    steps.append(normalizers.Replace(" ", _SPACE))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace(unknown_piece, trainer.unk_surface), decoders.Replace(_SPACE, " ")]
    if trainer.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    special = (types.CONTROL, types.UNKNOWN)
    for names, add in (
        ([p.piece for p in proto.pieces if p.type in special], tokenizer.add_special_tokens),
        ([p.piece for p in proto.pieces if p.type == types.USER_DEFINED], tokenizer.add_tokens),
    ):
        add([tokenizers.AddedToken(name, normalized=False) for name in names])
    # Probe with pieces that text can contain; the two tokenizers may differ on the others.
    not_text = (*special, types.BYTE)
    pieces = [p.piece.replace(_SPACE, " ") for p in proto.pieces if p.type not in not_text]
    rng = random.Random(0)
    random_probes = ["".join(rng.choices(pieces, k=_PIECES)) for _ in range(_NUM_PROBES)]
    for text in (*_PROBES, *random_probes):
        ids = original.encode(text).tolist()
        if tokenizer.encode(text, add_special_tokens=False).ids != ids:
            return None
        if tokenizer.decode(ids, skip_special_tokens=False) != original.decode(ids):
            return None
    return tokenizer


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Returns the merges that the scores of BPE pieces imply, in order of priority."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    return [
        (piece[:i], piece[i:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
