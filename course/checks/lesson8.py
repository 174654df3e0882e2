"""Lesson 8's checks, and mistakes that they must name: {exercise: [(wrong answer, words of the sentence)]}."""

import numpy as np
import torch

from course.grading import call, compare, compare_function, draw_uniform, list_mistakes, predicted, resting_on
from course.solutions import lesson8 as right
from reproduce import metrics


def check_PREDICT_DAM(module):
    M, = draw_uniform((4, 4))
    predicted(module.PREDICT_DAM, round(metrics.dam(M, M), 6), {
        "that is its CAM: CAM has a sign, DAM is a distance and has none": -1,
        "it is not 1: DAM has no best or worst of 1. Think of the fit: may its slope be negative?": 1,
    })


def check_cam(module):
    M, noise = draw_uniform((5, 6), (5, 6))
    E = 2 + 3 * (1 - M) + noise
    compare_function(module.cam, metrics.cam, WRONG_CAMS, M, E)


def cosine(a, b):
    return (a.flatten() @ b.flatten() / (a.norm() * b.norm())).item()


WRONG_CAMS = {
    "the sign is wrong: M is 1 where pixels are kept, and E is how much they changed":
        lambda M, E: -metrics.cam(M, E),
    "the means are not taken away: that is a cosine, and adding 1 to all of E would change it":
        lambda M, E: cosine(M, -E),
    "E is turned into 1 - E, but the means are not taken away": lambda M, E: cosine(M, 1 - E),
    "that is the covariance: divide by both standard deviations, so that E in other units gives the same":
        lambda M, E: ((M - M.mean()) * (E.mean() - E)).mean().item(),
    "the covariance is divided by n and std() by n - 1: take norms, or std(correction=0)": lambda M, E: (
        ((M - M.mean()) * (E.mean() - E)).mean() / (M.std() * E.std())).item(),
    "that is the square of the correlation: the sign is lost": lambda M, E: metrics.cam(M, E) ** 2,
    "it is divided by one of the two standard deviations only": lambda M, E: (
        ((M - M.mean()) * (E.mean() - E)).sum() / (M - M.mean()).square().sum()).item(),
}


def check_standard_error(module):
    x, = draw_uniform(12)
    compare(call(module.standard_error, x), right.standard_error(x), {
        "that is the standard deviation: how far measurements are from each other, and not how sure their mean is":
            x.std().item(),
        "it is divided by n, and not by its square root": x.std().item() / 12,
        "that is the variance over n: take the square root": (x.var() / 12).item(),
        "the squares are divided by n: of a sample whose mean is not known, by n - 1":
            (x.std(correction=0) / 12**0.5).item(),
        "that is the mean": x.mean().item(),
        "that is two standard errors": 2 * right.standard_error(x),
    })


def check_paired_difference(module):
    noise, how_hard = draw_uniform(12, 12)
    a, b = 3 * how_hard + 0.2 * noise, 3 * how_hard + 0.05  # hard pictures are hard for both
    with resting_on(module.standard_error, a):
        compare_function(module.paired_difference, right.paired_difference, WRONG_PAIRS, a, b)


def apart(a, b):
    """As if other pictures had been taken for b"""
    return (a.mean() - b.mean()).item(), (right.standard_error(a) ** 2 + right.standard_error(b) ** 2) ** 0.5


WRONG_PAIRS = {
    "the errors are put together as if a and b were of different pictures: first take differences, pair by pair": apart,
    "the two errors are added: take the differences first, pair by pair": lambda a, b: (
        (a.mean() - b.mean()).item(), right.standard_error(a) + right.standard_error(b)),
    "it is b - a: asked is how much larger a is": lambda a, b: right.paired_difference(b, a),
    "the second number is the standard deviation of the differences: divide by sqrt(n)": lambda a, b: (
        (a - b).mean().item(), (a - b).std().item()),
    "the differences lost their sign: a method that is better as often as worse would seem to differ": lambda a, b: (
        right.paired_difference((a - b).abs(), 0 * b)),
    "the second number is the error of a alone": lambda a, b: ((a - b).mean().item(), right.standard_error(a)),
}


def check_overlap(module):
    a, b = (t > 0.5 for t in draw_uniform((4, 5, 5), (4, 5, 5)))
    a[1], b[1], b[2] = False, False, False
    compare_function(module.overlap, right.overlap, WRONG_OVERLAPS, a, b)
    got = call(module.overlap, a, b)
    compare(got[1], torch.tensor(1.0), {"where both are empty": got[1]})


def counts(a, b):
    return [x.sum((1, 2)).float() for x in (a & b, a | b, a, b)]


def over_first(a, b):
    both, _, first, _ = counts(a, b)
    return torch.where(first == 0, 1.0, both / first.clamp(min=1))


def dice(a, b):
    both, _, first, second = counts(a, b)
    return torch.where(first + second == 0, 1.0, 2 * both / (first + second).clamp(min=1))


WRONG_OVERLAPS = {
    "it is over the first silhouette alone: a second one that covers all of the picture would have 1": over_first,
    "that is the Dice coefficient, 2 both / (a + b): intersection over union is both / either": dice,
    "where both are empty it is 0, or next to it: they agree, which is 1": lambda a, b: (
        counts(a, b)[0] / counts(a, b)[1].clamp(min=1)),
    "all pictures are taken together: one number for each is asked": lambda a, b: (
        (a & b).sum() / (a | b).sum()),
    "that is the share of pixels that agree, and the empty part of the picture counts": lambda a, b: (
        (a == b).float().mean((1, 2))),
    "pixels in both are counted twice in the union": lambda a, b: torch.where(
        counts(a, b)[1] == 0, 1.0, counts(a, b)[0] / (counts(a, b)[2] + counts(a, b)[3]).clamp(min=1)),
}


def check_share_put_right(module):
    truth, off, better, place = draw_uniform((3, 3, 4, 4), (3, 3, 4, 4), (3, 3, 4, 4), (3, 4, 4))
    coarse, output = truth + off, truth + 0.8 * off * better
    region = place > torch.tensor([0.9, 0.4, 0.2])[:, None, None]
    region[0, 0, 0] = True
    inputs = coarse, output, truth, region
    compare_function(module.share_put_right, share, WRONG_SHARES, *inputs)


def share(coarse, output, truth, region, norm=torch.square):
    return metrics.shadow_share(coarse, output, truth, region, norm)[2]


def mean_of_shares(coarse, output, truth, region):
    each = [share(*(x[i : i + 1] for x in (coarse, output, truth, region))) for i in range(len(coarse))]
    return sum(each) / len(each)


WRONG_SHARES = {
    "that is the share that is left: 1 less it": lambda *x: 1 - share(*x),
    "it is over the whole picture: only the region counts": lambda c, o, t, r: share(c, o, t, torch.ones_like(r)),
    "it is a mean over pictures, in which a region of three pixels counts as much as one of a thousand": mean_of_shares,
    "coarse and output are the wrong way round: the error before is the coarse edit's": lambda c, o, t, r: (
        share(o, c, t, r)),
    "differences are taken absolute, and not squared": lambda c, o, t, r: share(c, o, t, r, torch.abs),
    "that is a difference of errors, and not a share: divide by the error before": lambda c, o, t, r: (
        metrics.shadow_share(c, o, t, r)[0] - metrics.shadow_share(c, o, t, r)[1]),
    "it is how far the output is from the coarse edit: compare both with the truth": lambda c, o, t, r: (
        1 - ((o - c).square().mean(1)[r].mean() / (c - t).square().mean(1)[r].mean()).item()),
}


MISTAKES = {
    "PREDICT_DAM": [(-1, "CAM has a sign"), (1, "slope"), (2, "too large")],
    "cam": list_mistakes(WRONG_CAMS),
    "standard_error": [
        (lambda x: x.std().item(), "how sure"),
        (lambda x: x.std().item() / len(x), "square root"),
        (lambda x: x.std(correction=0).item() / len(x) ** 0.5, "n - 1"),
        (lambda x: np.std(x.numpy()) / len(x) ** 0.5, "n - 1"),
    ],
    "paired_difference": [
        *list_mistakes(WRONG_PAIRS),
        (lambda a, b: (a - b).mean().item(), "2 things"),
    ],
    "overlap": [
        *list_mistakes(WRONG_OVERLAPS),
        (lambda a, b: (a & b).sum((1, 2)) / (a | b).sum((1, 2)), "not finite"),
    ],
    "share_put_right": list_mistakes(WRONG_SHARES),
}
