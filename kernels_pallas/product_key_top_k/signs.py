"""Which of two pairs of singular vectors shortlists keys."""

import jax.numpy as jnp

from kernels_pallas.array_types import Array, Float


def fix_signs(
    u: Float[Array, "*heads rank"],
    v: Float[Array, "*heads rank"],
    previous_u: Float[Array, "*heads rank"] | None = None,
    previous_v: Float[Array, "*heads rank"] | None = None,
) -> tuple[Float[Array, "*heads rank"], Float[Array, "*heads rank"]]:
    """Gives the first singular vectors of the summed cores the sign that `product_key_top_k` needs.

    C = sum_i s_i u_i v_i^T leaves the common sign of u_i and v_i open, and an SVD returns either,
    but the shortlists of keys do depend on it: they hold the keys of the highest S u and S v, so
    that (-u, -v) selects those of the lowest. A sign that changes from one step to the next, or
    between training and use, silently selects other keys:

        left, _, right = jnp.linalg.svd(cores.sum(axis=0))
        u, v = fix_signs(left[..., :, 0], right[..., 0, :], previous_u, previous_v)

    For each head, the sign is the one for which

        sum_a |u_a - previous_u_a| + |v_a - previous_v_a|

    is least, the positive one at a tie; where there is no previous pair, or its u is zero, the one
    with sum_a u_a >= 0.

    Args:
        u: the first left singular vector of each head's summed cores.
        v: the first right singular vector, with the sign that belongs to u.
        previous_u: that of the step before, with its sign fixed; both or neither.
        previous_v: the same of v.

    Raises:
        ValueError: one of the previous vectors is given without the other.
    """
    if (previous_u is None) != (previous_v is None):
        raise ValueError("previous pair: got one vector of it, must be both or neither")
    preference = u.sum(axis=-1, keepdims=True)
    if previous_u is not None and previous_v is not None:
        distance = jnp.abs(u - previous_u) + jnp.abs(v - previous_v)
        flipped = jnp.abs(u + previous_u) + jnp.abs(v + previous_v)
        closer = flipped.sum(axis=-1, keepdims=True) - distance.sum(axis=-1, keepdims=True)
        has_none = jnp.all(previous_u == 0, axis=-1, keepdims=True)
        preference = jnp.where(has_none, preference, closer)
    sign = jnp.where(preference < 0, -1.0, 1.0).astype(u.dtype)
    return u * sign, v * sign
