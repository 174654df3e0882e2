"""Lesson 1, solved."""

import math

import torch
import torch.nn.functional as F

PREDICT_NUMBERS = 8192  # 8 channels of 32 x 32, a sixth of the picture's 3 x 128 x 128
PREDICT_HALF = 354  # well before the middle


def noise_latent(x0: torch.Tensor, noise: torch.Tensor, abar: float) -> torch.Tensor:
    return math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise


def clean_latent(z: torch.Tensor, eps: torch.Tensor, abar: float) -> torch.Tensor:
    return (z - math.sqrt(1 - abar) * eps) / math.sqrt(abar)


def split_velocity(z: torch.Tensor, v: torch.Tensor, abar: float) -> tuple[torch.Tensor, torch.Tensor]:
    alpha, sigma = math.sqrt(abar), math.sqrt(1 - abar)
    # (z, v) is (x0, eps), turned by an angle. This turns back.
    return alpha * z - sigma * v, sigma * z + alpha * v


def resnet_block(x, time, norm1, conv1, norm2, conv2):
    h = conv1(F.silu(norm1(x))) + time[:, :, None, None]
    h = conv2(F.silu(norm2(h)))
    return x + h
