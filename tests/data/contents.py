"""Contents of documents and batches, for comparisons."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from umv2.config import DataConfig
from umv2.data.corpus import Corpus
from umv2.data.documents import Documents
from umv2.data.loader import train_batches
from umv2.types import Batch

type MakeCorpus = Callable[[Sequence[Sequence[int]]], Corpus]


def take(corpus: Corpus, config: DataConfig, count: int, **kwargs: Any) -> list[Batch]:
    with_defaults: dict[str, Any] = {"batch_size": 4} | kwargs
    batches = train_batches(corpus, config, **with_defaults)
    batches_taken = list(itertools.islice(batches, count))
    batches.close()
    return batches_taken


def arrays(batch: Batch) -> list[np.ndarray]:
    return [np.asarray(getattr(batch, field.name)) for field in dataclasses.fields(batch)]


def assert_equal(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        for x, y in zip(arrays(a), arrays(b), strict=True):
            np.testing.assert_array_equal(x, y)


def contents(documents: Documents) -> list[list[int]]:
    return [documents.read(i, 0, int(n)).tolist() for i, n in enumerate(documents.lengths)]
