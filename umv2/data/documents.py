"""Token documents with random access: in memory, and views of other documents."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt64

from umv2.data.hashing import content_hashes


@runtime_checkable
class Documents(Protocol):
    """Token documents with random access; their tokens do not include end-of-text."""

    lengths: Int64[np.ndarray, "n"]
    content_hashes: UInt64[np.ndarray, "n"]

    def read(self, index: int, start: int, stop: int) -> Int32[np.ndarray, "tokens"]:
        """Returns tokens [start, stop) of one document."""

    def read_weights(self, index: int, start: int, stop: int) -> Float32[np.ndarray, "tokens"]:
        """Returns the loss weights of these tokens."""


class UnitWeights:
    """Mixin for documents whose tokens all have loss weight 1."""

    def read_weights(self, index: int, start: int, stop: int) -> Float32[np.ndarray, "tokens"]:
        """Returns the loss weights of these tokens: all 1."""
        del index
        return np.ones(stop - start, np.float32)


class InMemoryDocuments(UnitWeights):
    """Documents concatenated into one array."""

    def __init__(
        self,
        tokens: np.ndarray,
        lengths: Int64[np.ndarray, "n"],
        content_hashes: UInt64[np.ndarray, "n"],
        weights: Float32[np.ndarray, "tokens"] | None = None,
    ) -> None:
        """Initializes the documents.

        Args:
          tokens: of all documents, concatenated; of any integer type.
          lengths: of each document.
          content_hashes: of each document.
          weights: loss weight of each token; None: 1.
        """
        self.lengths = lengths
        self.content_hashes = content_hashes
        self._tokens, self._weights = tokens, weights
        self._starts = np.cumsum(lengths) - lengths

    def read(self, index: int, start: int, stop: int) -> Int32[np.ndarray, "tokens"]:
        """Returns tokens [start, stop) of one document."""
        first = self._starts[index]
        return self._tokens[first + start : first + stop].astype(np.int32)

    def read_weights(self, index: int, start: int, stop: int) -> Float32[np.ndarray, "tokens"]:
        """Returns the loss weights of these tokens: 1 unless weights were given."""
        if self._weights is None:
            return super().read_weights(index, start, stop)
        first = self._starts[index]
        return self._weights[first + start : first + stop]


class DocumentSubset:
    """Some of the documents of another sequence, in the given order."""

    def __init__(self, documents: Documents, indices: Int64[np.ndarray, "n"]) -> None:
        """Selects `documents[indices]` without reading them."""
        self.lengths = documents.lengths[indices]
        self.content_hashes = documents.content_hashes[indices]
        self._documents = documents
        self._indices = indices

    def read(self, index: int, start: int, stop: int) -> Int32[np.ndarray, "tokens"]:
        """Returns tokens [start, stop) of one document."""
        return self._documents.read(int(self._indices[index]), start, stop)

    def read_weights(self, index: int, start: int, stop: int) -> Float32[np.ndarray, "tokens"]:
        """Returns the loss weights of these tokens."""
        return self._documents.read_weights(int(self._indices[index]), start, stop)


class DocumentPieces:
    """Parts of the documents of another sequence."""

    def __init__(
        self,
        documents: Documents,
        indices: Int64[np.ndarray, "n"],
        starts: Int64[np.ndarray, "n"],
        stops: Int64[np.ndarray, "n"],
    ) -> None:
        """Piece i is tokens [starts[i], stops[i]) of document `indices[i]`; reads and hashes it."""
        self.lengths = stops - starts
        self._documents, self._indices, self._starts = documents, indices, starts
        self.content_hashes = content_hashes(
            self.read(i, 0, int(length)).astype("<u4").tobytes()
            for i, length in enumerate(self.lengths)
        )

    def read(self, index: int, start: int, stop: int) -> Int32[np.ndarray, "tokens"]:
        """Returns tokens [start, stop) of one piece."""
        first = int(self._starts[index])
        return self._documents.read(int(self._indices[index]), first + start, first + stop)

    def read_weights(self, index: int, start: int, stop: int) -> Float32[np.ndarray, "tokens"]:
        """Returns the loss weights of these tokens."""
        first = int(self._starts[index])
        return self._documents.read_weights(int(self._indices[index]), first + start, first + stop)
