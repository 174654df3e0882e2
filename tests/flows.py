"""Flows, and what is to be moved along them, that several tests share."""

import torch


def random_case(seed, B=2, C=3, H=9, W=7, reach=4.0, spread=3.0):
    """x, flow, metric. Flows are multiples of 1/64 pixel: positions are exact in float32 and float64 alike."""
    g = torch.Generator().manual_seed(seed)
    x, metric = torch.randn(B, C, H, W, generator=g), spread * torch.randn(B, 1, H, W, generator=g)
    return x, (reach * torch.randn(B, 2, H, W, generator=g) * 64).round() / 64, metric


def translation(dx, dy, H=24, W=32):
    return torch.tensor([dx, dy]).view(1, 2, 1, 1).expand(1, 2, H, W).clone()


def scene(H=60, W=80):
    """An image of noise, and flow, segments and depth of a still background without segments."""
    image = torch.rand(3, H, W, generator=torch.Generator().manual_seed(16))
    return image, torch.zeros(2, H, W), torch.zeros(H, W, dtype=torch.long), torch.full((H, W), 9.0)
