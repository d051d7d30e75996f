"""Serves a small mixture-of-experts transformer: greedy decoding with continuous batching.

    python examples/06_serve.py

Attention heads, and with them the cache of keys and values, are sharded over all devices, and so
are the experts. One jitted step with donated state does everything: attention, whose terms
`all_reduce_residual_rmsnorm` adds up; then each device sends its share of the tokens to their
experts, with `low_latency_dispatch`, and gets the answers, with `low_latency_combine`.

When a request has ended, its slot of the batch goes to the next one in the queue. The token of a
free slot chooses no expert and sends nothing, so all shapes stay the same. Prompts take the same
step, compiled for more tokens and for `dispatch` and `combine`. In the end all requests are served
again with these two in decoding as well, and with their kernels for many tokens; they must get the
same tokens. The times of a step differ on GPUs only: on CPUs both ways are one.

Without GPUs it runs on eight virtual CPU devices. Weights and prompts are random, but seeded.
"""

import sys
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import flag, parse_flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.testing import virtual_devices

VOCABULARY, END = 256, 0  # END is the token that ends a request.


@dataclass(frozen=True)
class Config:
    """Configuration of model and server; every field is a command line flag."""

    d_model: int = flag(64, "width of the residual stream, a multiple of --heads")
    layers: int = flag(2, "number of layers, each attention and MoE")
    heads: int = flag(8, "attention heads, a multiple of --devices")
    experts: int = flag(16, "experts of each layer, a multiple of --devices")
    topk: int = flag(2, "experts of each token")
    slots: int = flag(16, "requests that run at once, a multiple of --devices")
    requests: int = flag(32, "requests to serve")
    prompt: int = flag(16, "tokens of the longest prompt")
    tokens: int = flag(48, "tokens of the longest answer")
    dtype: str = flag("float32", "of weights and cache", str, choices=["float32", "bfloat16"])
    seed: int = flag(0, "of weights and requests")
    backend: str = flag("auto", "carries the rows", str, choices=["auto", "cpu", "cuda", "xla"])
    devices: int | None = flag(None, "use the first of jax.devices(); None: at most 8")


class Request(NamedTuple):
    """A prompt, and the answer as it grows."""

    prompt: np.ndarray
    limit: int  # of tokens in the answer
    answer: list[int]


class State(NamedTuple):
    """State of the slots. A step overwrites it in place."""

    cache: jax.Array  # [keys or values, layers, slots, positions, heads, size of a head]
    length: jax.Array  # [slots] int32: positions that the cache holds
    left: jax.Array  # [slots] int32: tokens that may still be generated; 0: the slot is free
    newest: jax.Array  # [slots] int32: the token to feed next


LAYER_SPECS = {"qkv": P(None, None, None, "model"), "out": P(None, "model"), "scales": P()}
LAYER_SPECS |= {"router": P(), "up": P(None, "model"), "down": P(None, "model")}
SPECS = {"embed": P(), "place": P(), "head": P(), "layers": LAYER_SPECS}
STATE_SPECS = State(P(None, None, None, None, "model"), P(), P(), P())


def init(config: Config) -> tuple[dict, State]:
    """Random weights, layers stacked along the leading axis, and the state of free slots."""
    d, n, size = config.d_model, config.layers, config.d_model // config.heads
    positions, dtype = config.prompt + config.tokens, jnp.dtype(config.dtype)
    rng = np.random.default_rng(config.seed)

    def normal(*shape: int, fan_in: int = d) -> np.ndarray:
        return (rng.standard_normal(shape) * fan_in**-0.5).astype(dtype)

    params: dict[str, Any] = {"head": normal(d, VOCABULARY)}
    params |= {"embed": normal(VOCABULARY, d, fan_in=1), "place": normal(positions, d, fan_in=1)}
    params["layers"] = {
        "qkv": normal(n, d, 3, config.heads, size),
        "out": normal(n, config.heads, size, d),
        "scales": np.ones((n, 2, d), dtype),
        "router": normal(n, d, config.experts),
        "up": normal(n, config.experts, d, 2 * d),
        "down": normal(n, config.experts, 2 * d, d),
    }
    cache = np.zeros((2, n, config.slots, positions, config.heads, size), dtype)
    return params, State(cache, *np.zeros((3, config.slots), np.int32))


def moe(x: Any, is_fed: Any, layer: dict, *, topk: int, group: Any, low_latency: bool) -> jax.Array:
    """Answers of the experts to x [num_tokens, d_model]; zero for tokens that are not fed."""
    probabilities = jax.nn.softmax((x @ layer["router"]).astype(jnp.float32))
    weights, topk_idx = jax.lax.top_k(probabilities, topk)
    topk_idx = jnp.where(is_fed[:, None], topk_idx, -1)
    sizes = {"num_experts": probabilities.shape[1], "layout": "expert"}
    if low_latency:
        dispatch = partial(jax_ep.low_latency_dispatch, max_tokens_per_rank=len(x))
        combine = jax_ep.low_latency_combine
    else:
        worst = {"num_tokens": len(x), "num_topk": topk, "num_ranks": group.num_ranks}
        rows = jax_ep.recv_capacity(**worst, balance=None, **sizes)
        # With a number of SMs, the kernels for many tokens carry few tokens, too.
        dispatch = partial(jax_ep.dispatch, recv_capacity=rows, fill="padding", num_sms=16)
        combine = partial(jax_ep.combine, num_sms=16)
    sent = dispatch(x, topk_idx, weights, group=group, **sizes)
    hidden = jax.nn.silu(jax.lax.ragged_dot(sent.x, layer["up"], sent.group_sizes))
    answers = jax.lax.ragged_dot(hidden, layer["down"], sent.group_sizes)
    return combine(answers, sent.handle, weights=sent.weights)


def step(params: dict, state: State, admitted: Any, *, group: jax_ep.Group, **how: Any) -> Any:
    """Generates a token in every running slot or, if requests are admitted, in their slots only.

    It runs inside jax.shard_map, where a rank has all tokens and its own heads and experts.
    `admitted` is None, or prompts [slots, chunk], their sizes [slots], 0 for no request, and limits
    [slots]. Returns the state, and [slots, 2]: the token, or -1, and how many more may follow.
    """
    cache, length, left, newest = state
    if admitted is None:
        tokens, count = newest[:, None], jnp.minimum(left, 1)
    else:
        tokens, count, limit = admitted
        length, left = jnp.where(count > 0, 0, length), jnp.where(count > 0, limit, left)
    (slots, chunk), rank = tokens.shape, jax.lax.axis_index("model")
    is_fed = jnp.arange(chunk) < count[:, None]
    at = length[:, None] + jnp.arange(chunk)
    is_past = jnp.arange(cache.shape[3]) <= at[:, None, :, None]
    place = jnp.where(is_fed, at, cache.shape[3])  # Behind the cache nothing is written.
    add_norm = partial(jax_ep.all_reduce_residual_rmsnorm, group=group)

    h = params["embed"][tokens] + params["place"][at]
    x = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6)
    for i in range(cache.shape[1]):
        layer = {name: stacked[i] for name, stacked in params["layers"].items()}
        q, k, v = jnp.einsum("btd,dchs->cbths", x, layer["qkv"])
        where = (slice(None), i, jnp.arange(slots)[:, None], place)
        cache = cache.at[where].set(jnp.stack([k, v]), mode="drop")
        mixed = jax.nn.dot_product_attention(q, cache[0, i], cache[1, i], mask=is_past)
        x, h = add_norm(jnp.einsum("bths,hsd->btd", mixed, layer["out"]), h, layer["scales"][0])
        # Each rank sends its share of the tokens to their experts. The sum over the ranks, with
        # zeros in the shares of the others, brings the answers together.
        shares = x.reshape(group.num_ranks, -1, x.shape[-1])
        own = shares[rank], is_fed.reshape(shares.shape[:2])[rank]
        answers = jnp.zeros_like(shares).at[rank].set(moe(*own, layer, group=group, **how))
        x, h = add_norm(answers.reshape(x.shape), h, layer["scales"][1])

    logits = x[jnp.arange(slots), jnp.maximum(count, 1) - 1] @ params["head"]
    newest = jnp.where(count > 0, jnp.argmax(logits, axis=-1), newest)
    left = jnp.where(count > 0, jnp.where(newest == END, 0, left - 1), left)
    told = jnp.stack([jnp.where(count > 0, newest, -1), left], axis=1)
    return State(cache, length + count, left, newest), told


def admit(queue: deque[Request], running: list[Request | None], config: Config) -> Any:
    """Moves requests from the queue to free slots, and returns what `step` must know of them."""
    prompts = np.zeros((config.slots, config.prompt), np.int32)
    sizes, limits = np.zeros((2, config.slots), np.int32)
    for slot, occupant in enumerate(running):
        if queue and occupant is None:
            running[slot] = request = queue.popleft()
            sizes[slot], limits[slot] = len(request.prompt), request.limit
            prompts[slot, : sizes[slot]] = request.prompt
    return prompts, sizes, limits


def serve(
    prefill: Any, decode: Any, state: State, queue: deque[Request], config: Config, *, group: Any
) -> list[float]:
    """Answers the requests; returns the seconds of each step of decoding, from launch to tokens."""
    running: list[Request | None] = [None] * config.slots
    seconds: list[float] = []
    while queue or any(running):
        admitted = admit(queue, running, config) if queue and None in running else None
        begin = time.perf_counter()
        state, told = prefill(state, admitted) if admitted else decode(state, None)
        group.check(told)
        told = np.asarray(told).tolist()
        if not admitted:
            seconds.append(time.perf_counter() - begin)
        for slot, (token, left) in enumerate(told):
            if token >= 0:
                running[slot].answer.append(token)
            if left == 0:
                running[slot] = None
    return seconds


def make_requests(config: Config) -> list[Request]:
    rng = np.random.default_rng(config.seed)
    sizes = rng.integers(1, config.prompt + 1, config.requests)
    limits = rng.integers(1, config.tokens + 1, config.requests)
    prompts = [rng.integers(1, VOCABULARY, size) for size in sizes]
    return [Request(*both, []) for both in zip(prompts, limits, strict=True)]


def main() -> None:
    config = parse_flags(Config, __doc__)
    virtual_devices(config.devices or 8)
    devices = jax.devices()[: config.devices or 8]
    mesh, ranks = Mesh(np.array(devices), ("model",)), len(devices)
    if config.heads % ranks or config.experts % ranks or config.slots % ranks:
        sys.exit(f"--heads, --experts and --slots must be multiples of the {ranks} devices")
    sizes = {"hidden": config.d_model, "num_topk": config.topk, "dtype": config.dtype}
    share = config.slots // ranks
    room = jax_ep.low_latency_bytes(max_tokens_per_rank=share, num_ranks=ranks, **sizes)
    with jax_ep.Group.open(mesh, "model", backend=config.backend, low_latency_bytes=room) as group:
        print(f"{group}: {config.slots} slots, {config.requests} requests")
        put = partial(jax.tree.map, lambda s, a: jax.device_put(a, NamedSharding(mesh, s)))
        params, new_state = put(SPECS, init(config)[0]), lambda: put(STATE_SPECS, init(config)[1])
        nothing = admit(deque(), [None] * config.slots, config)

        def compiled(admitted: Any, *, low_latency: bool) -> Any:
            """The step. It is compiled ahead, so other shapes raise, and do not compile."""
            fn: Any = partial(step, topk=config.topk, group=group, low_latency=low_latency)
            in_specs, out_specs = (SPECS, STATE_SPECS, P()), (STATE_SPECS, P())
            fn = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
            lowered = jax.jit(fn, donate_argnums=1).lower(params, new_state(), admitted)
            return partial(lowered.compile(), params)

        prefill = compiled(nothing, low_latency=False)
        answers = []
        for low_latency in (True, False):
            decode, state = compiled(None, low_latency=low_latency), new_state()
            for _ in range(3):  # Warms up. All slots are free, so nothing is sent.
                state, _ = prefill(state, nothing)
                state, told = decode(state, None)
            group.check(told)
            requests = make_requests(config)
            begin = time.perf_counter()
            seconds = serve(prefill, decode, state, deque(requests), config, group=group)
            took = time.perf_counter() - begin
            answers.append([request.answer for request in requests])
            count = sum(map(len, answers[-1]))
            p50, p99 = np.percentile(seconds or np.nan, [50, 99])
            print("decoding with", "low_latency_dispatch:" if low_latency else "dispatch:")
            print(f"  {count} tokens in {took:.2f} s, {count / took:.0f} tokens/s with prefill")
            print(
                f"  one step, from launch to tokens: p50 {p50 * 1e6:.0f} us, p99 {p99 * 1e6:.0f} us"
            )
    differ = sum(a != b for a, b in zip(*answers, strict=True))
    print(f"{differ} of {config.requests} answers differ")
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
