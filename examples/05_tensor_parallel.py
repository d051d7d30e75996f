"""Trains a small tensor-parallel language model for two minutes, then generates text with it.

    python examples/05_tensor_parallel.py

A byte-level transformer learns the Python standard library's own sources. Its heads and the width
of its MLPs are sharded over all devices; between two layers stands
`jax_ep.all_reduce_residual_rmsnorm`: the sum over the ranks, the residual and the norm in one call,
differentiated in training, and called once for each token and half layer in decoding, with a cache
of keys and values. Without GPUs it runs on four virtual CPU devices. It ends with the text that it
generated, and with how far its logits are from those of `lax.psum` and a norm for the same text.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import largest_difference, read_text
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import trange

import jax_ep
from jax_ep.testing import virtual_devices

D_MODEL, HEADS, D_FF, LAYERS, CONTEXT = 128, 8, 512, 2, 192
BATCH, SEQ, LEARNING_RATE = 16, 64, 1e-2
PROMPT = b"\n\nimport "
EPS = 1e-6
TEMPERATURE = 0.7
TOLERANCE = 1e-3  # between logits, which are of the order of 10

Params = dict[str, Any]
# (this rank's term, residual, scale) to (normed, new residual).
AddNorm = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

# Axis of each parameter that is sharded over the ranks; the others are equal everywhere.
SHARDED = {"qkv": 2, "out": 1, "up": 2, "down": 1}


def init(key: jax.Array) -> Params:
    """Parameters; layers are stacked along the leading axis."""
    keys = iter(jax.random.split(key, 6))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[-2] ** -0.5

    return {
        "embed": jax.random.normal(next(keys), (256, D_MODEL)) * 0.3,
        "place": jax.random.normal(next(keys), (CONTEXT, D_MODEL)) * 0.1,
        "qkv": normal(LAYERS, D_MODEL, 3 * D_MODEL),
        "out": normal(LAYERS, D_MODEL, D_MODEL),
        "up": normal(LAYERS, D_MODEL, D_FF),
        "down": normal(LAYERS, D_FF, D_MODEL),
        "scales": jnp.ones((2 * LAYERS + 1, D_MODEL)),
    }


def spec_of(name: str) -> P:
    return P(*[None] * SHARDED[name], "tp") if name in SHARDED else P()


def rms_norm(h: jax.Array, scale: jax.Array) -> jax.Array:
    return h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + EPS) * scale


def psum_and_norm(term: jax.Array, residual: jax.Array, scale: jax.Array) -> Any:
    """The operations that the fused call replaces."""
    h = jax.lax.psum(term, "tp") + residual
    return rms_norm(h, scale), h


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, T, own heads, size] queries over [B, S, ...] keys and values; mask [T, S]."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def run_layers(
    params: Params, h: jax.Array, add_norm: AddNorm, mix: Callable[[int, Any, Any, Any], jax.Array]
) -> jax.Array:
    """Logits of h [B, T, D_MODEL]; `mix` is the attention of a layer's own heads."""
    scales = params["scales"]
    x = rms_norm(h, scales[0])
    for layer in range(LAYERS):
        qkv = x @ params["qkv"][layer]
        own_heads = qkv.reshape(*qkv.shape[:2], -1, 3, D_MODEL // HEADS)
        mixed = mix(layer, *jnp.moveaxis(own_heads, 3, 0))
        mixed = mixed.reshape(*qkv.shape[:2], -1)
        x, h = add_norm(mixed @ params["out"][layer], h, scales[2 * layer + 1])
        hidden = jax.nn.gelu(x @ params["up"][layer])
        x, h = add_norm(hidden @ params["down"][layer], h, scales[2 * layer + 2])
    return x @ params["embed"].T


def loss(params: Params, text: jax.Array, add_norm: AddNorm) -> jax.Array:
    """Nats per byte of text [B, SEQ + 1]."""
    tokens, targets = text[:, :-1], text[:, 1:]
    causal = jnp.tri(tokens.shape[1], dtype=jnp.bool_)
    h = params["embed"][tokens] + params["place"][: tokens.shape[1]]
    logits = run_layers(params, h, add_norm, lambda _, q, k, v: attend(q, k, v, causal))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def decode(params: Params, forced: jax.Array, add_norm: AddNorm, length: int) -> Any:
    """One token at a time, after `forced` [n]; (tokens [length], logits [length, 256]).

    Every rank draws the same tokens, since all have the same logits, to the bit.
    """
    own_heads = params["qkv"].shape[-1] // (3 * D_MODEL // HEADS)
    cache = jnp.zeros((2, LAYERS, 1, length, own_heads, D_MODEL // HEADS))
    cache = jax.lax.pcast(cache, "tp", to="varying")

    def step(carry: Any, at: jax.Array) -> Any:
        token, cache = carry
        token = jnp.where(at < forced.size, forced[jnp.minimum(at, forced.size - 1)], token)
        mask = (jnp.arange(length) <= at)[None]

        def mix(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            nonlocal cache
            place = (0, layer, 0, at, 0, 0)
            cache = jax.lax.dynamic_update_slice(cache, jnp.stack([k, v])[:, None], place)
            return attend(q, cache[0, layer], cache[1, layer], mask)

        h = (params["embed"][token] + params["place"][at])[None, None]
        logits = run_layers(params, h, add_norm, mix)[0, 0]
        key = jax.random.fold_in(jax.random.key(0), at)
        drawn = jax.random.categorical(key, logits / TEMPERATURE).astype(jnp.int32)
        return (drawn, cache), (token, logits)

    _, (tokens, logits) = jax.lax.scan(step, (jnp.int32(0), cache), jnp.arange(length))
    return tokens, logits


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--tokens", type=int, default=160, help="bytes to generate")
    parser.add_argument("--devices", type=int, help="use the first of jax.devices(); None: all")
    return parser.parse_args()


def main() -> None:
    flags = parse_flags()
    virtual_devices(flags.devices or 4)
    devices = jax.devices()[: flags.devices]
    devices = devices[: max(n for n in range(1, len(devices) + 1) if HEADS % n == 0)]
    mesh = Mesh(np.array(devices), ("tp",))
    text, held_out = read_text()
    rng = np.random.default_rng(0)

    def windows(source: np.ndarray) -> np.ndarray:
        starts = rng.integers(0, len(source) - SEQ - 1, BATCH)
        return np.stack([source[s : s + SEQ + 1] for s in starts]).astype(np.int32)

    with jax_ep.Group.open(mesh, "tp") as group:
        print(f"{len(devices)} x {devices[0].device_kind}, back end {group.info().backend}")
        fused = partial(jax_ep.all_reduce_residual_rmsnorm, eps=EPS, group=group)
        params = init(jax.random.key(0))
        specs = {name: spec_of(name) for name in params}
        params = {n: jax.device_put(p, NamedSharding(mesh, specs[n])) for n, p in params.items()}

        def shard(fn: Any) -> Any:
            return jax.shard_map(fn, mesh=mesh, in_specs=(specs, P()), out_specs=P())

        schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, 20, max(21, flags.steps))
        optimizer = optax.adam(schedule)
        sharded_loss = shard(partial(loss, add_norm=fused))

        @jax.jit
        def train_step(params: Params, state: Any, batch: jax.Array) -> Any:
            value, grads = jax.value_and_grad(sharded_loss)(params, batch)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, value

        state = optimizer.init(params)
        for step in (bar := trange(flags.steps, desc="training", disable=None)):
            params, state, value = train_step(params, state, windows(text))
            if step % 20 == 0:
                bar.set_postfix_str(f"{float(value) / np.log(2):.2f} bits/byte")
        measure = jax.jit(sharded_loss)
        unseen = np.mean([float(measure(params, windows(held_out))) for _ in range(8)])
        print(f"held-out loss {unseen / np.log(2):.2f} bits/byte")

        length = min(CONTEXT, len(PROMPT) + flags.tokens)
        prompt = np.frombuffer(PROMPT, np.uint8).astype(np.int32)

        def compiled(add_norm: AddNorm) -> Any:
            return jax.jit(shard(partial(decode, add_norm=add_norm, length=length)))

        generate, check = compiled(fused), compiled(psum_and_norm)
        tokens, logits = generate(params, prompt)
        begin = time.perf_counter()
        tokens, logits = jax.block_until_ready(generate(params, prompt))
        took = time.perf_counter() - begin
        group.check(tokens)
        print("--- generated")
        print(bytes(np.asarray(tokens).astype(np.uint8)).decode(errors="replace"))
        print(f"--- {length} tokens, {took / length * 1e6:.0f} us each")
        _, expected = check(params, np.asarray(tokens))
        difference = largest_difference([logits], [expected])
        print(f"largest difference from psum's logits {difference:.1e}")
        if not difference < TOLERANCE:
            raise SystemExit(f"logits differ by {difference}, at most {TOLERANCE}")


if __name__ == "__main__":
    main()
