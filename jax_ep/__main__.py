"""`python -m jax_ep info` tells what is usable here, `conformance` checks the operations.

`bench` measures them, `tune` what is the fastest here: algorithms of all_reduce and its relatives,
and SMs of dispatch and combine.
"""

import argparse
import sys

from jax_ep.bench import run as bench
from jax_ep.bench import tune
from jax_ep.testing import doctor
from jax_ep.testing import run as conformance


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jax_ep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor.add_arguments(
        commands.add_parser("info", help="what is built and usable here, and what to do else")
    )
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
        sys.exit(doctor.main(args))


if __name__ == "__main__":
    main()
