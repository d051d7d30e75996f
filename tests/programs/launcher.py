"""Launches processes that sleep."""

from jax_ep.testing import launch

code = "import os, time; print(os.getpid(), file=open(f'{os.getpid()}.pid', 'w')); time.sleep(100)"
launch.launch(["-c", code], num_processes=2, deadline=90)
