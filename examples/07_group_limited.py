"""A mixture-of-experts layer whose router sends each token to a few nodes only.

    python examples/07_group_limited.py

Between nodes a token costs a row for each other node that has one of its experts. A group-limited
router, as in DeepSeek-V3, chooses nodes first: those whose two best experts have the highest
scores together. Then it chooses experts, from these nodes only. The program counts the rows that
both kinds of router send between nodes, with `get_dispatch_layout`, and compares the layers with
dense ones, in which every expert answers every token. Its exit status is the verdict.

Without GPUs it runs on eight virtual CPU devices. `--ranks-per-node` makes nodes of them; a group
over several hosts has these as its nodes by default.
"""

import sys
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from common import flag, largest_difference, parse_flags
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.testing import virtual_devices

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Config:
    """Configuration of the layer; every field is a command line flag."""

    ranks_per_node: int = flag(2, "devices of a node, a divisor of their number")
    max_nodes: int = flag(2, "nodes that the experts of a token may be on")
    experts_per_device: int = flag(4, "experts of each device")
    topk: int = flag(6, "experts of each token")
    tokens: int = flag(64, "tokens of each device")
    hidden: int = flag(32, "elements of a token, a multiple of 4")


def route(x, router, *, num_nodes: int, config: Config, is_limited: bool):
    """Weights and ids [T, K] of each token's experts."""
    scores = jax.nn.sigmoid(x @ router)
    choices = scores
    if is_limited:
        by_node = scores.reshape(len(x), num_nodes, -1)
        best, _ = jax.lax.top_k(by_node, min(2, by_node.shape[-1]))
        _, nodes = jax.lax.top_k(best.sum(axis=-1), config.max_nodes)
        is_open = jax.nn.one_hot(nodes, num_nodes).any(axis=1)
        # Scores are positive, so experts of other nodes come last.
        choices = jnp.where(is_open[:, :, None], by_node, -1.0).reshape(scores.shape)
    _, topk_idx = jax.lax.top_k(choices, config.topk)
    weights = jnp.take_along_axis(scores, topk_idx, axis=-1)
    return weights / weights.sum(axis=-1, keepdims=True), topk_idx


def moe_layer(x, router, w_in, w_out, *, group, choose):
    """One device's share of the answers, and its tokens for each node."""
    weights, topk_idx = choose(x, router)
    sizes = {"num_experts": router.shape[1], "layout": "expert"}
    worst = {"num_tokens": len(x), "num_topk": topk_idx.shape[1], "num_ranks": group.num_ranks}
    rows = jax_ep.recv_capacity(**worst, balance=None, **sizes)
    sent = jax_ep.dispatch(x, topk_idx, weights, group=group, recv_capacity=rows, **sizes)
    hidden = jax.nn.silu(jax.lax.ragged_dot(sent.x, w_in, sent.group_sizes))
    answers = jax.lax.ragged_dot(hidden, w_out, sent.group_sizes)
    layout = jax_ep.get_dispatch_layout(topk_idx, num_experts=router.shape[1], group=group)
    y = jax_ep.combine(answers, sent.handle, weights=sent.weights)
    return y, layout.num_tokens_per_node


def dense_layer(x, router, w_in, w_out, *, choose):
    """The same function of global arrays."""
    weights, topk_idx = choose(x, router)
    gates = jnp.einsum("tk,tke->te", weights, jax.nn.one_hot(topk_idx, len(w_in)))
    hidden = jax.nn.silu(jnp.einsum("th,ehf->tef", x, w_in))
    return jnp.einsum("te,tef,efh->th", gates, hidden, w_out)


def main() -> None:
    config = parse_flags(Config, __doc__)
    virtual_devices(8)
    ranks, near = jax.device_count(), config.ranks_per_node
    if ranks % near or not 1 <= config.max_nodes <= ranks // near:
        sys.exit(
            f"--ranks-per-node {near} must divide the {ranks} devices, and --max-nodes "
            f"{config.max_nodes} must be 1 to their number of nodes"
        )
    experts, shard = ranks * config.experts_per_device, P("expert")
    if config.topk > config.max_nodes * near * config.experts_per_device:
        sys.exit(f"--topk {config.topk} must be at most the experts of --max-nodes nodes")
    mesh = jax.make_mesh((ranks,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens, hidden = ranks * config.tokens, config.hidden
    shapes: list[tuple[int, ...]] = [(tokens, hidden), (hidden, experts)]
    shapes += [(experts, hidden, 2 * hidden), (experts, 2 * hidden, hidden)]
    args = [jax.random.normal(jax.random.key(i), s) / 4 for i, s in enumerate(shapes)]
    has_failed = False
    with jax_ep.Group.open(mesh, "expert", ranks_per_node=near) as group:
        print(f"{group}: {ranks // near} nodes of {near} ranks, {tokens} tokens")
        node_of_row = jnp.arange(ranks) // near
        for is_limited in (False, True):
            how = {"num_nodes": ranks // near, "config": config, "is_limited": is_limited}
            choose = partial(route, **how)
            layer = partial(moe_layer, group=group, choose=choose)
            in_specs = (shard, P(), shard, shard)
            layer = jax.shard_map(layer, mesh=mesh, in_specs=in_specs, out_specs=shard)
            y, per_node = jax.jit(layer)(*args)
            per_node = per_node.reshape(ranks, -1)
            own = jnp.take_along_axis(per_node, node_of_row[:, None], axis=1)
            error = largest_difference([y], [dense_layer(*args, choose=choose)])
            has_failed |= not error < TOLERANCE
            name = f"at most {config.max_nodes} nodes" if is_limited else "no limit"
            print(
                f"{name}: {per_node.sum() / tokens:.2f} nodes a token, "
                f"{per_node.sum() - own.sum()} rows between nodes, off by at most {error:.1g}"
            )
        group.check()
    sys.exit(1 if has_failed else 0)


if __name__ == "__main__":
    main()
