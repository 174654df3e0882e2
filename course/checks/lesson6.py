"""Lesson 6's checks, and mistakes that they must name: {exercise: [(wrong answer, words of the sentence)]}."""

import torch

import warp
from course.grading import call, compare, compare_function, draw_uniform, list_mistakes, predicted
from course.solutions import lesson6 as right


def check_PREDICT_COMPOSED(module):
    zoom = torch.zeros(1, 2, 1, 32)
    zoom[0, 0, 0] = torch.arange(32) / 2
    predicted(module.PREDICT_COMPOSED, warp.compose_flow(zoom, zoom)[0, 0, 0, 10].item(), {
        "that is both flows at x = 10, added. After the first step it is at 15: read the second there": 10,
        "that is one step": 5,
        "that is where it is in the end, and not how far it has moved": 22.5,
        "that is the second step alone": 7.5,
    })


def check_shots(module):
    for cuts in CUTS:
        compare_function(module.shots, right.shots, WRONG_SHOTS, cuts)


def find_shots(cuts, begin=1, shortest=2):
    """A shot begins at i + begin"""
    edges = [0] + [i + begin for i, cut in enumerate(cuts) if cut] + [len(cuts) + 1]
    return [(a, b - 1) for a, b in zip(edges, edges[1:]) if b - a >= shortest]


CUTS = ([False, False, True, False, False, True, True, False], [False, False, False], [True, False, True])
WRONG_SHOTS = {
    "off by one step: cuts[i] is between i and i + 1, so that the next shot begins at i + 1":
        lambda cuts: find_shots(cuts, begin=0),
    "off by one step: the last frame of a shot is the one before the next shot begins":
        lambda cuts: [(a, b + 1) for a, b in right.shots(cuts)],
    "there are shots of a single frame among them: a pair needs two frames":
        lambda cuts: find_shots(cuts, shortest=0),
    "the last shot is missing: no cut ends it": lambda cuts: right.shots(cuts)[:-1],
}


def check_compose(module):
    f01, f12 = (3 * t - 1 for t in draw_uniform((2, 2, 6, 7), (2, 2, 6, 7)))
    got, want = call(module.compose, f01, f12), right.compose(f01, f12)
    slips = {sentence: wrong(f01, f12) for sentence, wrong in WRONG_FLOWS.items()}
    known = ~want.isnan()
    if torch.is_tensor(got) and got.shape == want.shape:
        # NaN equals nothing: first the flow where both know it, then where it is known.
        both = known & ~got.isnan()
        compare(got.where(both, 0), want.where(both, 0), {s: w.where(both, 0) for s, w in slips.items()})
        compare(got.isnan(), ~known, {
            "where a pixel is out of frame 1 the flow is not NaN": torch.zeros_like(known),
            "the frame ends half a pixel beyond the outermost centres: below -0.5, or above W - 0.5": beyond(f01, 0.0),
            "the frame ends half a pixel beyond the outermost centres, not a whole one": beyond(f01, 1.0),
        })
    else:
        compare(got, want)


def beyond(flow, rim):
    """(B, 2, H, W) bool: where a flow leads more than `rim` beyond the outermost centres"""
    H, W = flow.shape[-2:]
    X, Y = warp.positions(flow)
    return ((X < -rim) | (X > W - 1 + rim) | (Y < -rim) | (Y > H - 1 + rim))[:, None].expand_as(flow)


WRONG_FLOWS = {
    "the flows are added pixel by pixel: the second is to be read where the first one leads": lambda f, g: f + g,
    "f01 itself is left out of the sum": lambda f, g: warp.backwarp(g, f),
    "the sign is wrong: the second flow is read at q - f01[q]": lambda f, g: f + warp.backwarp(g, -f),
    "it is the other way round: f12 is read where f01 leads": lambda f, g: g + warp.backwarp(f, g),
    "f12 is thrown by f01, which leaves holes: fetch it": lambda f, g: f + warp.softsplat(g, f, mode="avg"),
}


def check_importance(module):
    image, target, flow = draw_uniform((2, 3, 6, 7), (2, 3, 6, 7), (2, 2, 6, 7))
    flow = 2 * flow
    compare_function(module.importance, right.importance, WRONG_METRICS, image, target, flow)


WRONG_METRICS = {
    "the sign is wrong: what differs most from what it becomes would win":
        lambda x, y, f: -right.importance(x, y, f),
    "the target is not fetched: image and target are compared at the same place, where different things are":
        lambda x, y, f: right.importance(x, y, 0 * f),
    "the image is fetched, and should be the target: a pixel q becomes what the target shows at q + flow[q]":
        lambda x, y, f: right.importance(y, x, f),
    "the target is fetched from q - flow[q]": lambda x, y, f: right.importance(x, y, -f),
    "colours are added up: take their mean": lambda x, y, f: 3 * right.importance(x, y, f),
    "differences of either sign cancel: take their absolute values": lambda x, y, f: (
        -20 * (x - warp.backwarp(y, f)).mean(1, keepdim=True)),
    "differences are squared: take their absolute values": lambda x, y, f: (
        -20 * (x - warp.backwarp(y, f)).square().mean(1, keepdim=True)),
    "that is the length of the difference, with a root: take the mean of its absolute values": lambda x, y, f: (
        -20 * (x - warp.backwarp(y, f)).norm(dim=1, keepdim=True)),
    "the target is thrown, which leaves holes: fetch it": lambda x, y, f: (
        -20 * (x - warp.softsplat(y, f, mode="avg")).abs().mean(1, keepdim=True)),
}


def make_flows():
    """Five flows of 64 x 64, an eighth of 512: 350 becomes 43.75 and 50 becomes 6.25"""
    flows = torch.zeros(5, 2, 64, 64)
    flows[0, 0] = 5.0
    flows[0, 1, :2] = 60.0  # 3 % of the picture
    flows[1] = 5.6  # 7.9 along the diagonal
    flows[2, 1, :5], flows[3, 1, :8] = 60.0, 60.0  # 7.8 % and 12.5 % of the picture
    flows[4, 0] = -60.0
    return flows


def check_verdict(module):
    flows = make_flows()
    compare([call(module.verdict, f) for f in flows], [right.verdict(f) for f in flows], {
        sentence: [wrong(f) for f in flows] for sentence, wrong in WRONG_VERDICTS.items()})


def judge(flow, far=0.9, still=0.95, scale=8.0, length=None):
    """verdict, with a mistake"""
    length = (flow.norm(dim=0) if length is None else length).flatten() * scale
    if length.quantile(far) >= 350:
        return "too far"
    return "still" if length.quantile(still) < 50 else "kept"


WRONG_VERDICTS = {
    "350 and 50 are of a picture of 512 pixels: here they are in proportion to the flow's size":
        lambda f: judge(f, scale=1.0),
    "the percentiles are the wrong way round: 90 for too far, 95 for still": lambda f: judge(f, 0.95, 0.9),
    "a single pixel decides: take percentiles, not the largest": lambda f: judge(f, 1.0, 1.0),
    "the mean decides: an object that is small and moves far counts too. Take percentiles": lambda f: judge(
        f, length=f.norm(dim=0).mean().expand(2)),
    "x and y are looked at apart: how far a pixel moves is sqrt(x² + y²)": lambda f: judge(f, length=f.abs().amax(0)),
    "x and y are added, and cancel or go below zero: how far a pixel moves is sqrt(x² + y²)":
        lambda f: judge(f, length=f.sum(0)),
    "too far and still are the wrong way round":
        lambda f: {"too far": "still", "still": "too far"}.get(judge(f), "kept"),
}


def make_points():
    """A turn by 30 degrees, twice as large, a shift; and noise, which no similarity follows"""
    start, noise = draw_uniform((2, 8), (2, 8))
    turn = 2 * torch.tensor([[0.866, -0.5], [0.5, 0.866]])
    return 10 * start, turn @ (10 * start) + torch.tensor([[3.0], [-2.0]]) + noise


def check_fit_similarity(module):
    start, end = make_points()
    compare_function(module.fit_similarity, right.fit_similarity, WRONG_FITS, start, end, tolerance=1e-3)


def fit_affine(start, end):
    M = torch.cat([start, torch.ones_like(start[:1])]).T
    return torch.linalg.lstsq(M, end.T).solution.T


def fit_linear(start, end):
    """No shift"""
    x, y = start
    M = torch.cat([torch.stack([x, -y], 1), torch.stack([y, x], 1)])
    a, b = torch.linalg.lstsq(M, end.flatten()[:, None]).solution[:, 0].tolist()
    return torch.tensor([[a, -b, 0], [b, a, 0]])


def fit_shift(start, end):
    return torch.cat([torch.eye(2), (end - start).mean(1, keepdim=True)], 1)


def turn_back(start, end):
    A = right.fit_similarity(start, end)
    return torch.cat([A[:, :2].T, A[:, 2:]], 1)


WRONG_FITS = {
    "that is an affine map of six numbers, which may shear: a segment would be torn askew": fit_affine,
    "it has no shift": fit_linear,
    "it shifts, and does not turn or scale": fit_shift,
    "it turns the wrong way: the signs of b are swapped": turn_back,
    "it goes from end to start": lambda start, end: right.fit_similarity(end, start),
    "x and y are swapped: the first row is x": lambda start, end: right.fit_similarity(start.flip(0), end.flip(0)),
}


MISTAKES = {
    "PREDICT_COMPOSED": [(10, "added"), (5, "one step"), (22.5, "where it is"), (13, "too large")],
    "shots": list_mistakes(WRONG_SHOTS),
    "compose": [
        (lambda f, g: f + g, "pixel by pixel"),
        (lambda f, g: f + warp.backwarp(g, f), "not NaN"),
        (lambda f, g: torch.where(beyond(f, 0.0), torch.nan, f + warp.backwarp(g, f)), "above W - 0.5"),
        (lambda f, g: torch.where(beyond(f, 1.0), torch.nan, f + warp.backwarp(g, f, "border")), "not a whole one"),
        (lambda f, g: warp.compose_flow(g, f), "other way round"),
        (lambda f, g: warp.compose_flow(-f, g) + 2 * f, "sign"),
    ],
    "importance": [
        *list_mistakes(WRONG_METRICS),
        (lambda x, y, f: right.importance(x, y, f)[:, 0], "shape"),
        (lambda x, y, f: right.importance(x, y, f) / 20, "0.05 times"),
    ],
    "verdict": list_mistakes(WRONG_VERDICTS),
    "fit_similarity": list_mistakes(WRONG_FITS),
}
