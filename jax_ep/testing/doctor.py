"""The `info` command: prints what is built and usable here, and remedies for the rest."""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import numpy as np

import jax_ep
from jax_ep._src.base import limits, native_modules
from jax_ep._src.base.config import cuda_compiler, why_no_kernel_exchange
from jax_ep._src.base.errors import GroupError, JaxEpError
from jax_ep.testing.launch import count_gpus
from jax_ep.testing.ranks import virtual_devices

_CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


class Problem(NamedTuple):
    """A problem: this machine has something that jax_ep cannot use.

    Attributes:
      what: the fact.
      remedy: the step that solves the problem.
    """

    what: str
    remedy: str


@dataclass(frozen=True)
class Findings:
    """The state of an installation on this machine.

    Attributes:
      versions: versions of Python and of Python packages.
      modules: facts about the build of each back end's native module; or, under "missing", the
        reason why there is no module.
      num_gpus: NVIDIA GPUs that the environment leaves to this program.
      has_compiler: whether a CUDA compiler is installed.
      has_plugin: whether JAX's CUDA wheels are installed.
      platform: platform of JAX's devices.
      num_devices: number of JAX's devices.
      group: `GroupInfo`, as a dict, of a group over all devices; None: it does not open.
      failure: why the group does not open, or None.
      is_mismatched: whether it fails because the native module has another version than this code.
    """

    versions: dict[str, str]
    modules: dict[str, dict[str, Any]]
    num_gpus: int
    has_compiler: bool
    has_plugin: bool
    platform: str
    num_devices: int
    group: dict[str, Any] | None
    failure: str | None = None
    is_mismatched: bool = False

    def problems(self) -> Iterator[Problem]:
        """Yields the problems of this machine; a CPU without CUDA has none."""
        cpu, cuda = (self.modules[name].get("missing") for name in ("cpu", "cuda"))
        if cpu is not None:
            yield Problem(
                f"the CPU module {cpu}", "install g++ and Python's headers, then jax_ep again"
            )
        if self.num_gpus > 0:
            if cuda is not None:
                yield Problem(f"the CUDA module {cuda}", self._build_cuda_module())
            if self.platform != "gpu":
                yield Problem(
                    f"JAX does not use the {self.num_gpus} NVIDIA GPUs of this machine",
                    "start JAX with JAX_PLATFORMS=cuda, and it says why"
                    if self.has_plugin
                    else "pip install 'jax[cuda13]'",
                )
        if self.group is None:
            yield Problem(
                f"no group opens over all devices: {self.failure}",
                "install jax_ep again: its native module is of another version than its Python code"
                if self.is_mismatched
                else "run python -m jax_ep conformance, and report what it prints",
            )
        elif self.platform == "gpu" and cuda is None and self.group["backend"] != "cuda":
            reason = self.group["backends"]["cuda"]
            yield Problem(f"the CUDA kernels do not run here: {reason}", self._run_kernels())

    def _build_cuda_module(self) -> str:
        again = "install jax_ep again with JAX_EP_CUDA=ON set"
        if self.has_compiler:
            return again
        return f"install a CUDA 13 compiler (nvcc in PATH, or CUDA_HOME set), then {again}"

    def _run_kernels(self) -> str:
        if self.num_devices > limits.MAX_CUDA_RANKS:
            return f"open groups over mesh axes of at most {limits.MAX_CUDA_RANKS} GPUs"
        if why_no_kernel_exchange(self.num_devices) is not None:
            return "take the flag that the reason names out of XLA_FLAGS"
        return "open groups over GPUs that reach one another's memory; nvidia-smi topo -p2p r"


def examine() -> Findings:
    """Examines the machine, and opens a group over all devices, which tests itself. Collective."""
    virtual_devices(8)
    group, failure, is_mismatched = None, None, False
    try:
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("ep",))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fallback is a problem, which is yielded below
            with jax_ep.Group.open(mesh, "ep") as opened:
                group = asdict(opened.info())
    except JaxEpError as e:
        failure = str(e)
    except (AttributeError, TypeError) as e:  # a module lacks a function or a parameter
        failure, is_mismatched = f"{type(e).__name__}: {str(e).splitlines()[0]}", True
    platforms = jax.config.jax_platforms or "cuda"  # by default JAX takes what it finds
    return Findings(
        versions={
            "jax_ep": jax_ep.__version__,
            "jax": jax.__version__,
            "jaxlib": version("jaxlib"),
            "python": sys.version.split()[0],
            "numpy": np.__version__,
        },
        modules={name: _module(name) for name in ("cpu", "cuda")},
        num_gpus=count_gpus() if {"cuda", "gpu"} & set(platforms.split(",")) else 0,
        has_compiler=cuda_compiler() is not None,
        has_plugin=any(_is_installed(name) for name in _CUDA_PLUGINS),
        platform=jax.devices()[0].platform,
        num_devices=jax.device_count(),
        group=group,
        failure=failure,
        is_mismatched=is_mismatched,
    )


def _module(name: str) -> dict[str, Any]:
    try:
        build = native_modules.load(name).build_info()
    except GroupError as e:
        return {"missing": str(e).removeprefix(f"back end {name!r}: its native module ")}
    return {
        "operations": native_modules.targets(name),
        "build": build["build"],
        "compilers": build["compilers"],
        "ffi_api": ".".join(map(str, build["ffi_api"])),
    }


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package that would hold it
        return False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the `info` command."""
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")


def main(args: argparse.Namespace) -> int:
    """Prints the findings; returns 1 if there is a problem, else 0."""
    found = examine()
    problems = list(found.problems())
    if args.json:
        listed = [problem._asdict() for problem in problems]
        print(json.dumps({**asdict(found), "problems": listed}, indent=2))
    else:
        print("\n".join([*_describe(found), *_conclude(problems)]))
    return 1 if problems else 0


def _describe(found: Findings) -> Iterator[str]:
    yield ", ".join(f"{name} {number}" for name, number in found.versions.items())
    for name, module in found.modules.items():
        if "missing" in module:
            yield f"{name} module {module['missing']}"
        else:
            operations = ", ".join(module["operations"])
            yield f"{name} module: {operations}; {module['build']}, FFI API {module['ffi_api']}"
            for language, compiler in module["compilers"].items():
                yield f"  {language} compiler: {compiler}"
    if found.group is None:
        return
    group = found.group
    yield (
        f"group over all devices: {group['identity']}, {group['num_ranks']} ranks, "
        f"back end {group['backend']!r}, self-test passed"
    )
    for backend, reason in group["backends"].items():
        yield f"  {backend}: {reason}"
    for rank, device in enumerate(group["devices"]):
        yield f"  rank {rank}: {device}"
    yield "SMs of an exchange on back end 'cuda':"
    for exchange, layouts in group["budgets"].items():
        listed = ", ".join(f"{layout} layout {sms}" for layout, sms in layouts.items())
        yield f"  {exchange}: {listed}"
    yield f"  from {group['budgets_from']}"
    yield f"kernels for few tokens: {group['low_latency']}"


def _conclude(problems: list[Problem]) -> Iterator[str]:
    if not problems:
        yield "everything this machine could use is usable"
    for problem in problems:
        yield f"PROBLEM: {problem.what}"
        yield f"  what to do: {problem.remedy}"
