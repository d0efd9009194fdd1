"""Key-value retrieval: lines of random pairs, then keys to look up ('Lost in the middle', MQAR)."""

from umv2.data.long_context.examples import SYMBOLS, Brief, Document, Question, names

_PAIRS = 0.5  # fraction of the length
_PRACTICE = 0.5  # questions per pair between the pairs, when practising


def write(brief: Brief) -> Document:
    """Writes pairs, then asks for some of the keys, each once.

    For practice, asks for some keys between the pairs too. Chance: a guess among the values of all
    pairs.
    """
    document = Document()
    line = brief.size("a:b\n")
    count = max(2, int(brief.length * _PAIRS) // line)
    keys = names(count)
    line += brief.size(keys[0]) - brief.size("a")
    count = max(2, int(brief.length * _PAIRS) // line)
    keys = brief.sample(keys, count)
    values = [brief.pick(SYMBOLS) for _ in keys]
    evidence: list[int] = []

    def ask(number: int) -> None:
        chance = values.count(values[number]) / count
        document.add(Question(f"{keys[number]}:", values[number], evidence[number], chance))

    num_questions = max(1, min(count, brief.length // line - count))
    for key, value in zip(keys, values, strict=True):
        evidence.append(document.add(f"{key}:{value}\n"))
        if brief.practice and num_questions > 1 and brief.rng.random() < _PRACTICE:
            ask(int(brief.rng.integers(len(evidence))))
            num_questions -= 1
    for number in brief.sample(range(count), num_questions):
        ask(number)
    return document
