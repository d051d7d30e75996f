"""settle: the events that end a wait for results."""

import time

import jax.numpy as jnp
import pytest

from jax_ep import GroupError
from jax_ep._src.base import jax_compat
from jax_ep._src.processes.wait import GRACE_S, settle

FAILED, LOST = GroupError("failed"), GroupError("lost")


def _run(*, failure=None, loss=None, timeout=0.3):
    return settle([jnp.ones(3)], failure=lambda: failure, loss=lambda: loss, timeout=timeout)


def test_ready_results_are_good_whatever_happened():
    _run(failure=FAILED, loss=LOST)


@pytest.mark.parametrize(
    ("known", "expected", "least"),
    [
        ({"failure": FAILED}, "failed", GRACE_S),
        ({"loss": LOST}, "lost", 0.3),
        ({"failure": FAILED, "loss": LOST, "timeout": 60.0}, "failed", GRACE_S),
    ],
    ids=["failure", "loss", "both"],
)
def test_results_that_do_not_come_are_not_waited_for(monkeypatch, known, expected, least):
    """Results behind an NCCL collective whose peer has gone never come."""
    monkeypatch.setattr(jax_compat, "is_ready", lambda array: False)
    start = time.monotonic()
    with pytest.raises(GroupError, match=expected):
        _run(**known)
    assert least < time.monotonic() - start < least + 5


def test_results_are_waited_for_while_nothing_is_known(monkeypatch):
    answers = iter([False] * 300 + [True])
    monkeypatch.setattr(jax_compat, "is_ready", lambda array: next(answers))
    _run()
    assert next(answers, None) is None


@pytest.mark.parametrize("loss", [None, LOST])
def test_an_exception_of_jax_is_blamed_on_a_loss(monkeypatch, loss):
    def raise_of_gloo(arrays):
        raise RuntimeError("Gloo: connection closed")

    monkeypatch.setattr("jax.block_until_ready", raise_of_gloo)
    if loss is None:
        (found,) = _run()
    else:
        with pytest.raises(GroupError) as caught:
            _run(loss=loss)
        found = caught.value.__cause__
    assert str(found) == "Gloo: connection closed"
