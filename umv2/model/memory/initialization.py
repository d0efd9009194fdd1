"""Initialisation of memory layers (arXiv 2508.18756, section 3.5)."""

import dataclasses
import functools
import math

import numpy as np
import scipy.optimize
import scipy.special

from umv2.config import MemoryConfig, ModelConfig
from umv2.model import layers

# Monte Carlo calibration: number of core draws, and queries per draw. Scores vary mostly between
# cores (by 17 % of their mean), so 1,024 draws give the mean to 0.5 %.
_CALIBRATION_CORES = 1024
_CALIBRATION_TOKENS = 1
_QUADRATURE_POINTS = 64


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Result of the Monte Carlo calibration of one retrieval layout."""

    query_norm: float  # initial weight of the query norm
    key_norm: float  # initial weight of the key norm
    weight_square: float  # mean square of a value's weight; 1 + sigma_s^2 if its mean is 1


@dataclasses.dataclass(frozen=True)
class MemoryInitialization:
    """Initial standard deviations of a memory layer's parameters, and initial norm weights.

    Entries for parameters that the configuration does not have are unused.
    """

    query_std: float
    pre_std: float
    gate_std: float
    output_std: float
    key_std: float
    values_std: float
    query_norm: float
    key_norm: float


def activation_moment(name: str, variance: float) -> float:
    """Returns E[f(z)^2] for z ~ N(0, variance); activation `none` is the identity."""
    points, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE_POINTS)
    z = points * math.sqrt(variance)
    match name:
        case "none":
            f = z
        case "relu":
            f = np.maximum(z, 0)
        case "silu":
            f = z * scipy.special.expit(z)
        case "gelu":
            f = z * scipy.special.ndtr(z)
        case _:
            raise ValueError(f"unknown activation {name!r}")
    return float(np.sum(weights * f**2) / np.sum(weights))


def ffn_variance(config: ModelConfig, *, linear_gate: bool) -> float:
    """Returns the variance of the FFN's output for inputs of mean square 1.

    With `linear_gate`, the paper's sigma_ffn^2 = 0.064 k_inner / (2 L), which treats silu as the
    identity and is the target variance of memory outputs; without it, the variance of the actual
    SwiGLU, about a third of that.
    """
    gate = activation_moment("none" if linear_gate else "silu", 0.4)
    # For blocks without an FFN, assume one of inner width 2 h.
    inner = (config.active_ffn_size or 2 * config.hidden_size) / config.hidden_size
    return 0.4 * 0.4 * gate * inner / (2 * config.num_layers)


def memory_variance(config: ModelConfig, values_std: float, weight_square: float) -> float:
    """Returns the variance of a memory layer's output for inputs of mean square 1 (Eq. 22).

    0.16 (1 + sigma_s^2) sigma_V^4 D_p m H D_v / h, where `weight_square` is 1 + sigma_s^2. Other
    configurations change single factors. The variance of the pre-score, 0.4 sigma_V^2 D_p, becomes
    its second moment after the activation, if there is one; its 0.4 becomes 1 without W_p, and all
    of it becomes 1 without pre-values (D_p = 0). Without W_v, 0.4 D_v / h becomes 1. An output gate
    multiplies by the second moment of silu.
    """
    memory = config.memory
    pre_score = 1.0
    if memory.pre_value_dim:
        variance = (0.4 if memory.pre_projection else 1.0) * values_std**2 * memory.pre_value_dim
        pre_score = activation_moment(memory.activation, variance)
    pooled = memory.num_selected * weight_square * pre_score * values_std**2
    if memory.projection != "none":
        pooled *= 0.4 * memory.value_dim / config.hidden_size
    if memory.output_gate != "none":
        pooled *= activation_moment(memory.output_gate, 0.4)
    return pooled


def matched_values_std(config: ModelConfig, weight_square: float) -> float:
    """Returns sigma_V for which `memory_variance` equals the paper's FFN variance (Eq. 26).

    sigma_V^4 = 0.2 k_inner h / (m H (1 + sigma_s^2) D_p D_v L), generalised to every configuration
    by solving numerically.
    """
    target = ffn_variance(config, linear_gate=True)

    def excess(log_std: float) -> float:
        return math.log(memory_variance(config, math.exp(log_std), weight_square) / target)

    return math.exp(scipy.optimize.brentq(excess, math.log(1e-8), math.log(1e8), xtol=1e-12))


@functools.lru_cache
def calibrate(memory: MemoryConfig) -> Calibration:
    """Estimates the initial norm weights and the mean square weight of a value by Monte Carlo.

    Draws queries, keys and cores from their initial distributions, retrieves, and solves for the
    common weight of the existing norms at which the selected scores (the per-core G) have mean 1.
    A score is linear in each norm weight, and quadratic under Tucker scoring. With a softmax, a
    mean of 1 is meaningless: the norm weights are then chosen so that the scores of single keys
    have standard deviation 1. Without norms, the scores are only measured. The seed is fixed, so
    the result is deterministic.
    """
    selected, key_score_std = _draw_selected_scores(memory)
    num_norms = (memory.query_norm != "none") + (memory.key_norm != "none")
    scale = 1.0
    if num_norms and memory.score_activation == "softmax":
        scale = 1 / key_score_std
        norm_weight = scale ** (1 / num_norms)
    elif num_norms:
        scale = 1 / float(selected.mean(dtype=np.float64))
        norm_weight = scale ** (1 / (num_norms * (2 if memory.scoring == "tucker" else 1)))
    else:
        norm_weight = 1.0
    weights = selected * scale
    match memory.score_activation:
        case "softmax":
            weights = scipy.special.softmax(weights, axis=-1)
        case "relu":
            weights = np.maximum(weights, 0)
    return Calibration(
        query_norm=norm_weight,
        key_norm=norm_weight,
        weight_square=float(np.square(weights).mean(dtype=np.float64)),
    )


def _draw_selected_scores(memory: MemoryConfig) -> tuple[np.ndarray, float]:
    """Returns the selected scores [draws, cores, tokens, top_m] and the std of key scores.

    Both are for norm weights of 1.
    """
    generator = np.random.default_rng(0)
    rank, num_keys = memory.tucker_rank, memory.keys_per_side
    num_draws, num_tokens = _CALIBRATION_CORES, _CALIBRATION_TOKENS

    def draw(*shape: int, norm: str, std: float) -> np.ndarray:
        draws = generator.standard_normal((*shape, memory.key_dim), np.float32)
        if norm == "none":
            return draws * np.float32(std)
        # Normalise the draws: their lengths vary, and selection would favour the long ones.
        return draws / np.sqrt(np.mean(np.square(draws), axis=-1, keepdims=True))

    keys = draw(2, rank, num_keys, norm=memory.key_norm, std=memory.key_dim**-0.5)
    query_rank = rank if memory.query == "per_rank" else 1
    query_shape = (2, query_rank, num_draws * num_tokens)
    # Inputs have mean square 1, so query entries have variance h * 2 / (5 h) = 0.4.
    query = draw(*query_shape, norm=memory.query_norm, std=math.sqrt(0.4))
    scores = (query @ keys.swapaxes(-1, -2)).reshape(2, rank, num_draws, num_tokens, num_keys)
    if memory.scoring == "tucker":
        cores = generator.random((num_draws, memory.num_cores, rank, rank), np.float32)
        left, _, right = np.linalg.svd(cores.sum(axis=1))
        sign = np.where(left[:, :, 0].sum(-1, keepdims=True) < 0, -1, 1)
        vectors = np.stack([left[:, :, 0] * sign, right[:, 0, :] * sign])
    else:
        vectors = np.ones((2, num_draws, rank), np.float32)
    shortlisting = np.einsum("srdtn,sdr->sdtn", scores, vectors)
    size = memory.shortlist
    candidates = np.argpartition(-shortlisting, size - 1, axis=-1)[..., :size]
    short = np.take_along_axis(scores, candidates[:, None], axis=-1)
    if memory.scoring == "tucker":
        weighted = np.einsum("rdti,dcrq->dctqi", short[0], cores)
        grid = np.einsum("dctqi,qdtj->dctij", weighted, short[1], optimize=True)
    else:
        grid = (short[0, 0][..., :, None] + short[1, 0][..., None, :])[:, None]
    flat = grid.reshape(num_draws, grid.shape[1], num_tokens, size * size)
    best = np.argpartition(-flat.sum(axis=1), memory.top_m - 1, axis=-1)[..., : memory.top_m]
    return np.take_along_axis(flat, best[:, None], axis=-1), float(scores.std(dtype=np.float64))


@functools.lru_cache
def memory_initialization(config: ModelConfig) -> MemoryInitialization:
    """Returns the constants selected by `model.memory.initialization`.

    principled: those of the paper; released: those of the published PyTorch code; unit: as
    principled, but with values of standard deviation 1, an ablation arm that should train badly.
    """
    memory = config.memory
    linear = layers.linear_std(config.hidden_size)
    key_std = memory.key_dim**-0.5
    if memory.initialization == "released":
        return MemoryInitialization(
            query_std=memory.key_dim**-0.5,
            pre_std=config.hidden_size**-0.5,
            gate_std=config.hidden_size**-0.5,
            output_std=(memory.num_slots * memory.value_dim) ** -0.5,
            key_std=key_std,
            values_std=0.02,
            query_norm=memory.key_dim**-0.4,
            key_norm=memory.key_dim**-0.4,
        )
    calibration = calibrate(memory)
    unit = memory.initialization == "unit"
    return MemoryInitialization(
        query_std=linear,
        pre_std=linear,
        gate_std=linear,
        output_std=linear,
        key_std=key_std,
        values_std=1.0 if unit else matched_values_std(config, calibration.weight_square),
        query_norm=calibration.query_norm,
        key_norm=calibration.key_norm,
    )
