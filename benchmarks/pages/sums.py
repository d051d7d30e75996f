"""Tables of the all_reduce family."""

from collections.abc import Sequence

from records import H100, H200, SUMS, cell, newest, of_tune, short_size, source, table, us

ALGORITHMS = ("low_latency", "one_shot", "two_shot")


def sums(page: str) -> str:
    """The all_reduce family over sizes."""
    return _sums(page, H200, SUMS)


def sums_of_h100(page: str) -> str:
    """The same of older device code, on the other GPUs."""
    return _sums(page, H100, ("all_reduce", "all_reduce_residual_rmsnorm"))


def _sums(page: str, device: str, ops: Sequence[str]) -> str:
    text = []
    used = of_tune(device)
    for op in ops:
        own = [r for r in used if r["op"] == op]
        stock = next(r["contender"] for r in own if r["contender"] != "jax_ep")
        known = [a for a in ALGORITHMS if any(r["algorithm"] == a for r in own)]
        rows = []
        for shape in dict.fromkeys(r["shape"] for r in own):
            at = {"op": op, "shape": shape, "file": own[0]["file"]}
            mine = [cell(algorithm=a, contender="jax_ep", **at) for a in known]
            floor = us(newest(**at)["floor_us"])
            rows.append((short_size(shape), *mine, cell(contender=stock, **at), floor))
        name = f"`{stock}`" if op != "all_reduce_residual_rmsnorm" else "`psum`, residual, norm"
        text.append(table((f"`{op}`", *known, name, "floor"), rows))
    return "\n".join(text) + source(used, page)


def decode_layer(page: str) -> str:
    """A decoding step of a tensor-parallel layer."""
    rows, used = [], []
    for device, commit in ((H200, "3cfd6c2"), (H100, "b3c34cc")):
        for batch in (1, 8, 64):
            at = {"op": "decode_layer", "device": device, "commit": commit, "batch": batch}
            psum, ours, none = (newest(contender=c, **at) for c in ("psum", "jax_ep", "no_sum"))
            whole = [r["us"]["p50"] for r in (psum, ours, none)]
            parts = f"{us(whole[0] - whole[2])} → {us(whole[1] - whole[2])}"
            name = device.split()[1]
            rows.append((f"{name}, {batch}", *map(us, whole), parts))
            used += [psum]
    head = ("two, batch", "psum and norm", "fused", "neither", "sums and norms")
    return table(head, rows) + source(used, page)
