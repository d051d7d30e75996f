"""The benchmark of dispatches and combines: its contenders, its chains, and its floor."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ep._src.base.errors import ConfigError
from jax_ep.bench import floor, timing
from jax_ep.bench.contenders import (
    contenders,
    low_latency_payload,
    ours,
    ragged_all_to_all,
    takes_few,
)
from jax_ep.bench.shapes import Shape, make_inputs, make_point
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_ranks

ALL_OPS = ["dispatch", "combine", "round_trip", "cached_dispatch"]


def _point(layout, *, num_ranks=4, dtype="f32", hidden=32, balance="auto", alignment=1):
    shape = Shape(tokens=48, hidden=hidden, topk=3, experts=num_ranks * 4)
    return make_point(
        "test",
        shape,
        dtype=dtype,
        layout=layout,
        num_ranks=num_ranks,
        balance=balance,
        fill="zeros",
        alignment=alignment,
    )


def test_the_layout_decides_the_default_capacity():
    assert _point("rank").recv_capacity == 48 * 4
    assert _point("expert").recv_capacity == 48 * 3 * 5 // 4
    assert _point("expert", balance=None).recv_capacity == 48 * 4 * 3
    assert _point("expert", alignment=8).recv_capacity == 48 * 3 * 5 // 4 + 4 * 7
    assert _point("expert", alignment=8).expert_alignment == 8
    assert _point("rank", alignment=8).expert_alignment == 1
    assert _point("expert", dtype="bf16").row_bytes == 32 * jnp.dtype(jnp.bfloat16).itemsize


@pytest.mark.parametrize(
    ("max_nodes", "ranks_per_node", "expected"),
    [(None, 1, 3), (2, 1, 2), (1, 2, 1), (2, 2, 2), (2, None, 1), (4, 1, 3)],
)
def test_routing_keeps_to_the_nodes_of_the_shape(max_nodes, ranks_per_node, expected):
    point = dataclasses.replace(_point("rank"), max_nodes=max_nodes)
    _, ids, _ = make_inputs(point, make_mesh(4), ranks_per_node=ranks_per_node)
    nodes = np.sort(np.asarray(ids) // (4 * (ranks_per_node or 4)), axis=-1)
    assert np.max(1 + (np.diff(nodes, axis=-1) > 0).sum(axis=-1)) == expected


@pytest.mark.parametrize("max_nodes", [0, 1])
def test_routing_needs_enough_experts_on_the_nodes(max_nodes):
    point = dataclasses.replace(_point("rank"), max_nodes=max_nodes, num_topk=5)
    with pytest.raises(ConfigError, match=f"cannot be on at most {max_nodes} of 4 nodes"):
        make_inputs(point, make_mesh(4), ranks_per_node=1)


@pytest.mark.parametrize(
    ("layout", "platform", "processes", "names"),
    [
        ("rank", "gpu", [0, 0], ["all_gather"]),
        ("expert", "cpu", [0, 0], ["all_to_all"]),
        ("expert", "gpu", [0, 0], ["all_to_all", "ragged_all_to_all"]),
        ("expert", "gpu", [0, 1], ["all_to_all"]),
    ],
)
def test_stock_contenders_are_those_that_xla_has(layout, platform, processes, names):
    devices = [types.SimpleNamespace(platform=platform, process_index=i) for i in processes]
    mesh = types.SimpleNamespace(devices=np.array(devices))
    group = types.SimpleNamespace(mesh=mesh, axes=("ep",))
    assert [c.name for c in contenders(_point(layout), group, [])] == names


def _ragged_all_to_all(rows, out, first_in, send, first_out, recv, *, axis_name):
    """Stands for lax.ragged_all_to_all, which XLA does not have for CPUs."""
    me = jax.lax.axis_index(axis_name)
    rows, first_in, send, first_out = (
        jax.lax.all_gather(a, axis_name) for a in (rows, first_in, send, first_out)
    )
    i = jnp.arange(out.shape[0])
    for src in range(rows.shape[0]):
        nth = i - first_out[src, me]
        is_sent = (nth >= 0) & (nth < send[src, me])
        sent = rows[src, jnp.clip(first_in[src, me] + nth, 0, rows.shape[1] - 1)]
        out = jnp.where(is_sent[:, None], sent, out)
    return out


@pytest.mark.parametrize("contender", ["all_to_all", "ragged_all_to_all", "all_gather"])
def test_stock_contenders_compute_the_same(groups, contender, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", _ragged_all_to_all)
    layout = "rank" if contender == "all_gather" else "expert"
    group, point = groups(4), _point(layout, balance=None)
    inputs = make_inputs(point, group.mesh)

    def run(contender):
        def both(x, ids, weights):
            out = contender.dispatch(x, ids, weights)
            return out, contender.combine(out)

        return on_ranks(both, group.mesh, check_vma=False)(*inputs)

    us, stock = contenders(point, group, [("cpu", None)])
    if contender.startswith("ragged"):
        stock = ragged_all_to_all(point, group.axes)
    assert stock.name == contender
    (out, y), (other, other_y) = run(us), run(stock)
    other = other.exchanged if contender.startswith("ragged") else other
    assert not np.any(out.num_dropped)
    if layout == "expert":
        assert_same_bits(other.group_sizes, out.group_sizes, what="group_sizes")
        for got, expected, num_recv in zip(other.rows, out.x, out.num_recv, strict=True):
            n = int(num_recv[0])
            assert_same_bits(got[:n], expected[:n], what="rows")
            assert not np.any(got[n:])
    else:
        for got, expected, src in zip(other.rows, out.x, out.handle.recv_src, strict=True):
            assert_same_bits(got[src[src >= 0]], expected[src >= 0], what="rows")
    np.testing.assert_allclose(other_y, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_fp8_rows_and_scales_arrive_alike(groups, layout):
    group, point = groups(4), _point(layout, dtype="fp8", hidden=256, balance=None)
    assert point.row_bytes == 256 + 8
    inputs = make_inputs(point, group.mesh)
    us, stock = contenders(point, group, [("cpu", None)])
    out, other = (on_ranks(c.dispatch, group.mesh, check_vma=False)(*inputs) for c in (us, stock))
    for ours_, theirs in zip((out.x, out.scales), other.rows, strict=True):
        for got, expected, src in zip(theirs, ours_, out.handle.recv_src, strict=True):
            if layout == "rank":
                assert_same_bits(got[src[src >= 0]], expected[src >= 0])
            else:
                n = int(np.sum(src >= 0))
                assert_same_bits(got[:n], expected[:n])


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize(("layout", "unroll"), [("expert", 1), ("rank", 2)])
def test_chain_computes_the_operation(groups, op, layout, unroll):
    """Links of a chain compute the timed operation, and the empty chain changes nothing."""
    group, point = groups(2), _point(layout, num_ranks=2)
    program = timing.make_program(op, ours(point, group, "cpu", None))
    inputs = make_inputs(point, group.mesh)

    def run(link, count):
        def chain(*own):
            chained = timing.make_chain(op, link, count, unroll=unroll)
            return chained(program.start(*own))

        return on_ranks(chain, group.mesh, check_vma=False)(*inputs)

    start = on_ranks(program.start, group.mesh, check_vma=False)(*inputs)
    by_hand = on_ranks(lambda c: program.run(*c), group.mesh, check_vma=False)
    expected = start
    for _ in range(3):
        expected = timing.Carry(start.given, by_hand(expected))
    for link, end in {program.run: expected, timing.no_op: start}.items():
        for got, want in zip(jax.tree.leaves(run(link, 3)), jax.tree.leaves(end), strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_nothing_is_hoisted_out_of_a_chain(groups, op, layout):
    """Every collective is in the loop, none in the entry computation."""
    group, point = groups(2), _point(layout, num_ranks=2)
    inputs = make_inputs(point, group.mesh)
    for contender in contenders(point, group, [("xla", None)]):
        if op == "cached_dispatch" and contender.again is None:
            continue
        program = timing.make_program(op, contender)
        start = on_ranks(program.start, group.mesh, check_vma=False)(*inputs)
        chain = on_ranks(timing.make_chain(op, program.run, 4), group.mesh, check_vma=False)
        text = chain.lower(start).compile().as_text()
        entry = text[text.index("\nENTRY ") :].partition("\n}")[0]
        for name in ("all-gather(", "all-to-all(", "reduce-scatter("):
            assert name not in entry, contender.name
        assert "all-gather(" in text or "all-to-all(" in text or "reduce-scatter(" in text


def test_kernels_for_few_tokens_need_room_for_the_worst_case(groups):
    group = groups(2)
    point = _point("expert", num_ranks=2)
    worst = dataclasses.replace(point, balance=None)
    entries = [("cuda", None)]

    def offered(point, room, entries=entries):
        spec = dataclasses.replace(group.spec, low_latency_room=room)
        wide = types.SimpleNamespace(spec=spec)
        return takes_few(point, wide, entries)

    room = low_latency_payload(worst)
    assert offered(worst, room)
    assert not offered(worst, room - 1)
    assert not offered(dataclasses.replace(worst, balance=1.25), room)
    assert not offered(dataclasses.replace(worst, expert_alignment=8), room)
    assert not offered(worst, room, [("cpu", None)])


RECV_SRC = np.array([[1, 3, -1, -1], [0, 0, 1, 2]])


def test_floors_count_bytes_right():
    shape = Shape(tokens=2, hidden=8, topk=2, experts=4)
    point = make_point(
        "hand", shape, dtype="f32", layout="expert", num_ranks=2, balance=None, fill="zeros"
    )
    assert point.row_bytes == 32
    expected = {
        # Numbers of rows: wire, read, read_once, written.
        "dispatch": ([1, 2], [2, 4], [2, 3], [2, 4]),
        "cached_dispatch": ([1, 2], [2, 4], [2, 3], [2, 4]),
        "combine": ([2, 1], [2, 4], [2, 4], [2, 2]),
        "round_trip": ([3, 3], [4, 8], [4, 7], [4, 6]),
    }
    for op, rows in expected.items():
        moved = floor.traffic(op, point, RECV_SRC)
        got = (moved.wire, moved.read, moved.read_once, moved.written)
        np.testing.assert_array_equal(np.array(got), np.array(rows) * 32, err_msg=op)
    moved = floor.traffic("dispatch", point, RECV_SRC)
    assert floor.cpu_floor_us(moved, 1e6) == pytest.approx(6 * 32)  # six rows copied, 1 byte/us
    hbm = 7 * 32 / (2 * floor.HBM_COPY_BYTES_PER_S)
    wire = 2 * 32 / floor.NVLINK_BYTES_PER_S
    assert floor.gpu_floor_us(moved) == pytest.approx(1e6 * max(hbm, wire))
