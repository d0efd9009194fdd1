"""Multi-round memorizing: a dialogue that states, updates, revokes and asks for facts."""

import string

from umv2.data.long_context.examples import Brief, Document, Question

_PEOPLE = string.ascii_uppercase
_PLACES = ("home", "work", "bank", "lake", "farm", "shop", "park", "gym")
_NOWHERE = "unknown"
_ASK, _REVOKE = 0.45, 0.1


def write(brief: Brief) -> Document:
    """Writes rounds in which a person goes to a place, leaves it, or is asked for.

    The answer is the person's current place; a person is asked for at most once per change. Chance:
    a guess among the places and 'unknown'.
    """
    document = Document()
    longest = max(brief.size(place) for place in _PLACES)
    step = brief.size("> A is at .\n") + longest
    people = brief.sample(_PEOPLE, max(2, min(len(_PEOPLE), brief.length // (4 * step))))
    place: dict[str, str] = {}
    evidence: dict[str, int] = {}
    changed: set[str] = set()  # people who moved since they were last asked for
    used = 0
    while used + brief.size("> A left.\n> where is A?\n< ") + longest < brief.length:
        draw = brief.rng.random()
        if changed and draw < _ASK:
            person = brief.pick(sorted(changed))
            changed.discard(person)
            prompt = f"> where is {person}?\n< "
            answer = place.get(person, _NOWHERE)
            document.add(Question(prompt, answer, evidence[person], 1 / (len(_PLACES) + 1)))
            used += brief.size(prompt) + brief.size(answer) + brief.size("\n")
            continue
        person = brief.pick(people)
        if person in place and draw > 1 - _REVOKE:
            del place[person]
            text = f"> {person} left.\n"
        else:
            place[person] = brief.pick([p for p in _PLACES if p != place.get(person)])
            text = f"> {person} is at {place[person]}.\n"
        evidence[person] = document.add(text)
        changed.add(person)
        used += brief.size(text)
    return document
