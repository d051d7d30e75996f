"""Opening and closing of groups with several nodes, their failures, and their processes."""

import pickle
import time

import numpy as np
import pytest
from process_programs import has_passed, run_on_cpus
from steps import make_echo

import jax_ep
from jax_ep._src.base import registry
from jax_ep._src.opening import levels, self_test
from jax_ep.testing.ranks import make_mesh, on_ranks

pytestmark = pytest.mark.dealt
X, IDS = np.ones((4, 4, 8), np.float32), np.zeros((4, 4, 1), np.int32)


def _open(**options):
    return jax_ep.Group.open(make_mesh(4), "ep", name="nodes", **options)


def test_info_says_what_carries_rows_between_and_inside_nodes():
    with _open(ranks_per_node=2) as group:
        info = group.info()
        assert info.transport == (
            "mapped: ranks of different nodes read one another's memory, back end 'cpu'; inside "
            "the nodes back end 'cpu'"
        )
        assert info.ranks_per_node == 2
        assert group.spec.num_nodes == 2
    with _open(ranks_per_node=2, backend="xla") as group:
        assert group.info().transport.startswith("xla: JAX's collectives, also inside the nodes")
    with _open() as group:
        assert group.info().transport is None
        assert group.parts == ()
        assert group.spec.num_nodes == 1


def test_a_group_closes_its_parts_and_opens_with_other_nodes():
    """Compiled functions keep the parts that they use, as they keep the group."""
    echoes = {}
    for ranks_per_node in (2, 1, 4, 2):
        group = _open(ranks_per_node=ranks_per_node)
        assert len(group.parts) == (0 if ranks_per_node == 4 else 2)
        assert pickle.loads(pickle.dumps(group)) is group
        assert registry.open_groups[group.identity] is group
        assert not any(part.identity in registry.open_groups for part in group.parts)
        echo = on_ranks(make_echo(group), group.mesh)
        np.testing.assert_array_equal(echo(X, IDS), X)
        group.check()
        group.close()
        assert not any(part._is_open for part in group.parts)
        echoes[ranks_per_node] = echo
    for echo in echoes.values():
        np.testing.assert_array_equal(echo(X, IDS), X)


@pytest.mark.parametrize("failing", ["nodes", "rails"])
def test_a_part_that_cannot_open_leaves_nothing(monkeypatch, failing):
    def run(group, rendezvous):
        if failing in group.identity:
            raise MemoryError("no room")
        self_test.run(group, rendezvous)

    with monkeypatch.context() as patched:
        patched.setattr(levels, "self_test", type("", (), {"run": staticmethod(run)}))
        with pytest.raises(MemoryError, match="no room"):
            _open(ranks_per_node=2)
    with _open(ranks_per_node=2) as group:
        np.testing.assert_array_equal(on_ranks(make_echo(group), group.mesh)(X, IDS), X)


@pytest.mark.parametrize(("part", "distance"), [(0, 1), (1, 2)])
def test_failures_of_parts_name_ranks_of_the_group(part, distance):
    """Rank 1 of every node does not come, or every rank of node 1: its peer waits for it."""
    group = _open(ranks_per_node=2, timeout=1.0)
    step = on_ranks(make_echo(group), group.mesh)
    step(X, IDS).block_until_ready()
    group.check()
    group.parts[part]._native_group.handle.skip_rank(1)
    start = time.monotonic()
    with pytest.raises(jax_ep.PeerTimeoutError) as caught:
        group.check(step(X, IDS))
    assert time.monotonic() - start < 2 * group.timeout + 1.0
    error = caught.value
    assert error.op in ("dispatch", "combine")
    assert error.peer - error.rank == distance
    assert error.rank in {1: (0, 2), 2: (0, 1)}[distance]
    assert (error.expected, error.seen) == (2, 1)
    with pytest.raises(jax_ep.PeerTimeoutError):
        on_ranks(make_echo(group), group.mesh)(X, IDS)
    group.close()


def test_a_rank_that_does_not_come_leaves_nan():
    """It is missing in all parts."""
    group = _open(ranks_per_node=2, timeout=0.5)
    step = on_ranks(make_echo(group), group.mesh)
    step(X, IDS).block_until_ready()
    for each in (group, *group.parts):
        each._native_group.handle.skip_rank(1)
    assert np.isnan(np.asarray(step(X, IDS))).all()
    with pytest.raises(jax_ep.PeerTimeoutError):
        group.check()
    group.close()


def test_operations_find_their_back_end_in_several_processes():
    """Nodes that are hosts have custom calls inside; nodes of one host have them everywhere."""
    names = [
        "gradients_to_the_bit[layout=expert,dtype=bf16,capacity=half,weights_at=tokens]",
        "other_rows_along_a_handle[layout=rank,capacity=half]",
    ]
    why = "a slice of the mesh spans hosts or containers: {0: 'host0', 1: 'host1'}"
    outputs = run_on_cpus("two_levels", "1", *names)
    for output in outputs:
        assert has_passed(output)
        assert "UserWarning: Group.open: group" not in output
        lines = output.splitlines()
        assert f"xla: JAX's collectives ({why}); inside the nodes back end 'cpu'" in lines
        assert any(
            line.startswith("usable for dispatch, dispatch_fp8, combine, combine_weights")
            and line.endswith(f"only, inside the nodes: {why}")
            for line in lines
        )
        assert any(
            line.startswith("all_reduce: backend 'cpu' is not usable here") for line in lines
        )
        assert sum(line.startswith("mapped: ") for line in lines) == 2
