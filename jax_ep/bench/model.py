"""A model of dispatch and combine to 2,048 ranks: bytes and flags of each level, and their time.

A rank reaches the ranks of its node over NVLink and the other nodes over a network. The time of an
operation is its launch, the network's start-up, and the slower of the two levels:

    launch + start-up + flags * flag + max(network bytes / rate, NVLink bytes / rate)

where a rate is the link's bandwidth by its data sheet, times the share of it that is achieved. In
the kernels for few tokens a row crosses the network before it is spread, so the two times add up.
Where each constant is from is said beside it. `jax_ep.bench.fit` computes the fitted ones again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from math import comb
from typing import NamedTuple

from jax_ep._src.base.config import FP8_BLOCK
from jax_ep._src.base.errors import ShapeError

OPS = ("dispatch", "combine")
MODES = ("throughput", "low_latency")
_ID_BYTES = 4  # an expert index
_PACKET_BYTES, _PACKET_DATA = 16, 12

# Bytes of a row of `hidden` elements.
ROW_BYTES: Mapping[str, Callable[[int], int]] = {
    "bf16": lambda hidden: 2 * hidden,
    "fp8": lambda hidden: hidden + 4 * (hidden // FP8_BLOCK),
    "nvfp4": lambda hidden: hidden // 2 + hidden // 16,
}


class Rows(StrEnum):
    """What crosses: a row for each (token, node) and then (token, rank), or (token, expert)."""

    NODE = "node"
    EXPERT = "expert"


class Network(NamedTuple):
    """A kind of network.

    Attributes:
      share: what is achieved of a NIC's bandwidth.
      start_us: what a call takes longer once anything crosses it.
    """

    share: float
    start_us: float


class Machine(NamedTuple):
    """Links of one GPU in one direction, by data sheets, in GB/s (10^9 bytes)."""

    nvlink: float
    nic: float
    network: str = "cx7"
    ranks_per_node: int = 8


class Kernel(NamedTuple):
    """A kernel that exchanges rows.

    Attributes:
      launch_us: time of a call that moves next to nothing, on two ranks.
      nvlink_share: what is achieved of NVLink's bandwidth, counting all bytes that cross.
      nvlink_bytes: bytes that cross for each byte of a row.
      rows: what crosses.
      is_pipelined: rows are spread while others cross the network.
      reads_ids: every rank reads the experts that all tokens chose.
    """

    launch_us: float
    nvlink_share: float
    nvlink_bytes: float = 1.0
    rows: Rows = Rows.NODE
    is_pipelined: bool = True
    reads_ids: bool = False


# Fitted: the shares on DeepEP V1's dispatches of 32 and 64 ranks, on H800 and on B300. Start-up and
# flag on its low-latency dispatches of 16 to 256 ranks, on H800; EFA's start-up is taken to be the
# same, which is too little (docs/scale.md).
NETWORKS: Mapping[str, Network] = {
    "cx7": Network(share=0.891, start_us=10.9),
    "efa": Network(share=0.738, start_us=10.9),
}
FLAG_US = 0.0025

# NVLink by NVIDIA's data sheets, half of the bandwidth of both directions; NICs as in the sources.
MACHINES: Mapping[str, Machine] = {
    "h800": Machine(nvlink=200, nic=50),
    "h20": Machine(nvlink=450, nic=50),
    "h100": Machine(nvlink=450, nic=50),
    "h200": Machine(nvlink=450, nic=50),
    "b200": Machine(nvlink=900, nic=50),
    "b300": Machine(nvlink=900, nic=100),
    "gb200": Machine(nvlink=900, nic=50, ranks_per_node=72),
    "h100-efa": Machine(nvlink=450, nic=50, network="efa"),
    "h200-efa": Machine(nvlink=450, nic=50, network="efa"),
    "b200-efa": Machine(nvlink=900, nic=50, network="efa"),
    "b300-efa": Machine(nvlink=900, nic=100, network="efa"),
}

_PACKETS = _PACKET_BYTES / _PACKET_DATA
# Ours in the rank layout. Launch and share: fitted on our records of two H200.
OURS: Mapping[tuple[str, str], Kernel] = {
    ("throughput", "dispatch"): Kernel(22.3, 0.660, reads_ids=True),
    ("throughput", "combine"): Kernel(12.5, 0.639),
    ("low_latency", "dispatch"): Kernel(10.6, 0.476, _PACKETS, is_pipelined=False, reads_ids=True),
    ("low_latency", "combine"): Kernel(7.0, 0.733, _PACKETS, is_pipelined=False),
}

# Launches of others' kernels for few tokens: measured, in benchmarks/rivals.json, with one token.
EXPERT_LAUNCH_US = {"dispatch": 18.3, "combine": 17.1}  # DeepEP V1
RANK_LAUNCH_US = {"dispatch": 8.3, "combine": 8.5}  # FlashInfer


def theirs(op: str, mode: str, rows: Rows) -> Kernel:
    """A kernel of another library; what is not known of it is as in ours for many tokens."""
    ours = OURS["throughput", op]._replace(reads_ids=False)
    if mode == "throughput":
        return ours._replace(rows=rows)
    launches = EXPERT_LAUNCH_US if rows is Rows.EXPERT else RANK_LAUNCH_US
    return ours._replace(rows=rows, launch_us=launches[op], is_pipelined=rows is Rows.EXPERT)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Sizes of one dispatch or combine, with uniform routing.

    Attributes:
      num_ranks, ranks_per_node: all nodes have as many ranks, and all ranks as many experts.
      tokens: of each rank.
      hidden, topk, experts: as of the layer.
      dtype: a key of ROW_BYTES.
      max_nodes: group-limited routing: as many nodes are drawn for a token, and its experts from
        theirs; None: no limit.
    """

    num_ranks: int
    ranks_per_node: int
    tokens: int = 4096
    hidden: int = 7168
    topk: int = 8
    experts: int = 256
    dtype: str = "bf16"
    max_nodes: int | None = None

    def __post_init__(self) -> None:
        for name, size, unit in (
            ("num_ranks", self.num_ranks, self.ranks_per_node),
            ("experts", self.experts, self.num_ranks),
        ):
            if size < 1 or unit < 1 or size % unit:
                raise ShapeError(f"model: {name}={size} must be a positive multiple of {unit}")
        for name in ("tokens", "hidden", "max_nodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ShapeError(f"model: {name} must be positive, got {value}")
        pool = self.experts * self.drawn_nodes // self.num_nodes
        if not 1 <= self.topk <= pool:
            raise ShapeError(f"model: topk={self.topk} must be 1 to {pool}, the experts to choose")

    @property
    def num_nodes(self) -> int:
        """Nodes of the group."""
        return self.num_ranks // self.ranks_per_node

    @property
    def drawn_nodes(self) -> int:
        """Nodes that a token's experts come from."""
        return min(self.max_nodes or self.num_nodes, self.num_nodes)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, scales included."""
        return ROW_BYTES[self.dtype](self.hidden)

    def nodes_of_a_token(self) -> float:
        """Expected number of nodes that have experts of a token, the own one among them."""
        return self._distinct(1)

    def ranks_of_a_token(self) -> float:
        """Expected number of ranks that have experts of a token, the own one among them."""
        return self._distinct(self.ranks_per_node)

    def _distinct(self, per_node: int) -> float:
        pool = self.experts * self.drawn_nodes // self.num_nodes
        return expected_distinct(self.drawn_nodes * per_node, pool, self.topk)


def expected_distinct(units: int, experts: int, topk: int) -> float:
    """Expected number of units that have one of `topk` different experts, drawn uniformly.

    A unit misses all of them with the chance C(experts - own, topk) / C(experts, topk), where
    `own` = experts / units are its own.
    """
    return units * (1 - comb(experts - experts // units, topk) / comb(experts, topk))


class Traffic(NamedTuple):
    """What one rank sends, and as much it receives: bytes and flags of both levels."""

    network_bytes: float
    nvlink_bytes: float
    network_flags: int
    nvlink_flags: int


def traffic(kernel: Kernel, exchange: Exchange) -> Traffic:
    """Bytes of one rank, by expectation.

    A row for each (token, node) crosses to the rank of the same index in the node, which spreads it
    to the ranks that want it. A combine is the way back: a node adds the rows of a token before
    they cross. With rows for each (token, expert), every rank sends to every rank by itself.
    """
    e, near = exchange, exchange.ranks_per_node
    if kernel.rows is Rows.NODE:
        far_flags = e.num_nodes - 1
        network = e.tokens * e.nodes_of_a_token() * far_flags / e.num_nodes
        nvlink = e.tokens * e.ranks_of_a_token() * (near - 1) / near
    else:
        far_flags = e.num_ranks - near
        network = e.tokens * e.topk * far_flags / e.num_ranks
        nvlink = e.tokens * e.topk * (near - 1) / e.num_ranks
    network, nvlink = network * e.row_bytes, nvlink * e.row_bytes * kernel.nvlink_bytes
    if kernel.reads_ids:
        # Of all ranks: the ones of the same index are read over the network, and spread.
        ids = e.tokens * e.topk * _ID_BYTES
        network += ids * (e.num_nodes - 1)
        nvlink += ids * e.num_nodes * (near - 1)
    return Traffic(network, nvlink, far_flags, near - 1)


class Prediction(NamedTuple):
    """Microseconds of one operation, and of its levels alone; "launch" bounds few tokens."""

    us: float
    network_us: float
    nvlink_us: float
    bound: str
    traffic: Traffic


def predict(kernel: Kernel, exchange: Exchange, machine: Machine) -> Prediction:
    """Predicts the time of one operation; `machine.ranks_per_node` is not looked at."""
    moved = traffic(kernel, exchange)
    network = NETWORKS[machine.network]
    network_us = moved.network_bytes / (machine.nic * network.share * 1e3)
    nvlink_us = moved.nvlink_bytes / (machine.nvlink * kernel.nvlink_share * 1e3)
    fixed = kernel.launch_us + FLAG_US * (moved.network_flags + moved.nvlink_flags)
    if moved.network_bytes:
        fixed += network.start_us
    moving = max(network_us, nvlink_us) if kernel.is_pipelined else network_us + nvlink_us
    longest = "network" if network_us > nvlink_us else "NVLink"
    bound = longest if moving > fixed else "launch"
    return Prediction(fixed + moving, network_us, nvlink_us, bound, moved)


def grow(exchange: Exchange, num_ranks: int, machine: Machine) -> Exchange:
    """The same exchange on other ranks: nodes of the machine, and at least one expert a rank."""
    return replace(
        exchange,
        num_ranks=num_ranks,
        ranks_per_node=min(machine.ranks_per_node, num_ranks),
        # No rank at all is for __post_init__ to refuse.
        experts=-(-exchange.experts // max(num_ranks, 1)) * max(num_ranks, 1),
    )
