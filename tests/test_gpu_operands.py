"""Operands of every origin of memory, on NVIDIA GPUs: none may destroy the CUDA context."""

import os
import re

import pytest
from process_programs import START
from test_gpu_processes import GPUS

from jax_ep.testing import launch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

# Each operation runs on operands of one origin, and is compared with arrays that XLA allocated.
TABLE = """
from jax_ep.testing.ranks import on_ranks, place
*origins, large = sys.argv[1:]
large = large == "large"
T, H = (4096, 1024) if large else (64, 256)  # 16 MiB of rows, or less than is pushed
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
        expected = got if turn == 0 else expected
        for g, e in zip(got, expected, strict=True):
            for a, b in zip(g, e, strict=True):
                assert_same_bits(a, b)
        print("carried", origin, name, flush=True)

for name, op in OPS.items():
    compare(name, op, origins)
# The context lives.
assert float(jnp.sum(jnp.ones(1000))) == 1000
print("passed")
"""

ORIGINS = ["constant", "iota", "dlpack", "pinned_host"]
ALLOCATORS = {
    "grows": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    "platform": {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
    "cuda_async": {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"},
}


def _run(num_processes, *argv, environment=None):
    """Runs a program; returns the outcome of each (origin, operation), equal in all processes."""
    found = launch.count_gpus()
    if found < 2:
        pytest.skip("needs two GPUs")
    start = START if num_processes > 1 else START.replace("launch.initialize()", "")
    gpus = GPUS if num_processes > 1 else "from jax_ep.testing.conformance import reductions\n"
    outputs = launch.launch(
        ["-c", start + gpus + TABLE, *argv],
        num_processes=num_processes,
        deadline=280.0,
        environment={
            "XLA_FLAGS": "",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.2",
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cuda,cpu"),
            **(environment or {}),
        },
    )
    assert all("\npassed\n" in output for output in outputs), outputs
    tables = [re.findall(r"^(carried|refused) (\w+) (\w+)", out, re.MULTILINE) for out in outputs]
    assert all(table == tables[0] for table in tables), tables
    return {(origin, name): verdict for verdict, origin, name in tables[0]}, outputs[0]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_small_operands_of_every_origin_are_carried(num_processes):
    """The custom calls carry small operands of every origin."""
    table, output = _run(num_processes, *ORIGINS, "small")
    assert len(table) == 3 * (len(ORIGINS) + 1)
    assert set(table.values()) == {"carried"}, output


@pytest.mark.parametrize("num_processes", [1, 2])
def test_large_operands_are_carried_or_the_group_fails_with_the_reason(num_processes):
    table, output = _run(num_processes, "constant", "dlpack", "large")
    assert all(verdict == "carried" for (origin, _), verdict in table.items() if origin == "pool")
    for line in re.findall(r"^refused .*", output, re.MULTILINE):
        assert "JAX_EP_STAGING_MB" in line


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_operands_of_every_allocator_are_carried(num_processes, allocator):
    table, output = _run(num_processes, "constant", "small", environment=ALLOCATORS[allocator])
    assert set(table.values()) == {"carried"}, output
