"""Parts of the programs of several processes. The import joins the processes of `launch`."""

import os

import jax
import numpy as np

import jax_ep
from jax_ep.testing import launch
from jax_ep.testing.ranks import make_mesh

_NUM_PROCESSES = int(os.environ["JAX_EP_NUM_PROCESSES"])

if _NUM_PROCESSES > 1:
    launch.initialize()

mesh = make_mesh(len(jax.devices()))
me = jax.process_index()
R = mesh.devices.size

if os.environ.get("JAX_PLATFORMS") != "cpu":  # on GPUs
    assert max(jax.process_count(), launch.count_gpus()) == R > 1
    assert jax.process_count() == _NUM_PROCESSES

_rng = np.random.default_rng(0)
x = _rng.integers(-8, 9, (R, 16, 64)).astype(np.float32)
ids = _rng.integers(0, 4 * R, (R, 16, 3)).astype(np.int32)


def echo(group, x, ids, num_ranks=R):
    """Sends rows to 4 experts a rank, and adds up what comes back."""
    out = jax_ep.dispatch(x, ids, group=group, num_experts=4 * num_ranks)
    return jax_ep.combine(out.x, out.handle)


def num_ranks_of(ids, num_ranks=R):
    """Counts the ranks of each row's experts, with an axis of one for the row's elements."""
    is_sent = (ids[..., None] // 4 == np.arange(num_ranks)).any(axis=-2)
    return is_sent.sum(axis=-1, keepdims=True)
