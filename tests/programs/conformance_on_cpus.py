"""Runs every argv[2]-th conformance check on back end argv[1]."""

import sys

from joined import mesh

import jax_ep
from jax_ep.testing import conformance

with jax_ep.Group.open(mesh, "ep", timeout=60.0) as group:
    backend = sys.argv[1]
    info = group.info()
    assert info.backend == "cpu", info
    assert info.backends["cpu"] == info.backends["xla"] == "usable", info
    checks = [c for c in conformance.CHECKS if c.not_usable(group, backend) is None]
    assert len(checks) > 50
    always = (  # however few: what adds up, in both layouts, and pieces
        "sums[op=all_reduce,dtype=f32,algorithm=one_shot]",
        "norms[dtype=bf16,algorithm=one_shot]",
        "norm_gradients[check_vma=True,outside=True]",
        "gradients[layout=expert,dtype=f32,check_vma=True,outside=True]",
        "ragged_pieces[dtype=f32,width=3,per_peer=2]",
        "packed_rows[capacity=37]",
    )
    chosen = [c for c in checks if c.name in always and backend == "cpu"]
    assert len(chosen) in (0, len(always))
    for check in {c.name: c for c in [*checks[:: int(sys.argv[2])], *chosen]}.values():
        print("checking", check, flush=True)
        check(group, backend)
print("passed")
