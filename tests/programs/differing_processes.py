"""Runs calls in processes that differ in argv[1]; argv[2] is a folder for caches."""

import sys

import jax
import numpy as np
from joined import R, echo, ids, me, mesh, num_ranks_of, x

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks, place

how, folder = sys.argv[1:]
if how == "cache" and me == 0:  # JAX writes the caches of process 0 alone
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def differ_before(run, *arrays):
    if me == 0 and how == "text":
        # The executables stay: they are copies of what will run.
        return [run.lower(*arrays).compile() for _ in range(2)]
    if me == 1 and how == "locations":
        jax.config.update("jax_include_full_tracebacks_in_locations", False)
    return None


def differ_between():
    if me == 1 and how == "clear":
        jax.clear_caches()


def call(run, *arrays):
    if me == 1 and how == "line":
        return run(*arrays)
    return run(*arrays)


mesh_x = place((x, ids), mesh)
with jax_ep.Group.open(mesh, "ep", timeout=20.0) as group:

    @jax.jit
    def layer(x, ids):
        return echo(group, x, ids)

    def independent(x, ids):  # one jitted function, many calls, in any order on each rank
        calls = [layer(x * (i + 1), (ids + i) % (4 * R)) for i in range(12)]
        sums = [jax_ep.all_reduce(x + i, group=group) for i in range(4)]
        return calls, sums, jax.lax.psum(x, "ep")

    def scan(x, ids):
        return jax.lax.scan(lambda x, _: (layer(x, ids) * 0 + x + 1, None), x, length=8)[0]

    programs = {f.__name__: on_ranks(f, mesh, check_vma=False) for f in (independent, scan)}
    kept = [differ_before(run, *mesh_x) for run in programs.values()]
    if how == "alone" and me == 0:
        kept.append(on_ranks(lambda x, ids: layer(x, ids) * 2, mesh).lower(*mesh_x).compile())
    in_flight = []
    for turn in range(4):
        for name, run in programs.items():
            scaled = place((x * (turn + 1), ids), mesh)
            in_flight.append((name, turn + 1, call(run, *scaled)))
        if turn % 2:
            differ_between()
    for name, scale, results in in_flight:
        group.check(results)
        own = x * scale
        if name == "scan":
            assert_same_bits(results, own + 8)
            continue
        calls, sums, _ = results
        for i, y in enumerate(calls):
            number = num_ranks_of((ids + i) % (4 * R)).astype(np.float32)
            assert_same_bits(y, own * (i + 1) * number)
        for i, y in enumerate(sums):
            assert_same_bits(y, np.broadcast_to((own + i).sum(axis=0), own.shape))
print("passed")
