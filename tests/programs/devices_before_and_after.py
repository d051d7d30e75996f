"""Asks for virtual devices before and after JAX makes its backend."""

import jax

from jax_ep.testing import virtual_devices

virtual_devices(3)
print(len(jax.devices()))
virtual_devices(2)
try:
    virtual_devices(4)
except Exception as e:
    print(e)
