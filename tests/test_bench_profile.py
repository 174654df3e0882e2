"""bench/profile.py: every operator has a kind, none counts twice, and before and after are what they are said to be."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

import vae
from bench import __main__ as bench
from bench import clock as bench_clock
from bench import models as bench_models
from bench import page as bench_page
from bench import profile as bench_profile
from bench.profile import ALL, PATHS, REST, WORKS, by_kind, kind_of, profiled
from kernels.winograd import QuickConv2d, quicken
from tests import small

CPU = torch.device("cpu")


@pytest.fixture
def small_sizes(monkeypatch):
    """A full size that is none."""
    parts = {"unet": small.SD1, "vae": vae.VAEConfig((32, 64)), "text_encoder": replace(small.TEXT, vocab_size=600)}
    monkeypatch.setitem(bench_models.CONFIGS, "full", parts)
    monkeypatch.setitem(bench_models.SIDES, "full", 16)
    bench_clock.HELD.clear()
    yield
    bench_clock.HELD.clear()


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of work


@pytest.mark.parametrize(("operator", "kind"), [
    ("aten::mkldnn_convolution", "convolutions"), ("aten::_slow_conv2d_forward", "convolutions"),
    ("aten::cudnn_convolution", "convolutions"), ("aten::addmm", "matrix products"), ("aten::bmm", "matrix products"),
    ("aten::baddbmm", "matrix products"), ("aten::linear", "matrix products"), ("aten::native_group_norm", "norms"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"), ("aten::_softmax", "attention"),
    ("aten::silu", "activations and sums"), ("aten::add_", "activations and sums"),
    ("aten::exp", "activations and sums"), ("aten::expand", "copies and memory"), ("aten::copy_", "copies and memory"),
    ("aten::_to_copy", "copies and memory"), ("aten::constant_pad_nd", "copies and memory"),
    ("aten::empty_strided", "copies and memory"), ("aten::normal_", REST), ("aten::upsample_bilinear2d", REST),
    ("cudaLaunchKernel", REST), ("mine::add", REST), ("", REST),
])
def test_the_kind_of_an_operator(operator, kind):
    assert kind_of(operator) == kind


def event(key, microseconds, device=DeviceType.CPU):
    return SimpleNamespace(key=key, device_type=device, self_cpu_time_total=microseconds,
                           self_device_time_total=10 * microseconds)


def test_what_is_unknown_is_the_rest_and_kernels_are_not_counted_twice():
    events = [event("aten::mm", 1e6), event("aten::addmm", 2e6), event("mine::new", 4e6),
              event("a kernel of addmm", 8e6, DeviceType.CUDA)]
    assert by_kind(events) == dict.fromkeys(WORKS, 0.0) | {"matrix products": 3.0, REST: 4.0}
    assert by_kind(events, gpu=True) == dict.fromkeys(WORKS, 0.0) | {"matrix products": 30.0, REST: 40.0}


def test_a_convolution_is_one_until_it_is_made_quick():
    conv, x = nn.Conv2d(96, 96, 3, padding=1), torch.randn(1, 96, 32, 32)
    plain = by_kind(profiled(lambda: conv(x), CPU))
    assert plain["convolutions"] > 0 and plain["matrix products"] == 0
    quick = by_kind(profiled(lambda: quicken(conv)(x), CPU))
    assert quick["convolutions"] == 0 and quick["matrix products"] > 0


def test_the_kinds_are_all_of_the_time(small_sizes):
    run = bench_profile.whole_fixup("full", 16, 2, CPU, after=True)
    operators = profiled(run, CPU)
    seconds = by_kind(operators)
    assert sum(seconds.values()) == pytest.approx(operators.self_cpu_time_total / 1e6, rel=1e-6)
    assert all(seconds[kind] > 0 for kind in bench_profile.KINDS)
    rest = sum(e.count for e in operators if kind_of(e.key) == REST)
    assert rest < 0.05 * sum(e.count for e in operators)  # calls: some of each kind, none that takes long


def test_several_calls_are_that_many():
    x = torch.randn(8, 8)
    assert next(e.count for e in profiled(lambda: x @ x, CPU, calls=3) if e.key == "aten::mm") == 3


# ---------------------------------------------------------------------------------------------------------------------
# Before and after


def kept(network):
    """Does each quick convolution of a network keep its transformed weights? Nothing, where all are plain."""
    return {m.keep for m in network.modules() if isinstance(m, QuickConv2d)}


@pytest.mark.parametrize(("path", "networks", "expected"), [
    ("a UNet step", lambda run: [run.func], [{True}]), ("decoding", lambda run: [run.func.__self__], [{False}]),
    ("a Magic Fixup", lambda run: [getattr(run.args[0], name) for name in ("vae", "synthesizer", "extractor")],
     [{False}, {True}, {True}]),
])
def test_before_and_after_give_the_same(path, networks, expected, small_sizes):
    results = []
    for after in (False, True):
        torch.manual_seed(0)
        run = PATHS[path]("full", 16, 3, CPU, after)
        assert [kept(network) for network in networks(run)] == (expected if after else [set()] * len(expected))
        with torch.inference_mode():
            results.append(run())
    assert small.relative_error(*results) <= 1e-4


@pytest.mark.parametrize(("after", "batches"), [(False, [1, 1, 1, 1]), (True, [1, 3])])
def test_the_extractor_before_and_after(after, batches, small_sizes):
    run = bench_profile.whole_fixup("full", 16, 4, CPU, after)
    extractor = run.args[0].extractor
    assert small.count_calls(extractor.conv_in, run)[0] == batches


def test_the_rows(small_sizes, monkeypatch, tmp_path):
    started, kept = [], []

    def here(function, **arguments):
        started.append(arguments["after"])
        assert function == "bench.profile.once"
        return json.loads(json.dumps(bench_profile.once(**json.loads(json.dumps(arguments)))))

    monkeypatch.setattr(bench_profile, "in_own_process", here)
    monkeypatch.setattr(bench_profile, "hold_memory", lambda: kept.append(started[-1]))
    monkeypatch.setattr(bench_profile, "SHORTEST", 0.01)
    o = SimpleNamespace(device=CPU, rounds=2, model=None, size=None, steps=3, log=tmp_path / "bench.jsonl")
    records = bench.measure("profile", o, {})
    assert started == [False, True] * 3 and kept == [True] * 3  # a pair of processes for all rows of a path
    assert len(records) == len(PATHS) * (len(WORKS) + 1)
    assert records[-1]["row"] == f"a Magic Fixup, 3 steps, {bench_models.NAMES['full']}, 16x16: all"
    for r in records:
        f = r["figures"]
        assert list(f) == ["before", "share before", "after", "share after", "after / before"]
        assert f["before"]["unit"] == f["after"]["unit"] == "s"
        assert f["before"]["n"] == f["after"]["n"] == (2 if r["row"].endswith(f": {ALL}") else 1)
        if f["before"]["median"]:
            assert f["after / before"]["median"] == pytest.approx(f["after"]["median"] / f["before"]["median"])
    for i in range(0, len(records), len(WORKS) + 1):
        of_a_path = [r["figures"] for r in records[i : i + len(WORKS) + 1]]
        for share in ("share before", "share after"):
            assert sum(f[share] for f in of_a_path[:-1]) == pytest.approx(1, abs=0.004) and of_a_path[-1][share] is None
    assert len(bench_page.table(records).splitlines()) == 2 + len(records)  # one table
