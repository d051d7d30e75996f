"""Opens groups one after another, some with settings that differ, at random times."""

import time

import numpy as np
from joined import me, mesh

import jax_ep

rng = np.random.default_rng(me)
for i in range(15):
    time.sleep(rng.random() * 0.06)
    with jax_ep.Group.open(mesh, "ep", backend="xla", timeout=30.0):
        pass
    if i % 3 == 0:
        try:
            jax_ep.Group.open(mesh, "ep", num_sms=20 + me, timeout=30.0)
            raise AssertionError
        except jax_ep.GroupError as e:
            assert "disagree about num_sms" in str(e), e
print("passed")
