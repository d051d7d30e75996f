"""Names in errors: the public operation, whatever exchange it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jax_ep
from jax_ep.testing.ranks import make_mesh, on_ranks

NUM_RANKS, TOKENS, HIDDEN = 3, 4, 16


def send(x, ids, group, layout="rank", op=jax_ep.dispatch, **options):
    capacity = NUM_RANKS * TOKENS
    return op(
        x,
        ids,
        jnp.ones(ids.shape),
        group=group,
        num_experts=NUM_RANKS,
        layout=layout,
        recv_capacity=capacity,
        **options,
    )


def along(x, handle, backend):
    return jax_ep.dispatch(x, handle=handle, backend=backend).x


def combine(x, handle, backend):
    return jax_ep.combine(jnp.tile(x, (NUM_RANKS, 1)), handle, backend=backend)


def combine_weighted(x, handle, backend):
    rows = jnp.tile(x, (NUM_RANKS, 1))
    return jax_ep.combine(rows, handle, weights=x[:, :1], backend=backend)


def combine_weights(x, handle, backend):
    w = jnp.tile(x, (NUM_RANKS, 1))
    w = w[:, :1] if handle.layout == "rank" else w[:, 0]
    return jax_ep.combine_weights(w, handle, backend=backend)


# Layout of the handle, and the operation that runs along it.
EXCHANGES = {
    "dispatch": ("rank", along),
    "dispatch, expert": ("expert", along),
    "combine": ("rank", combine),
    "combine, expert": ("expert", combine_weighted),  # the weights move to the rows first
    "combine_weights": ("rank", combine_weights),
    "combine_weights, expert": ("expert", combine_weights),
}
ROUTINGS = {"dispatch": jax_ep.dispatch, "dispatch_fp8": jax_ep.dispatch_fp8}
SUMS = {
    "all_reduce": lambda x, group: jax_ep.all_reduce(x, group=group),
    "reduce_scatter": lambda x, group: jax_ep.reduce_scatter(x[:NUM_RANKS], group=group),
    "all_gather": lambda x, group: jax_ep.all_gather(x, group=group),
    "all_reduce_residual_rmsnorm": lambda x, group: jax_ep.all_reduce_residual_rmsnorm(
        x, x, x[0], group=group
    ),
}


def ragged(x, group, backend):
    places = TOKENS * jax.lax.axis_index("ep") + jnp.zeros(NUM_RANKS, jnp.int32)
    none, all_rows = (jnp.full(NUM_RANKS, n, jnp.int32) for n in (0, TOKENS))
    output = jnp.zeros((NUM_RANKS * TOKENS, HIDDEN))
    return jax_ep.ragged_all_to_all(
        x, output, none, all_rows, places, all_rows, axis_name=group, backend=backend
    )


def packed(x, group, backend):
    sizes = jnp.ones(NUM_RANKS, jnp.int32)
    return jax_ep.all_to_all_v(x, sizes, group=group, recv_capacity=NUM_RANKS, backend=backend).x


PIECES = {"ragged_all_to_all": ragged, "all_to_all_v": packed}
CASES = (*EXCHANGES, *(f"{op}, routed" for op in ROUTINGS), *PIECES, *SUMS)


def make_call(case, group, backend="cpu", mesh=None):
    """Returns a step from x to the result of one operation, and x. Handles are made before."""
    mesh = mesh or group.mesh
    rng = np.random.default_rng(0)
    x = rng.standard_normal((NUM_RANKS, TOKENS, HIDDEN)).astype(np.float32)
    ids = rng.integers(0, NUM_RANKS, (NUM_RANKS, TOKENS, 1)).astype(np.int32)
    op, _, kind = case.partition(", ")
    if op in SUMS:
        return on_ranks(lambda x: SUMS[op](x, group), mesh, check_vma=False), x
    if op in PIECES:
        return on_ranks(lambda x: PIECES[op](x, group, backend), mesh, check_vma=False), x
    if kind == "routed":
        options = {"block": HIDDEN} if op == "dispatch_fp8" else {}

        def routed(x, ids):
            return send(x, ids, group, op=ROUTINGS[op], backend=backend, **options).x

        mapped = on_ranks(routed, mesh, check_vma=False)
        return lambda x: mapped(x, ids), x
    layout, run = EXCHANGES[case]
    handle = on_ranks(lambda x, ids: send(x, ids, group, layout).handle, group.mesh)(x, ids)
    handle = jax.tree.map(np.asarray, handle)
    mapped = on_ranks(lambda x, handle: run(x, handle, backend), mesh, check_vma=False)
    return lambda x: mapped(x, handle), x


def timeout_of(group, run):
    """Returns the error of a group when rank 1 does not come."""
    group._native_group.handle.skip_rank(1)
    with pytest.raises(jax_ep.PeerTimeoutError, match="waited for rank 1") as caught:
        group.check(run())
    group.close()
    return caught.value


@pytest.mark.parametrize("case", CASES)
def test_timeouts_name_the_operation(case):
    group = jax_ep.Group.open(make_mesh(NUM_RANKS), "ep", timeout=0.3)
    call, x = make_call(case, group)
    jax.block_until_ready(call(x))
    assert timeout_of(group, lambda: call(x)).op == case.partition(",")[0]


@pytest.mark.parametrize("case", CASES)
def test_timeouts_of_gradients_name_the_operation(case):
    """Names distinguish the backward pass from the forward pass, whatever exchange it runs."""
    group = jax_ep.Group.open(make_mesh(NUM_RANKS), "ep", timeout=0.3)
    call, x = make_call(case, group)
    y, back = jax.vjp(call, x)
    jax.block_until_ready(back(y))
    error = timeout_of(group, lambda: back(y))
    assert error.op == f"{case.partition(',')[0]} (gradient)"
    assert str(error).startswith(f"{error.op}: rank ")


def test_timeouts_under_vmap_name_the_operation():
    """jax.jacrev is a batch of backward passes."""
    group = jax_ep.Group.open(make_mesh(NUM_RANKS), "ep", timeout=0.3)
    call, x = make_call("combine, expert", group)
    y, back = jax.vjp(call, x)
    cts = jnp.stack([y, y])
    jax.block_until_ready(jax.vmap(back)(cts))
    assert timeout_of(group, lambda: jax.vmap(back)(cts)).op == "combine (gradient)"


@pytest.mark.parametrize("case", CASES)
def test_errors_about_another_mesh_name_the_operation(groups, backend, case):
    group = groups(NUM_RANKS)
    backwards = Mesh(group.mesh.devices[::-1], group.axes)
    call, x = make_call(case, group, backend, mesh=backwards)
    op = case.partition(",")[0]
    with pytest.raises(jax_ep.GroupError, match=rf"^{op}: jax\.shard_map runs over the mesh"):
        call(x)


@pytest.mark.parametrize("case", [c for c in CASES if c not in SUMS])
def test_errors_about_second_derivatives_name_the_operation(groups, backend, case):
    call, x = make_call(case, groups(NUM_RANKS), backend)
    op = case.partition(",")[0]

    def grad(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(call(x))))(x)

    expected = rf"^{op}( \(gradient\))?: only first derivatives"
    with pytest.raises(jax_ep.ConfigError, match=expected):
        jax.grad(lambda x: jnp.sum(jnp.sin(grad(x))))(x)
