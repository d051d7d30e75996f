"""Groups over several processes of CPU devices on one host."""

import re
import signal

import pytest
from process_programs import LATE, MIDDLE, MISSING, RAISES, REOPENED, number_behind, run_on_cpus

CONFORMANCE = """
with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    backend = sys.argv[1]
    info = group.info()
    assert info.backend == "cpu", info
    assert info.backends["cpu"] == info.backends["xla"] == "usable", info
    checks = [c for c in conformance.CHECKS if c.not_usable(group, backend) is None]
    assert len(checks) > 50
    always = (  # however few: what adds up, in both layouts
        "sums[op=all_reduce,dtype=f32,algorithm=one_shot]",
        "norms[dtype=bf16,algorithm=one_shot]",
        "norm_gradients[check_vma=True,outside=True]",
        "gradients[layout=expert,dtype=f32,check_vma=True,outside=True]",
    )
    chosen = [c for c in checks if c.name in always and backend == "cpu"]
    assert len(chosen) in (0, len(always))
    for check in {c.name: c for c in [*checks[::int(sys.argv[2])], *chosen]}.values():
        print("checking", check, flush=True)
        check(group, backend)
print("passed")
"""

INDEPENDENT = """
with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    @jax.jit
    def layer(x, ids):
        return echo(group, x, ids)

    def fn(x, ids):
        calls = [layer(x * (i + 1), (ids + i) % (4 * R)) for i in range(64)]
        sums = [jax.lax.psum(x * (i + 1), "ep") for i in range(64)]
        last = jax.lax.scan(lambda x, _: (layer(x, ids) * 0 + x + 1, None), x, length=30)[0]
        return calls, sums, last

    run = on_group(fn, group)
    for _ in range(3):
        calls, sums, last = run(x, ids)
        for i, (y, s) in enumerate(zip(calls, sums)):
            assert_same_bits(y, x * (i + 1) * num_ranks_of((ids + i) % (4 * R)).astype(np.float32))
            assert_same_bits(s, np.tile(x.sum(axis=0) * (i + 1), (R, 1, 1)))
        assert_same_bits(last, x + 30)
print("passed")
"""

SLICES = """
from jax.sharding import Mesh
from jax_ep.testing.cases import Case, assert_combined, assert_dispatched, make_data, round_trip
from jax_ep.testing.ranks import on_ranks, place
devices = np.array(jax.devices())
orders = [devices.reshape(2, 4), devices.reshape(4, 2).T, devices[::-1].reshape(2, 4)]
for turn, order in enumerate(orders):
    wide = Mesh(order, ("dp", "ep"))
    with jax_ep.Group.open(wide, "ep", name=f"slices{turn}", timeout=30.0) as group:
        assert (group.info().num_slices, group.backend) == (2, "cpu")
        def run(x, ids):
            slice = jax.lax.axis_index("dp").astype(x.dtype)
            y = echo(group, x + 100 * slice, ids)
            return y, jax_ep.all_reduce(x + slice, group=group)
        ids4 = np.tile(np.arange(16, dtype=np.int32), (8, 1))[..., None]
        own = np.arange(8 * 16 * 64, dtype=np.float32).reshape(8, 16, 64) % 50
        y, total = on_ranks(run, wide, check_vma=False)(*place((own, ids4 % (4 * R)), wide))
        group.check(y)
        slices = np.repeat(np.arange(2, dtype=np.float32), 4)[:, None, None]
        assert_same_bits(y, own + 100 * slices)
        sums = (own + slices).reshape(2, 4, 16, 64).sum(1, keepdims=True)
        assert_same_bits(total, np.broadcast_to(sums, (2, 4, 16, 64)).reshape(8, 16, 64))
print("passed")
"""

SUBSETS = """
from jax.sharding import Mesh
devices = jax.devices()
for first in range(0, len(devices), 4):
    part = Mesh(np.array(devices[first : first + 4]), ("ep",))
    mine = {d.process_index for d in part.devices.flat}
    if me not in mine:
        try:
            jax_ep.Group.open(part, "ep", name="a", timeout=60.0)
        except jax_ep.GroupError as e:
            assert f"process {me} has no device of the mesh" in str(e)
            print("refused", sorted(mine))
        continue
    R = part.devices.size
    with (
        jax_ep.Group.open(part, "ep", name="a", timeout=60.0) as a,
        jax_ep.Group.open(part, "ep", name="b", timeout=60.0) as b,
    ):
        part_ids = ids[:R] % (4 * R)
        y = on_group(lambda x, ids: echo(a, x, ids) + 10 * echo(b, x, ids), a)(x[:R], part_ids)
        assert_same_bits(y, 11 * x[:R] * num_ranks_of(part_ids).astype(np.float32))
        print("passed", sorted(mine))
"""

BATCHES = """
from jax.sharding import Mesh, PartitionSpec as P
from jax_ep.testing.ranks import place
layers = np.stack([x, x + 1, x * 2])
routes = np.stack([ids, (ids + 1) % (4 * R), ids])
with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    def loss(x, ids):
        return jnp.sum(jnp.sin(echo(group, x, ids)))

    def each(x, ids):  # one process compiles more than the other, and numbers differ
        return [jax.grad(loss)(x[i], ids[i]) for i in range(3)]

    def mapped(x, ids):
        return jax.vmap(jax.grad(loss))(x, ids)

    args = layers.swapaxes(0, 1), routes.swapaxes(0, 1)
    if me == 1:
        jax.jit(lambda x: jax.vmap(jnp.sin)(x))(layers)
    loops, batches = (on_group(f, group)(*args) for f in (each, mapped))
    for i, wanted in enumerate(loops):
        for got, shard in zip(batches.addressable_shards, wanted.addressable_shards):
            assert_same_bits(np.asarray(got.data)[:, i], np.asarray(shard.data))
        assert np.any(np.asarray(wanted.addressable_shards[0].data))

# Stages whose ranks sit in different processes.
stages = Mesh(mesh.devices.reshape(2, -1).T, ("stage", "ep"))
with jax_ep.Group.open(stages, "ep", name="stages", timeout=60.0) as group:
    def layer(x, ids):
        return echo(group, x[0], ids[0])[None]

    sharded = jax.shard_map(layer, mesh=stages, in_specs=P("ep"), out_specs=P("ep"))
    run = jax.jit(jax.vmap(sharded, spmd_axis_name="stage"))
    args = np.stack([x[:2], x[2:], x[:2] + 1, x[2:] - 1]), np.stack([ids[:2], ids[2:]] * 2)
    y = run(*place(args, stages, ()))
    times = (args[1][..., None] // 8 == np.arange(2)).any(axis=-2).sum(axis=-1, keepdims=True)
    assert_same_bits(y, args[0] * times.astype(np.float32))
print("passed")
"""

_ALL = {"marks": [pytest.mark.slow, pytest.mark.timeout(1500)]}


@pytest.mark.parametrize(
    ("processes", "devices", "backend", "every"),
    [
        (2, 4, "cpu", 12),
        (4, 2, "cpu", 60),
        (2, 2, "xla", 80),
        pytest.param(2, 4, "cpu", 1, **_ALL),
        pytest.param(4, 2, "cpu", 1, **_ALL),
        pytest.param(2, 2, "xla", 1, **_ALL),
    ],
)
@pytest.mark.timeout(300)
def test_processes_pass_the_suite(processes, devices, backend, every):
    deadline = 1400.0 if every == 1 else 280.0
    sizes = {"processes": processes, "devices": devices, "deadline": deadline}
    for output in run_on_cpus(CONFORMANCE, backend, str(every), **sizes):
        assert output.endswith("passed\n")


FORKS = """
import warnings
warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)

def in_child(group, run, how):
    for use in (group.check, lambda: on_group(lambda x, ids: echo(group, x, ids), group)(x, ids)):
        try:
            use()
            os._exit(3)
        except jax_ep.GroupError as e:
            assert f"its forked child {os.getpid()} cannot use it" in str(e), e
    if how == "raises":
        raise ValueError("in a child")
    if how == "frees":
        group.close()
        del group, run
        jax.clear_caches()
        gc.collect()
    if how == "exits":
        sys.exit(5)

with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    run = on_group(lambda x, ids: echo(group, x, ids), group)
    expected = x * num_ranks_of(ids).astype(np.float32)
    for how in ("leaves", "raises", "frees", "exits") * 3:
        y = run(x, ids)  # children are forked while it runs
        child = os.fork()
        if child == 0:
            try:
                with group:
                    in_child(group, run, how)
            except ValueError:
                pass
            os._exit(5)
        deadline = time.monotonic() + 20.0
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ended[0] == child, f"the child that {how} waits"
        assert os.waitstatus_to_exitcode(ended[1]) == 5, (how, ended)
        group.check(y)
        assert_same_bits(y, expected)
        assert_same_bits(run(x, ids), expected)
print("passed")
"""


def test_independent_calls_mixed_with_psums_meet():
    assert all(output.endswith("passed\n") for output in run_on_cpus(INDEPENDENT, devices=4))


def test_calls_of_a_batch_meet():
    """Calls of a batch, and of pipeline stages, find their peers in the other process."""
    assert all(output.endswith("passed\n") for output in run_on_cpus(BATCHES))


def test_groups_open_over_a_part_of_the_processes():
    outputs = run_on_cpus(SUBSETS, processes=4)
    for process, output in enumerate(outputs):
        own, other = ("[0, 1]", "[2, 3]") if process < 2 else ("[2, 3]", "[0, 1]")
        assert re.findall(r"passed .*", output) == [f"passed {own}"]
        assert re.findall(r"refused .*", output) == [f"refused {other}"]


def test_slices_that_cross_processes_keep_to_themselves():
    assert all(output.endswith("passed\n") for output in run_on_cpus(SLICES, devices=4))


@pytest.mark.parametrize("processes", [2, 3])
def test_a_killed_process_is_named_at_once(processes):
    """The other processes exit with their own codes, though JAX would wait for the killed one."""
    codes = [7] * processes
    codes[1] = -signal.SIGKILL
    outputs = run_on_cpus(MISSING, "SIGKILL", processes=processes, exit_codes=codes)
    for output in outputs[:1] + outputs[2:]:
        assert "waited for rank 2, whose process has ended" in output
        assert number_behind("waited", output) < 2.0


@pytest.mark.parametrize("step", [["calls"], ["calls", "psums"], ["psums"]], ids="-".join)
def test_a_process_killed_within_a_program_is_named(step):
    """The step may have XLA's collectives, which fail with their own message, or wait."""
    survivor, killed = run_on_cpus(MIDDLE, *step, exit_codes=[7, -signal.SIGKILL])
    assert "waited for rank 2, whose process has ended" in survivor
    raised, at = (number_behind("(?:raised|killed)", o) for o in (survivor, killed))
    # Processes raise at once, or after a timeout if all of them wait in XLA's collective.
    assert 0 < raised - at < (4.0 if "psums" in step else 2.0)


@pytest.mark.parametrize("process", [0, 1])
def test_an_exception_of_one_process_ends_all_with_codes_of_their_own(process):
    codes = [7, 7]
    codes[process] = 1
    outputs = run_on_cpus(RAISES, str(process), exit_codes=codes)
    assert "ValueError: not today" in outputs[process]
    assert f"waited for rank {2 * process}" in outputs[1 - process]


def test_a_loss_is_raised_while_a_collective_of_xla_still_waits():
    early, late = run_on_cpus(LATE, exit_codes=[7, 7])
    assert re.search(r"dispatch: rank [01] waited for rank [23] until the timeout", early)
    assert number_behind("waited", early) < 3.0
    assert re.search(r"waited for rank [0-3]", late)


def test_a_rank_that_does_not_come_is_named_in_every_process():
    for output in run_on_cpus(MISSING, "skip", exit_codes=[7, 7]):
        assert "waited for rank 3 until the timeout: expected 4 ranks, got 3" in output
        assert number_behind("waited", output) < 4.0


def test_compiled_functions_run_with_the_group_that_is_opened_again():
    for output in run_on_cpus(REOPENED):
        assert output.endswith("passed\n")
        assert output.count("until the timeout") == 2


def test_a_forked_child_leaves_the_group_to_its_parent():
    """The child cannot use the group, and nothing that it does then harms the parents."""
    assert all(output.endswith("passed\n") for output in run_on_cpus(FORKS))
