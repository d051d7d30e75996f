"""Ends while JAX keeps its class, and so its variables: argv[1] says what they hold."""

import copy
import dataclasses
import sys
import threading
import time

import jax
import numpy as np

import jax_ep
from jax_ep.testing import virtual_devices
from jax_ep.testing.ranks import make_mesh, on_ranks

virtual_devices()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    weights: jax.Array | np.ndarray
    group: jax_ep.Group = dataclasses.field(metadata={"static": True})


x, ids = np.ones((2, 4, 8), np.float32), np.zeros((2, 4, 1), np.int32)


def send(x, ids):
    return jax_ep.dispatch(x, ids, group=model.group, num_experts=2)


def watch(group):
    while True:
        group.check()
        time.sleep(0.001)


held = sys.argv[1]
if held == "open":
    model = Model(x, jax_ep.Group.open(make_mesh(2), "ep"))
elif held == "got":
    model = Model(x, jax_ep.Group.get(make_mesh(2), "ep"))
elif held == "closed":
    with jax_ep.Group.open(make_mesh(2), "ep") as group:
        model = Model(x, group)
elif held == "compiled":
    model = Model(x, jax_ep.Group.open(make_mesh(2), "ep"))
    step = on_ranks(send, model.group.mesh)
    out = step(x, ids)
    again = copy.deepcopy(out.handle)
elif held == "opened again":
    first = Model(x, jax_ep.Group.open(make_mesh(2), "ep"))
    first.group.close()
    model = Model(x, jax_ep.Group.open(make_mesh(2), "ep"))
    on_ranks(send, model.group.mesh)(x, ids)
elif held == "a thread":
    model = Model(x, jax_ep.Group.open(make_mesh(2), "ep"))
    threading.Thread(target=watch, args=(model.group,), daemon=True).start()
elif held == "a failure":
    model = Model(x, jax_ep.Group.open(make_mesh(2), "ep", timeout=0.2))
    model.group._native_group.handle.skip_rank(1)
    try:
        model.group.check(on_ranks(send, model.group.mesh)(x, ids))
    except jax_ep.PeerTimeoutError as e:
        told = e
else:
    raise ValueError(held)
print("end")
