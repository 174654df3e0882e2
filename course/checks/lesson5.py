"""Lesson 5's checks, and mistakes that they must name: {exercise: [(wrong answer, words of the sentence)]}."""

import torch
import torch.nn.functional as F

import warp
from course.grading import Wrong, call, compare, compare_function, draw_uniform, list_mistakes, predicted
from course.solutions import lesson5 as right


def check_PREDICT_HOLES(module):
    side = 32
    here = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy")).float()[None]
    _, holes = warp.softsplat(torch.ones(1, 1, side, side), here, mode="avg", holes=True)
    predicted(module.PREDICT_HOLES, holes.float().mean().item(), {
        "that is one direction only: every other column is hit, and of it every other row": 0.5,
        "that is the share that is hit: the question is the holes": 0.25,
        "that is a backward warp, which fetches a colour for every pixel: a forward warp throws": 0.0,
    })


def check_fetch(module):
    x, flow = draw_uniform((2, 3, 5, 7), (2, 2, 5, 7))
    flow = 3 * flow - 1
    compare_function(module.fetch, right.fetch, WRONG_FETCHES, x, flow)


def read(x, X, Y, **how):
    """x at X, Y (B, H, W), counted from -1 to 1"""
    return F.grid_sample(x, torch.stack([X, Y], -1), **{"padding_mode": "border", "align_corners": False} | how)


def fetch_by(count=lambda n, size: (2 * n + 1) / size - 1, **how):
    """A fetch that counts pixels n from -1 to 1 in another way, or reads in another way"""

    def fetch(x, flow):
        H, W = x.shape[-2:]
        X, Y = warp.positions(flow)
        return read(x, count(X, W), count(Y, H), **how)

    return fetch


def fetch_y_first(x, flow):
    H, W = x.shape[-2:]
    X, Y = warp.positions(flow)
    return read(x, (2 * Y + 1) / H - 1, (2 * X + 1) / W - 1)


def fetch_scaled_first(x, flow):
    H, W = x.shape[-2:]
    X, Y = warp.positions(0 * flow)
    return read(x, (2 * X + 1) / W - 1 + flow[:, 0], (2 * Y + 1) / H - 1 + flow[:, 1])


WRONG_FETCHES = {
    "the sign of the flow is wrong: pixel q reads at q + flow[q]": lambda x, flow: right.fetch(x, -flow),
    "x and y of the flow are swapped: flow[:, 0] goes to the right": lambda x, flow: right.fetch(x, flow.flip(1)),
    "places are counted from centre to centre, by W - 1, but grid_sample counts from edge to edge: (2 X + 1) / W - 1":
        fetch_by(lambda n, size: 2 * n / (size - 1) - 1),
    "it reads half a pixel too far left and up: a centre is half a pixel from its edge":
        fetch_by(lambda n, size: 2 * n / size - 1),
    "the flow is added to places that are counted from -1 to 1 already: it is in pixels. Add it first, then scale":
        fetch_scaled_first,
    "it reads the nearest pixel: bilinear is asked for": fetch_by(mode="nearest"),
    "beyond the edge it reads black: padding_mode='border' reads the edge": fetch_by(padding_mode="zeros"),
    "the grid has y before x: grid_sample reads its last dimension as (x, y)": fetch_y_first,
    "the flow is not used: this is the picture as it was": lambda x, flow: x,
    "these are places alone: q is missing in q + flow[q]": lambda x, flow: right.fetch(x, flow - here(x)),
}


def here(x):
    H, W = x.shape[-2:]
    return torch.stack(torch.meshgrid(torch.arange(W), torch.arange(H), indexing="xy")).float()[None]


ROW_FLOW = torch.tensor([-0.4, 0.25, 2.5, -3.5, 0.0, 0.75, 4.0, -2.25])  # collisions, holes, some that leave


def check_splat_row(module):
    x, = draw_uniform(8)
    compare_function(module.splat_row, right.splat_row, WRONG_ROWS, x, ROW_FLOW)


def throw(x, flow, share=None, find=torch.floor, wrap=False, stop=False, add=True):
    """splat_row, with a mistake"""
    W, total, norm = len(x), torch.zeros(len(x)), torch.zeros(len(x))
    for q in range(W):
        place = q + flow[q]
        left = int(find(place))
        for p in (left, left + 1):
            b = share(p, place, left) if share else (1 - (p - place).abs()).clamp(min=0)
            p = min(max(p, 0), W - 1) if stop else p
            if (wrap and -W <= p < W) or 0 <= p < W:
                total[p] = b * x[q] + (total[p] if add else 0)
                norm[p] = b + (norm[p] if add else 0)
    return total, norm


def cut(x, flow):
    return throw(x, flow, share=lambda p, place, left: 1 - (p - place).abs(), find=torch.trunc)


def gather(x, flow, throws=False):
    """Every pixel fetches; or is thrown with total[p] +=, which adds once for a p that occurs several times"""
    place = torch.arange(len(x)) + flow
    left = place.floor().long()
    total, norm = torch.zeros(len(x)), torch.zeros(len(x))
    for p in (left, left + 1):
        inside = (p >= 0) & (p < len(x))
        b = (1 - (p - place).abs()) * inside
        p = p.clamp(0, len(x) - 1)
        if throws:
            total[p[inside]] += (b * x)[inside]
            norm[p[inside]] += b[inside]
        else:
            total += b * x[p]
            norm += b
    return total, norm


WRONG_ROWS = {
    "the two shares are the wrong way round: the nearer pixel gets more":
        lambda x, flow: throw(x, flow, share=lambda p, place, left: (p - place).abs()),
    "what is lost at the left comes back at the right: an index below 0 counts from the end in Python":
        lambda x, flow: throw(x, flow, wrap=True),
    "where two pixels land the second replaces the first: add with +=": lambda x, flow: throw(x, flow, add=False),
    "where two pixels land at once only one is added: total[p] += counts a p once. Use a loop, or index_add_":
        lambda x, flow: gather(x, flow, throws=True),
    "what leaves is added to the edge: it is lost": lambda x, flow: throw(x, flow, stop=True),
    "the place is rounded: the pixel to its left is floor(q + flow[q])":
        lambda x, flow: throw(x, flow, find=torch.round),
    "the place is cut towards zero: int(-0.4) is 0, and floor is -1": cut,
    "the sign of the flow is wrong: q goes to q + flow[q]": lambda x, flow: throw(x, -flow),
    "every pixel fetches: that is a backward warp. Here every pixel is thrown": gather,
    "total is divided by norm already: that is the next exercise": lambda x, flow: (
        right.normalise(throw(x, flow)[0], throw(x, flow)[1]), throw(x, flow)[1]),
}


def check_normalise(module):
    total, norm = draw_uniform((1, 2, 3, 4), (1, 1, 3, 4))
    norm[..., 0, :] += 1.5  # several have landed
    norm[..., 2, 1:3] = 0  # holes
    norm[..., 1, 1] = 2e-5  # next to nothing has, and the mean is still the mean
    total = total * norm
    got = call(module.normalise, total, norm)
    slips = {
        "it is not divided: this is sum splatting": total.clone(),
        "holes are not 0": torch.where(norm == 0, 1.0, right.normalise(total, norm)),
    }
    if torch.is_tensor(got) and got.shape == total.shape:
        if got.isnan().any():
            raise Wrong("holes are not a number: 0 / 0. Divide by something else there, and then write 0")
        by = (total / got)[0, 0, 1, 1].clamp(max=1)  # what was divided by where next to nothing has landed
        added = by - norm[0, 0, 1, 1]
        slips |= {
            "something small is added to norm: where little has landed, the result is too dark. Ask for norm == 0":
                total / (norm + added),
            f"norm is not let below {by:.3g}: where less has landed, the result is too dark":
                total / norm.clamp(min=by),
        }
    compare(got, right.normalise(total, norm), slips)


def check_blend(module):
    x, b = draw_uniform((4, 3), 4)
    Z = torch.tensor([1.0, -2.0, 0.5, 1.5])
    compare_function(module.blend, right.blend, WRONG_BLENDS, x, b, Z)
    for shift in (100, -100):
        got = call(module.blend, x, b, Z + shift)
        if not got.isfinite().all():
            raise Wrong(f"with {shift} added to all Z the weights overflow or vanish: subtract the largest before exp")
        compare(got, right.blend(x, b, Z))


WRONG_BLENDS = {
    "the weights are b Z, as in linear splatting: take exp(Z)": lambda x, b, Z: (b * Z) @ x / (b * Z).sum(),
    "b is left out: a pixel that hardly touches the target counts as one that hits it":
        lambda x, b, Z: Z.softmax(0) @ x,
    "Z is left out: that is average splatting": lambda x, b, Z: b @ x / b.sum(),
    "the sign of Z is wrong: a large Z wins": lambda x, b, Z: right.blend(x, b, -Z),
    "it is not divided by the sum of the weights": lambda x, b, Z: (b * Z.exp()) @ x,
    "it is divided by the number of pixels: divide by the sum of the weights":
        lambda x, b, Z: (b * Z.exp()) @ x / len(Z),
    "it is divided by the sum of exp(Z), without b: weights that do not add up to 1":
        lambda x, b, Z: (b * Z.exp()) @ x / Z.exp().sum(),
    "the winner takes all: each pixel has its share": lambda x, b, Z: x[(b * Z.exp()).argmax()],
}


def check_flow_slope(module):
    # A small picture is thrown for real, in float64, and one of its pixels a little farther: central differences.
    x, flow, grad = (t.double() for t in draw_uniform((1, 2, 5, 5), (1, 2, 5, 5), (1, 2, 5, 5)))
    y, x_ = 2, 1
    out, norm = warp.softsplat_plain(x, flow, None, "avg")
    step, losses = 1e-5, []
    for sign in (1, -1):
        moved = flow.clone()
        moved[0, 0, y, x_] += sign * step
        losses.append((grad * warp.softsplat_plain(x, moved, None, "avg")[0]).sum())
    want = (losses[0] - losses[1]) / (2 * step)

    v, u = y + int(flow[0, 1, y, x_]), x_ + int(flow[0, 0, y, x_])
    down = flow[0, 1, y, x_] % 1
    b_slope = torch.stack([-(1 - down), 1 - down, -down, down])
    at = [(v, u), (v, u + 1), (v + 1, u), (v + 1, u + 1)]
    I, g = (torch.stack([t[0, :, j, i] for j, i in at]) for t in (out, grad))
    N, colour = torch.stack([norm[0, 0, j, i] for j, i in at]), x[0, :, y, x_]
    compare(call(module.flow_slope, colour, b_slope, I, N, g), want, {
        sentence: wrong(colour, b_slope, I, N, g) for sentence, wrong in WRONG_SLOPES.items()})


WRONG_SLOPES = {
    "that is sum splatting: the norm changes as well when more of the pixel lands, so - I is missing (quotient rule)":
        lambda x, b, I, N, g: (b / N * (g * x).sum(1)).sum(),
    "it is not divided by N": lambda x, b, I, N, g: (b * (g * (x - I)).sum(1)).sum(),
    "the sign is wrong: a target turns towards the pixel's colour, x - I": lambda x, b, I, N, g: (
        b / N * (g * (I - x)).sum(1)).sum(),
    "it is divided by N twice: I is divided already": lambda x, b, I, N, g: (b / N**2 * (g * (x - I)).sum(1)).sum(),
    "grad is left out: the chain rule multiplies by it": lambda x, b, I, N, g: (b / N * (x - I).sum(1)).sum(),
    "it is the mean over the channels: the loss adds them up": lambda x, b, I, N, g: (
        b / N * (g * (x - I)).mean(1)).sum(),
}


MISTAKES = {
    "PREDICT_HOLES": [(0.5, "one direction"), (0.25, "share that is hit"), (0, "backward"), (0.9, "too large")],
    "fetch": list_mistakes(WRONG_FETCHES),
    "splat_row": list_mistakes(WRONG_ROWS),
    "normalise": [
        (lambda total, norm: total / norm, "0 / 0"),
        (lambda total, norm: total / norm.clamp(min=1), "below 1:"),
        (lambda total, norm: total / norm.clamp(min=1e-3), "below 0.001:"),
        (lambda total, norm: total / (norm + 1e-4), "norm == 0"),
        (lambda total, norm: total / (norm + 1e-7), "norm == 0"),
        (lambda total, norm: total, "sum splatting"),
    ],
    "blend": [
        (lambda x, b, Z: (b * Z.exp()) @ x / (b * Z.exp()).sum(), "overflow"),
        *list_mistakes(WRONG_BLENDS),
    ],
    "flow_slope": [*list_mistakes(WRONG_SLOPES), (lambda x, b, I, N, g: (b / N).abs().sum(), "is expected")],
}
