"""Runs operations on operands of the origins in argv, whose last word is `small` or `large`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from joined import R, mesh

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks, place

# Each operation runs on operands of one origin, and is compared with arrays that XLA allocated.
*origins, size = sys.argv[1:]
T, H = (4096, 1024) if size == "large" else (64, 256)  # 16 MiB of rows, or less than is pushed
rng = np.random.default_rng(1)
rows = rng.integers(-8, 9, (T, H)).astype(np.float32)  # the same on all ranks
weights = rng.integers(1, 5, (T, 2)).astype(np.float32)
idx = np.stack([np.arange(T) % R, (np.arange(T) + 1) % R], axis=1).astype(np.int32)


def sums(x, group):
    return (
        jax_ep.all_reduce(x, group=group, allow_psum=False),
        jax_ep.reduce_scatter(x.reshape(R, -1), group=group, allow_psum=False),
        jax_ep.all_gather(x, group=group, allow_psum=False),
        jax_ep.all_reduce_residual_rmsnorm(x, x, x[0], group=group, eps=1e-6),
    )


def exchange(layout):
    def fn(x, ids, weights, group):
        out = jax_ep.dispatch(
            x, ids, weights, group=group, num_experts=R, layout=layout, recv_capacity=2 * T * R
        )
        again = jax_ep.dispatch(x, handle=out.handle)
        # Rows that were not dispatched: they are of the origin too.
        y = jax_ep.combine(jnp.tile(x, (2 * R, 1)), out.handle)
        return out.x, out.group_sizes, again.x, y

    return fn


OPS = {
    "sums": lambda x, ids, weights, group: sums(x, group),
    "rank": exchange("rank"),
    "expert": exchange("expert"),
}


def torch_arrays(arrays):
    import torch

    def one(array):
        shards = []
        for d in mesh.local_devices:
            with torch.cuda.device(d.local_hardware_id):
                tensor = torch.from_numpy(array[None].copy()).cuda()
                torch.cuda.synchronize()
                shards.append(jax.dlpack.from_dlpack(tensor))
        shape = (R, *array.shape)
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("ep"))
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    return [one(a) for a in arrays]


def on_host(arrays):
    spec = jax.sharding.PartitionSpec("ep")
    host = jax.sharding.NamedSharding(mesh, spec, memory_kind="pinned_host")
    return [jax.device_put(a, host) for a in everywhere(arrays)]


def everywhere(arrays):
    return place([np.broadcast_to(a, (R, *a.shape)) for a in arrays], mesh)


arrays = [rows, idx, weights]


def results_of(origin, op, group):
    if origin == "constant":

        def of_constants():
            results = op(*map(jnp.asarray, arrays), group)
            return jax.tree.map(lambda a: a[None], results)

        out = jax.sharding.PartitionSpec("ep")
        mapped = jax.shard_map(of_constants, mesh=mesh, in_specs=(), out_specs=out, check_vma=False)
        return jax.jit(mapped)()
    if origin == "iota":

        def of_iota(x, weights):
            ids = jnp.arange(T)[:, None] + jnp.arange(2)
            return op(x, ids % R, weights, group)

        x, _, w = everywhere(arrays)
        return on_ranks(of_iota, mesh, check_vma=False)(x, w)
    make = {"dlpack": torch_arrays, "pinned_host": on_host}.get(origin, everywhere)
    return on_ranks(lambda *a: op(*a, group), mesh, check_vma=False)(*make(arrays))


def compare(name, op, origins):
    for turn, origin in enumerate(["pool", *origins]):
        group = jax_ep.Group.open(mesh, "ep", name=f"{name}_{origin}_{turn}", timeout=20.0)
        assert group.backend == "cuda", group.info()
        try:
            for _ in range(3):  # XLA captures what runs again
                got = results_of(origin, op, group)
            group.check(got)
        except jax_ep.JaxEpError as e:
            print("refused", origin, name, type(e).__name__, e, flush=True)
            continue
        finally:
            group.close()
        got = [[np.asarray(s.data) for s in a.addressable_shards] for a in jax.tree.leaves(got)]
        if turn == 0:
            expected = got
        for g, e in zip(got, expected, strict=True):
            for a, b in zip(g, e, strict=True):
                assert_same_bits(a, b)
        print("carried", origin, name, flush=True)


for name, op in OPS.items():
    compare(name, op, origins)
# The context lives.
assert float(jnp.sum(jnp.ones(1000))) == 1000
print("passed")
