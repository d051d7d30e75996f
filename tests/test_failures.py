"""Failures of calls: the exception, the process that gets it, and the time."""

import copy
import pickle
import time

import jax
import numpy as np
import pytest
from steps import make_echo

import jax_ep
from jax_ep._src.base import errors
from jax_ep.testing.ranks import make_mesh, on_ranks


def test_a_missing_peer_ends_in_an_exception():
    """The exception names the missing rank, results are NaN, and a new group works."""
    x, ids = np.ones((3, 4, 8), np.float32), np.zeros((3, 4, 1), np.int32)
    group = jax_ep.Group.open(make_mesh(3), "ep", timeout=1.0)
    step = on_ranks(make_echo(group), group.mesh)
    step(x, ids).block_until_ready()
    group.check()

    group._native_group.handle.skip_rank(1)
    start = time.monotonic()
    y = step(x, ids)  # still in flight, so check waits for it
    with pytest.raises(jax_ep.PeerTimeoutError, match="waited for rank 1") as caught:
        group.check()
    assert time.monotonic() - start < group.timeout + 1.0
    assert np.isnan(np.asarray(y)).all()
    with pytest.raises(jax_ep.PeerTimeoutError):
        group.check(y)
    error = caught.value
    assert (error.op, error.peer, error.expected, error.seen) == ("dispatch", 1, 3, 2)
    assert error.place == "waits in no call of this group"

    # Later launches end at once, and no function can be traced.
    start = time.monotonic()
    assert np.isnan(np.asarray(step(x, ids))).all()
    assert time.monotonic() - start < group.timeout
    with pytest.raises(jax_ep.PeerTimeoutError):
        on_ranks(make_echo(group), group.mesh)(x, ids)
    with jax_ep.Group.open(make_mesh(3), "ep", name="next") as fresh:
        np.testing.assert_array_equal(on_ranks(make_echo(fresh), fresh.mesh)(x, ids), x)
    with pytest.raises(jax_ep.PeerTimeoutError), group:
        pass


@pytest.mark.parametrize("in_flight", [0, 3])
def test_compiled_functions_run_with_the_group_that_is_opened_again(in_flight):
    """Older launches that still wait belong to the group that failed, and do no harm."""
    x, ids = np.ones((3, 4, 8), np.float32), np.zeros((3, 4, 1), np.int32)
    group = jax_ep.Group.open(make_mesh(3), "ep", timeout=0.3)
    step = on_ranks(make_echo(group), group.mesh)
    step(x, ids).block_until_ready()
    for timeout in (0.4, 30.0):
        group._native_group.handle.skip_rank(1)
        with pytest.raises(jax_ep.PeerTimeoutError):
            group.check(step(x, ids))
        late = [step(x, ids) for _ in range(in_flight)]
        group.close()
        group = jax_ep.Group.open(make_mesh(3), "ep", timeout=timeout)
        assert all(np.isnan(np.asarray(y)).all() for y in late)
        y = step(x, ids)
        group.check(y)
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(on_ranks(make_echo(group), group.mesh)(x, ids), x)
    group.close()


OPERATIONS = {
    "all_reduce": lambda x, group: jax_ep.all_reduce(x, group=group),
    "reduce_scatter": lambda x, group: jax_ep.reduce_scatter(x, group=group),
    "all_gather": lambda x, group: jax_ep.all_gather(x, group=group),
    "all_reduce_residual_rmsnorm": lambda x, group: jax_ep.all_reduce_residual_rmsnorm(
        x, x, x[0], group=group, eps=1e-6
    ),
}


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_missing_peer_of_a_sum_is_named(op):
    """The exception names the operation, and all of its results are NaN."""
    group = jax_ep.Group.open(make_mesh(3), "ep", timeout=0.3)
    run = on_ranks(lambda x: OPERATIONS[op](x, group), group.mesh, check_vma=False)
    x = np.ones((3, 3, 8), np.float32)
    assert np.isfinite(jax.tree.leaves(run(x))[0]).all()
    group._native_group.handle.skip_rank(1)
    results = run(x)
    with pytest.raises(jax_ep.PeerTimeoutError, match="waited for rank 1") as caught:
        group.check(results)
    assert caught.value.op == op
    assert all(np.isnan(np.asarray(a)).all() for a in jax.tree.leaves(results))
    group.close()


def test_leaving_the_block_waits_for_programs_in_flight():
    x, ids = np.ones((3, 4, 8), np.float32), np.zeros((3, 4, 1), np.int32)
    group = jax_ep.Group.open(make_mesh(3), "ep", timeout=0.5)
    step = on_ranks(make_echo(group), group.mesh)
    step(x, ids)
    group._native_group.handle.skip_rank(2)

    def leave_in_flight():
        with group:
            return step(x, ids)

    with pytest.raises(jax_ep.PeerTimeoutError):
        leave_in_flight()


def test_a_failure_is_noted_on_the_exception_of_the_body():
    """After a failure results are NaN, and the body's own exception would not name the peer."""
    x, ids = np.ones((3, 4, 8), np.float32), np.zeros((3, 4, 1), np.int32)
    group = jax_ep.Group.open(make_mesh(3), "ep", timeout=0.5)
    step = on_ranks(make_echo(group), group.mesh)
    step(x, ids).block_until_ready()
    group._native_group.handle.skip_rank(2)

    def raise_of_nans():
        with group:
            if np.isnan(np.asarray(step(x, ids))).any():
                raise FloatingPointError("NaN")

    with pytest.raises(FloatingPointError) as caught:
        raise_of_nans()
    (note,) = caught.value.__notes__
    assert note.startswith(f"group {group.identity}: PeerTimeoutError: dispatch: rank ")
    assert "waited for rank 2 until the timeout" in note
    with pytest.raises(jax_ep.GroupError, match="is closed"):
        on_ranks(make_echo(group), group.mesh)(x, ids)


def test_a_body_that_raises_is_not_waited_for_nor_noted_twice():
    x, ids = np.ones((3, 4, 8), np.float32), np.zeros((3, 4, 1), np.int32)
    group = jax_ep.Group.open(make_mesh(3), "ep", timeout=2.0)
    step = on_ranks(make_echo(group), group.mesh)
    step(x, ids).block_until_ready()
    group._native_group.handle.skip_rank(2)
    launched = []

    def raise_in_flight():
        with group:
            launched.append(step(x, ids))
            raise ZeroDivisionError

    start = time.monotonic()
    with pytest.raises(ZeroDivisionError) as caught:
        raise_in_flight()
    assert time.monotonic() - start < 1.0
    assert not hasattr(caught.value, "__notes__")
    (y,) = launched
    y.block_until_ready()
    with pytest.raises(jax_ep.PeerTimeoutError) as caught, group:
        group.check(y)
    assert not hasattr(caught.value, "__notes__")


def test_the_place_where_a_rank_waits_instead_is_named():
    """Calls under a cond that differs between ranks never meet."""
    group = jax_ep.Group.open(make_mesh(3), "ep", timeout=0.5)

    def diverge(x):
        calls = [lambda x: jax_ep.all_gather(x, group=group)[0], make_sum(group)]
        return jax.lax.cond(jax.lax.axis_index("ep") < 1, *calls, x)

    y = on_ranks(diverge, group.mesh, check_vma=False)(np.ones((3, 8), np.float32))
    with pytest.raises(jax_ep.PeerTimeoutError) as caught:
        group.check(y)
    assert caught.value.place in {
        "waits in all_gather, where 1 of 3 ranks are",
        "waits in all_reduce, where 2 of 3 ranks are",
    }
    assert str(caught.value).endswith(f"; rank {caught.value.peer} {caught.value.place}")
    group.close()


def make_sum(group):
    return lambda x: jax_ep.all_reduce(x, group=group)


ERRORS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]


@pytest.mark.parametrize("kind", ERRORS)
def test_exceptions_can_be_pickled_and_copied(kind):
    if kind is jax_ep.PeerTimeoutError:
        error = kind("dispatch", 1, 2, expected=4, seen=3, is_lost=True)
    else:
        error = kind("dispatch: wrong")
    error.add_note("of step 7")
    pickles = [pickle.dumps(error, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for got in [copy.copy(error), copy.deepcopy(error), *map(pickle.loads, pickles)]:
        assert type(got) is kind
        assert (str(got), got.args, vars(got)) == (str(error), error.args, vars(error))
