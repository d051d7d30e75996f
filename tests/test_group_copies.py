"""Copies and pickles of groups, and of objects that hold groups."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from process_programs import path_of
from steps import make_echo

import jax_ep
from jax_ep.testing.cases import Case, dispatch, make_data
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import make_mesh, on_ranks

X = np.ones((2, 4, 8), np.float32)
IDS = np.arange(8, dtype=np.int32).reshape(2, 4, 1) % 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    weights: jax.Array
    group: jax_ep.Group = dataclasses.field(metadata={"static": True})


@pytest.fixture
def model(groups):
    return Model(jax.numpy.ones((8, 8)), groups(2))


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "tree": lambda value: jax.tree.map(lambda leaf: leaf, value),
    "asdict": lambda value: type(value)(**dataclasses.asdict(value)),
    "replace": dataclasses.replace,
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_a_model_have_its_group(model, way):
    again = COPIES[way](model)
    assert again.group is model.group
    np.testing.assert_array_equal(again.weights, model.weights)
    assert_same_bits(on_ranks(make_echo(again.group), again.group.mesh)(X, IDS), X)


@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle"])
def test_copies_of_a_group_are_the_group(groups, way):
    assert COPIES[way](groups(2)) is groups(2)
    assert COPIES[way]([groups(2), groups(2)]) == [groups(2), groups(2)]


def test_a_closed_group_is_copied_and_its_pickle_finds_the_next_one():
    with jax_ep.Group.open(make_mesh(2), "ep", name="copied") as first:
        text = pickle.dumps(first)
    assert copy.copy(first) is first
    assert copy.deepcopy(first) is first
    assert pickle.dumps(first) == text
    with pytest.raises(jax_ep.GroupError, match=rf"pickle: group {first.identity} is not open"):
        pickle.loads(text)
    with jax_ep.Group.open(make_mesh(2), "ep", name="copied") as second:
        assert pickle.loads(text) is second


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_a_handle_lead_back(groups, layout, way):
    """Copies have equal arrays, and find the group by its identity."""
    group, case = groups(4), Case(4, layout)
    data = make_data(case, "skewed")
    send = on_ranks(lambda x, ids, w: dispatch(case, group, "cpu", x, ids, w), group.mesh)
    out = send(data.x, data.topk_idx, data.topk_weights)
    back = on_ranks(jax_ep.combine, group.mesh)
    expected = back(data.rows, out.handle)
    assert_same_bits(back(data.rows, COPIES[way](out.handle)), expected)
    if way != "asdict":  # asdict makes a dict of the handle, too
        assert_same_bits(back(data.rows, COPIES[way](out).handle), expected)


def test_pickles_find_the_group_of_another_process(tmp_path):
    file = tmp_path / "pickle"
    with jax_ep.Group.open(make_mesh(2), "ep", name="sent") as group:
        file.write_bytes(pickle.dumps(group))
    done = subprocess.run(
        [sys.executable, path_of("load_a_group"), str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"pickle: group {group.identity} is not open in this process")
