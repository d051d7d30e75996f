"""One mixture-of-experts layer on eight virtual CPU devices, or on the GPUs of this machine.

python examples/01_moe_layer.py
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.testing import virtual_devices

TOPK, EXPERTS_PER_DEVICE, TOKENS_PER_DEVICE, HIDDEN, INNER = 2, 2, 64, 32, 64


def moe_layer(x, router, w_in, w_out, group):
    """One device's share: x [T, H]; w_in [E/R, H, F], w_out [E/R, F, H] of the experts it owns."""
    weights, topk_idx = jax.lax.top_k(jax.nn.softmax(x @ router), TOPK)
    sizes = {"num_experts": router.shape[1], "layout": "expert"}
    rows = jax_ep.recv_capacity(
        num_tokens=len(x), num_topk=TOPK, num_ranks=group.num_ranks, balance=None, **sizes
    )
    sent = jax_ep.dispatch(x, topk_idx, weights, group=group, recv_capacity=rows, **sizes)
    hidden = jax.nn.silu(jax.lax.ragged_dot(sent.x, w_in, sent.group_sizes))
    answers = jax.lax.ragged_dot(hidden, w_out, sent.group_sizes)
    return jax_ep.combine(answers, sent.handle, weights=sent.weights)


def dense_layer(x, router, w_in, w_out):
    """The same function of global arrays: every expert answers every token."""
    weights, topk_idx = jax.lax.top_k(jax.nn.softmax(x @ router), TOPK)
    gates = jnp.einsum("tk,tke->te", weights, jax.nn.one_hot(topk_idx, len(w_in)))
    hidden = jax.nn.silu(jnp.einsum("th,ehf->tef", x, w_in))
    return jnp.einsum("te,tef,efh->th", gates, hidden, w_out)


virtual_devices(8)
mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
experts, shard = mesh.size * EXPERTS_PER_DEVICE, P("expert")
shapes: list[tuple[int, ...]] = [(mesh.size * TOKENS_PER_DEVICE, HIDDEN), (HIDDEN, experts)]
shapes += [(experts, HIDDEN, INNER), (experts, INNER, HIDDEN)]
args = [jax.random.normal(jax.random.key(i), s) / 4 for i, s in enumerate(shapes)]
with jax_ep.Group.open(mesh, "expert") as group:
    layer = partial(moe_layer, group=group)
    layer = jax.shard_map(layer, mesh=mesh, in_specs=(shard, P(), shard, shard), out_specs=shard)
    y = jax.jit(layer)(*args)
    print(f"{group}: y {y.shape}, off by at most {jnp.abs(y - dense_layer(*args)).max():.1g}")
