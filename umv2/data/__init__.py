"""Text to batches: `sources` read, `corpus` splits, `packing` fills rows, `loader` prefetches.

`prepare` makes token shards of text that is too large for memory.
"""

from umv2.data.corpus import Corpus, load_corpus
from umv2.data.loader import held_out_batches, train_batches
from umv2.data.paths import DataError
from umv2.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Corpus",
    "DataError",
    "Tokenizer",
    "held_out_batches",
    "load_corpus",
    "load_tokenizer",
    "train_batches",
]
