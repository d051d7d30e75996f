"""Shares descriptors of memory, as groups of GPUs do, and fails to."""

import os
import time

import jax
from joined import R, me, mesh

from jax_ep._src.processes import native_group, unix_links
from jax_ep._src.processes.rendezvous import meet_processes


class Native:  # as that of GPUs is
    def __init__(self):
        self.got = {}

    def export_position(self, position, address):
        return [10 * position], os.memfd_create("control"), os.memfd_create("pool")

    def import_position(self, position, told, control, pool):
        assert not os.get_inheritable(control) and not os.get_inheritable(pool)
        os.close(control)
        os.close(pool)
        self.got[position] = told

    def complete(self):
        others = [p for p, d in enumerate(mesh.devices.flat) if d.process_index != me]
        assert self.got == {p: [10 * p] for p in others}, self.got


def fails(*args, **kwargs):
    raise OSError("too many open files")


for swap, expected in ((unix_links.swap, None), (fails, "process 1: too many open files")):
    with meet_processes(mesh, "pools", [0] * R, timeout=30.0, stacklevel=1) as rendezvous:
        rendezvous.connect(reads_memory=False)
        before = len(os.listdir("/proc/self/fd"))
        if me == 1:
            unix_links.swap = swap
        start = time.monotonic()
        why_not = native_group._share_devices(rendezvous, Native(), jax.devices(), with_pools=True)
        assert why_not == expected, why_not
        assert time.monotonic() - start < 10.0
        assert len(os.listdir("/proc/self/fd")) == before
        rendezvous.close()
print("passed")
