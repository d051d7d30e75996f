"""The model of docs/scale.md: its constants, its errors, and what it predicts for ours."""

from collections.abc import Sequence
from functools import cache
from statistics import median
from typing import Any

import numpy as np
from records import H200, HERE, Row, files, load_rivals, pick, table, us

from jax_ep.bench import fit, model
from jax_ep.bench.predict import RANKS
from jax_ep.bench.published import Published, group, read_published, summarize
from jax_ep.testing import routing

MACHINE = model.MACHINES["h200"]
SHAPE = model.Exchange(num_ranks=1, ranks_per_node=1)  # 7,168, top-8 of 256
NEAR = 0.15  # the aim for an error
LIMIT = 4  # nodes of a token, as in DeepSeek-V3
COUNTED = 2048  # tokens whose nodes are counted
_FITTED = ("0414d1a", "4e53d54")
LEVELS = {"NVLink": "NVLink", "cx7": "ConnectX-7", "efa": "EFA"}
MODES = {"throughput": "many", "low_latency": "few"}
KINDS = (("dispatch", "bf16"), ("dispatch", "fp8"), ("combine", "bf16"))


@cache
def published() -> list[Published]:
    """The rows of published.csv."""
    return read_published(HERE / "published.csv")


def used_for(constant: str) -> list[Published]:
    """The published rows that a constant was fitted on."""
    return [row for row in published() if row.fitted == constant]


def tested() -> list[Published]:
    """The published rows that nothing was fitted on."""
    return [row for row in published() if not row.fitted]


def _ours(mode: str, **wanted: Any) -> list[dict[str, Any]]:
    algorithm = "low_latency" if mode == "low_latency" else None
    own = pick(contender="jax_ep", backend="cuda", layout="rank", algorithm=algorithm, **wanted)
    # The model's constants are of means over chains, and of routing without a limit.
    chains = [r for r in own if not r.get("steps") and not r.get("max_nodes")]
    return [r for r in chains if mode == "low_latency" or r["sms"] in (16, 20, 24)]


def fitted_records(mode: str, op: str) -> list[dict[str, Any]]:
    """Our records that a kernel's constants were fitted on: two H200, 1 to 4,096 tokens."""
    found = _ours(mode, op=op, device=H200, num_ranks=2, dtype="bf16", hidden=SHAPE.hidden)
    return [r for r in found if r["commit"] in _FITTED and r["sms"] in (None, 16)]


def other_records() -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Our records that nothing was fitted on, by what they measured."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    names = ("op", "dtype", "device", "num_ranks", "tokens", "hidden", "topk", "experts")
    for mode in model.MODES:
        for op in model.OPS:
            known = fitted_records(mode, op)
            for r in _ours(mode, op=op, num_processes=1, cached=False):
                if r not in known and r["dtype"] in model.ROW_BYTES and r["num_ranks"] > 1:
                    groups.setdefault((mode, *(r[n] for n in names)), []).append(r)
    return groups


def refit() -> dict[str, float]:
    """The fitted constants, as `scale-constants` names them, from their sources."""
    found = {}
    for mode, op in model.OURS:
        launch, share = fit.fit_ours(fitted_records(mode, op), op, mode, MACHINE.nvlink)
        found[f"{mode} {op}: launch"] = launch
        found[f"{mode} {op}: share of NVLink"] = share
    for name in model.NETWORKS:
        found[f"{name}: share"] = fit.fit_share(used_for(f"{name} share"))
    start, flag = fit.fit_start(used_for("cx7 start"), model.NETWORKS["cx7"].share)
    return {**found, "start-up": start, "flag": flag}


def shipped() -> dict[str, float]:
    """The same constants as the model has them."""
    found = {}
    for (mode, op), kernel in model.OURS.items():
        found[f"{mode} {op}: launch"] = kernel.launch_us
        found[f"{mode} {op}: share of NVLink"] = kernel.nvlink_share
    for name, network in model.NETWORKS.items():
        found[f"{name}: share"] = network.share
    return {**found, "start-up": model.NETWORKS["cx7"].start_us, "flag": model.FLAG_US}


def constants(page: str) -> str:
    """Table of the model's constants, and where each is from."""
    rows: list[Row] = []
    records = []
    for (mode, op), kernel in model.OURS.items():
        own = fitted_records(mode, op)
        records += own
        tokens = sorted({r["tokens"] for r in own})
        what = f"our {op} for {MODES[mode]} tokens"
        origin = f"fitted: {len(own)} records, {tokens[0]:,} to {tokens[-1]:,} tokens"
        rows.append((f"{what}: launch", f"{kernel.launch_us:.1f} us", origin))
        rows.append((f"{what}: share of NVLink", f"{kernel.nvlink_share:.1%}", "the same"))
    for name, network in model.NETWORKS.items():
        own_rows = used_for(f"{name} share")
        origin = "fitted: " + ", ".join(f"{r.exchange.num_ranks}" for r in own_rows)
        origin += f" ranks of {own_rows[0].system}, {own_rows[0].machine.partition('-')[0].upper()}"
        rows.append((f"{LEVELS[name]}: share of the NIC", f"{network.share:.1%}", origin))
    few = used_for("cx7 start")
    origin = f"fitted: dispatches of {few[0].exchange.num_ranks} to {few[-1].exchange.num_ranks}"
    origin += f" ranks of {few[0].system}, few tokens"
    rows.append(("a network's start-up", f"{model.NETWORKS['cx7'].start_us:.1f} us", origin))
    rows.append(("a flag", f"{model.FLAG_US * 1e3:.1f} ns", "the same"))
    for who, launches in (
        ("DeepEP V1, a row for each expert", model.EXPERT_LAUNCH_US),
        ("FlashInfer, a row for each rank", model.RANK_LAUNCH_US),
    ):
        both = " / ".join(f"{launches[op]:.1f}" for op in model.OPS)
        origin = "measured, one token: [rivals.json](../benchmarks/rivals.json)"
        rows.append((f"launch for few tokens of {who}", f"{both} us", origin))
    for machine in ("h800", "h200", "b200"):
        links = model.MACHINES[machine]
        text = f"{links.nvlink:g} and {links.nic:g} GB/s"
        rows.append((f"{machine.upper()}: NVLink and NIC, one direction", text, "data sheets"))
    head = ("constant", "value", "from")
    return table(head, rows) + f"\n*Records of {files(records, page)}.*\n"


def held_out(page: str) -> str:
    """Our own records that were not fitted."""
    rows, records = [], []
    for key, found in other_records().items():
        mode, op, dtype, device, num_ranks, tokens, hidden, topk, experts = key
        predicted = model.predict(model.OURS[mode, op], fit.exchange_of(found[0]), MACHINE).us
        measured = median(r["us"]["p50"] for r in found)
        records += found
        short = "H200" if device == H200 else "H100"
        rows.append(
            (
                f"{op}, {dtype}, {MODES[mode]}",
                f"{num_ranks} {short}",
                f"{tokens:,} of {hidden:,}, top-{topk} of {experts}",
                str(len(found)),
                us(measured),
                us(predicted),
                f"{predicted / measured - 1:+.0%}",
            )
        )
    head = ("kernel", "GPUs", "shape", "records", "measured", "predicted", "error")
    return table(head, rows) + f"\n*Records of {files(records, page)}.*\n"


def rivals_for_few() -> list[tuple[str, str, str, int, float, float]]:
    """(name, layout, op, tokens, measured, predicted) of other libraries on two H200."""
    found = []
    for r in load_rivals()["few_tokens"]:
        # DeepEP V2 makes the rows of experts where they arrive.
        by_expert = r["layout"] == "expert" and "V2" not in r["name"]
        rows = model.Rows.EXPERT if by_expert else model.Rows.NODE
        for tokens, times in r["us"].items():
            for op, measured in zip(model.OPS, times, strict=True):
                exchange = model.Exchange(num_ranks=2, ranks_per_node=2, tokens=int(tokens))
                kernel = model.theirs(op, "low_latency", rows)
                predicted = model.predict(kernel, exchange, MACHINE).us
                found.append((r["name"], r["layout"], op, int(tokens), measured, predicted))
    return found


def rivals(page: str) -> str:
    """Other libraries with few tokens on two H200: measured and predicted."""
    tokens = sorted({row[3] for row in rivals_for_few()})
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for name, layout, op, count, measured, predicted in rivals_for_few():
        own = lines.setdefault((f"{name}, {layout} layout", op), {})
        own[count] = f"{us(measured)} → {us(predicted)}"
    head = ("two H200, bf16: measured → predicted", "", *(f"{n:,}" for n in tokens))
    rows = [(name, op, *(own.get(n, "") for n in tokens)) for (name, op), own in lines.items()]
    return table(head, rows)


def errors(page: str) -> str:
    """The model beside published numbers that nothing was fitted on."""

    def line(names: Sequence[str], rows: Sequence[Published]) -> Row:
        sums = summarize(rows)
        near = sum(abs(row.error) <= NEAR for row in rows)
        ranks = sorted({row.exchange.num_ranks for row in rows})
        span = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        return (
            *names,
            span,
            f"{near} of {sums.num_rows}",
            f"{sums.median:+.0%}",
            f"{sums.median_size:.0%}",
            f"{sums.largest:+.0%}",
        )

    found = sorted(group(tested()).items(), key=lambda item: (_order(item[0]), item[0]))
    rows = [line((s, LEVELS[n], MODES[m]), own) for (s, n, m), own in found]
    for level, name in LEVELS.items():
        for mode, tokens in MODES.items():
            own = [r for (_, n, m), g in found if (n, m) == (level, mode) for r in g]
            rows.append(line(("*all systems*", name, tokens), own))
    rows.append(line(("**all**", "", ""), tested()))
    sizes = [summarize(own).median_size for _, own in found]
    head = (
        "system",
        "level",
        "tokens",
        "ranks",
        f"within {NEAR:.0%}",
        "median",
        "median size",
        "largest",
    )
    return table(head, rows) + (
        f"\nOf {len(sizes)} lines of systems, {sum(size <= NEAR for size in sizes)} have a median "
        f"size of {NEAR:.0%} or less; the median of these medians is {median(sizes):.0%}. Not in "
        f"the table: the {len(published()) - len(tested())} rows that were fitted.\n"
    )


def _order(key: tuple[str, str, str]) -> tuple[int, int]:
    _, level, mode = key
    return list(LEVELS).index(level), list(MODES).index(mode)


def at(num_ranks: int, tokens: int, dtype: str, max_nodes: int | None = None) -> model.Exchange:
    """Our shape on some ranks."""
    return model.grow(
        model.Exchange(
            num_ranks=1, ranks_per_node=1, tokens=tokens, dtype=dtype, max_nodes=max_nodes
        ),
        num_ranks,
        MACHINE,
    )


def predict(op: str, exchange: model.Exchange) -> model.Prediction:
    """Table of predictions for ours; the kernels for few tokens carry up to 128."""
    mode = "low_latency" if exchange.tokens <= 128 else "throughput"
    return model.predict(model.OURS[mode, op], exchange, MACHINE)


def ours(page: str) -> str:
    """Times that the model predicts for our kernels."""
    tables = []
    for tokens in (4096, 128):
        rows = []
        for num_ranks in RANKS:
            cells = []
            for op, dtype in KINDS:
                free, limited = (
                    predict(op, at(num_ranks, tokens, dtype, m)) for m in (None, LIMIT)
                )
                pair = us(free.us)
                if num_ranks // MACHINE.ranks_per_node > LIMIT:
                    pair += f" / {us(limited.us)}"
                cells.append(pair)
            bound = predict("dispatch", at(num_ranks, tokens, "bf16")).bound
            rows.append((f"{num_ranks:,}", *cells, bound))
        head = (
            f"ranks, {tokens:,} tokens each",
            *(f"{op}, {dtype}" for op, dtype in KINDS),
            "bound by",
        )
        tables.append(table(head, rows))
    return "\n".join(tables) + (
        f"\n*Predictions in microseconds for H200 of 8 GPUs a node, rank layout, rows of "
        f"{SHAPE.hidden:,}, top-{SHAPE.topk} of {SHAPE.experts} experts or one a rank. After the "
        f"stroke: at most {LIMIT} nodes a token. 8 ranks are one node.*\n"
    )


def groups(page: str) -> str:
    """Bytes with group-limited routing."""
    rows = []
    for num_ranks in RANKS[1:]:
        num_nodes = num_ranks // MACHINE.ranks_per_node
        for limit in (None, 8, 4, 2, 1):
            if limit is not None and limit >= num_nodes:
                continue
            exchange = at(num_ranks, 4096, "bf16", limit)
            found = predict("combine", exchange)
            rows.append(
                (
                    f"{num_ranks:,} ranks, {'no limit' if limit is None else f'{limit} at most'}",
                    f"{exchange.nodes_of_a_token():.2f}",
                    f"{count_nodes(exchange):.2f}",
                    f"{exchange.ranks_of_a_token():.2f}",
                    f"{found.traffic.network_bytes / 1e6:,.0f}",
                    f"{found.traffic.nvlink_bytes / 1e6:,.0f}",
                    us(found.us),
                )
            )
    head = (
        "nodes of a token",
        "nodes",
        "counted",
        "ranks",
        "network MB",
        "NVLink MB",
        "predicted us",
    )
    return table(head, rows) + (
        "\n*A combine of 4,096 tokens in bf16, one rank's bytes, by expectation. A dispatch adds "
        f"the ids. Counted: nodes of {COUNTED:,} tokens that a router sends to the nodes of their "
        "best experts.*\n"
    )


def count_nodes(exchange: model.Exchange) -> float:
    """Nodes of a token, counted in routings of `jax_ep.testing.routing`."""
    rng, shape = np.random.default_rng(0), (1, COUNTED, exchange.topk)
    num_nodes, limit = exchange.num_nodes, exchange.drawn_nodes
    if limit == num_nodes:
        ids = routing.balanced(rng, shape, exchange.experts)
    else:
        ids = routing.group_limited(
            rng, shape, exchange.experts, num_groups=num_nodes, max_groups=limit
        )
    nodes = np.sort(ids[0] // (exchange.experts // num_nodes), axis=-1)
    return float(1 + (np.diff(nodes, axis=-1) > 0).sum(axis=-1).mean())
