"""Lesson 8: measuring. Write here, and run: python -m course 8"""

import torch

# Predict, then run. An edit does the exact opposite of its change map: E_M = M, so that it changes most where the map
# says "keep". What is its DAM, of which 0 is the best?
PREDICT_DAM = None


def cam(M: torch.Tensor, E: torch.Tensor) -> float:
    """Correlation Adherence Metric: Pearson's correlation of a map with how much every pixel was kept. 1 is the best.

    M (H, W), the change map: 1 = keep. E (H, W), how much each pixel CHANGED -> a number in -1 .. 1
    """
    ...


def standard_error(x: torch.Tensor) -> float:
    """The standard error of the mean of n measurements: their standard deviation over sqrt(n).

    The standard deviation is that of a sample, whose squares are divided by n - 1.

    x (n,) -> a number
    """
    ...


def paired_difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Two methods on the same n pictures: how much larger is a than b on average, and what is that number's error?

    a, b (n,), in the same order -> the mean of the difference a - b, its standard error
    """
    ...


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of silhouettes: of the pixels in either, the share that is in both.

    a, b (n, H, W) bool -> (n,); 1 where both are empty
    """
    ...


def share_put_right(coarse, output, truth, region) -> float:
    """What share of the coarse edit's squared error in a region is gone in the output? 1: all is right, 0: no better.

    coarse, output, truth (n, 3, H, W); region (n, H, W) bool. All pixels of the region count alike, whichever picture
    they are in -> a number, negative where the output is worse
    """
    ...
