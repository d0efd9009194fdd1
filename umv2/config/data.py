"""The configuration of data (`data`)."""

import dataclasses
from typing import Annotated, Literal

from umv2.config.schema import (
    Interval,
    Natural,
    Positive,
    Seed,
    require,
)

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
    """Documents of the long-context suite among those of the source (`data.long_context`)."""

    tasks: tuple[LongContextTask, ...]
    num_documents: Natural
    text_fraction: Annotated[float, Interval(0, 1, includes_high=False)]
    context_weight: Annotated[float, Interval(0, 1)]
    warm_up_steps: Natural
    seed: Seed


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes sequences (`data`)."""

    source: Literal[
        "standard_library", "site_packages", "text", "array_record", "memmap", "hugging_face"
    ]
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
        if self.source in ("text", "array_record", "memmap"):
            require(
                bool(self.paths), "data.paths", self.paths, f"source {self.source!r} needs globs"
            )
        if self.source == "hugging_face":
            require(
                bool(self.hugging_face_name),
                "data.hugging_face_name",
                self.hugging_face_name,
                "source 'hugging_face' needs the name of a data set",
            )
        tasks = self.long_context
        if tasks.num_documents:
            require(
                self.source in ("standard_library", "site_packages", "text"),
                "data.long_context.num_documents",
                tasks.num_documents,
                f"mixes documents with text, and source {self.source!r} holds none",
            )
            require(
                bool(tasks.tasks),
                "data.long_context.tasks",
                tasks.tasks,
                f"must name tasks, as num_documents = {tasks.num_documents}",
            )
            require(
                self.sequence_length >= 64,
                "data.sequence_length",
                self.sequence_length,
                "must be >= 64 for documents of data.long_context, which are not cut",
            )
        else:
            require(
                tasks.warm_up_steps == 0,
                "data.long_context.warm_up_steps",
                tasks.warm_up_steps,
                "warms up for the tasks, and there are none: num_documents = 0",
            )
        if self.tokenizer == "none":
            require(
                self.source in ("array_record", "memmap"),
                "data.tokenizer",
                self.tokenizer,
                "only token files (array_record, memmap) can do without a tokenizer",
            )
            require(
                self.end_of_text_id >= 0,
                "data.end_of_text_id",
                self.end_of_text_id,
                "must be given (>= 0) where there is no tokenizer",
            )
