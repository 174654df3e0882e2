"""How well an edit follows its map: Differential Diffusion's Table 1 with Figure 11, Figures 19 and 26."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import diffdiff
from reproduce import charts
from reproduce.lab import FALSE, PART, TRUE, Outcome, item, judge, plus_minus, resampled, to_picture

CHAPTER = "Differential Diffusion"

# ---------------------------------------------------------------------------------------------------------------------
# Change maps drawn as in the paper's Figures 10 and 11


def pattern(name, size):
    """'gradient', 'shapes' or 'triangles' -> change map (size, size) in [0, 1]"""
    if name == "gradient":
        return torch.linspace(0, 1, size).expand(size, size)
    fine = 4 * size  # drawn large and averaged down, so that edges are smooth
    picture = Image.new("L", (fine, fine), 255)
    draw = ImageDraw.Draw(picture)

    def at(*points):
        return [(x * fine, y * fine) for x, y in points]

    if name == "shapes":  # three strengths, on what is kept
        draw.ellipse(at((0.07, 0.07), (0.49, 0.49)), fill=0)
        draw.rectangle(at((0.57, 0.14), (0.92, 0.49)), fill=85)
        draw.polygon(at((0.5, 0.55), (0.9, 0.95), (0.1, 0.95)), fill=170)
    else:  # eight strengths, each beside quite different ones
        rim = [(0, 0), (0.5, 0), (1, 0), (1, 0.5), (1, 1), (0.5, 1), (0, 1), (0, 0.5)]
        for i, level in enumerate((0, 4, 1, 5, 2, 6, 3, 7)):
            draw.polygon(at((0.5, 0.5), rim[i], rim[(i + 1) % 8]), fill=round(level * 255 / 7))
    grey = np.asarray(picture.resize((size, size), Image.Resampling.BOX), np.float32) / 255
    return torch.from_numpy(grey)


def wide_gradient(size):
    """The README's gradient, a third of it black: enough room for day to turn into night."""
    return ((torch.linspace(0, 1, size) - 0.3) / 0.65).clamp(0, 1).expand(size, size)


PATTERNS = ("gradient", "shapes", "triangles")
THRESHOLDS = {"gradient": [i / 10 for i in range(3, 8)], "shapes": [1 / 6, 1 / 2, 5 / 6],
              "triangles": [(i + 0.5) / 7 for i in range(7)]}  # all the different masks that the two last ones have

# ---------------------------------------------------------------------------------------------------------------------
# Table 1, Figure 11

OURS, BLD, INPAINT = "ours", "blended latent diffusion", "inpainting model"
PAPER_CAM = {"gradient": (0.97, 0.92, 0.93), "shapes": (0.81, 0.68, 0.65), "triangles": (0.93, 0.83, 0.82)}
PAPER_DAM = {"gradient": (19.41, 29.05, 28.69), "shapes": (52.2, 65.65, 67.84), "triangles": (35.75, 53.95, 54.44)}

SIDE = 128  # pixels of the maps that are measured, whatever the pictures' size: DAM grows with it
# The mean distance D under a map and B under a black one -> the edit strength
LESS, DIVIDED = "less the black map's", "over the black map's"
STRENGTH = {LESS: lambda D, B: D - B, DIVIDED: lambda D, B: D / B}


def pairs_of(lab, n):
    """n originals and a prompt for each."""
    return lab.images(n, seed=11, meadow=False), lab.prompts(n, seed=12)


def distances(lab, pairs, change_map, method=OURS):
    """How far the edits of `pairs` are from their originals, (N, SIDE, SIDE); and the edits."""
    (image, prompts), steps = pairs, lab.steps(15)
    if method == INPAINT:
        edited = lab.inpaint(image, change_map, prompts, steps=steps)
    else:
        how = diffdiff.blended_latent_diffusion if method == BLD else None
        edited = lab.edit(image, change_map, prompts, steps=steps, how=how)
    return F.adaptive_avg_pool2d(lab.distance(image, edited), SIDE), edited


@item(
    "table1", "Table 1, Figure 11", cost=310, needs=("weights", "inpainting_weights"),
    claim="An edit follows its change map more closely than blended latent diffusion and an inpainting model can with "
          "the best mask made from it. So it is for three patterns, in both metrics; and the measured maps show why, "
          "the others having two strengths only.",
    done="{pairs} held-out pictures, each with a prompt of its own (the paper's is empty) that names a place, a time "
         "and an object, {steps} steps of DDIM at a guidance of 7.5. E_M is the mean {distance} under the map less "
         "that under a black map, as in the paper; and, as a second measure of strength, over it. For the other "
         "methods the map is cut at a threshold: the best of all that matter, which is found with {tried} of the "
         "pictures. Errors by bootstrap over the pictures, with the same draws for all methods.",
    table=lambda r, t: table1_table(r), verdict=lambda r, t: table1_verdict(r),
)
def table1(lab):
    n, size = lab.count(96, 6), lab.model.size
    pairs, tried = pairs_of(lab, n), min(n, 16)
    few = tuple(part[:tried] for part in pairs)
    others = [BLD] + ([INPAINT] if lab.inpainting else [])
    planned = n * (4 + 3 * len(others)) + tried * len(others) * sum(map(len, THRESHOLDS.values()))

    def measured(pairs, change_map, method=OURS):
        D, _ = distances(lab, pairs, change_map, method)
        lab.tick(len(D) / planned)
        return D.flatten(1)

    black = {OURS: measured(pairs, torch.zeros(size, size))}
    black[BLD] = black[OURS]  # under a black map it is the same process
    if lab.inpainting:
        black[INPAINT] = measured(pairs, torch.zeros(size, size), INPAINT)
    found, rows = {p: {how: {} for how in STRENGTH} for p in PATTERNS}, []
    for name in PATTERNS:
        mu, M, shown = pattern(name, size), pattern(name, SIDE), {}
        D = measured(pairs, mu)
        for how, E in STRENGTH.items():
            ours = adherence(M, D, black[OURS], how)
            found[name][how][OURS] = scores(M, ours, ours)
            shown[how] = [charts.heat(-E(D.mean(0), black[OURS].mean(0)).view_as(M))]
        for method in others:
            B, sweep, full = black[method], {}, {}
            for threshold in THRESHOLDS[name]:
                sweep[threshold] = measured(few, (mu > threshold).float(), method).mean(0)
            for how, E in STRENGTH.items():
                cams = {t: diffdiff.cam(M, E(D, B[:tried].mean(0))) for t, D in sweep.items()}
                t = max(cams, key=cams.get)
                if t not in full:
                    full[t] = measured(pairs, (mu > t).float(), method)
                theirs, ours = adherence(M, full[t], B, how), adherence(M, D, black[OURS], how)
                found[name][how][method] = scores(M, theirs, ours) | {
                    "threshold": round(t, 3), "tried": [[round(t, 3), round(c, 3)] for t, c in cams.items()]}
                shown[how].append(charts.heat(-E(full[t].mean(0), B.mean(0)).view_as(M)))
        rows.append([charts.heat(M, 0, 1), *shown[LESS], *shown[DIVIDED]])
    heads = [f"{m}, {how}" for how in STRENGTH for m in (OURS, *others)]
    lab.save(charts.sheet(rows, ["change map", *heads], PATTERNS), "table1.png")
    caption = ("Figure 11: the maps, and the edit strength measured of each method. Black is most change and white "
               "least, stretched to the whole range in each.")
    inpainting = Path(lab.options.inpainting_weights).name if lab.inpainting else None
    return Outcome({"pairs": n, "tried": tried, "steps": lab.steps(15), "distance": lab.perceptual[0],
                    "inpainting model": inpainting, "patterns": found}, [("table1.png", caption)])


def adherence(M, D, B, how):
    """CAM of the mean over all pairs, and of every bootstrap draw: (1 + draws,). M (SIDE, SIDE); D, B (N, SIDE**2)"""
    weights = torch.cat([torch.full((1, len(D)), 1 / len(D)), resampled(len(D))])
    return torch.tensor([diffdiff.cam(M, E) for E in STRENGTH[how](weights @ D, weights @ B)], dtype=torch.double)


def scores(M, cam, ours):
    """What Table 1 says of a method, from its CAM and that of ours (1 + draws,): each value with its standard error"""
    dam = (M - M.mean()).double().norm() * (1 - cam**2).sqrt()  # the closed form of diffdiff.dam
    return {name: [round(x[0].item(), 4), round(x[1:].std().item(), 4)]
            for name, x in (("cam", cam), ("dam", dam), ("ours less this", ours - cam))}


def table1_table(results):
    rows = [["", "", *(f"{p}: {who}" for p in PATTERNS for who in ("paper", "here"))]]
    for how in STRENGTH:
        for metric, paper, digits in (("CAM", PAPER_CAM, 3), ("DAM", PAPER_DAM, 2)):
            for i, method in enumerate((OURS, BLD, INPAINT)):
                row = [f"{metric}, {how}" if i == 0 else "", method]
                for p in PATTERNS:
                    found = results["patterns"][p][how].get(method)
                    row += [str(paper[p][i]) if how == LESS else "",
                            plus_minus(found[metric.lower()], digits) if found else "not run"]
                rows.append(row)
    return rows


def table1_verdict(results):
    holds, found = {how: [] for how in STRENGTH}, []
    for method in (BLD, INPAINT):
        for how in STRENGTH:
            less = {p: of[how][method]["ours less this"] for p, of in results["patterns"].items() if method in of[how]}
            holds[how] += [value > 2 * error for value, error in less.values()]
            if less:
                values = ", ".join(f"{p} {value:+.3f} ± {error:.3f}" for p, (value, error) in less.items())
                found.append(f"Ours less {method} in CAM, {how}: {values}.")
    verdict = TRUE if all(holds[LESS]) else PART if any(holds[LESS]) or all(holds[DIVIDED]) else FALSE
    if not all(holds[LESS]):
        found.append("What is not beyond two standard errors does not count as come true.")
    if sum(holds[DIVIDED]) > sum(holds[LESS]):
        found.append("Why the two measures differ: the toy world's pictures all have the sky above and the ground "
                     "below, which measure differently at one strength, and in proportion. The black map's "
                     "measurement, taken off, then leaves the place's share on all that changes little; dividing does "
                     "not. A thousand photographs even it out.")
    if results["inpainting model"] is None:
        found.append("The third row needs an inpainting model (--inpainting-weights), and there was none. DAM orders "
                     "the methods as CAM does, being a function of |CAM| for each map (Figure 26).")
    return verdict, " ".join(found)


# ---------------------------------------------------------------------------------------------------------------------
# Figure 19


@item(
    "figure19", "Figure 19", cost=35,
    claim="One pair of pictures measures a change map very noisily, the mean over many pairs well. And what a "
          "perceptual distance says of one and the same strength differs from place to place.",
    done="The gradient of Table 1 on {pairs} pictures: correlation of the map with the measurement from n of them "
         "(mean of all disjoint groups of n), with the black map's measurement taken off, divided by it, and without "
         "it. The bias is the latter's standard deviation over the picture, over its mean.",
    table=lambda r, t: [["pairs", *(f"CAM, {how}" for how in r["kinds"])],
                        *[[str(n), *(f"{v:.3f}" for v in row)] for n, *row in r["by number of pairs"]]],
    verdict=lambda r, t: judge(
        (r["by number of pairs"][-1][1] > r["by number of pairs"][0][1] + 0.1,
         f"as in the paper, CAM goes from {r['by number of pairs'][0][1]:.2f} with one pair to "
         f"{r['by number of pairs'][-1][1]:.2f} with {r['by number of pairs'][-1][0]}"),
        (r["bias"] > 0.1, f"under a black map, where all is changed alike, the measurement varies by "
         f"{100 * r['bias']:.0f} %"),
    ),
)
def figure19(lab):
    n, size, M = lab.count(96, 6), lab.model.size, pattern("gradient", SIDE)
    pairs = image, _ = pairs_of(lab, n)
    maps = pattern("gradient", size), torch.zeros(size, size)
    (D, edited), (B, _) = (distances(lab, pairs, mu) for mu in lab.each(maps))
    kinds, found = {**STRENGTH, "as it is": lambda D, B: D}, []
    for size in [s for s in (1, 2, 4, 8, 16, 32, 96) if s <= n]:
        groups = [slice(i, i + size) for i in range(0, n - size + 1, size)]
        cams = [[diffdiff.cam(M, f(D[g].mean(0), B[g].mean(0))) for g in groups] for f in kinds.values()]
        found.append([size, *(round(float(np.mean(c)), 4) for c in cams)])
    shown = [charts.heat(M, 0, 1), to_picture(image[0]), to_picture(edited[0]), charts.heat(B[0] - D[0]),
             charts.heat((B - D).mean(0)), charts.heat(-B.mean(0)), charts.heat(-D.mean(0) / B.mean(0))]
    heads = ["change map", "an input", "its edit", "from one pair", f"from {n} pairs", "the bias", "over the bias"]
    lab.save(charts.sheet([shown], heads), "figure19.png")
    bias = B.mean(0).std() / B.mean()
    return Outcome({"pairs": n, "kinds": list(kinds), "by number of pairs": found, "bias": round(bias.item(), 3)},
                   [("figure19.png", "Black: most change. The bias is what is measured under a black map.")])


# ---------------------------------------------------------------------------------------------------------------------
# Figure 26


def figure26_maps(size=256):
    """Black on white: a circle, half of it, its inverse, and a triangle that covers about as much as the half."""
    along = (torch.arange(size) + 0.5) / size - 0.5
    x, y = along[None], along[:, None]
    circle = (x**2 + y**2 > 0.3**2).float()
    half = torch.where(x > 0, 1.0, circle)
    triangle = ((x < 0.04) | (y < 0.04) | (x + y > 0.62)).float()
    return {"a: circle": circle, "b: half of it": half, "c: inverted": 1 - circle, "d: triangle": triangle}


@item(
    "figure26", "Figure 26", cost=1,
    claim="CAM and DAM are different measures, although they order the methods of Table 1 alike. Compared with a "
          "circle, CAM calls half of it the most similar and the inverse the least of all, DAM the inverse the most; "
          "from the half to another shape CAM drops to almost 0 while DAM stays about where it was.",
    done="Maps drawn as the paper describes them, each against the circle. DAM is in map values over 256x256 pixels.",
    table=lambda r, t: [["against the circle", "CAM", "DAM", "DAM by its closed form"],
                        *[[name, *(f"{v:.3f}" for v in row)] for name, row in r["maps"].items()]],
    verdict=lambda r, t: figure26_verdict(r, t),
)
def figure26(lab):
    maps = figure26_maps()
    (_, M), *others = maps.items()
    spread, found = (M - M.mean()).norm().item(), {}
    for name, other in others:
        # The metrics compare a map with a change, which is large where the map is dark: the negative of a map.
        cam = diffdiff.cam(M, -other)
        found[name] = [round(cam, 4), round(diffdiff.dam(M, -other), 3), round(spread * (1 - cam**2) ** 0.5, 3)]
    lab.save(charts.sheet([[charts.heat(m, 0, 1) for m in maps.values()]], list(maps)), "figure26.png")
    # ||M - mean|| as each row of Table 1 implies it, the CAM being rounded to 0.01: is there one for all three?
    implied = {}
    for p in PATTERNS:
        bounds = [[D / (1 - (C + e) ** 2) ** 0.5 for e in (-0.005, 0.005)] for C, D in zip(PAPER_CAM[p], PAPER_DAM[p])]
        implied[p] = [round(max(low for low, _ in bounds), 1), round(min(high for _, high in bounds), 1)]
    return Outcome({"maps": found, "norms that Table 1 implies": implied}, [("figure26.png", "The maps.")])


def figure26_verdict(results, timings):
    maps = results["maps"]
    b, c, d = maps.values()
    verdict, why = judge(
        (b[0] > max(c[0], d[0]) and c[0] <= -0.999, f"CAM is highest, {b[0]:.2f}, for the half, and {c[0]:.2f}, the "
         "least there is, for the inverse"),
        (c[1] < min(b[1], d[1]), f"DAM is best, {c[1]:.2f}, for the inverse"),
        (abs(d[0]) < 0.2 and d[1] / b[1] < 1.5, f"from the half to the triangle CAM goes from {b[0]:.2f} to {d[0]:.2f} "
         f"and DAM from {b[1]:.0f} to {d[1]:.0f}"),
    )
    if max(abs(measured - closed) for _, measured, closed in maps.values()) < 0.1:
        why += (" But the two are less different than that: the least squares in DAM have a closed form, "
                "||M - mean|| sqrt(1 - CAM²). For one map, DAM is a function of |CAM| that forgets the sign, and it "
                "must order methods as CAM does.")
        if all(low <= high for low, high in results["norms that Table 1 implies"].values()):
            why += " All nine pairs of numbers in the paper's Table 1 obey it, up to their rounding."
    return verdict, why
