#!/usr/bin/env python3
"""Plays two hosts on one machine, and looks at a group over both of them.

    sudo python tests/hosts/run.py

Each host is a network namespace, with two processes of two CPU devices, a name and addresses of
its own; a pair of virtual links joins the two. The processes dispatch and combine, and compare
everything with the reference. Then the link is slowed, and everything must still be right. Then it
is cut, and every process must raise PeerTimeoutError and end, long before JAX would abort it.

It needs root and `ip` with namespaces and virtual links, and says what is missing. `tc` slows the
link: by a delay if the kernel has netem, else by a rate. The exit status is 0 if all of it held, 2
if this machine cannot play hosts.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NUM_HOSTS, PROCESSES_A_HOST, DEVICES = 2, 2, 2
NUM_PROCESSES = NUM_HOSTS * PROCESSES_A_HOST
NETWORK, PORT = "10.231.77", 45678
GROUP_TIMEOUT, HEARTBEAT = 20, 100
OPENING_LIMIT, STEPS_LIMIT = 240.0, 240.0
# The group's timeout, two beats, and what the exits of two processes wait for. JAX aborted the
# processes 80 s after the cut, when nothing else did.
CUT_LIMIT = 60.0
STEPS = 6  # of each phase
CANNOT_PLAY = 2


class CannotPlayError(Exception):
    """This machine has no network namespaces for us."""


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotPlayError(f"`ip {shlex.join(words)}` failed: {done.stderr.strip()}")


def name_of(host: int) -> str:
    return f"jaxep{os.getpid() % 100000}h{host}"


def link_of(host: int) -> str:
    return f"je{os.getpid() % 100000}v{host}"


def make_hosts(stack: ExitStack) -> None:
    """Two namespaces, joined by a link; they go when `stack` ends."""
    if os.geteuid() != 0:
        raise CannotPlayError("it needs root")
    if shutil.which("ip") is None:
        raise CannotPlayError("there is no command `ip` (package iproute2)")
    for host in range(NUM_HOSTS):
        ip("netns", "add", name_of(host))
        stack.callback(ip, "netns", "del", name_of(host))
    ends = (["name", link_of(h), "netns", name_of(h)] for h in range(NUM_HOSTS))
    first, second = ends
    ip("link", "add", *first, "type", "veth", "peer", *second)
    for host in range(NUM_HOSTS):
        inside = ["-n", name_of(host)]
        ip(*inside, "addr", "add", f"{NETWORK}.{host + 1}/24", "dev", link_of(host))
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "link", "set", link_of(host), "up")


def slow_link() -> str | None:
    """Slows both directions; returns how, or None if the kernel cannot."""
    ways = {
        "a delay of 20 ms each way (netem)": "netem delay 20ms",
        "a rate of 2 Mbit/s each way (tbf)": "tbf rate 2mbit burst 16kb latency 2s",
    }
    tc = shutil.which("tc")
    for words, way in ways.items() if tc else ():
        commands = [
            [tc, "-n", name_of(h), "qdisc", "add", "dev", link_of(h), "root", *way.split()]
            for h in range(NUM_HOSTS)
        ]
        done = [subprocess.run(c, capture_output=True, check=False).returncode for c in commands]
        if not any(done):
            return words
    return None


def cut_link() -> None:
    ip("-n", name_of(0), "link", "set", link_of(0), "down")


class Process:
    """A process on a host. Its output goes to a file."""

    def __init__(self, process: int, orders: Path, folder: Path, names: Path):
        host = process // PROCESSES_A_HOST
        self.place = f"process {process} on host {host}"
        self.path = folder / f"{process}.txt"
        # A name of its own, since gloo listens at the address of the host's name.
        script = (
            f"hostname {name_of(host)} && mount --bind {names} /etc/hosts && "
            'exec "$@"'  # the rest of the command
        )
        inside = ["ip", "netns", "exec", name_of(host), "unshare", "--uts", "--mount"]
        program = [sys.executable, str(HERE / "exchange.py"), str(GROUP_TIMEOUT), str(HEARTBEAT)]
        program += [str(PROCESSES_A_HOST * DEVICES), str(orders)]
        # gRPC would take the coordinator's address to a proxy.
        proxies = {name for name in os.environ if name.lower().endswith("_proxy")}
        environment = {k: v for k, v in os.environ.items() if k not in proxies}
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(DEVICES),
            "PJRT_NPROC": "16",
            "JAX_EP_COORDINATOR": f"{NETWORK}.1:{PORT}",
            "JAX_EP_NUM_PROCESSES": str(NUM_PROCESSES),
            "JAX_EP_PROCESS_ID": str(process),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PYTHONFAULTHANDLER": "1",
        }
        with self.path.open("wb") as output:
            self.popen = subprocess.Popen(
                [*inside, "sh", "-c", script, "sh", *program],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def text(self) -> str:
        return self.path.read_text(errors="replace")

    def steps(self) -> list[float]:
        """Seconds of each step that agreed with the reference."""
        found = re.findall(r"step \d+ agrees with the reference after ([\d.]+) s", self.text())
        return [float(seconds) for seconds in found]


def wait_for_steps(processes: Sequence[Process], count: int, limit: float) -> None:
    """Until all processes have taken so many steps."""
    deadline = time.monotonic() + limit
    while any(len(p.steps()) < count for p in processes):
        for p in processes:
            if p.popen.poll() is not None:
                raise AssertionError(f"{p.place} ended with {p.popen.returncode}")
        if time.monotonic() > deadline:
            raise AssertionError(f"no {count} steps within {limit:g} s")
        time.sleep(0.1)


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def watch(processes: Sequence[Process], orders: Path, *, is_cut: bool) -> None:
    """The phases, one after another."""
    wait_for_steps(processes, STEPS, OPENING_LIMIT)
    for told in re.findall(r"\] ((?:open|transport): .*)", processes[0].text()):
        print(told)
    print(f"plain link: {STEPS} steps agree, {median(processes[0].steps()[1:]):.3f} s each")
    how = slow_link()
    if how is None:
        print("slow link: not tried, tc and this kernel have neither netem nor tbf")
    else:
        begin = max(len(p.steps()) for p in processes) + 1  # the step that is under way
        wait_for_steps(processes, begin + STEPS, STEPS_LIMIT)
        slow = processes[0].steps()[begin:]
        print(f"slow link, {how}: {len(slow)} steps agree, {median(slow):.3f} s each")
    if not is_cut:
        orders.write_text("stop")
        for p in processes:
            p.popen.wait(timeout=STEPS_LIMIT)
        return
    cut_link()
    begin = time.monotonic()
    print("the link is cut")
    running = list(processes)
    while running:
        for p in list(running):
            if p.popen.poll() is not None:
                running.remove(p)
                print(f"{p.place} ended {time.monotonic() - begin:.1f} s later: {_how_ended(p)}")
        if time.monotonic() - begin > CUT_LIMIT:
            places = ", ".join(p.place for p in running)
            raise AssertionError(f"{places} did not end within {CUT_LIMIT:g} s after the cut")
        time.sleep(0.1)


def _how_ended(process: Process) -> str:
    code = process.popen.returncode
    raised = re.search(r"raised after [\d.]+ s: (.*)", process.text())
    if raised:
        return f"exit code {code}, {raised[1][:400]}"
    last = process.text().strip().splitlines()[-1:]
    return f"exit code {code}, without an exception: {''.join(last)[:400]}"


def check_ends(processes: Sequence[Process], *, is_cut: bool) -> None:
    """All must have raised after a cut, and stopped otherwise."""
    expected, word = (3, r"raised after \S+ s: PeerTimeoutError: ") if is_cut else (0, "stopped")
    for p in processes:
        code = p.popen.returncode
        assert code == expected, f"{p.place} ended with {code}, expected {expected}"
        assert re.search(word, p.text()), f"{p.place} did not say {word!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--no-cut", action="store_true", help="stop the processes in the end")
    parser.add_argument("--show", action="store_true", help="print the output of all processes")
    args = parser.parse_args()
    with ExitStack() as stack:
        try:
            make_hosts(stack)
        except CannotPlayError as e:
            print(f"cannot play two hosts here: {e}")
            sys.exit(CANNOT_PLAY)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        orders, names = folder / "orders", folder / "hosts"
        orders.write_text("go")
        lines = [f"{NETWORK}.{h + 1} {name_of(h)}" for h in range(NUM_HOSTS)]
        names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        processes = []
        for process in range(NUM_PROCESSES):
            processes.append(Process(process, orders, folder, names))
            stack.callback(processes[-1].end)
        try:
            watch(processes, orders, is_cut=not args.no_cut)
            check_ends(processes, is_cut=not args.no_cut)
        except BaseException as e:
            args.show = True
            print(f"FAILED: {e!r}")
            raise
        finally:
            for p in processes if args.show else ():
                print(f"--- {p.place}\n{p.text()}")
    print("all of it held")


if __name__ == "__main__":
    main()
