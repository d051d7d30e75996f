"""Group.get: the mesh that it finds, when it opens a group, and the settings it demands."""

import threading
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from process_programs import run_on_cpus
from steps import make_echo

import jax_ep
from jax_ep._src.base import registry, tables
from jax_ep._src.base.options import Layout
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_ranks

X = np.ones((2, 4, 8), np.float32)
IDS = np.arange(8, dtype=np.int32).reshape(2, 4, 1) % 2
MESH = make_mesh(2)
WIDE = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "ep"))


@pytest.fixture(autouse=True)
def closes_what_it_opens():
    before = set(registry.open_groups)
    yield
    for identity in set(registry.open_groups) - before:
        registry.open_groups[identity].close()


def test_get_returns_one_group_until_it_is_closed():
    group = jax_ep.Group.get(MESH, "ep")
    assert group is jax_ep.Group.get(MESH, "ep")
    assert group is jax_ep.Group.get(MESH)
    assert group is jax_ep.Group.get(make_mesh(2), ("ep",))
    explicit = Mesh(MESH.devices, ("ep",), axis_types=(AxisType.Explicit,))
    assert group is jax_ep.Group.get(explicit, "ep")
    step = on_ranks(make_echo(group), MESH).lower(X, IDS).compile()
    group.close()
    again = jax_ep.Group.get(MESH, "ep")
    assert again is not group
    assert again.identity == group.identity
    assert_same_bits(step(X, IDS), X)


def test_get_finds_open_groups_and_leaves_other_names_alone():
    with (
        jax_ep.Group.open(MESH, "ep", name="other"),
        jax_ep.Group.open(MESH, "ep", timeout=7.0) as group,
    ):
        assert jax_ep.Group.get(MESH, "ep") is group
        assert jax_ep.Group.get(MESH, "ep", name="other") is not group
        third = jax_ep.Group.get(MESH, "ep", name="third", timeout=8.0)
        assert third.timeout == 8.0
        with pytest.raises(jax_ep.GroupError, match="pass another name="):
            jax_ep.Group.open(MESH, "ep", name="third")


def test_get_opens_with_its_settings_and_the_defaults():
    wanted = {
        "timeout": 9.0, "backend": "xla", "num_sms": 24, "ranks_per_node": 1, "debug": True,
    }  # fmt: skip
    group = jax_ep.Group.get(MESH, "ep", **wanted)
    assert {name: getattr(group, name) for name in wanted} == wanted
    assert jax_ep.Group.get(MESH, "ep", **wanted) is group
    assert jax_ep.Group.get(MESH, "ep", backend="auto") is group
    group.close()
    group = jax_ep.Group.get(MESH, "ep")
    found = {name: getattr(group, name) for name in wanted}
    assert found == {
        "timeout": 60.0, "backend": "cpu", "num_sms": None, "ranks_per_node": 2, "debug": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "has"),
    [
        ("timeout", 9.0, "60.0"),
        ("backend", "xla", "'cpu'"),
        ("num_sms", 24, "None"),
        ("ranks_per_node", 1, "2"),
        ("debug", True, "False"),
    ],
)
def test_other_settings_are_refused_by_name(name, value, has):
    with jax_ep.Group.open(MESH, "ep", debug=False) as group:
        with pytest.raises(
            jax_ep.GroupError,
            match=rf"Group.get: group {group.identity} is open .*: {name}={has}, wanted {value!r}",
        ):
            jax_ep.Group.get(MESH, "ep", **{name: value})
        assert jax_ep.Group.get(MESH, "ep") is group  # the open group is unharmed


def test_a_named_back_end_must_carry_every_exchange():
    """Under "auto" another back end may carry an exchange that is faster there."""
    with jax_ep.Group.open(MESH, "ep") as group:
        assert jax_ep.Group.get(MESH, "ep", backend="cpu") is group
        budget = tables.Budget(20, "xla")
        of: Any = group.budgets.of  # only read elsewhere
        of["combine"][Layout.RANK] = budget
        with pytest.raises(jax_ep.GroupError, match="takes xla in part, wanted 'cpu' alone"):
            jax_ep.Group.get(MESH, "ep", backend="cpu")
        assert jax_ep.Group.get(MESH, "ep") is group


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mesh": None, "axis": "ep"}, r"Group.get: no mesh is set here: pass mesh=, or"),
        ({"mesh": WIDE}, r"Group.get: the mesh has the axes \('data', 'ep'\): axis= must name one"),
        ({"mesh": WIDE, "axis": "tp"}, r"Group.get: axis must name distinct axes of the mesh"),
        ({"mesh": "ep"}, r"Group.get: mesh must be a jax.sharding.Mesh, .* got str"),
        ({"mesh": MESH, "timeout": -1}, r"Group.get: timeout must be positive seconds"),
        ({"mesh": MESH, "backend": "mpi"}, r"Group.get: backend must be one of 'auto', 'cpu', "),
        ({"mesh": MESH, "debug": 3}, r"Group.get: debug must be True, False or None, got 3"),
        (
            {"mesh": WIDE.abstract_mesh, "axis": "tp"},
            r"Group.get: axis must name distinct axes of the mesh \('data', 'ep'\), got \('tp',\)",
        ),
        (
            {"mesh": WIDE.abstract_mesh, "axis": "ep"},
            r"devices of the mesh \('data': 2, 'ep': 4\) are not known here, and no group",
        ),
    ],
)
def test_bad_or_unclear_arguments_are_refused(arguments, message):
    is_setting = {"timeout", "backend", "debug"} & set(arguments)
    error = jax_ep.ConfigError if is_setting else jax_ep.GroupError
    with pytest.raises(error, match=message):
        jax_ep.Group.get(**arguments)


def _layer(x, ids):
    """Gets its group when it is called."""
    return make_echo(jax_ep.Group.get(axis="ep"))(x, ids)


def _run(mesh=None, *, jit=True):
    """Runs the layer. `mesh`: None means the mesh of jax.set_mesh."""
    spec = P(("data", "ep"))
    fn = jax.shard_map(
        lambda x, ids: _layer(x[0], ids[0])[None], mesh=mesh, in_specs=spec, out_specs=spec
    )
    x = np.arange(8 * 4 * 8, dtype=np.float32).reshape(8, 4, 8)
    ids = np.arange(32, dtype=np.int32).reshape(8, 4, 1) % 2
    assert_same_bits((jax.jit(fn) if jit else fn)(x, ids), x)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_a_layer_finds_the_mesh_that_is_set(jit):
    with jax.set_mesh(WIDE):
        _run(jit=jit)
        assert jax_ep.Group.get(axis="ep").mesh == WIDE
        assert jax_ep.Group.get(jax.sharding.get_abstract_mesh(), "ep").mesh == WIDE
    assert len([g for g in registry.open_groups.values() if g.mesh == WIDE]) == 1


def test_a_layer_finds_the_mesh_of_an_eager_shard_map():
    _run(WIDE, jit=False)


def test_a_layer_finds_the_open_group_of_the_mesh_under_jit():
    """Under jit, JAX knows the mesh without its devices."""
    with pytest.raises(jax_ep.GroupError, match="is open: pass mesh=, or call it under jax"):
        _run(WIDE)
    with jax_ep.Group.open(WIDE, "data"), jax_ep.Group.open(WIDE, "ep", name="named"):
        with pytest.raises(jax_ep.GroupError, match="no group over a mesh like it along axis 'ep'"):
            _run(WIDE)
        with jax_ep.Group.open(WIDE, "ep"):
            _run(WIDE)
            reordered = Mesh(WIDE.devices[:, ::-1], WIDE.axis_names)
            with (
                jax_ep.Group.open(reordered, "ep"),
                pytest.raises(jax_ep.GroupError, match="2 meshes like it are in use"),
            ):
                _run(WIDE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_mesh_as_context_manager_is_the_ambient_one():
    with MESH:
        assert jax_ep.Group.get().mesh == MESH


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_shard_map_inside_another_mesh_has_its_own():
    reordered = Mesh(WIDE.devices[:, ::-1], WIDE.axis_names)
    with WIDE:
        with jax_ep.Group.open(reordered, "ep"):
            _run(reordered, jit=False)
            with pytest.raises(jax_ep.GroupError, match="2 meshes like it are in use"):
                _run(reordered)
        _run(WIDE)


def test_a_failed_group_raises_and_is_not_opened_again():
    group = jax_ep.Group.open(MESH, "ep", timeout=0.5)
    group._native_group.handle.skip_rank(1)
    jax.block_until_ready(on_ranks(make_echo(group), MESH)(X, IDS))
    with pytest.raises(jax_ep.PeerTimeoutError, match="rank 0 waited for rank 1"):
        jax_ep.Group.get(MESH, "ep")
    group.close()
    again = jax_ep.Group.get(MESH, "ep")
    assert_same_bits(on_ranks(make_echo(again), MESH)(X, IDS), X)


def test_threads_get_one_group():
    found = []
    start = threading.Barrier(4)

    def get():
        start.wait()
        found.append(jax_ep.Group.get(MESH, "ep"))

    threads = [threading.Thread(target=get) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_processes_get_a_group_together():
    for output in run_on_cpus("get_together"):
        assert "closed and got again" in output
        assert "together" in output
