"""Mixture of experts as in OLMoE (arXiv 2409.02060, section 2), an FFN of a block."""

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
from umv2.types import struct


@struct
class Routing:
    """What the router decides for each token, likeliest expert first."""

    probabilities: Float[Array, "t experts"]
    weights: Float[Array, "t k"]
    choices: Int[Array, "t k"]


def route(logits: Float[Array, "t experts"], *, top_k: int, renormalize: bool) -> Routing:
    """Chooses the `top_k` likeliest experts of each token; of equal ones the lower.

    Their weights are the probabilities of a softmax over all experts, divided by their sum if
    `renormalize`.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, choices = _largest(probabilities, top_k)
    if renormalize:
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(probabilities=probabilities, weights=weights, choices=choices)


class MixtureOfExperts(nnx.Module):
    """Adds up the SwiGLU networks that a router chooses for each token, without dropping any."""

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
        """Returns sum_j p_j Expert_j(x) over the chosen experts, and what was observed.

        The balance loss is E sum_e f_e P_e, with f_e the selections of expert e per token, which
        is constant for the gradient, and P_e its mean probability: top_k at perfect balance
        (OLMoE, equation 4). The router's z-loss is the mean squared log-partition (equation 5).
        Means are over all tokens of the batch, on all devices.

        Args:
          x: normalised input.
          observe: what to report; the router's statistics are of its health.
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
        """Returns what one mixture of experts costs."""
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
        """Returns the load-balancing loss and the z-loss, weighted: means over layers, as in OLMoE.

        The former is E sum_i f_i p_i, with f the number of selections of an expert per token and p
        its mean probability (arXiv 2409.02060, equation 4 up to its constant). Of scope `layer`:
        the mean of the layers' losses; `model`: f and p are averaged over layers before the
        product, as transformers does.

        Args:
          stats: of all layers.
          config: of the loss; terms whose coefficient is 0 are not computed.
          num_tokens: of the batch.
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
        """Holds gate and up as one array: for few rows, one product takes less time than two.

        On one device alone: shards of the joined array would mix the two.
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
        """Computes the output for one device's tokens, and sums over them.

        Where the mesh axes `over` shard the experts' inner size, every device works on its shard of
        all experts for the tokens of its group, so that no routing leaves a device idle; the
        partial outputs are added up.
        """
        router, *into, down = matrices
        tokens = x.reshape(-1, x.shape[-1])
        # DEFAULT precision would round to bfloat16 on TPU, and so change which experts win.
        logits = jnp.einsum(
            "td,de->te",
            tokens.astype(layers.accumulation_dtype(x.dtype)),
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
def _largest(values: Array, count: int) -> tuple[Array, Array]:
    """Returns the largest values of each row, and where they stand.

    The derivative of `lax.top_k` adds up by scattering, element by element; this one compares.
    """
    largest, places = jax.lax.top_k(values, count)
    return largest, places


def _largest_fwd(values: Array, count: int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    largest, places = _largest(values, count)
    return (largest, places), (places, values)


def _largest_bwd(
    count: int, residuals: tuple[Array, Array], gradients: tuple[Array, Any]
) -> tuple[Array]:
    places, values = residuals
    columns = jax.lax.broadcasted_iota(places.dtype, (1, 1, values.shape[-1]), 2)
    chosen = places[:, :, None] == columns
    return (jnp.sum(jnp.where(chosen, gradients[0][:, :, None], 0), axis=1),)


_largest.defvjp(_largest_fwd, _largest_bwd)
