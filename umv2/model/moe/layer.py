"""Mixture of experts as in OLMoE (arXiv 2409.02060, section 2), used as a block's FFN."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from umv2 import sharding
from umv2.config import LossConfig, ModelConfig
from umv2.model import layers
from umv2.model.moe import experts
from umv2.model.parameter import Initializer, Parameter
from umv2.model.slots import LayerCost, Observe, RouterStats
from umv2.types import accumulation_dtype, struct


@struct
class Routing:
    """The router's decision for each token; choices are in order of decreasing probability."""

    probabilities: Float[Array, "t experts"]
    weights: Float[Array, "t k"]
    choices: Int[Array, "t k"]


def route(logits: Float[Array, "t experts"], *, top_k: int, renormalize: bool) -> Routing:
    """Selects the `top_k` most probable experts of each token; ties go to the lower index.

    The weights are the probabilities under a softmax over all experts, divided by their sum if
    `renormalize`.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, choices = _top_k(probabilities, top_k)
    if renormalize:
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(probabilities=probabilities, weights=weights, choices=choices)


class MixtureOfExperts(nnx.Module):
    """Sums the SwiGLU experts that a router selects for each token; no token is dropped."""

    def __init__(self, config: ModelConfig, *, init: Initializer):
        hidden, sizes = config.hidden_size, config.moe
        std = layers.linear_std(hidden)
        down_std = std * layers.residual_scale(config.num_layers)
        into = (sizes.num_experts, hidden, sizes.expert_size)
        out = (sizes.num_experts, sizes.expert_size, hidden)
        self.router = init.normal(
            "router",
            (hidden, sizes.num_experts),
            std=std,
            axes=("expert_hidden", None),
            group="matrices",
            served="float32",
        )
        inward: Any = {"axes": (None, "expert_hidden", "expert"), "group": "matrices"}
        outward: Any = {"axes": (None, "expert", "expert_hidden"), "group": "matrices"}
        self.gate = init.normal("gate", into, std=std, **inward)
        self.up = init.normal("up", into, std=std, **inward)
        self.down = init.normal("down", out, std=down_std, **outward)
        self.config = sizes

    def __call__(
        self, x: Float[Array, "b t d"], *, observe: Observe
    ) -> tuple[Float[Array, "b t d"], RouterStats | None]:
        """Returns sum_j p_j Expert_j(x) over the selected experts, and the router's statistics.

        The balance loss is E sum_e f_e P_e, where f_e is the number of selections of expert e per
        token (without a gradient) and P_e its mean probability; it is top_k at perfect balance
        (OLMoE, equation 4). The router z-loss is the mean squared log-partition (equation 5). Means
        are over the tokens of the global batch.

        Args:
          x: normalised input.
          observe: the statistics to compute; those of the router are part of `health`.
        """
        router = sharding.gathered(self.router[...])
        into = (self.gate_and_up,) if hasattr(self, "gate_and_up") else (self.gate, self.up)
        matrices = [sharding.gathered(p[...], (sharding.FSDP,)) for p in (*into, self.down)]
        y, sums = sharding.shard_map_tokens(
            functools.partial(
                self._mix, over=sharding.sharded_axes(matrices[0], axis=-1), observe=observe
            ),
            x,
            [router, *matrices],
        )
        if not observe.health:
            return y, None
        num_tokens = math.prod(x.shape[:2])
        hits = sums.pop("hits")
        mean = jax.tree.map(lambda total: total / num_tokens, sums)
        selected = hits.astype(mean["probability"].dtype) / num_tokens
        stats = RouterStats(
            balance_loss=self.config.num_experts * jnp.sum(selected * mean["probability"]),
            z_loss=mean["squared_log_partition"],
            probability=mean["probability"],
            output_variance=jnp.var(y.astype(jnp.float32)),
            top_score=mean["top_score"],
            last_score=mean["last_score"],
            hits=hits,
        )
        return y, stats

    @classmethod
    def cost(cls, config: ModelConfig) -> LayerCost:
        """Returns the cost of one mixture of experts."""
        moe = config.moe
        expert = 3 * config.hidden_size * moe.expert_size
        return LayerCost(
            routing=config.hidden_size * moe.num_experts,
            values=moe.num_experts * expert,
            selected=moe.top_k * expert,
            num_choices=moe.num_experts,
            num_picked=moe.top_k,
            counters=moe.num_experts,
            shared_reads=True,
        )

    @staticmethod
    def losses(
        stats: RouterStats, config: LossConfig, *, num_tokens: int
    ) -> dict[str, Float[Array, ""]]:
        """Returns the weighted load-balancing loss and router z-loss, averaged over layers.

        The load-balancing loss is E sum_i f_i p_i, where f_i is the number of selections of expert
        i per token and p_i its mean probability (arXiv 2409.02060, equation 4 up to its constant).
        With scope `layer`, it is the mean over layers; with scope `model`, f and p are averaged
        over layers before the product, as in Hugging Face transformers.

        Args:
          stats: statistics of all layers.
          config: loss configuration; losses with coefficient 0 are not computed.
          num_tokens: number of tokens in the batch.
        """
        terms = {}
        if config.load_balance > 0:
            if config.load_balance_scope == "layer":
                balance = jnp.mean(stats.balance_loss)
            else:
                selected = stats.hits.astype(stats.probability.dtype).mean(axis=0) / num_tokens
                balance = selected.size * jnp.sum(selected * stats.probability.mean(axis=0))
            terms["load_balance"] = config.load_balance * balance
        if config.router_z_loss > 0:
            terms["router_z_loss"] = config.router_z_loss * jnp.mean(stats.z_loss)
        return terms

    def serve(self) -> None:
        """Fuses gate and up into one array: for few rows, one product is faster than two.

        Only on a single device, since a shard of the fused array would mix gate and up.
        """
        if not sharding.on_mesh():
            both = jnp.concatenate([self.gate[...], self.up[...]], axis=-1)
            declared = self.gate.get_metadata()["declaration"]
            self.gate_and_up = Parameter(both, axes=declared.axes, group=declared.group)
            del self.gate, self.up

    def _mix(
        self,
        x: Float[Array, "b t d"],
        matrices: list[Array],
        *,
        over: tuple[str, ...],
        observe: Observe,
    ) -> tuple[Float[Array, "b t d"], dict[str, Any]]:
        """Computes the output and the sums of statistics for one device's tokens.

        If the mesh axes `over` shard the inner dimension of the experts, each device applies its
        shard of all experts to the tokens of all devices along `over`, and the partial outputs are
        reduced. The load is thus balanced whatever the routing.
        """
        router, *into, down = matrices
        tokens = x.reshape(-1, x.shape[-1])
        # DEFAULT precision would round to bfloat16 on TPU and change which experts are selected.
        logits = jnp.einsum(
            "td,de->te",
            tokens.astype(accumulation_dtype(x.dtype)),
            router,
            precision=jax.lax.Precision.HIGHEST,
        )
        sizes = self.config
        routing = route(logits, top_k=sizes.top_k, renormalize=sizes.renormalize)
        work = sharding.gather_tokens(
            (tokens, routing.weights.astype(x.dtype), routing.choices), over
        )
        dispatch = experts.plan_dispatch(work[2], sizes.num_experts)
        y = experts.mixture(work[0], work[1], dispatch, into, down)
        y = sharding.scatter_tokens(y, over)
        if not observe.health:
            return y.reshape(x.shape), {}
        scores = jax.lax.stop_gradient(routing.weights)
        numbers = jnp.arange(sizes.num_experts, dtype=routing.choices.dtype)[None, None]
        sums = {
            "probability": jnp.sum(routing.probabilities, axis=0),
            "squared_log_partition": jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1))),
            "top_score": jnp.sum(scores[:, 0]),
            "last_score": jnp.sum(scores[:, -1]),
            "hits": jnp.sum(routing.choices[..., None] == numbers, axis=(0, 1), dtype=jnp.int32),
        }
        return y.reshape(x.shape), sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _top_k(values: Array, count: int) -> tuple[Array, Array]:
    """Returns the `count` largest values of each row and their indices.

    Its VJP uses a comparison mask instead of the scatter-add of `lax.top_k`'s.
    """
    largest, indices = jax.lax.top_k(values, count)
    return largest, indices


def _top_k_fwd(values: Array, count: int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    largest, indices = _top_k(values, count)
    return (largest, indices), (indices, values)


def _top_k_bwd(
    count: int, residuals: tuple[Array, Array], gradients: tuple[Array, Any]
) -> tuple[Array]:
    indices, values = residuals
    columns = jax.lax.broadcasted_iota(indices.dtype, (1, 1, values.shape[-1]), 2)
    chosen = indices[:, :, None] == columns
    return (jnp.sum(jnp.where(chosen, gradients[0][:, :, None], 0), axis=1),)


_top_k.defvjp(_top_k_fwd, _top_k_bwd)
