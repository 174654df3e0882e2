"""Lesson 2, solved."""

import math

import torch

PREDICT_START = 751  # 4 strides of 250, from 1 up: the last 248 timesteps are never seen
PREDICT_FACTOR = 2  # a method of first order


def ddim_step(z: torch.Tensor, eps: torch.Tensor, abar: float, abar_next: float) -> torch.Tensor:
    x0 = (z - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    return math.sqrt(abar_next) * x0 + math.sqrt(1 - abar_next) * eps


def sample(model, z: torch.Tensor, timesteps: list[int], abar: list[float]) -> torch.Tensor:
    for i, t in enumerate(timesteps):
        eps = model(z, torch.full((len(z),), t))
        z = ddim_step(z, eps, abar[i], abar[i + 1])
    return z


def ddim_sigma(abar: float, abar_next: float, eta: float) -> float:
    return eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))


def dpmpp_step(z, x0, x0_before, abar_before: float, abar: float, abar_next: float) -> torch.Tensor:
    lam_before, lam, lam_next = (math.log(math.sqrt(a / (1 - a))) for a in (abar_before, abar, abar_next))
    h = lam_next - lam
    h_before = lam - lam_before
    D = x0 + h / (2 * h_before) * (x0 - x0_before)
    sigma, sigma_next = math.sqrt(1 - abar), math.sqrt(1 - abar_next)
    return sigma_next / sigma * z - math.sqrt(abar_next) * (math.exp(-h) - 1) * D
