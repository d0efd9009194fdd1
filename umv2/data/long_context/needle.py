"""Needle in a haystack: one out-of-place sentence in a long real text."""

from umv2.data.long_context.examples import Brief, Document, Question

_CODES = tuple(f"{number:02d}" for number in range(100))


def write(brief: Brief) -> Document:
    """Inserts a sentence with a two-digit code at a random depth, and asks for the code.

    Chance: a guess among the codes.
    """
    document = Document()
    code = brief.pick(_CODES)
    sentence, prompt = f"The magic number is {code}.\n", "Recall: the magic number is "
    rest = brief.length - sum(brief.size(text) for text in (sentence, prompt, code, "\n"))
    before = int(max(0, rest) * brief.rng.random())
    if before:
        document.add(brief.filler(before))
    evidence = document.add(sentence)
    if rest > before:
        document.add(brief.filler(rest - before))
    document.add(Question(prompt, code, evidence, 1 / len(_CODES)))
    return document
