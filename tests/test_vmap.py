"""jax.vmap: values and gradients have the bits of a loop over the elements."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from steps import make_echo

import jax_ep
from jax_ep.testing.compare import assert_close, assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_ranks

NUM_RANKS, NUM_EXPERTS, BATCH, TOKENS, TOPK, HIDDEN = 2, 4, 3, 4, 2, 16
# Choices of the operands among x, ids, weights and rows that have a batch.
AXES = {
    "all": (0, 0, 0, 0),
    "x": (0, None, None, None),
    "ids": (None, 0, None, None),
    "weights": (None, None, 0, None),
    "rows": (None, None, None, 0),
}


def make_args(batch=(BATCH,), seed=0):
    """Makes x, ids, weights and rows of all ranks: [ranks, *batch, ...]."""
    rng = np.random.default_rng(seed)
    lead = (NUM_RANKS, *batch)
    x = rng.standard_normal((*lead, TOKENS, HIDDEN)).astype(np.float32)
    ids = np.argsort(rng.random((*lead, TOKENS, NUM_EXPERTS)), -1)[..., :TOPK].astype(np.int32)
    weights = rng.random((*lead, TOKENS, TOPK)).astype(np.float32)
    rows = rng.standard_normal((*lead, capacity(), HIDDEN)).astype(np.float32)
    return x, ids, weights, rows


def capacity():
    return NUM_RANKS * TOKENS * TOPK


def send(group, layout, backend, x, ids, weights, **options):
    return jax_ep.dispatch(
        x,
        ids,
        weights,
        group=group,
        num_experts=NUM_EXPERTS,
        layout=layout,
        recv_capacity=capacity(),
        backend=backend,
        **options,
    )


def make_step(group, layout, backend):
    """Makes a step with every operation of a layer on one rank; it returns a pytree."""

    def step(x, ids, weights, rows):
        out = send(group, layout, backend, x, ids, weights)
        at_rows = None if layout == "rank" else out.weights
        again = jax_ep.dispatch(2.0 * x, handle=out.handle, backend=backend)
        back = jax_ep.combine(rows + out.x, out.handle, weights=at_rows, backend=backend)
        moved = jax_ep.combine_weights(out.weights, out.handle, backend=backend)
        counts = jax_ep.get_dispatch_layout(
            ids, num_experts=NUM_EXPERTS, group=group, backend=backend
        )
        rounded = jax_ep.dispatch_fp8(
            x,
            ids,
            weights,
            group=group,
            num_experts=NUM_EXPERTS,
            layout=layout,
            recv_capacity=capacity(),
            block=HIDDEN,
            backend=backend,
        )
        return out, again, back, moved, counts, rounded.x

    return step


def loop(fn, axes=(0, 0, 0, 0), size=BATCH):
    """Returns jax.vmap(fn, axes) as a loop over the elements; axes are 0 or None."""

    def run(*args):
        each = [
            fn(*(a if axis is None else a[i] for a, axis in zip(args, axes, strict=True)))
            for i in range(size)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    return run


def one_by_one(fn, args, axes=None, size=BATCH, at=1):
    """Calls fn for each element of arrays whose axis `at` is the batch, and stacks the results."""

    def element(i):
        return [
            a if axis is None else np.moveaxis(a, at, 0)[i]
            for a, axis in zip(args, axes or (0,) * len(args), strict=True)
        ]

    each = [jax.tree.map(np.asarray, fn(*element(i))) for i in range(size)]
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=at), *each)


def without_batch(args, axes):
    """Takes one element of each operand that has no batch."""
    return [a if axis == 0 else a[:, 0] for a, axis in zip(args, axes, strict=True)]


def make_loss(group, layout, backend):
    """Makes a layer with all gradients, on one rank."""

    def loss(x, ids, weights, rows):
        out = send(group, layout, backend, jnp.sin(x), ids, weights)
        at_rows = None if layout == "rank" else out.weights
        again = jax_ep.dispatch(jnp.cos(x), handle=out.handle, backend=backend).x
        moved = jax_ep.combine_weights(jnp.sin(out.weights), out.handle, backend=backend)
        y = jnp.sin(rows + out.x + again)
        back = jax_ep.combine(y, out.handle, weights=at_rows, backend=backend)
        return jnp.sum(jnp.sin(back)) + jnp.sum(jnp.sin(moved))

    return loss


def make_grad(group, layout, backend):
    return jax.grad(make_loss(group, layout, backend), argnums=(0, 2, 3))


@pytest.fixture(scope="module")
def compiled(groups):
    """compiled(make, layout, backend): a step without a batch; each is compiled once."""

    @cache
    def get(make, *args, check_vma=True):
        group = groups(NUM_RANKS)
        return on_ranks(make(group, *args), group.mesh, check_vma=check_vma)

    return get


def assert_same(got, expected):
    got, expected = (jax.tree_util.tree_leaves_with_path(t) for t in (got, expected))
    for (path, g), (_, e) in zip(got, expected, strict=True):
        assert_same_bits(g, np.asarray(e), what=jax.tree_util.keystr(path))


def assert_same_grads(got, expected, layout):
    """Compares gradients of x, weights and rows. XLA orders the sum of combine's weights."""
    x, weights, rows = zip(got, expected, strict=True)
    assert_same_bits(x[0], np.asarray(x[1]), what="x")
    assert_same_bits(rows[0], np.asarray(rows[1]), what="rows")
    assert_close(weights[0], np.asarray(weights[1]), tolerance=0 if layout == "rank" else 1e-5)


# XLA takes long to compile back end `xla`, whose batches are JAX's own.
@pytest.mark.parametrize(
    ("backend", "batched"), [*(("cpu", b) for b in AXES), ("xla", "all"), ("xla", "x")]
)
def test_values_inside_shard_map_equal_a_loop(groups, compiled, layout, backend, batched):
    """Every result of every operation is compared, whatever operand has the batch."""
    group, axes = groups(NUM_RANKS), AXES[batched]
    step = make_step(group, layout, backend)
    args = without_batch(make_args(), axes)
    got = on_ranks(jax.vmap(step, in_axes=axes), group.mesh)(*args)
    assert_same(got, one_by_one(compiled(make_step, layout, backend), args, axes))


@pytest.mark.parametrize(("backend", "check_vma"), [("cpu", True), ("cpu", False), ("xla", True)])
def test_gradients_inside_shard_map_equal_a_loop(groups, compiled, layout, backend, check_vma):
    """The test takes the batch of gradients, and the gradient of a batch."""
    group = groups(NUM_RANKS)
    loss, args = make_loss(group, layout, backend), make_args()
    place = partial(on_ranks, mesh=group.mesh, check_vma=check_vma)
    expected = one_by_one(compiled(make_grad, layout, backend, check_vma=check_vma), args)
    got = place(jax.vmap(make_grad(group, layout, backend)))(*args)
    assert_same_grads(got, expected, layout)
    whole = jax.grad(lambda *a: jnp.sum(jax.vmap(loss)(*a)), argnums=(0, 2, 3))
    assert_same_grads(place(whole)(*args), expected, layout)


def test_gradients_of_operands_without_batch_are_summed(groups, layout):
    """These gradients are sums over the batch, in XLA's order."""
    group = groups(NUM_RANKS)
    loss, axes = make_loss(group, layout, "cpu"), (None, 0, None, None)
    args = without_batch(make_args(), axes)
    grads = [
        on_ranks(jax.grad(lambda *a, f=f: jnp.sum(f(*a)), argnums=(0, 2, 3)), group.mesh)(*args)
        for f in (jax.vmap(loss, in_axes=axes), loop(loss, axes))
    ]
    for got, expected in zip(*grads, strict=True):
        assert_close(got, np.asarray(expected), tolerance=1e-5)


@pytest.mark.parametrize("of_handle", [0, None], ids=["handles", "handle"])
def test_rows_along_a_handle_equal_a_loop(groups, layout, of_handle):
    """The rows have a batch, and the handle has one or not."""
    group = groups(NUM_RANKS)

    def run(mapped, x, ids, weights, rows):
        def along(handle, x, rows):
            sent = jax_ep.dispatch(x, handle=handle, payload=rows[:TOKENS], backend="cpu")
            return sent, jax_ep.combine(rows, handle, bias=x, backend="cpu")

        def route(i, w):
            return send(group, layout, "cpu", x[0], i, w).handle

        axes = (of_handle, 0, 0)
        handle = loop(route, (0, 0))(ids, weights) if of_handle == 0 else route(ids[0], weights[0])
        if mapped:
            return jax.vmap(along, in_axes=axes)(handle, x, rows)
        each = [
            along(jax.tree.map(lambda a, i=i: a[i], handle) if of_handle == 0 else handle, *pair)
            for i, pair in enumerate(zip(x, rows, strict=True))
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    got, expected = (on_ranks(partial(run, m), group.mesh)(*make_args()) for m in (True, False))
    assert_same(got, expected)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_a_batch_around_shard_map_equals_a_loop(groups, jit):
    group = groups(NUM_RANKS)
    step, (x, ids, _, _) = make_echo(group, "cpu"), make_args()
    ids = ids[..., :1] % NUM_RANKS
    got = jax.vmap(on_ranks(step, group.mesh, jit=jit), in_axes=1, out_axes=1)(x, ids)
    assert_same(got, on_ranks(loop(step, (0, 0)), group.mesh)(x, ids))


@pytest.mark.parametrize(
    ("layout", "backend", "check_vma"),
    [
        ("rank", "cpu", True),
        ("expert", "cpu", True),
        ("expert", "cpu", False),
        ("rank", "xla", False),  # JAX's own indexing fails with True
    ],
)
def test_a_pipeline_over_an_axis_of_the_mesh_equals_a_loop(layout, backend, check_vma):
    """Each stage has its part of the batch, and ranks meet only in their stage."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("stage", "ep"))
    x, ids, weights, rows = (a.swapaxes(0, 1) for a in make_args((4,)))  # [batch, rank, ...]
    args = x, ids, weights, rows
    with jax_ep.Group.open(mesh, "ep", name="stages") as group:
        step, loss, grad = (
            make(group, layout, backend) for make in (make_step, make_loss, make_grad)
        )

        def over_ranks(fn):
            def one(*stacked):
                return jax.tree.map(lambda a: a[None], fn(*(a[0] for a in stacked)))

            return jax.shard_map(
                one, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=check_vma
            )

        def pipeline(fn):
            return jax.jit(jax.vmap(over_ranks(fn), spmd_axis_name="stage"))

        one = partial(one_by_one, args=args, size=4, at=0)
        assert_same(pipeline(step)(*args), one(jax.jit(over_ranks(step))))

        expected = one(jax.jit(over_ranks(grad)))
        whole = jax.grad(lambda *a: jnp.sum(pipeline(loss)(*a)), argnums=(0, 2, 3))
        assert_same_grads(jax.jit(whole)(*args), expected, layout)
        assert_same_grads(pipeline(grad)(*args), expected, layout)
        group.check()


def test_a_pipeline_needs_the_mesh_of_the_group(backend):
    """Another device order raises an error while lowering, with the public name."""
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    args = make_args((4,))
    with jax_ep.Group.open(Mesh(devices, ("stage", "ep")), "ep", name="order") as group:
        step = make_step(group, "rank", backend)
        other = Mesh(devices.T, ("stage", "ep"))

        def one(*stacked):
            return jax.tree.map(lambda a: a[None], step(*(a[0] for a in stacked)))

        mapped = jax.shard_map(one, mesh=other, in_specs=P("ep"), out_specs=P("ep"))
        with pytest.raises(jax_ep.GroupError, match=r"dispatch: jax\.shard_map runs over the mesh"):
            jax.jit(jax.vmap(mapped, in_axes=1, spmd_axis_name="stage"))(*args)


def test_batches_along_any_axis_equal_a_loop(groups, compiled):
    group = groups(NUM_RANKS)
    step, args = make_step(group, "rank", "cpu"), make_args()
    last = [np.moveaxis(a, 1, -1) for a in args]
    got = on_ranks(jax.vmap(step, in_axes=-1, out_axes=-1), group.mesh)(*last)
    expected = one_by_one(compiled(make_step, "rank", "cpu"), args)
    assert_same(jax.tree.map(lambda a: np.moveaxis(np.asarray(a), -1, 1), got), expected)


def make_routed_echo(group, layout):
    """Makes a step from (x, ids) to the rows that come back; it compiles fast."""

    def echo(x, ids):
        out = send(group, layout, "cpu", x, ids, None)
        return jax_ep.combine(jnp.sin(out.x), out.handle, backend="cpu"), out.handle

    return echo


def test_batches_of_batches_equal_a_loop(groups, compiled, layout):
    """The outer and the inner batch may have different operands."""
    group, one = groups(NUM_RANKS), compiled(make_routed_echo, layout)
    step, (x, ids, _, _) = make_routed_echo(group, layout), make_args((2, BATCH))
    got = on_ranks(jax.vmap(jax.vmap(step)), group.mesh)(x, ids)
    expected = one_by_one(lambda *a: one_by_one(one, a), (x, ids), size=2)
    assert_same(got, expected)

    inner, outer = (0, None), (None, 0)
    nested = jax.vmap(jax.vmap(step, in_axes=inner), in_axes=outer)
    got = on_ranks(nested, group.mesh)(x[:, 0], ids[:, 0])
    expected = one_by_one(lambda *a: one_by_one(one, a, inner), (x[:, 0], ids[:, 0]), outer)
    assert_same(got, expected)


def test_an_empty_batch_gives_empty_results(groups, layout, backend):
    """Results and gradients have the right shapes and dtypes, without a custom call."""
    group = groups(NUM_RANKS)
    args, full = make_args((0,)), make_args((1,))
    for make in (make_step, make_grad):
        mapped = on_ranks(jax.vmap(make(group, layout, backend)), group.mesh)
        got, one = mapped(*args), jax.eval_shape(mapped, *full)
        for empty, like in zip(*map(jax.tree.leaves, (got, one)), strict=True):
            assert (empty.shape, empty.dtype) == ((NUM_RANKS, 0, *like.shape[2:]), like.dtype)
    if backend == "cpu":
        assert "custom_call @jax_ep" not in mapped.lower(*args).as_text()


def test_loops_of_batches_equal_a_loop(groups, compiled, layout):
    """Batches run in scan, and in lax.map: a scan over batches, and a rest."""
    group, one = groups(NUM_RANKS), compiled(make_routed_echo, layout)
    step, (x, ids, _, _) = make_routed_echo(group, layout), make_args((2, BATCH))

    def scanned(*args):
        return jax.lax.scan(lambda c, a: (c, jax.vmap(step)(*a)), 0, args)[1]

    got = on_ranks(scanned, group.mesh)(x, ids)
    assert_same(got, one_by_one(lambda *a: one_by_one(one, a), (x, ids), size=2))
    x, ids = x[:, 0], ids[:, 0]
    expected = one_by_one(one, (x, ids))
    for options in ({}, {"batch_size": 2}):
        mapped = partial(jax.lax.map, lambda a: step(*a), **options)
        assert_same(on_ranks(lambda *a, f=mapped: f(a), group.mesh)(x, ids), expected)


def test_jacobians_equal_a_loop(groups, layout):
    """jax.jacrev is a batch of backward passes."""
    group = groups(NUM_RANKS)
    x, ids, weights, _ = (a[:, 0] for a in make_args())

    def sent(x, ids, weights):
        return send(group, layout, "cpu", x, ids, weights).x[:2, :3]

    def rows_of(jacobian, x, ids, weights):
        if jacobian:
            return jax.jacrev(sent)(x, ids, weights)
        y, back = jax.vjp(lambda x: sent(x, ids, weights), x)
        basis = jnp.eye(y.size).reshape(y.size, *y.shape)
        return jnp.stack([back(ct)[0] for ct in basis]).reshape(*y.shape, *x.shape)

    got, expected = (
        on_ranks(partial(rows_of, j), group.mesh, check_vma=False)(x, ids, weights)
        for j in (True, False)
    )
    assert np.any(np.asarray(got))
    assert_same(got, expected)


def test_each_element_is_a_call_of_its_own(groups):
    """The calls run in order, and each has its own name in the program."""
    group = groups(NUM_RANKS)
    fn = on_ranks(jax.vmap(make_step(group, "expert", "cpu")), group.mesh)
    text = fn.lower(*make_args()).as_text()
    for op, count in (("dispatch", 2), ("pull_rows", 2), ("combine", 1)):
        calls = re.findall(rf'custom_call @jax_ep\.{op}\(.*?call = "([^"]*)"', text)
        assert len(set(calls)) == len(calls) == count * BATCH
    assert text.count("custom_call @jax_ep.get_dispatch_layout(") == BATCH


def test_bad_routing_of_one_element_is_reported():
    mesh = make_mesh(NUM_RANKS)
    group = jax_ep.Group.open(mesh, "ep", name="debug-vmap", debug=True)
    x, ids, weights, _ = make_args()
    ids[1, 2, 0, 0] = 77
    run = on_ranks(jax.vmap(lambda *a: send(group, "rank", "cpu", *a).x), mesh)
    y = run(x, ids, weights)
    with pytest.raises(jax_ep.RoutingError, match=r"^dispatch: "):
        group.check(y)
    group.close()


def test_second_derivatives_stay_refused(groups, layout):
    group = groups(NUM_RANKS)
    loss, args = make_loss(group, layout, "cpu"), make_args()
    twice = jax.vmap(jax.jacrev(jax.grad(loss)))
    with pytest.raises(jax_ep.ConfigError, match="only first derivatives"):
        on_ranks(twice, group.mesh)(*args)
    forward = jax.vmap(lambda *a: jax.jvp(lambda x: loss(x, *a[1:]), a[:1], a[:1])[1])
    with pytest.raises(TypeError, match="can't apply forward-mode"):
        on_ranks(forward, group.mesh)(*args)
