"""Lesson 5: warps. Write here, and run: python -m course 5

A flow F is (B, 2, H, W) in pixels: F[:, 0] to the right, F[:, 1] down. Pixel centres are whole numbers.
"""

import torch
import torch.nn.functional as F  # noqa: F401, for your use

# Predict, then run. A picture is thrown by F[q] = q, so that pixel (x, y) goes to (2x, 2y) and everything becomes twice
# as wide and twice as high. What share of the result is holes, where nothing lands? A number between 0 and 1.
PREDICT_HOLES = None


def fetch(x: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Backward warp: every pixel q fetches the colour at q + flow[q], bilinear. Beyond the edge it reads the edge.

    x (B, C, H, W), flow (B, 2, H, W) -> (B, C, H, W)

    F.grid_sample reads at places that it counts from -1 to 1: with align_corners=False these are the outer edges of
    the first and the last pixel, not their centres. Its padding_mode="border" reads the edge.
    """
    ...


def splat_row(x: torch.Tensor, flow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward warp of one row: pixel q is thrown to q + flow[q], and shared out to the two pixels around that place.

    A pixel p gets the share b = 1 - |p - (q + flow[q])|, if that is more than 0. Where p is outside, it is lost.

    x (W,), flow (W,) -> total (W,), the sum of b x[q] over all q;  norm (W,), the sum of b
    """
    ...


def normalise(total: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Average splatting: what landed on a pixel, over how much landed. A hole, where nothing landed, is exactly 0.

    total (B, C, H, W), norm (B, 1, H, W) -> (B, C, H, W)
    """
    ...


def blend(x: torch.Tensor, b: torch.Tensor, Z: torch.Tensor) -> torch.Tensor:
    """Softmax splatting at one target, on which n pixels land: their mean, weighted by b exp(Z).

    x (n, C), b (n,), Z (n,) -> (C,)

    Z is any number. exp(100) does not fit into float32: find out what you may add to all Z without changing the mean.
    """
    ...


def flow_slope(x, b_slope, I, N, grad):
    """How the loss changes when one pixel is thrown a little farther to the right: the derivative by its F_x.

    Average splatting. The pixel lands on four targets, and for target k

        I[k] = (sum of b x over all that land there) / N[k],        N[k] = sum of b

    x        (C,), the pixel's colour
    b_slope  (4,), db/dF_x: how much more of the pixel each target gets
    I        (4, C), the result at the targets;  N (4,), what it was divided by
    grad     (4, C), the derivative of the loss by I
      ->     a number
    """
    ...
