"""Differential Diffusion's figures of the method itself and of its baselines: 3, 4, 8 with 18, 17, 20.

A person looks at such figures and agrees or not. Here what they are to show is also measured, on more pictures than the
ones drawn; the pictures are always the first ones, never chosen.
"""

import torch

import diffdiff
import diffusion
from reproduce import charts
from reproduce.dd_tables import CHAPTER, pattern, wide_gradient
from reproduce.lab import Outcome, item, judge, mean_error, plus_minus, sharpness, surely_less, to_picture
from reproduce.toy import sky_and_ground


def by_column(mu, change):
    """Correlation of a map with a change (H, W), column by column, where the map is the same all down a column."""
    return round(diffdiff.cam(mu.mean(0), change.mean(0)), 4)


# ---------------------------------------------------------------------------------------------------------------------
# Figure 3


@item(
    "figure3", "Figure 3", chapter=CHAPTER, cost=30,
    claim="Without nested masks, each region copied from the original only once, edits get worse. With them the result "
          "is more complex, less blurry, and blends better with the scene, whose kept parts the model knows of all "
          "along.",
    done="{n} meadows under a gradient, both ways. Complex: how steep the grey values are on average. Blurry: "
         "soft_edges, the share of steps that another blur leaves. Blending: the largest step between neighbouring "
         "columns in how much they have changed (mean absolute change, over each column).",
    table=lambda r, t: [["", "nested", "not nested"]] + [
        [what, plus_minus(a, 4), plus_minus(b, 4)] for what, (a, b, _) in r["measured"].items()],
    verdict=lambda r, t: judge(*[
        (ok, f"{what}: {a[0]:.4f} nested and {b[0]:.4f} not, {'' if ok else 'no better '}by two standard errors of the "
         "difference") for what, (a, b, ok) in r["measured"].items()]),
)
def figure3(lab):
    n, size = lab.count(32, 4), lab.model.size
    image, mu = lab.images(n), wide_gradient(size)
    edits = [lab.edit(image, mu, steps=lab.steps(50), each=lab.each, nested=nested) for nested in (True, False)]
    left = (mu < 0.5).expand(n, 1, size, size).float()  # more than half of what changes
    complexity, blur, step = [], [], []
    for x in edits:
        complexity.append(sharpness(x / 2 + 0.5)[..., : size // 2].mean((1, 2)))
        blur.append(diffdiff.soft_edges(x, left))
        step.append((x - image).abs().mean((1, 2)).diff(dim=1).abs().amax(1) / 2)
    found = {what: [mean_error(a), mean_error(b), bool(surely_less(-a, -b) if more else surely_less(a, b))]
             for what, (a, b), more in (("complexity, more is better", complexity, True),
                                        ("softness of edges, less is better", blur, False),
                                        ("largest step, less is better", step, False))}
    rows = [[to_picture(x[i]) for x in (image, *edits)] for i in range(min(n, 6))]
    lab.save(charts.sheet(list(map(list, zip(*rows))), labels=["input", "nested", "not nested"]), "figure3.png")
    caption = f"“{lab.options.prompt}” under a gradient: left changes, right is kept."
    return Outcome({"n": n, "measured": found}, [("figure3.png", caption)])


# ---------------------------------------------------------------------------------------------------------------------
# Figure 4


@item(
    "figure4", "Figure 4", chapter=CHAPTER, cost=1,
    claim="At each step what the map keeps longer is copied from the noised original, the rest comes from the step "
          "before. The masks are nested: once a region is free it stays so.",
    done="Algorithm 1 written out line by line here, beside diffdiff.py's, on one meadow with a gradient and {k} "
         "steps. What enters and leaves six of the steps is decoded.",
    table=lambda r, t: [["step", *[str(i) for i, _ in r["free"]]],
                        ["share of the picture that is free", *[f"{s:.2f}" for _, s in r["free"]]]],
    verdict=lambda r, t: judge(
        (r["nested"], "each mask contains the one before" if r["nested"] else "some mask does not contain the last"),
        (r["largest difference"] == 0, f"largest difference between the two programs' results: "
                                       f"{r['largest difference']}"),
    ),
)
def figure4(lab):
    k, image, mu = lab.steps(20), lab.images(1), wide_gradient(lab.model.size)
    sampler = diffusion.make_sampler("ddim", lab.model.schedule, k)
    z_init = lab.model.encode_image(image.to(lab.device))
    noise, mu_s = lab.noise(z_init, 0), diffdiff.down_sample(mu, z_init.shape[-2:])
    denoise = lab.model.denoiser([lab.options.prompt], guidance=7.5)
    masks, tops, mixes, z = [], [], [], None
    for t in range(k, -1, -1):  # the paper's t
        i = k - t
        z_t = sampler.noise_to(i, z_init, noise) if t else z_init  # lines 4 and 7
        masks.append(torch.floor(mu_s.double() * k + 1e-4) < i)  # line 8
        mask = masks[-1].to(z_init.device)
        z = z_t if z is None else torch.where(mask, z, z_t)  # line 9
        tops.append(z_t)
        mixes.append(z)
        if t:
            z, _ = sampler.step(denoise, z, i)  # lines 5 and 10
    theirs = diffdiff.differential_diffusion(denoise, z_init, mu, sampler, noise, skip=False)
    shown = sorted({round(f * k) for f in (0, 0.2, 0.4, 0.6, 0.8, 1)})

    def decoded(latents):
        return [to_picture(lab.model.decode(latents[i])[0].clamp(-1, 1).cpu()) for i in shown]

    rows = [decoded(tops), [charts.heat(masks[i][0, 0], 0, 1).resize((128, 128), 0) for i in shown], decoded(mixes)]
    names = ["noised original", "mask: white from the step before", "what the model is given"]
    lab.save(charts.sheet(rows, [f"t = {k - i}" for i in shown], names), "figure4.png")
    nested = all(bool((a <= b).all()) for a, b in zip(masks, masks[1:]))
    return Outcome({"k": k, "nested": nested, "free": [[i, round(masks[i].float().mean().item(), 4)] for i in shown],
                    "largest difference": (z - theirs).abs().max().item()},
                   [("figure4.png", f"“{lab.options.prompt}”, black on the left of the map. The last column is the "
                                    f"result.")])


# ---------------------------------------------------------------------------------------------------------------------
# Figure 8


@item(
    "baselines", "Figures 8 and 18", chapter=CHAPTER, cost=100,
    claim="Four simple ways to many strengths all fail. Composition degrades the picture, masked noise gives a random "
          "single colour, tiling in narrow strips does not show the prompt, five tiles is the best but changes mostly "
          "in its darkest tile; and the first three take up to tens of times longer.",
    done="{n} meadows under a gradient, 20 steps. To the map: correlation with {distance}, column by column, and CAM "
         "on colours. Softness of edges (the inputs': {input softness}); how much a picture's pixels vary; the share "
         "of all change that is in the darkest fifth of the map; U-Net calls.",
    table=lambda r, t: [["", "map, by column", "CAM", "softness", "variation", "darkest fifth", "U-Net calls"], *[
        [who, f"{f['by column']:.3f}", f"{f['cam']:.3f}", f"{f['softness']:.3f}", f"{f['variation']:.3f}",
         f"{100 * f['darkest fifth']:.0f} %", str(f["calls"])] for who, f in r["methods"].items()]],
    verdict=lambda r, t: baselines_verdict(r),
)
def baselines(lab):
    """Section 5.1 and Figure 3 on the gradient, and blended latent diffusion on half of it: CAM, and a sheet."""
    n, size, toy = lab.at_once if lab.full_size else lab.count(16, 2), lab.model.size, lab.model
    image, mu = lab.images(n), pattern("gradient", size)
    sampler, levels = diffusion.make_sampler("ddim", toy.schedule, 20), lab.count(20, 4)
    calls, inner = [], toy.denoiser([lab.options.prompt] * n, guidance=7.5)

    def denoise(z, t):
        calls.append(1)
        return inner(z, t)

    z_init = toy.encode_image(image.to(lab.device))
    noise = torch.randn(z_init.shape, generator=torch.Generator().manual_seed(0)).to(z_init)
    back = toy.decode(z_init)

    def edit(picture, m, **options):
        z = diffdiff.differential_diffusion(denoise, toy.encode_image(picture), m, sampler, noise, **options)
        return toy.decode(z)

    half, start = (mu > 0.5).float(), image.to(lab.device)
    edits = {
        "ours": lambda: edit(start, mu),
        "no nesting": lambda: edit(start, mu, nested=False),
        "blended latent diffusion": lambda: toy.decode(
            diffdiff.blended_latent_diffusion(denoise, z_init, half, sampler, noise)
        ),
        "masked noise": lambda: toy.decode(diffdiff.masked_noise(denoise, z_init, mu, sampler, noise)),
        f"composition of {levels}": lambda: diffdiff.composition(edit, start, mu, levels),
        f"tiling, {levels} tiles": lambda: diffdiff.tiling(edit, start, mu, levels),
        "five tiles": lambda: diffdiff.five_tiles(edit, start, mu),
    }
    black = (edit(start, torch.zeros_like(mu)) - back).abs().mean((0, 1)).cpu()
    found, rows = {}, [[to_picture(x) for x in image[:4]]]
    for name in lab.each(edits):
        calls.clear()
        edited = edits[name]()
        moved = (edited - back).abs().mean((0, 1)).cpu()
        x = edited.clamp(-1, 1).cpu() / 2 + 0.5
        change = lab.distance(image, edited.clamp(-1, 1).cpu()).mean(0)
        found[name] = {"cam": round(diffdiff.cam(mu, moved - black), 3), "calls": len(calls),
                       "by column": by_column(mu, change),
                       "softness": round(diffdiff.soft_edges(x).mean().item(), 3),
                       "variation": round(x.flatten(2).std(2).mean().item(), 3),
                       "darkest fifth": round((moved[:, : size // 5].sum() / moved.sum()).item(), 3)}
        rows.append([to_picture(y) for y in edited[:4].clamp(-1, 1).cpu()])
    lab.save(charts.sheet(rows, labels=["input", *edits]), "baselines.png")
    return Outcome({"n": n, "distance": lab.perceptual[0], "methods": found,
                    "input softness": round(diffdiff.soft_edges(image).mean().item(), 3)},
                   [("baselines.png", f"“{lab.options.prompt}” under a gradient: left changes, right is kept.")])


def baselines_verdict(results):
    m = results["methods"]
    ours, masked, five = m["ours"], m["masked noise"], m["five tiles"]
    (composed,), (tiled,) = ([f for name, f in m.items() if name.startswith(s)] for s in ("composition", "tiling"))
    follows = {"ours": ours, "five tiles": five, "masked noise": masked, "composition": composed, "tiling": tiled}
    follows = {name: f["by column"] for name, f in follows.items()}
    return judge(
        (max(follows, key=follows.get) == "ours", "correlation with the map is "
         + ", ".join(f"{v:.3f} for {name}" for name, v in follows.items())),
        (masked["variation"] < 0.5 * ours["variation"],
         f"masked noise's pixels vary by {masked['variation']:.2f}, ours by {ours['variation']:.2f}"),
        (composed["softness"] > ours["softness"] + 0.02,
         f"the softness of edges is {composed['softness']:.2f} after composition and {ours['softness']:.2f} with ours"),
        (five["darkest fifth"] > ours["darkest fifth"],
         f"{100 * five['darkest fifth']:.0f} % of five tiles' change is in the darkest fifth of the map, "
         f"{100 * ours['darkest fifth']:.0f} % of ours"),
        (min(composed["calls"], tiled["calls"]) > 5 * ours["calls"],
         f"composition and tiling call the U-Net {composed['calls']} times, ours {ours['calls']} times"),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Figure 17

PASSES = 10


@item(
    "figure17", "Figure 17", chapter=CHAPTER, cost=15,
    claim="Each pass through the autoencoder makes the picture worse. After five the majority of fine details is lost, "
          "so that no method can afford more than a few.",
    done="{n} scenes, " + str(PASSES) + " passes: PSNR against the original; and of the fine details (the picture less "
         "itself blurred by 2 pixels), the share of their variance that is still there.",
    table=lambda r, t: [["passes", *[str(i + 1) for i in range(PASSES)]],
                        ["PSNR, dB", *[f"{v:.1f}" for v in r["psnr"]]],
                        ["fine details left", *[f"{100 * v:.0f} %" for v in r["details"]]]],
    verdict=lambda r, t: figure17_verdict(**r),
)
def figure17(lab):
    n = lab.count(64, 8)
    image = lab.images(n, seed=5, meadow=False)

    def fine(x):
        return x - diffdiff.soft_inpainting_map((x / 2 + 0.5).reshape(-1, *x.shape[2:]), 2.0).view_as(x) * 2 + 1

    details, x, psnr, left, shown = fine(image), image, [], [], [to_picture(image[1])]
    for _ in lab.each(range(PASSES)):
        x = lab.round_trip(x)
        psnr.append(round(-10 * ((x - image) / 2).square().mean().log10().item(), 2))
        left.append(round(1 - ((fine(x) - details).square().sum() / details.square().sum()).item(), 4))
        shown.append(to_picture(x[1]))
    rows = [[shown[0], shown[1], shown[3], shown[5], shown[10]]]
    lab.save(charts.sheet(rows, ["input", "1 pass", "3", "5", "10"]), "figure17.png")
    channels = lab.model.vae.config.latent_channels
    return Outcome({"n": n, "channels": channels, "psnr": psnr, "details": left},
                   [("figure17.png", "One scene, through again and again.")])


def figure17_verdict(n, channels, psnr, details):
    verdict, why = judge(
        (all(a > b for a, b in zip(psnr, psnr[1:])),
         f"PSNR goes from {psnr[0]:.1f} dB after one pass to {psnr[4]:.1f} after five, {psnr[-1]:.1f} after {PASSES}"),
        (details[4] < 0.5, f"{100 * details[4]:.0f} % of the fine details' variance is left after five passes, "
         f"{100 * details[-1]:.0f} % after {PASSES}"),
    )
    if details[4] >= 0.5 and channels > 4:
        why += f" This autoencoder has {channels} channels where Stable Diffusion's has 4, and so loses less in a pass."
    return verdict, why


# ---------------------------------------------------------------------------------------------------------------------
# Figure 20


@item(
    "figure20", "Figure 20", chapter=CHAPTER, cost=70,
    claim="The method works with any sampler. All that were tried keep to the input, to the change map and to the "
          "prompt.",
    done="{n} meadows under a gradient with each of our samplers, {steps} steps. To the map: correlation of {distance} "
         "with it, by column. To the input: that distance in the whitest eighth, as a share of the distance in the "
         "blackest. To the prompt: how far, in the blackest eighth, the colours of sky and ground have gone from the "
         "input's to those that the same sampler gives them under a black map.",
    table=lambda r, t: [["sampler", "map", "input: change where it is kept", "prompt"], *[
        [name, f"{a:.3f}", f"{100 * b:.1f} %", f"{100 * c:.0f} %"] for name, a, b, c in r["samplers"]]],
    verdict=lambda r, t: judge(
        (min(a for _, a, _, _ in r["samplers"]) > 0.9, "correlation with the map from "
         f"{min(a for _, a, _, _ in r['samplers']):.2f} to {max(a for _, a, _, _ in r['samplers']):.2f}"),
        (max(b for _, _, b, _ in r["samplers"]) < 0.1, "change where the map is white at most "
         f"{100 * max(b for _, _, b, _ in r['samplers']):.0f} % of that where it is black"),
        (min(c for _, _, _, c in r["samplers"]) > 0, "toward the prompt from "
         f"{100 * min(c for _, _, _, c in r['samplers']):.0f} to {100 * max(c for _, _, _, c in r['samplers']):.0f} %"),
    ),
)
def figure20(lab):
    n, size, steps = lab.count(16, 3), lab.model.size, lab.steps(25)
    image, mu, eighth = lab.images(n), wide_gradient(size), size // 8
    found, rows = [], [[to_picture(image[i]) for i in range(min(n, 2))]]
    for name in lab.each(diffusion.SAMPLERS):
        edited = lab.edit(image, mu, steps=steps, sampler=name)
        full = lab.edit(image, torch.zeros(size, size), steps=steps, sampler=name)
        change = lab.distance(image, edited).mean(0)
        goal = sky_and_ground(full[..., :eighth])
        there, way = ((sky_and_ground(x[..., :eighth]) - goal).abs().mean().item() for x in (edited, image))
        kept = change[:, -eighth:].mean() / change[:, :eighth].mean()
        found.append([name, by_column(mu, change), round(kept.item(), 4), round(1 - there / way, 3)])
        rows.append([to_picture(edited[i]) for i in range(min(n, 2))])
    lab.save(charts.sheet(list(map(list, zip(*rows))), ["input", *diffusion.SAMPLERS]), "figure20.png")
    return Outcome({"n": n, "steps": steps, "distance": lab.perceptual[0], "samplers": found},
                   [("figure20.png", f"“{lab.options.prompt}” under a gradient, two meadows.")])
