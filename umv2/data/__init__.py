"""Text to batches: sources, tokenizers, the pipeline, and preparation of token shards."""

from umv2.data.pipeline import Corpus, held_out_batches, load_corpus, train_batches
from umv2.data.prepare import prepare, train_tokenizer
from umv2.data.sources import DataError
from umv2.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Corpus",
    "DataError",
    "Tokenizer",
    "held_out_batches",
    "load_corpus",
    "load_tokenizer",
    "prepare",
    "train_batches",
    "train_tokenizer",
]
