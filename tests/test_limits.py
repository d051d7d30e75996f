"""Facts that Python and the native code share: limits, and the numbers of enums."""

import sys

import pytest

import jax_ep
from jax_ep._src.base import config, limits, native_modules, options

MODULES = ("cpu", "cuda")


def _load(backend):
    try:
        return native_modules.load(backend)
    except jax_ep.GroupError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("backend", MODULES)
def test_enums_have_the_same_members(backend):
    found = _load(backend).enums()
    assert sorted(found) == [
        "Algorithm",
        "ExchangeMode",
        "Fill",
        "Layout",
        "Movement",
        "Pieces",
        "Quantize",
    ]
    for name, members in found.items():
        kind: type[options.Option] = getattr(options, name)
        # No custom call gets the option for XLA's collective.
        assert members == {m.name: m.code for m in kind if m is not options.Algorithm.PSUM}


@pytest.mark.parametrize("backend", MODULES)
def test_rules_equal_those_of_the_handlers(backend):
    found = _load(backend).limits()
    assert found["ROW_BYTES_MULTIPLE"] == config.ROW_BYTES_MULTIPLE
    assert found["MAX_BIASES"] == config.MAX_BIASES
    assert found["FP8_BLOCK"] == config.FP8_BLOCK


def test_modules_have_the_same_limits():
    cpu, cuda = (_load(backend) for backend in MODULES)
    assert cpu.limits() == cuda.limits()
    assert cpu.enums() == cuda.enums()


def test_limits_are_read_by_name():
    found = native_modules.load("cpu").limits()
    assert {name: getattr(limits, name) for name in found} == found
    assert limits.MAX_TOPK == 32
    with pytest.raises(AttributeError, match="no limit MAX_NOTHING: there are MAX_CUDA_RANKS, "):
        _ = limits.MAX_NOTHING
    with pytest.raises(AttributeError):
        _ = limits.nothing


def test_payloads_shrink_as_ranks_are_added():
    """All ranks share the slots. The room for pushes grows up to four ranks."""
    for num_ranks in (1, 2, 3, 4, 8, 12, 31, 32):
        slots = limits.slot_payload(num_ranks)
        assert slots % limits.SLOT_BYTES == 0
        assert num_ranks * slots <= limits.slot_payload(1)
        push = limits.push_payload(num_ranks)
        assert push % 512 == 0
        assert num_ranks * push <= 4 * limits.push_payload(1)
        assert limits.two_shot_payload(num_ranks) == num_ranks * push // 2
    assert limits.push_payload(4) == limits.push_payload(1)
    for payload in (limits.slot_payload, limits.push_payload, limits.two_shot_payload):
        with pytest.raises(ValueError, match="num_ranks must be positive"):
            payload(0)


def test_a_missing_module_is_named(monkeypatch):
    monkeypatch.delattr(jax_ep, "_jax_ep_cpu", raising=False)
    monkeypatch.setitem(sys.modules, "jax_ep._jax_ep_cpu", None)
    with pytest.raises(jax_ep.GroupError, match="limits of the kernels are in jax_ep's CPU module"):
        _ = limits.MAX_TOPK
