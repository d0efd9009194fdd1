"""Associative recall at its barest: what a model practises before the tasks of the suite.

Pairs of symbols, then first symbols, each of whose partners is the answer and the next token. A
look-up needs one layer that takes every token's predecessor along and one that finds it again, and
neither is of use without the other: with much context a small model stays at guessing for longer
than it trains. In documents of a dozen tokens it learns both, and the tasks build on them.
"""

from umv2.data.long_context.examples import SYMBOLS, Brief, Document, Question

FEWEST_LINES = 4


def write(brief: Brief) -> Document:
    """Writes pairs, on half of the length, and asks for each at most once.

    Chance: a guess among the partners of all pairs.
    """
    document = Document()
    num_lines = max(FEWEST_LINES, brief.length // brief.size("ab\n"))
    keys = brief.sample(SYMBOLS, min(len(SYMBOLS), num_lines // 2))
    partners = [brief.pick(SYMBOLS) for _ in keys]
    pairs = list(zip(keys, partners, strict=True))
    places = [document.add(f"{key}{partner}\n") for key, partner in pairs]
    for number in brief.sample(range(len(pairs)), num_lines - len(pairs)):
        key, partner = pairs[number]
        chance = partners.count(partner) / len(partners)
        document.add(Question(key, partner, places[number], chance))
    return document
