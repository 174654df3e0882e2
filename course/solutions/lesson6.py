"""Lesson 6, solved."""

import torch

import warp

PREDICT_COMPOSED = 12.5  # 10 -> 15 -> 22.5: the second step is read at 15


def shots(cuts: list[bool]) -> list[tuple[int, int]]:
    edges = [0] + [i + 1 for i, cut in enumerate(cuts) if cut] + [len(cuts) + 1]  # where a shot begins, and the end
    return [(a, b - 1) for a, b in zip(edges, edges[1:]) if b - a > 1]


def compose(f01: torch.Tensor, f12: torch.Tensor) -> torch.Tensor:
    onward, inside = warp.backwarp(f12, f01, mask=True)  # the next flow, where this one leads
    return torch.where(inside, f01 + onward, torch.nan)


def importance(image: torch.Tensor, target: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    becomes = warp.backwarp(target, flow)
    return -20 * (image - becomes).abs().mean(1, keepdim=True)


def verdict(flow: torch.Tensor) -> str:
    scale = flow.shape[-1] / 512
    length = flow.norm(dim=0).flatten()
    if length.quantile(0.90) >= 350 * scale:
        return "too far"
    if length.quantile(0.95) < 50 * scale:
        return "still"
    return "kept"


def fit_similarity(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    x, y = start
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    M = torch.cat([torch.stack([x, -y, one, zero], 1), torch.stack([y, x, zero, one], 1)])  # (2n, 4)
    a, b, dx, dy = torch.linalg.lstsq(M, end.flatten()[:, None]).solution[:, 0]
    return torch.stack([torch.stack([a, -b, dx]), torch.stack([b, a, dy])])
