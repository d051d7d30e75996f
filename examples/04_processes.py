"""Runs a program in several processes, with one mesh over the devices of all of them.

On one machine: starts two processes and waits for both. On a laptop each has four virtual devices;
where there are GPUs they share them equally.

    python examples/04_processes.py --processes 2
    python examples/04_processes.py --processes 2 examples/02_train.py --steps 20

One process per GPU, started by hand, on one host or several; `--gpu` counts from 0 on each host:

    python examples/04_processes.py --coordinator host0:8476 --of 2 --process 0 --gpu 0 &
    python examples/04_processes.py --coordinator host0:8476 --of 2 --process 1 --gpu 1

Under Slurm, where JAX finds out by itself who is who, and gives each task one of the GPUs that it
sees, which must be all of the node for tasks to reach one another's (never tried by us):

    srun --ntasks-per-node=8 --gpus-per-node=8 --gpu-bind=none python examples/04_processes.py

Without a program it sends tokens through `dispatch` and `combine` and compares the result with what
NumPy says. `group.info()` tells which back end carries the rows, and why: between the processes of
one host the custom calls do, in place; between hosts stock collectives.
"""

import argparse
import os
import runpy
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

import jax_ep
from jax_ep.testing import launch, virtual_devices
from jax_ep.testing.ranks import on_group

TOKENS, HIDDEN, TOPK, EXPERTS_PER_RANK = 256, 512, 2, 4
STEPS = 20
DEADLINE_S = 1800.0


def parse_flags() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--processes", type=int, help="start so many here, and wait for them")
    parser.add_argument("--devices", type=int, default=4, help="virtual CPU devices of each")
    parser.add_argument("--coordinator", help="host:port of process 0, where JAX cannot find it")
    parser.add_argument("--of", type=int, help="how many processes there are")
    parser.add_argument("--process", type=int, help="which of them this one is")
    parser.add_argument("--gpu", type=int, help="the only one that this process sees")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="a script and its arguments")
    return parser.parse_args()


def start_processes(flags: argparse.Namespace) -> int:
    """This same program, several times; what each has written is shown when all have ended."""
    outputs = launch.launch(
        [__file__, *flags.program],
        num_processes=flags.processes,
        num_devices=flags.devices,
        deadline=DEADLINE_S,
    )
    for process, output in enumerate(outputs):
        print(f"--- process {process}\n{output.rstrip()}")
    return 0


def join(flags: argparse.Namespace) -> None:
    """Makes this process one of several, however it was started."""
    if "JAX_EP_COORDINATOR" in os.environ:
        launch.initialize()
    elif flags.coordinator is None:
        jax.distributed.initialize()
    else:
        own = None if flags.gpu is None else [flags.gpu]
        jax.distributed.initialize(flags.coordinator, flags.of, flags.process, local_device_ids=own)


def demonstrate() -> int:
    """A round trip of every token, checked on this process's devices."""
    mesh = Mesh(np.array(jax.devices()), ("expert",))
    num_ranks = mesh.size
    num_experts = EXPERTS_PER_RANK * num_ranks
    random = np.random.default_rng(0)  # alike in all processes
    x = random.integers(-8, 9, (num_ranks, TOKENS, HIDDEN)).astype(np.float32)
    ids = random.integers(0, num_experts, (num_ranks, TOKENS, TOPK)).astype(np.int32)

    with jax_ep.Group.open(mesh, "expert") as group:
        info = group.info()
        print(f"{group}; process {jax.process_index()} of {jax.process_count()}")
        for backend, reason in info.backends.items():
            print(f"  {backend}: {reason}")

        def round_trip(x: jax.Array, ids: jax.Array) -> jax.Array:
            out = jax_ep.dispatch(x, ids, group=group, num_experts=num_experts)
            return jax_ep.combine(out.x, out.handle)

        step = on_group(round_trip, group)
        y = step(x, ids)
        started = time.perf_counter()
        for _ in range(STEPS):
            y = jax.block_until_ready(step(x, ids))
        milliseconds = (time.perf_counter() - started) / STEPS * 1e3
        group.check(y)

    ranks = ids[..., None] // EXPERTS_PER_RANK == np.arange(num_ranks)
    expected = x * ranks.any(axis=-2).sum(axis=-1, keepdims=True)
    for shard in y.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])
    print(f"every token came back from every rank it was sent to; {milliseconds:.1f} ms a round")
    return 0


def main() -> int:
    flags = parse_flags()
    if flags.processes is not None:
        return start_processes(flags)
    virtual_devices(flags.devices)
    join(flags)
    if not flags.program:
        return demonstrate()
    sys.argv = flags.program
    sys.path[0] = str(Path(flags.program[0]).parent)  # as Python does for a script
    runpy.run_path(flags.program[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
