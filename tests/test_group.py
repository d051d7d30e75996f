"""Group: identity, meshes, lifetime and info."""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from process_programs import path_of
from steps import make_echo

import jax_ep
from jax_ep._src.base import config, native_modules
from jax_ep._src.opening import usability
from jax_ep.testing.cases import (
    Case,
    assert_combined,
    assert_dispatched,
    make_data,
    round_trip,
)
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_ranks

X = np.ones((2, 4, 8), np.float32)
IDS = np.arange(8, dtype=np.int32).reshape(2, 4, 1) % 2


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8])
def test_groups_open_over_the_first_devices(num_ranks, backend):
    with jax_ep.Group.open(make_mesh(num_ranks), "ep", backend=backend) as group:
        info = group.info()
    assert (info.num_ranks, info.num_slices, info.backend) == (num_ranks, 1, backend)
    assert len(info.devices) == num_ranks


@pytest.mark.parametrize("axis", [("a", "b"), ("b", "a"), "a", "b"])
def test_ranks_run_over_tuple_axes_and_slices_are_independent(axis, backend, layout):
    """Ranks run row-major over the axes in the given order."""
    axes = (axis,) if isinstance(axis, str) else axis
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "other", "b"))
    num_ranks = 2 ** len(axes)
    slices = tuple(name for name in mesh.axis_names if name not in axes)
    case = Case(num_ranks, layout, hidden=16)
    with jax_ep.Group.open(mesh, axis, backend=backend) as group:

        def fn(x, ids, weights, rows):
            x, ids, weights, rows = x[0, 0], ids[0, 0], weights[0, 0], rows[0, 0]
            out = jax_ep.dispatch(
                x, ids, weights, group=group, num_experts=case.num_experts, layout=layout,
                recv_capacity=case.capacity,
            )  # fmt: skip
            y = jax_ep.combine(rows, out.handle)
            return jax.tree.map(lambda a: a[None, None], (out, y))

        spec = P(slices, axes)
        step = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec))
        datas = [make_data(case, "skewed", seed) for seed in range(8 // num_ranks)]
        stack = [np.stack([getattr(d, f) for d in datas]) for f in
                 ("x", "topk_idx", "topk_weights", "rows")]  # fmt: skip
        out, y = step(*stack)
    for i, data in enumerate(datas):
        out_i, y_i = jax.tree.map(lambda a, i=i: np.asarray(a)[i], (out, y))
        assert_combined(case, data, assert_dispatched(case, data, out_i), y_i)


def test_identity_depends_on_name_axes_and_devices_only():
    mesh = make_mesh(2)
    with jax_ep.Group.open(mesh, "ep") as a:
        first = a.identity
        with jax_ep.Group.open(mesh, "ep", name="other") as b:
            assert b.identity != first
    with jax_ep.Group.open(make_mesh(2), "ep", backend="xla") as again:
        assert again.identity == first
    reordered = Mesh(np.array(jax.devices()[1::-1]), ("ep",))
    with jax_ep.Group.open(reordered, "ep") as c:
        assert c.identity != first


def test_two_groups_of_one_identity_are_refused():
    with (
        jax_ep.Group.open(make_mesh(2), "ep"),
        pytest.raises(jax_ep.GroupError, match="pass another name="),
    ):
        jax_ep.Group.open(make_mesh(2), "ep")


def test_compiled_code_outlives_its_group():
    group = jax_ep.Group.open(make_mesh(2), "ep")
    step = on_ranks(make_echo(group), group.mesh)
    np.testing.assert_array_equal(step(X, IDS), X)
    group.close()
    group.close()
    np.testing.assert_array_equal(step(X, IDS), X)
    with pytest.raises(jax_ep.GroupError, match=r"dispatch: group .* is closed"):
        on_ranks(make_echo(group), group.mesh)(X, IDS)
    # The identity is free again, in spite of the old executable.
    with jax_ep.Group.open(make_mesh(2), "ep") as second:
        np.testing.assert_array_equal(on_ranks(make_echo(second), second.mesh)(X, IDS), X)
        np.testing.assert_array_equal(step(X, IDS), X)


def test_a_group_opens_and_closes_many_times():
    for _ in range(30):
        with jax_ep.Group.open(make_mesh(3), "ep") as group:
            assert group.backend == "cpu"


@pytest.mark.parametrize(
    ("variable", "value", "found", "reason"),
    [
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async", config.why_staged, "is not mapped for peers"),
        ("TF_GPU_ALLOCATOR", "cuda_malloc_async", config.why_staged, "is not mapped for peers"),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "Platform", config.why_staged, "may still read"),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "bfc", config.why_staged, None),
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "false", config.why_pool_grows, "peers have not mapped"),
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "true", config.why_pool_grows, None),
    ],
)
def test_the_reason_for_staging_is_named(monkeypatch, variable, value, found, reason):
    allocators = ("XLA_PYTHON_CLIENT_ALLOCATOR", "TF_GPU_ALLOCATOR")
    for name in (*allocators, "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.delenv(name, raising=False)
    assert found() is None
    monkeypatch.setenv(variable, value)
    assert found() is None if reason is None else reason in found()


MODE = "--xla_gpu_command_buffer_scheduling_mode="


@pytest.mark.parametrize(
    ("flags", "is_concurrent"),
    [
        ("", False),
        (f"{MODE}SERIALIZE", False),
        (f"{MODE}CONCURRENT", True),
        (f'--xla_a=1 {MODE}"concurrent"\t--xla_b', True),
        (f"\n{MODE}'Concurrent'\n", True),
        (f"{MODE}CONCURRENT {MODE}LHS", False),  # the last flag counts
        (f"{MODE}LHS --xla_b {MODE}CONCURRENT", True),
        (f"--xla_a='{MODE}CONCURRENT'", False),
        (f'--xla_a=" \\" {MODE}CONCURRENT"', False),
        (f"{MODE}CONCURRENTLY", False),
    ],
)
def test_the_reason_against_kernels_is_named(monkeypatch, tmp_path, flags, is_concurrent):
    """The flag may stand in XLA_FLAGS, or in the file that XLA_FLAGS names."""
    file = tmp_path / "flags"
    file.write_text(flags)
    for value in (flags, str(file)):
        monkeypatch.setenv("XLA_FLAGS", value)
        found = config.why_no_kernel_exchange(2)
        assert (found is not None and "one order" in found) == is_concurrent
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "none"))
    assert config.why_no_kernel_exchange(2) is None


def test_flags_are_read_as_xla_reads_them(tmp_path):
    """The number of devices shows how XLA reads its flag."""
    name = "--xla_force_host_platform_device_count"
    file = tmp_path / "flags"
    file.write_text(f"\n{name}=2 --xla_dump_to=' {name}=3'\t{name}=\"5\"\n")
    code = (
        "import jax; from jax_ep._src.base import config; "
        f"print(len(jax.devices()), config.xla_flag({name!r}))"
    )
    for flags in (str(file), file.read_text()):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "5 5\n"


@pytest.mark.parametrize("num_ranks", [32, 33])
def test_more_ranks_than_the_kernels_take_go_to_xla(monkeypatch, num_ranks):
    devices = [SimpleNamespace(platform="gpu", process_index=0) for _ in range(num_ranks)]
    mesh = SimpleNamespace(devices=np.array(devices))
    monkeypatch.setattr(
        native_modules, "load", lambda _: SimpleNamespace(check_devices=lambda _: None)
    )
    monkeypatch.setattr(native_modules, "cuda_device_of", lambda _: 0)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    chosen, found = usability.resolve(mesh, num_ranks, "auto", None)
    if num_ranks == 32:
        assert (chosen, found["cuda"].reason) == ("cuda", "usable")
        return
    assert chosen == "xla"
    assert "its kernels take at most 32 ranks, got 33" in found["cuda"].reason
    with pytest.raises(jax_ep.GroupError, match=r"'cuda' is not usable here: .*at most 32 ranks"):
        usability.resolve(mesh, num_ranks, "cuda", None)


def test_room_for_staged_operands_is_configurable(monkeypatch):
    monkeypatch.delenv("JAX_EP_STAGING_MB", raising=False)
    assert config.staging_bytes_from_environment() == (8 << 20, 256 << 20)
    monkeypatch.setenv("JAX_EP_STAGING_MB", "3")
    assert config.staging_bytes_from_environment() == (3 << 20, 3 << 20)
    for bad in ("-1", "1.5", "many", "100000000"):
        monkeypatch.setenv("JAX_EP_STAGING_MB", bad)
        with pytest.raises(jax_ep.ConfigError, match="JAX_EP_STAGING_MB must be a whole number"):
            config.staging_bytes_from_environment()


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("staging_bytes", [0, 5000, 1 << 20])
def test_operands_without_room_take_xlas_collectives(layout, staging_bytes):
    """If operands are staged, every mixture of back ends gives the same values."""

    def run(group):
        def loss(x, ids, weights):
            out = jax_ep.dispatch(
                x,
                ids,
                topk_weights=weights,
                group=group,
                num_experts=8,
                layout=layout,
                recv_capacity=128,
            )
            y = jax_ep.combine(out.x, out.handle)
            return jnp.sum(y * y) + jnp.sum(out.weights), (y, out)

        step = jax.grad(loss, (0, 2), has_aux=True)
        jaxpr = str(jax.make_jaxpr(on_ranks(step, group.mesh))(x, ids, weights))
        return jaxpr.count("jax_ep."), on_ranks(step, group.mesh)(x, ids, weights)

    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 24, 32)).astype(np.float32)
    ids = np.argsort(rng.random((4, 24, 8)))[..., :3].astype(np.int32)
    weights = rng.random((4, 24, 3)).astype(np.float32)
    with jax_ep.Group.open(make_mesh(4), "ep", backend="cpu") as group:
        num_calls, expected = run(group)
        group.spec = dataclasses.replace(group.spec, staging_bytes=staging_bytes)
        num_staged, got = run(group)
    assert (num_staged == num_calls) == (staging_bytes == 1 << 20)
    jax.tree.map(assert_same_bits, jax.tree.leaves(got), jax.tree.leaves(expected))


def test_operations_run_in_an_eager_shard_map(groups, backend):
    group = groups(2)
    np.testing.assert_array_equal(
        on_ranks(make_echo(group, backend), group.mesh, jit=False)(X, IDS), X
    )


def test_a_handle_crosses_a_jit_border(groups, layout):
    """One program dispatches, another combines and takes the handle as an ordinary argument."""
    group = groups(4)
    case = Case(4, layout)
    data = make_data(case, "balanced")
    out, y = round_trip(case, group, "cpu")(*data.operands())
    back = on_ranks(jax_ep.combine, group.mesh)
    np.testing.assert_array_equal(back(data.rows, out.handle), y)


def test_timeouts_accept_numbers_of_numpy():
    with jax_ep.Group.open(make_mesh(2), "ep", timeout=np.float32(2.5)) as group:
        assert type(group.timeout) is float
        assert group.timeout == 2.5


def test_a_program_behind_a_call_gives_equal_bits_every_time(groups):
    """XLA must flush subnormals on every thread that runs the program, or runs would differ."""
    group = groups(8)

    def fn(x, ids):
        out = jax_ep.dispatch(x, ids, group=group, num_experts=8)
        y = jax_ep.combine(out.x, out.handle)
        return y * jnp.float32(2.0**-100) * jnp.float32(2.0**-40)

    step = on_ranks(fn, group.mesh)
    x = np.ones((8, 64, 64), np.float32)
    ids = np.arange(8 * 64, dtype=np.int32).reshape(8, 64, 1) % 8
    first = np.asarray(step(x, ids))
    for _ in range(100):
        assert_same_bits(step(x, ids), first)


def test_loading_without_the_group_names_it(tmp_path):
    """An executable that is compiled after its group has closed names the group in its error."""
    group = jax_ep.Group.open(make_mesh(2), "ep", name="gone")
    lowered = on_ranks(make_echo(group), group.mesh).lower(X, IDS)
    group.close()
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"group {group.identity} is not open"):
        lowered.compile()


def test_debug_mode_raises_bad_ids(backend):
    bad = np.array([[[0, 1], [5, 1], [-2, 0]], [[1, 1], [0, -1], [0, 1]]], np.int32)
    x = np.ones((2, 3, 8), np.float32)

    def fn(group):
        def send(x, ids):
            out = jax_ep.dispatch(x, ids, group=group, num_experts=2, backend=backend)
            return out.num_invalid

        return on_ranks(send, group.mesh)

    with jax_ep.Group.open(make_mesh(2), "ep", debug=True) as group:
        fn(group)(x, np.array([[[0, 1], [-1, 1], [-1, -1]]] * 2, np.int32))
        group.check()
        np.testing.assert_array_equal(fn(group)(x, bad), [[2], [0]])
        with pytest.raises(jax_ep.RoutingError) as caught:
            group.check()
        first, second = sorted(str(caught.value).splitlines())
        assert first.startswith("dispatch: topk_idx of rank 0 holds 2 ids outside")
        assert second.startswith("dispatch: topk_idx of rank 1 holds 0 ids outside")
        assert second.endswith("repeats an expert in a token 1 times")
        group.check()
    with jax_ep.Group.open(make_mesh(2), "ep", debug=False) as group:
        np.testing.assert_array_equal(fn(group)(x, bad), [[2], [0]])
        group.check()


def test_the_environment_turns_debug_mode_on(monkeypatch):
    monkeypatch.setenv("JAX_EP_DEBUG", "1")
    with jax_ep.Group.open(make_mesh(1), "ep") as group:
        assert group.info().debug
    monkeypatch.setenv("JAX_EP_DEBUG", "yes")
    with pytest.raises(jax_ep.ConfigError, match="JAX_EP_DEBUG must be '0' or '1', got 'yes'"):
        jax_ep.Group.open(make_mesh(1), "ep")


def test_the_interpreter_exits_cleanly():
    """The program ends with an open group and calls in flight."""
    done = subprocess.run(
        [sys.executable, path_of("exits_with_calls_in_flight")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "end of script"
    assert done.stderr == ""
