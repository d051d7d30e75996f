"""Writes an executable of a group to the file argv[1], in the form argv[2]."""

import pickle

import jax
from executables import args, file, how, mesh
from jax.experimental import serialize_executable

import jax_ep
from jax_ep.testing.ranks import on_ranks


def fn(x, ids):
    out = jax_ep.dispatch(x, ids, group=group, num_experts=2)
    return jax_ep.combine(out.x, out.handle)


with jax_ep.Group.open(mesh, "ep", name="wanted") as group:
    step = on_ranks(fn, mesh)
    if how == "export":
        checks = jax_ep.export_safety_checks()
        text = jax.export.export(step, disabled_checks=checks)(*args).serialize()
    else:
        text = pickle.dumps(serialize_executable.serialize(step.lower(*args).compile()))
    file.write_bytes(text)
    print(group.identity)
