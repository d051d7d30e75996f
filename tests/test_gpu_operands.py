"""Where an operand's memory comes from, on NVIDIA GPUs: no origin may cost the context."""

import os
import re

import pytest
from process_programs import START
from test_gpu_processes import GPUS

from jax_ep.testing import launch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

# Each operation on operands of one origin, compared with the same on arrays that XLA allocated.
TABLE = """
from jax_ep.testing.ranks import on_ranks, place
origin, large = sys.argv[1], "large" in sys.argv
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
            tensor = torch.from_numpy(array.copy()).to(f"cuda:{d.local_hardware_id}")
            torch.cuda.synchronize(tensor.device)
            shards.append(jax.dlpack.from_dlpack(tensor)[None])
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
timeout = 20.0
refused = 0
for name, op in OPS.items():
    with jax_ep.Group.open(mesh, "ep", name=name, timeout=timeout) as group:
        expected = on_ranks(lambda *a: op(*a, group), mesh, check_vma=False)(*everywhere(arrays))
        group.check(expected)
        try:
            for _ in range(3):  # XLA captures what runs again
                if origin == "constant":
                    def of_constants():
                        results = op(*map(jnp.asarray, arrays), group)
                        return jax.tree.map(lambda a: a[None], results)
                    out = jax.sharding.PartitionSpec("ep")
                    got = jax.jit(jax.shard_map(
                        of_constants, mesh=mesh, in_specs=(), out_specs=out, check_vma=False
                    ))()
                elif origin == "iota":
                    def of_iota(x, weights):
                        ids = jnp.arange(T)[:, None] + jnp.arange(2)
                        return op(x, ids % R, weights, group)
                    x, _, w = everywhere(arrays)
                    got = on_ranks(of_iota, mesh, check_vma=False)(x, w)
                else:
                    make = {"dlpack": torch_arrays, "pinned_host": on_host}.get(origin, everywhere)
                    got = on_ranks(lambda *a: op(*a, group), mesh, check_vma=False)(*make(arrays))
            group.check(got)
        except (jax_ep.JaxEpError, ValueError, NotImplementedError, TypeError) as e:
            print("refused", name, type(e).__name__, str(e).splitlines()[0], flush=True)
            refused += 1
            continue
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            for a, b in zip(g.addressable_shards, e.addressable_shards, strict=True):
                assert_same_bits(np.asarray(a.data), np.asarray(b.data))
    # The context lives.
    assert float(jnp.sum(jnp.ones(1000))) == 1000
print("refused in all", refused)
print("passed")
"""

ORIGINS = ["constant", "iota", "dlpack", "pinned_host", "pool"]
ALLOCATORS = {
    "bfc": {},
    "grows": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    "platform": {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
    "cuda_async": {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"},
}


def _run(num_processes, *argv, environment=None):
    found = launch.count_gpus()
    if found < 2:
        pytest.skip("needs two GPUs")
    start = START if num_processes > 1 else START.replace("launch.initialize()", "")
    gpus = GPUS if num_processes > 1 else "from jax_ep.testing.conformance import reductions\n"
    outputs = launch.launch(
        ["-c", start + gpus + TABLE, *argv],
        num_processes=num_processes,
        deadline=200.0,
        environment={
            "XLA_FLAGS": "",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.2",
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cuda,cpu"),
            **(environment or {}),
        },
    )
    assert all(output.endswith("passed\n") for output in outputs), outputs
    return [int(re.search(r"refused in all (\d+)", output)[1]) for output in outputs]


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("origin", ORIGINS)
def test_origins(num_processes, origin):
    """Small operands of every origin are carried, or refused while tracing."""
    refused = _run(num_processes, origin)
    # JAX itself takes no operand in host memory beside ones on the device.
    assert refused == [3 if origin == "pinned_host" else 0] * num_processes


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("origin", ["constant", "dlpack"])
def test_large_operands_are_carried_or_the_group_fails_with_the_reason(num_processes, origin):
    _run(num_processes, origin, "large")


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_allocators(num_processes, allocator):
    for origin in ("pool", "constant"):
        refused = _run(num_processes, origin, environment=ALLOCATORS[allocator])
        assert refused == [0] * num_processes
