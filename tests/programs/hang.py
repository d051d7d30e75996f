"""Hangs in process 1, which has a child and a second thread."""

import os
import subprocess
import sys
import threading
import time


def waits_for_its_peer():
    time.sleep(1000)


if os.environ["JAX_EP_PROCESS_ID"] == "1":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    print("child", child.pid, "of", os.environ["JAX_EP_NUM_PROCESSES"], flush=True)
    threading.Thread(target=waits_for_its_peer).start()
    waits_for_its_peer()
print("has ended")
