"""What the backward pass keeps of a group of blocks, and what it computes again.

Kernels' results are small and dear: a token's addresses, scores and pooled values take a few
kilobytes, but a second retrieval sorts, and gathers every selected row again.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from umv2 import sharding
from umv2.config import Rematerialization
from umv2.model.attention import cudnn, splash

_KEPT = "memory_layer"
_NAMES = (splash.RESIDUALS, "product_key_top_k", _KEPT)


def keep[T](results: T) -> T:
    """Marks results of a memory layer, such as its pooled values, as kept with those of kernels."""
    named: T = checkpoint_name(results, _KEPT)
    return named


def rematerialized(body: Callable[..., Any], remat: Rematerialization) -> Callable[..., Any]:
    """Returns a function whose backward pass computes again what `remat` does not keep.

    Args:
      body: one group of blocks.
      remat: "none": everything is kept; "dots": results of matrix products and of kernels;
        "kernels": results of kernels (attention, retrieval, value aggregation); "full": nothing but
        the arguments.
    """
    if jax.config.jax_disable_jit:  # jax.checkpoint would still trace the body, hiding values
        return body
    policies = jax.checkpoint_policies
    of_kernels = policies.save_from_both_policies(
        policies.save_only_these_names(*_NAMES), _is_of_cudnn
    )
    match remat:
        case "none":
            return body
        case "full":
            return jax.checkpoint(body)
        case "kernels":
            return jax.checkpoint(body, policy=of_kernels)
        case "dots":
            # Of a product that is rounded, only the rounded result is then needed, and kept.
            of_products = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable,
                policies.save_only_these_names(sharding.ROUNDED_PRODUCT),
            )
            both = policies.save_from_both_policies(of_products, of_kernels)
            return jax.checkpoint(body, policy=both)


def _is_of_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether these are results of cuDNN's attention, which JAX does not name."""
    return primitive.name in cudnn.PRIMITIVES
