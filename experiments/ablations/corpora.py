"""Corpora of the ablations, made on demand.

Multi-hop documents state facts, `ab` for 'a is in b', in shuffled order, then ask questions: `a2c`
says that c is two steps up from a. The facts of a document form two chains, so that answering a
question takes as many facts as it has hops, and the order of the facts gives nothing away.
"""

import hashlib
import itertools
import json
import random
import re
import string
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.ablations import scales
from umv2 import files
from umv2.config.schema import ConfigError, nearest_name

_SOURCES = ("standard_library", "site_packages")
_NUM_DOCUMENTS = 200_000
_NUM_CHAINS, _MAX_HOPS, _NUM_QUESTIONS = 2, 4, 8
# Accuracy of a guess among the places that the facts name.
CHANCE = 1 / (_NUM_CHAINS * _MAX_HOPS)
_QUESTION = re.compile(r"([a-z])([1-9])([a-z])")


def parse(corpus: str, flag: str) -> str:
    """Returns the corpus given by a flag, as an argument of `use`.

    Raises:
      ConfigError: neither a known corpus nor a glob that matches a text file.
      FileError: not a path of this machine.
    """
    from umv2.data import paths

    if corpus in _SOURCES:
        return corpus
    globs = [str(files.user_path(glob, flag)) for glob in corpus.split(",")]
    for glob in globs:
        try:
            paths.matching_files([glob])
        except paths.DataError as error:
            nearest = nearest_name(glob, _SOURCES)
            raise ConfigError(f"{flag}={corpus}: no text file matches {glob}{nearest}") from error
    return ",".join(globs)


def use(values: ConfigDict, corpus: str, vocab_size: int) -> str:
    """Makes a configuration train on another corpus, and returns the name of that corpus.

    A configuration of the multi-hop task keeps its text.

    Args:
      values: changed in place.
      corpus: standard_library, site_packages, or globs of text files, separated by commas.
      vocab_size: of the byte-pair encoding trained on the corpus.
    """
    is_source = corpus in _SOURCES
    label = corpus if is_source else f"text_{hashlib.sha256(corpus.encode()).hexdigest()[:8]}"
    name = f"{label}_bpe_{vocab_size}"
    if scales.MULTI_HOP_TEXT not in values.data.paths:
        values.data.source = corpus if is_source else "text"
        values.data.paths = () if is_source else tuple(corpus.split(","))
        values.data.tokenizer = f"{scales.CORPORA}/{name}.json"
        values.model.vocab_size = 8 * -(-vocab_size // 8)
    return name


def prepare(values: ConfigDict) -> None:
    """Makes the multi-hop text and the tokenizer of a configuration if they do not exist yet."""
    from umv2.config import from_config_dict
    from umv2.data import prepare as data_preparation

    if scales.MULTI_HOP_TEXT in values.data.paths:
        _make(scales.MULTI_HOP_TEXT, _write_multi_hop)
    ours = re.fullmatch(rf"{scales.CORPORA}/\w+_bpe_(\d+)\.json", values.data.tokenizer)
    if ours:
        config = from_config_dict(values).data
        vocab_size = int(ours[1])
        _make(
            values.data.tokenizer,
            lambda path: data_preparation.train_tokenizer(config, path, vocab_size),
        )


def _make(name: str, write: Callable[[Path], None]) -> None:
    """Makes a missing file; safe if several processes of a sweep do so at the same time."""
    path = Path(name)
    if path.exists():
        return
    print(f"making {path}", flush=True)
    with files.replacing(path) as unfinished:
        write(unfinished)


def _write_multi_hop(path: Path) -> None:
    with path.open("w") as file:
        for text in multi_hop_documents(_NUM_DOCUMENTS):
            file.write(json.dumps({"text": text}) + "\n")


def multi_hop_documents(count: int, seed: int = 0) -> Iterator[str]:
    """Yields documents such as 'ab qr bc rs ...; q1r a2c ...', a function of the seed."""
    generator = random.Random(seed)
    length = _MAX_HOPS + 1
    for _ in range(count):
        places = generator.sample(string.ascii_lowercase, _NUM_CHAINS * length)
        chains = [places[i * length : (i + 1) * length] for i in range(_NUM_CHAINS)]
        facts = [low + high for chain in chains for low, high in itertools.pairwise(chain)]
        generator.shuffle(facts)
        questions = []
        for _ in range(_NUM_QUESTIONS):
            chain, hops = generator.choice(chains), generator.randint(1, _MAX_HOPS)
            start = generator.randrange(length - hops)
            questions.append(f"{chain[start]}{hops}{chain[start + hops]}")
        yield f"{' '.join(facts)}; {' '.join(questions)}"


def questions(text: str) -> Iterator[tuple[int, int]]:
    """Yields the position of each answer byte in a document, and its number of hops."""
    for match in _QUESTION.finditer(text, text.index(";")):
        yield match.start(3), int(match[2])


def answers(workdir: Path) -> dict[str, Any]:
    """Evaluates the latest checkpoint of a run on every held-out question.

    An answer is correct if it is the argmax given the facts and the previous questions with their
    answers.

    Returns:
      accuracy over all questions (None if there are none); by_hops, the accuracy for each number of
      hops; num_questions.
    """
    import jax
    import numpy as np

    from umv2.config import from_config_dict
    from umv2.data.corpus import open_corpus
    from umv2.training import checkpoint

    folder = workdir / "checkpoints"
    config = from_config_dict(checkpoint.saved_config(folder))
    restored = checkpoint.restore_for_inference(folder, config)
    weights = restored.weights
    model = weights.model(config.model)
    corpus = open_corpus(config.data, config.model.vocab_size)
    texts = [text.decode() for text in corpus.held_out_texts or ()]

    @jax.jit
    def greedy(tokens: Any) -> Any:
        return model(tokens, store=weights.store, segment_ids=None).logits.argmax(axis=-1)

    correct: dict[int, int] = defaultdict(int)
    total: dict[int, int] = defaultdict(int)
    batch, length = config.evaluation.batch_size, config.data.sequence_length
    for first in range(0, len(texts), batch):
        group = texts[first : first + batch]
        tokens = np.full((batch, length), corpus.end_of_text_id, np.int32)
        for row, text in enumerate(group):
            tokens[row, 1 : 1 + len(text)] = np.frombuffer(text.encode(), np.uint8)
        # A position predicts the next token; rows are shifted by one, as end-of-text comes first.
        predicted = np.asarray(greedy(tokens))
        for row, text in enumerate(group):
            for position, hops in questions(text):
                total[hops] += 1
                correct[hops] += int(predicted[row, position] == ord(text[position]))
    return {
        "accuracy": sum(correct.values()) / sum(total.values()) if total else None,
        "by_hops": {str(hops): correct[hops] / total[hops] for hops in sorted(total)},
        "num_questions": sum(total.values()),
    }


def fingerprint(config: Any) -> dict[str, Any]:
    """Returns sizes and a hash of a corpus: installed sources differ between machines."""
    import numpy as np

    from umv2.data.corpus import open_corpus
    from umv2.data.hashing import content_hash

    corpus = open_corpus(config.data, config.model.vocab_size)
    sides = (corpus.train, corpus.held_out)
    hashes = np.concatenate([side.content_hashes for side in sides])
    return {
        "source": config.data.source,
        "train_tokens": int(corpus.train.lengths.sum()),
        "held_out_tokens": int(corpus.held_out.lengths.sum()),
        "held_out_bytes": corpus.held_out_bytes,
        "hash": f"{content_hash(hashes.tobytes()):016x}",
    }
