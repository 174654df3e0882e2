"""Splatting against brute force and against its twin; flows, files, collages against what geometry says they are."""

import math
import shutil
import subprocess
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import splat
import warp
from kernels import compile as native

MODES = ["sum", "avg", "linear", "soft"]
REAL = Path(__file__).parents[2] / "shared/real"
compiled = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")


def random_case(seed, B=2, C=3, H=9, W=7, reach=4.0, spread=3.0):
    """x, flow, metric. Flows are multiples of 1/64 pixel: positions are exact in float32 and float64 alike."""
    g = torch.Generator().manual_seed(seed)
    x, metric = torch.randn(B, C, H, W, generator=g), spread * torch.randn(B, 1, H, W, generator=g)
    return x, (reach * torch.randn(B, 2, H, W, generator=g) * 64).round() / 64, metric


def brute_force(x, flow, metric, mode):
    """The definition, one source pixel and one target at a time, in float64."""
    x, flow, metric = (t.double().numpy() for t in (x, flow, metric))
    B, C, H, W = x.shape
    landed = [[[[] for _ in range(W)] for _ in range(H)] for _ in range(B)]
    for n, j, i in np.ndindex(B, H, W):
        X, Y = i + flow[n, 0, j, i], j + flow[n, 1, j, i]
        if not (np.isfinite(X) and np.isfinite(Y)):
            continue
        for v in range(max(0, math.floor(Y)), min(H, math.floor(Y) + 2)):
            for u in range(max(0, math.floor(X)), min(W, math.floor(X) + 2)):
                b = max(0, 1 - abs(u - X)) * max(0, 1 - abs(v - Y))
                if b > 0:
                    landed[n][v][u].append((b, metric[n, 0, j, i], x[n, :, j, i]))
    out, holes = np.zeros_like(x), np.ones((B, 1, H, W), bool)
    for n, v, u in np.ndindex(B, H, W):
        if sources := landed[n][v][u]:
            b, z, colour = map(np.array, zip(*sources))
            a = b * {"sum": 1, "avg": 1, "linear": z, "soft": np.exp(z - z.max())}[mode]
            out[n, :, v, u] = (a[:, None] * colour).sum(0) / (1 if mode == "sum" else a.sum())
            holes[n, 0, v, u] = False
    return torch.from_numpy(out), torch.from_numpy(holes)


def both_ways(x, flow, metric, mode, dtype=torch.float64):
    """Value, normaliser and gradients: by the kernel, and by plain PyTorch in `dtype`."""
    results = []
    for run, kind in ((splat.Splat.apply, torch.float32), (splat.softsplat_plain, dtype)):
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


# --- softsplat -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed, shape", list(enumerate([(2, 3, 9, 7), (1, 1, 1, 12), (3, 6, 12, 1), (1, 4, 17, 23)])))
def test_softsplat_is_the_definition(mode, seed, shape):
    x, flow, metric = random_case(seed, *shape)
    if mode == "linear":
        metric = metric.abs() + 0.1
    flow[0, seed % 2, 0, 0] = [torch.nan, torch.inf, -torch.inf, 1e30][seed]
    expected, holes = brute_force(x, flow, metric, mode)
    for out, empty in (warp.softsplat(x, flow, metric, mode, holes=True), plain(x, flow, metric, mode)):
        assert (out - expected).abs().max() <= 1e-5
        assert torch.equal(empty, holes) and holes.any()


def plain(x, flow, metric, mode):
    out, norm = splat.softsplat_plain(x, flow, metric if mode in ("linear", "soft") else None, mode)
    return out, norm == 0


@pytest.mark.parametrize("mode", MODES)
def test_plain_gradients_are_finite_differences(mode):
    x, flow, metric = (t.double() for t in random_case(4, 1, 2, 4, 5, reach=1.5, spread=1.0))
    flow += 1 / 128  # no position is whole: there the derivative has a kink
    leaves = [t.requires_grad_() for t in (x, flow, metric.abs() + 0.5)]
    assert torch.autograd.gradcheck(lambda *a: warp.softsplat(*a, mode), leaves)


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


def test_extreme_metrics_stay_finite_and_the_winner_takes_all():
    x, flow, _ = random_case(7, 1, 3, 8, 8)
    for scale in (1000.0, -1000.0):
        metric = scale * torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        assert warp.softsplat(x, flow, metric).isfinite().all()
    here, there = torch.zeros(1, 2, 1, 2), torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]]])
    x = torch.tensor([[[[3.0, 5.0]]]])
    assert torch.equal(warp.softsplat(x, there, torch.tensor([[[[1000.0, -1000.0]]]])), torch.tensor([[[[0.0, 3.0]]]]))
    # Beyond the clip all are equal, and mix.
    mixed = warp.softsplat(x, there, torch.tensor([[[[-999.0, -990.0]]]]), clip=20)
    assert torch.equal(mixed, torch.tensor([[[[0.0, 4.0]]]]))
    assert torch.equal(warp.softsplat(x, here, torch.tensor([[[[-1e30, 1e30]]]])), x)


@pytest.mark.parametrize("mode", MODES)
def test_identity_and_whole_shifts_are_exact(mode):
    x, flow, metric = random_case(8, 2, 3, 8, 10)
    metric = torch.ones_like(metric)
    assert torch.equal(warp.softsplat(x, 0 * flow, metric, mode), x)
    flow[:, 0], flow[:, 1] = 3, -2
    out, holes = warp.softsplat(x, flow, metric, mode, holes=True)
    assert torch.equal(out[:, :, :6, 3:], x[:, :, 2:, :7])
    assert holes[:, :, 6:].all() and holes[..., :3].all() and not holes[:, :, :6, 3:].any()
    assert (out * holes == 0).all()


def test_zero_flow_has_a_useful_gradient():
    """A network that predicts no motion at first must still learn from it: the derivative at a kink is the right's."""
    x = torch.arange(5.0).view(1, 1, 1, 5)
    flow = torch.zeros(1, 2, 1, 5, requires_grad=True)
    assert torch.autograd.grad(warp.softsplat(x, flow, None, "avg").sum(), flow)[0][0, 0].abs().sum() > 0


def test_other_types_and_layouts():
    x, flow, metric = random_case(9)
    full = warp.softsplat(x, flow, metric)
    half = warp.softsplat(x.half(), flow, metric)
    assert half.dtype == torch.half and (half - full).abs().max() < 5e-3
    assert warp.softsplat(x.double(), flow, metric).dtype == torch.float64
    strided = [t.to(memory_format=torch.channels_last) for t in (x, flow, metric)]
    assert torch.equal(warp.softsplat(*strided), full)
    assert warp.softsplat(x[:0], flow[:0], metric[:0]).shape == (0, 3, 9, 7)


def test_softsplat_says_what_is_wrong():
    x, flow, metric = random_case(10)
    for args in (
        (x, flow, metric, "max"), (x, flow, None, "soft"), (x, flow[:, :1], metric), (x, flow, metric[..., :2]),
        (x.int(), flow, metric), (x, flow.to("meta"), metric),
    ):
        with pytest.raises(ValueError):
            warp.softsplat(*args)


def test_without_a_compiler_there_is_one_warning(monkeypatch, tmp_path):
    x, flow, metric = random_case(11)
    expected = warp.softsplat(x, flow, metric)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    splat.kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="plain PyTorch.*no C\\+\\+ compiler"):
            assert (warp.softsplat(x, flow, metric) - expected).abs().max() < 1e-5
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warp.softsplat(x, flow, metric)
    finally:
        splat.kernels.cache_clear()


@compiled
def test_the_library_is_cached_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.compile_cpu("softsplat", splat.SHIM)
    (library,) = (tmp_path / "photo-editing").iterdir()  # no leftovers
    before = library.stat().st_mtime_ns
    native.compile_cpu("softsplat", splat.SHIM)
    assert library.stat().st_mtime_ns == before
    (tmp_path / "file").touch()  # no folder can be made here: compiled all the same
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    native.compile_cpu("softsplat", splat.SHIM)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_nvcc_compiles_the_kernel(tmp_path):
    (tmp_path / "kernel.cu").write_text(splat.KERNEL)
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)]
    command = ["nvcc", *targets, "-fatbin", "-Werror=all-warnings", "-o", "kernel.fatbin", "kernel.cu"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "kernel.fatbin").stat().st_size > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mode", MODES)
def test_gpu_is_the_plain_twin(mode):
    x, flow, metric = (t.cuda() for t in random_case(12, 2, 6, 65, 130))
    assert splat.kernels(x.device)
    assert_twins(both_ways(x, flow, metric.abs() + 0.1, mode), 1e-4)


# --- flows -----------------------------------------------------------------------------------------------------------


def translation(dx, dy, H=24, W=32):
    return torch.tensor([dx, dy]).view(1, 2, 1, 1).expand(1, 2, H, W).clone()


def rotation(degrees, H=48, W=48):
    angle, (y, x) = math.radians(degrees), torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    x, y = x - (W - 1) / 2, y - (H - 1) / 2
    c, s = math.cos(angle), math.sin(angle)
    return torch.stack([c * x - s * y - x, s * x + c * y - y])[None]


def test_backwarp_undoes_a_shift():
    x = random_case(13, 2, 3, 8, 10)[0]
    flow = translation(3.0, -2.0, 8, 10).expand(2, -1, -1, -1)
    y, valid = warp.backwarp(x, flow, mask=True)
    assert (y[:, :, 2:, :7] - x[:, :, :6, 3:]).abs().max() < 1e-5
    assert valid[:, :, 2:, :7].all() and valid.sum() == 2 * 6 * 7 and (y * ~valid == 0).all()
    edge = warp.backwarp(x, flow, "border")
    assert (edge[:, :, 0, :7] - x[:, :, 0, 3:]).abs().max() < 1e-5
    with pytest.raises(ValueError):
        warp.backwarp(x, flow, "reflect")


def test_backwarp_of_lost_flow_is_zero_and_its_gradient_finite():
    x, flow, _ = random_case(14, 1, 1, 5, 6)
    flow[0, 0, 2, 3], flow[0, 1, 0, 0] = torch.nan, torch.inf
    flow.requires_grad_()
    y, valid = warp.backwarp(x, flow, "border", mask=True)
    assert y[0, 0, 2, 3] == 0 and not valid[0, 0, 2, 3] and y.isfinite().all()
    assert torch.autograd.grad(y.sum(), flow)[0].isfinite().all()


def test_composed_translations():
    f02 = warp.compose_flow(translation(3.25, 1.0), translation(-1.5, 2.0))
    inside = f02.isfinite().all(1)[0]
    assert (f02[0, :, inside] - torch.tensor([[1.75], [3.0]])).abs().max() < 1e-4
    assert inside[:23, :29].all() and not inside[23:].any() and not inside[:, 29:].any()
    f03 = warp.compose_flow(f02, translation(0.0, 0.0))  # what is lost stays lost, and what has left since is lost too
    assert torch.equal(f03.isfinite().all(1)[0], inside & (torch.arange(24)[:, None] + 3 < 24))


def test_composed_rotations():
    flow, step = rotation(3.0), rotation(3.0)
    for _ in range(9):
        flow = warp.compose_flow(flow, step)
    error = (flow - rotation(30.0)).norm(dim=1)
    middle = error[:, 8:-8, 8:-8]  # never near the edge, beyond which the edge's flow is read for half a pixel
    assert error.nanmedian() < 1e-4 and middle.max() < 1e-4
    assert error.nan_to_num(0).max() < 10 * 0.5 * math.radians(3) and error.isfinite().float().mean() > 0.8


def test_consistency_finds_the_occluded():
    """A square moves 6 pixels to the right over a still background: what it comes to cover has no way back."""
    f01, f10 = torch.zeros(1, 2, 20, 30), torch.zeros(1, 2, 20, 30)
    f01[0, 0, 5:15, 5:15], f10[0, 0, 5:15, 11:21] = 6, -6
    consistent = warp.forward_backward_consistency(f01, f10)[0, 0]
    covered = torch.zeros(20, 30, dtype=torch.bool)
    covered[5:15, 15:21] = True
    assert torch.equal(~consistent, covered)
    assert not warp.forward_backward_consistency(f01 + 40, f10).any()


def test_flo_round_trip(tmp_path):
    flow = random_case(15, 1, 3, 5, 8)[1][0]
    flow[0, 1, 2] = torch.nan
    warp.write_flo(tmp_path / "f.flo", flow)
    assert torch.equal(warp.read_flo(tmp_path / "f.flo").nan_to_num(7), flow.nan_to_num(7))
    assert [p.name for p in tmp_path.iterdir()] == ["f.flo"]
    head = (tmp_path / "f.flo").read_bytes()[:12]
    assert np.frombuffer(head, "<f4", 1)[0] == 202021.25 and np.frombuffer(head, "<i4", 2, 4).tolist() == [8, 5]
    other = cv2.readOpticalFlow(str(tmp_path / "f.flo"))  # another's reader
    assert np.array_equal(other[0], flow[:, 0].T.numpy())


def test_bad_flo_files(tmp_path):
    warp.write_flo(tmp_path / "good.flo", torch.zeros(2, 3, 4))
    good = (tmp_path / "good.flo").read_bytes()
    huge = good[:4] + np.array([2**31 - 1, 2**31 - 1], "<i4").tobytes()
    for bad in (b"", b"PIEH", good[:-1], good + b"\0", b"JPEG" + good[4:], huge, good[:4] + b"\xff" * 8 + good[12:]):
        (tmp_path / "bad.flo").write_bytes(bad)
        with pytest.raises(ValueError, match=r"bad\.flo"):
            warp.read_flo(tmp_path / "bad.flo")
    with pytest.raises(ValueError):
        warp.write_flo(tmp_path / "x.flo", torch.zeros(1, 2, 3, 4))
    with pytest.raises(OSError):
        warp.write_flo(tmp_path / "nowhere" / "x.flo", torch.zeros(2, 3, 4))


def test_flow_colours():
    flow = torch.zeros(1, 2, 1, 5)
    flow[0, :, 0, 1:] = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [1.0, 0.0], [torch.nan, 0.0]]).T
    white, red, cyan, pink, black = [[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 0.5, 0.5], [0, 0, 0]]
    expected = torch.tensor([white, red, cyan, pink, black]).float()
    assert torch.allclose(warp.flow_to_colour(flow)[0, :, 0].T, expected, atol=1e-5)


@pytest.mark.skipif(not (REAL / "flow.flo").exists(), reason="no shared/real")
def test_real_frames_line_up():
    one, two = (
        torch.from_numpy(cv2.imread(f"{REAL}/{name}.png")).permute(2, 0, 1)[None] / 255 for name in ("one", "two")
    )
    flow = warp.read_flo(REAL / "flow.flo")[None]
    back = warp.backwarp(two, flow)
    metric = -20 * (one - back).abs().mean(1, keepdim=True)  # Magic Fixup's importance
    still = (one - two).abs().mean()
    for mode in ("avg", "soft"):
        out, holes = warp.softsplat(one, flow, metric, mode, clip=20 if mode == "soft" else None, holes=True)
        assert holes.float().mean() < 0.2
        assert ((out - two) * ~holes).abs().mean() < 0.5 * still
    assert (back - one).abs().mean() < 0.5 * still


# --- the collage -----------------------------------------------------------------------------------------------------


def scene(H=60, W=80):
    """An image of noise, and flow, segments and depth of a still background without segments."""
    image = torch.rand(3, H, W, generator=torch.Generator().manual_seed(16))
    return image, torch.zeros(2, H, W), torch.zeros(H, W, dtype=torch.long), torch.full((H, W), 9.0)


def test_a_rigidly_moved_rectangle_matches_to_the_pixel():
    image, flow, segments, depth = scene()
    segments[10:30, 20:40], depth[10:30, 20:40] = 1, 2
    flow[0, segments == 1], flow[1, segments == 1] = 15, 7
    outliers = torch.rand(60, 80, generator=torch.Generator().manual_seed(2)) < 0.2
    flow[:, (segments == 1) & outliers] = 60.0  # robust: a fifth of the vectors are wrong
    out, holes, source = warp.piecewise_affine_warp(image, flow, segments, depth)
    expected, left = image.clone(), segments == 1
    expected[:, 17:37, 35:55], left[17:37, 35:55] = image[:, 10:30, 20:40], False
    assert torch.equal(holes, left)
    assert ((out - expected) * ~left).abs().max() < 1e-3 and (out * left == 0).all()
    assert torch.equal(source.isnan().any(-1), left)
    assert (source[20, 40] - torch.tensor([25.0, 13.0])).abs().max() < 1e-3
    assert torch.equal(source[50, 70], torch.tensor([70.0, 50.0]))


def test_a_turned_and_scaled_segment_comes_from_where_it_should():
    image, flow, segments, depth = scene()
    image = torch.nn.functional.avg_pool2d(image, 9, 1, 4)  # smooth, so that positions can be read off colours
    segments[20:40, 30:50] = 3
    y, x = torch.meshgrid(torch.arange(60.0), torch.arange(80.0), indexing="ij")
    c, s = 1.4 * math.cos(0.5), 1.4 * math.sin(0.5)
    X, Y = 40 + c * (x - 40) - s * (y - 30), 30 + s * (x - 40) + c * (y - 30)
    flow = torch.stack([X - x, Y - y]) * (segments == 3)
    out, holes, source = warp.piecewise_affine_warp(image, flow, segments, depth)
    moved = (source[30, 40] - torch.tensor([40.0, 30.0])).abs().max()
    assert moved < 1e-2
    u, v = x - 40, y - 30
    back = torch.stack([40 + (c * u + s * v) / 1.96, 30 + (c * v - s * u) / 1.96], -1)
    on = (back[..., 0] > 30.5) & (back[..., 0] < 48.5) & (back[..., 1] > 20.5) & (back[..., 1] < 38.5)
    assert (source[on] - back[on]).abs().max() < 2e-2 and not holes[on].any()
    flow = (source - torch.stack([x, y], -1)).permute(2, 0, 1)[None]
    assert ((warp.backwarp(image[None], flow)[0] - out) * on).abs().max() < 1e-3  # the grid and the picture agree


def test_nearer_segments_cover_farther_ones():
    image, flow, segments, depth = scene()
    segments[10:20, 10:20], segments[10:20, 40:50] = 1, 2
    flow[0, segments == 1] = 30
    for near, expected in ((1, image[:, 10:20, 10:20]), (2, image[:, 10:20, 40:50])):
        depth[segments == 1], depth[segments == 2] = (1, 5) if near == 1 else (5, 1)
        out, _, _ = warp.piecewise_affine_warp(image, flow, segments, depth)
        assert (out[:, 10:20, 40:50] - expected).abs().max() < 1e-3


def test_segments_without_a_fit_go_with_the_flow():
    image, flow, segments, depth = scene()
    segments[0, 0], segments[10:20, 10:20] = 1, 2  # one pixel; flow unknown everywhere
    flow[0, 0, 0], flow[:, 10:20, 10:20] = 5, torch.nan
    out, holes, _ = warp.piecewise_affine_warp(image, flow, segments, depth)
    assert holes[10:20, 10:20].all() and holes[0, 0] and holes.sum() == 101
    assert (out[:, 0, 5] - (image[:, 0, 0] + image[:, 0, 5]) / 2).abs().max() < 1e-5  # both land there
    metric = torch.zeros(60, 80)
    metric[0, 0] = 100
    out, _, _ = warp.piecewise_affine_warp(image, flow, segments, depth, metric)
    assert (out[:, 0, 5] - image[:, 0, 0]).abs().max() < 1e-5


def test_a_segment_may_leave_the_picture():
    image, flow, segments, depth = scene()
    segments[10:20, 10:20] = 1
    flow[0, segments == 1] = 500
    out, holes, source = warp.piecewise_affine_warp(image, flow, segments, depth)
    assert torch.equal(holes, segments == 1) and not out.isnan().any()
    with pytest.raises(ValueError):
        warp.piecewise_affine_warp(image, flow, segments[1:], depth)
