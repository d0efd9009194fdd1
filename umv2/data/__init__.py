"""Text to batches: sources, tokenizers, the pipeline; `umv2.data.prepare` makes token shards."""

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
