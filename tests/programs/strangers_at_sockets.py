"""Opens a group while strangers fill the queues of its sockets."""

import socket
import time

import numpy as np
from joined import echo, ids, mesh, num_ranks_of, x

import jax_ep
from jax_ep._src.processes import unix_links
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_group

listen = unix_links.listen


def listen_amid_strangers(*args):
    listener, address = listen(*args)
    with open("/proc/net/unix") as sockets:  # as anyone on this host can read
        assert any(line.endswith("@" + address + "\n") for line in sockets)
    for _ in range(1000):
        strangers.append(socket.socket(socket.AF_UNIX))
        strangers[-1].setblocking(False)
        try:
            strangers[-1].connect("\0" + address)
        except BlockingIOError:  # no more room
            break
    return listener, address


strangers: list[socket.socket] = []
unix_links.listen = listen_amid_strangers
start = time.monotonic()
with jax_ep.Group.open(mesh, "ep", timeout=80.0) as group:
    assert time.monotonic() - start < 20.0
    assert group.backend == "cpu", group.info()
    y = on_group(lambda x, ids: echo(group, x, ids), group)(x, ids)
    assert_same_bits(y, x * num_ranks_of(ids).astype(np.float32))
print("passed")
