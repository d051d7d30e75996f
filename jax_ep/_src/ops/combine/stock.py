"""combine from XLA's collectives: partial sums travel by all_to_all.

Sums are written out term by term, so they have the order of the custom call.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_ep._src.base import exact
from jax_ep._src.base.options import Layout, Quantize
from jax_ep._src.base.spec import RouteSpec, RowIndex
from jax_ep._src.ops.common.check_mesh import check_mesh
from jax_ep._src.ops.common.collectives import swap
from jax_ep._src.ops.common.tokens import invert, take
from jax_ep._src.ops.dispatch.fp8 import round_rows


def combine(
    spec: RouteSpec,
    index: RowIndex,
    rows: jax.Array,
    weights: jax.Array | None,
    biases: Sequence[jax.Array],
) -> jax.Array:
    """Returns [num_tokens, hidden], like the custom call."""
    num_tokens, num_slots = index.send_row.shape
    num_all = spec.group.num_ranks * num_tokens
    recv_src = index.recv_src
    rows = exact.kept(check_mesh(rows, spec.group, op=spec.op))
    if spec.layout is Layout.RANK:
        partial = take(rows, invert(recv_src, num_all))
    else:
        partial = _sum_in_row_order(recv_src, num_all, num_slots, weights, rows)
    # [destination rank, token, hidden]: the partial sums there for the tokens of this rank.
    parts = _cross(spec, partial.reshape(spec.group.num_ranks, num_tokens, -1))
    terms = [term.astype(jnp.float32) for term in (*parts, *map(exact.kept, biases))]
    return exact.rounded(_sum(terms), rows.dtype)


def _cross(spec: RouteSpec, partial: jax.Array) -> jax.Array:
    """Exchanges [rank, token, hidden]; what crosses between ranks is rounded if `wire` says so."""
    if spec.wire is Quantize.NONE:
        return swap(spec.group, partial)
    rounded, scales = round_rows(partial.reshape(-1, partial.shape[-1]), spec.wire)
    bits = jax.lax.bitcast_convert_type(rounded, jnp.uint8).reshape(partial.shape)
    moved = swap(spec.group, bits)
    sent = jax.lax.bitcast_convert_type(moved, rounded.dtype).astype(jnp.float32)
    scales = swap(spec.group, scales.reshape(*partial.shape[:2], -1))
    blocks = sent.reshape(*scales.shape, -1) * scales[..., None]
    rank = jnp.arange(spec.group.num_ranks)[:, None, None]
    own = rank == spec.group.rank()
    kept: jax.Array = exact.kept(blocks.reshape(partial.shape))
    return jnp.where(own, partial.astype(jnp.float32), kept)


def _sum_in_row_order(
    recv_src: jax.Array,
    num_all: int,
    max_rows: int,
    weights: jax.Array | None,
    rows: jax.Array,
) -> jax.Array:
    """Returns [num_all, hidden]: each token's sum of its rows here, in row order, rounded."""
    # The stable sort by token keeps rows in order. `turn` is the index of a row among the rows of
    # its token. The table [max_rows, num_all] holds each row at (turn, token), and -1 elsewhere.
    places = jnp.arange(recv_src.shape[0], dtype=jnp.int32)
    key = jnp.where(recv_src < 0, num_all, recv_src)
    token, row = jax.lax.sort((key, places), num_keys=1, is_stable=True)
    is_first = token != jnp.concatenate([jnp.full((1,), -1, jnp.int32), token[:-1]])
    turn = places - jax.lax.cummax(jnp.where(is_first, places, 0))
    has_place = (token < num_all) & (turn < max_rows)  # true for all rows of an unaltered handle
    target = jnp.where(has_place, turn * num_all + token, max_rows * num_all)
    table = jnp.full((max_rows * num_all,), -1, jnp.int32).at[target].set(row, mode="drop")
    table = table.reshape(max_rows, num_all)
    terms = [take(rows, of_tokens).astype(jnp.float32) for of_tokens in table]
    if weights is not None:
        factors = take(weights, table)[:, :, None]
        terms = [exact.kept(term * factor) for term, factor in zip(terms, factors, strict=True)]
    return exact.rounded(_sum(terms), rows.dtype)


def _sum(terms: Sequence[jax.Array]) -> jax.Array:
    """Adds terms one by one, as if to +0. XLA would drop a +0 that is written as a term."""
    return exact.positive_zeros(functools.reduce(jnp.add, terms))
