"""-m bench's own parts on invented timings and logs, and its peers' loops, which must give what ours give."""

import ctypes
import itertools
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion
import mfx
import pairs
import unet
import vae
import warp
from bench import __main__ as bench
from bench import clock as bench_clock
from bench import edits as bench_edits
from bench import models as bench_models
from bench import page as bench_page
from bench import peers as bench_peers
from bench import scale as bench_scale
from bench import training as bench_training
from bench import warp as bench_warp
from bench.clock import alternate, compare, ratio, summary, turns
from sample import edit, fixup
from tests import small


def options(**more):
    return SimpleNamespace(**dict(rounds=1, model=None, size=None, steps=None, batch=None, dtype=None, tmp=None,
                                  device=torch.device("cpu"), log=None) | more)


@pytest.fixture(autouse=True)
def nothing_held():
    bench_clock.HELD.clear()
    yield
    bench_clock.HELD.clear()


@pytest.fixture
def clock(monkeypatch):
    """-> works(seconds): a function that takes so long by the clock, and no time."""
    now = [0.0]
    monkeypatch.setattr(bench_clock.time, "perf_counter", lambda: now[0])

    def works(seconds, result=None):
        def f():
            now[0] += seconds
            return result
        return f

    return works


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def test_turns_alternate_and_the_order_does_too():
    seen = []
    runs = {name: partial(seen.append, name) for name in "ab"}
    assert turns(runs, options(rounds=3)) == {"a": [None] * 3, "b": [None] * 3}
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"  # the first two warm up


def test_rounds_end_when_the_time_is_up_but_one_is_made(clock):
    limit, most = bench_clock.LIMIT, bench_clock.MOST
    for each, rounds in ((1, most), (limit / 5, 2), (limit, 1)):
        s, _ = alternate({"a": clock(each), "b": clock(each)}, options(rounds=None))
        assert s == {"a": [pytest.approx(each)] * rounds, "b": [pytest.approx(each)] * rounds}
    assert len(alternate({"a": clock(limit)}, options(rounds=4))[0]["a"]) == 4  # asked for, so made


def test_what_is_short_is_repeated(clock):
    calls = []
    short = clock(bench_clock.SHORTEST / 10)
    s, _ = alternate({"a": lambda: calls.append(short())}, options(rounds=2))
    assert s["a"] == [pytest.approx(bench_clock.SHORTEST / 10)] * 2 and len(calls) == 2 + 2 * 10


def test_compare_and_the_ratio(clock):
    x = torch.tensor([1.0, -4.0])
    figures = compare(options(rounds=3), clock(2, x), clock(8, x + 0.01), "theirs", at_most=0.5)
    assert figures["ours"]["median"] == pytest.approx(2) and figures["its time"]["median"] == pytest.approx(8)
    assert figures["ours / peer"]["median"] == pytest.approx(0.25)  # below 1: ours is faster
    assert (figures["peer"], figures["at most"]) == ("theirs", 0.5)
    assert figures["difference"] == pytest.approx(0.01 / 3.99, rel=1e-4)
    alone = compare(options(), clock(2, x), None, "theirs")
    assert alone["peer"] == "theirs: not installed" and alone["ours"]["n"] == 1 and alone["ours / peer"] is None


def test_a_ratio_is_the_medians_and_its_spread_the_rounds():
    r = ratio([1.0, 2.0, 6.0], [4.0, 4.0, 4.0])
    assert (r["median"], r["low"], r["high"], r["n"]) == (0.5, 0.25, 1.5, 3)
    assert bench_clock.rates(10, [2.0, 5.0, 1.0])["median"] == 5


def test_a_process_of_its_own(monkeypatch):
    assert bench_clock.in_own_process("bench.page.short", x=2) == "2"
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback ..\n  ..\nValueError: broken\n")
    monkeypatch.setattr(bench_clock.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="ValueError: broken"):
        bench_clock.in_own_process("bench.page.short", x=2)


# ---------------------------------------------------------------------------------------------------------------------
# The log, tables, the page


def record(topic="unet", row="SD", run="2030-01-01T00:00:00Z", device="cpu", figures=None, gpu=None):
    if figures is None:
        figures = {"ours": summary([0.05, 0.04, 0.06], "s"), "peer": "diffusers"}
    return {"topic": topic, "device": device, "row": row, "figures": figures, "run": run,
            "command": f"python -m bench {topic}", "versions": {"torch": "9.9", "ours": "abc"},
            "machine": {"cpu": "A processor", "cores": 2, "threads": 2, "gpu": gpu, "others": 0}}


def test_a_table():
    text = bench_page.table([
        record(row="a", figures={"ours": summary([3.0, 1.0, 2.5], "s"), "x": 0.123456, "empty": None}),
        record(row="b", figures={"ours": summary([0.004], "s"), "x": 1234567, "empty": None}),
        record(row="c", figures={"r": ratio([1.0], [4.0]), "%": summary([0.5, 0.25], "%")}),
        record(row="d", figures={"failed": "ImportError: no such thing"}),
    ])
    first, second, failed = text.split("\n\n")
    assert [[c.strip() for c in line.split("|")[1:-1]] for line in first.splitlines() if "--" not in line] == [
        ["", "ours", "x"], ["a", "2.5 s (1 .. 3)", "0.123"], ["b", "4 ms (once)", "1,234,567"]]
    assert len({len(line) for line in first.splitlines()}) == 1
    assert "0.25" in second and "37.5 % (25 .. 50)" in second
    assert failed == "- d: not measured, ImportError: no such thing"


@pytest.mark.parametrize(("x", "text"), [(0, "0"), (5, "5"), (0.5, "0.5"), (3.676, "3.68"), (132.4, "132"),
                                         (999.7, "1,000"), (2e-6, "2e-06"), (-41.26, "-41.3")])
def test_numbers(x, text):
    assert bench_page.short(x) == text


def test_the_log_is_read_back(tmp_path):
    log = tmp_path / "new" / "bench.jsonl"
    records = [record(row="ä"), record(run="2031-01-01T00:00:00Z")]
    bench_page.append(log, records[0])
    assert bench_page.read(log) == records[:1]
    log.write_bytes(log.read_bytes()[:-1])  # not quite finished
    bench_page.append(log, records[1])
    assert bench_page.read(log) == records
    for wrong in ("{", "[]", "{}", '{"topic": 1}', "7"):
        log.write_text(wrong + "\n")
        bench_page.append(log, records[0])
        with pytest.raises(ValueError, match="line 1, is no record"):
            bench_page.read(log)
    with pytest.raises(FileNotFoundError, match="no log"):
        bench_page.read(tmp_path / "nothing.jsonl")


def test_the_newest_run_of_each_topic_and_device_counts():
    new, old = "2031-01-01T00:00:00Z", "2030-01-01T00:00:00Z"
    records = [record(row="a", run=new), record(row="b", run=old), record(row="c", run=new),
               record("vae", run=old), record(device="cuda", row="d", run=old)]
    last = bench_page.newest(records)
    assert [r["row"] for r in last["unet", "cpu"]] == ["a", "c"]
    assert set(last) == {("unet", "cpu"), ("vae", "cpu"), ("unet", "cuda")}


def points(what, values):
    return [record("scale", f"{what} {v}", figures={
        "what": what, "at": v, "time": summary([v / 100, v / 90], "s"), "peak GiB": v / 50}) for v in values]


def test_the_page_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "profiles.md").write_text("## Profiles\n\nBy hand.\n")
    for r in (record(), *points("size", (128, 256)), *points("steps", (5,))):  # of one point there is no curve
        bench_page.append("bench.jsonl", r)
    assert bench.main(["--page"]) == 0
    text = (tmp_path / "BENCHMARKS.md").read_text()
    assert "| SD  | 50 ms (40 .. 60) | diffusers |" in text
    assert "A processor, 2 cores, 2 threads; torch 9.9.\n" in text  # once, as it is the same for all
    assert "`python -m bench unet`, 2030-01-01, code at abc.\n" in text and text.count("A processor") == 1
    assert text.index("## On a CPU") < text.index("## On a GPU") < text.index("Not measured: no GPU was at hand.")
    assert "is open: no GPU was at hand" in text and text.endswith("## Profiles\n\nBy hand.\n")
    assert "One step of the UNet" in text  # what is measured, from the topic's docstring
    assert 'src="benchmarks/size-cpu.png"' in text and "steps-cpu" not in text
    assert Image.open(tmp_path / "benchmarks/size-cpu.png").size == (4 * 420, 2 * 280)
    assert not list(tmp_path.rglob(".*"))


def test_the_page_with_a_gpu(tmp_path):
    """3.84 million samples at 10 a second are 106.7 hours."""
    full = bench_models.NAMES["full"]
    trained = [record("train", f"{full}, batch 4", device="cuda", gpu="NVIDIA H100",
                      figures={"samples a second": summary([rate])}) for rate in (9.0, 10.0)]
    failed = record("train", f"{full}, batch 64", device="cuda", figures={"failed": "OutOfMemoryError: .."})
    cut = record("pairs", figures={"clips cut a second": summary([0.5]), "pairs read a second": summary([60.0])})
    about = {name: ("title", "text") for name in bench.TOPICS}
    text = bench_page.page([*trained, failed, cut], about, tmp_path)
    assert "no GPU was at hand" not in text and "NVIDIA H100; A processor" in text and text.count("A processor") == 2
    assert "3.84 million" in text and "107 hours" in text and "they eight times as fast, 13." in text
    slower = 10 * 312 / 989
    assert f"{slower:.1f} samples a second: {3.84e6 / slower / 3600:.0f} hours alone" in text
    assert "58 days of one process" in text and "1.4 hours of a thousand" in text
    assert bench_training.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert bench_training.peak_flops("NVIDIA H100 PCIe") < bench_training.peak_flops("NVIDIA H100 80GB HBM3")
    assert bench_training.peak_flops("some other") is None and bench_scale.on_an_a100(1, "some other") is None


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(("argv", "what"), [
    (["nothing"], "no topic 'nothing': choose load, unet"), ([], "say what to measure"),
    (["unet", "--batch", "2,x"], "'x' is not a whole number"), (["unet", "--rounds", "0"], "in 1 .. 1000"),
    (["--page", "--log", "absent.jsonl"], "there is no log absent.jsonl"),
    (["unet", "--tmp", "absent"], "--tmp absent is not a folder"), (["unet", "--device", "abacus"], "abacus"),
])
def test_mistakes_get_one_line(argv, what, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and what in lines[0], lines
    assert not list(tmp_path.iterdir())


def test_rows_are_logged_and_the_failed_ones_told(tmp_path, monkeypatch, capsys):
    def topic(o):
        return {"works": lambda: compare(o, lambda: torch.ones(2), lambda: torch.ones(2), "twin"),
                "is missing": lambda: __import__("no_such_peer"), "breaks": lambda: 1 / 0}

    monkeypatch.setattr(bench, "TOPICS", {"mine": ("My topic", topic)})
    monkeypatch.setattr(bench_page, "others", lambda: 2.0)
    assert bench.main(["all", "--rounds", "2", "--tmp", str(tmp_path), "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert "My topic" in out and "| works |" in out
    assert "- breaks: not measured, ZeroDivisionError: division by zero" in out
    assert "other programs keep 2 cores busy" in err and err.count("Traceback") == 1
    works, missing, breaks = bench_page.read(tmp_path / "bench.jsonl")
    assert works["figures"]["ours"]["n"] == 2 and works["figures"]["difference"] == 0
    assert "no_such_peer" in missing["figures"]["failed"] and "failed" in breaks["figures"]
    assert works["machine"]["others"] == 2 and works["versions"]["torch"] == torch.__version__


def test_every_topic_has_rows_and_says_what_it_measures():
    for name, (title, f) in bench.TOPICS.items():
        assert title and f.__doc__, name
        for more in ({}, {"model": "toy", "dtype": "fp32", "batch": [1, 3], "size": 64, "steps": 2}, {"dtype": "auto"}):
            rows = f(options(**more))
            assert rows and all(map(callable, rows.values())), name
    assert set(bench.CPU_ALONE) < set(bench.TOPICS)


# ---------------------------------------------------------------------------------------------------------------------
# The peers


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def picture(size=16, seed=0):
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_published_loop_gives_our_change_map_edit(prediction):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    model, mu = small.stable_diffusion(prediction=prediction), bench_edits.ramp(16)
    pipe = bench_peers.pipeline(model, torch.float32)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    got = edit(model, "a blue circle", picture(), mu, steps=5)
    want = bench_peers.published_change_map(pipe, "a blue circle", picture(), mu, noise, 5)
    assert relative_error(got, want) <= 1e-4
    assert relative_error(edit(model, "a blue circle", picture(), 0 * mu, steps=5), want) > 1e-2  # the map matters
    assert relative_error(edit(model, "cats", picture(), mu, steps=5), want) > 1e-4  # and the words do


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_straightforward_loop_gives_our_magic_fixup(prediction):
    pytest.importorskip("diffusers")
    model = small.magic_fixup(prediction)
    peer = bench_peers.fixup_peer(model)
    inputs = picture(), picture(seed=1), (picture(seed=2)[:, :1] > 0).float()
    got = fixup(model, *inputs, steps=5, seeds=[3])
    assert relative_error(got, bench_peers.straightforward_fixup(peer, *inputs, steps=5, seed=3)) <= 1e-4
    other = bench_peers.straightforward_fixup(peer, picture(seed=4), *inputs[1:], steps=5, seed=3)
    assert relative_error(other, got) > 1e-3  # the reference matters


@pytest.fixture
def small_sizes(monkeypatch):
    """A full size that is none, so that the code for it runs: the toy's sizes likewise."""
    parts = {"unet": small.SD1, "vae": vae.VAEConfig((32, 64)), "text_encoder": replace(small.TEXT, vocab_size=600)}
    monkeypatch.setattr(bench_edits, "in_own_process", lambda _, **arguments: bench_edits.edit_once(**arguments))
    monkeypatch.setattr(bench_edits, "hold_memory", lambda: None)
    for kind in ("full", "toy"):
        monkeypatch.setitem(bench_models.CONFIGS, kind, parts)
        monkeypatch.setitem(bench_models.SIDES, kind, 16)


@pytest.mark.parametrize("topic", ["unet", "vae", "text", "edit", "skipping", "mfx"])
def test_the_rows_of_models_run_at_full_size(topic, small_sizes):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    rows = bench.TOPICS[topic][1](options(model="full", batch=[2], steps=3))
    for name, row in rows.items():
        figures = row()
        assert figures["ours"]["median"] > 0 and figures["ours / peer"]["median"] > 0
        apart = figures["difference"]
        assert apart is None or apart < (0.2 if "bf16" in name else 1e-4), (name, apart)
    assert any("bf16" in name for name in rows) or topic == "skipping"


def test_without_peers_our_times_stand_alone(small_sizes, monkeypatch):
    def absent(*_):
        raise ImportError("no diffusers here")

    monkeypatch.setattr(bench_peers, "unet_peer", absent)
    monkeypatch.setattr(bench_edits.importlib.util, "find_spec", lambda name: None)
    for topic in ("unet", "edit", "mfx"):
        rows = bench.TOPICS[topic][1](options(model="full", batch=[1], steps=2, dtype="fp32"))
        for row in rows.values():
            figures = row()
            assert "not installed" in figures["peer"] and figures["ours"]["median"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Training, splatting


def test_a_training_step_is_timed_and_nothing_is_kept():
    done = bench_training.step_once("toy", batch=1, checkpointing=False, device="cpu", rounds=1)
    assert len(done["seconds"]) == 1 and done["seconds"][0] > 0 and done["MiB"] > 0


def test_operations_are_counted_without_being_done(small_sizes):
    c = replace(small.SD1, in_channels=9)
    parts = unet.UNet(replace(c, context=None)), unet.UNet(replace(c, context=0)), vae.VAE(vae.VAEConfig((32, 64)))
    model = mfx.MagicFixup(*parts, diffusion.Schedule())
    model.unfreeze()
    batch = {name: torch.randn(1, 4, 8, 8) for name in ("reference", "target", "coarse")}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # of a fused one, not all is counted
        model.loss(batch | {"mask": torch.ones(1, 1, 8, 8)}).backward()
    assert bench_training.step_flops("full") == counter.get_total_flops()


def test_a_loader_makes_as_many_pairs_as_were_asked_for(monkeypatch):
    made = []
    monkeypatch.setattr(bench_scale, "DataLoader", lambda data, **_: made.append(len(data)) or range(len(data)))
    monkeypatch.setattr(bench_scale.time, "perf_counter", itertools.count(0, 2).__next__)
    assert bench_scale.pairs_a_second(3, size=16, count=64) == (64 + 12 - 6) / 2 and made == [76]
    assert len(pairs.ToyPairs(made[0], size=16)) == 76


def test_the_kernel_of_a_thread_per_element(tmp_path):
    """As the GPU would run it, thread after thread."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    shim = Path(warp.__file__).parent / "kernels/softsplat_cpu.cpp"
    shim, found, _ = shim.read_text().partition('#include "softsplat.cu"')
    assert found
    program = shim + bench_warp.PER_ELEMENT + """
        extern "C" void run(const float* x, const float* flow, float* out, int planes, int C, int H, int W) {
            Index at = {0, 0, 0};
            for (at.z = 0; at.z < (unsigned)planes; at.z++)
                for (at.x = 0; at.x < (unsigned)W + 3; at.x++) {
                    blockIdx = at;
                    splat_each(x, flow, out, C, H, W);
                }
        }"""
    (tmp_path / "kernel.cpp").write_text(program)
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-pthread", "-w", tmp_path / "kernel.cpp", "-o",
                    tmp_path / "kernel.so"], check=True)
    library = ctypes.CDLL(str(tmp_path / "kernel.so"))

    def launch(name, shape, x, flow, out, C, H, W):
        assert name == "splat_each" and shape == (x.shape[0] * C, H, W) == (x.shape[0] * x.shape[1], *x.shape[2:])
        library.run(*(ctypes.c_void_p(t.data_ptr()) for t in (x, flow, out)), shape[0], C, H, W)

    x, flow, metric = bench_warp.sample((2, 3, 20, 30), "cpu")
    got = bench_warp.per_element_soft(x, flow, metric, launch)
    ours = warp.softsplat(x, flow, metric)
    assert relative_error(got, ours) <= 1e-4
    assert relative_error(bench_warp.index_add_soft(x, flow, metric), ours) <= 1e-4


def test_the_share_of_bandwidth():
    """A picture of 3 channels: 6 planes read, 3 written, of 4 bytes."""
    share = bench_warp.share_of_bandwidth((1, 3, 10, 10), summary([1.0, 2.0, 4.0], "s"), available=7200)
    assert (share["median"], share["low"], share["high"], share["unit"]) == (0.25, 0.125, 0.5, "%")
