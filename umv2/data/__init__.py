"""From text to batches: `sources` reads, `corpus` splits, `packing` packs, `loader` prefetches.

`prepare` tokenizes text that does not fit in memory into token shards.
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
