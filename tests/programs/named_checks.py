"""Runs the conformance checks that argv names, on back end xla."""

import sys

from joined import mesh

import jax_ep
from jax_ep.testing import conformance

checks = {check.name: check for check in conformance.CHECKS}
with jax_ep.Group.open(mesh, "ep", backend="xla") as group:
    for name in sys.argv[1:]:
        checks[name](group, "xla")
print(len(sys.argv) - 1, "checks passed")
