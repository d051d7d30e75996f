"""Trains a small mixture-of-experts language model, data and expert parallel, in two minutes.

    python examples/02_train.py

A byte-level transformer learns the Python standard library's own sources. The mesh has the axes
"data" and "expert": the batch is sharded over both, the experts over "expert", all else is
replicated. Each MoE layer is `jax_ep.dispatch`, `jax.lax.ragged_dot` twice, `jax_ep.combine`, all
of it differentiated, scanned over layers and rematerialised. Without GPUs it runs on eight virtual
CPU devices. It ends with the loss on files it has not seen, beside what counting bytes (unigram)
and pairs of bytes (bigram) can reach on the same files; it must be below both.

`--compare xla` trains the same steps through `backend="xla"` as well and prints the differences.
"""

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from common import AXES, flag, largest_difference, make_mesh, parse_flags, read_text
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jax_ep
from jax_ep.testing import virtual_devices

DEFAULT_STEPS = 800
COMPARE_STEPS = 20
VOCABULARY = 256
HELD_OUT_WINDOWS = 1024
BALANCE_LOSS = 0.01
PROMPT = b"\n\ndef "
SAMPLED_BYTES = 200
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Config:
    """Configuration of the training; every field is a command line flag."""

    d_model: int = flag(64, "width of the residual stream, a multiple of --heads and of 4")
    layers: int = flag(2, "number of layers, each attention and MoE")
    heads: int = flag(4, "attention heads")
    experts: int = flag(8, "experts of each layer, a multiple of --expert-parallel")
    topk: int = flag(2, "experts of each token")
    balance: float = flag(1.25, "room to receive, in multiples of a balanced routing", float)
    seq: int = flag(64, "bytes of one sequence")
    batch: int = flag(32, "sequences of one step over all devices, a multiple of --devices")
    steps: int | None = flag(None, f"steps; None: {DEFAULT_STEPS}, comparing: {COMPARE_STEPS}")
    learning_rate: float = flag(1e-2, "peak of the warmup-cosine schedule", float)
    seed: int = flag(0, "of parameters, batches and samples")
    backend: str = flag("auto", "carries the rows", str, choices=["auto", "cpu", "cuda", "xla"])
    compare: str | None = flag(None, "train with this back end too", str, choices=["xla"])
    devices: int | None = flag(None, "use the first of jax.devices(); None: at most 8")
    expert_parallel: int | None = flag(None, "size of axis 'expert'; None: 4, or what fits")
    out: str = flag("out", "folder of the loss plot", str)

    @property
    def num_steps(self) -> int:
        """As told, or the default of what is run."""
        if self.steps is not None:
            return self.steps
        return COMPARE_STEPS if self.compare else DEFAULT_STEPS


# --- Text


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return text[starts[:, None] + np.arange(length)].astype(np.int32)


def held_out_windows(text: np.ndarray, config: Config) -> np.ndarray:
    """Evenly spaced windows of `seq` inputs and their next bytes, in whole batches."""
    count = math.ceil(HELD_OUT_WINDOWS / config.batch) * config.batch
    starts = np.linspace(0, len(text) - config.seq - 1, count).astype(np.int64)
    return windows(text, starts, config.seq + 1)


def entropies(held_out: np.ndarray) -> tuple[float, float]:
    """Unigram H(next) and bigram H(next | previous), in bits, of the bytes that are predicted.

    Counted on the held-out bytes themselves: a lower bound for models of that kind.
    """
    pairs = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(pairs, (held_out[:, :-1], held_out[:, 1:]), 1)

    def entropy(counts: np.ndarray) -> float:
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log2(p)).sum())

    return entropy(pairs.sum(0)), entropy(pairs) - entropy(pairs.sum(1))


# --- Model: everything here runs inside jax.shard_map, on one device's share


def init_params(config: Config) -> dict:
    d, hidden, n = config.d_model, 2 * config.d_model, config.layers
    keys = iter(jax.random.split(jax.random.key(config.seed), 8))

    def normal(*shape: int, scale: float) -> jax.Array:
        return scale * jax.random.normal(next(keys), shape, jnp.float32)

    out_scale = d**-0.5 / math.sqrt(2 * n)
    return {
        "embedding": normal(VOCABULARY, d, scale=0.5),
        "position": 0.5 * sinusoids(config.seq, d),
        "head": normal(d, VOCABULARY, scale=0.1 * d**-0.5),
        "norm": jnp.ones(d),
        "layers": {
            "attention_norm": jnp.ones((n, d)),
            "qkv": normal(n, d, 3 * d, scale=d**-0.5),
            "project": normal(n, d, d, scale=out_scale),
            "moe_norm": jnp.ones((n, d)),
            "router": normal(n, d, config.experts, scale=d**-0.5),
            "up": normal(n, config.experts, d, hidden, scale=d**-0.5),
            "down": normal(n, config.experts, hidden, d, scale=out_scale),
        },
    }


def sinusoids(length: int, d_model: int) -> jax.Array:
    """Where learned positions start: a fixed offset is a rotation, which attention finds soon."""
    rates = 10_000.0 ** (-jnp.arange(d_model // 2) / (d_model // 2))
    angles = jnp.arange(length)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


def param_specs(params: dict) -> dict:
    """Experts are sharded over "expert"; everything else is replicated."""
    specs = jax.tree.map(lambda _: P(), params)
    specs["layers"] |= {"up": P(None, "expert"), "down": P(None, "expert")}
    return specs


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def attention(x: jax.Array, layer: dict, config: Config) -> jax.Array:
    batch, seq, d = x.shape
    qkv = (x @ layer["qkv"]).reshape(batch, seq, 3, config.heads, d // config.heads)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ layer["project"]


def moe(x: jax.Array, layer: dict, config: Config, group: jax_ep.Group) -> tuple[jax.Array, dict]:
    """Sends [num_tokens, d_model] to its experts, on whatever device, and adds their answers."""
    probabilities = jax.nn.softmax(x.astype(jnp.float32) @ layer["router"])
    weights, topk_idx = jax.lax.top_k(probabilities, config.topk)
    weights /= weights.sum(axis=-1, keepdims=True)
    sizes = {"num_experts": config.experts, "layout": "expert"}
    capacity = jax_ep.recv_capacity(
        num_tokens=x.shape[0],
        num_topk=config.topk,
        num_ranks=group.num_ranks,
        balance=config.balance,
        **sizes,
    )
    sent = jax_ep.dispatch(x, topk_idx, weights, group=group, recv_capacity=capacity, **sizes)
    hidden = jax.nn.gelu(jax.lax.ragged_dot(sent.x, layer["up"], sent.group_sizes))
    rows = jax.lax.ragged_dot(hidden, layer["down"], sent.group_sizes)
    y = jax_ep.combine(rows, sent.handle, weights=sent.weights)

    # Over the whole mesh before the product: it is the global load that should be even.
    chosen = jax.nn.one_hot(topk_idx, config.experts).mean(axis=(0, 1))
    chosen, mean_probability = jax.lax.pmean((chosen, probabilities.mean(axis=0)), AXES)
    balance_loss = config.experts * jnp.sum(chosen * mean_probability)
    return y, {"balance": balance_loss, "dropped": jax.lax.psum(sent.num_dropped[0], AXES)}


def forward(
    params: dict, tokens: jax.Array, config: Config, group: jax_ep.Group
) -> tuple[jax.Array, dict]:
    """Logits of the next byte at every position, and what `moe` tells, per layer."""

    @jax.checkpoint
    def layer_body(x: jax.Array, layer: dict) -> tuple[jax.Array, dict]:
        x += attention(rms_norm(x, layer["attention_norm"]), layer, config)
        flat = rms_norm(x, layer["moe_norm"]).reshape(-1, config.d_model)
        y, told = moe(flat, layer, config, group)
        return x + y.reshape(x.shape), told

    x = params["embedding"][tokens] + params["position"]
    x, told = jax.lax.scan(layer_body, x, params["layers"])
    return rms_norm(x, params["norm"]) @ params["head"], told


# --- Training: global arrays under jax.jit


def check_sizes(config: Config, mesh: Mesh) -> None:
    sizes = ("heads", "batch", "topk", "seq", "layers")
    small = [name for name in sizes if getattr(config, name) < 1]
    if small or config.num_steps < 0 or config.topk > config.experts:
        sys.exit(f"--topk must be at most --experts, sizes positive: {config}")
    if config.d_model % config.heads:
        sys.exit(f"--heads {config.heads} must divide --d-model {config.d_model}")
    if config.batch % mesh.size:
        sys.exit(f"--devices {mesh.size} must divide --batch {config.batch}")


def loss(
    params: dict, batch: jax.Array, config: Config, group: jax_ep.Group
) -> tuple[jax.Array, dict]:
    """The mean over the mesh. Differentiated from outside: shard_map sums replicas' gradients."""

    def local(params: dict, batch: jax.Array) -> tuple[jax.Array, dict]:
        logits, told = forward(params, batch[:, :-1], config, group)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
        mean = jax.lax.pmean(losses.mean(), AXES)
        rows = batch[:, 1:].size * group.mesh.size * config.topk * config.layers
        metrics = {"bits": mean / math.log(2), "dropped": told["dropped"].sum() / rows}
        return mean + BALANCE_LOSS * told["balance"].mean(), metrics

    specs = (param_specs(params), P(AXES))
    return jax.shard_map(local, mesh=group.mesh, in_specs=specs, out_specs=P())(params, batch)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    warmup = min(40, config.num_steps // 5 + 1)
    peak, total = config.learning_rate, max(config.num_steps, warmup + 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total, 0.05 * peak)
    adamw = optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def init_state(config: Config, mesh: Mesh) -> tuple:
    """Parameters and the optimiser's state, on the mesh."""
    params = init_params(config)

    def place(array: jax.Array, spec: P) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, spec))

    params = jax.tree.map(place, params, param_specs(params))
    # Moments lie as their parameters do; the step counts still need a place.
    optimizer_state = make_optimizer(config).init(params)
    return params, jax.tree.map(lambda a: a if a.ndim else place(a, P()), optimizer_state)


def make_step(state: tuple, config: Config, group: jax_ep.Group):
    """The jitted training step, (state, batch) -> (state, metrics)."""
    optimizer = make_optimizer(config)
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def step(state: tuple, batch: jax.Array) -> tuple[tuple, dict]:
        params, optimizer_state = state
        (_, metrics), grads = value_and_grad(params, batch, config, group)
        # On global arrays, so that the norm that clips is over all experts of all devices.
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), metrics

    # The same shardings out as in; else the second step compiles again.
    shardings = jax.tree.map(lambda a: a.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def train(text: np.ndarray, config: Config, group: jax_ep.Group) -> tuple[dict, list[float]]:
    """The trained parameters, and the training loss of each step in bits per byte."""
    state = init_state(config, group.mesh)
    random = np.random.default_rng(config.seed)
    sharding = NamedSharding(group.mesh, P(AXES))

    def next_batch() -> jax.Array:
        starts = random.integers(0, len(text) - config.seq - 1, config.batch)
        return jax.device_put(windows(text, starts, config.seq + 1), sharding)

    started = time.perf_counter()
    step = make_step(state, config, group).lower(state, next_batch()).compile()
    print(f"compiled in {time.perf_counter() - started:.1f} s; {group}")
    losses = []
    started = time.perf_counter()
    is_quiet = jax.process_index() > 0
    progress = tqdm(range(config.num_steps), unit="step", mininterval=1.0, disable=is_quiet)
    for i in progress:
        state, metrics = step(state, next_batch())
        group.check(metrics)  # raises if a peer has gone
        losses.append(float(metrics["bits"]))
        rate = (i + 1) * config.batch * config.seq / (time.perf_counter() - started)
        progress.set_postfix_str(
            f"{losses[-1]:.3f} bits/byte, {rate:,.0f} tokens/s, "
            f"{float(metrics['dropped']):.1%} of rows dropped",
            refresh=False,
        )
    return state[0], losses


def evaluate(params: dict, held_out: np.ndarray, config: Config, group: jax_ep.Group) -> float:
    """Mean loss over the held-out windows, in bits per byte."""
    run = jax.jit(lambda params, batch: loss(params, batch, config, group)[1]["bits"])
    sharding = NamedSharding(group.mesh, P(AXES))
    batches = np.split(held_out, len(held_out) // config.batch)
    return float(np.mean([float(run(params, jax.device_put(b, sharding))) for b in batches]))


def generate(params: dict, held_out: np.ndarray, config: Config, group: jax_ep.Group) -> list[str]:
    """Continues, for each device, one window of held-out text that ends in PROMPT."""
    last_logits = jax.shard_map(
        lambda params, tokens: forward(params, tokens, config, group)[0][:, -1],
        mesh=group.mesh,
        in_specs=(param_specs(params), P(AXES)),
        out_specs=P(AXES),
    )

    @partial(jax.jit, out_shardings=NamedSharding(group.mesh, P()))
    def sample(params: dict, window: jax.Array, keys: jax.Array) -> jax.Array:
        def next_byte(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            byte = jax.random.categorical(key, last_logits(params, window) / TEMPERATURE)
            return jnp.concatenate([window[:, 1:], byte[:, None]], axis=1), byte

        return jax.lax.scan(next_byte, window, keys)[1].T

    # The window slides over real text, so every position is one that training has seen.
    prompt = np.frombuffer(PROMPT, np.uint8)[-config.seq :]
    window = held_out[:: len(held_out) // group.mesh.size, : config.seq][: group.mesh.size].copy()
    window[:, config.seq - len(prompt) :] = prompt
    keys = jax.random.split(jax.random.key(config.seed), SAMPLED_BYTES)
    placed = jax.device_put(window, NamedSharding(group.mesh, P(AXES)))
    sampled = np.asarray(sample(params, placed, keys))
    return [bytes(row.astype(np.uint8)).decode(errors="replace") for row in sampled]


# --- What is reported


def plot(losses: list[float], held_out: float, unigram: float, bigram: float, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.8, label="training loss")
    lines = [("held-out loss", held_out), ("bigram entropy", bigram), ("unigram entropy", unigram)]
    for i, (label, value) in enumerate(lines, start=1):
        axes.axhline(value, color=f"C{i}", linestyle="--", label=f"{label} {value:.2f}")
    axes.set(xlabel="step", ylabel="bits per byte", title="Python's standard library, by the byte")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compare(text: np.ndarray, config: Config, mesh: Mesh) -> int:
    """Trains with both back ends from the same seed and prints the largest differences."""
    results = []
    for backend in (config.backend, config.compare):
        with jax_ep.Group.open(mesh, "expert", backend=backend) as group:
            params, losses = train(text, config, group)
            whole = process_allgather(params, tiled=True)
            results.append((group.backend, losses, jax.tree.leaves(whole)))
    (name, losses, params), (other_name, other_losses, other_params) = results
    loss = largest_difference(losses, other_losses)
    param = largest_difference(params, other_params)
    print(f"{name} against {other_name}, {config.num_steps} steps, largest absolute differences:")
    print(f"losses {loss:.3g} bits per byte, parameters {param:.3g}")
    return 0


def main() -> int:
    config = parse_flags(Config, __doc__)
    virtual_devices(config.devices or 8)
    started = time.perf_counter()
    mesh = make_mesh(config.devices, config.expert_parallel, config.experts)
    check_sizes(config, mesh)
    text, held_out_text = read_text()
    print(f"{len(text):,} bytes to train on, {mesh.size} x {mesh.devices.flat[0].device_kind}")
    if config.compare:
        return compare(text, config, mesh)
    held_out = held_out_windows(held_out_text, config)
    unigram, bigram = entropies(held_out)
    with jax_ep.Group.open(mesh, "expert", backend=config.backend) as group:
        params, losses = train(text, config, group)
        held_out_loss = evaluate(params, held_out, config, group)
        samples = generate(params, held_out, config, group)
    if jax.process_index() > 0:
        return 0
    path = Path(config.out) / "train.png"
    plot(losses, held_out_loss, unigram, bigram, path)
    for sample in samples[:2]:
        print(f"--- sampled\n{PROMPT.decode().strip()} {sample}")
    print(f"--- {held_out[:, 1:].size:,} held-out bytes, bits per byte")
    print(f"unigram entropy  {unigram:.3f}")
    print(f"bigram entropy   {bigram:.3f}")
    print(f"held-out loss    {held_out_loss:.3f}")
    print(f"{time.perf_counter() - started:.0f} s in all; the plot is {path}")
    if held_out_loss < bigram:
        return 0
    print("The held-out loss is not below the bigram entropy.", file=sys.stderr)
    return 1 if config.num_steps >= DEFAULT_STEPS else 0


if __name__ == "__main__":
    sys.exit(main())
