"""Experiment configuration: fields, their types, and all validation rules."""

from umv2.config.data import DataConfig, LongContextDataConfig, LongContextTask
from umv2.config.evaluation import EvaluationConfig, GenerateConfig, LongContextConfig
from umv2.config.experiment import Config, from_config_dict, to_dict
from umv2.config.mesh import MeshConfig, ResolvedMesh
from umv2.config.model import MemoryConfig, ModelConfig, MoeConfig, Rematerialization
from umv2.config.schema import ConfigError, differing_fields, nearest_name
from umv2.config.training import LossConfig, OptimizerConfig, TrainConfig, WeightDecayConfig

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "GenerateConfig",
    "LongContextConfig",
    "LongContextDataConfig",
    "LongContextTask",
    "LossConfig",
    "MemoryConfig",
    "MeshConfig",
    "ModelConfig",
    "MoeConfig",
    "OptimizerConfig",
    "Rematerialization",
    "ResolvedMesh",
    "TrainConfig",
    "WeightDecayConfig",
    "differing_fields",
    "from_config_dict",
    "nearest_name",
    "to_dict",
]
