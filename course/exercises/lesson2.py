"""Lesson 2: samplers as functions. Write here, and run: python -m course 2

A sampler walks down a ladder of noise levels. Each level has a number abar; alpha = sqrt(abar), sigma = sqrt(1 - abar).
"""

import torch

# Predict, then run. At which timestep do 4 steps start, spaced as Stable Diffusion spaces them ("leading")?
PREDICT_START = None

# Predict, then run. DDIM in 100 steps instead of 50: by what factor does its error become smaller?
PREDICT_FACTOR = None


def ddim_step(z: torch.Tensor, eps: torch.Tensor, abar: float, abar_next: float) -> torch.Tensor:
    """DDIM, equation 12, without new noise: to x0, and back to less noise along the same eps.

    z, eps (B, C, h, w), at level abar -> z (B, C, h, w), at level abar_next
    """
    ...


def sample(model, z: torch.Tensor, timesteps: list[int], abar: list[float]) -> torch.Tensor:
    """The whole reverse process, with your ddim_step.

    model      (z, t) -> eps (B, C, h, w); t is a tensor (B,) of whole numbers: the timestep of each picture
    z          (B, C, h, w), noise, at level abar[0]
    timesteps  k of them, falling
    abar       k + 1 of them: step i goes from abar[i] to abar[i + 1]
      ->       (B, C, h, w), at level abar[k]
    """
    ...


def ddim_sigma(abar: float, abar_next: float, eta: float) -> float:
    """DDIM, equation 16: the standard deviation of the new noise in a step. eta = 0: none; eta = 1: as much as DDPM."""
    ...


def dpmpp_step(z, x0, x0_before, abar_before: float, abar: float, abar_next: float) -> torch.Tensor:
    """DPM-Solver++ (2M): a step along a line through the last two predictions of x0.

    lambda = log(alpha / sigma) of each level,  h = lambda_next - lambda,  h_before = lambda - lambda_before
    D      = x0 + h / (2 h_before) (x0 - x0_before)
    z_next = sigma_next / sigma z - alpha_next (exp(-h) - 1) D

    z, x0 (B, C, h, w), at level abar; x0_before, the prediction at abar_before -> z (B, C, h, w), at abar_next
    """
    ...
