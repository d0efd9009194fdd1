"""The configuration of data (`data`)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from umv2.config.schema import Interval, Natural, Positive, Seed, require

# The modules of umv2/data/long_context.
LongContextTask = Literal[
    "memorize",
    "multi_round",
    "in_context",
    "needle",
    "key_value",
    "multi_hop",
    "reasoning",
]


@dataclasses.dataclass(frozen=True)
class LongContextDataConfig:
    """Long-context documents that are mixed into a text source (`data.long_context`)."""

    tasks: tuple[LongContextTask, ...]
    num_documents: Natural
    text_fraction: Annotated[float, Interval(0, 1, includes_high=False)]
    context_weight: Annotated[float, Interval(0, 1)]
    warm_up_steps: Natural
    seed: Seed


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data source, and how text becomes sequences (`data`)."""

    source: str  # a name in the registry of umv2/data/sources
    paths: tuple[str, ...]
    text_field: str
    memmap_dtype: Literal["uint16", "uint32"]
    hugging_face_name: str
    hugging_face_config: str
    hugging_face_split: str
    tokenizer: str
    end_of_text_id: int
    sequence_length: Annotated[int, Interval(2)]
    held_out_fraction: Annotated[float, Interval(0, 1, False, False)]
    long_context: LongContextDataConfig
    mask_across_documents: bool
    num_workers: Natural
    prefetch_batches: Positive
    seed: Seed

    def validate(self) -> None:
        """Raises ConfigError for impossible values."""
        # The rule of a source that is registered elsewhere is checked when the source is opened.
        if self.source in SOURCE_RULES:
            SOURCE_RULES[self.source].check(self)
        tasks = self.long_context
        if tasks.num_documents:
            require(
                bool(tasks.tasks),
                "data.long_context.tasks",
                tasks.tasks,
                f"must name tasks, since num_documents = {tasks.num_documents}",
            )
            require(
                self.sequence_length >= 64,
                "data.sequence_length",
                self.sequence_length,
                "must be >= 64 for documents of data.long_context, which are never split",
            )
        else:
            require(
                tasks.warm_up_steps == 0,
                "data.long_context.warm_up_steps",
                tasks.warm_up_steps,
                "must be 0 without long-context documents (num_documents = 0)",
            )
        if self.tokenizer == "none":
            require(
                self.end_of_text_id >= 0,
                "data.end_of_text_id",
                self.end_of_text_id,
                "must be given (>= 0) if there is no tokenizer",
            )


@dataclasses.dataclass(frozen=True)
class SourceRule:
    """The requirements of a data source on other fields.

    Attributes:
      holds: "text", which a run reads into memory, "stream", text that is read once by
        --mode=prepare, or "tokens".
      needs: fields that must not be empty, each with a description for error messages.
    """

    holds: Literal["text", "stream", "tokens"] = "text"
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def check(self, config: DataConfig) -> None:
        """Raises ConfigError for the first field that violates the rule."""
        for field, what in self.needs.items():
            value = getattr(config, field)
            require(bool(value), f"data.{field}", value, f"source {config.source!r} needs {what}")
        num_documents = config.long_context.num_documents
        require(
            self.holds == "text" or not num_documents,
            "data.long_context.num_documents",
            num_documents,
            f"needs a text source to mix documents into, which {config.source!r} is not",
        )
        require(
            self.holds == "tokens" or config.tokenizer != "none",
            "data.tokenizer",
            config.tokenizer,
            f"only token files ({', '.join(_TOKEN_SOURCES)}) need no tokenizer",
        )


_PATHS = {"paths": "globs"}
# Rules of the sources in umv2/data/sources, kept here so that validation does not import those.
SOURCE_RULES: Mapping[str, SourceRule] = {
    "standard_library": SourceRule("text"),
    "site_packages": SourceRule("text"),
    "text": SourceRule("text", _PATHS),
    "array_record": SourceRule("tokens", _PATHS),
    "memmap": SourceRule("tokens", _PATHS),
    "hugging_face": SourceRule("stream", {"hugging_face_name": "the name of a data set"}),
}
_TOKEN_SOURCES = [name for name, rule in SOURCE_RULES.items() if rule.holds == "tokens"]
