"""Associative recall in its simplest form: the warm-up before the tasks of the suite.

A document lists pairs of symbols, then repeats first symbols; the partner of each is the next token
and the answer. A look-up needs an induction head: one layer that copies the previous token to each
position, and one that attends to the match. Neither reduces the loss without the other, so with a
long context a small model does not get past guessing. In documents of a dozen tokens it learns
both, and the tasks build on them.
"""

from umv2.data.long_context.examples import SYMBOLS, Brief, Document, Question

FEWEST_LINES = 4


def write(brief: Brief) -> Document:
    """Fills half of the length with pairs, and asks for each pair at most once.

    Chance: a guess among the partners of all pairs.
    """
    document = Document()
    num_lines = max(FEWEST_LINES, brief.length // brief.size("ab\n"))
    keys = brief.sample(SYMBOLS, min(len(SYMBOLS), num_lines // 2))
    partners = [brief.pick(SYMBOLS) for _ in keys]
    pairs = list(zip(keys, partners, strict=True))
    evidence = [document.add(f"{key}{partner}\n") for key, partner in pairs]
    for number in brief.sample(range(len(pairs)), num_lines - len(pairs)):
        key, partner = pairs[number]
        chance = partners.count(partner) / len(partners)
        document.add(Question(key, partner, evidence[number], chance))
    return document
