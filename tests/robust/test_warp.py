"""warp.py in finer detail: extreme weights, lost flows, many steps, segments that fit nothing, wrong arguments."""

import math

import pytest
import torch

import warp
from tests.flows import random_case, scene


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
    assert torch.equal(warp.softsplat(x, here, torch.tensor([[[[-1e30, 1e30]]]])), x)


def test_flow_colours():
    flow = torch.zeros(1, 2, 1, 5)
    flow[0, :, 0, 1:] = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [1.0, 0.0], [torch.nan, 0.0]]).T
    white, red, cyan, pink, black = [[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 0.5, 0.5], [0, 0, 0]]
    expected = torch.tensor([white, red, cyan, pink, black]).float()
    assert torch.allclose(warp.flow_to_colour(flow)[0, :, 0].T, expected, atol=1e-5)


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
