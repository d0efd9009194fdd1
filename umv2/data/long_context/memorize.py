"""Memorizing: sentences that state facts about people, mixed with filler sentences."""

import itertools

from umv2.data.long_context.examples import Brief, Document, Question

# fmt: off
_NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo", "Mia",
    "Ned", "Ona", "Pat", "Quin", "Roy", "Sue", "Tom", "Uma", "Vic", "Wes", "Xan", "Yan", "Zoe",
    "Amos", "Bela", "Cora", "Dora", "Emil", "Fred", "Greta", "Hugo", "Ines", "Jana", "Karl",
    "Lena", "Max", "Nora", "Otto", "Paul", "Rosa", "Sven", "Tess", "Udo", "Vera", "Willa",
)
# fmt: on
_VALUES = {
    "color": ("red", "blue", "green", "black", "white", "pink", "gray", "gold"),
    "pet": ("cat", "dog", "fish", "bird", "goat", "frog", "horse", "snake"),
    "city": ("Rome", "Oslo", "Lima", "Bern", "Kyoto", "Cairo", "Paris", "Delhi"),
    "meal": ("soup", "rice", "pasta", "bread", "stew", "salad", "curry", "beans"),
}
_FILLER = (
    "It rained again.\n",
    "The street was quiet.\n",
    "Nobody said a word.\n",
    "A door closed somewhere.\n",
    "The clock struck ten.\n",
    "Leaves lay on the path.\n",
)
_FACTS, _QUESTIONS = 0.75, 0.35


def write(brief: Brief) -> Document:
    """Writes facts mixed with filler, then asks for some of the facts in random order.

    Each (name, attribute) pair occurs once; a long document appends numbers to the names to get
    enough pairs. Chance: a guess among the attribute's values.
    """
    document = Document()
    fact = brief.size("The color of Greta is green.\n")
    question = brief.size("The color of Greta is? ") + brief.size("green") + brief.size("\n")
    budget = int(brief.length * (1 - _QUESTIONS))
    num_facts = max(2, int(budget * _FACTS) // fact)
    rounds = -(-num_facts // (len(_NAMES) * len(_VALUES)))
    names = [name + ("" if i == 0 else str(i)) for i in range(rounds) for name in _NAMES]
    subjects = brief.sample(list(itertools.product(names, _VALUES)), num_facts)
    facts: list[tuple[str, str, str, int]] = []
    used = 0
    while subjects:
        states_fact = brief.rng.random() < _FACTS or not facts
        if states_fact:
            name, attribute = subjects.pop()
            value = brief.pick(_VALUES[attribute])
            text = f"The {attribute} of {name} is {value}.\n"
        else:
            text = brief.pick(_FILLER)
        if used + brief.size(text) > budget and facts:
            break
        index = document.add(text)
        used += brief.size(text)
        if states_fact:
            facts.append((name, attribute, value, index))
    num_questions = max(1, (brief.length - used) // question)
    for name, attribute, value, evidence in brief.sample(facts, num_questions):
        chance = 1 / len(_VALUES[attribute])
        prompt = f"The {attribute} of {name}? "
        if used + brief.size(prompt) + brief.size(value) + 1 > brief.length:
            break
        used += brief.size(prompt) + brief.size(value) + brief.size("\n")
        document.add(Question(prompt, value, evidence, chance))
    return document
