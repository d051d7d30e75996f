"""The first screen, and what other libraries took."""

from typing import Any

from records import H200, Row, load_rivals, median, newest, pick, table, us

_ALIGNMENT = 128  # of the records of the expert layout


def _step(record: dict[str, Any]) -> str:
    """The median of single steps, or of the chain where no steps were timed."""
    return us(record["steps"]["us"]["p50"]) if record.get("steps") else median(record)


def first_screen(page: str) -> str:
    """Four lines against stock JAX and the best rival."""
    gpus = {"device": H200, "num_ranks": 2, "num_processes": 1}
    at = {"tokens": 4096, "dtype": "bf16", **gpus}
    rank = {**at, "commit": "b076cac", "layout": "rank"}
    send, back = newest(op="dispatch", sms=20, **rank), newest(op="combine", sms=16, **rank)
    gather = newest(op="dispatch", contender="all_gather", run=send["run"])
    scatter = newest(op="combine", contender="all_gather", run=back["run"])
    expert = newest(op="dispatch", layout="expert", shape="deepseek-v3", sms=64, **at)
    swap = newest(op="dispatch", contender="all_to_all", run=expert["run"])
    psum = pick(op="all_reduce", shape="64 KiB", contender="psum", device=H200)[-1]
    small = newest(op="all_reduce", algorithm="low_latency", run=psum["run"])
    rivals = load_rivals()
    flash, deep = rivals["exchanges"][4], rivals["exchanges"][5]
    fastest = min(
        (r for r in rivals["sums"] if r["op"] == "all_reduce" and "64 KiB" in r["us"]),
        key=lambda r: r["us"]["64 KiB"],
    )

    def line(what: str, mine: dict[str, Any], stock: str, rival: str) -> Row:
        sms = f"&nbsp;({mine['sms']}&nbsp;SMs)" if mine["sms"] else ""
        return what, f"**{_step(mine)}**{sms}", stock, rival, us(mine["floor_us"])

    flash_sms = f"FlashInfer ({flash['sms']} SMs)"
    rows = [
        line(
            "`dispatch`, rank layout",
            send,
            f"{median(gather)} `all_gather`",
            f"{us(flash['dispatch'])} {flash_sms}",
        ),
        line(
            "`combine`, rank layout",
            back,
            f"{median(scatter)} `psum_scatter`",
            f"{us(flash['combine'])} {flash_sms}",
        ),
        line(
            "`dispatch`, expert layout",
            expert,
            f"{median(swap)} sort, `all_to_all`, sort",
            f"{us(deep['dispatch'])} DeepEP V2.1 ({deep['sms']} SMs)",
        ),
        line(
            "`all_reduce`, 64 KiB",
            small,
            f"{_step(psum)} `psum`",
            f"{us(fastest['us']['64 KiB'])} SGLang, programmatic launch",
        ),
    ]
    head = ("microseconds, two H200, bf16", "jax_ep", "stock JAX", "best rival", "floor")
    software = f"JAX {send['versions']['jax']}, driver {send['versions']['driver']}"
    commits = ", ".join(dict.fromkeys(r["commit"][:7] for r in (send, expert, small)))
    what = f"{send['tokens']:,} tokens of {send['hidden']:,} on each GPU, top-{send['topk']} of"
    return table(head, rows) + (
        f"\nExchanges: {what} {send['experts']} experts; in the expert layout groups are padded to"
        f" {_ALIGNMENT} rows. {software}; commits {commits}.\n"
    )


def rivals(page: str) -> str:
    """Other libraries, on the same kind of GPUs."""
    known = load_rivals()
    kinds = ("dispatch", "cached_dispatch", "dispatch_fp8", "combine")
    rows = [
        (f"{r['name']}, {r['layout']} layout", r["sms"], *(us(r[k]) for k in kinds), r["note"])
        for r in known["exchanges"]
    ]
    head = ("4,096 tokens", "SMs", "dispatch", "along a handle", "fp8", "combine", "remarks")
    counts = ("1", "8", "32", "128", "512")
    few = [
        (
            f"{r['name']}, {r['layout']} layout",
            *(" / ".join(map(us, r["us"][c])) if c in r["us"] else "" for c in counts),
        )
        for r in known["few_tokens"]
    ]
    shapes = ("1 KiB", "16 KiB", "64 KiB", "256 KiB", "1 MiB", "4 MiB", "16 MiB", "64 MiB")
    small = [
        (f"{r['name']}, `{r['op']}`", *(us(r["us"].get(s)) for s in shapes)) for r in known["sums"]
    ]
    return "\n".join(
        [
            table(head, rows),
            table(("few tokens, bf16: dispatch / combine", *counts), few),
            table(("sums, bf16", *shapes), small),
            f"*{known['num_ranks']} x {known['device'].removeprefix('NVIDIA ')}, {known['date']}. "
            f"{known['how']}*\n",
        ]
    )
