"""Differential Diffusion's figures: 3, 4, 6 with 12, 7 with 24 and 25, 8 with 18, 14, 16, 17, 20.

A person looks at such figures and agrees or not. Here what they are to show is also measured, on more pictures than the
ones drawn; the pictures are always the first ones, never chosen.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

import diffdiff
import samplers
from checkpoints import published
from editing import change_maps
from networks import midas
from reproduce import baselines, blended, charts
from reproduce.dd_tables import distance_from, pattern, wide_gradient
from reproduce.lab import Outcome, item, judge, percent, plus_minus, progress, to_bytes
from reproduce.metrics import cam, is_surely_less, mean_error, sharpness, sky_and_ground, soft_edges
from toy import world


def correlate_columns(mu, change):
    """Correlation of a map with a change (H, W), column by column, where the map is the same all down a column."""
    return round(cam(mu.mean(0), change.mean(0)), 4)


def write_range(values, form="{:.2f}"):
    return f"from {form.format(min(values))} to {form.format(max(values))}"


@item("figure3", "Figure 3")
def figure3(lab):
    """Without nested masks edits get worse. With them the result is more complex, less blurry, and blends better.

    {n} meadows under a gradient, both ways. Complex: the mean steepness of grey values. Blurry: the share of steps that
    another blur leaves. Blending: the largest step in mean absolute change from column to column.
    """
    n, size = lab.count(32, 4), lab.model.size
    image, mu = lab.images(n), wide_gradient(size)
    edits = [lab.edit(image, mu, steps=lab.steps, nested=nested) for nested in (True, False)]
    left = (mu < 0.5).expand(n, 1, size, size).float()  # more than half of what changes
    measures = {
        "complexity, more is better": lambda x: sharpness(x / 2 + 0.5)[..., : size // 2].mean((1, 2)),
        "softness of edges, less is better": lambda x: soft_edges(x, left),
        "largest step, less is better": lambda x: (x - image).abs().mean((1, 2)).diff(dim=1).abs().amax(1) / 2,
    }
    found = {}
    for what, measure in measures.items():
        a, b = map(measure, edits)
        better = is_surely_less(b, a) if "more" in what else is_surely_less(a, b)
        found[what] = [mean_error(a), mean_error(b), better]
    lab.save(charts.sheet([image[:6], *(x[:6] for x in edits)], labels=["input", "nested", "not nested"]),
             "figure3.png")
    return Outcome(
        {"n": n, "measured": found},
        judge(*[(ok, f"{what}: {a[0]:.4f} nested and {b[0]:.4f} not, {'' if ok else 'no better '}by two standard "
                 "errors") for what, (a, b, ok) in found.items()]),
        [["", "nested", "not nested"], *([w, plus_minus(a, 4), plus_minus(b, 4)] for w, (a, b, _) in found.items())],
        [("figure3.png", f"“{lab.options.prompt}” under a gradient: left changes, right is kept.")])


@item("figure4", "Figures 2 and 4")
def figure4(lab):
    """At each step what the map keeps is copied from the noised original. The masks are nested.

    Algorithm 1 written out line by line here, beside diffdiff.py's, on one meadow with a gradient and {k} steps. Six of
    the steps are decoded, and of each the two products of line 9.
    """
    k, image, mu = lab.steps, lab.images(1), wide_gradient(lab.model.size)
    sampler = samplers.make_sampler("ddim", lab.model.schedule, k)
    z_init = lab.model.encode_image(image.to(lab.device))
    noise, mu_s = lab.noise(z_init, 0), diffdiff.down_sample(mu, z_init.shape[-2:])
    denoise = lab.model.denoiser([lab.options.prompt], guidance=7.5)
    masks, originals, mixes, products, z = [], [], [], ([], []), None
    for t in range(k, -1, -1):  # the paper's t
        i = k - t
        z_t = sampler.noise_to(i, z_init, noise) if t else z_init  # lines 4 and 7
        mask = torch.floor(mu_s.double() * k + 1e-4) < i  # line 8
        here = mask.to(z_t)
        for kept, product in zip(products, ((1 - here) * z_t, here * (z_t if z is None else z))):
            kept.append(product)
        z = z_t if z is None else torch.where(mask.to(z.device), z, z_t)  # line 9
        masks.append(mask)
        originals.append(z_t)
        mixes.append(z)
        if t:
            z, _ = sampler.step(denoise, z, i)  # lines 5 and 10
    difference = (z - diffdiff.differential_diffusion(denoise, z_init, mu, sampler, noise, skip=False)).abs().max()
    shown = sorted({round(f * k) for f in (0, 0.2, 0.4, 0.6, 0.8, 1)})

    def decoded(latents):
        return [lab.model.decode(latents[i])[0].clamp(-1, 1).cpu() for i in shown]

    rows = [decoded(originals), [charts.to_picture(masks[i][0, 0].float()).resize((128, 128), 0) for i in shown],
            *map(decoded, products), decoded(mixes)]
    names = ["noised original", "mask: white from the step before", "copied from the original", "kept of the last step",
             "their sum: what the model is given"]
    lab.save(charts.sheet(rows, [f"t = {k - i}" for i in shown], names), "figure4.png")
    nested = all(bool((a <= b).all()) for a, b in zip(masks, masks[1:]))
    free = [[i, round(masks[i].float().mean().item(), 4)] for i in shown]
    return Outcome(
        {"k": k, "nested": nested, "free": free, "largest difference": difference.item()},
        judge((nested, "each mask contains the one before" if nested else "some mask does not contain the last"),
              (difference == 0, f"largest difference between the two programs' results: {difference.item()}")),
        [["step", *(str(i) for i, _ in free)], ["share of the picture that is free", *(f"{s:.2f}" for _, s in free)]],
        [("figure4.png", f"“{lab.options.prompt}”, black on the left of the map. The last column is the result.")])


# ---------------------------------------------------------------------------------------------------------------------
# Figures 6 and 12

PASTED = {"alpha": baselines.paste_alpha, "Poisson": baselines.paste_poisson, "Laplace": baselines.paste_laplace}
METHODS = ("no softening", *PASTED, "standard softening", "ours")
RIMS = {  # the prompt: the blur, in pixels of 512, of the paper's three rows
    "a yellow house on sand at sunset": 64, "a red mushroom on snow at noon": 40, "a blue ball on grass at noon": 10}
SURPRISE, STEEPNESS, CHANGE = "surprise around the rim", "steepness at the mask's edge", "change around the rim"


def measure_surprise(model, x, where):
    """How unlike what the model has learned a picture is: its mean squared error at telling the noise in it, without a
    prompt, at three levels. x (B, 3, H, W) in [-1, 1], where (h, w) bool: of the latent's pixels there -> (B,)"""
    z = model.encode_image(x)
    denoise, errors = model.denoiser([""] * len(x)), []
    for t in (100, 200, 300):
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(t)).to(z)
        z_t = model.schedule.add_noise(z, noise, t)
        output = denoise(z_t, torch.full((len(z),), t, device=z.device))
        _, eps = model.schedule.convert_output(output, z_t, t)
        errors.append((eps - noise).square().mean(1)[:, where].mean(1))
    return torch.stack(errors).mean(0).cpu()


@item("figure6", "Figures 6 and 12")
def figure6(lab):
    """Soft-inpainting by a blurred mask blends more naturally than no softening, alpha, Poisson and Laplace
    compositing, and softening as in Stable Diffusion's web UI.

    A disc of {n} meadows repainted to three prompts, with the three blurs of Figure 12. Alpha, Poisson and Laplace
    paste the hard-masked edit by the blurred mask. Around the rim: the base model's surprise, its error at telling
    noise in the picture; the steepness of grey values; the {distance} from the input, since what changes nothing
    surprises nobody.
    """
    n, size, steps = lab.count(16, 3), lab.model.size, lab.steps
    image = lab.images(n)
    disc = (distance_from(size, 0.5, 0.58) > 0.3).float()  # 0 = repaint
    edge = (F.max_pool2d(disc[None, None], 5, 1, 2) - disc[None, None] > 0)[0, 0, :-1, :-1]
    found, rows = {what: {} for what in (SURPRISE, STEEPNESS, CHANGE)}, []
    for row, (prompt, radius) in enumerate(RIMS.items()):
        mu = diffdiff.soft_inpainting_map(disc, radius * size / 512)[0, 0]
        edits = {"no softening": lab.edit(image, disc, prompt, steps=steps)}
        for name, paste in PASTED.items():
            pasted = [paste(to_bytes(a), to_bytes(b), mu.numpy()) for a, b in zip(image, edits["no softening"])]
            edits[name] = torch.from_numpy(np.stack(pasted)).permute(0, 3, 1, 2) / 127.5 - 1
        edits["standard softening"] = lab.edit(image, mu, prompt, steps=steps, how=baselines.standard_softening)
        edits["ours"] = lab.edit(image, mu, prompt, steps=steps)
        rows.append([image[row], mu, *(x[row] for x in edits.values())])
        # The rim in pixels, and in latents.
        blend = (mu > 0.02) & (mu < 0.98)
        soft = diffdiff.down_sample(mu, [size // lab.model.vae.config.factor] * 2)[0, 0]
        rim = ((soft > 0.02) & (soft < 0.98)).to(lab.device)
        for method, x in (edits | {"originals": image}).items():
            surprises = [measure_surprise(lab.model, batch.to(lab.device), rim) for batch in x.split(lab.at_once)]
            for what, values in ((SURPRISE, torch.cat(surprises)),
                                 (STEEPNESS, sharpness(x / 2 + 0.5)[:, edge].mean(1)),
                                 (CHANGE, lab.distance(image, x)[:, blend].mean(1))):
                found[what].setdefault(method, []).append(values)
    # A picture's three blurs are no three pictures.
    found = {what: {m: torch.stack(x).mean(0) for m, x in of.items()} for what, of in found.items()}  # (n,) each
    less = {m: is_surely_less(found[SURPRISE]["ours"], found[SURPRISE][m]) for m in METHODS[:-1]}
    measured = {what: {m: mean_error(x) for m, x in of.items()} for what, of in found.items()}
    lab.save(charts.sheet(rows, ["input", "map of ours", *METHODS], RIMS), "figure6.png")
    table = [["", *METHODS, "originals"]]
    table += [[what, *(plus_minus(x, 3) for x in of.values())] for what, of in measured.items()]
    return Outcome({"n": n, "distance": lab.perceptual[0], "measured": measured, "less surprise than": less},
                   figure6_verdict(measured, less), table,
                   [("figure6.png", "One row for each prompt and blur, as in Figure 12.")])


def figure6_verdict(measured, less):
    surprised, changed = measured[SURPRISE], measured[CHANGE]
    parts = []
    for m, more in less.items():
        fainter = not more and changed[m][0] < 0.9 * changed["ours"][0]
        parts.append((more, f"{m} surprises the model by {surprised[m][0]:.3f}, {'' if more else 'not '}surely more "
                      f"than ours, {surprised['ours'][0]:.3f}" + ", and changed less" * fainter))
    return judge(*parts)


@item("figure7", "Figures 7, 24 and 25")
def figure7(lab):
    """A strength fan shows several strengths side by side, as separate edits would, at the cost of one.

    Fans of five strengths on {n} meadows, and the same strengths as separate edits of the whole picture (SDEdit): mean
    {distance} from the input in each column, of both.
    """
    n, size, steps = lab.count(24, 4), lab.model.size, lab.steps
    image, strengths = lab.images(n), [0.2, 0.4, 0.6, 0.8, 1.0]

    def fan_map(strengths):
        return diffdiff.strength_fan_map(strengths, size, size)[0, 0]

    fan = lab.distance(image, lab.edit(image, fan_map(strengths), steps=steps))
    edges = [round(i * size / 5) for i in range(6)]
    columns, separate = [], []
    for s, a, b in zip(strengths, edges, edges[1:]):
        edit = lab.distance(image, lab.edit(image, torch.full((size, size), 1 - s), steps=steps))
        columns.append(fan[:, :, a:b].mean((1, 2)))
        separate.append(edit[:, :, a:b].mean((1, 2)))
    calls = [math.floor(s * steps + 1e-4) for s in strengths]
    rises = all(is_surely_less(x, y) for x, y in zip(columns, columns[1:]))
    # More fans, to look at.
    shown = {f"{m} strengths, {1 / m:.2f} to 1": [(i + 1) / m for i in range(m)] for m in (2, 3, 4, 5)}
    for low, high in ((0.5, 0.9), (0.6, 0.8)):
        shown[f"5 strengths, {low} to {high}"] = np.linspace(low, high, 5).tolist()
    rows = [[fan_map(s), *lab.edit(image[:4], fan_map(s), steps=steps)] for s in shown.values()]
    lab.save(charts.sheet([[None, *image[:4]], *rows], labels=["input", *shown]), "figure7.png")
    columns, separate = ([mean_error(x) for x in xs] for xs in (columns, separate))
    ratios = [a[0] / b[0] for a, b in zip(columns, separate)]
    return Outcome(
        {"n": n, "distance": lab.perceptual[0], "strengths": strengths, "rises": rises, "fan": columns,
         "separate": separate, "calls": max(calls), "calls, separate": sum(calls)},
        judge((rises, f"the change {'rises' if rises else 'does not rise'} from column to column"),
              (max(calls) <= sum(calls) / 2, f"{max(calls)} U-Net calls instead of {sum(calls)}"),
              (min(ratios) > 0.5, f"a column changes by {', '.join(f'{r:.2f}' for r in ratios)} of what a separate "
               "edit changes: its neighbours, which are kept longer, hold it back")),
        [["strength", *(f"{s:.1f}" for s in strengths)], ["change in the fan's column", *map(plus_minus, columns)],
         ["in that column of a separate edit", *map(plus_minus, separate)],
         ["U-Net calls", f"{max(calls)} for the fan", f"{sum(calls)} for five edits"]],
        [("figure7.png", "Fans of two to five strengths (Figures 7, 24), and zoomed in on a range (Figure 25). At the "
          "left the maps.")])


BASELINE_STEPS = 20


@item("baselines", "Figures 8 and 18")
def figure8(lab):
    """Four simple ways to many strengths all fail. Composition degrades the picture, masked noise gives a single
    colour, tiling does not show the prompt, five tiles change mostly in the darkest; and composition and tiling take
    many times longer, the more the more levels there are.

    {n} meadows under a gradient, 20 steps. To the map: correlation with {distance} by column, and CAM on colours.
    Softness of edges (the inputs': {input softness}); how much a picture's pixels vary; the share of all change in the
    darkest fifth of the map; U-Net calls.
    """
    n, size = lab.at_once if lab.full_size else lab.count(8, 2), lab.model.size
    image, mu, levels = lab.images(n), pattern("gradient", size), lab.count(20, 4)
    calls = []
    counter = lab.model.unet.register_forward_hook(lambda *_: calls.append(1))

    def edit(picture, m, how=None, **options):
        return lab.edit(picture, m, steps=BASELINE_STEPS, how=how, **options)

    back = edit(image, torch.ones_like(mu))
    composition, tiling = f"composition of {levels}", f"tiling, {levels} tiles"
    edits = {
        "ours": lambda: edit(image, mu),
        "no nesting": lambda: edit(image, mu, nested=False),
        "blended latent diffusion": lambda: edit(image, (mu > 0.5).float(), blended.edit),
        "masked noise": lambda: edit(image, mu, baselines.masked_noise),
        composition: lambda: baselines.edit_level_by_level(edit, image, mu, levels, keep_outside=False),
        tiling: lambda: baselines.edit_level_by_level(edit, image, mu, levels, keep_outside=True),
        "five tiles": lambda: baselines.edit_level_by_level(edit, image, mu, 5, keep_outside=True),
    }
    black = (edit(image, torch.zeros_like(mu)) - back).abs().mean((0, 1))
    found, rows = {}, [image[:4]]
    for name in progress(edits):
        calls.clear()
        edited = edits[name]()
        moved = (edited - back).abs().mean((0, 1))
        x = edited / 2 + 0.5
        found[name] = {"cam": round(cam(mu, moved - black), 3), "calls": len(calls),
                       "by column": correlate_columns(mu, lab.distance(image, edited).mean(0)),
                       "softness": round(soft_edges(x).mean().item(), 3),
                       "variation": round(x.flatten(2).std(2).mean().item(), 3),
                       "darkest fifth": round((moved[:, : size // 5].sum() / moved.sum()).item(), 3)}
        rows.append(edited[:4])
    counter.remove()
    lab.save(charts.sheet(rows, labels=["input", *edits]), "baselines.png")
    ours, masked, composed, tiled, five = (
        found[name] for name in ("ours", "masked noise", composition, tiling, "five tiles"))
    follows = {"ours": ours, "five tiles": five, "masked noise": masked, "composition": composed, "tiling": tiled}
    follows = {name: f["by column"] for name, f in follows.items()}
    return Outcome(
        {"n": n, "distance": lab.perceptual[0], "methods": found,
         "input softness": round(soft_edges(image).mean().item(), 3)},
        judge(
            (max(follows, key=follows.get) == "ours", "correlation with the map is "
             + ", ".join(f"{v:.3f} for {name}" for name, v in follows.items())),
            (masked["variation"] < 0.5 * ours["variation"],
             f"masked noise's pixels vary by {masked['variation']:.2f}, ours by {ours['variation']:.2f}"),
            (composed["softness"] > ours["softness"] + 0.02,
             f"the softness of edges is {composed['softness']:.2f} after composition and {ours['softness']:.2f} with "
             "ours"),
            (five["darkest fifth"] > ours["darkest fifth"],
             f"{percent(five['darkest fifth'])} of five tiles' change is in the darkest fifth of the map, "
             f"{percent(ours['darkest fifth'])} of ours"),
            (min(composed["calls"], tiled["calls"]) > 5 * ours["calls"],
             f"composition and tiling call the U-Net {composed['calls']} times, ours {ours['calls']} times")),
        [["", "map, by column", "CAM", "softness", "variation", "darkest fifth", "U-Net calls"], *(
            [who, *(f"{f[what]:.3f}" for what in ("by column", "cam", "softness", "variation")),
             percent(f["darkest fifth"]), str(f["calls"])] for who, f in found.items())],
        [("baselines.png", f"“{lab.options.prompt}” under a gradient: left changes, right is kept.")])


TRANSFORMS = {
    "as it is": lambda mu: mu,
    "invert": change_maps.invert,
    "gamma 0.4": lambda mu: change_maps.gamma(mu, 0.4),
    "window 0.1 to 0.4": lambda mu: change_maps.window(mu, 0.1, 0.4),
    "equalize": change_maps.equalize,
    "equalize, invert": lambda mu: change_maps.invert(change_maps.equalize(mu)),
    "quantize 2": lambda mu: change_maps.quantize(change_maps.equalize(mu), 2),
    "quantize 4, invert": lambda mu: change_maps.invert(change_maps.quantize(change_maps.equalize(mu), 4)),
}


def depth_maps(lab, image, n, seed=3):
    """Of `lab.images(n, seed)`: (n, 1, H, W) in [0, 1], the nearest 1. The toy world's is exact; else MiDaS's."""
    if lab.options.images:
        model = published.load("midas", published.find("midas", lab.options.networks or published.FOLDER))
        inverse = [midas.depth(model, to_bytes(x)) for x in image]
    else:
        inverse = 1 / world.render(lab.meadows(n, seed), lab.model.size).depth  # the sky is infinitely far: 0
    return torch.stack([change_maps.depth_to_map(d) for d in inverse])[:, None]


@item("figure14", "Figure 14")
def figure14(lab):
    """From one depth map, many change maps come by simple transforms, each giving another edit.

    {n} meadows under {maps} transforms of their depth (of --images: MiDaS's). Does an edit tell its map? Guessed is the
    map of the highest CAM with the change less the black map's. (People, in Table 2: 80 % of 3.)
    """
    n, size, steps = lab.count(16, 3), lab.model.size, lab.steps
    image = lab.images(n)
    every = {name: torch.stack([f(d) for d in depth_maps(lab, image, n)]) for name, f in TRANSFORMS.items()}
    black = lab.distance(image, lab.edit(image, torch.zeros(size, size), steps=steps))
    found, hits, outputs = [], [], [None]
    for name in progress(every):
        edited = lab.edit(image, every[name], steps=steps)
        E = lab.distance(image, edited) - black
        cams = {other: [cam(m[i, 0], E[i]) for i in range(n)] for other, m in every.items()}
        right = [max(cams, key=lambda other, i=i: cams[other][i]) == name for i in range(n)]
        found.append([name, round(float(np.mean(cams[name])), 3), round(float(np.mean(right)), 3)])
        hits += right
        outputs.append(edited[0])
    lab.save(charts.sheet([[image[0], *(m[0, 0] for m in every.values())], outputs], ["input", *every],
                          ["map", "output"], cell=100), "figure14.png")
    recognised, chance, cams = round(float(np.mean(hits)), 3), 1 / len(every), [c for _, c, _ in found]
    return Outcome(
        {"n": n, "maps": len(every), "recognised": recognised, "by map": found},
        judge((recognised > chance + 2 * (chance * (1 - chance) / len(hits)) ** 0.5,
               f"{percent(recognised)} of the edits tell their map among {len(every)}, by chance "
               f"{percent(chance, 1)} would"),
              (min(cams) > 0, f"CAM {write_range(cams)}")),
        [["map", "CAM", "recognised"], *([name, f"{c:.2f}", percent(s)] for name, c, s in found)],
        [("figure14.png", f"One meadow, its depth as eight change maps, “{lab.options.prompt}”.")])


@item("figure16", "Figure 16")
def figure16(lab):
    """The strength of one region can be varied on its own. The others stay as they are.

    A disc in {n} meadows has five values in the map, the rest 0.5: mean {distance} from the input well inside and well
    outside.
    """
    n, size, values = lab.count(24, 4), lab.model.size, [1.0, 0.75, 0.5, 0.25, 0.0]
    image = lab.images(n)
    radius = distance_from(size, 0.3, 0.65)
    inside, outside, maps, outputs = [], [], [None], [image[0]]
    for value in progress(values):
        mu = torch.where(radius < 0.25, value, 0.5)
        edited = lab.edit(image, mu, steps=lab.steps)
        change = lab.distance(image, edited)
        inside.append(change[:, radius < 0.19].mean(1))
        outside.append(change[:, radius > 0.40].mean(1))
        maps.append(mu)
        outputs.append(edited[0])
    rises = all(is_surely_less(a, b) for a, b in zip(inside, inside[1:]))
    range_in, range_out = (np.ptp([x.mean().item() for x in xs]) for xs in (inside, outside))
    spread = round(range_out / range_in, 3)
    inside, outside = ([mean_error(x) for x in xs] for xs in (inside, outside))
    lab.save(charts.sheet([maps, outputs], ["input", *(f"{v:.2f}" for v in values)]), "figure16.png")
    return Outcome(
        {"n": n, "distance": lab.perceptual[0], "values": values, "inside": inside, "outside": outside, "rises": rises,
         "spread": spread},
        judge((rises, f"inside, the change {'rises' if rises else 'does not rise'} as the value falls: "
               + ", ".join(f"{v[0]:.2f}" for v in inside)),
              (spread < 0.25, f"outside it goes {write_range([v[0] for v in outside])}, {percent(spread)} of the range "
               "inside")),
        [["value of the region", *(f"{v:.2f}" for v in values)], ["change inside", *map(plus_minus, inside)],
         ["change outside", *map(plus_minus, outside)]],
        [("figure16.png", f"The map, and “{lab.options.prompt}” under it; seed and prompt are the same.")])


PASSES = 10


@item("figure17", "Figure 17")
def figure17(lab):
    """Each pass through the autoencoder makes the picture worse. After five most fine details are lost.

    {n} scenes, 10 passes: PSNR against the original; and of the fine details (the picture less itself blurred by 2
    pixels), the share of variance left.
    """
    n, channels = lab.count(64, 8), lab.model.vae.config.latent_channels
    image = lab.images(n, seed=5, meadow=False)

    def fine(x):
        return x - diffdiff.soft_inpainting_map((x / 2 + 0.5).reshape(-1, *x.shape[2:]), 2.0).view_as(x) * 2 + 1

    details, x, psnr, left, shown = fine(image), image, [], [], [image[1]]
    for _ in progress(range(PASSES)):
        batches = x.to(lab.device).split(lab.at_once)
        x = torch.cat([lab.model.decode(lab.model.encode_image(b)).clamp(-1, 1).cpu() for b in batches])
        psnr.append(round(-10 * ((x - image) / 2).square().mean().log10().item(), 2))
        left.append(round(1 - ((fine(x) - details).square().sum() / details.square().sum()).item(), 4))
        shown.append(x[1])
    lab.save(charts.sheet([[shown[i] for i in (0, 1, 3, 5, 10)]], ["input", "1 pass", "3", "5", "10"]), "figure17.png")
    verdict = judge(
        (all(a > b for a, b in zip(psnr, psnr[1:])),
         f"PSNR goes from {psnr[0]:.1f} dB after one pass to {psnr[4]:.1f} after five, {psnr[-1]:.1f} after {PASSES}"),
        (left[4] < 0.5, f"{percent(left[4])} of the fine details' variance is left after five passes, "
         f"{percent(left[-1])} after {PASSES}, of an autoencoder of {channels} channels"))
    return Outcome({"n": n, "channels": channels, "psnr": psnr, "details": left}, verdict,
                   [["passes", *(str(i + 1) for i in range(PASSES))], ["PSNR, dB", *(f"{v:.1f}" for v in psnr)],
                    ["fine details left", *map(percent, left)]],
                   [("figure17.png", "One scene, through again and again.")])


@item("figure20", "Figure 20")
def figure20(lab):
    """The method works with any sampler: each keeps to the input, to the change map and to the prompt.

    {n} meadows under a gradient with each of our samplers, {steps} steps. To the map: correlation of {distance} with
    it, by column. To the input: that distance in the whitest eighth over that in the blackest. To the prompt: how far,
    in the blackest eighth, sky and ground have gone to the colours of a black map's edit.
    """
    n, size, steps = lab.count(12, 3), lab.model.size, lab.steps
    image, mu, eighth = lab.images(n), wide_gradient(size), size // 8
    names = [name for name in samplers.SAMPLERS if name != "lcm"]  # it takes a model that was distilled for it
    found, columns = [], [image[:2]]
    for name in progress(names):
        edited = lab.edit(image, mu, steps=steps, sampler=name)
        full = lab.edit(image, torch.zeros(size, size), steps=steps, sampler=name)
        change = lab.distance(image, edited).mean(0)
        goal = sky_and_ground(full[..., :eighth])
        there, way = ((sky_and_ground(x[..., :eighth]) - goal).abs().mean().item() for x in (edited, image))
        kept = change[:, -eighth:].mean() / change[:, :eighth].mean()
        found.append([name, correlate_columns(mu, change), round(kept.item(), 4), round(1 - there / way, 3)])
        columns.append(edited[:2])
    lab.save(charts.sheet(list(zip(*columns)), ["input", *names]), "figure20.png")
    _, follows, kept, toward = zip(*found)
    return Outcome(
        {"n": n, "steps": steps, "distance": lab.perceptual[0], "samplers": found},
        judge((min(follows) > 0.9, f"correlation with the map {write_range(follows)}"),
              (max(kept) < 0.1, f"change where the map is white at most {percent(max(kept))} of that where it is "
               "black"),
              (min(toward) > 0, f"toward the prompt from {100 * min(toward):.0f} to {percent(max(toward))}")),
        [["sampler", "map", "input: change where it is kept", "prompt"],
         *([name, f"{a:.3f}", percent(b, 1), percent(c)] for name, a, b, c in found)],
        [("figure20.png", f"“{lab.options.prompt}” under a gradient, two meadows.")])
