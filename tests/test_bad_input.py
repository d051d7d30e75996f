"""Bad input raises jax_ep's exceptions, which name operation, argument, expected and got."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep._src.base import tables
from jax_ep._src.base.checks import StaticChecks
from jax_ep.testing.ranks import make_mesh, on_ranks

F32 = jnp.float32


def _zeros(*shape, dtype=F32):
    return np.zeros((2, *shape), dtype)


def _dispatch(group, x=None, ids=None, weights=None, **options):
    x = _zeros(4, 8) if x is None else x
    ids = _zeros(4, 2, dtype=np.int32) if ids is None else ids
    options = {"num_experts": 4, **options}
    args = (x, ids) if weights is None else (x, ids, weights)
    return on_ranks(lambda *a: jax_ep.dispatch(*a, group=group, **options), group.mesh)(*args)


DISPATCH = {
    "x_rank": ({"x": _zeros(4, 8, 2)}, jax_ep.ShapeError, "dispatch: x must be [num_tokens, hidden], both positive, got shape (4, 8, 2)"),
    "x_dtype": ({"x": _zeros(4, 8, dtype=np.int32)}, jax_ep.DTypeError, "dispatch: x must be bfloat16, float16 or float32, got int32"),
    "x_row_bytes": ({"x": _zeros(4, 6)}, jax_ep.ShapeError, "dispatch: a row of x must be a multiple of 16 bytes, got hidden=6 of float32: 24 bytes"),
    "x_tokens": ({"x": _zeros(5, 8)}, jax_ep.ShapeError, "dispatch: topk_idx must have shape (5, 2), got (4, 2)"),
    "ids_rank": ({"ids": _zeros(4, dtype=np.int32)}, jax_ep.ShapeError, "dispatch: topk_idx must be [num_tokens, num_topk], both positive, got shape (4,)"),
    "ids_dtype": ({"ids": _zeros(4, 2)}, jax_ep.DTypeError, "dispatch: topk_idx must be int32 or int64, got float32"),
    "weights_shape": ({"weights": _zeros(4, 3)}, jax_ep.ShapeError, "dispatch: topk_weights must have shape (4, 2), got (4, 3)"),
    "weights_dtype": ({"weights": _zeros(4, 2, dtype=jnp.int32)}, jax_ep.DTypeError, "dispatch: topk_weights must be bfloat16, float16, float32 or float64, got int32"),
    "experts": ({"num_experts": 5}, jax_ep.ConfigError, "dispatch: num_experts must be a multiple of num_ranks=2, got 5"),
    "experts_float": ({"num_experts": 4.0}, jax_ep.ConfigError, "dispatch: num_experts must be a static integer, got 4.0"),
    "experts_zero": ({"num_experts": 0}, jax_ep.ConfigError, "dispatch: num_experts must be at least 1, got 0"),
    "layout": ({"layout": "flat"}, jax_ep.ConfigError, "dispatch: layout must be one of 'rank', 'expert', got 'flat'"),
    "fill": ({"fill": "ones"}, jax_ep.ConfigError, "dispatch: fill must be one of 'zeros', 'padding', 'none', got 'ones'"),
    "capacity_missing": ({"layout": "expert"}, jax_ep.ConfigError, "dispatch: recv_capacity is required with layout='expert'"),
    "capacity_zero": ({"recv_capacity": 0}, jax_ep.ConfigError, "dispatch: recv_capacity must be at least 1, got 0"),
    "capacity_huge": ({"recv_capacity": 2**30}, jax_ep.ConfigError, "dispatch: num_ranks * num_topk * max(recv_capacity, num_tokens) must be at most 2147483647"),
    "alignment": ({"layout": "expert", "recv_capacity": 8, "expert_alignment": 0}, jax_ep.ConfigError, "dispatch: expert_alignment must be at least 1, got 0"),
    "alignment_huge": ({"layout": "expert", "recv_capacity": 8, "expert_alignment": 2**62}, jax_ep.ConfigError, "dispatch: num_experts * expert_alignment must be at most 2147483647, got 4 * 4611686018427387904"),
    "num_sms": ({"num_sms": 0}, jax_ep.ConfigError, "dispatch: num_sms must be at least 1, got 0"),
    "alignment_rank": ({"expert_alignment": 8}, jax_ep.ConfigError, "dispatch: expert_alignment needs layout='expert', got 8"),
    "backend": ({"backend": "nccl"}, jax_ep.ConfigError, "dispatch: backend must be one of 'cpu', 'cuda', 'xla' or None, got 'nccl'"),
    "backend_cuda": ({"backend": "cuda"}, jax_ep.GroupError, "dispatch: backend 'cuda' is not usable here: the mesh's devices are not GPUs"),
}  # fmt: skip


@pytest.mark.parametrize("name", DISPATCH)
def test_dispatch_refuses_bad_arguments(groups, name):
    options, error, message = DISPATCH[name]
    with pytest.raises(error, match=re.escape(message)):
        _dispatch(groups(2), **options)


def test_dispatch_refuses_bad_pairs(groups):
    def fn(x, ids):
        return jax_ep.dispatch((x, x), ids, group=groups(2), num_experts=4)

    with pytest.raises(
        jax_ep.DTypeError,
        match=r"dispatch: x\[0\] must be float8_e4m3fn or float8_e5m2, got float32",
    ):
        on_ranks(fn, groups(2).mesh)(_zeros(4, 8), _zeros(4, 2, dtype=np.int32))


def test_dispatch_refuses_a_constant_of_float64(groups):
    """NumPy's float64 is not narrowed silently."""

    def fn(ids):
        return jax_ep.dispatch(np.ones((4, 8)), ids, group=groups(2), num_experts=4).x

    with pytest.raises(jax_ep.DTypeError, match=r"dispatch: x must be .* got float64"):
        on_ranks(fn, groups(2).mesh)(_zeros(4, 2, dtype=np.int32))


COMBINE = {
    "rows_shape": ({"rows": (9, 8)}, jax_ep.ShapeError, "combine: rows must be [recv_capacity=16, hidden] for this handle (layout='expert'), got shape (9, 8)"),
    "rows_bytes": ({"rows": (16, 3)}, jax_ep.ShapeError, "combine: a row of rows must be a multiple of 16 bytes, got hidden=3 of float32: 12 bytes"),
    "weights_shape": ({"weights": (15,)}, jax_ep.ShapeError, "combine: weights must have shape (16,) (at the rows) or (4, 2) (at the tokens), got (15,)"),
    "weights_rank": ({"layout": "rank", "weights": (16,)}, jax_ep.ConfigError, "combine: weights need a handle of layout='expert', got layout='rank'"),
    "bias_shape": ({"bias": [(4, 9)]}, jax_ep.ShapeError, "combine: bias must have shape (4, 8), got (4, 9)"),
    "bias_many": ({"bias": [(4, 8)] * 3}, jax_ep.ConfigError, "combine: bias takes at most 2 arrays, got 3"),
}  # fmt: skip


def _combine(group, *, rows=(16, 8), weights=None, bias=None, layout="expert", change=None):
    def fn(x, ids):
        out = jax_ep.dispatch(x, ids, group=group, num_experts=4, layout=layout, recv_capacity=16)
        handle = out.handle if change is None else change(out.handle)
        return jax_ep.combine(
            jnp.zeros(rows),
            handle,
            weights=None if weights is None else jnp.zeros(weights),
            bias=None if bias is None else [jnp.zeros(b) for b in bias],
        )

    return on_ranks(fn, group.mesh)(_zeros(4, 8), _zeros(4, 2, dtype=np.int32))


@pytest.mark.parametrize("name", COMBINE)
def test_combine_refuses_bad_arguments(groups, name):
    options, error, message = COMBINE[name]
    with pytest.raises(error, match=re.escape(message)):
        _combine(groups(2), **options)


def test_combine_refuses_a_bias_of_another_dtype(groups):
    def fn(x, ids):
        out = jax_ep.dispatch(x, ids, group=groups(2), num_experts=4)
        return jax_ep.combine(out.x, out.handle, bias=x.astype(jnp.bfloat16))

    with pytest.raises(jax_ep.DTypeError, match="combine: bias must be float32, got bfloat16"):
        on_ranks(fn, groups(2).mesh)(_zeros(4, 8), _zeros(4, 2, dtype=np.int32))


def test_combine_refuses_other_objects_as_handle(groups):
    with pytest.raises(
        jax_ep.ConfigError, match="combine: handle must be the DispatchHandle of a dispatch, got"
    ):
        _combine(groups(2), change=lambda handle: handle.recv_src)


HANDLES = {
    "layout_unknown": (lambda h: {"layout": "foo"}, jax_ep.ConfigError, "combine: handle.layout must be one of 'rank', 'expert', got 'foo'"),
    "no_send_rank": (lambda h: {"send_rank": None}, jax_ep.GroupError, "combine: the handle's arrays do not fit its layout='expert'"),
    "no_recv_k": (lambda h: {"recv_k": None}, jax_ep.GroupError, "combine: the handle's arrays do not fit its layout='expert'"),
    "send_row_dtype": (lambda h: {"send_row": h.send_row.astype(F32)}, jax_ep.DTypeError, "combine: handle.send_row must be int32, got float32"),
    "send_rank_shape": (lambda h: {"send_rank": h.send_rank[:1]}, jax_ep.ShapeError, "combine: handle.send_rank must have shape (4, 2), got (1, 2)"),
    "recv_k_shape": (lambda h: {"recv_k": h.recv_k[:1]}, jax_ep.ShapeError, "combine: handle.recv_k must have shape (16,), got (1,)"),
}  # fmt: skip


@pytest.mark.parametrize("name", HANDLES)
def test_combine_refuses_a_damaged_handle(groups, name):
    change, error, message = HANDLES[name]
    with pytest.raises(error, match=re.escape(message)):
        _combine(groups(2), change=lambda h: dataclasses.replace(h, **change(h)))


def test_combine_refuses_a_handle_relabelled_with_another_layout(groups):
    with pytest.raises(
        jax_ep.GroupError, match="combine: the handle's arrays do not fit its layout='rank'"
    ):
        _combine(groups(2), change=lambda h: dataclasses.replace(h, layout="rank"))


def test_a_handle_of_another_group_is_refused(groups):
    """A handle works only with its own group."""
    other = groups(4)
    with pytest.raises(
        jax_ep.GroupError, match=r"combine: group .* was opened over the mesh {'ep': 4}, but runs"
    ):
        _combine(groups(2), change=lambda h: dataclasses.replace(h, group=other.identity))


def test_a_handle_of_a_closed_group_is_refused(groups):
    with pytest.raises(
        jax_ep.GroupError, match="combine: the handle's group gone-0 is not open; open groups: "
    ):
        _combine(groups(2), change=lambda h: dataclasses.replace(h, group="gone-0"))


def test_calls_outside_shard_map_are_refused(groups):
    x, ids = jnp.zeros((4, 8)), jnp.zeros((4, 2), jnp.int32)
    message = r"dispatch: group .* call it inside jax\.shard_map .*; manual axes here: none"
    with pytest.raises(jax_ep.GroupError, match=message):
        jax_ep.dispatch(x, ids, group=groups(2), num_experts=4)
    with pytest.raises(jax_ep.GroupError, match=message):
        jax.jit(lambda x, i: jax_ep.dispatch(x, i, group=groups(2), num_experts=4))(x, ids)


MISSING = {
    "topk_idx": (jax_ep.DTypeError, "dispatch: topk_idx is missing: it must be an array"),
    "num_experts": (jax_ep.ConfigError, "dispatch: num_experts is missing: it must be a static"),
    "x": (jax_ep.DTypeError, "dispatch: x is missing: it must be an array"),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_arguments_are_named(groups, name):
    error, message = MISSING[name]

    def call(x, ids):
        arguments = {"x": x, "topk_idx": ids, "num_experts": 4, name: None}
        return jax_ep.dispatch(**arguments, group=groups(2)).x

    with pytest.raises(error, match=message):
        on_ranks(call, groups(2).mesh)(_zeros(4, 8), _zeros(4, 2, dtype=np.int32))


def test_other_objects_as_group_are_refused():
    with pytest.raises(
        jax_ep.GroupError, match=r"dispatch: group is missing: pass an open jax_ep.Group as group="
    ):
        jax_ep.dispatch(jnp.zeros((4, 8)), jnp.zeros((4, 2), jnp.int32), group=None, num_experts=4)


def _run_over(mesh, group, axis="ep", backend=None, **options):
    fn = jax.shard_map(
        lambda x, i: jax_ep.dispatch(x, i, group=group, num_experts=4, backend=backend).x,
        mesh=mesh, in_specs=P(axis), out_specs=P(axis), **options,
    )  # fmt: skip
    return jax.jit(fn)(jnp.zeros((8, 8)), jnp.zeros((8, 2), jnp.int32))


def test_a_wrong_axis_name_is_refused(groups):
    with pytest.raises(jax_ep.GroupError, match=r"runs along axis ep: .* manual axes here: other"):
        _run_over(make_mesh(2, "other"), groups(2), "other")


def test_a_wrong_axis_size_is_refused(groups):
    with pytest.raises(jax_ep.GroupError, match=r"opened over the mesh {'ep': 2}, .*{'ep': 4}"):
        _run_over(make_mesh(4), groups(2))


def test_axes_of_size_one_do_not_matter(backend):
    """The group spans (1, 2) and the program (2,), and the other way round."""
    wide = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "ep"))
    narrow = make_mesh(2)
    for opened, run_over in ((wide, narrow), (narrow, wide)):
        with jax_ep.Group.open(opened, "ep", name="one", backend=backend) as group:
            assert _run_over(run_over, group).shape == (16, 8)


def test_another_device_order_is_refused(groups, backend):
    mesh = Mesh(np.array(jax.devices()[1::-1]), ("ep",))
    with pytest.raises(
        jax_ep.GroupError, match=r"dispatch: .* with devices \(1, 0\); the group .* \(0, 1\)"
    ):
        _run_over(mesh, groups(2), backend=backend)


def test_device_order_is_checked_again_on_the_device(monkeypatch):
    """The host implementation checks the order itself, here without the check at lowering."""
    from jax_ep._src.ops.common import check_mesh

    monkeypatch.setattr(check_mesh, "lowering_mesh", lambda ctx: None)
    group = jax_ep.Group.open(make_mesh(2), "ep", name="order")
    y = _run_over(Mesh(np.array(jax.devices()[1::-1]), ("ep",)), group)
    assert np.isnan(np.asarray(y)).all()
    message = "dispatch: the program ran over another mesh or device order than the group"
    with pytest.raises(jax_ep.GroupError, match=message):
        group.check()
    with pytest.raises(jax_ep.GroupError, match=message), group:
        pass


def test_a_partially_automatic_mesh_is_refused():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("auto", "ep"))
    with (
        jax_ep.Group.open(mesh, "ep") as group,
        pytest.raises(jax_ep.GroupError, match=r"every axis of the mesh must be manual .*: auto"),
    ):
        _run_over(mesh, group, axis_names={"ep"})


OPEN = {
    "mesh": (lambda: jax_ep.Group.open(None, "ep"), "mesh must be a jax.sharding.Mesh with devices, got NoneType"),
    "axis": (lambda: jax_ep.Group.open(make_mesh(2), "x"), "axis must name distinct axes of the mesh ('ep',), got ('x',)"),
    "axis_twice": (lambda: jax_ep.Group.open(make_mesh(2), ("ep", "ep")), "axis must name distinct axes"),
    "backend": (lambda: jax_ep.Group.open(make_mesh(2), "ep", backend="mpi"), "backend must be one of 'auto', 'cpu', 'cuda', 'xla', got 'mpi'"),
    "cuda": (lambda: jax_ep.Group.open(make_mesh(2), "ep", backend="cuda"), "backend 'cuda' is not usable here: the mesh's devices are not GPUs"),
    "timeout": (lambda: jax_ep.Group.open(make_mesh(2), "ep", timeout=0), "timeout must be positive seconds, at most 86400, got 0"),
    "axis_none": (lambda: jax_ep.Group.open(make_mesh(2), None), "axis must name distinct axes of the mesh ('ep',), got (None,)"),
    "name": (lambda: jax_ep.Group.open(make_mesh(2), "ep", name=3), "name must be a string, got 3"),
    "timeout_flag": (lambda: jax_ep.Group.open(make_mesh(2), "ep", timeout=True), "timeout must be positive seconds, at most 86400, got True"),
    "timeout_text": (lambda: jax_ep.Group.open(make_mesh(2), "ep", timeout="1"), "timeout must be positive seconds, at most 86400, got '1'"),
    "node_text": (lambda: jax_ep.Group.open(make_mesh(4), "ep", ranks_per_node="2"), "ranks_per_node must be a static integer, got '2'"),
    "num_sms": (lambda: jax_ep.Group.open(make_mesh(4), "ep", num_sms=0), "num_sms must be at least 1, got 0"),
    "node": (lambda: jax_ep.Group.open(make_mesh(4), "ep", ranks_per_node=3), "ranks_per_node must divide num_ranks=4, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN)
def test_open_refuses_bad_arguments(name):
    call, message = OPEN[name]
    with pytest.raises(jax_ep.JaxEpError, match=re.escape(f"Group.open: {message}")):
        call()


@pytest.mark.parametrize(
    "value", [2, 0.5, np.float32(1.25), np.float16(2), np.float64(1), np.int64(3)]
)
def test_numbers_of_python_and_numpy_are_accepted(value):
    number = StaticChecks("op").positive_number(value, name="x")
    assert type(number) is float
    assert number == value


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        None,
        "1",
        -1,
        np.float32("nan"),
        np.inf,
        pytest.param(10**400, id="huge"),
        1j,
        np.ones(1),
        [1],
    ],
)
def test_other_values_are_refused_as_numbers(value):
    for or_zero, kind in ((False, "positive number"), (True, "number of at least 0")):
        message = re.escape(f"op: x must be a static {kind}, got {value!r}")
        with pytest.raises(jax_ep.ConfigError, match=message):
            StaticChecks("op").positive_number(value, name="x", or_zero=or_zero)


def test_zero_is_accepted_only_if_allowed():
    assert StaticChecks("op").positive_number(0, name="x", or_zero=True) == 0.0
    with pytest.raises(jax_ep.ConfigError, match="op: x must be a static positive number, got 0"):
        StaticChecks("op").positive_number(0, name="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": ["1024", "one_shot"]}, "bytes must be a whole number or null, got '1024'"),
        ({"step": [1024.0, "one_shot"]}, "bytes must be a whole number or null, got 1024.0"),
        ({"step": [True, "one_shot"]}, "bytes must be a whole number or null, got True"),
        ({"step": [-1, "one_shot"]}, "bytes must be a whole number or null, got -1"),
        ({"step": [1024, 3]}, "3 is not a valid Algorithm"),
        ({"step": [1024, "ring"]}, "'ring' is not a valid Algorithm"),
        ({"step": [1024]}, "ValueError: not enough values"),
        ({"num_ranks": "2"}, "num_ranks must be a whole number, got '2'"),
        ({"num_ranks": 2.5}, "num_ranks must be a whole number, got 2.5"),
        ({"device": None}, "device must be a string, got None"),
    ],
)
def test_a_bad_table_of_algorithms_is_refused(monkeypatch, tmp_path, change, message):
    """The error comes when the table is read, not when a call looks up an algorithm."""
    change = dict(change)
    steps = [change.pop("step", [1024, "one_shot"]), [None, "psum"]]
    table = {"device": "any", "num_ranks": 1, "ops": dict.fromkeys(tables.OPS, steps)} | change
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"tables": [table]}))
    monkeypatch.setenv("JAX_EP_TUNING", str(path))
    with pytest.raises(jax_ep.ConfigError, match=f"is no table of algorithms: .*{message}"):
        tables.load("cpu", 2)


def test_an_altered_handle_touches_no_other_memory(groups, layout):
    """Rows and sources out of range count as absent; the memory around the arrays is untouched."""
    group = groups(2)

    def fn(x, ids):
        out = jax_ep.dispatch(x, ids, group=group, num_experts=4, layout=layout, recv_capacity=16)
        wild = dataclasses.replace(
            out.handle,
            send_row=out.handle.send_row + 2**30,
            recv_src=jnp.full_like(out.handle.recv_src, 2**31 - 1),
        )
        loss = lambda rows: jnp.sum(jax_ep.combine(rows, wild, backend="cpu") ** 2)  # noqa: E731
        return jax.value_and_grad(loss)(out.x)

    value, grad = on_ranks(fn, group.mesh)(
        np.ones((2, 4, 8), np.float32), _zeros(4, 2, dtype=np.int32)
    )
    assert not np.asarray(value).any()
    assert not np.asarray(grad).any()
