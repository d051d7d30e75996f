"""Ends without teardown: by argv[1], which is `ends`, `exits` or `raises`."""

import atexit
import sys

from jax_ep._src.base import native_modules

atexit.register(print, "at exit")
native_modules.load("cpu").exit_without_teardown()
print("said", end=" ")

if sys.argv[1] == "exits":
    sys.exit(7)
if sys.argv[1] == "raises":
    raise ValueError("not today")
