"""Key-value retrieval: JSON lines of random pairs, then keys to look up ('Lost in the middle')."""

from umv2.evaluation.long_context.examples import SYMBOLS, Brief, Document, Question, names

# Of the length, what questions take at most.
_QUESTIONS = 0.5


def write(brief: Brief) -> Document:
    """Writes pairs, and asks for each of some keys once.

    Chance: a guess among the values of all pairs.
    """
    document = Document()
    line, question = brief.size('{"a":"b"}\n'), brief.size('{"a":"') + brief.size("b") + 1
    count = max(2, int(brief.length * (1 - _QUESTIONS)) // line)
    keys = names(count)
    line += brief.size(keys[0]) - brief.size("a")
    question += brief.size(keys[0]) - brief.size("a")
    count = max(2, int(brief.length * (1 - _QUESTIONS)) // line)
    chosen = brief.sample(keys, count)
    values = [brief.pick(SYMBOLS) for _ in chosen]
    places = [
        document.add(f'{{"{key}":"{value}"}}\n') for key, value in zip(chosen, values, strict=True)
    ]
    asked = max(1, min(count, (brief.length - count * line) // question))
    for number in brief.sample(range(count), asked):
        chance = values.count(values[number]) / count
        document.add(Question(f'{{"{chosen[number]}":"', values[number], places[number], chance))
    return document
