"""Which documents, or which parts of them, are held out.

The hash of its content decides whether a document is held out. So a text stays on its side of the
split whatever the rest of the corpus, the tokenizer and the number of processes, and copies of it
stay together. If that leaves a side empty, as with a corpus of one document, the end of every
document is held out instead.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import logging
from jaxtyping import Bool, UInt64

from umv2.data.documents import DocumentPieces, Documents
from umv2.data.hashing import content_hashes
from umv2.data.paths import DataError


def is_held_out(
    content_hashes: UInt64[np.ndarray, "n"], held_out_fraction: float
) -> Bool[np.ndarray, "n"]:
    """Returns which documents are held out: those in the lowest fraction of the hash range."""
    return content_hashes < np.uint64(held_out_fraction * 2.0**64)


def split_texts(
    texts: list[bytes], hashes: UInt64[np.ndarray, "n"], held_out_fraction: float
) -> tuple[list[bytes], Bool[np.ndarray, "pieces"]]:
    """Returns the documents, or two parts of each, and which of them are held out.

    Args:
      texts: in UTF-8.
      hashes: content hash of each text.
      held_out_fraction: of the documents; of the bytes if the documents are cut.

    Raises:
      DataError: a side would be empty.
    """
    held_out = is_held_out(hashes, held_out_fraction)
    if not _has_one_side(held_out):
        return texts, held_out
    cuts = [_cut_position(text, held_out_fraction) for text in texts]
    _require_two_parts(cuts, [len(text) for text in texts], held_out_fraction)
    parts = [
        (part, is_tail)
        for text, cut in zip(texts, cuts, strict=True)
        for part, is_tail in ((text[:cut], False), (text[cut:], True))
        if part
    ]
    return [part for part, _ in parts], np.array([is_tail for _, is_tail in parts])


def split_tokens(
    documents: Documents, held_out_fraction: float
) -> tuple[Documents, Bool[np.ndarray, "pieces"]]:
    """Returns the documents, or two parts of each, and which of them are held out.

    Raises:
      DataError: a side would be empty.
    """
    held_out = is_held_out(documents.content_hashes, held_out_fraction)
    if not _has_one_side(held_out):
        return documents, held_out
    lengths = documents.lengths
    cuts = lengths - np.rint(lengths * held_out_fraction).astype(np.int64)
    _require_two_parts(cuts, lengths, held_out_fraction)
    starts = np.stack([np.zeros_like(cuts), cuts], axis=1).ravel()
    stops = np.stack([cuts, lengths], axis=1).ravel()
    (parts,) = np.nonzero(stops > starts)
    pieces = DocumentPieces(documents, parts // 2, starts[parts], stops[parts])
    return pieces, parts % 2 == 1


def training_texts(texts: Iterable[str], held_out_fraction: float) -> Iterator[str]:
    """Yields the training side of `split_texts` from a stream.

    Buffers texts only until both sides of the split have one.

    Raises:
      DataError: a side would be empty.
    """
    buffered: list[bytes] = []
    sides: set[bool] = set()
    for text in texts:
        content = text.encode()
        is_out = bool(is_held_out(content_hashes([content]), held_out_fraction)[0])
        if len(sides) == 2:
            if not is_out:
                yield text
            continue
        buffered.append(content)
        sides.add(is_out)
        if len(sides) == 2:
            yield from _training_side(buffered, held_out_fraction)
    if len(sides) == 1:
        yield from _training_side(buffered, held_out_fraction)


def _training_side(texts: list[bytes], held_out_fraction: float) -> Iterator[str]:
    parts, held_out = split_texts(texts, content_hashes(texts), held_out_fraction)
    return (part.decode() for part, is_out in zip(parts, held_out, strict=True) if not is_out)


def _has_one_side(held_out: Bool[np.ndarray, "n"]) -> bool:
    return bool(held_out.all() or not held_out.any())


def _require_two_parts(
    cuts: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray, held_out_fraction: float
) -> None:
    heads, total = int(np.sum(cuts)), int(np.sum(lengths))
    if not 0 < heads < total:
        raise DataError(
            f"data.held_out_fraction={held_out_fraction}: leaves {'all' if heads else 'none'} of"
            f" {len(lengths)} documents for training; neither side may be empty"
        )
    logging.info(
        "data.held_out_fraction=%g puts all %d documents on one side: the end of each is held out"
        " instead, %.2g %% in total",
        held_out_fraction,
        len(lengths),
        100 * (total - heads) / total,
    )


def _cut_position(text: bytes, held_out_fraction: float) -> int:
    """Returns where the held-out end of a text starts: at a line break if one is close enough."""
    size = round(len(text) * held_out_fraction)
    cut = len(text) - size
    line = text.rfind(b"\n", 0, cut) + 1
    if 0 < line and cut - line <= size // 4:
        return line
    while cut < len(text) and text[cut] & 0xC0 == 0x80:  # inside a character
        cut += 1
    return cut
