"""Ends before its child, and prints the child's id."""

import subprocess
import sys

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print(child.pid)
