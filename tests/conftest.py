"""Fixtures, and eight virtual CPU devices, set up before JAX makes its backend."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import contextlib
import functools
import gc
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from dealing import deal, parse_share

import jax_ep
from jax_ep.testing import virtual_devices
from jax_ep.testing.cases import round_trip
from jax_ep.testing.ranks import make_mesh

virtual_devices()
BACKENDS = ("cpu", "xla")
LAYOUTS = ("rank", "expert")
# A shell starts background jobs with interrupts ignored, which their children inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# These tests run programs as users write them. GPU tests do so, too.
PROGRAMS = ("test_bench.py", "test_docs.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--deal",
        default="0/1",
        metavar="I/N",
        help="of tests with several cases, and of modules marked dealt, run the I-th share of N",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Gives run I of N its share of the tests; all runs together have all tests."""
    try:
        own, num_runs = parse_share(config.getoption("--deal"))
    except ValueError as error:
        raise pytest.UsageError(f"--deal: {error}") from None

    def kind_of(item: pytest.Item) -> tuple[str, str] | None:
        if not isinstance(item, pytest.Function):
            return None
        if not hasattr(item, "callspec") and item.get_closest_marker("dealt"):
            return item.path.name, ""
        if item.originalname != "test_back_ends_pass_the_suite":
            return item.path.name, item.originalname
        of: Any = item.callspec.params
        return of["backend"], of["check"].run.__name__

    chosen = deal([(kind_of(item), item.name) for item in items], own, num_runs)
    left = [item for item, is_chosen in zip(items, chosen, strict=True) if not is_chosen]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item, is_chosen in zip(items, chosen, strict=True) if is_chosen]


def pytest_collection_finish() -> None:
    """Keeps Python's garbage collector from scanning the imported and collected objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_implicit_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forbids promotion of ranks and dtypes: users may forbid it, so jax_ep must not use it."""
    is_program = request.path.name in PROGRAMS or request.node.get_closest_marker("gpu")
    with contextlib.ExitStack() as settings:
        if not is_program:
            settings.enter_context(jax.numpy_rank_promotion("raise"))
            settings.enter_context(jax.numpy_dtype_promotion("strict"))
        yield


@pytest.fixture(scope="session")
def groups() -> Iterator[Callable[[int], jax_ep.Group]]:
    """groups(num_ranks): returns a group over the first devices, open for the whole session."""
    opened = []

    @functools.cache
    def get(num_ranks: int) -> jax_ep.Group:
        opened.append(jax_ep.Group.open(make_mesh(num_ranks), "ep", name="session", timeout=120.0))
        return opened[-1]

    yield get
    for group in opened:
        group.check()
        group.close()


@pytest.fixture(scope="session")
def round_trips() -> Callable[..., Callable[..., object]]:
    """Returns `round_trip`, compiled once for each set of arguments."""
    return functools.cache(round_trip)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def write_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of (device, ranks, parts), which groups read when they open."""

    def write(*entries: tuple[str, int, dict]) -> Path:
        path = tmp_path / "table.json"
        tables = [{"device": d, "num_ranks": n, **parts} for d, n, parts in entries]
        path.write_text(json.dumps({"tables": tables}))
        monkeypatch.setenv("JAX_EP_TUNING", str(path))
        return path

    return write
