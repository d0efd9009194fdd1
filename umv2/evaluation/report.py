"""Summary of a run: held-out metrics, general-purpose compressors to compare, and a loss curve."""

import bz2
import dataclasses
import gzip
import json
import lzma
import math
import sys
from pathlib import Path
from typing import Any

import jax
from absl import logging

from umv2 import files, pictures, tables
from umv2.data.corpus import Corpus
from umv2.training.held_out import HeldOut
from umv2.training.records import METRICS_FILE, parse_record


@dataclasses.dataclass(frozen=True)
class Report:
    """Held-out metrics of one checkpoint, and compressors in bits per byte on the same text."""

    step: int
    held_out: HeldOut
    compressors: dict[str, float]

    def metrics(self) -> dict[str, Any]:
        """Returns plain values for JSON; None replaces non-finite values, which JSON lacks."""
        held_out = files.json_value(self.held_out.metrics())
        return {"step": self.step, **held_out, "compressors": self.compressors}

    def table(self, width: int | None = None) -> str:
        """Returns the metrics as a text table.

        Args:
          width: maximum number of columns; None: the width of the terminal.
        """
        held_out = self.held_out
        rows = [
            ("  loss", _figure(held_out.loss_nats_per_token), "nats per token"),
            ("  perplexity", _figure(held_out.perplexity, digits=3), ""),
        ]
        if held_out.bits_per_byte is not None:
            rows.append(("  bits per byte", _figure(held_out.bits_per_byte), ""))
        rows += [(f"  {name}", _figure(bits), "") for name, bits in self.compressors.items()]
        heading = f"held-out after step {self.step:,}: {held_out.num_tokens:,} tokens"
        return f"{tables.paragraph(heading, width)}\n{tables.table(rows, width, left=(0, 2))}"


def _figure(value: float, digits: int = 4) -> str:
    """Formats a number; uses an exponent for large ones, as a diverged model produces."""
    return f"{value:.{digits}f}" if value < 1e6 else f"{value:.{digits}e}"


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Returns the bits per byte of general-purpose compressors at their strongest setting."""
    if not text:
        return {}
    sizes = {
        "gzip -9": len(gzip.compress(text, 9, mtime=0)),
        "bzip2 -9": len(bz2.compress(text, 9)),
        "xz -9": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def write(workdir: Path, step: int, held_out: HeldOut, corpus: Corpus) -> Report:
    """Compares a result with compressors; process 0 writes `evaluation.json` and `loss.png`.

    Raises:
      FileError: a file cannot be written; the result is logged then.
    """
    comparable = held_out.bits_per_byte is not None
    compressors = compressed_bits_per_byte(corpus.held_out_text()) if comparable else {}
    report = Report(step=step, held_out=held_out, compressors=compressors)
    if jax.process_index() != 0:
        return report
    metrics_file = workdir / METRICS_FILE
    try:
        text = json.dumps(report.metrics(), indent=2, allow_nan=False)
        files.write_text(workdir / "evaluation.json", text + "\n")
        if metrics_file.exists():
            plot_loss(metrics_file, workdir / "loss.png", compressors)
    except files.FileError:
        logging.error("%s", report.table())
        raise
    return report


def plot_loss(metrics_file: Path, image: Path, compressors: dict[str, float]) -> None:
    """Plots training loss (bits per token) and held-out loss (bits per byte, if known) over tokens.

    For byte-level tokens, the two units are the same.

    Raises:
      FileError: a file cannot be read or written.
    """
    records = read_records(metrics_file)
    figure = pictures.new(8.0, 5.0)
    axes = figure.subplots()
    names = ["training, bits per token"]
    tokens, losses = _curve(records, "loss")
    curves = axes.plot(tokens, [loss / math.log(2) for loss in losses], linewidth=0.8)
    tokens, bits = _curve(records, "held_out_bits_per_byte")
    if bits:
        curves += axes.plot(tokens, bits, marker="o", markersize=3)
        names.append(f"held-out, bits per byte ({bits[-1]:.3f})")
    for index, (name, size) in enumerate(compressors.items()):
        style = ("--", "-.", ":")[index % 3]
        curves.append(axes.axhline(size, linestyle=style, color=f"C{index + 2}"))
        names.append(f"{name} ({size:.3f})")
    title = pictures.literal(metrics_file.absolute().parent.name, 70)
    axes.set(xlabel="million tokens", ylabel="bits", title=title)
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    pictures.legend_below(figure, curves, names)
    pictures.save(figure, image)


def read_records(metrics_file: Path) -> list[dict[str, Any]]:
    """Returns the records of a run.

    Skips invalid lines, such as one left by a killed process, with a warning.

    Raises:
      FileError: the file cannot be read.
    """
    with files.errors(metrics_file, "cannot be read"):
        lines = metrics_file.read_bytes().splitlines()
    records = [record for line in lines if (record := parse_record(line)) is not None]
    if damaged := len(lines) - len(records):
        logging.warning("%s: %d of %d lines are not records", metrics_file, damaged, len(lines))
    return records


def _curve(records: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Returns millions of tokens and values of a metric, for records in which both are finite."""
    pairs = [(_finite(record.get("tokens")), _finite(record.get(name))) for record in records]
    points = [(x / 1e6, y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in points], [y for _, y in points]


def _finite(value: Any) -> float | None:
    # Also excludes integers beyond the range of a float.
    largest = sys.float_info.max
    return float(value) if isinstance(value, int | float) and -largest <= value <= largest else None
