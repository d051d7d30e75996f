"""Runs calls of a batch, of pipeline stages, and of ranks with tokens of several sources."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from joined import R, echo, ids, me, mesh, x

import jax_ep
from jax_ep._src.base.options import ExchangeMode, Fill, Layout
from jax_ep._src.base.spec import DispatchSpec, Route, Routes
from jax_ep._src.ops.dispatch import call
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

    # Rows and weights are the numbers of their tokens in the order of the sources.
    parts, tokens = 2, 8
    numbers = np.arange(parts * R * tokens, dtype=np.int32).reshape(parts, R, tokens)
    numbers = numbers.swapaxes(0, 1).reshape(R, parts * tokens, 1)
    spec = DispatchSpec(
        group=group.spec,
        routes=Routes(*[Route("cpu", 1)] * 3),
        layout=Layout.RANK,
        recv_capacity=numbers.size,
        op="dispatch",
        mode=ExchangeMode.THROUGHPUT,
        few_sms=None,
        num_experts=4 * R,
        expert_alignment=1,
        fill=Fill.ZEROS,
    )

    def in_parts(ids, numbers):
        weights = jnp.broadcast_to(numbers.astype(jnp.float32), ids.shape)
        return call.dispatch(spec, ids, weights, (numbers,), num_parts=parts)

    out = on_group(in_parts, group)(ids, numbers)
    goes = (ids[..., None] // 4 == np.arange(R)).any(axis=-2)
    wanted = np.full((R, numbers.size), -1, np.int32)
    for dst in range(R):
        sent = np.sort(numbers[..., 0][goes[..., dst]])
        wanted[dst, : len(sent)] = sent
    assert_same_bits(out.recv_src, wanted)
    assert_same_bits(out.rows[0], np.maximum(wanted, 0)[..., None])
    largest = np.maximum(wanted, 0).astype(np.float32)
    for got, shard in zip(
        out.recv_weights.addressable_shards, out.recv_src.addressable_shards, strict=True
    ):
        assert_same_bits(np.asarray(got.data).max(axis=-1), largest[shard.index])

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
