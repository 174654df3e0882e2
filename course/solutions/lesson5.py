"""Lesson 5, solved."""

import torch
import torch.nn.functional as F

PREDICT_HOLES = 0.75  # one pixel in two across, and one in two down, is hit: a quarter


def fetch(x: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    H, W = x.shape[-2:]
    X = torch.arange(W) + flow[:, 0]
    Y = torch.arange(H)[:, None] + flow[:, 1]  # (B, H, W)
    # A pixel's centre is half a pixel from its edge: 0.5 of W pixels from the left, and the whole is 2 wide.
    grid = torch.stack([2 * (X + 0.5) / W - 1, 2 * (Y + 0.5) / H - 1], dim=-1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def splat_row(x: torch.Tensor, flow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    W = len(x)
    total, norm = torch.zeros(W), torch.zeros(W)
    for q in range(W):
        place = q + flow[q]
        left = int(place.floor())
        for p in (left, left + 1):
            if 0 <= p < W:
                b = 1 - (p - place).abs()
                total[p] += b * x[q]
                norm[p] += b
    return total, norm


def normalise(total: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    hole = norm == 0
    return torch.where(hole, 0, total / torch.where(hole, 1, norm))


def blend(x: torch.Tensor, b: torch.Tensor, Z: torch.Tensor) -> torch.Tensor:
    # exp(Z - peak) is exp(Z) times a constant, which the division takes out again.
    a = b * (Z - Z.max()).exp()
    return (a[:, None] * x).sum(0) / a.sum()


def flow_slope(x, b_slope, I, N, grad):
    # The quotient rule: the pixel brings its colour in, and pushes the mean of the others out.
    return (b_slope / N * (grad * (x - I)).sum(1)).sum()
