"""`python -m jax_ep info` prints what is usable here, `conformance` checks the operations.

`bench` measures the operations. `tune` finds the fastest settings here: algorithms of the
all_reduce family, and SMs of dispatch and combine. `model` predicts times to 2,048 ranks.
"""

import argparse
import sys

from jax_ep.bench import predict, tune
from jax_ep.bench import run as bench
from jax_ep.testing import doctor
from jax_ep.testing import run as conformance


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m jax_ep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor.add_arguments(
        commands.add_parser("info", help="print what is built and usable here, and what to do else")
    )
    bench.add_arguments(
        commands.add_parser("bench", help="time the operations against their floor and stock JAX")
    )
    conformance.add_arguments(
        commands.add_parser("conformance", help="compare the operations with the reference")
    )
    tune.add_arguments(commands.add_parser("tune", help="measure the tables of algorithms and SMs"))
    predict.add_arguments(
        commands.add_parser("model", help="predict dispatch and combine to 2,048 ranks")
    )
    args = parser.parse_args()
    if args.command == "bench":
        bench.main(args)
    elif args.command == "tune":
        tune.main(args)
    elif args.command == "model":
        predict.main(args)
    elif args.command == "conformance":
        sys.exit(min(conformance.main(args), 1))
    else:
        sys.exit(doctor.main(args))


if __name__ == "__main__":
    main()
