"""Parts of the programs over hosts. On import, every argv[1] processes claim to be on one host."""

import sys

import jax
import numpy as np
from jax.sharding import Mesh
from joined import ids, me

from jax_ep._src.processes import unix_links

_PER_HOST = int(sys.argv[1])
num_hosts = jax.process_count() // _PER_HOST


def _host():
    return f"host{me // _PER_HOST}"


unix_links.host = _host


def make_slices(num_slices):
    """Returns a mesh of slices, and ids of 4 experts a rank of a slice."""
    mesh = Mesh(np.array(jax.devices()).reshape(num_slices, -1), ("data", "expert"))
    return mesh, ids % (4 * mesh.shape["expert"])
