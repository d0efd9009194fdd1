"""The experiment configuration: frozen dataclasses built from an `ml_collections.ConfigDict`.

`configs/base.py` documents the unit and source of every field. This package defines their types and
validates them before any work starts: the first error raises a `ConfigError` that names the field,
its value and the rule.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from umv2.config.data import DataConfig
from umv2.config.evaluation import EvaluationConfig, GenerateConfig
from umv2.config.mesh import MeshConfig, ResolvedMesh
from umv2.config.model import ModelConfig
from umv2.config.schema import (
    Seed,
    build,
    require,
)
from umv2.config.training import LossConfig, OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """The complete configuration of an experiment."""

    seed: Seed
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    loss: LossConfig
    train: TrainConfig
    evaluation: EvaluationConfig
    generate: GenerateConfig
    mesh: MeshConfig

    @property
    def resolved_mesh(self) -> ResolvedMesh:
        """The mesh section with a resolved table sharding, as needed to create shardings.

        Raises:
          TypeError: the mesh is not resolved.
        """
        if not isinstance(self.mesh, ResolvedMesh):
            raise TypeError("the mesh is not resolved: call umv2.cost.exchange.resolve_mesh first")
        return self.mesh

    def validate(self) -> None:
        """Raises ConfigError for the first field that is invalid or contradicts another field."""
        self.model.validate()
        self.data.validate()
        self.train.validate()
        self.optimizer.validate(self.train.num_steps)
        warm_up_steps = self.data.long_context.warm_up_steps
        require(
            warm_up_steps < self.train.num_steps,
            "data.long_context.warm_up_steps",
            warm_up_steps,
            f"must be < train.num_steps = {self.train.num_steps}",
        )
        self.evaluation.long_context.validate()
        self.generate.validate()
        self.mesh.validate()
        self._validate_sharding()
        memory = self.model.memory
        without_memory = (
            memory.layer == "none" and "memory layers, but model.memory.layer is 'none'"
        )
        without_experts = (
            self.model.ffn != "moe" and f"experts, but model.ffn is {self.model.ffn!r}"
        )
        for name, missing in (
            ("tucker_penalty", without_memory),
            ("balance_loss", without_memory),
            ("load_balance", without_experts),
            ("router_z_loss", without_experts),
        ):
            if getattr(self.loss, name) > 0:
                require(not missing, f"loss.{name}", getattr(self.loss, name), f"needs {missing}")
        if self.loss.tucker_penalty > 0:
            require(
                memory.scoring == "tucker" and memory.tucker_rank > 1,
                "loss.tucker_penalty",
                self.loss.tucker_penalty,
                "needs Tucker scoring of rank > 1: it acts on all but the first singular value",
            )

    def _validate_sharding(self) -> None:
        """Raises ConfigError for a size that the mesh axes cannot shard evenly.

        Does not check value tables, whose sharding is chosen by `cost.exchange`.
        """
        mesh, model = self.mesh, self.model
        dense = ("fsdp", "memory") if mesh.parameters == "fsdp_and_memory" else ("fsdp",)
        sizes: list[tuple[tuple[str, ...], str, int]] = [
            (dense, "model.hidden_size", model.hidden_size),
            (("tensor",), "model.vocab_size", model.vocab_size),
            (("tensor",), "model.num_heads", model.num_heads),
            (("tensor",), "model.num_key_value_heads", model.num_key_value_heads),
            (("tensor",), "model.ffn_size", model.ffn_size),
        ]
        if model.memory.layer != "none":
            sizes.append((dense, "model.memory.key_dim", model.memory.key_dim))
            sizes.append((("tensor",), "data.sequence_length", self.data.sequence_length))
        if model.ffn == "moe":
            sizes.append((("memory", "tensor"), "model.moe.expert_size", model.moe.expert_size))
        for axes, field, size in sizes:
            parts = math.prod(getattr(mesh, axis) for axis in axes)
            require(
                size % parts == 0,
                " x ".join(f"mesh.{axis}" for axis in axes),
                parts,
                f"must divide {field}={size}; {math.gcd(size, parts)} does, and {parts} divides"
                f" {field}={-(-size // parts) * parts}",
            )


def from_config_dict(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Builds and validates a `Config` from a ConfigDict or a nested mapping.

    Raises:
      ConfigError: a field is unknown, missing, of the wrong type or not one of its choices, or
        values contradict each other.
    """
    result = typing.cast(Config, build(Config, config))
    result.validate()
    return result


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested dicts of JSON values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return typing.cast(dict[str, Any], plain(dataclasses.asdict(config)))
