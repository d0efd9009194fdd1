"""A run of seconds on text files: its configuration, and ways to shorten compilation."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging as absl_logging
from jax.experimental.compilation_cache import compilation_cache

from configs import base
from umv2.config import Config, from_config_dict

# Fields by path, as in `--config.<path>=`.
TINY: dict[str, Any] = {
    "model.hidden_size": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_key_value_heads": 2,
    "model.ffn_size": 16,
    "model.compute_dtype": "float32",
    "model.memory.num_keys": 8,
    "model.memory.key_dim": 8,
    "model.memory.top_m": 4,
    "model.memory.shortlist": 4,
    "model.memory.value_dim": 8,
    "model.memory.pre_value_dim": 4,
    "data.source": "text",
    "data.sequence_length": 16,
    "data.held_out_fraction": 0.1,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 2,
    "optimizer.schedule": "constant",
    "train.num_steps": 12,
    "train.batch_size": 8,
    "train.log_interval_steps": 2,
    "train.evaluation_interval_steps": 6,
    "train.checkpoint_interval_steps": 3,
    "train.num_checkpoints_kept": 10,
    "train.tensorboard": False,
    "evaluation.batch_size": 8,
    "generate.max_new_tokens": 4,
    "mesh.replica": 1,
}
# The default PRNG takes half of all compilation time; its values do not matter here.
PRNG = "unsafe_rbg"


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, and the functions that it compiled."""

    workdir: pathlib.Path
    paths: str
    config: Config
    cache: pathlib.Path
    compiled: tuple[str, ...] = dataclasses.field(repr=False)


def write_text(folder: pathlib.Path) -> str:
    """Writes 40 small documents and returns the glob of their files."""
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"Document {i}: the square of {i} is {i * i}. " * 3)
    return f"{folder}/*.txt"


def tiny_config(paths: str, **changes: Any) -> Config:
    """Returns the configuration of `TINY` with changes by path, with __ for a dot."""
    config = base.get_config()
    config.update_from_flattened_dict(
        TINY | {"data.paths": (paths,)} | {k.replace("__", "."): v for k, v in changes.items()}
    )
    return from_config_dict(config)


def flags(paths: str, **changes: Any) -> list[str]:
    """Returns the same as command-line flags."""
    values = TINY | {"data.paths": (paths,)} | {k.replace("__", "."): v for k, v in changes.items()}
    return ["--config=configs/base.py"] + [f"--config.{k}={v}" for k, v in values.items()]


def environment(cache: pathlib.Path) -> dict[str, str]:
    """Returns the environment of a process that compiles as in `quick_compilation`."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DEFAULT_PRNG_IMPL": PRNG,
    }


@contextlib.contextmanager
def quick_compilation(cache: pathlib.Path) -> Iterator[None]:
    """Caches compiled programs across runs and processes: every run jits its own functions."""
    values = {
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_default_prng_impl": PRNG,
    }
    previous = {name: getattr(jax.config, name) for name in values}

    def set_all(values: dict[str, Any]) -> None:
        compilation_cache.reset_cache()  # JAX remembers whether a cache is in use
        for name, value in values.items():
            jax.config.update(name, value)

    set_all(values)
    yield
    set_all(previous)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects the name of every compiled function, cached on disk or not."""
    names: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if match := re.match(r"Compiling jit\((\w+)\)", record.getMessage()):
                names.append(match[1])

    collector = Collector()
    logging.getLogger("jax").addHandler(collector)
    with jax.log_compiles():
        yield names
    logging.getLogger("jax").removeHandler(collector)


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """Collects the log messages of the library."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    collector, verbosity = Collector(), absl_logging.get_verbosity()
    absl_logging.get_absl_logger().addHandler(collector)
    absl_logging.set_verbosity(absl_logging.INFO)
    yield messages
    absl_logging.set_verbosity(verbosity)
    absl_logging.get_absl_logger().removeHandler(collector)
