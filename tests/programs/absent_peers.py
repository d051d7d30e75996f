"""Opens groups to which the other process does not come, or comes late."""

import time

from joined import me, mesh

import jax_ep

start = time.monotonic()
try:
    jax_ep.Group.open(mesh, "ep", name=f"name{me}", timeout=2.0)
except jax_ep.GroupError as e:
    print(e)
print("waited", time.monotonic() - start < 3.0)
if me == 0:  # this opening fails; the other process comes to the next one
    try:
        jax_ep.Group.open(mesh, "ep", name="late", timeout=1.0)
    except jax_ep.GroupError as e:
        assert "process 1 did not open" in str(e)
time.sleep(0 if me == 0 else 2.0)
with jax_ep.Group.open(mesh, "ep", name="late", timeout=20.0):
    print("opened late")
