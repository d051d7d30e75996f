"""`python -m jax_ep info` tells what jax_ep finds here, `conformance` checks the operations.

`bench` measures them, `tune` what is the fastest here: algorithms of all_reduce and its relatives,
and SMs of dispatch and combine.
"""

import argparse
import sys
from importlib.metadata import version

import jax
import numpy as np

import jax_ep
from jax_ep._src.base import native_modules
from jax_ep._src.base.errors import GroupError
from jax_ep.bench import run as bench
from jax_ep.bench import tune
from jax_ep.testing import run as conformance


def info() -> None:
    """Prints versions, native modules, devices, and a group over all devices."""
    print(
        f"jax_ep {jax_ep.__version__}, jax {jax.__version__}, jaxlib {version('jaxlib')}, ", end=""
    )
    print(f"python {sys.version.split()[0]}, numpy {np.__version__}")
    for backend in ("cpu", "cuda"):
        try:
            build = native_modules.load(backend).build_info()
            ops = ", ".join(native_modules.targets(backend))
            ffi_api = ".".join(map(str, build["ffi_api"]))
            print(f"{backend} module: {ops}; {build['build']}, FFI API {ffi_api}")
            for language, compiler in build["compilers"].items():
                print(f"  {language} compiler: {compiler}")
        except GroupError as e:
            print(f"{backend} module: {e}")
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("ep",))
    with jax_ep.Group.open(mesh, "ep") as group:
        found = group.info()
    print(f"group over all devices: {found.identity}, {found.num_ranks} ranks, ", end="")
    print(f"back end {found.backend!r}, self-test passed")
    for backend, reason in found.backends.items():
        print(f"  {backend}: {reason}")
    for rank, device in enumerate(found.devices):
        print(f"  rank {rank}: {device}")
    print("SMs of an exchange on back end 'cuda':")
    for exchange, layouts in found.budgets.items():
        listed = ", ".join(f"{layout} layout {sms}" for layout, sms in layouts.items())
        print(f"  {exchange}: {listed}")
    print(f"  from {found.budgets_from}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jax_ep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, native modules, devices, back ends and why")
    bench.add_arguments(
        commands.add_parser("bench", help="time of the operations over floor and stock JAX")
    )
    conformance.add_arguments(
        commands.add_parser("conformance", help="the operations against the reference, to the bit")
    )
    tune.add_arguments(commands.add_parser("tune", help="measure the tables of algorithms and SMs"))
    args = parser.parse_args()
    if args.command == "bench":
        bench.main(args)
    elif args.command == "tune":
        tune.main(args)
    elif args.command == "conformance":
        sys.exit(min(conformance.main(args), 1))
    else:
        info()


if __name__ == "__main__":
    main()
