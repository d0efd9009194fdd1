"""A run at a glance: held-out figures beside general compressors, and the loss curve."""

import bz2
import dataclasses
import gzip
import json
import lzma
import math
from pathlib import Path
from typing import Any

import jax

from umv2.data import pipeline
from umv2.evaluation.perplexity import HeldOut


@dataclasses.dataclass(frozen=True)
class Report:
    """Held-out figures of one checkpoint; compressors in bits per byte of the same text."""

    step: int
    held_out: HeldOut
    compressors: dict[str, float]

    def metrics(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {"step": self.step, **self.held_out.metrics(), "compressors": self.compressors}

    def table(self) -> str:
        """Returns the figures as lines of text."""
        held_out = self.held_out
        lines = [
            f"held-out after step {self.step:,}: {held_out.num_tokens:,} tokens",
            f"  loss           {held_out.loss_nats_per_token:8.4f} nats per token",
            f"  perplexity     {held_out.perplexity:8.3f}",
        ]
        if held_out.bits_per_byte is not None:
            lines.append(f"  bits per byte  {held_out.bits_per_byte:8.4f}")
        lines += [f"  {name:<13}  {bits:8.4f}" for name, bits in self.compressors.items()]
        return "\n".join(lines)


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Returns what general compressors at their strongest need for a text."""
    sizes = {
        "gzip -9": len(gzip.compress(text, 9, mtime=0)),
        "bzip2 -9": len(bz2.compress(text, 9)),
        "xz -9": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def write(workdir: Path, step: int, held_out: HeldOut, corpus: pipeline.Corpus) -> Report:
    """Compares a result with compressors; process 0 writes `evaluation.json` and `loss.png`."""
    comparable = held_out.bits_per_byte is not None
    compressors = compressed_bits_per_byte(corpus.held_out_text()) if comparable else {}
    report = Report(step=step, held_out=held_out, compressors=compressors)
    if jax.process_index() != 0:
        return report
    (workdir / "evaluation.json").write_text(json.dumps(report.metrics(), indent=2) + "\n")
    metrics_file = workdir / "metrics.jsonl"
    if metrics_file.exists():
        plot_loss(metrics_file, workdir / "loss.png", compressors)
    return report


def plot_loss(metrics_file: Path, image: Path, compressors: dict[str, float]) -> None:
    """Draws training and held-out loss over tokens, in bits per byte where known.

    Training loss is in bits per token; the two scales are one for byte-level tokens.
    """
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    training = [(r["tokens"], r["loss"]) for r in records if r.get("loss") is not None]
    held_out = [
        (r["tokens"], r["held_out_bits_per_byte"])
        for r in records
        if r.get("held_out_bits_per_byte") is not None
    ]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [tokens / 1e6 for tokens, _ in training],
        [loss / math.log(2) for _, loss in training],
        linewidth=0.8,
        label="training, bits per token",
    )
    if held_out:
        axes.plot(
            [tokens / 1e6 for tokens, _ in held_out],
            [bits for _, bits in held_out],
            marker="o",
            markersize=3,
            label=f"held-out, bits per byte ({held_out[-1][1]:.3f})",
        )
    for index, (name, bits) in enumerate(compressors.items()):
        axes.axhline(bits, linestyle="--", color=f"C{index + 2}", label=f"{name} ({bits:.3f})")
    axes.set(xlabel="million tokens", ylabel="bits", title=metrics_file.parent.name)
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=120)
