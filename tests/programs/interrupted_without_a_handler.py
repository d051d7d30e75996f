"""Gets an interrupt after it gave SIGINT its default action back."""

import signal
import time

from interruptible import interrupt, open_group

signal.signal(signal.SIGINT, signal.SIG_DFL)
kept = open_group()
interrupt(0)
time.sleep(60)
