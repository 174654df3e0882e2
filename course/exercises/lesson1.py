"""Lesson 1: a latent and its noise. Write here, and run: python -m course 1

Every picture of noise has two numbers: abar, between 1 (no noise) and 0 (nothing else), and from it

    alpha = sqrt(abar), what is left of the picture        sigma = sqrt(1 - abar), how much noise there is
"""

import torch
import torch.nn.functional as F  # noqa: F401, for your use

# Predict, then run. How many numbers are in the latent of a picture of 128 x 128 pixels, for the toy's autoencoder?
PREDICT_NUMBERS = None

# Predict, then run. At which timestep t, of 0 .. 999, has a latent as much noise as picture: abar = 1/2?
PREDICT_HALF = None


def noise_latent(x0: torch.Tensor, noise: torch.Tensor, abar: float) -> torch.Tensor:
    """DDPM, equation 4: the latent at noise level abar.

    x0, noise (B, C, h, w) -> z (B, C, h, w)
    """
    ...


def clean_latent(z: torch.Tensor, eps: torch.Tensor, abar: float) -> torch.Tensor:
    """What x0 must have been, if `eps` is the noise that is in z. It undoes noise_latent.

    z, eps (B, C, h, w) -> x0 (B, C, h, w)
    """
    ...


def split_velocity(z: torch.Tensor, v: torch.Tensor, abar: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The toy predicts neither noise nor picture, but v = alpha eps - sigma x0. Take it apart.

    You know z = alpha x0 + sigma eps as well: two equations for two unknowns, and alpha^2 + sigma^2 = 1.

    z, v (B, C, h, w) -> x0, eps, each (B, C, h, w)
    """
    ...


def resnet_block(x, time, norm1, conv1, norm2, conv2):
    """One residual block of the UNet, of its parts: where do the GroupNorms stand, and where does the time go in?

    x             (B, C, h, w)
    time          (B, C), what the block adds to every pixel of its first convolution's result
    norm1, norm2  GroupNorms; conv1, conv2: convolutions of C to C channels. Call them like functions. F.silu is the
                  activation, and it follows each norm
      ->          (B, C, h, w)
    """
    ...
