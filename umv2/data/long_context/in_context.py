"""In-context learning: demonstrations of a new random mapping from symbols to labels."""

import string

from umv2.data.long_context.examples import Brief, Document, Question

_SYMBOLS = string.ascii_lowercase
_LABELS = string.digits[:4]
_SHOTS = 3  # mean number of demonstrations per symbol
_QUESTIONS = 0.25


def write(brief: Brief) -> Document:
    """Writes (symbol, label) lines, then asks for the labels of some of these symbols.

    Each document has its own mapping. Chance: a guess among the labels.
    """
    document = Document()

    def ask(symbol: str) -> Question:
        return Question(f"{symbol} ", labels[symbol], evidence[symbol], 1 / len(_LABELS))

    line = brief.size("a ") + brief.size("0") + brief.size("\n")
    num_lines = max(4, brief.length // line)
    num_questions = min(max(1, int(num_lines * _QUESTIONS)), len(_SYMBOLS))
    shown = num_lines - num_questions
    symbols = brief.sample(_SYMBOLS, max(2, min(len(_SYMBOLS), shown // _SHOTS)))
    labels = {symbol: brief.pick(_LABELS) for symbol in symbols}
    evidence: dict[str, int] = {}
    for _ in range(shown):
        symbol = brief.pick(symbols)
        practice = brief.practice and symbol in evidence
        piece = ask(symbol) if practice else f"{symbol} {labels[symbol]}\n"
        evidence[symbol] = document.add(piece)
    for symbol in brief.sample(list(evidence), num_questions):
        document.add(ask(symbol))
    return document
