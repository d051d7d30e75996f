"""virtual_devices: several devices of one CPU, for programs that have imported JAX already."""

import os
import subprocess
import sys

import pytest
from process_programs import path_of

from jax_ep._src.base.errors import ConfigError
from jax_ep.testing import virtual_devices


def _run(environment):
    chosen_elsewhere = {"XLA_FLAGS", "JAX_NUM_CPU_DEVICES"}
    kept = {name: value for name, value in os.environ.items() if name not in chosen_elsewhere}
    done = subprocess.run(
        [sys.executable, path_of("devices_before_and_after")],
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_call_is_in_time_after_the_import_and_too_late_after_the_first_device():
    count, error = _run({})
    assert count == "3"
    assert error.startswith("virtual_devices: num_devices=4 comes too late")
    assert "with 3: call virtual_devices before the first jax.devices()" in error


def test_number_of_the_environment_is_kept(tmp_path):
    """A number in a file of flags is kept, too; no flag may follow the name of the file."""
    flags = tmp_path / "flags"
    flags.write_text("--xla_force_host_platform_device_count=5")
    count, *_ = _run({"XLA_FLAGS": str(flags)})
    assert count == "5"


def test_other_values_are_refused_as_number_of_devices():
    with pytest.raises(ConfigError, match="num_devices must be at least 1, got 0"):
        virtual_devices(0)
