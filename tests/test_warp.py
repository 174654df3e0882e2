"""Splatting against its definition; flows and the rigid collage against what geometry says."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import warp
from tests.flows import random_case, scene, translation

MODES = ["sum", "avg", "linear", "soft"]
REAL = Path(__file__).parents[2] / "shared/real"

# --- softsplat -------------------------------------------------------------------------------------


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
    out, norm = warp.softsplat_plain(x, flow, metric if mode in ("linear", "soft") else None, mode)
    return out, norm == 0


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


# --- flows -----------------------------------------------------------------------------------------


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


def test_composed_translations():
    f02 = warp.compose_flow(translation(3.25, 1.0), translation(-1.5, 2.0))
    inside = f02.isfinite().all(1)[0]
    assert (f02[0, :, inside] - torch.tensor([[1.75], [3.0]])).abs().max() < 1e-4
    assert inside[:23, :29].all() and not inside[23:].any() and not inside[:, 29:].any()
    border = warp.compose_flow(translation(3.25, 1.0), translation(-1.5, 2.0), "border")
    assert (border - torch.tensor([1.75, 3.0]).view(1, 2, 1, 1)).abs().max() < 1e-4
    f03 = warp.compose_flow(f02, translation(0.0, 0.0))  # what is lost stays lost, and what has left since is lost too
    assert torch.equal(f03.isfinite().all(1)[0], inside & (torch.arange(24)[:, None] + 3 < 24))


def test_consistency_finds_the_occluded():
    """A square moves 6 pixels to the right over a still background: what it comes to cover has no way back."""
    f01, f10 = torch.zeros(1, 2, 20, 30), torch.zeros(1, 2, 20, 30)
    f01[0, 0, 5:15, 5:15], f10[0, 0, 5:15, 11:21] = 6, -6
    consistent = warp.forward_backward_consistency(f01, f10)[0, 0]
    covered = torch.zeros(20, 30, dtype=torch.bool)
    covered[5:15, 15:21] = True
    assert torch.equal(~consistent, covered)
    assert not warp.forward_backward_consistency(f01 + 40, f10).any()


@pytest.mark.skipif(not (REAL / "flow.flo").exists(), reason="no shared/real")
def test_real_frames_line_up():
    one, two = (
        torch.from_numpy(cv2.imread(f"{REAL}/{name}.png")).permute(2, 0, 1)[None] / 255 for name in ("one", "two")
    )
    flow = torch.from_numpy(cv2.readOpticalFlow(f"{REAL}/flow.flo")).permute(2, 0, 1)[None]
    back = warp.backwarp(two, flow)
    metric = warp.importance(one, two, flow)
    assert torch.equal(metric, -20 * (one - back).abs().mean(1, keepdim=True))  # as the release
    still = (one - two).abs().mean()
    for mode in ("avg", "soft"):
        out, holes = warp.softsplat(one, flow, metric, mode, holes=True)
        assert holes.float().mean() < 0.2
        assert ((out - two) * ~holes).abs().mean() < 0.5 * still
    assert (back - one).abs().mean() < 0.5 * still


# --- the rigid collage -----------------------------------------------------------------------------


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


def test_nearer_segments_cover_farther_ones():
    image, flow, segments, depth = scene()
    segments[10:20, 10:20], segments[10:20, 40:50] = 1, 2
    flow[0, segments == 1] = 30
    for near, expected in ((1, image[:, 10:20, 10:20]), (2, image[:, 10:20, 40:50])):
        depth[segments == 1], depth[segments == 2] = (1, 5) if near == 1 else (5, 1)
        out, _, _ = warp.piecewise_affine_warp(image, flow, segments, depth)
        assert (out[:, 10:20, 40:50] - expected).abs().max() < 1e-3


# --- extremes, and wrong arguments ------------------------------------------------------------------


def test_softsplat_says_what_is_wrong():
    x, flow, metric = random_case(10)
    for args in (
        (x, flow, metric, "max"), (x, flow, None, "soft"), (x, flow[:, :1], metric), (x, flow, metric[..., :2]),
        (x.int(), flow, metric), (x, flow.to("meta"), metric),
    ):
        with pytest.raises(ValueError):
            warp.softsplat(*args)


def test_backwarp_of_lost_flow_is_zero_and_its_gradient_finite():
    x, flow, _ = random_case(14, 1, 1, 5, 6)
    flow[0, 0, 2, 3], flow[0, 1, 0, 0] = torch.nan, torch.inf
    flow.requires_grad_()
    y, valid = warp.backwarp(x, flow, "border", mask=True)
    assert y[0, 0, 2, 3] == 0 and not valid[0, 0, 2, 3] and y.isfinite().all()
    assert torch.autograd.grad(y.sum(), flow)[0].isfinite().all()


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


def test_extreme_metrics_stay_finite_and_the_winner_takes_all():
    x, flow, _ = random_case(7, 1, 3, 8, 8)
    for scale in (1000.0, -1000.0):
        metric = scale * torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        assert warp.softsplat(x, flow, metric).isfinite().all()
    here, there = torch.zeros(1, 2, 1, 2), torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]]])
    x = torch.tensor([[[[3.0, 5.0]]]])
    assert torch.equal(warp.softsplat(x, there, torch.tensor([[[[1000.0, -1000.0]]]])), torch.tensor([[[[0.0, 3.0]]]]))
    for metric in ([-1e30, 1e30], [1e30, -1e30]):  # a weight of 0 makes no peak, however large its metric is
        assert torch.equal(warp.softsplat(x, here, torch.tensor(metric).view(1, 1, 1, 2)), x)


def test_flow_colours():
    flow = torch.zeros(1, 2, 1, 5)
    flow[0, :, 0, 1:] = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [1.0, 0.0], [torch.nan, 0.0]]).T
    white, red, cyan, pink, black = [[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 0.5, 0.5], [0, 0, 0]]
    expected = torch.tensor([white, red, cyan, pink, black]).float()
    assert torch.allclose(warp.flow_to_colour(flow)[0, :, 0].T, expected, atol=1e-5)
