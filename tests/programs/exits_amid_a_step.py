"""Exits beside effects of a step that never ends."""

import sys
import threading

import jax
from jax._src import dispatch

from jax_ep._src.base import jax_compat, native_modules


class Never:
    def block_until_ready(self):
        threading.Event().wait()


jax.numpy.ones(3).block_until_ready()
dispatch.runtime_tokens.set_output_runtime_token(jax.devices()[0], Never())
native_modules.load("cpu").exit_without_teardown()
jax_compat.abandon_runtime()
sys.exit(7)
