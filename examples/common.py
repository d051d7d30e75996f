"""Parts that the larger examples share: command lines, meshes, text, and one comparison."""

import argparse
import math
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

Config = TypeVar("Config")

AXES = ("data", "expert")
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
BYTES_PER_FILE = 16 * 1024


def flag(default: Any, text: str, kind: type = int, **more: Any) -> Any:
    """A field of a configuration and its command line flag."""
    return field(default=default, metadata={"help": text, "type": kind, **more})


def parse_flags(kind: type[Config], description: str) -> Config:
    """The configuration of a dataclass, each of whose fields is a `flag`."""
    style = argparse.ArgumentDefaultsHelpFormatter
    summary = description.partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary, formatter_class=style)
    for f in fields(kind):
        name = f.name.replace("_", "-")
        parser.add_argument(f"--{name}", default=f.default, **f.metadata)
    return kind(**vars(parser.parse_args()))


def make_mesh(devices: int | None, expert_parallel: int | None, experts: int) -> Mesh:
    """A mesh with the axes "data" and "expert".

    Args:
      devices: the first of jax.devices(); None: at most 8.
      expert_parallel: size of the axis "expert"; None: 4, or what fits.
      experts: a multiple of that size.
    """
    found = jax.devices()
    count = devices or min(8, len(found))
    if count > len(found):
        sys.exit(f"--devices {count}: there are only {len(found)}")
    expert = expert_parallel or math.gcd(4, count)
    if count % expert or experts % expert:
        both = f"--devices {count} and --experts {experts}"
        sys.exit(f"--expert-parallel {expert} must divide {both}")
    return Mesh(np.array(found[:count]).reshape(-1, expert), AXES)


def read_text() -> tuple[np.ndarray, np.ndarray]:
    """The standard library's sources as bytes: (train, held out), every tenth file held out.

    Only the start of each file is read, so that no long file dominates. Skipped are tests and
    `encodings`, which is mostly tables.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
    texts = [np.fromfile(path, np.uint8, count=BYTES_PER_FILE) for path in paths]
    train = [text for i, text in enumerate(texts) if i % 10]
    return np.concatenate(train), np.concatenate(texts[::10])


def largest_difference(some: Sequence[Any], others: Sequence[Any]) -> float:
    """Between arrays, pair by pair; NaN where there is one, which max() and jnp.max may lose."""
    pairs = zip(some, others, strict=True)
    return float(np.max([np.max(np.abs(np.subtract(a, b))) for a, b in pairs]))
