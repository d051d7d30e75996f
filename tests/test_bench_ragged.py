"""The benchmark of ragged exchanges: its steps, its contenders, its records."""

import json
import re
import sys
import types

import jax
import numpy as np
import pytest
from scripts import BENCHMARKS, load_script

from jax_ep.bench import steps
from jax_ep.testing.ranks import on_ranks

RAGGED = load_script("ragged")


def _compiled(group, contender, num_links):
    exchange = RAGGED.make_exchange("skewed", 1024, 3, 2)
    found = RAGGED.ways(group, exchange, [], only_ours=False)
    (link,) = RAGGED.links(group, exchange, {contender: found[contender]})
    chain = on_ranks(steps.make_chain(link.run, num_links), group.mesh, check_vma=False)
    return chain.lower(link.carry, np.zeros((2, 1), np.int32)).compile().as_text()


def test_a_step_copies_nothing(groups):
    """However long the chain, x and out stay where they are: a call writes onto the last's result.

    The copies before the first step are those of operands that the program must not overwrite.
    """
    texts = [_compiled(groups(2), "jax_ep", num_links) for num_links in (2, 6)]
    first, second = (len(re.findall(r" copy\(", text)) for text in texts)
    assert first == second


@pytest.mark.parametrize(
    ("contender", "call"),
    [("jax_ep", r'"jax_ep\.ragged_all_to_all"'), ("all_to_all", r" all-to-all\(")],
)
def test_every_exchange_is_between_two_readings(groups, contender, call):
    text = _compiled(groups(2), contender, 3)
    entry = text[text.index("\nENTRY ") :].partition("\n}")[0]
    before, *between, after = entry.split('custom_call_target="jax_ep.read_clock"')
    assert [len(re.findall(call, part)) for part in between] == [1, 1, 1]
    assert not re.findall(call, before + after)


@pytest.mark.parametrize(
    ("platform", "processes", "names"),
    [
        ("gpu", [0, 0], ["jax_ep", "ragged_all_to_all", "all_to_all"]),
        ("gpu", [0, 1], ["jax_ep", "all_to_all"]),
        ("cpu", [0, 0], ["jax_ep", "all_to_all"]),
    ],
)
def test_stock_contenders_are_those_that_xla_has(platform, processes, names):
    devices = [types.SimpleNamespace(platform=platform, process_index=i) for i in processes]
    group = types.SimpleNamespace(mesh=types.SimpleNamespace(devices=np.array(devices)))
    exchange = RAGGED.make_exchange("balanced", 1024, 1, 2)
    assert list(RAGGED.ways(group, exchange, [], only_ours=False)) == names


def test_the_script_writes_how_many_steps_were_counted(tmp_path, monkeypatch):
    """Stock contenders run for the first kind only; records hold percentiles of single steps."""
    path = BENCHMARKS / "ragged.py"
    arguments = ["--kib", "1", "--pieces", "3", "--kind", "balanced", "skewed", "--steps", "9"]
    monkeypatch.setattr(sys, "argv", [str(path), *arguments, "--out", str(tmp_path)])
    monkeypatch.setattr(steps, "_LINKS", 8)
    RAGGED.main()
    (written,) = tmp_path.glob("*-ragged.jsonl")
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    found = [(line["kind"], line["contender"]) for line in lines]
    assert found == [("balanced", "jax_ep"), ("balanced", "all_to_all"), ("skewed", "jax_ep")]
    for line in lines:
        assert line["num_ranks"] == len(jax.devices())
        assert (line["op"], line["timing"]) == ("ragged_all_to_all", "steps")
        assert line["us"] == line["steps"]["us"]
        assert set(line["us"]) == {"p50", "p90", "p99"}
        assert line["steps"]["count"] >= 9
