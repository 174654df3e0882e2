"""python -m bench: its measuring on invented timings, its rows at small sizes, and its peers' loops beside ours."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as bench
from bench import clock, edits, models, peers, warp
from sample import edit, fixup
from tests import small
from tests.small import relative_error
from warp import softsplat


def options(**more):
    cpu = torch.device("cpu")
    return SimpleNamespace(**dict(rounds=1, model=None, steps=None, batch=None, dtype=None, device=cpu) | more)


# --- Measuring ------------------------------------------------------------------------------------


@pytest.fixture
def works(monkeypatch):
    """-> works(seconds, result): a function that takes so long by the clock, and no time."""
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def make(seconds, result=None):
        def run():
            now[0] += seconds
            return result

        return run

    return make


def test_runs_alternate_and_their_order_does_too():
    seen = []
    runs = {name: partial(seen.append, name) for name in "ab"}
    assert clock.call_in_turn(runs, options(rounds=3)) == {"a": [None] * 3, "b": [None] * 3}
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"  # the first two warm up


def test_rounds_end_when_the_time_is_up_but_one_is_made(works):
    limit, most = clock.LIMIT, clock.MOST
    for each, rounds in ((1, most), (limit / 5, 2), (limit, 1)):
        seconds, _ = clock.time_in_turn({"a": works(each), "b": works(each)}, options(rounds=None))
        assert seconds == {"a": [pytest.approx(each)] * rounds, "b": [pytest.approx(each)] * rounds}
    assert len(clock.time_in_turn({"a": works(limit)}, options(rounds=4))[0]["a"]) == 4  # asked for, so made


def test_a_comparison_is_a_row(works):
    x = torch.tensor([1.0, -4.0])
    row = clock.compare(options(rounds=3), "two", works(2, x), works(8, x + 0.01), "theirs")
    assert row.ours == [pytest.approx(2)] * 3 and row.theirs == [pytest.approx(8)] * 3
    assert row.difference == pytest.approx(0.01 / 3.99, rel=1e-4)
    assert clock.format_row(row) == ("two", "2 s", "8 s", "0.25", "0.25 .. 0.25", "3e-03", "theirs")  # ours is faster
    alone = clock.compare(options(rounds=2), "one", works(2, x), None, "theirs")
    assert clock.format_row(alone) == ("one", "2 s", "", "", "2 .. 2", "", "theirs is not installed")


def test_a_process_of_its_own(monkeypatch):
    assert clock.run_in_own_process("bench.clock.compute_ratio", ours=[1, 2, 6], theirs=[4, 4, 4]) == [0.5, 0.25, 1.5]
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback ..\n  ..\nValueError: broken\n")
    monkeypatch.setattr(clock.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="ValueError: broken"):
        clock.run_in_own_process("bench.clock.compute_ratio", ours=[1], theirs=[2])


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("argv", "what"), [
    (["nothing"], "no topic 'nothing': choose unet, vae"), (["unet", "--batch", "2,x"], "'x' is not a whole number"),
    (["unet", "--rounds", "0"], "in 1 .. 1000"), (["unet", "--device", "abacus"], "abacus"),
])
def test_mistakes_get_one_line(argv, what, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and what in lines[0], lines


def test_rows_are_printed_as_a_table(monkeypatch, capsys):
    def topic(o):
        """Two ones."""
        yield clock.compare(o, "ones", lambda: torch.ones(2), lambda: torch.ones(2), "twin")

    monkeypatch.setattr(bench, "TOPICS", {"mine": topic})
    bench.main(["mine", "--rounds", "2", "--device", "cpu"])
    machine, _, about, _, header, row = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in machine and "code at " in machine and about == "mine: Two ones."
    assert header.split() == ["ours", "peer's", "ratio", "spread", "difference", "peer"]
    assert row.startswith("ones ") and row.endswith("0e+00       twin")


# --- The peers' loops -----------------------------------------------------------------------------


def make_picture(size=16, seed=0):
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_published_loop_gives_our_change_map_edit(prediction):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    model, mu = small.stable_diffusion(prediction=prediction), edits.make_ramp(16)
    pipe = peers.make_pipeline(model, torch.float32)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    got = edit(model, "a blue circle", make_picture(), mu, steps=5)
    want = peers.run_published_loop(pipe, "a blue circle", make_picture(), mu, noise, 5)
    assert relative_error(got, want) <= 1e-4
    assert relative_error(edit(model, "a blue circle", make_picture(), 0 * mu, steps=5), want) > 1e-2  # the map matters
    assert relative_error(edit(model, "cats", make_picture(), mu, steps=5), want) > 1e-4  # and the words do


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_straightforward_loop_gives_our_magic_fixup(prediction):
    pytest.importorskip("diffusers")
    model = small.magic_fixup(prediction)
    peer = peers.make_fixup_peer(model)
    inputs = make_picture(), make_picture(seed=1), (make_picture(seed=2)[:, :1] > 0).float()
    got = fixup(model, *inputs, steps=5, seeds=[3])
    assert relative_error(got, peers.run_straightforward_loop(peer, *inputs, steps=5, seed=3)) <= 1e-4
    other = peers.run_straightforward_loop(peer, make_picture(seed=4), *inputs[1:], steps=5, seed=3)
    assert relative_error(other, got) > 1e-3  # the reference matters


# --- The topics -----------------------------------------------------------------------------------


@pytest.fixture
def small_sizes(monkeypatch):
    """A full size that is none, so that the code for it runs; and no process of its own."""
    parts = {"unet": small.SD1, "vae": small.VAE, "text_encoder": replace(small.TEXT, vocab_size=600)}
    monkeypatch.setattr(edits, "run_in_own_process", lambda _, **arguments: edits.edit_once(**arguments))
    monkeypatch.setattr(edits, "hold_memory", lambda: None)
    monkeypatch.setattr(edits, "CALLS", 1)
    for kind in ("full", "toy"):
        monkeypatch.setitem(models.CONFIGS, kind, parts)
        monkeypatch.setitem(models.SIDES, kind, 16)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("edit", "mfx")]  # their loops: above


@pytest.mark.parametrize("topic", ["unet", "vae", *SLOW])
def test_the_rows_of_models_at_full_size(topic, small_sizes):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    rows = list(bench.TOPICS[topic](options(model="full", batch=[2], steps=2)))
    for row in rows:
        assert min(row.ours) > 0 and min(row.theirs) > 0
        assert row.difference is None or row.difference < (0.2 if "bf16" in row.what else 1e-4), row
    assert any("bf16" in row.what for row in rows) and len({row.what for row in rows}) == len(rows)


def test_without_peers_our_times_stand_alone(small_sizes, monkeypatch):
    monkeypatch.setattr(peers, "is_installed", lambda: False)
    for topic in ("unet", "edit", "mfx"):
        for row in bench.TOPICS[topic](options(model="full", batch=[1], steps=2, dtype="fp32")):
            assert "is not installed" in clock.format_row(row)[-1] and min(row.ours) > 0


def test_the_usual_splatting_gives_the_same(monkeypatch):
    x, flow, metric = warp.make_inputs((2, 3, 20, 30), "cpu")
    ours = softsplat(x, flow, metric, "soft")
    assert relative_error(warp.index_add_soft(x, flow, metric), ours) <= 1e-4
    monkeypatch.setattr(warp, "SHAPES", ((1, 2, 8, 9),))
    assert all(row.difference <= 1e-4 and row.what == "9x8x2" for row in warp.splatting(options()))
