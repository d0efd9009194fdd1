"""Latency and memory traffic of a decode step, families side by side.

    python -m experiments.benchmarks.latency --size=227m_1b2 --batches=1,8,32,64 --contexts=2048
    python -m experiments.benchmarks.latency_report

Models are full size with random weights, and share one key-value cache. Families take turns in one
process; each round also times a plain pass over memory, which measures the available bandwidth. A
family may name its data type, as in moe:float32; hugging_face is OLMoE in PyTorch (torch,
transformers) with the sizes of moe.
"""

import functools
import importlib
import time
import zlib
from collections.abc import Callable
from typing import Any

from absl import flags

from configs import families
from experiments import cli, measurements
from umv2.config.schema import ConfigError

_SIZE = flags.DEFINE_enum("size", "227m_1b2", ["227m_1b2", "1b_7b"], "Size in configs/paper_*.py.")
_FAMILIES = flags.DEFINE_list(
    "families",
    ["ultramem_v2", "moe", "moe_2_of_16", "dense", "memory_plus"],
    "Families, each with ':float32' or ':bfloat16' (the default), or hugging_face.",
)
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "32", "64"], "Batch sizes.")
_CONTEXTS = flags.DEFINE_list("contexts", ["2048"], "Positions in the cache before the step.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed turns of each family.", 1)
_STEPS = flags.DEFINE_integer("steps", 4, "Decode steps per turn.", 1)
_PREFILL = flags.DEFINE_integer("prefill", 0, "Length of a prompt to time prefill on; 0: none.", 0)
_RESULTS = flags.DEFINE_string(
    "latency_output", "experiments/results/latency/latency.jsonl", "File to append results to."
)
_BLOCK = 1 << 20  # random numbers, repeated to fill an array
_READ_BYTES = 1 << 29


class Family:
    """One of our families with random weights, ready to decode."""

    def __init__(self, label: str, config: Any):
        import jax

        from umv2.inference import serving
        from umv2.inference.sampling import Sampling
        from umv2.model import weights

        self.label, self.config = label, config
        abstract = jax.eval_shape(
            functools.partial(serving.serve, self.config), weights.abstract(self.config)
        )
        self.served = jax.tree_util.tree_map_with_path(random_array, abstract)
        self.sampling = Sampling(0.0, 0, 1.0, self.config.vocab_size)

    def empty_cache(self, batch: int, length: int) -> Any:
        """Returns a cache, which families with the same attention can share."""
        import jax

        cache = jax.eval_shape(lambda: self.served.parts()[0].empty_cache(batch, length))
        return jax.tree_util.tree_map_with_path(random_array, cache)

    def compile(self, cache: Any, batch: int) -> tuple[Callable[..., Any], dict[str, int]]:
        """Returns the step (cache, tokens, positions) -> the same, and the memory it needs."""
        import jax
        import jax.numpy as jnp

        from umv2.inference import decode

        vector = jax.ShapeDtypeStruct((batch,), jnp.int32)
        keys = jax.random.split(jax.random.key(0), batch)
        arguments = (self.served, cache, vector, vector, keys)
        program = decode.decode.lower(*arguments, sampling=self.sampling).compile()
        memory = program.memory_analysis()
        assert memory is not None
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        needed += memory.output_size_in_bytes - memory.alias_size_in_bytes

        def step(cache: Any, tokens: Any, positions: Any) -> Any:
            tokens, positions, cache = program(self.served, cache, tokens, positions, keys)
            return cache, tokens, positions

        return step, {"needed": needed, "temporary": memory.temp_size_in_bytes}

    def prefill(self, length: int) -> Callable[[], Any]:
        """Returns the compiled prefill of one prompt."""
        import jax.numpy as jnp

        from umv2.inference import decode

        tokens = jnp.arange(length, dtype=jnp.int32)[None] % self.config.vocab_size
        program = decode.prefill.lower(self.served, tokens, length=length).compile()
        return functools.partial(program, self.served, tokens)


def random_array(path: Any, leaf: Any) -> Any:
    """Returns small random numbers; ones for norm weights, a permutation for addresses."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return jnp.asarray(rng.permutation(leaf.size).astype(leaf.dtype).reshape(leaf.shape))
    if leaf.ndim == 1:
        return jnp.ones(leaf.shape, leaf.dtype)
    block = rng.standard_normal(min(_BLOCK, leaf.size), np.float32) * leaf.shape[-1] ** -0.5
    numbers = np.asarray(jnp.asarray(block, leaf.dtype))
    return jnp.asarray(np.resize(numbers, leaf.shape))


def model_config(label: str, size: str) -> Any:
    """Returns the model configuration of an entry of --families.

    Raises:
      ConfigError: unknown family or data type.
    """
    from umv2.config import from_config_dict

    name, _, dtype = label.partition(":")
    module = importlib.import_module(f"configs.paper_{size}")
    cli.require(f"--families={label}", name, [families.REFERENCE, *module.SIZES, "hugging_face"])
    values = module.get_config("moe" if name == "hugging_face" else name)
    values.model.compute_dtype = dtype or "bfloat16"
    values.model.remat = "none"
    return from_config_dict(values).model


class HuggingFaceOlmoe:
    """transformers' OLMoE, in PyTorch, with the sizes of our moe."""

    def __init__(self, model: Any):
        import torch
        import transformers

        self.label, self.config = "hugging_face", model
        config = transformers.OlmoeConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.moe.expert_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_key_value_heads,
            num_experts=model.moe.num_experts,
            num_experts_per_tok=model.moe.top_k,
            tie_word_embeddings=model.tie_embeddings,
            pad_token_id=None,
        )
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        self.model = transformers.OlmoeForCausalLM(config).eval()
        torch.set_default_dtype(previous)

    def decode_timer(self, context: int, batch: int, steps: int) -> Callable[[], float]:
        """Returns a function that decodes `steps` tokens after `context`; it returns s/step."""
        import torch
        import transformers

        length = context + steps
        cache = transformers.StaticCache(config=self.model.config, max_cache_len=length)
        # Distinct tokens, as for our families: equal rows would all route to the same few experts.
        tokens = torch.arange(batch)[:, None]

        def run() -> float:
            start = time.perf_counter()
            with torch.inference_mode():
                for offset in range(steps):
                    position = torch.tensor([context + offset])
                    self.model(
                        tokens,
                        past_key_values=cache,
                        cache_position=position,
                        position_ids=position[None].expand(batch, 1),
                        use_cache=True,
                    )
            return (time.perf_counter() - start) / steps

        return run


def read_program() -> Callable[[], Any]:
    """Returns a program that only reads memory, as decoding mostly does."""
    import jax
    import jax.numpy as jnp

    array = jnp.ones(_READ_BYTES // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return lambda: total(array)


def timed(run: Callable[[], Any]) -> float:
    """Returns the seconds that one call takes."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measure_decode(
    ours: list[Family], reference: HuggingFaceOlmoe | None, batch: int, context: int
) -> list[dict[str, Any]]:
    """Times decode steps of all families, interleaved; returns a record of each."""
    import jax.numpy as jnp

    from umv2.cost import traffic

    steps, rounds = _STEPS.value, _ROUNDS.value
    tokens = jnp.arange(batch, dtype=jnp.int32)
    positions = jnp.full(batch, context, jnp.int32)
    caches: dict[str, Any] = {}
    programs, memory = {}, {}
    for family in ours:
        dtype = family.config.compute_dtype
        if dtype not in caches:  # one cache for all families of a data type
            caches[dtype] = family.empty_cache(batch, context + steps)
        programs[family.label], memory[family.label] = family.compile(caches[dtype], batch)
        print(f"  compiled {family.label}, batch {batch}, context {context:,}", flush=True)
    read = read_program()
    seconds: dict[str, list[float]] = {family.label: [] for family in ours}
    rates: list[float] = []

    def turn(family: Family) -> float:
        state = (caches[family.config.compute_dtype], tokens, positions)
        step = programs[family.label]

        def run() -> Any:
            nonlocal state
            for _ in range(steps):
                state = step(*state)
            return state

        duration = timed(run) / steps
        caches[family.config.compute_dtype] = state[0]
        return duration

    run_reference = None
    if reference is not None:
        run_reference = reference.decode_timer(context, batch, steps)
        seconds[reference.label] = []
    for number in range(rounds + 1):  # the first round warms up
        order = ours[number % len(ours) :] + ours[: number % len(ours)]
        durations = {family.label: turn(family) for family in order}
        if run_reference is not None:
            durations["hugging_face"] = run_reference()
        rate = _READ_BYTES / timed(read)
        if number:
            rates.append(rate)
            for label, duration in durations.items():
                seconds[label].append(duration)
    records = []
    measured: list[Any] = [*ours, *([reference] if reference else [])]
    for family in measured:
        precision = traffic.Precision(*3 * (family.config.compute_dtype,))
        needed = traffic.decode_bytes(family.config, batch, context + 1, precision=precision)
        records.append(
            {
                "kind": "decode",
                "family": family.label,
                "batch": batch,
                "context": context,
                "seconds": seconds[family.label],
                "traffic_bytes": needed.total,
                "traffic_without_cache_bytes": needed.without_cache,
                "read_bytes_per_second": rates,
                "memory": memory.get(family.label),
            }
        )
    return records


def measure_prefill(ours: list[Family], length: int) -> list[dict[str, Any]]:
    """Times the prefill of one prompt, families interleaved."""
    programs = {family.label: family.prefill(length) for family in ours}
    seconds: dict[str, list[float]] = {label: [] for label in programs}
    for number in range(min(3, _ROUNDS.value) + 1):
        for label, program in programs.items():
            duration = timed(program)
            if number:
                seconds[label].append(duration)
    return [
        {"kind": "prefill", "family": label, "batch": 1, "context": length, "seconds": times}
        for label, times in seconds.items()
    ]


def main(_: list[str]) -> None:
    """Runs the measurements; appends records to the file as soon as they are made."""
    path, labels = cli.path(_RESULTS), dict.fromkeys(_FAMILIES.value)
    contexts, batches = cli.integers(_CONTEXTS, least=1), cli.integers(_BATCHES, least=1)
    configs = {label: model_config(label, _SIZE.value) for label in labels}
    if not configs.keys() - {"hugging_face"}:
        raise ConfigError("--families: must name at least one of our families")
    if "hugging_face" in configs:
        cli.require_installed("reference", "torch", "transformers")
    measurements.require_writable(path)
    about = measurements.about() | measurements.device()
    about |= {"size": _SIZE.value, "steps": _STEPS.value}
    ours = []
    for label, config in configs.items():
        if label != "hugging_face":
            ours.append(Family(label, config))
            print(f"made {label}", flush=True)
    reference = HuggingFaceOlmoe(configs["hugging_face"]) if "hugging_face" in configs else None

    def store(records: list[dict[str, Any]]) -> None:
        measurements.append(path, [about | record for record in records])
        for record in records:
            median = sorted(record["seconds"])[len(record["seconds"]) // 2]
            print(
                f"{record['kind']:<8} batch {record['batch']:>4} context"
                f" {record['context']:>6,} {record['family']:<24} {1e3 * median:>9.1f} ms",
                flush=True,
            )

    for context in contexts:
        for batch in batches:
            store(measure_decode(ours, reference, batch, context))
    if _PREFILL.value:
        store(measure_prefill(ours, _PREFILL.value))


if __name__ == "__main__":
    cli.run(main)
