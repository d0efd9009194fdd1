"""Load of the devices that own the rows of value tables, for skewed selections.

    python -m experiments.benchmarks.owner_load --owner_load_run=runs/tiny

Popular rows overload their owners, and groups beyond the capacity of a round take a further one.
The fixed shuffle of the rows spreads them. Loads are those of one device with 4,096 tokens: for
rows drawn by Zipf's law at the sizes of the paper's models, and, given a run, for the rows that its
newest checkpoint selects on held-out text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from configs import paper_1b_7b, paper_227m_1b2
from experiments import cli, measurements
from umv2.config.schema import UserError

_RUN = flags.DEFINE_string(
    "owner_load_run", None, "Folder of a run whose memory layers shuffle their rows."
)
_OUTPUT = flags.DEFINE_string(
    "owner_load_output", "experiments/results/owner_load.jsonl", "File to write results to."
)
_EXPONENTS = (0.0, 0.6, 0.8, 1.0, 1.2)
_MODELS = {"227m_1b2": (paper_227m_1b2, 8), "1b_7b": (paper_1b_7b, 64)}  # and number of owners
_NUM_TOKENS = 4096


def draw(probabilities: Any, num_tokens: int, top_m: int) -> Any:
    """Draws the rows of each token without replacement: an array [num_tokens, top_m]."""
    import numpy as np

    random = np.random.default_rng(0)
    cumulative = np.cumsum(probabilities)
    cumulative /= cumulative[-1]
    tokens = np.empty((num_tokens, top_m), np.int64)
    for token in tokens:
        drawn, num_drawn = np.empty(0, np.int64), 2 * top_m
        while len(drawn) < top_m:
            more = np.searchsorted(cumulative, random.random(num_drawn), side="right")
            drawn = np.concatenate([drawn, more])
            drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
            num_drawn *= 2
        token[:] = drawn[:top_m]
    return tokens


def group_load(rows: Any, num_rows: int, num_owners: int) -> tuple[float, int]:
    """Returns the groups of the fullest owner over the mean, and the number of rounds.

    Args:
      rows: array [t, k] of the rows that each token selects.
      num_rows: rows of the table, of which each owner has an equal number in succession.
      num_owners: devices that own rows.
    """
    import numpy as np

    from umv2.model.memory.exchange import groups

    sizes = groups(*rows.shape, 1, num_owners)
    owners = rows // (num_rows // num_owners)
    counts = np.stack([np.sum(owners == owner, axis=1) for owner in range(num_owners)])
    sent = np.sum(-(-counts // sizes.size), axis=1)
    rest = max(0, int(sent.max()) - sizes.capacity)
    return float(sent.max() / sent.mean()), 1 + -(-rest // sizes.later)


def effective_rows(hits: Any) -> float:
    """Returns (sum h)^2 / (N sum h^2): the fraction of rows, if those in use were equally so."""
    hits = hits.astype(float)
    return float(hits.sum() ** 2 / (hits**2).sum() / len(hits))


def zipf_records() -> Iterator[dict[str, Any]]:
    """Yields the load if row i is drawn with probability proportional to i^-exponent."""
    import numpy as np

    for name, (module, num_owners) in _MODELS.items():
        memory = module.get_config().model.memory
        num_rows = memory.num_keys**2
        shuffle = np.random.default_rng(1).permutation(num_rows)
        for exponent in _EXPONENTS:
            probabilities = np.arange(1.0, num_rows + 1) ** -exponent
            rows = draw(probabilities, _NUM_TOKENS, memory.top_m)
            hits = np.bincount(rows.reshape(-1), minlength=num_rows)
            load, rounds = group_load(shuffle[rows], num_rows, num_owners)
            ordered, ordered_rounds = group_load(rows, num_rows, num_owners)
            yield {
                "case": f"{name}, Zipf {exponent}",
                "owners": num_owners,
                "effective_rows": effective_rows(hits),
                "most_popular_row": float(hits.max() / _NUM_TOKENS),
                "load": load,
                "rounds": rounds,
                "load_without_shuffle": ordered,
                "rounds_without_shuffle": ordered_rounds,
            }


def run_records(workdir: Path) -> Iterator[dict[str, Any]]:
    """Yields the load of each memory layer, in selections instead of groups.

    Raises:
      CheckpointError: the run has no valid checkpoint.
      UserError: its memory layers do not shuffle their rows.
    """
    hits, shuffles = _hits(workdir)
    for layer, (of_row, shuffle) in enumerate(zip(hits, shuffles, strict=True), start=1):
        of_address = of_row[shuffle % len(of_row)]
        for num_owners in (8, 64):
            yield {
                "case": f"{workdir.name}, memory layer {layer}",
                "owners": num_owners,
                "effective_rows": effective_rows(of_row),
                "most_popular_row": float(of_row.max() / _NUM_TOKENS),
                "load": _load(of_row, num_owners),
                "load_without_shuffle": _load(of_address, num_owners),
            }


def _load(hits: Any, num_owners: int) -> float:
    """Returns the hits of the fullest of equal parts over their mean."""
    owned = hits.reshape(num_owners, -1).sum(axis=1)
    return float(owned.max() / owned.mean())


def _hits(workdir: Path) -> tuple[Any, Any]:
    """Returns the hits of each layer's rows on held-out text, and its shuffle."""
    import jax
    import numpy as np

    from umv2 import sharding
    from umv2.config import files as config_files
    from umv2.cost import exchange
    from umv2.data import tokenizer_copy
    from umv2.data.corpus import open_corpus
    from umv2.data.loader import held_out_batches
    from umv2.model.slots import Observe
    from umv2.training import checkpoint

    config = config_files.of_run(checkpoint.saved_config(workdir / "checkpoints"), {})
    if not (config.model.placements and config.model.memory.shuffle):
        raise UserError(f"--owner_load_run={workdir}: it must have layers with memory.shuffle=True")
    data = tokenizer_copy.resolve(config.data, workdir)
    batch_size = _NUM_TOKENS // data.sequence_length
    mesh = sharding.create_mesh(config.mesh, batch_size)
    config = exchange.resolve_mesh(config, mesh.shape, _NUM_TOKENS)
    corpus = open_corpus(data, config.model.vocab_size, purpose="evaluate")
    batch = next(held_out_batches(corpus, data, batch_size=batch_size))
    with jax.set_mesh(mesh):
        weights = checkpoint.restore_for_inference(workdir / "checkpoints", config).weights

        @jax.jit
        def hits(weights: Any, tokens: Any) -> Any:
            model = weights.model(config.model)
            stats = model(tokens, store=weights.store, observe=Observe(health=True)).stats
            return stats.memory.hits

        counted = hits(weights, sharding.local_to_global(mesh, batch).inputs)
    (shuffle,) = (x for name, x in weights.named().items() if name.endswith("/shuffle"))
    return np.asarray(counted), np.asarray(shuffle)


def table(records: list[dict[str, Any]]) -> str:
    """Returns the records as a Markdown table."""
    lines = [
        "| selections | owners | effective rows | load | rounds | load, rounds without shuffle |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        unshuffled = f"{record['load_without_shuffle']:.2f}"
        if "rounds" in record:
            unshuffled += f", {record['rounds_without_shuffle']}"
        lines.append(
            f"| {record['case']} | {record['owners']} | {100 * record['effective_rows']:.1f} %"
            f" | {record['load']:.2f} | {record.get('rounds', '')} | {unshuffled} |"
        )
    return "\n".join(lines)


def main(_: list[str]) -> None:
    """Measures, stores and prints the loads."""
    path = Path(_OUTPUT.value)
    measurements.require_writable(path)
    records = list(zipf_records())
    if _RUN.value is not None:
        records += run_records(Path(_RUN.value))
    measurements.write(path, [measurements.about() | record for record in records])
    print(table(records))


if __name__ == "__main__":
    cli.run(main)
