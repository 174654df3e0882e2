"""More strengths than k + 1 in k steps: three ways to what the paper leaves open, beside its own rule."""

import torch
import torch.nn.functional as F

from editing.few_steps import blend_overrides
from reproduce import baselines, charts
from reproduce.dd_tables import LESS, SIDE, bootstrap_cam
from reproduce.lab import Outcome, item, judge, plus_minus
from reproduce.metrics import drawn_error, is_surely_less, resample

STAIRS = 16
PLAIN = "the paper's rule"
WAYS = {PLAIN: None, "dithered": baselines.dither, "blended": blend_overrides,
        "own schedules": baselines.own_schedules}


@item("few_steps", "More strengths than steps")
def few_steps(lab):
    """With k steps a map has k + 1 strengths. Dithering it over neighbouring latents, blending at each pixel's last
    override, or a noise level of its own for each pixel to start at, gives more, and costs nothing.

    A staircase of 16 strengths, once to the right and once to the left, on {n} pictures, in trailing steps of DDIM.
    Told apart: stairs that change more than the next one by two standard errors. The seam: how much the change differs
    between neighbouring latents, root of the mean square, of 255, for as much change as a black map's.
    """
    n, size = lab.count(24, 2), lab.model.size
    prompts = lab.prompts(n, seed=12)
    image = lab.images(n, seed=11, meadow=False)
    schedule = lab.model.schedule
    spacing, schedule.spacing = schedule.spacing, "trailing"
    found, sheet, parts = {}, [], []
    table = [["steps", "", "told apart", "CAM", "less the paper's", "seam", "less the paper's"]]
    for k in (4,) if lab.quick else (4, 8):
        black = measure(lab, image, lab.edit(image, torch.zeros(size, size), prompts, steps=k))
        runs = {way: run_staircases(lab, image, prompts, black, k, how, sheet) for way, how in WAYS.items()}
        found[k] = {way: score(one, runs[PLAIN]) for way, one in runs.items()}
        for way, one in found[k].items():
            numbers = [plus_minus(one[name], digits) for name, digits in
                       (("cam", 3), ("cam less the paper's", 3), ("seam", 1), ("seam less the paper's", 1))]
            table.append([str(k), way, str(one["told apart"]), *numbers])
            if way != PLAIN:
                more = one["told apart"] > found[k][PLAIN]["told apart"]
                worse, error = one["seam less the paper's"]
                parts.append((more and worse < 2 * error, f"{way} in {k} steps: {one['told apart']} strengths for "
                              f"{found[k][PLAIN]['told apart']}, and a seam of {one['seam'][0]} for "
                              f"{found[k][PLAIN]['seam'][0]}"))
    schedule.spacing = spacing
    heads = [f"edit {i + 1}" for i in range(len(sheet[0]))]
    lab.save(charts.sheet(sheet, heads, [f"{way}, {k}" for k in found for way in WAYS]), "few_steps.png")
    return Outcome({"n": n, "by steps": found}, judge(*parts), table, [("few_steps.png", "Strongest on the right.")])


def measure(lab, image, edited):
    """-> distances (N, SIDE, SIDE)"""
    return F.adaptive_avg_pool2d(lab.distance(image, edited), SIDE)


def run_staircases(lab, image, prompts, black, k, how, sheet):
    """-> change of each stair (N, STAIRS), over the black map's at its place; CAM with its bootstrap (1 + draws,); the
    steps between neighbouring latents (N,). A row of `sheet` gets the first edits."""
    stairs, cams, seams = [], [], []
    B = black.mean((0, 1)).view(STAIRS, -1).mean(1)
    for turned in (False, True):
        mu, M = (draw_staircase(side, turned) for side in (lab.model.size, SIDE))
        edited = lab.edit(image, mu, prompts, steps=k, how=how)
        D = measure(lab, image, edited)
        by_place = D.mean(1).view(len(D), STAIRS, -1).mean(2) / B
        stairs.append(by_place.flip(1) if turned else by_place)
        cams.append(bootstrap_cam(M, D.flatten(1), black.flatten(1), LESS))
        change = F.avg_pool2d((edited - image) * 127.5, lab.model.vae.config.factor)
        squares = [change.diff(dim=axis).square().mean((1, 2, 3)) for axis in (2, 3)]
        seams.append((sum(squares) / 2).sqrt())
    sheet.append(list(edited[:6]))
    return sum(stairs) / 2, sum(cams) / 2, sum(seams) / 2


def draw_staircase(side, turned):
    """-> change map (side, side) of STAIRS strengths, white on the right, or turned on the left"""
    mu = (torch.arange(side) * STAIRS // side / (STAIRS - 1)).expand(side, side)
    return mu.flip(1) if turned else mu


def score(one, plain):
    stairs, cams, _ = one
    told = [is_surely_less(stairs[:, j + 1], stairs[:, j]) for j in range(STAIRS - 1)]
    seams, plain_seams = (weigh_seam(*each) for each in (one, plain))

    return {
        "told apart": 1 + sum(told),
        "stairs": [round(x, 3) for x in stairs.mean(0).tolist()],
        "cam": drawn_error(cams),
        "cam less the paper's": drawn_error(cams - plain[1]),
        "seam": drawn_error(seams, 2),
        "seam less the paper's": drawn_error(seams - plain_seams, 2),
    }


def weigh_seam(stairs, _, seams):
    """Of all edits, and of every bootstrap draw, over the change: (1 + draws,). A weaker edit has weaker seams."""
    weights = resample(len(seams))
    return (weights @ seams) / (weights @ stairs.mean(1))
