"""The implementations of attention over a sequence, and the choice of one."""

import functools
from types import ModuleType

from jaxtyping import Array, Float, Int

from umv2 import kernels
from umv2.model.attention import cudnn, splash, xla
from umv2.model.attention.shapes import Shapes

_IMPLEMENTATIONS: dict[str, ModuleType] = {"xla": xla, "cudnn": cudnn, "splash": splash}
# The first of these that supports a call is used. Neither cudnn nor splash forms an array of all
# scores: forward and backward of one sequence of 4,096 with 12 heads of width 64 move 38 and 69 MB
# of HBM in the compiled programs, "xla" more than 7,700 (H200, TPU v5e).
_AUTOMATIC = {"cpu": ("xla",), "gpu": ("cudnn", "xla"), "tpu": ("splash", "xla")}


def attend(
    query: Float[Array, "b t h q"],
    keys: Float[Array, "b t g q"],
    values: Float[Array, "b t g q"],
    segment_ids: Int[Array, "b t"] | None,
    window: int,
    implementation: str,
) -> Float[Array, "b t h q"]:
    """Attends to the positions up to each query's own, softmax(q k / sqrt(width)) v.

    Args:
      query: queries; `h` is a multiple of `g`, and consecutive heads share keys and values.
      keys: keys.
      values: values.
      segment_ids: positions attend only to positions with the same id, which must be contiguous;
        None: to all earlier positions.
      window: number of positions a query attends to, its own included; 0: all.
      implementation: "auto", "xla", "cudnn" or "splash".

    Raises:
      ConfigError: the named implementation does not support the call; "auto" always does.
    """
    shapes = Shapes(
        length=query.shape[1],
        head_dim=query.shape[3],
        dtype=query.dtype,
        window=window,
        packed=segment_ids is not None,
        platform=kernels.platform(),
        compute_capability=kernels.compute_capability(),
    )
    chosen = choose(implementation, shapes)
    attended: Array = _IMPLEMENTATIONS[chosen].attend(query, keys, values, segment_ids, shapes)
    return attended


def choose(implementation: str, shapes: Shapes) -> str:
    """Returns the implementation to use; raises ConfigError if the named one cannot be."""
    reasons = {
        name: functools.partial(module.unsupported_reason, shapes)
        for name, module in _IMPLEMENTATIONS.items()
    }
    return kernels.choose("model.attention", implementation, shapes.platform, _AUTOMATIC, reasons)
