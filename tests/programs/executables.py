"""Parts of the programs on executables, whose argv is a file, and `export` or `serialized`."""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ep.testing import virtual_devices
from jax_ep.testing.ranks import make_mesh

virtual_devices()
mesh = make_mesh(2)
x = np.arange(2 * 4 * 8, dtype=np.float32).reshape(2, 4, 8)
ids = np.arange(8, dtype=np.int32).reshape(2, 4, 1) % 2
args = jax.device_put((x, ids), NamedSharding(mesh, P("ep")))
file, how = Path(sys.argv[1]), sys.argv[2]
