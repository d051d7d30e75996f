"""Specs of the flat operations over the parts of a group with several nodes."""

from dataclasses import replace
from typing import TypeVar

from jax_ep._src.base.group_spec import GroupSpec, Levels
from jax_ep._src.base.options import ExchangeMode, Layout
from jax_ep._src.base.spec import DispatchSpec, ExchangeSpec, Routes, RouteSpec
from jax_ep._src.ops.two_levels.nodes import Nodes

_Spec = TypeVar("_Spec", DispatchSpec, RouteSpec)


def levels_of(group: GroupSpec) -> Levels:
    """Returns the parts of a group that has them."""
    assert group.levels is not None
    return group.levels


def nodes_of(group: GroupSpec) -> Nodes:
    """Returns the numbers of nodes and of ranks in each."""
    levels = levels_of(group)
    return Nodes(levels.rail.num_ranks, levels.node.num_ranks)


def in_node(spec: _Spec) -> _Spec:
    """Returns the spec of the exchange inside each node.

    The kernels for few tokens would need room of their own for each part.
    """
    levels = levels_of(spec.group)
    return replace(
        spec,
        group=levels.node,
        routes=_routes(spec.routes, levels.inside),
        mode=ExchangeMode.THROUGHPUT,
    )


def on_rail(spec: ExchangeSpec, num_rows: int) -> RouteSpec:
    """Returns the spec of a combine in the rank layout over the rail, of so many rows a rank."""
    levels = levels_of(spec.group)
    return replace(
        spec.to_route(),
        group=levels.rail,
        routes=_routes(spec.routes, levels.between),
        layout=Layout.RANK,
        recv_capacity=num_rows,
        mode=ExchangeMode.THROUGHPUT,
    )


def _routes(routes: Routes, backend: str) -> Routes:
    """Returns the same routes; `backend` replaces a back end of custom calls."""
    return Routes(*(r if r.backend == "xla" else r._replace(backend=backend) for r in routes))
