"""Lesson 6: pairs from video. Write here, and run: python -m course 6

A flow F is (B, 2, H, W) in pixels: F[:, 0] to the right, F[:, 1] down. Pixel centres are whole numbers.
"""

import torch

import warp  # noqa: F401, for your use: warp.backwarp(x, flow, mask=True)

# Predict, then run. Two steps of a zoom, each with F[q] = q / 2: what is at 10 goes to 15. What is the composed flow
# of both steps at the pixel x = 10: how far does it move in all?
PREDICT_COMPOSED = None


def shots(cuts: list[bool]) -> list[tuple[int, int]]:
    """The shots of a film, but only those of two frames or more: (first, last) frame of each, both included, in order.

    cuts  n - 1 of them for n frames: cuts[i] is between the frames i and i + 1
    """
    ...


def compose(f01: torch.Tensor, f12: torch.Tensor) -> torch.Tensor:
    """The flow from frame 0 to frame 1, and from there to frame 2 -> the flow from frame 0 to frame 2.

    f01, f12 (B, 2, H, W) -> (B, 2, H, W), NaN where a pixel is out of frame 1, so that nobody knows how it goes on.
    A pixel is a unit square: out of frame is below -0.5 or above W - 0.5, as warp.backwarp(.., mask=True) says
    """
    ...


def importance(image: torch.Tensor, target: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Z for softmax splatting: minus 20 times how much a pixel differs from what it becomes, as a mean over colours.

    image, target (B, 3, H, W) in [0, 1], flow (B, 2, H, W) from image to target -> (B, 1, H, W)
    """
    ...


def verdict(flow: torch.Tensor) -> str:
    """Is this flow of use for training? 'too far', 'still' or 'kept'

    flow (2, H, H). In pixels of a picture of 512 x 512:
    too far  a tenth of the picture, or more, moves 350 pixels or farther: so does the 90th percentile (the paper)
    still    the 95th percentile of how far pixels move is below 50 pixels (the release)
    """
    ...


def fit_similarity(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """The similarity (turn, scale and shift: four numbers) that takes points `start` nearest to `end`: least squares.

    start, end (2, n): x, y of n points -> (2, 3): A with A[:, :2] @ start + A[:, 2:] near end

    A similarity is [[a, -b, x], [b, a, y]], which is linear in a, b, x, y: torch.linalg.lstsq(M, v).solution
    """
    ...
