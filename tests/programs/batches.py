"""Runs calls of a batch, and of pipeline stages."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from joined import R, echo, ids, me, mesh, x

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_group, place

layers = np.stack([x, x + 1, x * 2])
routes = np.stack([ids, (ids + 1) % (4 * R), ids])
with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:

    def loss(x, ids):
        return jnp.sum(jnp.sin(echo(group, x, ids)))

    def each(x, ids):  # one process compiles more than the other, and numbers differ
        return [jax.grad(loss)(x[i], ids[i]) for i in range(3)]

    def mapped(x, ids):
        return jax.vmap(jax.grad(loss))(x, ids)

    args = layers.swapaxes(0, 1), routes.swapaxes(0, 1)
    if me == 1:
        jax.jit(jax.vmap(jnp.sin))(layers)
    loops, batches = (on_group(f, group)(*args) for f in (each, mapped))
    for i, wanted in enumerate(loops):
        for got, shard in zip(batches.addressable_shards, wanted.addressable_shards, strict=True):
            assert_same_bits(np.asarray(got.data)[:, i], np.asarray(shard.data))
        assert np.any(np.asarray(wanted.addressable_shards[0].data))

# Stages whose ranks sit in different processes.
stages = Mesh(mesh.devices.reshape(2, -1).T, ("stage", "ep"))
with jax_ep.Group.open(stages, "ep", name="stages", timeout=60.0) as group:

    def layer(x, ids):
        return echo(group, x[0], ids[0])[None]

    sharded = jax.shard_map(layer, mesh=stages, in_specs=P("ep"), out_specs=P("ep"))
    run = jax.jit(jax.vmap(sharded, spmd_axis_name="stage"))
    args = np.stack([x[:2], x[2:], x[:2] + 1, x[2:] - 1]), np.stack([ids[:2], ids[2:]] * 2)
    y = run(*place(args, stages, ()))
    times = (args[1][..., None] // 8 == np.arange(2)).any(axis=-2).sum(axis=-1, keepdims=True)
    assert_same_bits(y, args[0] * times.astype(np.float32))
print("passed")
