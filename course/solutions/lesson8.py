"""Lesson 8, solved."""

import torch

PREDICT_DAM = 0.0  # the fit may take a negative slope: DAM sees the distance from a line, and not which way it goes


def cam(M: torch.Tensor, E: torch.Tensor) -> float:
    a, b = M.flatten() - M.mean(), -(E.flatten() - E.mean())
    return (a @ b / (a.norm() * b.norm())).item()


def standard_error(x: torch.Tensor) -> float:
    return (x.std() / len(x) ** 0.5).item()


def paired_difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    difference = a - b
    return difference.mean().item(), standard_error(difference)


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    both, either = (a & b).sum((1, 2)), (a | b).sum((1, 2))
    return torch.where(either == 0, 1.0, both / either.clamp(min=1))


def share_put_right(coarse, output, truth, region) -> float:
    before, after = ((x - truth).square().mean(1)[region].mean() for x in (coarse, output))
    return (1 - after / before).item()
