"""Lesson 5's figures: a row that is thrown, a disc that is moved, a slope that can be seen."""

import torch

import warp
from common.canvas import Canvas, to_picture

SIDE = 64
MOVE = 21.5  # pixels to the right


def draw(folder, dark):
    return [draw_row(folder, dark), draw_disc(folder, dark), draw_slope(folder, dark)]


def draw_row(folder, dark):
    """Eight pixels, their flow, and what each target gets."""
    canvas = Canvas(640, 230, dark)
    flow = torch.tensor([1.25, 0.25, 2.5, 0.0, -0.6, -1.0, 0.75, 1.5])
    W = len(flow)
    zero = torch.zeros(1, 1, 1, W)
    _, norm = warp.softsplat_plain(zero, torch.stack([flow, 0 * flow])[None, :, None], None, "avg")
    across = [110 + 64 * i for i in range(W)]
    canvas.text(14, 40, "pixel q", anchor="lm")
    canvas.text(14, 178, "target p", anchor="lm")
    canvas.text(14, 212, "norm", anchor="lm")
    for q, x in enumerate(across):
        canvas.text(x, 16, f"{flow[q]:+.2f}", 12, "mm")
        place = q + flow[q].item()
        for p in range(W):
            b = 1 - abs(p - place)
            if b > 0:
                colour = canvas.lines[q % len(canvas.lines)]
                canvas.arrow((x, 52), (across[p] + 9 * (q - p) / W, 164), colour, 1 + 3 * b)
        canvas.box(x - 10, 30, x + 10, 50, canvas.lines[q % len(canvas.lines)], radius=3)
    for p, x in enumerate(across):
        hole = norm[0, 0, 0, p].item() == 0
        canvas.box(x - 10, 168, x + 10, 188, canvas.paper if hole else canvas.faint, canvas.ink, radius=3)
        canvas.text(x, 212, "hole" if hole else f"{norm[0, 0, 0, p]:.2f}", 12, "mm")
    return canvas.save(folder, "lesson5-row")


def make_disc():
    """-> picture (1, 3, S, S) in [0, 1], disc (1, 1, S, S) in 0, 1: orange on blue-green stripes"""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    disc = ((x - 19) ** 2 + (y - 32) ** 2 <= 12.4**2).float()
    stripes = 0.5 + 0.5 * torch.sin((x + y) * 0.6)
    ground = torch.stack([0.12 + 0.1 * stripes, 0.3 + 0.2 * stripes, 0.38 + 0.22 * stripes])
    checks = ((x // 4 + y // 4) % 2).float()
    orange = torch.stack([0.8 + 0.1 * checks, 0.4 + 0.15 * checks, 0.1 + 0.1 * checks])
    return torch.lerp(ground, orange, disc)[None], disc[None, None]


def draw_disc(folder, dark):
    """One disc in four modes: moved, and moved and enlarged."""
    canvas = Canvas(800, 400, dark)
    picture, disc = make_disc()
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    flows = {"moved": torch.stack([MOVE + 0 * x, 0 * y])}
    flows["and larger"] = flows["moved"] + 0.5 * torch.stack([x - 19, y - 32])
    metric = 1 + 5 * disc
    heads = "before", "sum", "avg", "linear", "soft"
    for j, mode in enumerate(heads):
        canvas.text(88 + 144 * j + 68, 16, mode, 15, "mm")
    for i, (name, flow) in enumerate(flows.items()):
        top = 30 + 186 * i
        canvas.text(6, top + 68, name, 13, "lm")
        for j, mode in enumerate(heads):
            left = 88 + 144 * j
            if mode == "before":
                canvas.picture(to_picture(picture[0] * 2 - 1), left, top, 136, smooth=False)
                continue
            Z = metric if mode in ("linear", "soft") else None
            out, holes = warp.softsplat(picture, flow[None] * disc, Z, mode, holes=True)
            shown = torch.where(holes, torch.tensor([1.0, 0.0, 1.0])[:, None, None], out)
            canvas.picture(to_picture(shown[0] * 2 - 1), left, top, 136, smooth=False)
            canvas.text(left + 68, top + 150, f"red at its middle: {out[0, 0, 32, 40]:.2f}", 11, "mm")
    canvas.text(88, 396, "pink: holes. Z is 6 on the disc and 1 around it. The disc's own red is 0.8 or 0.9.", 12, "ld")
    return canvas.save(folder, "lesson5-disc")


def draw_slope(folder, dark):
    """The squared error against where the disc is moved to, and the slope that the backward pass says."""
    canvas = Canvas(640, 330, dark)
    with torch.inference_mode(False), torch.enable_grad():
        picture, disc = make_disc()
        right = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)

        def splat(shift, strength):
            return warp.softsplat(picture, shift * right * disc, strength * disc)

        place = canvas.axes((60, 30, 620, 260), (14, 29), (0, 1), "shift of the disc, pixels",
                            "squared error to the disc moved by 21.5, over its largest", ticks=6)
        for k, (name, strength) in enumerate({"Z is 0.5 more on the disc": 0.5, "Z is 5 more": 5.0}.items()):
            target = splat(MOVE, strength)
            shifts = torch.linspace(14, 29, 301)
            curve = torch.stack([(splat(shift, strength) - target).square().sum() for shift in shifts])
            most = 1.05 * curve.max()
            canvas.line([place(*point) for point in zip(shifts.tolist(), (curve / most).tolist())], canvas.lines[k])
            for at in torch.arange(14.75, 29, 1.5):
                shift = at.clone().requires_grad_()
                loss = (splat(shift, strength) - target).square().sum() / most
                slope, = torch.autograd.grad(loss, shift)
                ends = [(at.item() + d, loss.item() + d * slope.item()) for d in (-0.45, 0.45)]
                canvas.line([place(*end) for end in ends], canvas.ink, 3)
                canvas.dot(*place(at.item(), loss.item()), canvas.lines[k], 3.5)
            canvas.text(60 + 220 * k, 312, name, 13, "ld", canvas.lines[k])
    canvas.text(620, 312, "strokes: the slope that autograd says", 12, "rd")
    return canvas.save(folder, "lesson5-slope")
