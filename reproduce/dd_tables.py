"""Differential Diffusion's tables, and what they rest on: Table 1 with Figures 11, 19 and 26; Table 4; section 5.4."""

import functools
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import diffdiff
import diffusion
import samplers
from reproduce import blended, charts
from reproduce.lab import FALSE, PART, TRUE, Outcome, item, judge, percent, plus_minus, progress
from reproduce.metrics import cam, dam, drawn_error, resample

# ---------------------------------------------------------------------------------------------------------------------
# Change maps drawn as in the paper's Figures 10 and 11

PATTERNS = ("gradient", "shapes", "triangles")
THRESHOLDS = {"gradient": [i / 10 for i in range(3, 8)], "shapes": [1 / 6, 1 / 2, 5 / 6],
              "triangles": [(i + 0.5) / 7 for i in range(7)]}  # all the different masks that the two last ones have


def pattern(name, size):
    """One of PATTERNS -> change map (size, size) in [0, 1]"""
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


def distance_from(size, x, y):
    """How far every pixel is from a point, all in terms of the picture's side -> (size, size)"""
    along = (torch.arange(size) + 0.5) / size
    return ((along[None] - x) ** 2 + (along[:, None] - y) ** 2).sqrt()


def wide_gradient(size):
    """The README's gradient, a third of it black: enough room for day to turn into night."""
    return ((torch.linspace(0, 1, size) - 0.3) / 0.65).clamp(0, 1).expand(size, size)


# ---------------------------------------------------------------------------------------------------------------------
# Table 1, Figure 11

OURS, BLD, INPAINT = "ours", "blended latent diffusion", "inpainting model"
PAPER_CAM = {"gradient": (0.97, 0.92, 0.93), "shapes": (0.81, 0.68, 0.65), "triangles": (0.93, 0.83, 0.82)}
PAPER_DAM = {"gradient": (19.41, 29.05, 28.69), "shapes": (52.2, 65.65, 67.84), "triangles": (35.75, 53.95, 54.44)}

SIDE = 128  # pixels of the maps that are measured, whatever the pictures' size: DAM grows with it
# The mean distance D under a map and B under a black one -> the edit strength
LESS, DIVIDED = "less the black map's", "over the black map's"
STRENGTH = {LESS: lambda D, B: D - B, DIVIDED: lambda D, B: D / B}


PAIRS, STEPS = 1000, 100  # of the paper


def draw_originals(lab):
    """How many the paper measures on: with --as-paper so many, otherwise what a CPU has time for."""
    return lab.images(PAIRS if lab.options.as_paper else lab.count(64, 6), seed=11, meadow=False)


def count_steps(lab):
    return STEPS if lab.options.as_paper else lab.steps


def measure_distances(lab, image, change_map, method=OURS):
    """How far the edits of `image` are from it, (N, SIDE**2); and the edits. The prompt is empty, as in the paper, so
    that guidance changes nothing, and half of the work is saved."""
    options = dict(steps=count_steps(lab), guidance=1.0)
    if method == INPAINT:
        edited = lab.inpaint(image, change_map, "", **options)
    elif method == BLD:
        edited = lab.edit(image, change_map, "", how=blended.edit, dilations=2, **options)
        edited = torch.where(change_map > 0.5, image, edited)  # its background in pixels; a decoder each took days
    else:
        edited = lab.edit(image, change_map, "", **options)
    return F.adaptive_avg_pool2d(lab.distance(image, edited), SIDE).flatten(1), edited


@functools.lru_cache(maxsize=4)
def measure_ours(lab, name):
    """`measure_distances` under one of PATTERNS, or a black map, kept for the next item that asks"""
    size = lab.model.size
    return measure_distances(lab, draw_originals(lab), pattern(name, size) if name else torch.zeros(size, size))


@item("table1", "Table 1, Figure 11", needs=("weights", "inpainting_weights"))
def table1(lab):
    """An edit follows its change map more closely than blended latent diffusion and an inpainting model can with the
    best mask made from it. So it is for three patterns, in both metrics.

    {n} held-out pictures, an empty prompt, {steps} steps of DDIM (--as-paper: 1,000 pictures, 100 steps). E_M is
    the mean {distance} under the map less that under a black map, as in the paper; and, as a second measure, over it.
    The verdict is the first one's. For the other methods the map is cut at the best of all thresholds that matter,
    found with {tried} of the pictures; what is best by CAM is so by DAM. Blended latent diffusion is the published one,
    with masks that shrink and the background put back in pixels. Errors by bootstrap, the same draws for all methods.
    """
    size, image = lab.model.size, draw_originals(lab)
    n, tried = len(image), min(len(image), 16)
    black = {OURS: measure_ours(lab, None)[0]}
    black[BLD] = black[OURS]  # under a black map it is the same process
    if lab.inpainting:
        black[INPAINT], _ = measure_distances(lab, image, torch.zeros(size, size), INPAINT)
    methods = list(black)
    found, sheet = {p: {how: {} for how in STRENGTH} for p in PATTERNS}, []
    for name in progress(PATTERNS):
        mu, M, shown = pattern(name, size), pattern(name, SIDE), {how: [] for how in STRENGTH}
        ours, full = {}, {(OURS, None): measure_ours(lab, name)[0]}
        for method in methods:
            B, sweep = black[method], {}
            for t in THRESHOLDS[name] if method != OURS else ():
                D, _ = measure_distances(lab, image[:tried], (mu > t).float(), method)
                sweep[t] = D.mean(0)
            for how, E in STRENGTH.items():
                cams = {t: cam(M, E(D, B[:tried].mean(0))) for t, D in sweep.items()}
                t = max(cams, key=cams.get, default=None)
                if (method, t) not in full:
                    full[method, t], _ = measure_distances(lab, image, (mu > t).float(), method)
                theirs = bootstrap_cam(M, full[method, t], B, how)
                found[name][how][method] = score_method(M, theirs, ours.setdefault(how, theirs)) | {
                    "threshold": t, "tried": [[round(t, 3), round(c, 3)] for t, c in cams.items()]}
                shown[how].append(charts.heat(-E(full[method, t].mean(0), B.mean(0)).view_as(M)))
        sheet.append([M, *shown[LESS], *shown[DIVIDED]])
    heads = [f"{m}, {how}" for how in STRENGTH for m in methods]
    lab.save(charts.sheet(sheet, ["change map", *heads], PATTERNS), "table1.png")
    results = {"n": n, "tried": tried, "steps": count_steps(lab), "distance": lab.perceptual[0],
               "inpainting model": lab.options.inpainting_weights.name if lab.inpainting else None, "patterns": found}
    caption = ("Figure 11: the maps, and the edit strength measured of each method. Black is most change and white "
               "least, stretched to the whole range in each.")
    return Outcome(results, table1_verdict(results), table1_table(found), [("table1.png", caption)])


def bootstrap_cam(M, D, B, how):
    """CAM of the mean over all pairs, and of every bootstrap draw: (1 + draws,). M (SIDE, SIDE); D, B (N, SIDE**2)"""
    weights = resample(len(D))
    return torch.tensor([cam(M, E) for E in STRENGTH[how](weights @ D, weights @ B)], dtype=torch.double)


def score_method(M, theirs, ours):
    """What Table 1 says of a method, from its CAM and that of ours (1 + draws,): each value with its standard error"""
    distance = (M - M.mean()).double().norm() * (1 - theirs**2).sqrt()  # the closed form of `dam`
    return {name: drawn_error(x) for name, x in (("cam", theirs), ("dam", distance), ("ours less this", ours - theirs))}


def table1_table(patterns):
    rows = [["", "", *(f"{p}: {who}" for p in PATTERNS for who in ("paper", "here"))]]
    for how in STRENGTH:
        for metric, paper, digits in (("CAM", PAPER_CAM, 3), ("DAM", PAPER_DAM, 2)):
            for i, method in enumerate((OURS, BLD, INPAINT)):
                row = [f"{metric}, {how}" if i == 0 else "", method]
                for p in PATTERNS:
                    found = patterns[p][how].get(method)
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
    verdict = TRUE if all(holds[LESS]) else PART if any(holds[LESS]) else FALSE
    if not all(holds[LESS]):
        found.append("What is not beyond two standard errors does not count as come true.")
    if results["inpainting model"] is None:
        found.append("The third row needs an inpainting model (--inpainting-weights), and there was none.")
    return verdict, " ".join(found)


MINIMA = [i / 10 for i in range(10)]
PAPER_SAVED = (0, 10.74, 20.55, 29.90, 39.87, 49.70, 59.51, 69.37, 79.17, 88.99)  # percent, against no skipping


@item("figure23", "Table 4, Figure 23")
def figure23(lab):
    """Skipping makes the running time fall in a line with the map's minimum. At a minimum of 0.9 it saves 89 %.

    Gradient maps from each minimum up to 1, {n} pictures at a time, {steps} steps, guidance 7.5: seconds of the
    diffusion loop, medians of {rounds} rounds that go through all maps in turn.
    """
    size, steps, rounds = lab.model.size, 2 * lab.steps, 3
    image = lab.images(4)
    sampler = samplers.make_sampler("ddim", lab.model.schedule, steps)
    z_init = lab.model.encode_image(image.to(lab.device))
    noise = torch.randn(z_init.shape, generator=torch.Generator().manual_seed(0)).to(lab.device)
    denoise = lab.model.denoiser([lab.options.prompt] * len(image), guidance=7.5)
    calls, seconds = {}, {m: [] for m in [None, *MINIMA]}

    def timed(minimum):
        calls[minimum] = 0
        mu = torch.linspace(minimum or 0, 1, size).expand(size, size)
        # The mean over a latent pixel is above the map's least value: give that a whole column of latents.
        mu = torch.cat([torch.full((size, size // 16), minimum or 0.0), mu[:, size // 16 :]], 1)

        def counted(z, t):
            calls[minimum] += 1
            return denoise(z, t)

        start = time.perf_counter()
        z = diffdiff.differential_diffusion(counted, z_init, mu, sampler, noise, skip=minimum is not None)
        if z.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed(0.9)  # warm
    for _ in progress(range(rounds)):
        for minimum in seconds:
            seconds[minimum].append(timed(minimum))
    without, *median = (float(np.median(s)) for s in seconds.values())
    slope, start = np.polyfit(1 - np.array(MINIMA), median, 1)
    fit = start + slope * (1 - np.array(MINIMA))
    R2 = float(1 - np.square(median - fit).sum() / np.square(median - np.mean(median)).sum())
    saved = [1 - m / without for m in median]
    series = {"measured": (MINIMA, median), f"line, R2 = {R2:.4f}": (MINIMA, fit),
              "no skipping": ([0, 0.9], [without, without])}
    lab.save(charts.chart(series, "minimum of the change map", "seconds"), "figure23-chart.png")
    table = [["map's minimum", "steps run", "time", "saved: paper", "saved: here"],
             ["no skipping", str(steps), f"{without:.2f} s", "", ""]]
    for m, spent, paper, here in zip(MINIMA, median, PAPER_SAVED, saved):
        table.append([f"{m:.1f}", str(calls[m]), f"{spent:.2f} s", f"{paper:.1f} %", percent(here, 1)])
    return Outcome(
        {"n": len(image), "steps": steps, "rounds": rounds, "steps run": [calls[m] for m in MINIMA]},
        judge((R2 >= 0.99, f"R² of the line is {R2:.4f}"),
              (saved[-1] >= 0.85, f"at a minimum of 0.9 skipping saves {percent(saved[-1], 1)}")),
        table, [("figure23-chart.png", "Figure 23: running time of the diffusion loop against the map's minimum.")],
        {"no skipping": round(without, 3), "seconds by minimum": [round(s, 3) for s in median], "R2": round(R2, 5),
         "saved at 0.9": round(saved[-1], 4)},
    )


@item("figure19", "Figure 19")
def figure19(lab):
    """One pair of pictures measures a change map very noisily, the mean over many pairs well. And a perceptual distance
    of one and the same strength differs from place to place.

    The gradient of Table 1 on {n} pictures: correlation of the map with the measurement from n of them (mean of all
    disjoint groups of n), less the black map's, over it, and as it is. The bias is the black map's standard deviation
    over the picture, over its mean.
    """
    M, image = pattern("gradient", SIDE), draw_originals(lab)
    n = len(image)
    (D, edited), (B, _) = measure_ours(lab, "gradient"), measure_ours(lab, None)
    D, B = (x.view(n, SIDE, SIDE) for x in (D, B))
    kinds, found = {**STRENGTH, "as it is": lambda D, B: D}, []
    for group in [s for s in (1, 2, 4, 8, 16, 32, 64, 1000) if s <= n]:
        groups = [slice(i, i + group) for i in range(0, n - group + 1, group)]
        cams = [[cam(M, f(D[g].mean(0), B[g].mean(0))) for g in groups] for f in kinds.values()]
        found.append([group, *(round(float(np.mean(c)), 4) for c in cams)])
    heads = ["change map", "an input", "its edit", "from one pair", f"from {n} pairs", "the bias", "over the bias"]
    measured = (B[0] - D[0], (B - D).mean(0), -B.mean(0), -D.mean(0) / B.mean(0))
    lab.save(charts.sheet([[M, image[0], edited[0], *map(charts.heat, measured)]], heads), "figure19.png")
    bias, one, many = round((B.mean(0).std() / B.mean()).item(), 3), found[0][1], found[-1][1]
    return Outcome(
        {"n": n, "kinds": list(kinds), "by number of pairs": found, "bias": bias},
        judge((many > one + 0.1, f"as in the paper, CAM goes from {one:.2f} with one pair to {many:.2f} with "
               f"{found[-1][0]}"),
              (bias > 0.1, "under a black map, where all is changed alike, the measurement varies by "
               f"{percent(bias)}")),
        [["pairs", *(f"CAM, {how}" for how in kinds)], *([str(n), *(f"{v:.3f}" for v in row)] for n, *row in found)],
        [("figure19.png", "Black: most change. The bias is what is measured under a black map.")])


@item("figure26", "Figure 26")
def figure26(lab):
    """CAM and DAM are different measures. Of a circle's half, its inverse and a triangle, CAM finds the half most like
    the circle, DAM the inverse; from the half to the triangle CAM drops to almost 0, and DAM hardly.

    Maps drawn as the paper describes them, each against the circle. DAM is in map values over 256x256 pixels.
    """
    # Black on white: a circle, half of it, its inverse, and a triangle that covers about as much as the half.
    along = (torch.arange(256) + 0.5) / 256 - 0.5
    x, y = along[None], along[:, None]
    circle = (x**2 + y**2 > 0.3**2).float()
    triangle = ((x < 0.04) | (y < 0.04) | (x + y > 0.62)).float()
    others = {"b: half of it": torch.where(x > 0, 1.0, circle), "c: inverted": 1 - circle, "d: triangle": triangle}
    lab.save(charts.sheet([[circle, *others.values()]], ["a: circle", *others]), "figure26.png")
    spread, found = (circle - circle.mean()).norm().item(), {}
    for name, other in others.items():
        # The metrics compare a map with a change, which is large where the map is dark: the negative of a map.
        c = cam(circle, -other)
        found[name] = [round(c, 4), round(dam(circle, -other), 3), round(spread * (1 - c**2) ** 0.5, 3)]
    # ||M - mean|| as each row of Table 1 implies it, the CAM being rounded to 0.01: is there one for all three?
    implied = {}
    for p in PATTERNS:
        bounds = [[D / (1 - (C + e) ** 2) ** 0.5 for e in (-0.005, 0.005)] for C, D in zip(PAPER_CAM[p], PAPER_DAM[p])]
        implied[p] = [round(max(low for low, _ in bounds), 1), round(min(high for _, high in bounds), 1)]
    b, c, d = found.values()
    verdict, why = judge(
        (b[0] > max(c[0], d[0]) and c[0] <= -0.999, f"CAM is highest, {b[0]:.2f}, for the half, and {c[0]:.2f}, the "
         "least there is, for the inverse"),
        (c[1] < min(b[1], d[1]), f"DAM is best, {c[1]:.2f}, for the inverse"),
        (abs(d[0]) < 0.2 and d[1] / b[1] < 1.5, f"from the half to the triangle CAM goes from {b[0]:.2f} to {d[0]:.2f} "
         f"and DAM from {b[1]:.0f} to {d[1]:.0f}"),
    )
    if max(abs(measured - closed) for _, measured, closed in found.values()) < 0.1:
        why += (" But DAM has a closed form, ||M - mean|| sqrt(1 - CAM²): for one map it is a function of |CAM| that "
                "forgets the sign, and must order methods as CAM does.")
        if all(low <= high for low, high in implied.values()):
            why += " All nine pairs of numbers in the paper's Table 1 obey it, up to their rounding."
    table = [["against the circle", "CAM", "DAM", "DAM by its closed form"],
             *([name, *(f"{v:.3f}" for v in row)] for name, row in found.items())]
    return Outcome({"maps": found, "norms that Table 1 implies": implied}, (verdict, why), table,
                   [("figure26.png", "The maps.")])


# ---------------------------------------------------------------------------------------------------------------------
# Section 5.4: memory


class Live(TorchDispatchMode):
    """with Live() as live: ... -> live.peak, the most bytes at one time in tensors that were made inside."""

    def __init__(self):
        super().__init__()
        self.peak, self.alive = 0, {}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}  # of which there are views
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = StorageWeakRef(tensor.untyped_storage())
                self.alive[storage.cdata] = storage, tensor.untyped_storage().nbytes()
        self.alive = {key: (s, n) for key, (s, n) in self.alive.items() if not s.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return out


def peak_memory(f):
    with Live() as live:
        f()
    return live.peak


IMG2IMG = 3e6 / 0.0007  # bytes: the paper's 3 MB are 0.07 % of it


@item("memory", "Section 5.4")
def memory(lab):
    """A change map adds less than 3 MB to what image to image takes, 0.07 %.

    The most bytes in PyTorch's tensors at one time, in Algorithm 1 with a gradient less the same in SDEdit: of the
    loaded model, {steps} steps; and at Stable Diffusion 2.1's sizes, a 512x512 map, 64x64 latents in fp32, 100 steps,
    without the network, which is the same in both.
    """
    def added(denoise, z_init, sampler, size):
        noise, algorithm = torch.zeros_like(z_init), diffdiff.differential_diffusion
        plain = peak_memory(lambda: diffdiff.sdedit(denoise, z_init, 1.0, sampler, noise))
        mapped = peak_memory(lambda: algorithm(denoise, z_init, pattern("gradient", size).clone(), sampler, noise))
        return mapped - plain, plain

    steps, z_init = lab.steps, lab.model.encode_image(lab.images(1).to(lab.device))
    denoise = lab.model.denoiser([lab.options.prompt], guidance=7.5)
    denoise(z_init, torch.full((1,), 500, device=lab.device))  # what is made once
    own, plain = added(denoise, z_init, samplers.make_sampler("ddim", lab.model.schedule, steps), lab.model.size)
    sampler = samplers.make_sampler("ddim", diffusion.Schedule(), 100)
    full, _ = added(lambda z, t: torch.zeros_like(z), torch.zeros(1, 4, 64, 64, device=lab.device), sampler, 512)
    return Outcome(
        {"steps": steps, "added, Stable Diffusion": full, "added": own, "image to image": plain},
        judge((full < 3e6, f"{full / 1e6:.2f} MB at Stable Diffusion's sizes, most of it the map; each mask and each "
               "noised original is made when it is needed (all ahead, as section 6 proposes, would be 6.5 MB)")),
        [["", "paper", "here"], ["added, Stable Diffusion's sizes", "under 3 MB", f"{full / 1e6:.2f} MB"],
         ["of the paper's image to image", "0.07 %", percent(full / IMG2IMG, 3)],
         ["added, the loaded model", "", f"{own / 1e6:.3f} MB"],
         ["image to image, the loaded model, over its weights", "", f"{plain / 1e6:.1f} MB"]])
