"""Fails in process 1, while the others wait for ever."""

import os
import time

if os.environ["JAX_EP_PROCESS_ID"] == "1":
    print("about to fail", flush=True)
    raise SystemExit(7)
print("waits for ever", flush=True)
time.sleep(1000)
