"""Runs every argv[1]-th conformance check; argv may say `stages`, `shares` and `sums`."""

import sys

from joined import mesh

import jax_ep
from jax_ep.testing import conformance
from jax_ep.testing.conformance import reductions

with jax_ep.Group.open(mesh, "ep", timeout=20.0) as group:
    info = group.info()
    assert info.backend == "cuda", info
    assert (info.staging is not None) == ("stages" in sys.argv), info
    checks = [c for c in conformance.CHECKS if c.not_usable(group, "cuda") is None]
    if "shares" in sys.argv:
        checks = [c for c in checks if not c.uses_stock]
    assert len(checks) > 50
    chosen = checks[:: int(sys.argv[1])]
    if "sums" in sys.argv:
        chosen = [c for c in checks if c.run.__module__ == reductions.__name__]
    for check in chosen:
        print("checking", check, flush=True)
        check(group, "cuda")
print("passed")
