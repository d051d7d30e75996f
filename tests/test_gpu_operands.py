"""Operands of every origin of memory, on NVIDIA GPUs: none may destroy the CUDA context."""

import os
import re

import pytest
from process_programs import path_of

from jax_ep.testing import launch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


ORIGINS = ["constant", "iota", "dlpack", "pinned_host"]
ALLOCATORS = {
    "grows": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    "platform": {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
    "cuda_async": {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"},
}


def _run(num_processes, *argv, environment=None):
    """Runs a program; returns the outcome of each (origin, operation), equal in all processes."""
    found = launch.count_gpus()
    if found < 2:
        pytest.skip("needs two GPUs")
    outputs = launch.launch(
        [path_of("operand_origins"), *argv],
        num_processes=num_processes,
        deadline=280.0,
        environment={
            "XLA_FLAGS": "",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.2",
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cuda,cpu"),
            **(environment or {}),
        },
    )
    assert all("\npassed\n" in output for output in outputs), outputs
    tables = [re.findall(r"^(carried|refused) (\w+) (\w+)", out, re.MULTILINE) for out in outputs]
    assert all(table == tables[0] for table in tables), tables
    return {(origin, name): verdict for verdict, origin, name in tables[0]}, outputs[0]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_small_operands_of_every_origin_are_carried(num_processes):
    """The custom calls carry small operands of every origin."""
    table, output = _run(num_processes, *ORIGINS, "small")
    assert len(table) == 3 * (len(ORIGINS) + 1)
    assert set(table.values()) == {"carried"}, output


@pytest.mark.parametrize("num_processes", [1, 2])
def test_large_operands_are_carried_or_the_group_fails_with_the_reason(num_processes):
    table, output = _run(num_processes, "constant", "dlpack", "large")
    assert all(verdict == "carried" for (origin, _), verdict in table.items() if origin == "pool")
    for line in re.findall(r"^refused .*", output, re.MULTILINE):
        assert "JAX_EP_STAGING_MB" in line


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_operands_of_every_allocator_are_carried(num_processes, allocator):
    table, output = _run(num_processes, "constant", "small", environment=ALLOCATORS[allocator])
    assert set(table.values()) == {"carried"}, output
