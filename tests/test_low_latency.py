"""low_latency_dispatch and low_latency_combine; the conformance suite compares their values."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import HIDDEN, NUM_EXPERTS, NUM_RANKS, TOKENS, TOPK, inputs, send

import jax_ep
from jax_ep import reference
from jax_ep._src.base import config, limits
from jax_ep.testing.ranks import make_mesh, on_ranks


@pytest.fixture(scope="module")
def group():
    with jax_ep.Group.open(make_mesh(NUM_RANKS), "ep", name="few") as opened:
        yield opened


def _round_trip(group, x, ids, weights, **options):
    out = send(group, x, ids, weights, **options)
    at_rows = None if options.get("layout") == "rank" else out.weights
    return jax_ep.low_latency_combine(out.x, out.handle, weights=at_rows)


@pytest.mark.parametrize("backend", ["cpu", "xla"])
@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
def test_layouts_bring_the_same_rows_back(group, layout, backend):
    """Handles of low-latency dispatches serve the plain combine, and those of plain dispatches."""

    def run(x, ids, weights):
        out = send(group, x, ids, weights, layout=layout, backend=backend)
        wide = partial(jax.tree.map, lambda a: a.reshape(-1, *a.shape[out.x.ndim - 1 :]))
        rows = wide(out.x)
        at_rows = None if layout == "rank" else out.weights.reshape(-1)
        plain = jax_ep.combine(rows, out.handle, weights=at_rows, backend=backend)
        if layout == "batched":
            as_they_are = jax_ep.combine(out.x, out.handle, weights=out.weights, backend=backend)
            plain = jnp.where(plain == as_they_are, plain, jnp.nan)
        few = jax_ep.low_latency_combine(
            out.x,
            out.handle,
            weights=None if layout == "rank" else out.weights,
            backend=backend,
        )
        return plain, few

    plain, few = on_ranks(run, group.mesh)(*inputs())
    np.testing.assert_array_equal(plain, few)
    x, _, weights = inputs()
    if layout != "rank":
        expected = x * weights.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(few, expected, rtol=1e-5, atol=1e-6)


def test_shapes_depend_on_the_most_tokens_alone(group):
    x, ids, _ = inputs(tokens=3)
    shapes = {}
    for layout in ("expert", "rank", "batched"):
        fn = on_ranks(lambda x, i, how=layout: send(group, x, i, layout=how), group.mesh)
        shapes[layout] = jax.eval_shape(fn, x, ids).x.shape[1:]
    assert shapes == {
        "expert": (TOKENS * NUM_RANKS * TOPK, HIDDEN),
        "rank": (TOKENS * NUM_RANKS, HIDDEN),
        "batched": (NUM_EXPERTS // NUM_RANKS, TOKENS * NUM_RANKS, HIDDEN),
    }


@pytest.mark.parametrize(
    ("quantize", "dtype"), [("fp8", "float32"), ("fp8_pow2", "float32"), ("fp8_e8m0", "uint8")]
)
def test_rounded_rows_are_near_the_rows(group, quantize, dtype):
    def run(x, ids):
        out = send(group, x, ids, quantize=quantize)
        assert out.scales.dtype == dtype
        rows = jax_ep.dequantize_fp8(out.x, out.scales, jnp.float32)
        return jax_ep.low_latency_combine(rows, out.handle)

    x, ids, _ = inputs()
    y = np.asarray(on_ranks(run, group.mesh)(x, ids))
    largest = np.abs(x).max(axis=-1, keepdims=True)
    assert np.all(np.abs(y / TOPK - x) <= largest * 2**-3)
    assert not np.array_equal(y / TOPK, x)


def test_a_batch_gives_the_bits_of_a_loop(group):
    x, ids, weights = (np.stack(a, axis=1) for a in zip(inputs(0), inputs(1), strict=True))
    step = partial(_round_trip, group)
    batched = on_ranks(jax.vmap(step), group.mesh)(x, ids, weights)
    for i in range(2):
        alone = on_ranks(step, group.mesh)(x[:, i], ids[:, i], weights[:, i])
        np.testing.assert_array_equal(batched[:, i], alone)


@pytest.mark.parametrize("of", ["x", "topk_weights", "rows", "weights"])
def test_gradients_are_refused_by_name(group, of):
    x, ids, weights = inputs()

    def loss(moved):
        given = {"x": x[0], "topk_weights": weights[0], of: moved}
        out = send(group, given["x"], ids[0], given["topk_weights"])
        if of in ("x", "topk_weights"):
            return jnp.sum(out.x) + jnp.sum(out.weights)
        rows, at_rows = jnp.ones_like(out.x), jnp.ones_like(out.weights)
        rows, at_rows = (rows * moved, at_rows) if of == "rows" else (rows, at_rows * moved)
        return jnp.sum(jax_ep.low_latency_combine(rows, out.handle, weights=at_rows))

    start = {"x": x, "topk_weights": weights}.get(of, np.ones((NUM_RANKS,), np.float32))
    name = "low_latency_dispatch" if of in ("x", "topk_weights") else "low_latency_combine"
    with pytest.raises(jax_ep.ConfigError, match=f"{name} cannot be differentiated"):
        on_ranks(jax.grad(loss), group.mesh)(start)


WRONG = {
    "tokens": ({"max_tokens_per_rank": 4}, "x must have at most max_tokens_per_rank=4 tokens, got 5"),
    "most": ({"max_tokens_per_rank": 0}, "max_tokens_per_rank must be at least 1, got 0"),
    "layout": ({"layout": "flat"}, "layout must be one of 'expert', 'rank', 'batched', got 'flat'"),
    "quantize": ({"quantize": "int8"}, "quantize must be one of 'none', 'fp8', 'fp8_pow2', 'fp8_e8m0', got 'int8'"),
    "capacity": ({"layout": "batched", "recv_capacity": 20}, "recv_capacity must be left out with layout='batched', got 20"),
    "experts": ({"num_experts": 3}, "num_experts must be a multiple of num_ranks=2, got 3"),
    "num_sms": ({"num_sms": 0}, "num_sms must be at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_options_are_refused(group, name):
    options, message = WRONG[name]
    x, ids, _ = inputs()
    with pytest.raises(jax_ep.ConfigError, match=re.escape(f"low_latency_dispatch: {message}")):
        on_ranks(lambda x, i: send(group, x, i, **options).x, group.mesh)(x, ids)


def test_bad_rows_are_refused(group):
    x, ids, _ = inputs()

    def refused(error, message, make):
        with pytest.raises(error, match=re.escape(message)):
            on_ranks(lambda x, i: send(group, *make(x, i)).x, group.mesh)(x, ids)

    refused(jax_ep.DTypeError, "x must be bfloat16", lambda x, i: (x.astype(jnp.int8), i))
    refused(jax_ep.ShapeError, "topk_idx must have shape (5, 2)", lambda x, i: (x, i[:3]))
    pair = "x[0] must be float8_e4m3fn, float8_e5m2 or uint8, got float32"
    refused(jax_ep.DTypeError, f"low_latency_dispatch: {pair}", lambda x, i: ((x, x[:, :1]), i))
    refused(jax_ep.ConfigError, "got 3 arrays", lambda x, i: ((x, x, x), i))
    with pytest.raises(jax_ep.ShapeError, match="hidden a multiple of 128 for quantize='fp8'"):
        on_ranks(lambda x, i: send(group, x[:, :96], i, quantize="fp8").x, group.mesh)(x, ids)

    def combine_wrong(x, ids):
        out = send(group, x, ids)
        return jax_ep.low_latency_combine(out.x[:4], out.handle)

    with pytest.raises(jax_ep.ShapeError, match="low_latency_combine: rows must be"):
        on_ranks(combine_wrong, group.mesh)(x, ids)


def test_bad_wires_are_refused(group):
    x, ids, _ = inputs()

    def combine(wire):
        return on_ranks(
            lambda x, i: jax_ep.low_latency_combine(  # type: ignore[call-overload]
                (out := send(group, x, i)).x, out.handle, wire=wire
            ),
            group.mesh,
        )

    for wrong in ("fp8_pow2", "none", False):
        with pytest.raises(jax_ep.ConfigError, match=f"wire must be None or 'fp8', got {wrong!r}"):
            combine(wrong)(x, ids)
    message = "low_latency_combine: rows must be .* a multiple of 128 with wire='fp8', got shape"
    with pytest.raises(jax_ep.ShapeError, match=message):
        combine("fp8")(x[..., :96], ids)


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_sums_that_cross_in_fp8_keep_to_the_bound(group, backend):
    """Rows of all magnitudes; token 0 has NaN, which must not reach other tokens."""
    x, ids, weights = inputs()
    x *= np.float32(10) ** np.random.default_rng(1).uniform(-6, 3, x.shape).astype(np.float32)
    x[:, 0, 3] = np.nan

    def run(x, ids, weights):
        out = send(group, x, ids, weights, backend=backend)
        combine = partial(jax_ep.low_latency_combine, out.x, out.handle, backend=backend)
        return combine(wire="fp8"), combine()

    got, exact = on_ranks(run, group.mesh)(x, ids, weights)
    ranks = ids // (NUM_EXPERTS // NUM_RANKS)
    others = (ranks != np.arange(NUM_RANKS)[:, None, None]).sum(axis=-1)[..., None]
    crossed = np.abs(x * others)  # rows are added as they are
    most = crossed.max(axis=-1, keepdims=True)
    bound = crossed / 16 + most / 400_000 + np.abs(exact) * 2.0**-20
    assert np.isnan(got[:, 0]).any(axis=-1).all()
    assert (np.abs(got - exact) <= bound)[:, 1:].all()
    assert np.isfinite(got[:, 1:]).all()
    assert (got != exact)[:, 1:].any()


def test_what_is_no_array_is_refused(group):
    x, ids, _ = inputs()
    with pytest.raises(jax_ep.DTypeError, match="low_latency_combine: rows must be an array"):
        on_ranks(
            lambda x, i: jax_ep.low_latency_combine(  # type: ignore[call-overload]
                [[1.0]], send(group, x, i).handle
            ),
            group.mesh,
        )(x, ids)
    with pytest.raises(jax_ep.DTypeError, match="low_latency_combine: weights must be an array"):
        on_ranks(
            lambda x, i: jax_ep.low_latency_combine(  # type: ignore[call-overload]
                (out := send(group, x, i)).x, out.handle, weights=[0.5]
            ),
            group.mesh,
        )(x, ids)
    for wrong in ("", False, 0):
        with pytest.raises(jax_ep.ConfigError, match="quantize must be one of"):
            on_ranks(lambda x, i, w=wrong: send(group, x, i, quantize=w).x, group.mesh)(x, ids)


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_batches_of_experts_keep_whole_tokens_that_fit(group, backend):
    """All tokens name one expert twice, so its rows are more than its places."""
    x, ids, _ = inputs()
    ids = np.full_like(ids, 1)
    plan = reference.make_plan(
        ids,
        num_experts=NUM_EXPERTS,
        layout="expert",
        recv_capacity=NUM_EXPERTS // NUM_RANKS * NUM_RANKS * TOKENS,
        expert_stride=NUM_RANKS * TOKENS,
    )
    assert plan.num_dropped.tolist() == [10, 0]
    out = on_ranks(lambda x, i: send(group, x, i, layout="batched", backend=backend), group.mesh)(
        x, ids
    )
    np.testing.assert_array_equal(out.num_dropped[:, 0], plan.num_dropped)
    np.testing.assert_array_equal(out.group_sizes, plan.group_sizes)
    np.testing.assert_array_equal(out.handle.recv_src, plan.recv_src)
    np.testing.assert_array_equal(out.handle.send_row, plan.send_row)


# --- memory

SIZES = {"max_tokens_per_rank": 128, "hidden": 7168, "num_topk": 8}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 32])
def test_bytes_hold_the_exchange_and_no_more(num_ranks):
    needed = jax_ep.low_latency_bytes(**SIZES, num_ranks=num_ranks)
    payload = limits.low_latency_payload(128, 8, [7168 * 2])
    assert limits.low_latency_room(num_ranks, needed) == payload
    assert limits.low_latency_room(num_ranks, needed - 1) < payload


def test_bytes_grow_with_what_is_sent():
    base = jax_ep.low_latency_bytes(**SIZES, num_ranks=2)
    assert base <= config.DEFAULT_LOW_LATENCY_BYTES  # as the documentation says
    more = [{"hidden": 14336}, {"max_tokens_per_rank": 256}, {"num_topk": 22}, {"payload_bytes": 9}]
    for change in more:
        assert jax_ep.low_latency_bytes(**{**SIZES, **change}, num_ranks=2) > base, change
    # The combine's rows are not rounded.
    assert jax_ep.low_latency_bytes(**SIZES, num_ranks=2, quantize="fp8") <= base
    # Scales of rounded sums have packets of their own, so narrow sums need more than in bf16.
    narrow = {**SIZES, "hidden": 512, "num_topk": 1}
    room = limits.low_latency_room(2, jax_ep.low_latency_bytes(**narrow, num_ranks=2))
    assert room >= limits.low_latency_payload(
        SIZES["max_tokens_per_rank"], 0, [512, 512 // 128 * 4]
    )
    both = jax_ep.low_latency_bytes(**SIZES, num_ranks=2, scales_bytes=448, payload_bytes=100)
    assert both == base + 2 * 2 * 128 * 2 * 2048  # a group of packets for each


WRONG_SIZES = {
    "hidden": ({"hidden": 0}, "hidden must be at least 1, got 0"),
    "wide": ({"hidden": 1 << 43}, "hidden must be at most 536870912, got"),
    "tokens": ({"max_tokens_per_rank": 1 << 64}, "max_tokens_per_rank must be at most"),
    "topk": ({"num_topk": 33}, "num_topk must be at most 32, got 33"),
    "ranks": ({"num_ranks": 0}, "num_ranks must be at least 1, got 0"),
    "blocks": ({"hidden": 100, "quantize": "fp8"}, "hidden must be a multiple of 128 for quantize='fp8', got 100"),
    "payload": ({"payload_bytes": -1}, "payload_bytes must be at least 0, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_SIZES)
def test_bytes_of_impossible_sizes_are_refused(case):
    change, message = WRONG_SIZES[case]
    with pytest.raises(jax_ep.ConfigError, match=re.escape(f"low_latency_bytes: {message}")):
        jax_ep.low_latency_bytes(**dict({"num_ranks": 2, **SIZES}, **change))


@pytest.mark.parametrize("dtype", ["bf16", jnp.int32, "no dtype"])
def test_bytes_of_other_dtypes_are_refused(dtype):
    with pytest.raises(jax_ep.DTypeError, match="low_latency_bytes: dtype must be"):
        jax_ep.low_latency_bytes(**SIZES, num_ranks=2, dtype=dtype)


@pytest.mark.parametrize("wrong", [-1, 2.5, 1 << 50])
def test_a_group_refuses_bad_sizes(wrong):
    with pytest.raises(
        jax_ep.ConfigError, match=re.escape("Group.open: low_latency_bytes must be")
    ):
        jax_ep.Group.open(make_mesh(NUM_RANKS), "ep", name="wrong", low_latency_bytes=wrong)


def test_get_finds_a_group_of_the_same_size():
    mesh = make_mesh(NUM_RANKS)
    with jax_ep.Group.open(mesh, "ep", name="sized", low_latency_bytes=1 << 20) as opened:
        assert jax_ep.Group.get(mesh, "ep", name="sized") is opened
        assert jax_ep.Group.get(mesh, "ep", name="sized", low_latency_bytes=1 << 20) is opened
        with pytest.raises(jax_ep.GroupError, match="low_latency_bytes=1048576, wanted 0"):
            jax_ep.Group.get(mesh, "ep", name="sized", low_latency_bytes=0)
