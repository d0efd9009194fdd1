"""The open long-context suite: seven tasks that are written from a seed, at any length.

Each module is one task, a function that writes a document: a context, then questions whose answers
stand in it. Training reads such documents as a source of text, so this package knows nothing of
models; `umv2.evaluation.long_context` asks the questions.
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
