"""Tables of dispatch and combine."""

from typing import Any

from records import EXCHANGES, H100, H200, cell, load, newest, pick, short_size, source, table, us


def beside_stock(page: str) -> str:
    """4,096 tokens on two GPUs, ours and stock JAX of the same run."""
    runs = [
        ("dispatch", "rank", "bf16", "all_gather", H200, "b076cac", (16, 20)),
        ("cached_dispatch", "rank", "bf16", None, H200, "b076cac", (16, 20)),
        ("combine", "rank", "bf16", "all_gather", H200, "b076cac", (16, 20)),
        ("dispatch", "expert", "bf16", "all_to_all", H200, "e77517b", (64,)),
        ("cached_dispatch", "expert", "bf16", None, H200, "e77517b", (64,)),
        ("combine", "expert", "bf16", "all_to_all", H200, "e77517b", (64,)),
        ("dispatch", "rank", "bf16", "all_gather", H100, "af82d14", (16, 20)),
        ("cached_dispatch", "rank", "bf16", None, H100, "af82d14", (16, 20)),
        ("combine", "rank", "bf16", "all_gather", H100, "af82d14", (16, 20)),
        ("dispatch", "rank", "fp8", "all_gather", H100, "af82d14", (16, 20)),
        ("dispatch", "expert", "bf16", "all_to_all", H100, "a413ef4", (48, 64)),
        ("cached_dispatch", "expert", "bf16", None, H100, "a413ef4", (48, 64)),
        ("combine", "expert", "bf16", "all_to_all", H100, "a413ef4", (48, 64)),
    ]
    stock_names = {
        ("all_gather", "dispatch"): "`all_gather`",
        ("all_gather", "combine"): "`psum_scatter`",
        ("all_to_all", "dispatch"): "sort, `all_to_all`, sort",
        ("all_to_all", "combine"): "`all_to_all`, sum",
    }
    rows, used = [], []
    for op, layout, dtype, stock, device, commit, budgets in runs:
        at = {
            "op": op,
            "layout": layout,
            "dtype": dtype,
            "device": device,
            "commit": commit,
            "num_ranks": 2,
            "num_processes": 1,
            "tokens": 4096,
            "shape": "deepseek-v3",
        }
        ours = [newest(sms=sms, **at) for sms in budgets]
        ragged = pick(contender="ragged_all_to_all", **at)
        other = ""
        if stock:
            theirs = newest(contender=stock, run=ours[0]["run"])
            other = f"{us(theirs['us']['p50'])} {stock_names[stock, op]}"
        if ragged:
            other += f"; {us(ragged[-1]['us']['p50'])} `ragged_all_to_all`"
        cells = ", ".join(f"{us(r['us']['p50'])} ({r['sms']})" for r in ours)
        rows.append(
            (
                f"{op}, {layout} layout, {dtype}",
                device.split()[1],
                cells,
                other,
                us(ours[0]["floor_us"]),
            )
        )
        used += ours
    head = ("operation", "two", "jax_ep (SMs)", "stock JAX", "floor")
    return table(head, rows) + source(used, page)


def mixtral(page: str) -> str:
    """A shape with few choices and large experts: the kernels, `xla` and stock JAX."""
    at = {"shape": "mixtral", "device": H200, "num_ranks": 2, "num_processes": 1}
    rows = []
    for layout in ("rank", "expert"):
        for op in ("dispatch", "combine"):
            this = {"op": op, "layout": layout, **at}
            ours = newest(contender="jax_ep", backend="cuda", **this)
            stock = [r for r in pick(run=ours["run"], **this) if r["contender"] != "jax_ep"]
            best = min(stock, key=lambda r: r["us"]["p50"])
            rows.append(
                (
                    f"{op}, {layout}",
                    f"{us(ours['us']['p50'])} ({ours['sms']})",
                    cell(contender="jax_ep", backend="xla", run=ours["run"], **this),
                    f"{us(best['us']['p50'])} `{best['contender']}`",
                    us(ours["floor_us"]),
                )
            )
    head = ("4,096 tokens of 4,096, top-2 of 8", "`cuda` (SMs)", "`xla`", "stock JAX", "floor")
    return table(head, rows) + source(pick(**at), page)


def budgets(page: str) -> str:
    """The newest sweep over the SMs of a GPU."""
    at = {"device": H200, "commit": "4e53d54"}
    sms = sorted({r["sms"] for r in pick(**at) if r["sms"]})
    rows = []
    for layout in ("rank", "expert"):
        for op in EXCHANGES:
            this = {"op": op, "layout": layout, **at}
            rows.append(
                (
                    f"{op}, {layout}",
                    *(cell(sms=n, **this) for n in sms),
                    cell(backend="xla", **this),
                    us(newest(**this)["floor_us"]),
                )
            )
    head = ("SMs", *map(str, sms), "`xla`", "floor")
    return table(head, rows) + source(pick(**at), page)


def over_tokens(page: str) -> str:
    """Ours and stock JAX over the tokens of a rank."""
    used = sweep()
    tokens = sorted({r["tokens"] for r in used})
    rows = []
    for op, layout, dtype in dict.fromkeys((r["op"], r["layout"], r["dtype"]) for r in used):
        own = [r for r in used if (r["op"], r["layout"], r["dtype"]) == (op, layout, dtype)]

        def best(count: int, is_ours: bool, own: Any = own) -> str:
            here = [r for r in own if (r["contender"] == "jax_ep") == is_ours]
            values = [r["us"]["p50"] for r in here if r["tokens"] == count]
            return us(min(values)) if values else ""

        rows.append(
            (f"{op}, {layout}, {dtype}", *(f"{best(t, True)} / {best(t, False)}" for t in tokens))
        )
    return table(("jax_ep / stock JAX", *(f"{t:,}" for t in tokens)), rows) + source(used, page)


def sweep() -> list[dict[str, Any]]:
    """Records over tokens, of one run each, in the budgets that ship."""
    sms = {"rank": 20, "expert": 64}
    used = [
        r
        for r in pick(device=H100, num_ranks=2)
        if r["file"].endswith(("hbm3-dispatch-combine.jsonl", "hbm3-dispatch.jsonl"))
        and r["sms"] in (None, sms[r["layout"]])
        and r["commit"][:7] != "209c728"
    ]
    return sorted(
        used, key=lambda r: (r["dtype"] == "fp8", r["layout"] == "expert", r["op"] == "combine")
    )


def four_gpus(page: str) -> str:
    """Four H100."""
    at = {"device": H100, "num_ranks": 4}
    rows = []
    for op, stock in (("dispatch", "`all_gather`"), ("combine", "`psum_scatter`")):
        floor = newest(op=op, **at)["floor_us"]
        ours = (cell(op=op, sms=sms, **at) for sms in (20, 24))
        theirs = f"{cell(op=op, contender='all_gather', **at)} {stock}"
        rows.append((op, *ours, theirs, us(floor)))
    return table(("rank layout, bf16", "20 SMs", "24", "stock JAX", "floor"), rows) + source(
        pick(**at), page
    )


def processes(page: str) -> str:
    """One process for both GPUs, and one for each."""
    at = {"device": H200, "commit": "b076cac", "contender": "jax_ep", "layout": "rank"}
    rows = []
    for op in EXCHANGES:
        for sms in (16, 20):
            values = {}
            for count in (1, 2):
                found = pick(op=op, sms=sms, num_processes=count, **at)
                values[count] = sum(r["us"]["p50"] for r in found) / len(found)
            change = f"{values[2] / values[1] - 1:+.1%}"
            rows.append((op, str(sms), us(values[1]), us(values[2]), change))
    used = pick(**at)
    sums = {"device": H200, "commit": "3cfd6c2", "op": "all_reduce"}
    for shape in ("16 KiB", "64 KiB", "1024 KiB", "16384 KiB"):
        best = {}
        for count in (1, 2):
            found = [
                r
                for r in pick(num_processes=count, shape=shape, **sums)
                if r["file"].endswith("h200-all_reduce-all_reduce_residual_rmsnorm.jsonl")
            ]
            best[count] = min(r["us"]["p50"] for r in found)
            used += found
        change = f"{best[2] / best[1] - 1:+.1%}"
        rows.append((f"all_reduce, {short_size(shape)}", "", us(best[1]), us(best[2]), change))
    return table(("", "SMs", "one process", "two", "change"), rows) + source(used, page)


def overlap(page: str) -> str:
    """A dispatch beside a matmul, without command buffers."""
    rows, used = [], pick(op="overlap")
    for r in used:
        kernel = "Triton" if "cublas_fallback=false" in r["xla_flags"] else "cuBLAS"
        longer = max(r["us"]["dispatch"], r["us"]["matmul"])
        values = [us(r["us"][k]) for k in ("dispatch", "matmul", "in_turn", "beside")]
        rows.append(
            (
                f"{r['width']:,}, {kernel}",
                str(r["sms"]),
                *values,
                f"{r['us']['beside'] / longer:.2f}",
            )
        )
    head = (
        "width, matmul by",
        "SMs",
        "dispatch",
        "matmul",
        "in turn",
        "`overlap`",
        "over the longer",
    )
    return table(head, rows) + source(used, page)


def host_time(page: str) -> str:
    """Table of the host's work for a call that no command buffer replays."""
    used = pick(op="host_time")
    rows = [(r["of"], str(r["num_ranks"]), us(r["us"]["host"])) for r in used]
    return table(("operation", "GPUs", "host"), rows) + source(used, page)


def cpus(page: str) -> str:
    """Eight virtual devices."""
    used = [r for r in load() if r["device"].startswith("AMD")]
    rows = []
    for version in dict.fromkeys(r["versions"]["jax"] for r in used):
        for op in dict.fromkeys(r["op"] for r in used):
            own = [r for r in used if r["op"] == op and r["versions"]["jax"] == version]

            def ms(contender: str, backend: str, own: Any = own) -> str:
                found = [r for r in own if (r["contender"], r["backend"]) == (contender, backend)]
                return f"{found[-1]['us']['p50'] / 1000:.1f}"

            rows.append(
                (
                    f"{op}, JAX {version}",
                    ms("jax_ep", "cpu"),
                    ms("jax_ep", "xla"),
                    ms("all_to_all", "xla"),
                    f"{own[-1]['floor_us'] / 1000:.1f}",
                )
            )
    head = ("milliseconds", "jax_ep `cpu`", "jax_ep `xla`", "`all_to_all` by hand", "floor")
    return table(head, rows) + source(used, page)
