"""Lesson 4: Differential Diffusion. Write here, and run: python -m course 4

A change map mu has 0 where all may change and 1 where nothing does. k steps are numbered i = 0 .. k - 1, from noise to
the picture: the paper's t is k - i.
"""

import torch
import torch.nn.functional as F  # noqa: F401, for your use

# Predict, then run. A pixel has mu = 0.25, and a run has 8 steps. How many of the 8 steps' results does it keep?
PREDICT_KEPT = None

# Predict, then run. A map's darkest pixel has mu = 0.3, and k = 50. How often is the network called, with skipping?
PREDICT_CALLS = None


def keep_mask(mu: torch.Tensor, i: int, k: int) -> torch.Tensor:
    """Algorithm 1, line 8, at step i of k: True where the pixel keeps what the last step made of it.

    mu (1, 1, h, w) -> (1, 1, h, w) bool
    """
    ...


def first_step(mu: torch.Tensor, k: int) -> int:
    """Algorithm 2: the first step i that has to be run. All that comes before it is replaced anyway.

    A float's 0.3 is not quite 3/10. Add 1e-4 before you round down.

    mu (1, 1, h, w) -> a whole number in 0 .. k
    """
    ...


def differential_diffusion(step, noise_to, z_init, mu, k: int) -> torch.Tensor:
    """Algorithm 1, lines 4 to 11, in latents. Use your keep_mask.

    step      (z, i) -> z: one step of a sampler, from level i to level i + 1
    noise_to  i -> z'_i: z_init with the noise of level i, for i in 0 .. k - 1
    z_init    (1, C, h, w), the picture's latent, without noise: what a white pixel is at the end
    mu        (1, 1, h, w)
      ->      (1, C, h, w), the latent of the edited picture
    """
    ...


def soften(mask: torch.Tensor, softness: float) -> torch.Tensor:
    """Section 4.1, soft-inpainting: a mask, blurred by a Gaussian, is a change map.

    The kernel: exp(-(x / softness)^2 / 2) for whole x in -radius .. radius, radius = ceil(3 softness), of sum 1. Blur
    along rows, then along columns. Beyond the edge the mask goes on as it is there: F.pad(..., mode="replicate").

    mask (1, 1, H, W), 0 = repaint, 1 = keep -> change map (1, 1, H, W)
    """
    ...
