"""Standard deviations at initialisation (UltraMemV2, arXiv 2508.18756, section 3.5, appendix A).

Every linear map, embeddings included, is normal with variance 2 / (5 h); projections that end a
residual branch of attention or FFN are scaled by 1 / sqrt(2 L) more. Memory layers have three
arms, chosen by `model.memory.initialization`.
"""

import dataclasses
import functools
import math

import numpy as np
import scipy.optimize
import scipy.special

from umv2.config import MemoryConfig, ModelConfig

# Draws of the cores in the Monte Carlo calibration, and queries for each. Scores vary much more
# between cores than between queries, by 17 % of their mean: this many bring the mean to 0.5 %.
_CALIBRATION_CORES = 1024
_CALIBRATION_TOKENS = 1
_QUADRATURE_POINTS = 64


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Result of the Monte Carlo calibration of one retrieval layout."""

    norm_weight: float  # start of query and key norm weights: mean selected score 1
    score_std: float  # sigma_s, standard deviation of the selected per-core scores


@dataclasses.dataclass(frozen=True)
class MemoryInitialization:
    """Standard deviations of a memory layer's parameters, and its norms' start."""

    query_std: float
    pre_std: float
    output_std: float
    key_std: float
    values_std: float
    norm_weight: float


def linear_std(hidden_size: int) -> float:
    """Returns the standard deviation of linear maps, sqrt(2 / (5 h))."""
    return math.sqrt(2 / (5 * hidden_size))


def residual_scale(num_layers: int) -> float:
    """Returns 1 / sqrt(2 L), the factor on the last projection of attention and FFN."""
    return 1 / math.sqrt(2 * num_layers)


def activation_moment(name: str, variance: float) -> float:
    """Returns E[f(z)^2] for z normal with mean 0 and the given variance; `none` is the identity."""
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

    With `linear_gate`, the paper's sigma_ffn^2 = 0.064 k_inner / (2 L), which takes silu for the
    identity and is what memory outputs are matched to; without, the variance of the SwiGLU as
    built, about a third of that.
    """
    gate = activation_moment("none" if linear_gate else "silu", 0.4)
    inner = config.ffn_size / config.hidden_size
    return 0.4 * 0.4 * gate * inner / (2 * config.num_layers)


def memory_variance(config: ModelConfig, values_std: float, score_std: float) -> float:
    """Returns the variance of a memory layer's output for inputs of mean square 1 (Eq. 22).

    0.16 (1 + sigma_s^2) sigma_V^4 D_p m H D_v / h. With an activation, 0.4 sigma_V^2 D_p, the
    variance of the pre-score, gives way to the second moment after the activation; without
    pre-values (D_p = 0) it gives way to 1: 0.4 (1 + sigma_s^2) sigma_V^2 m H D_v / h.
    """
    memory = config.memory
    pre_score = 1.0
    if memory.pre_value_dim:
        variance = 0.4 * values_std**2 * memory.pre_value_dim
        pre_score = activation_moment(memory.activation, variance)
    pooled = memory.num_selected * (1 + score_std**2) * pre_score * values_std**2
    return 0.4 * memory.value_dim / config.hidden_size * pooled


def matched_values_std(config: ModelConfig, score_std: float) -> float:
    """Returns sigma_V for which `memory_variance` equals the paper's FFN variance (Eq. 26).

    sigma_V^4 = 0.2 k_inner h / (m H (1 + sigma_s^2) D_p D_v L); solved numerically, so that it
    holds for activations and for D_p = 0 too.
    """
    target = ffn_variance(config, linear_gate=True)

    def excess(log_std: float) -> float:
        return math.log(memory_variance(config, math.exp(log_std), score_std) / target)

    return math.exp(scipy.optimize.brentq(excess, math.log(1e-8), math.log(1e8), xtol=1e-12))


@functools.lru_cache
def calibrate(memory: MemoryConfig) -> Calibration:
    """Solves for the norm weight at which selected scores have mean 1, by Monte Carlo.

    Draws queries and keys of mean square 1 and cores, retrieves, and scales: a score
    ('score' being what weights a value, the per-core G) grows with the fourth power of the common
    norm weight of queries and keys under Tucker scoring, with the square under additive scoring.
    Deterministic: the seed is fixed.
    """
    generator = np.random.default_rng(0)
    rank, num_keys = memory.tucker_rank, memory.keys_per_side
    num_draws, num_tokens = _CALIBRATION_CORES, _CALIBRATION_TOKENS

    def normalised(*shape: int) -> np.ndarray:
        # Not plain normal draws: their lengths vary, and selection would favour the long ones.
        draws = generator.standard_normal((*shape, memory.key_dim), np.float32)
        return draws / np.sqrt(np.mean(np.square(draws), axis=-1, keepdims=True))

    keys = normalised(2, rank, num_keys)
    query_rank = rank if memory.query == "per_rank" else 1
    query = normalised(2, query_rank, num_draws * num_tokens)
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
    kept = np.argpartition(-shortlisting, size - 1, axis=-1)[..., :size]
    short = np.take_along_axis(scores, kept[:, None], axis=-1)
    if memory.scoring == "tucker":
        weighted = np.einsum("rdti,dcrq->dctqi", short[0], cores)
        grid = np.einsum("dctqi,qdtj->dctij", weighted, short[1], optimize=True)
        power = 4
    else:
        grid = (short[0, 0][..., :, None] + short[1, 0][..., None, :])[:, None]
        power = 2
    flat = grid.reshape(num_draws, grid.shape[1], num_tokens, size * size)
    best = np.argpartition(-flat.sum(axis=1), memory.top_m - 1, axis=-1)[..., : memory.top_m]
    selected = np.take_along_axis(flat, best[:, None], axis=-1)
    mean = float(selected.mean(dtype=np.float64))
    deviation = float(selected.std(dtype=np.float64))
    return Calibration(norm_weight=mean ** (-1 / power), score_std=deviation / mean)


def memory_initialization(config: ModelConfig) -> MemoryInitialization:
    """Returns the constants of the arm `model.memory.initialization`.

    principled: the paper's; released: those of the published PyTorch code; unit: principled but
    for values of standard deviation 1, an arm of the ablation that must misbehave.
    """
    memory = config.memory
    linear = linear_std(config.hidden_size)
    key_std = memory.key_dim**-0.5
    if memory.initialization == "released":
        return MemoryInitialization(
            query_std=memory.key_dim**-0.5,
            pre_std=config.hidden_size**-0.5,
            output_std=(memory.num_slots * memory.value_dim) ** -0.5,
            key_std=key_std,
            values_std=0.02,
            norm_weight=memory.key_dim**-0.4,
        )
    calibration = calibrate(memory)
    unit = memory.initialization == "unit"
    return MemoryInitialization(
        query_std=linear,
        pre_std=linear,
        output_std=linear,
        key_std=key_std,
        values_std=1.0 if unit else matched_values_std(config, calibration.score_std),
        norm_weight=calibration.norm_weight,
    )
