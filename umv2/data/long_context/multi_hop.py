"""Multi-hop reasoning: what lies in what, in shuffled order, and what is some steps further out."""

import itertools

from umv2.data.long_context.examples import Brief, Document, Question, names

_FEWEST_HOPS, _MOST_HOPS = 2, 4
_QUESTIONS = 0.4


def write(brief: Brief) -> Document:
    """Writes facts, each link of a chain one, and asks what is 2 to 4 steps from a thing.

    All chains are as long as the most hops, so that those not asked distract. Chance: a guess among
    the things that something lies in.
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
    place: dict[str, int] = {}
    for inner, outer in brief.sample(facts, len(facts)):
        place[inner] = document.add(f"{inner} in {outer}\n")
    possible = [
        (chain, start, hops)
        for chain in chains
        for hops in range(_FEWEST_HOPS, _MOST_HOPS + 1)
        for start in range(links + 1 - hops)
    ]
    used = len(facts) * (fact + extra)
    asked = max(1, (brief.length - used) // (question + extra))
    for chain, start, hops in brief.sample(possible, asked):
        evidence = min(place[thing] for thing in chain[start : start + hops])
        prompt = f"{chain[start]}+{hops}? "
        document.add(Question(prompt, chain[start + hops], evidence, 1 / len(facts)))
    return document
