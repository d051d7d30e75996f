"""all_to_all_v: pytrees, the way back, batches, errors. The suite checks values."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import reference
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.conformance.ragged import packed_table
from jax_ep.testing.ranks import on_ranks

NUM_RANKS = 3


def test_batches_of_packed_rows_have_the_bits_of_a_loop(groups):
    group = groups(NUM_RANKS)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((NUM_RANKS, 12, 2, 3)).astype(np.float32)
    sizes = rng.integers(0, 5, (NUM_RANKS, 2, NUM_RANKS)).astype(np.int32)
    send = partial(jax_ep.all_to_all_v, group=group, recv_capacity=7)
    out = on_ranks(jax.vmap(send, in_axes=(1, 0)), group.mesh)(x, sizes)
    for i in range(2):
        rows, recv_sizes, num_dropped = reference.all_to_all_v(x[:, :, i], sizes[:, i], 7)
        assert_same_bits(np.asarray(out.x)[:, i], rows)
        assert_same_bits(np.asarray(out.recv_sizes)[:, i], recv_sizes)
        assert_same_bits(np.asarray(out.num_dropped)[:, i, 0], num_dropped)


def test_rows_arrive_packed_whatever_the_pytree(groups, backend):
    """More arrays than one launch takes, sizes that do not fit, rows that are dropped."""
    group = groups(NUM_RANKS)
    rng = np.random.default_rng(2)
    x = {
        name: rng.integers(0, 100, (NUM_RANKS, 20, *shape)).astype(dtype)
        for name, shape, dtype in (
            ("a", (4,), np.float32),
            ("b", (), np.int8),
            ("c", (3,), np.float16),
            ("d", (2, 2), np.uint8),
            ("e", (5,), np.float32),
        )
    }
    sizes = np.array([[9, -3, 30], [0, 0, 0], [2**31 - 1, 7, 1]], np.int32)
    cut = np.array([[9, 0, 11], [0, 0, 0], [20, 0, 0]], np.int32)
    capacity = 25

    def send(x, sizes):
        return jax_ep.all_to_all_v(x, sizes, group=group, recv_capacity=capacity, backend=backend)

    def grad(x, sizes):
        floats = {name: x[name] for name in "ace"}

        def loss(floats):
            out = send(x | floats, sizes)
            return sum(jnp.sum(out.x[name].astype(jnp.float32) ** 2) for name in "ace")

        return send(x, sizes), jax.grad(loss)(floats)

    out, bars = on_ranks(grad, group.mesh)(x, sizes)
    for name, array in x.items():
        rows, recv_sizes, num_dropped = reference.all_to_all_v(array, cut, capacity)
        assert_same_bits(out.x[name], rows, what=name)
    assert_same_bits(out.recv_sizes, recv_sizes)
    assert_same_bits(out.num_dropped, num_dropped[:, None])
    assert num_dropped[0] == 4
    table = packed_table(cut)
    for name, bar in bars.items():
        rows = reference.all_to_all_v(x[name], cut, capacity)[0]
        expected, _ = reference.ragged_all_to_all_gradient(2 * rows, 20, table)
        assert_same_bits(bar, expected, what=name)


def test_rows_come_back_by_the_sizes_that_were_received(groups):
    group = groups(NUM_RANKS)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((NUM_RANKS, 12, 3)).astype(np.float32)
    sizes = rng.integers(0, 5, (NUM_RANKS, NUM_RANKS)).astype(np.int32)

    def there_and_back(x, sizes):
        send = partial(jax_ep.all_to_all_v, group=group)
        out = send(x, sizes, recv_capacity=15)
        return send(out.x, out.recv_sizes, recv_capacity=12)

    back = on_ranks(there_and_back, group.mesh)(x, sizes)
    assert_same_bits(back.recv_sizes, sizes)
    is_sent = np.arange(12) < sizes.sum(axis=1, keepdims=True)
    assert_same_bits(back.x, np.where(is_sent[..., None], x, np.float32(0)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": ()}, jax_ep.ShapeError, "x must hold an array"),
        ({"x": (np.ones((3, 1)), np.ones(4))}, jax_ep.ShapeError, r"the same T.*\(3, 1\), \(4,\)"),
        ({"x": np.ones((0, 4))}, jax_ep.ShapeError, "none empty"),
        ({"send_sizes": np.ones(2, np.int32)}, jax_ep.ShapeError, r"must have shape \(3,\)"),
        ({"send_sizes": np.ones(3)}, jax_ep.DTypeError, "must be of integer type"),
        ({"recv_capacity": 0}, jax_ep.ConfigError, "recv_capacity must be at least 1"),
        ({"group": "ep"}, jax_ep.GroupError, "must be a jax_ep.Group"),
    ],
)
def test_errors_of_all_to_all_v_name_the_argument(groups, changes, error, message):
    group = groups(NUM_RANKS)
    named: dict[str, Any] = {"x": np.ones((4, 2), np.float32)}
    named["send_sizes"] = np.ones(3, np.int32)
    named |= {"group": group, "recv_capacity": 5, **changes}
    mapped = jax.shard_map(
        lambda: jax_ep.all_to_all_v(**named).x, mesh=group.mesh, in_specs=(), out_specs=P("ep")
    )
    with pytest.raises(error, match=rf"^all_to_all_v: .*{message}"):
        jax.eval_shape(mapped)
