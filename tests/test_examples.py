"""The examples, run from their command lines at a small size."""

import importlib
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep.testing.compare import assert_same_bits
from jax_ep.testing.ranks import on_ranks

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--steps", "2", "--batch", "8", "--seq", "16", "--d-model", "16", "--layers", "1"]


def test_moe_layer_is_the_dense_one_and_short():
    path = EXAMPLES / "01_moe_layer.py"
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 ranks, backend='cpu'" in done.stdout
    assert float(done.stdout.rpartition(" ")[2]) < 1e-5
    assert len(path.read_text().splitlines()) <= 50


def _run(tmp_path, *flags):
    command = [sys.executable, EXAMPLES / "02_train.py", *SMALL, "--out", tmp_path, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.parametrize("devices", ["8", "3"])
def test_train_runs(tmp_path, devices):
    flags = [] if devices == "8" else ["--devices", "3", "--experts", "6", "--batch", "9"]
    done = _run(tmp_path, *flags, "--expert-parallel", "4" if devices == "8" else "3")
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("bits/byte", "of rows dropped"):
        assert text in done.stderr
    for text in ("unigram entropy", "bigram entropy", "held-out loss", "--- sampled"):
        assert text in done.stdout
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")


def test_train_trains_alike_on_both_back_ends(tmp_path):
    """Both back ends train the same steps to the same bits."""
    done = _run(tmp_path, "--compare", "xla", "--backend", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu against xla, 2 steps" in done.stdout
    assert "losses 0 bits per byte, parameters 0\n" in done.stdout


def test_train_refuses_impossible_sizes(tmp_path):
    done = _run(tmp_path, "--devices", "3")
    assert done.returncode == 1
    assert "--devices 3 must divide --batch 8" in done.stderr


@pytest.mark.parametrize("devices", ["4", pytest.param("3", marks=pytest.mark.slow)])
def test_tensor_parallel_agrees_with_psum(devices):
    """The example compares its logits with psum's; its exit status is the verdict."""
    flags = ["--steps", "2", "--tokens", "8", "--devices", devices]
    command = [sys.executable, EXAMPLES / "05_tensor_parallel.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # The example deals its eight heads to two of the three devices.
    assert f"{4 if devices == '4' else 2} x cpu, back end cpu" in done.stdout
    for text in ("held-out loss", "--- generated\n\n\nimport ", "largest difference from psum"):
        assert text in done.stdout


def _run_processes(*program):
    command = [sys.executable, EXAMPLES / "04_processes.py", "--processes", "2", "--devices", "2"]
    command += program
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def test_processes_runs():
    done = _run_processes()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("4 ranks, backend='cpu'") == 2
    assert done.stdout.count("every token came back") == 2


@pytest.mark.slow
def test_train_runs_in_two_processes():
    """The experts are spread over both processes."""
    program = [EXAMPLES / "02_train.py", *SMALL, "--expert-parallel", "4"]
    done = _run_processes(*program, "--compare", "xla", "--backend", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("cpu against xla, 2 steps") == 2
    # XLA's sums over two processes have no defined order.
    assert all(float(p) < 1e-6 for p in re.findall(r"parameters (\S+)\n", done.stdout))
    assert done.stdout.count("losses 0 bits per byte") == 2


def _run_fp8(*flags):
    small = ["--tokens", "32", "--hidden", "128", "--experts", "4", "--steps", "8"]
    command = [sys.executable, EXAMPLES / "03_fp8.py", *small, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.parametrize(("scales", "scale_bytes"), [("f32", 8), ("e8m0", 2)])
def test_fp8_agrees_with_the_plain_layer(scales, scale_bytes):
    """The example compares two layers and trains both; its exit status is the verdict."""
    done = _run_fp8("--scales", scales)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("outputs", "gradient of x", "gradient of router", "apart", "0 in fp8"):
        assert text in done.stdout
    assert f"= 256 + {scale_bytes} of scales" in done.stdout


def test_fp8_refuses_impossible_sizes():
    done = _run_fp8("--devices", "3", "--expert-parallel", "3")
    assert done.returncode == 1
    assert "must divide --devices 3" in done.stderr


def test_comparisons_of_examples_see_every_nan(monkeypatch):
    """Python's max loses a NaN that is not first; jnp.max loses one in a wide array on CPUs."""
    monkeypatch.syspath_prepend(EXAMPLES)
    common = importlib.import_module("common")
    logits = jnp.ones((64, 256))
    assert common.largest_difference([logits, 2 * logits], [logits, logits]) == 1
    for place in ((0, 0), (3, 5), (63, 255)):
        spoiled = logits.at[place].set(jnp.nan)
        assert np.isnan(common.largest_difference([spoiled], [logits]))
        assert np.isnan(common.largest_difference([2 * logits, logits], [logits, spoiled]))


@pytest.mark.parametrize("scales", ["f32", "e8m0"])
def test_fp8_gradient_is_exact_where_fp8_is(groups, backend, scales, monkeypatch):
    """Integers that fp8 holds exactly give the bits of the plain layer, also in gradients.

    The largest number of each block is 7 = 2**-6 * 448, so the scales are powers of two. Every
    product and sum is an integer that f32 holds, so the tolerance is zero.
    """
    monkeypatch.syspath_prepend(EXAMPLES)
    fp8 = importlib.import_module("03_fp8")
    num_ranks, num_tokens, num_topk, hidden, inner, capacity = 4, 12, 2, 256, 24, 25
    group = groups(num_ranks)
    rng = np.random.default_rng(0)

    def integers(largest, *shape):
        return rng.integers(-largest, largest + 1, (num_ranks, *shape)).astype(np.float32)

    x, w_in = integers(7, num_tokens, hidden), integers(3, 2, hidden, inner)
    x[..., ::128] = 7
    weights, topk_idx = np.abs(integers(5, num_tokens, num_topk)), np.zeros((4, 12, 2), np.int32)
    for token in np.ndindex(num_ranks, num_tokens):
        topk_idx[token] = rng.choice(2 * num_ranks, num_topk, replace=False)
    topk_idx[0, 0] = -1
    cotangents = integers(4, capacity, inner), integers(4, capacity)
    saved = {}

    def fn(x, weights, topk_idx, w_in, *cotangents):
        send = partial(
            jax_ep.dispatch,
            group=group,
            num_experts=2 * num_ranks,
            layout="expert",
            recv_capacity=capacity,
            backend=backend,
        )
        results = {}
        for name, up in (
            ("plain", partial(fp8.bf16_up, send)),
            ("fp8", partial(fp8.fp8_up, send, scales)),
        ):

            def run(x, weights, w_in, up=up):
                hidden, row_weights, handle = up(x, (weights, topk_idx), w_in)
                return (hidden, row_weights), handle.num_dropped

            y, vjp, dropped = jax.vjp(run, x, weights, w_in, has_aux=True)
            saved[name] = {(a.dtype.name, a.shape) for a in jax.tree.leaves(vjp)}
            results[name] = y, vjp(cotangents), dropped
        return results

    results = on_ranks(fn, group.mesh)(x, weights, topk_idx, w_in, *cotangents)
    assert jax.tree.leaves(results["plain"])[-1].sum() > 0  # some rows were dropped
    for a, b in zip(*(jax.tree.leaves(results[name]) for name in ("fp8", "plain")), strict=True):
        assert np.any(np.asarray(a))
        assert_same_bits(a, b)
    # The backward pass keeps its residuals as fp8.
    wide = ("float32", (capacity, hidden))
    assert wide in saved["plain"]
    assert wide not in saved["fp8"]
    assert (jnp.float8_e4m3fn.dtype.name, (capacity, hidden)) in saved["fp8"]


def test_group_limited_is_the_dense_layer_and_crosses_less():
    """The example compares its layers with dense ones; its exit status is the verdict."""
    flags = ["--tokens", "16", "--max-nodes", "2", "--ranks-per-node", "2"]
    command = [sys.executable, EXAMPLES / "07_group_limited.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 nodes of 2 ranks, 128 tokens" in done.stdout
    found = re.findall(r"(\S+) nodes a token, (\d+) rows between nodes", done.stdout)
    (free, many), (limited, few) = found
    assert float(limited) == 2.0 < float(free)
    assert int(few) < int(many)


def test_group_limited_refuses_impossible_sizes():
    command = [sys.executable, EXAMPLES / "07_group_limited.py", "--max-nodes", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 1
    assert "--max-nodes 5 must be 1 to their number of nodes" in done.stderr


def _dense_logits(params, tokens):
    """Logits [T, vocabulary] that 06_serve.py's model has after each token, in f64, uncached."""
    at = np.arange(len(tokens))
    h = params["embed"][tokens] + params["place"][at]

    def norm(h, scale=1.0):
        return h / np.sqrt(np.mean(h * h, axis=-1, keepdims=True) + 1e-6) * scale

    def softmax(scores):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    x = norm(h)
    for i in range(len(params["layers"]["qkv"])):
        layer = {name: stacked[i] for name, stacked in params["layers"].items()}
        q, k, v = np.einsum("td,dchs->chts", x, layer["qkv"])
        scores = np.einsum("hts,hus->htu", q, k) / np.sqrt(q.shape[-1])
        mixed = softmax(np.where(at[:, None] >= at, scores, -np.inf)) @ v
        h = h + np.einsum("hts,hsd->td", mixed, layer["out"])
        x = norm(h, layer["scales"][0])
        gates = softmax(x @ layer["router"])
        least = np.sort(gates, axis=-1)[:, -2, None]
        hidden = np.einsum("td,edf->etf", x, layer["up"])
        answers = hidden / (1 + np.exp(-hidden)) @ layer["down"]
        h = h + np.einsum("te,etd->td", np.where(gates >= least, gates, 0), answers)
        x = norm(h, layer["scales"][1])
    return x @ params["head"]


def test_serve_gives_the_tokens_of_a_dense_model(monkeypatch, capsys, caplog):
    """The example compares two ways of decoding. NumPy, without slots or a cache, is a third."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("06_serve")
    config, served, serve = example.Config(slots=8, requests=30, tokens=24), [], example.serve

    def recording(*args, **kwargs):
        served.append(list(args[3]))
        with jax.log_compiles():
            return serve(*args, **kwargs)

    monkeypatch.setattr(example, "serve", recording)
    monkeypatch.setattr(example, "parse_flags", lambda *_: config)
    # The example is a program, with JAX's defaults; it takes half the time without optimisations.
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.numpy_rank_promotion("allow"), pytest.raises(SystemExit) as end:
            example.main()
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert end.value.code == 0
    assert "\n0 of 30 answers differ\n" in capsys.readouterr().out
    assert not [r.message for r in caplog.records if "ompil" in r.message]

    params = jax.tree.map(np.float64, example.init(config)[0])
    for first, second in zip(*served, strict=True):
        answer = np.array(first.answer)
        assert first.answer == second.answer
        assert len(answer) == first.limit or answer[-1] == example.END
        assert example.END not in answer[:-1]
        logits = _dense_logits(params, np.concatenate([first.prompt, answer[:-1]]))
        logits = logits[len(first.prompt) - 1 :]
        chosen = np.take_along_axis(logits, answer[:, None], axis=-1)[:, 0]
        assert np.all(chosen > logits.max(axis=-1) - 1e-3)
    assert any(len(request.answer) < request.limit for request in served[0])


@pytest.mark.slow
def test_serve_runs_in_two_processes():
    """Both processes see all tokens, so their queues stay alike."""
    done = _run_processes(EXAMPLES / "06_serve.py", "--layers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("0 of 32 answers differ") == 2
