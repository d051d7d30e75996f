"""check(): failures of JAX's programs, and arrays that are deleted during the wait."""

import gc
import threading
import time
from contextlib import suppress

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import jax_ep
from jax_ep._src.base import jax_compat
from jax_ep._src.processes import wait
from jax_ep.testing.ranks import make_mesh, on_ranks

X = np.ones((3, 4, 8), np.float32)


def open_group(name, **settings):
    return jax_ep.Group.open(make_mesh(3), "ep", name=name, timeout=5.0, **settings)


def refuse(value):
    raise ValueError("no such value")


def refuse_shown(x):
    jax.debug.callback(refuse, x[0, 0])
    return x


def refuse_ordered(x):
    return x + io_callback(refuse, jax.ShapeDtypeStruct((), x.dtype), x[0, 0], ordered=False)


def refuse_pure(x):
    return x + jax.pure_callback(refuse, jax.ShapeDtypeStruct((), x.dtype), x[0, 0])


CALLBACKS = {"debug": refuse_shown, "io": refuse_ordered, "pure": refuse_pure}


@pytest.fixture(params=CALLBACKS)
def callback(request):
    return CALLBACKS[request.param]


def launch(group, callback, x=X):
    """Launches a step that fails on every rank, after the group's call."""
    return on_ranks(lambda x: callback(jax_ep.all_reduce(x, group=group)), group.mesh)(x)


def assert_is_fresh(name):
    """Asserts that a new group meets no earlier failure."""
    with open_group(name) as group:
        y = on_ranks(lambda x: jax_ep.all_reduce(x, group=group), group.mesh)(X)
        group.check(y)
        group.check()
        np.testing.assert_array_equal(y, 3 * X)


@pytest.mark.parametrize("explicit", [True, False])
def test_a_callback_that_raises_is_raised_once(callback, explicit):
    """check raises a ProgramError once. `y` lives on, and JAX would raise at every look at it."""
    group = open_group("raises")
    y = launch(group, callback)
    with pytest.raises(jax_ep.ProgramError, match="no such value") as caught:
        group.check(*([y] if explicit else []))
    assert isinstance(caught.value, jax_ep.JaxEpError)
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)
    group.check()
    assert_is_fresh("after raises")
    # A check of its results raises again, and so does the next launch.
    with pytest.raises(jax_ep.ProgramError):
        group.check(y)
    again = launch(group, callback)
    with pytest.raises(jax_ep.ProgramError):
        group.check()
    group.check()
    # The group still works.
    np.testing.assert_array_equal(
        on_ranks(lambda x: jax_ep.all_reduce(x, group=group), group.mesh)(X), 3 * X
    )
    del y, again
    group.close()


def test_effects_alone_are_raised_once():
    """Nobody holds the results; JAX keeps the failure with the thread's effects."""
    group = open_group("effects")
    launch(group, refuse_shown)
    with pytest.raises(jax_ep.ProgramError, match="no such value"):
        group.check()
    group.check()
    assert_is_fresh("after effects")
    group.close()


class Failed:
    """A failed token of an earlier program; JAX before 0.12 keeps it after it has raised."""

    def block_until_ready(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: of an earlier program")


@pytest.fixture
def failed_effects():
    """Plants failed tokens of two devices, with different errors."""
    tokens = jax_compat.dispatch.runtime_tokens
    for device in jax.devices()[:2]:
        tokens.set_output_runtime_token(device, Failed())
    yield tokens
    tokens.clear()


def test_all_failed_effects_are_raised_and_dropped(failed_effects, groups):
    assert len(jax_compat.wait_for_effects()) == 2
    assert not failed_effects.output_runtime_tokens
    groups(3).check()


def test_opening_a_group_leaves_earlier_effects_to_others(failed_effects):
    """Opening a group does not raise earlier failures; they are still raised afterwards."""
    group = open_group("opens beside")
    with pytest.raises(jax_ep.ProgramError, match="of an earlier program"):
        group.check()
    group.close()


def test_the_record_of_the_group_comes_first():
    """If a rank's callback raises, the rank never joins the call, and the others wait for it."""
    group = jax_ep.Group.open(make_mesh(3), "ep", name="record", timeout=1.0)

    def refuse_on_1(value, rank):
        if rank == 1:
            refuse(value)
        return value

    def step(x):
        rank = jax.lax.axis_index("ep")
        x = jax.pure_callback(refuse_on_1, jax.ShapeDtypeStruct(x.shape, x.dtype), x, rank)
        return jax_ep.all_reduce(x, group=group)

    y = on_ranks(step, group.mesh)(X)
    with pytest.raises(jax_ep.PeerTimeoutError, match="waited for rank 1") as caught:
        group.check(y)
    assert "no such value" in str(caught.value.__cause__)
    with pytest.raises(jax_ep.PeerTimeoutError):
        group.check()
    assert_is_fresh("after record")
    group.close()


@pytest.mark.parametrize("wraps", [False, True])
def test_a_block_left_by_what_jax_raised_leaves_nothing_behind(callback, wraps):
    held = []

    def body():
        with open_group("left") as group:
            held.append(launch(group, callback))
            try:
                np.asarray(held[0])
            except jax.errors.JaxRuntimeError as e:
                if wraps:
                    raise KeyError("step 7") from e
                raise

    with pytest.raises(KeyError if wraps else jax.errors.JaxRuntimeError):
        body()
    assert_is_fresh("after left")


def test_a_block_left_by_another_exception_keeps_failures():
    def body():
        with open_group("left otherwise") as group:
            launch(group, refuse_shown)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    with open_group("next") as group, pytest.raises(jax_ep.ProgramError):
        group.check()


def test_the_end_of_a_block_raises_once():
    def body():
        with open_group("ends") as group:
            return launch(group, refuse_shown)

    with pytest.raises(jax_ep.ProgramError):
        body()
    assert_is_fresh("after ends")


# --- Arrays that are deleted, or donated, after they were listed and before they were waited for.


def settle(arrays):
    return wait.settle(arrays, failure=lambda: None, loss=lambda: None, timeout=1.0)


@pytest.fixture(params=[wait.wait, settle], ids=["one process", "several"])
def waits(request):
    return request.param


def donate(x):
    return jax.jit(jnp.negative, donate_argnums=0)(x)


ENDS = {"deleted": lambda x: x.delete(), "donated": donate}


@pytest.fixture(params=ENDS)
def end(request):
    return ENDS[request.param]


@pytest.mark.parametrize("hook", ["block_until_ready", "is_ready"])
def test_arrays_deleted_during_the_wait_are_skipped(monkeypatch, waits, end, hook):
    gone, kept = jnp.ones(3) + 1, jnp.ones(3) + 2
    owner = jax if hook == "block_until_ready" else jax_compat
    original = getattr(owner, hook)

    def end_first(x):
        if not gone.is_deleted():
            end(gone)
        return original(x)

    monkeypatch.setattr(owner, hook, end_first)
    assert waits([gone, kept]) == []
    end_first(kept)
    assert gone.is_deleted()


def test_an_array_being_donated_is_skipped(monkeypatch, waits):
    """JAX refuses a look at the array a moment before it calls the array deleted."""
    going, kept = jnp.ones(3) + 1, jnp.ones(3) + 2

    def refuse_going(x):
        if x is going or isinstance(x, list):
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: of a deleted or donated buffer")
        return x

    monkeypatch.setattr(jax, "block_until_ready", refuse_going)
    assert waits([going, kept]) == []
    assert not going.is_deleted()


def test_deleted_arrays_are_skipped(groups, waits, end):
    gone = jnp.ones(3) + 1
    end(gone)
    assert waits([gone, jnp.ones(3)]) == []
    groups(3).check(gone)
    groups(3).check({"state": (gone, 3, None)})


def test_live_arrays_may_be_deleted_while_they_are_listed(monkeypatch, groups, end):
    gone = jnp.ones(3) + 1
    live = jax.live_arrays

    def end_after_listing():
        arrays = live()
        end(gone)
        assert any(a is gone for a in arrays)
        return arrays

    monkeypatch.setattr(jax, "live_arrays", end_after_listing)
    groups(3).check()


def test_failures_are_raised_although_other_arrays_are_deleted(waits, groups):
    gone = jnp.ones(3) + 1
    gone.delete()
    y = launch(groups(3), refuse_pure)
    (problem,) = {str(p) for p in waits([gone, y, jnp.ones(3)])}
    assert "no such value" in problem
    with pytest.raises(jax_ep.ProgramError):
        groups(3).check(gone, y)


def test_keys_are_waited_for(waits, groups):
    key = jax.random.key(1)
    assert waits(wait.arrays_in({"key": key})) == []
    groups(3).check(key)
    key_data = jax.random.key_data(key)
    key_data.delete()
    assert wait.arrays_in([key]) == []


def test_a_watchdog_raises_nothing_beside_a_loop_that_donates(groups):
    """The watchdog's checks of a healthy group raise nothing."""
    group = groups(3)
    gc.collect()
    with suppress(jax_ep.ProgramError):  # earlier tests have left failed arrays
        group.check()
    step = jax.jit(
        jax.shard_map(
            lambda x: jax_ep.all_reduce(x, group=group) / 3,
            mesh=group.mesh,
            in_specs=jax.P("ep"),
            out_specs=jax.P("ep"),
            check_vma=False,
        ),
        donate_argnums=0,
    )
    raised, looks = [], []
    has_ended = threading.Event()

    def watch():
        while not has_ended.is_set():
            try:
                group.check()
            except Exception as e:
                raised.append(e)
            looks.append(None)

    sharding = jax.NamedSharding(group.mesh, jax.P("ep"))
    states = [jax.device_put(np.ones((3, 8), np.float32) * i, sharding) for i in range(4)]
    watchdog = threading.Thread(target=watch)
    watchdog.start()
    deadline = time.monotonic() + 3.0
    while time.monotonic() < deadline:
        states = [step(state) for state in states]
    has_ended.set()
    watchdog.join()
    assert (raised, len(looks) > 0) == ([], True)
    for i, state in enumerate(states):
        np.testing.assert_array_equal(state, np.full((3, 8), i, np.float32))
