"""Interrupts a wait inside the block of the group."""

from interruptible import ids, interrupt, open_group, x

group, step = open_group()
with group:
    group._native_group.handle.skip_rank(1)
    y = step(x, ids)
    interrupt(0.5)
    y.block_until_ready()
