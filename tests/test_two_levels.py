"""Groups with several nodes: dispatch and combine in two levels, on virtual nodes of one host."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jax_ep
from jax_ep import reference
from jax_ep._src.ops.two_levels import transport
from jax_ep.testing import conformance
from jax_ep.testing.cases import Case, dispatch, expected_sums, make_data, plan_of, round_trip
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_group

pytestmark = pytest.mark.dealt
BY_NAME = {check.name: check for check in conformance.FULL}
OPS = {"dispatch", "combine", "combine_weights", "dispatch_fp8"}
ALL = [check for check in conformance.CHECKS if check.ops <= OPS]
SHAPES = ((2, 1), (2, 2), (2, 4), (4, 2), (3, 2), (1, 4))
# Nodes, ranks of a node, back end and check. Other checks are slow ones.
CHOSEN = (
    (2, 1, "cpu", "gradients_to_the_bit[layout=expert,dtype=bf16,capacity=half,weights_at=tokens]"),
    (2, 2, "cpu", "round_trip[layout=rank,dtype=bf16,num_topk=3,capacity=short,"),
    (3, 2, "xla", "gradients_to_the_bit[layout=expert,dtype=f32,capacity=half,weights_at=rows]"),
    (3, 2, "cpu", "gradients_to_the_bit[layout=expert,dtype=f32,capacity=half,weights_at=rows]"),
    (2, 2, "cpu", "other_widths_along_a_handle[layout=expert]"),
    (2, 4, "cpu", "round_trip[layout=expert,dtype=bf16,num_topk=8,capacity=one,"),
    (4, 2, "cpu", "gradients_to_the_bit[layout=rank,dtype=bf16,capacity=half]"),
    (4, 2, "xla", "round_trip[layout=rank,dtype=bf16,num_topk=2,capacity=exact,"),
    (4, 2, "cpu", "subnormals_are_kept[layout=rank,dtype=f32]"),
    (3, 2, "cpu", "combine_weights[layout=expert,capacity=half]"),
    (3, 2, "xla", "combine_weights[layout=rank,capacity=half]"),
    (3, 2, "cpu", "gradients_through_layers[layout=expert,check_vma=True]"),
    (3, 2, "cpu", "fp8_pair_and_payload[layout=rank,fp8=e4m3fn,scales=f32,fill=zeros]"),
    (2, 2, "cpu", "low_latency_round_trip[layout=expert,"),
)  # fmt: skip


@pytest.fixture(scope="module")
def noded():
    """noded(num_nodes, ranks_per_node): returns a group, open for the whole module."""
    opened = []

    @functools.cache
    def get(num_nodes, ranks_per_node):
        mesh = make_mesh(num_nodes * ranks_per_node)
        name = f"{num_nodes} nodes"
        opened.append(
            jax_ep.Group.open(mesh, "ep", name=name, timeout=120.0, ranks_per_node=ranks_per_node)
        )
        return opened[-1]

    yield get
    for group in opened:
        group.check()
        group.close()


@pytest.mark.parametrize(("num_nodes", "per_node", "backend", "name"), CHOSEN)
def test_back_ends_pass_the_suite_on_nodes(noded, num_nodes, per_node, backend, name):
    check = next(check for check in conformance.FULL if check.name.startswith(name))
    check(noded(num_nodes, per_node), backend)


@pytest.mark.slow
@pytest.mark.parametrize("check", ALL, ids=str)
@pytest.mark.parametrize(("num_nodes", "per_node"), SHAPES)
def test_back_ends_pass_the_full_suite_on_nodes(noded, backend, num_nodes, per_node, check):
    group = noded(num_nodes, per_node)
    if check.not_usable(group, backend) is None:
        check(group, backend)


@pytest.mark.parametrize(
    ("backend", "layout"), [("cpu", "rank"), ("cpu", "expert"), ("xla", "rank")]
)
def test_nodes_add_up_before_their_sums_cross(noded, groups, backend, layout):
    """The data shows both trees, so either would be seen where the other belongs."""
    case = Case(4, layout, num_topk=8, weights_at=None if layout == "rank" else "rows")
    data = make_data(case, "balanced")
    plan = plan_of(case, data.topk_idx)
    at = None if layout == "rank" else reference.dispatch_weights(plan, data.topk_weights)
    sums = {n: reference.combine(plan, data.rows, at, ranks_per_node=n) for n in (1, 2, 4, None)}
    assert_same_bits(sums[4], sums[None])
    assert (sums[2] != sums[None]).any()
    assert (sums[1] != sums[2]).any()
    of_group = {noded(2, 2): 2, groups(4): None}
    outs = {}
    for group, per_node in of_group.items():
        outs[per_node], y = round_trip(case, group, backend)(*data.operands())
        assert_same_bits(y, sums[per_node], what=f"sums of nodes of {per_node}")
    for two, one in zip(*(jax.tree.leaves(out) for out in outs.values()), strict=True):
        assert_same_bits(two, np.asarray(one), what="dispatch")


def test_rows_cross_once_to_each_node(noded, monkeypatch, layout):
    """Counts the rows that forwarders pull and sources add, by the pair of rank and node.

    They are what get_dispatch_layout counts: a row for each token and node, however many experts
    and ranks it has there. The same holds along a handle.
    """
    num_nodes, per_node = 2, 4
    group = noded(num_nodes, per_node)
    case = Case(8, layout, num_topk=6, hidden=16, ranks_per_node=per_node)
    data = make_data(case, "masked")
    seen: dict[str, list[Any]] = {"forwarders": [], "sources": []}

    def note(kind, rank, counts):
        seen[kind].append((int(rank), np.asarray(counts)))

    pull, add = transport.pull_rows, transport.combine

    def count_pulled(call, index, rows):
        if rows.shape[1:] == (case.hidden,):
            by_node = jnp.sum(index.reshape(num_nodes, -1) >= 0, axis=1)
            jax.debug.callback(
                functools.partial(note, "forwarders"), jax.lax.axis_index("ep"), by_node
            )
        return pull(call, index, rows)

    def count_added(spec, index, *operands):
        by_node = jnp.sum(index.send_row >= 0, axis=0)
        jax.debug.callback(functools.partial(note, "sources"), jax.lax.axis_index("ep"), by_node)
        return add(spec, index, *operands)

    monkeypatch.setattr(transport, "pull_rows", count_pulled)
    monkeypatch.setattr(transport, "combine", count_added)

    def run(x, ids):
        out = dispatch(case, group, "cpu", x, ids)
        again = jax_ep.dispatch(x, handle=out.handle, backend="cpu")
        return jax_ep.combine(again.x, out.handle, backend="cpu")

    y = on_group(run, group)(data.x, data.topk_idx)
    jax.effects_barrier()
    plan = plan_of(case, data.topk_idx)
    assert_same_bits(y, expected_sums(case, plan, reference.dispatch(plan, data.x)))
    _, per_node_counts, _, _ = reference.get_dispatch_layout(
        data.topk_idx, num_experts=case.num_experts, ranks_per_node=per_node
    )
    num_rows = int(np.sum(plan.send_row >= 0))
    assert 0 < int(np.sum(per_node_counts)) < min(num_nodes * 8 * case.num_tokens, num_rows)
    assert len(seen["sources"]) == 8
    for rank, counts in seen["sources"]:
        np.testing.assert_array_equal(counts, per_node_counts[rank])
    assert len(seen["forwarders"]) == 2 * 8  # the dispatch, and that along the handle
    for rank, counts in seen["forwarders"]:
        node, local = divmod(rank, per_node)
        sources = [n * per_node + local for n in range(num_nodes)]
        np.testing.assert_array_equal(counts, per_node_counts[sources, node])


def test_nodes_on_other_meshes(backend):
    """Two slices side by side, and ranks along two axes in another order than the mesh's."""
    devices = np.array(jax.devices())[[3, 0, 6, 1, 7, 2, 5, 4]].reshape(2, 2, 2)
    mesh = Mesh(devices, ("a", "slice", "b"))
    check = BY_NAME["gradients_to_the_bit[layout=rank,dtype=bf16,capacity=half]"]
    with jax_ep.Group.open(mesh, ("b", "a"), name="nodes", ranks_per_node=2) as group:
        check(group, backend)


def test_batches_run_in_two_levels(noded):
    """vmap makes one call for each element; the results are those of calls in a row."""
    group = noded(2, 2)
    case = Case(4, "expert", hidden=16, dtype="f32")
    batch = [make_data(case, routing) for routing in ("balanced", "masked")]
    xs, ids = (np.stack([getattr(d, n) for d in batch], axis=1) for n in ("x", "topk_idx"))

    def run(x, ids):
        def loss(x):
            out = dispatch(case, group, "cpu", x, ids)
            return jnp.sum(jax_ep.combine(out.x, out.handle, backend="cpu") ** 2)

        return jax.grad(loss)(x)

    def both(xs, ids):
        return jax.vmap(run)(xs, ids), jnp.stack([run(xs[i], ids[i]) for i in range(2)])

    mapped, in_a_row = on_group(both, group)(xs, ids)
    assert_same_bits(mapped, np.asarray(in_a_row))
    assert np.asarray(mapped).any()
