"""Hugging Face datasets, streamed once by `prepare`."""

from collections.abc import Iterator, Mapping
from typing import Any

from umv2.config import DataConfig
from umv2.config.data import SOURCE_RULES
from umv2.data.paths import DataError
from umv2.data.sources.entry import TextSource


def _documents(config: DataConfig) -> Iterator[str]:
    name, field = config.hugging_face_name, config.text_field
    for row, record in enumerate(_records(config)):
        text = record.get(field) if isinstance(record, Mapping) else None
        if not isinstance(text, str):
            keys = sorted(record) if isinstance(record, Mapping) else type(record).__name__
            raise DataError(
                f"data.hugging_face_name={name!r}: row {row}: no text in field"
                f" data.text_field={field!r}, only {keys}"
            )
        yield text


def _records(config: DataConfig) -> Iterator[Any]:
    """Yields the records that the library streams; converts its errors to DataError."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data.source='hugging_face' needs the optional extra: pip install -e '.[hugging_face]'"
        ) from error
    end = object()
    try:
        stream = iter(
            datasets.load_dataset(
                config.hugging_face_name,
                config.hugging_face_config or None,
                split=config.hugging_face_split,
                streaming=True,
            )
        )
    except Exception as error:  # errors of the library, the Hub and HTTP share no base class
        raise _library_error(config, error) from error
    while True:
        try:
            record = next(stream, end)
        except Exception as error:  # the network may fail at any row
            raise _library_error(config, error) from error
        if record is end:
            return
        yield record


def _library_error(config: DataConfig, error: Exception) -> DataError:
    dataset = f"data.hugging_face_name={config.hugging_face_name!r}"
    if config.hugging_face_config:
        dataset += f", hugging_face_config={config.hugging_face_config!r}"
    message = " ".join(str(error).split())
    return DataError(
        f"{dataset}, hugging_face_split={config.hugging_face_split!r}: cannot be read:"
        f" {type(error).__name__}: {message}"
    )


HUGGING_FACE = TextSource("hugging_face", documents=_documents, rule=SOURCE_RULES["hugging_face"])
