"""Differential Diffusion's figures of what it is good for: 6 with 12, 7 with 24 and 25, 14, 16.

As in dd_figures.py, what the figures are to show is also measured, and the pictures are the first ones.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

import diffdiff
from checkpoints import published
from editing import change_maps as maps
from networks import midas
from reproduce import baselines as compositing
from reproduce import charts
from reproduce.dd_tables import CHAPTER
from reproduce.lab import Outcome, item, judge, mean_error, plus_minus, sharpness, surely_less, to_bytes, to_picture
from toy import world as toyworld

# ---------------------------------------------------------------------------------------------------------------------
# Figures 6 and 12

METHODS = ("no softening", "alpha", "Poisson", "Laplace", "standard softening", "ours")
RADII = (64, 40, 10)  # pixels of 512, of the paper's three rows
REGION = ("a yellow house on sand at sunset", "a red mushroom on snow at noon", "a blue ball on grass at noon")


def standard_softening(denoise, z_init, mu, sampler, noise, step_noise=None):
    """As Stable Diffusion's web UI softens: after each step the latent is a mixture, by the blurred mask, with the
    noised original."""
    keep = diffdiff.down_sample(mu, z_init.shape[-2:]).to(z_init.device)
    z = sampler.noise_to(0, z_init, noise)
    for i in range(sampler.k):
        z, _ = sampler.step(denoise, z, i)
        original = sampler.noise_to(i + 1, z_init, noise) if i + 1 < sampler.k else z_init
        z = keep * original + (1 - keep) * z
    return z


def surprise(model, x, where):
    """How unlike what the model has learned a picture is: its mean squared error at telling the noise in it, without a
    prompt, at three levels. x (B, 3, H, W) in [-1, 1], where (h, w) bool: of the latent's pixels there -> (B,)"""
    z = model.encode_image(x)
    denoise, errors = model.denoiser([""] * len(x)), []
    for t in (100, 200, 300):
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(t)).to(z)
        times = torch.full((len(z),), t, device=z.device)
        z_t = model.schedule.add_noise(z, noise, t)
        _, eps = model.schedule.convert_output(denoise(z_t, times), z_t, t)
        errors.append((eps - noise).square().mean(1)[:, where].mean(1))
    return torch.stack(errors).mean(0).cpu()


def soft_table(results, timings):
    head = ["", *METHODS, "originals"]
    rows = [head]
    for what, row in results["measured"].items():
        rows.append([what, *[plus_minus(row[m], 3) for m in (*METHODS, "originals")]])
    return rows


def soft_verdict(results, timings):
    surprised, changed = (results["measured"][k] for k in ("surprise around the rim", "change around the rim"))
    ours, less = surprised["ours"][0], results["less surprise than"]
    verdict, _ = judge(*[(ok, m) for m, ok in less.items()])
    more, others = (", ".join(f"{m} ({surprised[m][0]:.3f})" for m, ok in less.items() if ok == wanted) or "none"
                    for wanted in (True, False))
    why = (f"Around the rim the model's surprise is {ours:.3f} with ours (originals: {surprised['originals'][0]:.3f}). "
           f"By two standard errors more: {more}. Not so: {others}.")
    fainter = [m for m, ok in less.items() if not ok and changed[m][0] < 0.9 * changed["ours"][0]]
    if fainter:
        why += f" But of these, {', '.join(fainter)} changed less there, and what stays as it was surprises nobody."
    return verdict, why


@item(
    "figure6", "Figures 6 and 12", chapter=CHAPTER, cost=105,
    claim="Soft-inpainting by a blurred mask as change map blends more naturally than compositing. No softening, "
          "alpha, Poisson and Laplace compositing and softening as in Stable Diffusion's web UI show artifacts at the "
          "transition.",
    done="A disc of {n} meadows repainted to three prompts, with the three blurs of Figure 12 scaled to the "
         "picture. Alpha, Poisson and Laplace paste the hard-masked edit by the blurred mask. Measured around the rim: "
         "the base model's surprise, which is its error at telling noise in the picture (less: more like what it has "
         "learned); the steepness of grey values at the mask's edge; and the {distance} from the input, since what "
         "changes nothing surprises nobody.",
    table=soft_table, verdict=soft_verdict,
)
def figure6(lab):
    n, size, steps = lab.count(16, 3), lab.model.size, lab.steps(50)
    image = lab.images(n)
    along = (torch.arange(size) + 0.5) / size - 0.5
    disc = ((along[None] ** 2 + (along[:, None] - 0.08) ** 2).sqrt() > 0.3).float()  # 0 = repaint
    found = {m: ([], [], []) for m in (*METHODS, "originals")}
    rows = []
    for radius, prompt in zip(RADII, REGION):
        mu = diffdiff.soft_inpainting_map(disc, radius * size / 512)[0, 0]
        hard = lab.edit(image, disc, prompt, steps=steps, each=lab.each)
        edits = {"no softening": hard}
        for name, paste in (("alpha", compositing.alpha), ("Poisson", compositing.poisson),
                            ("Laplace", compositing.laplace)):
            pasted = [paste(to_bytes(a), to_bytes(b), mu.numpy()) for a, b in zip(image, hard)]
            edits[name] = torch.from_numpy(np.stack(pasted)).permute(0, 3, 1, 2) / 127.5 - 1
        edits["standard softening"] = lab.edit(image, mu, prompt, steps=steps, how=standard_softening, each=lab.each)
        edits["ours"] = lab.edit(image, mu, prompt, steps=steps, each=lab.each)
        h = size // lab.model.vae.config.factor
        soft = diffdiff.down_sample(mu, (h, h))[0, 0]
        rim = ((soft > 0.02) & (soft < 0.98)).to(lab.device)
        edge = (F.max_pool2d(disc[None, None], 5, 1, 2) - disc[None, None] > 0)[0, 0, :-1, :-1]
        blend = (mu > 0.02) & (mu < 0.98)  # the rim in pixels
        for method, x in (edits | {"originals": image}).items():
            for batch in x.split(lab.at_once):
                found[method][0].append(surprise(lab.model, batch.to(lab.device), rim))
            found[method][1].append(sharpness(x / 2 + 0.5)[:, edge].mean(1))
            found[method][2].append(lab.distance(image, x)[:, blend].mean(1))
        rows.append([to_picture(image[len(rows)]), charts.heat(mu, 0, 1),
                     *[to_picture(edits[m][len(rows)]) for m in METHODS]])
    every = {m: [torch.cat(x) for x in three] for m, three in found.items()}
    lab.save(charts.sheet(rows, ["input", "map of ours", *METHODS], REGION), "figure6.png")
    return Outcome({"n": n, "distance": lab.perceptual[0], "measured": {
        "surprise around the rim": {m: mean_error(every[m][0]) for m in every},
        "steepness at the mask's edge": {m: mean_error(every[m][1]) for m in every},
        "change around the rim": {m: mean_error(every[m][2]) for m in every},
    }, "less surprise than": {m: bool(surely_less(every["ours"][0], every[m][0])) for m in METHODS[:-1]}},
        [("figure6.png", "One row for each prompt and blur, as in Figure 12.")])


# ---------------------------------------------------------------------------------------------------------------------
# Figures 7, 24, 25


@item(
    "figure7", "Figures 7, 24 and 25", chapter=CHAPTER, cost=80,
    claim="A strength fan shows several strengths of an edit side by side, at the cost of one. Its columns are to be "
          "what edits of those strengths would be.",
    done="Fans of five strengths on {n} meadows, and the same strengths as separate edits of the whole picture "
         "(SDEdit): mean {distance} from the input in each column, of both.",
    table=lambda r, t: [["strength", *[f"{s:.1f}" for s in r["strengths"]]],
                        ["change in the fan's column", *[plus_minus(v, 2) for v in r["fan"]]],
                        ["in that column of a separate edit", *[plus_minus(v, 2) for v in r["separate"]]],
                        ["U-Net calls", f"{r['calls']} for the fan", f"{r['calls, separate']} for five edits"]],
    verdict=lambda r, t: judge(
        (r["rises"], "the change rises from column to column" if r["rises"] else "the change does not rise from column "
         "to column"),
        (r["calls"] <= r["calls, separate"] / 2, f"{r['calls']} U-Net calls instead of {r['calls, separate']}"),
        (min(a[0] / b[0] for a, b in zip(r["fan"], r["separate"])) > 0.5,
         "a column changes by " + ", ".join(f"{a[0] / b[0]:.2f}" for a, b in zip(r["fan"], r["separate"]))
         + " of what a separate edit changes: its neighbours, which are kept longer, hold it back"),
    ),
)
def figure7(lab):
    n, size, steps = lab.count(24, 4), lab.model.size, lab.steps(50)
    image, strengths = lab.images(n), [0.2, 0.4, 0.6, 0.8, 1.0]
    fan = lab.distance(image, lab.edit(image, diffdiff.strength_fan_map(strengths, size, size)[0, 0], steps=steps,
                                       each=lab.each))
    edges = [round(i * size / 5) for i in range(6)]
    columns, separate, calls = [], [], []
    for s, a, b in zip(strengths, edges, edges[1:]):
        edit = lab.distance(image, lab.edit(image, torch.full((size, size), 1 - s), steps=steps, each=lab.each))
        columns.append(fan[:, :, a:b].mean((1, 2)))
        separate.append(edit[:, :, a:b].mean((1, 2)))
        calls.append(math.floor(s * steps + 1e-4))
    rises = all(bool(surely_less(x, y)) for x, y in zip(columns, columns[1:]))
    rows, labels = [], []
    for count in (2, 3, 4, 5):
        mu = diffdiff.strength_fan_map([(i + 1) / count for i in range(count)], size, size)[0, 0]
        rows.append([charts.heat(mu, 0, 1), *map(to_picture, lab.edit(image[:4], mu, steps=steps))])
        labels.append(f"{count} strengths, {1 / count:.2f} to 1")
    for low, high in ((0.5, 0.9), (0.6, 0.8)):
        mu = diffdiff.strength_fan_map(np.linspace(low, high, 5).tolist(), size, size)[0, 0]
        rows.append([charts.heat(mu, 0, 1), *map(to_picture, lab.edit(image[:4], mu, steps=steps))])
        labels.append(f"5 strengths, {low} to {high}")
    rows.insert(0, [None, *map(to_picture, image[:4])])
    lab.save(charts.sheet(rows, labels=["input", *labels]), "figure7.png")
    return Outcome({"n": n, "distance": lab.perceptual[0], "strengths": strengths, "rises": rises,
                    "fan": [mean_error(c) for c in columns], "separate": [mean_error(c) for c in separate],
                    "calls": max(calls), "calls, separate": sum(calls)},
                   [("figure7.png", "Fans of two to five strengths (Figures 7, 24), and zoomed in on a range (Figure "
                                    "25). At the left the maps.")])


# ---------------------------------------------------------------------------------------------------------------------
# Figure 14

TRANSFORMS = {
    "as it is": lambda mu: mu,
    "invert": maps.invert,
    "gamma 0.4": lambda mu: maps.gamma(mu, 0.4),
    "window 0.1 to 0.4": lambda mu: maps.window(mu, 0.1, 0.4),
    "equalize": maps.equalize,
    "equalize, invert": lambda mu: maps.invert(maps.equalize(mu)),
    "quantize 2": lambda mu: maps.quantize(maps.equalize(mu), 2),
    "quantize 4, invert": lambda mu: maps.invert(maps.quantize(maps.equalize(mu), 4)),
}


def depth_maps(lab, image, n):
    """(n, 1, H, W) in [0, 1], the nearest 1: the toy world's exact depth, or MiDaS's of --images."""
    if lab.options.images:
        model = published.load("midas", published.find("midas", lab.options.networks or published.FOLDER))
        inverse = [midas.depth(model, to_bytes(x)) for x in image]
    else:
        depth = toyworld.render(lab.meadows(n), lab.model.size).depth
        inverse = 1 / depth  # the sky is infinitely far: 0
    return torch.stack([maps.change_map(d) for d in inverse])[:, None]


@item(
    "figure14", "Figure 14", chapter=CHAPTER, cost=65,
    claim="From one depth map, many change maps come by simple transforms, each giving another edit.",
    done="{n} meadows under {maps} transforms of their depth (of the toy world exact; of --images MiDaS's). From one "
         "edit alone, can one tell which map it was made with? Guessed is the map with the highest CAM with the change "
         "in the picture, less what the black map changes: for people, Table 2 has 80 % of 3 choices.",
    table=lambda r, t: [["map", "CAM", "recognised"],
                        *[[name, f"{c:.2f}", f"{100 * s:.0f} %"] for name, c, s in r["by map"]]],
    verdict=lambda r, t: judge(
        (r["recognised"] > 1 / r["maps"] + 2 * (1 / r["maps"] / (r["n"] * r["maps"])) ** 0.5,
         f"{100 * r['recognised']:.0f} % of the edits tell their map among {r['maps']}, {100 / r['maps']:.1f} % would "
         f"by "
         "chance; most of the maps are each other's, rescaled"),
        (min(c for _, c, _ in r["by map"]) > 0, f"CAM from {min(c for _, c, _ in r['by map']):.2f} to "
         f"{max(c for _, c, _ in r['by map']):.2f}"),
    ),
)
def figure14(lab):
    n, size = lab.count(16, 3), lab.model.size
    image = lab.images(n)
    depth, steps = depth_maps(lab, image, n), lab.steps(25)
    every = {name: torch.stack([f(d) for d in depth]) for name, f in TRANSFORMS.items()}
    black = lab.distance(image, lab.edit(image, torch.zeros(size, size), steps=steps))
    found, right, rows = [], [], [[to_picture(image[0]), *[charts.heat(m[0, 0], 0, 1) for m in every.values()]]]
    pictures = [None]
    for name in lab.each(every):
        edited = lab.edit(image, every[name], steps=steps)
        E = lab.distance(image, edited) - black
        scores = {other: [diffdiff.cam(m[i, 0], E[i]) for i in range(n)] for other, m in every.items()}
        hits = [max(scores, key=lambda o, i=i: scores[o][i]) == name for i in range(n)]
        found.append([name, round(float(np.mean(scores[name])), 3), round(float(np.mean(hits)), 3)])
        right += hits
        pictures.append(to_picture(edited[0]))
    lab.save(charts.sheet([*rows, pictures], ["input", *every], ["map", "output"], cell=100), "figure14.png")
    return Outcome({"n": n, "maps": len(every), "recognised": round(float(np.mean(right)), 3), "by map": found},
                   [("figure14.png", f"One meadow, its depth as eight change maps, “{lab.options.prompt}”.")])


# ---------------------------------------------------------------------------------------------------------------------
# Figure 16


@item(
    "figure16", "Figure 16", chapter=CHAPTER, cost=55,
    claim="The strength of one region can be varied on its own. The others stay as they are.",
    done="A disc in {n} meadows has the values 1, 0.75, 0.5, 0.25, 0 in the map, the rest 0.5: mean {distance} from "
         "the input inside (well within the rim) and outside (well without).",
    table=lambda r, t: [["value of the region", *[f"{v:.2f}" for v in r["values"]]],
                        ["change inside", *[plus_minus(v) for v in r["inside"]]],
                        ["change outside", *[plus_minus(v) for v in r["outside"]]]],
    verdict=lambda r, t: judge(
        (r["rises"], "inside, the change " + ("rises" if r["rises"] else "does not rise") + " as the value falls: "
         + ", ".join(f"{v[0]:.2f}" for v in r["inside"])),
        (r["spread"] < 0.25, f"outside it goes from {min(v[0] for v in r['outside']):.2f} to "
         f"{max(v[0] for v in r['outside']):.2f}, {100 * r['spread']:.0f} % of the range inside"),
    ),
)
def figure16(lab):
    n, size, values = lab.count(24, 4), lab.model.size, [1.0, 0.75, 0.5, 0.25, 0.0]
    image = lab.images(n)
    along = (torch.arange(size) + 0.5) / size
    radius = ((along[None] - 0.3) ** 2 + (along[:, None] - 0.65) ** 2).sqrt()
    inside, outside, row, top = [], [], [to_picture(image[0])], [None]
    for value in lab.each(values):
        mu = torch.where(radius < 0.25, value, 0.5)
        edited = lab.edit(image, mu, steps=lab.steps(50))
        d = lab.distance(image, edited)
        inside.append(d[:, radius < 0.19].mean(1))
        outside.append(d[:, radius > 0.40].mean(1))
        row.append(to_picture(edited[0]))
        top.append(charts.heat(mu, 0, 1))
    rises = all(bool(surely_less(a, b)) for a, b in zip(inside, inside[1:]))
    means = [[x.mean().item() for x in xs] for xs in (inside, outside)]
    spread = (max(means[1]) - min(means[1])) / (max(means[0]) - min(means[0]))
    lab.save(charts.sheet([top, row], ["input", *[f"{v:.2f}" for v in values]]), "figure16.png")
    return Outcome({"n": n, "distance": lab.perceptual[0], "values": values, "inside": [mean_error(x) for x in inside],
                    "outside": [mean_error(x) for x in outside], "rises": rises, "spread": round(spread, 3)},
                   [("figure16.png", f"The map, and “{lab.options.prompt}” under it; seed and prompt are the same.")])
