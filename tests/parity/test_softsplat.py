"""Splatting's kernel against its plain twin, on a CPU and a GPU; how it is compiled."""

import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

import warp
from kernels import compile as kernels_compile
from kernels.compile import compile_cpu
from tests.flows import random_case

MODES = ["sum", "avg", "linear", "soft"]
FOLDER = Path(warp.__file__).parent / "kernels"
compiled = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")


def both_ways(x, flow, metric, mode, dtype=torch.float64):
    """Value, normaliser and gradients: by the kernel, and by plain PyTorch in `dtype`."""
    results = []
    for run, kind in ((warp.SoftsplatKernel.apply, torch.float32), (warp.softsplat_plain, dtype)):
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, flow, metric)]
        out, norm = run(*leaves[:2], leaves[2] if mode in ("linear", "soft") else None, mode)
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out)
        grads = torch.autograd.grad((out * seed).sum(), leaves, allow_unused=True)
        results.append([out.detach(), norm.detach(), *(g for g in grads if g is not None)])
    return results


def assert_twins(results, tolerance=2e-5):
    for ours, plain in zip(*results):
        assert ours.isfinite().all()
        assert (ours - plain).abs().max() <= tolerance * max(1.0, plain.abs().max().item())


@compiled
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["random", "borders", "pile", "whole", "lost", "extreme"])
def test_kernel_is_its_plain_twin(mode, case):
    x, flow, metric = random_case(5, 2, 5, 11, 13)
    if case == "borders":
        flow = (flow.sign() * 10.5) + 1 / 64
    if case == "pile":  # everything lands on one spot: every addition would be a race
        grid = torch.stack(torch.meshgrid(torch.arange(13), torch.arange(11), indexing="xy"))
        flow = (torch.tensor([4.25, 6.5]).view(2, 1, 1) - grid).expand(2, -1, -1, -1)
    if case == "whole":
        flow = flow.round()
    if case == "lost":
        flow[0, 0, 3], flow[1, 1, :, 4], flow[0, 0, 6], metric[1, 0, 5] = torch.nan, torch.inf, -torch.inf, torch.nan
    if case == "extreme":
        metric = 1000 * metric.sign()
    if mode == "linear":
        metric = metric.abs() + 0.1
    # A sum over a pile is as large as its terms, and derivatives divide by the least weight that landed: 2^-12.
    assert_twins(both_ways(x, flow, metric, mode), 1e-4)


@compiled
@pytest.mark.parametrize("mode", MODES)
def test_threads_do_not_change_a_bit(mode):
    x, flow, metric = random_case(6, 3, 2, 16, 16)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(both_ways(x, flow, metric.abs() + 0.1, mode)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_other_types_and_layouts():
    x, flow, metric = random_case(9)
    full = warp.softsplat(x, flow, metric)
    half = warp.softsplat(x.half(), flow, metric)
    assert half.dtype == torch.half and (half - full).abs().max() < 5e-3
    assert warp.softsplat(x.double(), flow, metric).dtype == torch.float64
    strided = [t.to(memory_format=torch.channels_last) for t in (x, flow, metric)]
    assert torch.equal(warp.softsplat(*strided), full)
    assert warp.softsplat(x[:0], flow[:0], metric[:0]).shape == (0, 3, 9, 7)


def test_without_a_compiler_there_is_one_warning(monkeypatch, tmp_path):
    x, flow, metric = random_case(11)
    expected = warp.softsplat(x, flow, metric)
    monkeypatch.setattr(kernels_compile.shutil, "which", lambda name: None)
    warp.load_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="plain PyTorch.*no C\\+\\+ compiler"):
            assert (warp.softsplat(x, flow, metric) - expected).abs().max() < 1e-5
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warp.softsplat(x, flow, metric)
    finally:
        warp.load_kernels.cache_clear()


@compiled
def test_the_library_is_cached_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source, header = tmp_path / "number.cpp", tmp_path / "number.h"
    source.write_text('#include "number.h"\nextern "C" int number() { return NUMBER; }\n')
    header.write_text("#define NUMBER 3\n")
    assert compile_cpu(source, header)("number") == 3
    (library,) = (tmp_path / "photo-editing").iterdir()  # no leftovers
    before = library.stat().st_mtime_ns
    assert compile_cpu(source, header)("number") == 3
    assert library.stat().st_mtime_ns == before
    header.write_text("#define NUMBER 4\n")  # what is included counts as well
    assert compile_cpu(source, header)("number") == 4
    (tmp_path / "file").touch()  # no folder can be made here: compiled all the same
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compile_cpu(source, header)("number") == 4
    header.write_text("#define\n")
    with pytest.raises(RuntimeError, match="failed"):
        compile_cpu(source, header)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_nvcc_compiles_the_kernel(tmp_path):
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)]
    command = ["nvcc", *targets, "-fatbin", "-Werror=all-warnings", "-o", tmp_path / "kernel.fatbin"]
    result = subprocess.run([*command, FOLDER / "softsplat.cu"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "kernel.fatbin").stat().st_size > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mode", MODES)
def test_gpu_is_the_plain_twin(mode):
    x, flow, metric = (t.cuda() for t in random_case(12, 2, 6, 65, 130))
    assert warp.load_kernels(x.device)
    assert_twins(both_ways(x, flow, metric.abs() + 0.1, mode), 1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_plain_gradients_are_finite_differences(mode):
    x, flow, metric = (t.double() for t in random_case(4, 1, 2, 4, 5, reach=1.5, spread=1.0))
    flow += 1 / 128  # no position is whole: there the derivative has a kink
    leaves = [t.requires_grad_() for t in (x, flow, metric.abs() + 0.5)]
    assert torch.autograd.gradcheck(lambda *a: warp.softsplat(*a, mode), leaves)


def test_zero_flow_has_a_useful_gradient():
    """A network that predicts no motion at first must still learn from it: the derivative at a kink is the right's."""
    x = torch.arange(5.0).view(1, 1, 1, 5)
    flow = torch.zeros(1, 2, 1, 5, requires_grad=True)
    assert torch.autograd.grad(warp.softsplat(x, flow, None, "avg").sum(), flow)[0][0, 0].abs().sum() > 0
