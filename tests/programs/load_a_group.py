"""Loads a group from the pickle argv[1] before and after it opens."""

import pickle
import sys
from pathlib import Path

import jax_ep
from jax_ep.testing import virtual_devices
from jax_ep.testing.ranks import make_mesh

virtual_devices()
text = Path(sys.argv[1]).read_bytes()
try:
    pickle.loads(text)
    raise AssertionError
except jax_ep.GroupError as e:
    print(e)
with jax_ep.Group.open(make_mesh(2), "ep", name="sent", backend="xla") as group:
    assert pickle.loads(text) is group
