"""warp.py in finer detail: extreme weights, lost flows, many steps, segments that fit nothing, wrong arguments."""


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
