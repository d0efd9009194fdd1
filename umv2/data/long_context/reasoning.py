"""Reasoning: a program in which every line changes a variable, and the final values."""

from umv2.data.long_context.examples import Brief, Document, Question

_VARIABLES = "abcd"
_MODULUS = 10


def write(brief: Brief) -> Document:
    """Writes additions modulo 10, and asks for the final value of every variable.

    A value depends on all lines that change the variable and on the values that they add. Chance: a
    guess among the digits.
    """
    document = Document()
    line = max(brief.size("a+=b\n"), brief.size("a+=3\n"))
    question = brief.size("a? ") + brief.size("3") + brief.size("\n")
    steps = max(0, (brief.length - len(_VARIABLES) * (line + question)) // line)
    values: dict[str, int] = {}
    first: dict[str, int] = {}
    for variable in _VARIABLES:
        values[variable] = int(brief.rng.integers(_MODULUS))
        first[variable] = document.add(f"{variable}={values[variable]}\n")
    for _ in range(steps):
        variable = brief.pick(_VARIABLES)
        if brief.rng.random() < 0.5:
            added = int(brief.rng.integers(1, _MODULUS))
            text = str(added)
        else:
            text = brief.pick([other for other in _VARIABLES if other != variable])
            added = values[text]
        values[variable] = (values[variable] + added) % _MODULUS
        document.add(f"{variable}+={text}\n")
    for variable in brief.sample(_VARIABLES, len(_VARIABLES)):
        answer = str(values[variable])
        document.add(Question(f"{variable}? ", answer, first[variable], 1 / _MODULUS))
    return document
