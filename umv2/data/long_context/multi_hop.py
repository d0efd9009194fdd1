"""Multi-hop reasoning: shuffled facts "a in b", and what contains a thing after several hops."""

import itertools

from umv2.data.long_context.examples import Brief, Document, Question, names

_FEWEST_HOPS, _MOST_HOPS = 2, 4
_QUESTIONS = 0.4


def write(brief: Brief) -> Document:
    """Writes one fact per link of each chain, and asks what is 2 to 4 hops from a thing.

    All chains have the maximum number of hops; those that are not asked for are distractors.
    Chance: a guess among the things that contain another one.
    """
    document = Document()
    links = _MOST_HOPS
    fact, question = brief.size("a in b\n"), brief.size("a+2? ") + 2 * brief.size("b")
    budget = int(brief.length * (1 - _QUESTIONS))
    count = max(2, budget // (links * fact))
    labels = names(count * (links + 1))
    extra = 2 * (brief.size(labels[0]) - brief.size("a"))
    count = max(2, budget // (links * (fact + extra)))
    things = brief.sample(labels, count * (links + 1))
    chains = [things[i * (links + 1) : (i + 1) * (links + 1)] for i in range(count)]
    facts = [pair for chain in chains for pair in itertools.pairwise(chain)]
    fact_index: dict[str, int] = {}
    for inner, outer in brief.sample(facts, len(facts)):
        fact_index[inner] = document.add(f"{inner} in {outer}\n")
    possible = [
        (chain, start, hops)
        for chain in chains
        for hops in range(_FEWEST_HOPS, _MOST_HOPS + 1)
        for start in range(links + 1 - hops)
    ]
    used = len(facts) * (fact + extra)
    num_questions = max(1, (brief.length - used) // (question + extra))
    for chain, start, hops in brief.sample(possible, num_questions):
        evidence = min(fact_index[thing] for thing in chain[start : start + hops])
        prompt = f"{chain[start]}+{hops}? "
        document.add(Question(prompt, chain[start + hops], evidence, 1 / len(facts)))
    return document
