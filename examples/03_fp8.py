"""A mixture-of-experts layer whose rows cross as fp8, beside the same layer in bf16, in a minute.

    python examples/03_fp8.py

Half of bf16's bytes are sent forward and kept for the backward pass; gradients cross as bf16. What
to copy is `fp8_up`: one `jax.custom_vjp` around quantisation, dispatch and the experts' first
matmul, so that fp8 itself is never differentiated: JAX would round the cotangent to fp8 as well.

The program prints how far outputs and gradients of the two layers are apart, and trains both to
imitate a function. It fails when they differ by more than rounding explains. Without GPUs it runs
on eight virtual CPU devices.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import AXES, flag, make_mesh, parse_flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jax_ep
from jax_ep.testing import virtual_devices


@dataclass(frozen=True)
class Config:
    """Configuration of a run; every field is a command line flag."""

    tokens: int = flag(64, "tokens of each device")
    hidden: int = flag(256, "width of a token, a multiple of 128: fp8 has a scale per 128")
    experts: int = flag(8, "experts, a multiple of --expert-parallel")
    topk: int = flag(2, "experts of each token")
    balance: float = flag(2.0, "room to receive, in multiples of a balanced routing", float)
    scales: str = flag("f32", "of fp8 rows", str, choices=["f32", "e8m0"])
    steps: int = flag(50, "training steps; 0: compare only")
    learning_rate: float = flag(2e-3, "of Adam", float)
    seed: int = flag(0, "of parameters and tokens")
    backend: str = flag("auto", "carries the rows", str, choices=["auto", "cpu", "cuda", "xla"])
    devices: int | None = flag(None, "use the first of jax.devices(); None: at most 8")
    expert_parallel: int | None = flag(None, "size of axis 'expert'; None: 4, or what fits")


SPECS = {"router": P(), "w_in": P("expert"), "w_out": P("expert")}

# --- The layer: everything here runs inside jax.shard_map, on one device's share


def bf16_up(send, x, choice, w_in):
    """Sends tokens to their experts, and through the first matmul.

    Args:
      send: jax_ep.dispatch with all that is static.
      x: [num_tokens, hidden].
      choice: what top_k has given: weights and experts, [num_tokens, num_topk].
      w_in: [num_local_experts, hidden, inner] of x's dtype.

    Returns:
      [recv_capacity, inner], the weights [recv_capacity] of these rows, and the way back.
    """
    weights, topk_idx = choice
    sent = send(x, topk_idx, weights)
    return jax.lax.ragged_dot(sent.x, w_in, sent.group_sizes), sent.weights, sent.handle


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fp8_up(send, scales, x, choice, w_in):
    """As bf16_up, but fp8 crosses. In the gradient the rounding counts as the identity."""
    return fp8_up_fwd(send, scales, x, choice, w_in)[0]


def fp8_up_fwd(send, scales, x, choice, w_in):
    weights, topk_idx = choice
    sent = send(jax_ep.quantize_fp8(x, scales=scales), topk_idx, weights)
    # ragged_dot takes fp8, but no scales that differ along the dimension it sums over. A grouped
    # matmul that takes them replaces these two lines.
    rows = jax_ep.dequantize_fp8(sent.x, sent.scales, x.dtype)
    hidden = jax.lax.ragged_dot(rows, w_in, sent.group_sizes)
    # Kept for the backward pass are the fp8 rows and their scales, not `rows`.
    return (hidden, sent.weights, sent.handle), (sent.x, sent.scales, sent.handle, w_in)


def fp8_up_bwd(send, scales, residuals, cotangents):
    *fp8_rows, handle, w_in = residuals
    hidden_bar, weights_bar, _ = cotangents
    rows = jax_ep.dequantize_fp8(*fp8_rows, hidden_bar.dtype)
    matmul = partial(jax.lax.ragged_dot, group_sizes=handle.group_sizes)
    _, matmul_vjp = jax.vjp(matmul, rows, w_in)  # its forward half is unused, and XLA drops it
    rows_bar, w_in_bar = matmul_vjp(hidden_bar)
    # Back along the routing: what dispatch has copied to several experts, combine adds up.
    x_bar = jax_ep.combine(rows_bar, handle)
    choice_bar = (jax_ep.combine_weights(weights_bar, handle), None)
    return x_bar, choice_bar, w_in_bar


fp8_up.defvjp(fp8_up_fwd, fp8_up_bwd)


def moe(
    params: dict, x: jax.Array, config: Config, group: jax_ep.Group, scales: str | None
) -> tuple[jax.Array, jax.Array]:
    """The layer, and how many rows had no room. `scales`: of fp8 rows; None: bf16 rows."""
    # The router sees tokens before they are rounded: both layers choose the same experts.
    probabilities = jax.nn.softmax(x.astype(jnp.float32) @ params["router"])
    weights, topk_idx = jax.lax.top_k(probabilities, config.topk)

    sizes = {"num_experts": config.experts, "layout": "expert"}
    capacity = jax_ep.recv_capacity(
        num_tokens=x.shape[0],
        num_topk=config.topk,
        num_ranks=group.num_ranks,
        balance=config.balance,
        **sizes,
    )
    send = partial(jax_ep.dispatch, group=group, recv_capacity=capacity, **sizes)

    # Typed as varying along "data" while they are f32, so that the gradients of its slices are also
    # added in f32. A backward pass written without jax.vjp, for a kernel, needs this cast to pass.
    cast = partial(jax.lax.pcast, axis_name="data", to="varying")
    w_in, w_out = (cast(params[name]).astype(x.dtype) for name in ("w_in", "w_out"))
    up = partial(bf16_up, send) if scales is None else partial(fp8_up, send, scales)
    hidden, row_weights, handle = up(x, (weights, topk_idx), w_in)
    rows = jax.lax.ragged_dot(jax.nn.gelu(hidden), w_out, handle.group_sizes)
    y = jax_ep.combine(rows, handle, weights=row_weights)
    return y, jax.lax.psum(handle.num_dropped[0], AXES)


# --- Global arrays under jax.jit


def make_layer(config: Config, group: jax_ep.Group, scales: str | None) -> Callable:
    """(params, x) -> (y, dropped rows), on global arrays."""
    return jax.shard_map(
        lambda params, x: moe(params, x, config, group, scales),
        mesh=group.mesh,
        in_specs=(SPECS, P(AXES)),
        out_specs=(P(AXES), P()),
    )


def init_params(config: Config, mesh: Mesh) -> dict:
    keys = jax.random.split(jax.random.key(config.seed), 3)
    d, inner = config.hidden, 2 * config.hidden
    shapes = {
        "router": (d, config.experts),
        "w_in": (config.experts, d, inner),
        "w_out": (config.experts, inner, d),
    }
    params = {}
    for key, (name, shape) in zip(keys, shapes.items(), strict=True):
        values = shape[-2] ** -0.5 * jax.random.normal(key, shape, jnp.float32)
        params[name] = jax.device_put(values, NamedSharding(mesh, SPECS[name]))
    return params


def make_tokens(config: Config, mesh: Mesh, seed: int) -> jax.Array:
    random = np.random.default_rng([config.seed, seed])
    values = random.standard_normal((config.tokens * mesh.size, config.hidden), np.float32)
    return jax.device_put(values.astype(jnp.bfloat16), NamedSharding(mesh, P(AXES)))


# --- One pass, forward and backward, in bf16 and in fp8

# e4m3 keeps 3 bits behind the leading one: an element is off by at most 2^-4 of itself. The error
# is uniform over steps of 2^-3 of the power of two below the element, and the element is 1.5 times
# that power or so: rms, 2^-3 / sqrt(12) / 1.5 = 2.4 %. A matrix keeps the ratio when the error does
# not depend on it; gelu nearly does (1.04), its derivative lowers it (0.8). In w_in's gradient two
# such errors meet and add in squares; bf16 adds 0.3 %. Hence two to four per cent: above 2^-4 there
# is a mistake, and below 1 % nothing has been rounded.
ERROR_BOUNDS = (0.01, 2.0**-4)


def compare(config: Config, group: jax_ep.Group) -> bool:
    """Prints the relative errors of outputs and gradients; are they what rounding explains?"""
    params = init_params(config, group.mesh)
    x, y_bar = (make_tokens(config, group.mesh, seed) for seed in (0, 1))

    def outputs_and_gradients(scales: str | None) -> dict:
        layer = make_layer(config, group, scales)

        @jax.jit
        def run(params: dict, x: jax.Array, y_bar: jax.Array) -> dict:
            y, vjp, dropped = jax.vjp(layer, params, x, has_aux=True)
            params_bar, x_bar = vjp(y_bar)
            return {"dropped": dropped, "outputs": y, "x": x_bar, **params_bar}

        return jax.device_get(run(params, x, y_bar))

    exact, rounded = outputs_and_gradients(None), outputs_and_gradients(config.scales)
    print(f"dropped: {exact.pop('dropped')} rows in bf16, {rounded.pop('dropped')} in fp8")
    low, high = ERROR_BOUNDS
    print(f"relative rms error of fp8, {config.scales} scales; {low:.1%} to {high:.2%} is right")
    good = True
    for name in ("outputs", "x", "router", "w_in", "w_out"):
        expected = exact[name].astype(np.float32)
        error = np.linalg.norm(rounded[name] - expected) / np.linalg.norm(expected)
        fits = bool(low <= error <= high)
        good &= fits
        label = name if name == "outputs" else f"gradient of {name}"
        print(f"  {label:18} {error:7.2%}{'' if fits else '  WRONG'}")
    return good


def print_bytes(config: Config) -> None:
    """Bytes of a token's rows: on their way to the experts, and kept for the backward pass."""
    x = jax.ShapeDtypeStruct((config.topk, config.hidden), jnp.bfloat16)
    pair = jax.eval_shape(partial(jax_ep.quantize_fp8, scales=config.scales), x)
    bf16, rows, scales = (a.size * a.dtype.itemsize for a in (x, *pair))
    print(f"bytes of a token's {config.topk} rows, sent forward and kept for the backward pass")
    print(f"  bf16 {bf16:6,}")
    print(f"  fp8  {rows + scales:6,} = {rows:,} + {scales:,} of scales, ", end="")
    print(f"{(rows + scales) / bf16:.1%} of bf16")


# --- Training


def train(config: Config, group: jax_ep.Group, scales: str | None) -> list[float]:
    """Imitates a fixed function, on new tokens in every step; the loss relative to its variance."""
    layer = make_layer(config, group, scales)
    optimizer = optax.adam(config.learning_rate)
    teacher = np.random.default_rng(config.seed).standard_normal((config.hidden, config.hidden))
    teacher = jnp.asarray(teacher / math.sqrt(config.hidden), jnp.float32)

    def loss(params: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        target = jnp.tanh(x.astype(jnp.float32) @ teacher)
        y, dropped = layer(params, x)
        return jnp.mean((y - target) ** 2) / jnp.mean(target**2), dropped

    def step(state: tuple, x: jax.Array) -> tuple:
        params, optimizer_state = state
        (value, dropped), grads = jax.value_and_grad(loss, has_aux=True)(params, x)
        updates, optimizer_state = optimizer.update(grads, optimizer_state)
        return (optax.apply_updates(params, updates), optimizer_state), value, dropped

    params = init_params(config, group.mesh)
    # Moments lie as their parameters do; the step count still needs a place.
    everywhere = NamedSharding(group.mesh, P())
    optimizer_state = jax.tree.map(
        lambda a: a if a.ndim else jax.device_put(a, everywhere), optimizer.init(params)
    )
    state = (params, optimizer_state)
    # The same shardings out as in; else the second step compiles again.
    shardings = jax.tree.map(lambda a: a.sharding, state)
    run = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None, None))
    losses, all_dropped = [], 0
    name = "bf16" if scales is None else "fp8"
    for i in tqdm(range(config.steps), desc=name, unit="step", mininterval=1.0):
        state, value, dropped = run(state, make_tokens(config, group.mesh, i + 2))
        losses.append(float(value))
        all_dropped += int(dropped)
    rows = config.steps * config.tokens * group.mesh.size * config.topk
    dropped = f"{all_dropped / rows:.2%} of rows dropped"
    print(f"  {name:4} {losses[0]:.4f} -> {losses[-1]:.4f}, {dropped}")
    return losses


def train_both(config: Config, group: jax_ep.Group) -> bool:
    """Do both learn, and equally well?"""
    print(f"loss, {config.steps} steps of training")
    bf16, fp8 = train(config, group, None), train(config, group, config.scales)
    apart = abs(fp8[-1] - bf16[-1])
    print(f"  apart {apart / bf16[-1]:.2%} at the end")
    learned = config.steps == 1 or (bf16[-1] < bf16[0] and fp8[-1] < fp8[0])
    # Rounding adds its own square to the loss; the rest is room for two runs that drift apart.
    close = apart <= ERROR_BOUNDS[1] ** 2 + 0.03 * bf16[-1]
    if not (learned and close):
        print("  WRONG: the loss must go down, and be about the same in both")
    return learned and close


def main() -> int:
    config = parse_flags(Config, __doc__)
    virtual_devices(config.devices or 8)
    started = time.perf_counter()
    mesh = make_mesh(config.devices, config.expert_parallel, config.experts)
    with jax_ep.Group.open(mesh, "expert", backend=config.backend) as group:
        print(f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {group}")
        good = compare(config, group)
        print_bytes(config)
        good &= config.steps == 0 or train_both(config, group)
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
