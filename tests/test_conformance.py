"""The conformance suite on groups of every size, and the wrong results that it must see."""

import argparse
import dataclasses
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dealing import deal, parse_share
from jax.sharding import Mesh
from process_programs import run_on_cpus

import jax_ep
from jax_ep.testing import conformance, run
from jax_ep.testing.compare import assert_close, assert_same_bits
from jax_ep.testing.conformance import gradients, reductions, round_trips
from jax_ep.testing.conformance.check import Check
from jax_ep.testing.conformance.sizes import mix

NUM_RANKS = tuple(range(1, 9))
# Each check runs on one size of group in turn. These checks depend on ranks, so run on others, too.
ON_MORE = {
    round_trips.routings_in_one_scan: (1, 8),
    round_trips.runs_give_equal_bits: (8,),
    round_trips.sums_of_negative_zeros_are_positive: (1, 2),
    gradients.combine_is_the_transpose_of_dispatch: (1, 3, 8),
}
# Algorithms of sums make no difference on CPU devices.
ALIKE = [
    c for c in conformance.CHECKS if c.params.get("algorithm") not in ("low_latency", "two_shot")
]


def _deal():
    adds = [check.run.__module__ == reductions.__name__ for check in ALIKE]
    others = [check for check, is_sum in zip(ALIKE, adds, strict=True) if not is_sum]
    for turn, check in enumerate(others):
        # Each round shifts by one size, or a parameter that repeats every 8 checks meets one size.
        yield NUM_RANKS[(turn + turn // len(NUM_RANKS)) % len(NUM_RANKS)], check
        for num_ranks in ON_MORE.get(check.run, ()):
            yield num_ranks, check
    # A sum over one rank is the identity, so one check of each kind runs there.
    sums = [check for check, is_sum in zip(ALIKE, adds, strict=True) if is_sum]
    for turn, check in enumerate(sums):
        yield NUM_RANKS[1:][turn % (len(NUM_RANKS) - 1)], check
    for check in {check.run: check for check in sums}.values():
        yield 1, check


def _values(num_ranks, check):
    """Returns the size of group and the pairs of parameter values that a check meets."""
    params = [*check.params.items()]
    pairs = [*itertools.combinations(params, min(2, len(params)))]
    return {(check.run, *values) for values in (*pairs, (num_ranks,))}


def _thin(dealt):
    """Yields few checks that meet every size of group and every pair of values of each kind."""
    left = set().union(*(_values(*chosen) for chosen in dealt))
    while left:
        best = max(dealt, key=lambda chosen: len(_values(*chosen) & left))
        left -= _values(*best)
        yield best


DEALT = {f"{num_ranks}-{check}": (num_ranks, check) for num_ranks, check in _deal()}
# XLA takes long to compile back end `xla`. The full matrix has all checks.
THINNED = [*_thin(DEALT.values())]
CHOSEN = {
    f"{backend}-{num_ranks}-{check}": (backend, num_ranks, check)
    for backend, dealt in (("cpu", DEALT.values()), ("xla", THINNED))
    for num_ranks, check in dealt
}
BY_NAME = {check.name: check for check in conformance.FULL}


@pytest.mark.parametrize(("backend", "num_ranks", "check"), CHOSEN.values(), ids=CHOSEN)
def test_back_ends_pass_the_suite(groups, backend, num_ranks, check):
    """`cpu` runs all checks and `xla` the THINNED ones, each on a size of group or a few."""
    _run(check, groups(num_ranks), backend)


@pytest.mark.slow
@pytest.mark.parametrize("check", conformance.FULL, ids=str)
@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_back_ends_pass_the_full_matrix(groups, backend, num_ranks, check):
    _run(check, groups(num_ranks), backend)


def _run(check, group, backend):
    reason = check.not_usable(group, backend)
    if reason:
        assert (backend, check.run) == ("xla", round_trips.subnormals_are_kept)
        pytest.skip(reason)
    check(group, backend)


ALL_GRADIENTS = "gradients_to_the_bit[layout=expert,dtype=f32,capacity=half,weights_at=rows]"
IN_LAYERS = (
    "routings_in_one_scan[layout=expert,capacity=ample,check_vma=True]",
    "gradients[layout=rank,dtype=f32,check_vma=True,outside=True]",
    "gradients[layout=expert,dtype=f32,check_vma=False,outside=False]",
)
# Device ids, shape and axes of a mesh, axes of the group, and the checks to run there.
MESHES = {
    "axes_in_another_order": (range(4), {"a": 2, "b": 2}, ("b", "a"), IN_LAYERS),
    "slices": (range(4), {"a": 2, "b": 2}, ("b",), IN_LAYERS),
    "permuted_devices": ((6, 1, 3), {"a": 3}, ("a",), [ALL_GRADIENTS]),
    "three_permuted_axes": (
        (5, 2, 7, 0, 3, 6, 1, 4),
        {"a": 2, "b": 2, "c": 2},
        ("c", "a"),
        [ALL_GRADIENTS],
    ),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_back_ends_pass_the_suite_on_other_meshes(backend, mesh):
    """Meshes have axes and devices in another order, and several slices side by side."""
    ids, shape, axes, names = MESHES[mesh]
    devices = np.array(jax.devices())[list(ids)].reshape(tuple(shape.values()))
    with jax_ep.Group.open(Mesh(devices, tuple(shape)), axes, name="other") as group:
        for name in names:
            BY_NAME[name](group, backend)


def test_checks_run_in_several_processes():
    """Each process feeds and compares its own shards, on back end `xla`."""
    names = [
        "repeated_expert[layout=expert]",
        "gradients[layout=rank,dtype=f32,check_vma=True,outside=True]",
        "combine_is_the_transpose_of_dispatch[layout=rank,capacity=half]",
        "get_dispatch_layout[num_tokens=13,num_topk=3,experts_per_rank=4]",
    ]
    outputs = run_on_cpus("named_checks", *names, deadline=200)
    assert all("4 checks passed" in output for output in outputs)


def test_thinned_checks_meet_every_size_and_pair_that_all_meet():
    meets = [set().union(*(_values(*chosen) for chosen in c)) for c in (DEALT.values(), THINNED)]
    assert meets[0] == meets[1]
    assert len(THINNED) < 0.75 * len(DEALT)
    wanted = {("num_topk", 32), ("capacity", "one")}
    trips = [c for _, c in THINNED if c.run is round_trips.round_trip]
    assert any(wanted <= set(check.params.items()) for check in trips)


def test_shared_runs_have_all_checks_and_each_run_has_every_kind():
    kinds = [(backend, check.run) for backend, _, check in CHOSEN.values()]
    tests = [*zip(kinds, CHOSEN, strict=True), (None, "of no kind")]
    shares = [deal(tests, *parse_share(text)) for text in ("0/2", "1/2")]
    assert all(any(both) for both in zip(*shares, strict=True))
    for share in shares:
        *chosen, other = share
        assert other
        assert {kind for kind, is_own in zip(kinds, chosen, strict=True) if is_own} == {*kinds}
        assert sum(chosen) < 0.6 * len(kinds)
    assert all(deal(tests, *parse_share("0/1")))


@pytest.mark.parametrize("text", ["", "2", "2/2", "0/0", "-1/2", "1/2/3", "a/b"])
def test_a_bad_share_is_refused(text):
    with pytest.raises(ValueError, match="expected I/N"):
        parse_share(text)


def test_names_are_unique_and_full_holds_all():
    assert len(BY_NAME) == len(conformance.FULL)
    assert {c.name for c in conformance.CHECKS} <= BY_NAME.keys()


def test_mix_holds_every_pair_and_every_crossing():
    values = {"a": (1, 2, 3), "b": ("x", "y"), "c": (True, False), "d": (0, 1, 2, 3)}
    rows = mix(values, crossed=("a", "c"))
    assert {(r["a"], r["c"]) for r in rows[:6]} == set(itertools.product((1, 2, 3), (True, False)))
    for a, b in itertools.combinations(values, 2):
        assert {(r[a], r[b]) for r in rows} == set(itertools.product(values[a], values[b]))
    assert all(list(r) == list(values) for r in rows)
    assert len(rows) < 24 / 1.5


def _last_bit(x):
    return jnp.nextafter(x, jnp.inf) if x.dtype == jnp.float32 else x * 1.0625


def _change(out, **fields):
    return dataclasses.replace(out, **fields)


# Faults in a result of dispatch or combine, and a check that must see each.
WRONG = {
    "last bit of a sum": ("combine", _last_bit, "round_trip["),
    "a row moved": ("dispatch", lambda o: _change(o, x=jnp.roll(o.x, 1, 0)), "round_trip["),
    "a count": ("dispatch", lambda o: _change(o, num_recv=o.num_recv + 1), "round_trip["),
    "the way back": (
        "dispatch",
        lambda o: _change(o, handle=_change(o.handle, send_row=o.handle.send_row[::-1])),
        "other_rows_along_a_handle[",
    ),
    "a NaN made quiet": (
        "dispatch",
        lambda o: _change(o, x=jnp.where(jnp.isnan(o.x), jnp.nan, o.x)),
        "payload_bits_pass_unchanged[",
    ),
    "a leak": ("combine", lambda y: y.at[0, 0].set(jnp.nan), "garbage_does_not_leak["),
    "a sign": ("combine", lambda y: -y, "combine_is_the_transpose_of_dispatch["),
    "a gradient": (
        "combine",
        lambda y: y + jax.lax.stop_gradient(y) - y * 1.0,
        "gradients[layout=expert,dtype=f32",
    ),
    "a layer": ("combine", lambda y: y * 1.001, "gradients_through_layers["),
    "a step": ("combine", _last_bit, "routings_in_one_scan["),
    "scales": (
        "dispatch",
        lambda o: _change(o, scales=jnp.flip(o.scales, 1)) if o.scales is not None else o,
        "fp8_pair_and_payload[",
    ),
    "a weight": ("combine_weights", lambda w: w.at[0].set(0.0), "combine_weights["),
    "rounding": ("dispatch_fp8", lambda o: _change(o, x=o.x * 1.125), "dispatch_fp8["),
    "last bit of an all_reduce": ("all_reduce", _last_bit, "sums[op=all_reduce"),
    "a part of another rank": (
        "reduce_scatter",
        lambda y: jnp.roll(y, 1),
        "sums[op=reduce_scatter",
    ),
    "a rank left out": ("all_gather", lambda y: y.at[-1].set(y[0]), "sums[op=all_gather"),
    "a gradient of a sum": (
        "all_reduce",
        lambda y: y + jax.lax.stop_gradient(y) - y * 1.0,
        "reduction_gradients[op=all_reduce",
    ),
    "a sign of zero": (
        "all_reduce",
        lambda y: jnp.where(y == 0, jnp.abs(y), y),
        "special_values[dtype=f32",
    ),
    "a sign of a zero sum": (
        "combine",
        lambda y: jnp.where(y == 0, -jnp.abs(y), y),
        "sums_of_negative_zeros_are_positive[",
    ),
    "a norm": (
        "all_reduce_residual_rmsnorm",
        lambda results: (results[0] * 1.01, results[1]),
        "norms[dtype=f32",
    ),
    "a residual": (
        "all_reduce_residual_rmsnorm",
        lambda results: (results[0], _last_bit(results[1])),
        "norms[dtype=f32",
    ),
    "a gradient of a norm": (
        "all_reduce_residual_rmsnorm",
        lambda results: (jax.lax.stop_gradient(results[0]), results[1]),
        "norm_gradients[",
    ),
    "a mask": (
        "get_dispatch_layout",
        lambda o: _change(o, is_token_in_rank=~o.is_token_in_rank),
        "get_dispatch_layout[",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_suite_sees_wrong_results(groups, monkeypatch, what):
    name, spoil, prefix = WRONG[what]
    right = getattr(jax_ep, name)
    monkeypatch.setattr(jax_ep, name, lambda *a, **options: spoil(right(*a, **options)))
    check = next(c for c in conformance.CHECKS if c.name.startswith(prefix))
    with pytest.raises(AssertionError):
        check(groups(2), "cpu")


def test_comparison_names_the_place_in_the_whole_array(groups):
    """The place is right in shards, under a mask, and for NaN."""
    mesh = groups(4).mesh
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("ep"))
    expected = np.arange(24, dtype=np.float32).reshape(4, 6)
    wrong = expected.copy()
    wrong[2, 5] = np.nan
    got = jax.device_put(wrong, sharding)
    for compare in (assert_same_bits, lambda *a: assert_close(*a, tolerance=0.1)):
        with pytest.raises(
            AssertionError, match=r"first at \(2, 5\): expected .*17.0.*, got .*nan"
        ):
            compare(got, expected)
    assert_same_bits(got, expected, where=np.array([True, True, False, True]))
    assert_same_bits(got, expected, where=~np.isnan(wrong))
    other_nan = wrong.copy()
    other_nan.view(np.uint32)[2, 5] ^= 1
    assert_same_bits(got, other_nan)
    with pytest.raises(AssertionError, match=r"1 of 6 values differ"):
        assert_same_bits(got, other_nan, nan_bits=True)
    with pytest.raises(AssertionError, match=r"expected float32\(4, 5\), got float32\(4, 6\)"):
        assert_same_bits(got, expected[:, :5])


def _args(*line):
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return parser.parse_args(line)


def test_command_prints_failures(monkeypatch, capsys):
    def broken(group, backend, *, layout):
        assert layout == "rank", "this one is broken"

    checks = [Check(broken, frozenset(), {"layout": layout}) for layout in ("rank", "expert")]
    monkeypatch.setattr(conformance, "CHECKS", checks)
    assert run.main(_args("--ranks", "2", "--backend", "xla")) == 1
    printed = capsys.readouterr()
    assert "this one is broken" in printed.err
    lines = printed.out.splitlines()
    assert lines[0].startswith("2 ranks of")
    assert "ok" in lines[2]
    assert "FAILED" in lines[3]
    assert lines[-1] == "1 passed, 1 FAILED"


def test_command_refuses_bad_arguments():
    with pytest.raises(jax_ep.GroupError, match="conformance: back end 'cuda' is not usable here"):
        run.main(_args("--ranks", "2", "--backend", "cuda"))
    with pytest.raises(jax_ep.ConfigError, match="no check's name holds 'tango'"):
        run.main(_args("--only", "tango"))


def test_command_runs_the_suite():
    command = [sys.executable, "-m", "jax_ep", "conformance", "--ranks", "2"]
    done = subprocess.run(
        [*command, "--only", "subnormals"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "6 passed, 6 not usable"
