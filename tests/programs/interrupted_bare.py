"""Interrupts a wait outside any block."""

import numpy as np
from interruptible import ids, interrupt, open_group, x

group, step = open_group()
group._native_group.handle.skip_rank(1)
y = step(x, ids)
interrupt(0.5)
np.asarray(y)
