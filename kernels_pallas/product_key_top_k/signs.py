"""Fixes the sign of the singular vectors that shortlist keys."""

import jax.numpy as jnp

from kernels_pallas.array_types import Array, Float


def fix_signs(
    u: Float[Array, "*heads rank"],
    v: Float[Array, "*heads rank"],
    previous_u: Float[Array, "*heads rank"] | None = None,
    previous_v: Float[Array, "*heads rank"] | None = None,
) -> tuple[Float[Array, "*heads rank"], Float[Array, "*heads rank"]]:
    """Fixes the sign of the first singular vectors of the summed cores, for `product_key_top_k`.

    C = sum_i s_i u_i v_i^T does not determine the common sign of u_i and v_i, so an SVD may return
    either. The shortlists depend on it: they hold the keys with the highest S u and S v, so
    (-u, -v) would select those with the lowest. If the sign changes from one step to the next, or
    between training and inference, other keys are silently selected:

        left, _, right = jnp.linalg.svd(cores.sum(axis=0))
        u, v = fix_signs(left[..., :, 0], right[..., 0, :], previous_u, previous_v)

    For each head, this chooses the sign that minimizes

        sum_a |u_a - previous_u_a| + |v_a - previous_v_a|,

    and keeps the given sign in a tie. Without a previous pair, or if the previous u is zero, it
    chooses the sign with sum_a u_a >= 0.

    Args:
        u: the first left singular vector of the summed cores of each head.
        v: the matching first right singular vector.
        previous_u: u of the previous step, with its sign fixed; both or neither.
        previous_v: v of the previous step.

    Raises:
        ValueError: only one of the previous vectors is given.
    """
    if (previous_u is None) != (previous_v is None):
        raise ValueError("previous_u, previous_v: got only one, must be both or neither")
    preference = u.sum(axis=-1, keepdims=True)
    if previous_u is not None and previous_v is not None:
        distance = jnp.abs(u - previous_u) + jnp.abs(v - previous_v)
        flipped = jnp.abs(u + previous_u) + jnp.abs(v + previous_v)
        closer = flipped.sum(axis=-1, keepdims=True) - distance.sum(axis=-1, keepdims=True)
        has_none = jnp.all(previous_u == 0, axis=-1, keepdims=True)
        preference = jnp.where(has_none, preference, closer)
    sign = jnp.where(preference < 0, -1.0, 1.0).astype(u.dtype)
    return u * sign, v * sign
