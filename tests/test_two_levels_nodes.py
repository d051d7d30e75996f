"""Numbers of ranks, rows and places in groups with several nodes, up to 2,048 ranks."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep._src.base.group_spec import Cut, GroupSpec, Levels
from jax_ep._src.base.options import ExchangeMode, Layout
from jax_ep._src.base.spec import Route, Routes, RouteSpec
from jax_ep._src.ops.two_levels import parts
from jax_ep._src.ops.two_levels.nodes import Nodes

SIZES = [(2, 1), (3, 2), (4, 8), (256, 8)]
TOKENS = 1000  # of 2,048 ranks with 8 experts a token they are 16 million choices


def _ints(*values):
    return jnp.asarray(np.array(values, np.int32))


@pytest.mark.parametrize(("num_nodes", "per_node"), SIZES)
def test_places_at_forwarders_are_those_of_every_source(num_nodes, per_node):
    """The tokens of a source are a part of the rank of its rail: no two sources share a place."""
    nodes, num_ranks = Nodes(num_nodes, per_node), num_nodes * per_node
    source = np.arange(num_ranks, dtype=np.int64)
    token = (source * 37 + 5) % TOKENS
    index = _ints(*(source * TOKENS + token), -1)
    got = np.asarray(nodes.at_forwarders(index, TOKENS))
    assert got[-1] == -1
    part = (source % per_node) * num_nodes + source // per_node
    np.testing.assert_array_equal(got[:-1], part * TOKENS + token)
    assert sorted(part) == list(range(num_ranks))


@pytest.mark.parametrize(("num_nodes", "per_node"), SIZES)
def test_places_in_a_node_are_those_of_its_ranks(num_nodes, per_node):
    nodes, num_ranks = Nodes(num_nodes, per_node), num_nodes * per_node
    size = 2**31 // num_ranks - 1
    rank = np.arange(num_ranks, dtype=np.int64)
    index = _ints(*(rank * size + size - 1), -1)
    last = num_nodes - 1
    got = np.asarray(nodes.in_node(index, size, jnp.int32(last)))
    here = rank // per_node == last
    np.testing.assert_array_equal(got[:-1], np.where(here, rank % per_node * size + size - 1, -1))
    assert got[-1] == -1
    np.testing.assert_array_equal(nodes.node_of(index, size), [*(rank // per_node), -1])


@pytest.mark.parametrize(("num_nodes", "per_node"), SIZES)
def test_rails_read_what_is_meant_for_their_node(num_nodes, per_node):
    nodes = Nodes(num_nodes, per_node)
    node = num_nodes - 1
    same = np.asarray(nodes.on_rail(jnp.int32(node), TOKENS, has_parts=False), np.int64)
    own = np.asarray(nodes.on_rail(jnp.int32(node), TOKENS, has_parts=True), np.int64)
    rank, token = np.indices((num_nodes, TOKENS))
    np.testing.assert_array_equal(same, rank * TOKENS + token)
    np.testing.assert_array_equal(own, (rank * num_nodes + node) * TOKENS + token)


def test_rows_of_a_token_are_found_in_both_layouts():
    """Tokens with experts on ranks 0, 3, 4 of three nodes of two ranks, and without any."""
    nodes = Nodes(3, 2)
    send_row = np.full((2, 6), -1, np.int32)
    send_row[0, [0, 3, 4]] = 7, 8, 9
    expected = [[True, False], [True, False], [True, False]]
    np.testing.assert_array_equal(nodes.has_rows(None, jnp.asarray(send_row)), expected)
    by_node = nodes.columns_by_node(jnp.asarray(send_row))
    np.testing.assert_array_equal(by_node[1], [[-1, 8], [-1, -1]])
    np.testing.assert_array_equal(nodes.columns_of_ranks(by_node), send_row)

    ranks, rows = _ints([3, 0, 2], [5, 4, -1]), _ints([8, 7, -1], [1, -1, -1])
    expected = [[True, False], [True, False], [False, True]]
    np.testing.assert_array_equal(nodes.has_rows(ranks, rows), expected)
    rank, row = nodes.choices_in_node(ranks, rows, jnp.int32(1))
    np.testing.assert_array_equal(rank, [[1, -1, 0], [-1, -1, -1]])
    np.testing.assert_array_equal(row, [[8, -1, -1], [-1, -1, -1]])


def test_ids_outside_a_node_lead_nowhere():
    nodes = Nodes(256, 8)
    num_experts = 2048 * 4
    ids = _ints(-1, -2, num_experts, num_experts + 40, 0, 255 * 32 - 1, 255 * 32, num_experts - 1)
    got = nodes.experts_in_node(ids, jnp.int32(255), num_experts)
    np.testing.assert_array_equal(got, [-1, -1, -1, -1, -1, -1, 0, 31])


def test_places_that_int32_cannot_count_are_refused():
    Nodes(256, 8).require_places("dispatch", 32_767)
    with pytest.raises(jax_ep.ConfigError, match=r"^dispatch: with 256 nodes num_nodes \* num_nod"):
        Nodes(256, 8).require_places("dispatch", 32_768)


@pytest.mark.parametrize("is_rail", [False, True])
def test_parts_have_every_rank_once(is_rail):
    """Positions, index groups and names of ranks agree, in several slices and any axis order."""
    sizes = {"a": 2, "slice": 3, "b": 4}
    whole = GroupSpec("name", ("b", "a"), tuple(sizes.items()), tuple(range(100, 124)))
    cut = Cut(ranks_per_node=2, is_rail=is_rail)
    part = whole.cut_into(cut)
    assert part.num_ranks == (4 if is_rail else 2)
    assert part.identity != whole.cut_into(Cut(2, not is_rail)).identity
    groups = part.index_groups()
    assert groups is not None
    assert sorted(itertools.chain(*groups)) == list(range(8))
    for position, of_whole in zip(part.positions(), whole.positions(), strict=True):
        assert position.device == of_whole.device
        assert part.whole_rank(position.slice, position.rank) == of_whole.rank
        index = position.slice - of_whole.slice * len(groups)
        assert groups[index][position.rank] == of_whole.rank
    assert part.whole_rank(1, -1) == -1
    members = [(p.slice, p.rank) for p in part.positions()]
    assert len(set(members)) == 24


def test_parts_take_the_kernels_for_many_tokens():
    """Kernels for few tokens would add in another order, or need room in every part."""
    spec = _spec(mode=None, backend="cuda", inside="cuda", between="xla")
    assert spec.is_split
    assert parts.in_node(spec).mode is ExchangeMode.THROUGHPUT
    assert parts.in_node(spec).group.num_ranks == 2
    assert parts.in_node(spec).backend == "cuda"
    rail = parts.on_rail(spec, num_rows=8)
    assert rail.mode is ExchangeMode.THROUGHPUT
    assert (rail.group.num_ranks, rail.layout, rail.backend) == (3, Layout.RANK, "xla")
    assert not _spec(mode=ExchangeMode.LOW_LATENCY, backend="cuda").is_split
    of_xla = _spec(mode=None, backend="xla", inside="cuda", between="cuda")
    assert parts.in_node(of_xla).backend == parts.on_rail(of_xla, 8).backend == "xla"


def _spec(*, mode, backend, inside="cuda", between="cuda"):
    whole = GroupSpec("name", ("ep",), (("ep", 6),), tuple(range(6)))
    node, rail = (whole.cut_into(Cut(2, is_rail)) for is_rail in (False, True))
    return RouteSpec(
        group=dataclasses.replace(whole, levels=Levels(node, rail, inside, between)),
        routes=Routes(*3 * [Route(backend, 16)]),
        layout=Layout.EXPERT,
        recv_capacity=10,
        op="combine",
        mode=mode,
        few_sms=None,
    )
