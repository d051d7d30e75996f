"""Faults of back ends: each is planted in a back end, and a check of the suite must fail."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jax_ep._src.base.options import Pieces
from jax_ep._src.ops.combine import call as combine_call
from jax_ep._src.ops.combine import vjp as combine_vjp
from jax_ep._src.ops.common.checks import Checks
from jax_ep._src.ops.dispatch import call as dispatch_call
from jax_ep._src.ops.dispatch import vjp as dispatch_vjp
from jax_ep._src.ops.pull_rows import call as pull_rows_call
from jax_ep._src.ops.ragged_all_to_all import call as ragged_call
from jax_ep._src.ops.ragged_all_to_all import vjp as ragged_vjp
from jax_ep.testing import conformance

CHECKS = {check.name: check for check in conformance.CHECKS}
# Modules in which the calls of an operation are looked up.
CALLERS = {
    "dispatch": (dispatch_call,),
    "combine": (combine_call,),
    "pull_rows": (pull_rows_call,),
    "exchange": (ragged_call,),
}
GRADIENTS = "gradients_to_the_bit[layout=expert,dtype=f32,capacity=half,weights_at=rows]"


def _next(x):
    """Returns numbers one unit in the last place further from zero."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(bits + 1, x.dtype)


def _fault_of(index, spoil):
    """Makes a fault in one of several results."""
    return lambda results: tuple(spoil(r) if i == index else r for i, r in enumerate(results))


def _backward(rule, spoil):
    """Plants a fault in the gradients that an operation gives its operands."""

    def inject(monkeypatch):
        right = rule.bwd
        monkeypatch.setattr(rule, "bwd", lambda *args: spoil(right(*args)))

    return inject


def _forward(op, spoil_of):
    """Plants a fault in a back end: `spoil_of` gets the right function and its arguments."""

    def inject(monkeypatch):
        for module in CALLERS[op]:
            fn = getattr(module, op)
            monkeypatch.setattr(module, op, partial(spoil_of, fn))

    return inject


def _fill(index, value):
    """Fills rows without a token in one of the arrays that travel."""

    def spoil(fn, *args):
        routed = fn(*args)
        rows = list(routed.rows)
        if index < len(rows):
            is_free = (routed.recv_src < 0)[:, None]
            rows[index] = jnp.where(is_free, jnp.asarray(value, rows[index].dtype), rows[index])
        return routed._replace(rows=tuple(rows))

    return _forward("dispatch", spoil)


def _leak(fn, spec, index, rows, *others):
    """Adds a row without a token times zero, which combine should leave out."""
    return fn(spec, index, rows, *others) + rows[-1:] * 0


def _with_weights(change):
    def spoil(fn, spec, index, rows, weights, biases):
        return fn(spec, index, rows, None if weights is None else change(weights), biases)

    return _forward("combine", spoil)


def _narrow_ids(monkeypatch):
    right = Checks.topk_idx
    monkeypatch.setattr(
        Checks, "topk_idx", lambda self, ids, **o: right(self, ids.astype(jnp.int32), **o)
    )


def _narrow_rows(fn, spec, index, rows, **slots):
    """Loses the bytes of rows beyond the first KiB, in a cached dispatch."""
    return fn(spec, index, rows, **slots).at[:, 1024 // rows.dtype.itemsize :].set(0)


def _at_most(size):
    """Cuts the pieces that are given, as a kernel that loses the end of a large piece would."""

    def spoil(fn, spec, pieces, table, rows, **options):
        if pieces is Pieces.GIVEN:
            table = table._replace(sizes=jnp.minimum(table.sizes, size))
        return fn(spec, pieces, table, rows, **options)

    return _forward("exchange", spoil)


def _one_term(fn, spec, pieces, table, rows, **options):
    """Gives a row that was sent several times one cotangent, as JAX's own gradient does."""
    if pieces is Pieces.BACK:
        first = table.input_offsets
        earlier = jnp.tri(first.shape[0], k=-1, dtype=jnp.bool_)
        repeats = jnp.any((first[:, None] == first[None, :]) & earlier, axis=1)
        table = table._replace(input_offsets=jnp.where(repeats, -1, first))
    return fn(spec, pieces, table, rows, **options)


PIECES = "ragged_pieces[dtype=f32,width=3,per_peer=2]"
FAULTS = {
    "last bit of the gradient of x": (
        _backward(dispatch_vjp.dispatch, _fault_of(0, lambda rows: (_next(rows[0]), *rows[1:]))),
        GRADIENTS,
        "gradient of x:",
    ),
    "last bit of the gradient of topk_weights": (
        _backward(dispatch_vjp.dispatch, _fault_of(1, _next)),
        GRADIENTS,
        "gradient of topk_weights",
    ),
    "last bit of the gradient along a handle": (
        _backward(dispatch_vjp.dispatch_along, _fault_of(0, lambda rows: (_next(rows[0]),))),
        GRADIENTS,
        "gradient of x along a handle",
    ),
    "last bit of the gradient of rows": (
        _backward(combine_vjp.combine, _fault_of(0, _next)),
        GRADIENTS,
        "gradient of rows",
    ),
    "last bit of the gradient of a bias": (
        _backward(combine_vjp.combine, _fault_of(2, lambda biases: (_next(biases[0]),))),
        GRADIENTS,
        "gradient of bias",
    ),
    "a negative zero in a gradient": (
        _backward(combine_vjp.combine, _fault_of(0, lambda rows: jnp.where(rows == 0, -0.0, rows))),
        GRADIENTS,
        "gradient of rows",
    ),
    "a NaN that leaks into a gradient": (_forward("combine", _leak), GRADIENTS, "gradient of x:"),
    "a negative zero in a fill": (
        _fill(0, -0.0),
        "round_trip[layout=rank,capacity=beyond]",
        "x: ",
    ),
    "a fill that is missing": (
        _fill(0, 1.0),
        "round_trip[layout=expert,expert_alignment=32,capacity=beyond]",
        "x: ",
    ),
    "a fill of scales that is missing": (
        _fill(1, 1),
        "fp8_pair_and_payload[layout=expert,fp8=e4m3fn,scales=f32,fill=zeros]",
        "routed scales",
    ),
    "weights that are ignored": (
        _with_weights(lambda weights: None),
        "special_weights[layout=expert,weights_at=tokens]",
        "combine",
    ),
    "weights without a sign": (
        _with_weights(jnp.abs),
        "special_weights[layout=expert,weights_at=tokens]",
        "combine",
    ),
    "ids cut to 32 bits": (_narrow_ids, "with_x64[layout=rank]", "group_sizes"),
    "wide rows cut": (
        _forward("pull_rows", _narrow_rows),
        "other_widths_along_a_handle[layout=rank]",
        "float32",
    ),
    "the end of a piece is lost": (_at_most(20), PIECES, "result: "),
    "one term in the place of a sum": (
        _forward("exchange", _one_term),
        PIECES,
        "gradient of operand",
    ),
    "last bit of the gradient of output": (
        _backward(ragged_vjp.ragged_all_to_all, _fault_of(1, _next)),
        PIECES,
        "gradient of output",
    ),
    "last bit of the gradient of packed rows": (
        _backward(
            ragged_vjp.all_to_all_v, _fault_of(0, lambda bars: (*bars[:-1], _next(bars[-1])))
        ),
        "packed_rows[capacity=37]",
        "gradient",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_the_suite_sees_every_fault(groups, monkeypatch, what):
    inject, name, message = FAULTS[what]
    inject(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        CHECKS[name](groups(2), "cpu")
