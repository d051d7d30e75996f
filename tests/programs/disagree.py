"""Opens groups with settings and tables that differ between the processes."""

import json
import os
import tempfile

from joined import me, mesh

import jax_ep
from jax_ep._src.base import tables

try:
    jax_ep.Group.open(mesh, "ep", num_sms=20 + me, timeout=30.0)
except jax_ep.GroupError as e:
    print(e)
steps = {op: [[8 + me * (op == "all_gather"), "one_shot"], [None, "psum"]] for op in tables.OPS}
with tempfile.NamedTemporaryFile("w") as file:
    json.dump({"tables": [{"device": "any", "num_ranks": 1, "ops": steps}]}, file)
    file.flush()
    os.environ["JAX_EP_TUNING"] = file.name
    try:
        jax_ep.Group.open(mesh, "ep", timeout=30.0)
    except jax_ep.GroupError as e:
        print(e)


# Numbers, a back end that "auto" takes in its place, and neither where the caller says more.
def open_with(combine, **options):
    budgets = {e: {"rank": {"sms": 8}, "expert": {"sms": 8}} for e in tables.EXCHANGES}
    budgets = {**budgets, "source": f"process {me}"}
    budgets["combine"] = {"rank": {"sms": 8}, "expert": combine}
    entry = {"device": "any", "num_ranks": 1, "budgets": budgets}
    with tempfile.NamedTemporaryFile("w") as file:
        json.dump({"tables": [entry]}, file)
        file.flush()
        os.environ["JAX_EP_TUNING"] = file.name
        try:
            jax_ep.Group.open(mesh, "ep", timeout=30.0, **options).close()
            print("opened", options)
        except jax_ep.GroupError as e:
            print(options, e)


open_with({"sms": 8 + me})
open_with({"sms": 8, **({"backend": "xla"} if me else {})})
open_with({"sms": 8, **({"backend": "xla"} if me else {})}, backend="cpu")
open_with({"sms": 8 + me}, num_sms=9)
open_with({"sms": 8})
