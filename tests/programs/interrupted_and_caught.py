"""Catches the interrupt of a wait, frees the step, and ends by another one."""

from interruptible import ids, interrupt, open_group, x

group, step = open_group()
group._native_group.handle.skip_rank(1)
y = step(x, ids)
interrupt(0.5)
try:
    y.block_until_ready()
except KeyboardInterrupt:
    del y, step
raise KeyboardInterrupt
