"""Plots: their lines, and the words on their axes."""

import pytest
from matplotlib.figure import Figure

from jax_ep.bench.plots import Rival, format_bytes, plot_bytes, plot_tokens
from jax_ep.bench.record import Record


def _record(tokens, us, **facts):
    known = dict.fromkeys(Record.__dataclass_fields__)
    known |= {"op": "dispatch", "contender": "jax_ep", "backend": "cuda", "layout": "rank"}
    known |= {"dtype": "bf16", "hidden": 8, "num_ranks": 2, "device": "GPU", "floor_us": tokens / 4}
    return Record(**known | {"tokens": tokens, "us": {"p50": us}} | facts)


@pytest.fixture
def drawn(monkeypatch):
    """Returns the axes of the figures that were saved."""
    axes = []
    save = Figure.savefig

    def keep(figure, path):
        save(figure, path)
        axes.extend(figure.axes)

    monkeypatch.setattr(Figure, "savefig", keep)
    return axes


def _lines(axes):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_the_fastest_of_each_side_is_drawn(tmp_path, drawn):
    records = [
        _record(128, 60.0, sms=8),
        _record(128, 50.0, sms=20),
        _record(512, 90.0, sms=8),
        _record(512, 95.0, sms=20),
        _record(128, 40.0, backend="xla"),  # jax_ep on back end `xla`
        _record(128, 70.0, contender="all_gather", backend="xla"),
        _record(512, 140.0, contender="all_gather", backend="xla"),
        _record(512, 900.0, contender="ragged_all_to_all", backend="xla"),
    ]
    rivals = [Rival("theirs", "dispatch", "rank", "bf16", 128, 30.0)]
    rivals += [Rival("elsewhere", "combine", "rank", "bf16", 128, 30.0)]
    plot_tokens(records, tmp_path / "plot.png", rivals)
    (axes,) = drawn
    assert _lines(axes) == {
        "jax_ep (cuda)": [(128, 50.0), (512, 90.0)],
        "stock JAX (all_gather)": [(128, 70.0), (512, 140.0)],
        "floor": [(128, 32.0), (512, 128.0)],
        "theirs": [(128, 30.0)],
    }
    assert axes.get_xlabel() == "tokens of a rank"
    assert axes.get_ylabel() == "microseconds (median)"
    assert axes.get_title(loc="left") == "dispatch, rank layout, bf16"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_each_operation_has_a_panel(tmp_path, drawn):
    sums = {"layout": None, "algorithm": "one_shot"}
    records = [_record(tokens, 4.0, op="all_reduce", **sums) for tokens in (64, 256)]
    records += [_record(64, 5.0, op="all_gather", **sums)]
    plot_bytes(records, tmp_path / "plot.png")
    assert [axes.get_title(loc="left") for axes in drawn] == ["all_reduce", "all_gather"]
    assert [label.get_text() for label in drawn[0].get_xticklabels()] == ["1 KiB", "4 KiB"]


def test_crowded_names_on_an_axis_are_left_out(tmp_path, drawn):
    records = [_record(tokens, 4.0) for tokens in (128, 512, 2048, 8192, 16384)]
    plot_tokens(records, tmp_path / "plot.png")
    names = [label.get_text() for label in drawn[0].get_xticklabels()]
    assert names == ["128", "512", "2,048", "", "16,384"]


def test_a_floor_of_nothing_leaves_room_for_the_lines(tmp_path, drawn):
    records = [_record(64, 4.0, floor_us=0.003), _record(256, 8.0, floor_us=5.0)]
    plot_tokens(records, tmp_path / "plot.png")
    assert drawn[0].get_ylim()[0] > 1.0


@pytest.mark.parametrize(
    ("size", "name"), [(512, "512 B"), (1024, "1 KiB"), (64 << 20, "64 MiB"), (1 << 30, "1 GiB")]
)
def test_sizes_have_units(size, name):
    assert format_bytes(size) == name
