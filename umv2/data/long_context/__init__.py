"""The open long-context suite: seven tasks, generated from a seed at any length.

Each module is one task: a function that writes a document, i.e. a context followed by questions
about it. Training also reads these documents as text, so this package does not depend on models;
`umv2.evaluation.long_context` scores a model's answers.
"""

from collections.abc import Mapping

from umv2.data.long_context import (
    in_context,
    key_value,
    memorize,
    multi_hop,
    multi_round,
    needle,
    reasoning,
    recall,
)
from umv2.data.long_context.examples import Example, Task, make_example

TASKS: Mapping[str, Task] = {
    "memorize": memorize.write,
    "multi_round": multi_round.write,
    "in_context": in_context.write,
    "needle": needle.write,
    "key_value": key_value.write,
    "multi_hop": multi_hop.write,
    "reasoning": reasoning.write,
}

__all__ = ["TASKS", "Example", "Task", "make_example", "recall"]
