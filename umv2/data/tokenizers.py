"""Tokenizers with one interface: bytes, Hugging Face `tokenizers` files, SentencePiece models."""

import functools
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import sentencepiece
import tokenizers
from absl import logging
from jaxtyping import Int32, Integer
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from umv2 import files
from umv2.data.paths import DataError

END_OF_TEXT = "<|endoftext|>"
# Names of end-of-text in published tokenizer files; the first one that is present is used.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NUM_BYTES = 256

type Ids = Sequence[int | np.integer] | Integer[np.ndarray, "tokens"]


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    end_of_text_id: int
    # Hash of the content of its file (not of its path), and the end-of-text id if it is overridden.
    fingerprint: str

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        """Returns the ids of a text; never end-of-text, even if the text contains its name."""

    def decode(self, ids: Ids) -> str:
        """Returns the text of ids; drops end-of-text and replaces invalid UTF-8."""

    def token_bytes(self) -> Int32[np.ndarray, "vocab"]:
        """Returns the number of UTF-8 bytes of each id; 0 for control tokens."""


class ByteTokenizer:
    """The 256 bytes of UTF-8, and id 256 for end-of-text."""

    vocab_size = _NUM_BYTES + 1
    end_of_text_id = _NUM_BYTES
    fingerprint = "bytes"

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        """Returns the bytes of a text."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """Returns the text of bytes."""
        return bytes(int(i) for i in ids if 0 <= i < _NUM_BYTES).decode("utf-8", "replace")

    def token_bytes(self) -> Int32[np.ndarray, "vocab"]:
        """Returns 1 for every byte and 0 for end-of-text."""
        sizes = np.ones(self.vocab_size, np.int32)
        sizes[self.end_of_text_id] = 0
        return sizes


class HuggingFaceTokenizer:
    """A `tokenizers` JSON file with byte-level (GPT-2 style) or Metaspace pieces."""

    def __init__(self, path: str | Path, end_of_text_id: int) -> None:
        """Reads the file; an `end_of_text_id` of -1 selects the tokenizer's own.

        Raises:
          DataError: the file is unreadable, has no known end-of-text, or has a decoder that does
            not determine the bytes of a piece.
        """
        content = _read(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises no narrower type
            raise DataError(f"{path}: not a tokenizers file: {error}") from error
        # The name of a special token inside a document is ordinary text.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._decoders = _decoder_types(json.loads(content).get("decoder"))
        if not self._decoders & {"ByteLevel", "Metaspace", "ByteFallback"}:
            raise DataError(
                f"{path}: decoder {sorted(self._decoders)}: must be ByteLevel, Metaspace or"
                " ByteFallback, which determine the bytes of a token"
            )
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        known = (self._tokenizer.token_to_id(name) for name in _END_OF_TEXT_NAMES)
        own = next((i for i in known if i is not None), -1)
        self.end_of_text_id = _end_of_text(path, end_of_text_id, own, self.vocab_size)
        self.fingerprint = _fingerprint(content, self.end_of_text_id, own)
        # A byte-level decoder also decodes added tokens, which are plain text, as byte pieces.
        self._bytes = self._byte_pieces() if self._decoders <= {"ByteLevel", "Sequence"} else None

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        """Returns the ids of a text, without the tokens that the file's post-processor adds."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Ids) -> str:
        """Returns the text of ids."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.end_of_text_id]
        if self._bytes is None:
            return self._tokenizer.decode(known, skip_special_tokens=True)
        pieces = [self._bytes.get(i, _NOTHING) for i in known]
        starts = itertools.accumulate(len(piece.content) for piece in pieces[:-1])
        named = {
            start: piece.name
            for start, piece in zip(itertools.chain([0], starts), pieces, strict=False)
            if piece.name is not None
        }
        return _decode(b"".join(piece.content for piece in pieces), named)

    def token_bytes(self) -> Int32[np.ndarray, "vocab"]:
        """Returns the number of bytes of each piece; 0 for special tokens."""
        sizes = np.zeros(self.vocab_size, np.int32)
        if self._bytes is not None:
            for index, piece in self._bytes.items():
                sizes[index] = len(piece.content if piece.name is None else piece.name.encode())
        else:
            for spelling, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
                sizes[index] = _piece_bytes(spelling)
            for index, added in self._tokenizer.get_added_tokens_decoder().items():
                sizes[index] = 0 if added.special else len(added.content.encode("utf-8"))
        sizes[self.end_of_text_id] = 0
        return sizes

    def _byte_pieces(self) -> "dict[int, _BytePiece]":
        """Returns the bytes of each id; special tokens have none."""
        ordinary = {
            index: _BytePiece(_alphabet_bytes(piece))
            for piece, index in self._tokenizer.get_vocab(with_added_tokens=False).items()
        }
        pieces = dict(ordinary)
        for index, added in self._tokenizer.get_added_tokens_decoder().items():
            content = added.content.encode("utf-8")
            if added.special:
                pieces[index] = _NOTHING
            elif index not in ordinary:
                pieces[index] = _BytePiece(content)
            elif not _is_text(ordinary[index].content):
                pieces[index] = _BytePiece(ordinary[index].content, added.content)
        return pieces


class _BytePiece(NamedTuple):
    """The bytes of a piece, and the text of an added token with the same id.

    An added token may have the spelling of an existing piece, e.g. `ü`, which is the piece of byte
    0xFC in GPT-2's alphabet. The two then have one id: the bytes are decoded where they form valid
    UTF-8, and the added token is used otherwise.
    """

    content: bytes
    name: str | None = None


_NOTHING = _BytePiece(b"")


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _decode(content: bytes, named: Mapping[int, str]) -> str:
    """Decodes UTF-8; an invalid byte becomes the added token at its position, or else U+FFFD."""
    text = ""
    while content:
        try:
            return text + content.decode("utf-8")
        except UnicodeDecodeError as error:
            name = named.get(error.start)
            stop = error.end if name is None else error.start + 1
            text += content[: error.start].decode("utf-8") + (name or "\ufffd")
            content = content[stop:]
            named = {place - stop: name for place, name in named.items()}
    return text


@functools.cache
def _alphabet() -> dict[str, int]:
    """Returns GPT-2's byte alphabet: printable bytes map to themselves, others to 256 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(_NUM_BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(_NUM_BYTES + offset): byte for offset, byte in enumerate(others)
    }


def _alphabet_bytes(piece: str) -> bytes:
    alphabet = _alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode("utf-8")


class SentencePieceTokenizer:
    """A SentencePiece model.

    Bytes are counted in the pieces, so they can differ from the bytes of the text if the model
    normalises the text or prepends a space. The unknown piece counts as 0.
    """

    def __init__(self, path: str | Path, end_of_text_id: int) -> None:
        """Reads the model; an `end_of_text_id` of -1 selects its </s>.

        Raises:
          DataError: the file is unreadable or has no end-of-text.
        """
        content = _read(path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"{path}: not a SentencePiece model: {error}") from error
        self.vocab_size = self._processor.get_piece_size()
        own = self._processor.eos_id()
        self.end_of_text_id = _end_of_text(path, end_of_text_id, own, self.vocab_size)
        self.fingerprint = _fingerprint(content, self.end_of_text_id, own)

    def encode(self, text: str) -> Int32[np.ndarray, "tokens"]:
        """Returns the ids of a text, without BOS and EOS."""
        ids = self._processor.encode(text, out_type=int, add_bos=False, add_eos=False)
        return np.array(ids, np.int32)

    def decode(self, ids: Ids) -> str:
        """Returns the text of ids."""
        return self._processor.decode(
            [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.end_of_text_id]
        )

    def token_bytes(self) -> Int32[np.ndarray, "vocab"]:
        """Returns the number of bytes of each piece; 0 for control and unknown pieces."""
        processor = self._processor
        sizes = np.array(
            [
                0
                if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i)
                else _piece_bytes(processor.id_to_piece(i))
                for i in range(self.vocab_size)
            ],
            np.int32,
        )
        sizes[self.end_of_text_id] = 0
        return sizes


def load_tokenizer(name: str, end_of_text_id: int = -1) -> Tokenizer | None:
    """Returns the tokenizer that `data.tokenizer` names; None for "none".

    Args:
      name: "bytes", "none", or the path of a `tokenizers` .json or a SentencePiece .model file.
      end_of_text_id: the id that ends a document; -1 for the tokenizer's own.

    Raises:
      DataError: the name or the end-of-text id is invalid, or the file is unreadable.
      files.FileError: the path is a URL.
    """
    if name == "none":
        return None
    if name == "bytes":
        if end_of_text_id not in (-1, ByteTokenizer.end_of_text_id):
            raise DataError(
                f"data.end_of_text_id={end_of_text_id}: the byte tokenizer has its own,"
                f" {ByteTokenizer.end_of_text_id} (or -1)"
            )
        return ByteTokenizer()
    path = files.user_path(name, "data.tokenizer")
    match path.suffix.lower():
        case ".json":
            return HuggingFaceTokenizer(path, end_of_text_id)
        case ".model":
            return SentencePieceTokenizer(path, end_of_text_id)
        case _:
            raise DataError(
                f"data.tokenizer={name!r}: must be 'bytes', 'none' or a path that ends in .json"
                " (Hugging Face tokenizers) or .model (SentencePiece)"
            )


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> None:
    """Trains a byte-level BPE on texts, with a progress bar, and writes it as a `tokenizers` file.

    Id 0 is `<|endoftext|>` and ids 1 to 256 are the bytes, so every text can be encoded.

    Raises:
      DataError: the vocabulary is too small for these ids, or too large for int32 ids.
      files.FileError: the file cannot be written.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if not len(alphabet) < vocab_size < 2**31:
        raise DataError(
            f"vocab_size={vocab_size}: a byte-level BPE needs at least {len(alphabet) + 1}, the"
            f" bytes and {END_OF_TEXT}, and at most 2^31 - 1"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(alphabet),
        show_progress=False,  # its bars print empty lines without a terminal
    )
    num_bytes = 0

    def read() -> Iterator[str]:
        nonlocal num_bytes
        with tqdm(desc="reading text", unit="B", unit_scale=True, disable=None) as bar:
            for text in texts:
                size = len(text.encode("utf-8"))
                num_bytes += size
                bar.update(size)
                yield text
        logging.info("merging pairs of %s bytes of text", f"{num_bytes:,}")

    tokenizer.train_from_iterator(read(), trainer)
    files.write_text(Path(path), tokenizer.to_str(pretty=True))
    logging.info(
        "%s: a tokenizer of %d ids, for --config.data.tokenizer=%s --config.model.vocab_size=%d",
        path,
        tokenizer.get_vocab_size(),
        shlex.quote(str(path)),
        tokenizer.get_vocab_size(),
    )


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = files.reason(error)
        raise DataError(f"data.tokenizer={str(path)!r}: cannot be read: {reason}") from error


def _fingerprint(content: bytes, end_of_text_id: int, own: int) -> str:
    content_print = hashlib.blake2b(content, digest_size=16).hexdigest()
    return content_print if end_of_text_id == own else f"{content_print}-{end_of_text_id}"


def _end_of_text(path: str | Path, end_of_text_id: int, own: int, vocab_size: int) -> int:
    """Returns the given id, or for -1 the tokenizer's own."""
    if end_of_text_id < 0:
        end_of_text_id = own
    if not 0 <= end_of_text_id < vocab_size:
        raise DataError(
            f"{path}: end-of-text id {end_of_text_id} is not among its {vocab_size} ids; set"
            " data.end_of_text_id"
        )
    return end_of_text_id


def _decoder_types(decoder: dict | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_decoder_types, decoder.get("decoders", [])))


def _piece_bytes(piece: str) -> int:
    """Returns the UTF-8 bytes of a piece that writes a space as U+2581 and a byte as <0xFF>."""
    return 1 if _BYTE_PIECE.fullmatch(piece) else len(piece.replace("\u2581", " ").encode("utf-8"))
