"""Runs every argv[1]-th conformance check; argv may say `stages`, `shares`, `sums`, `nodes=2`.

With nodes of so many ranks, it runs the checks of dispatch and combine, which have two levels.
"""

import sys

from joined import mesh

import jax_ep
from jax_ep.testing import conformance
from jax_ep.testing.conformance import reductions

LEVELS = {"dispatch", "dispatch_fp8", "combine", "combine_weights"}
ranks_per_node = next((int(a.partition("=")[2]) for a in sys.argv if "nodes=" in a), None)

with jax_ep.Group.open(mesh, "ep", timeout=20.0, ranks_per_node=ranks_per_node) as group:
    info = group.info()
    assert info.backend == "cuda", info
    assert (info.staging is not None) == ("stages" in sys.argv), info
    checks = [c for c in conformance.CHECKS if c.not_usable(group, "cuda") is None]
    if "shares" in sys.argv:
        checks = [c for c in checks if not c.uses_stock]
    if ranks_per_node is not None:
        checks = [c for c in checks if c.ops <= LEVELS]
        assert info.transport.startswith("mapped: "), info
    assert len(checks) > 50
    chosen = checks[:: int(sys.argv[1])]
    if "sums" in sys.argv:
        chosen = [c for c in checks if c.run.__module__ == reductions.__name__]
    for check in chosen:
        print("checking", check, flush=True)
        check(group, "cuda")
print("passed")
