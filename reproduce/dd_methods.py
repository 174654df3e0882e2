"""Differential Diffusion beside other methods (Figures 9, 10, 13), its user study without users, and its galleries.

What is asked for is in prompts.json: of every edit a map, words of the toy world, and words for photographs (--images).
"""

import math
from dataclasses import replace
from pathlib import Path

import torch

import diffdiff
import samplers
from common.files import read_json
from reproduce import blended, charts, diffedit, pix2pix
from reproduce.dd_figures import depth_maps, measure_surprise, write_range
from reproduce.dd_tables import BLD, INPAINT, OURS, distance_from, pattern, wide_gradient
from reproduce.lab import NotHere, Outcome, item, judge, percent, plus_minus, progress
from reproduce.metrics import cam, is_surely_less, mean_error, sky_and_ground
from toy import world
from toy.captions import caption_scenes

ASKED = read_json(Path(__file__).parent / "prompts.json")


def words(lab, edits):
    """-> [the prompt of each]"""
    return [e["photo" if lab.options.images else "toy"] for e in edits]


def disc(size):
    """A soft disc below the middle that is black -> (size, size)"""
    hard = (distance_from(size, 0.5, 0.6) > 0.25).float()
    return diffdiff.soft_inpainting_map(hard, size / 16)[0, 0]


def make_maps(kinds, depth):
    """A map of each kind, of pictures with depth maps (N, 1, S, S) -> (N, 1, S, S). near: what is near changes most."""
    size, made = depth.shape[-1], []
    for kind, inverse in zip(kinds, depth[:, 0]):  # the nearest is 1
        maps = {"near": 1 - inverse, "far": inverse, "left": wide_gradient(size), "right": wide_gradient(size).flip(1)}
        made.append(maps[kind] if kind in maps else disc(size) if kind == "disc" else pattern(kind, size))
    return torch.stack(made)[:, None]


def adhere(change, mu):
    """Distances (N, H, W) and maps (N, 1, H, W) -> CAM of each picture, by itself, (N,)"""
    return torch.tensor([cam(m[0], d) for m, d in zip(mu, change)])


# ---------------------------------------------------------------------------------------------------------------------
# Figure 9

MAPS = {"the thing": (0.1, 0.9), "around it": (0.9, 0.1), "both": (0.3, 0.1)}  # what is kept of the thing, of the rest
DIFFEDIT, INSTRUCT = "DiffEdit", "InstructPix2Pix"


def run_diffedit(lab, image, wanted, shown, steps):
    """-> edits (N, 3, S, S), masks (N, 1, S, S)"""
    model, out = lab.model, []
    sampler = samplers.make_sampler("ddim", model.schedule, steps)
    for here, batch, prompts in lab.batches(image, wanted):
        z_init = model.encode_image(batch)
        noises = [lab.noise(z_init, here.start + 1000 * j) for j in range(10)]
        a, b = (model.denoiser(texts, guidance=7.5) for texts in (prompts, shown[here]))
        z, mask = diffedit.edit(a, b, model.denoiser([""] * len(batch)), z_init, sampler, noises)
        mask = mask.float().repeat_interleave(model.vae.config.factor, 2).repeat_interleave(model.vae.config.factor, 3)
        out.append((model.decode(z).clamp(-1, 1).cpu(), mask.cpu()))
    return tuple(map(torch.cat, zip(*out)))


def run_pix2pix(lab, image, instructions, steps):
    """-> edits (N, 3, S, S)"""
    model, out = lab.instruct, []
    sampler = samplers.make_sampler("ddim", model.schedule, steps)
    for here, batch, told in lab.batches(image, instructions):
        seen = pix2pix.look_at(model, batch)
        z = samplers.run_sampler(pix2pix.denoiser(model, seen, told), lab.noise(seen, here.start), sampler)
        out.append(model.decode(z).clamp(-1, 1).cpu())
    return torch.cat(out)


@item("figure9", "Figure 9", needs=("weights", "instruct_weights"))
def figure9(lab):
    """With maps one prompt and one seed give many edits, in which a thing changes much and what is around it little, or
    the other way round. DiffEdit's mask takes in what is around the thing, and InstructPix2Pix changes all alike.

    {n} scenes of one object, to be of another colour on snow at night, {steps} steps: mean {distance} from the input on
    the object and off it, under three maps of the object's outline; by DiffEdit, which is told what the scene shows;
    and by InstructPix2Pix, where there are weights (--instruct-weights). How much of DiffEdit's mask is off the thing
    is measured where the toy is asked for another colour alone.
    """
    n, size, steps, asked = lab.count(6, 2), lab.model.size, lab.steps, ASKED["figure9"][0]
    if lab.options.images:
        image = lab.images(n)
        thing = depth_maps(lab, image, n) > 0.6
        wanted, shown, told = [asked["photo"]] * n, [asked["shown"]] * n, [asked["told"]] * n
        recoloured = wanted
    else:
        scenes = lab.scenes(n, 90, objects=1)
        scenes.time[:], scenes.ground[:] = world.TIMES.index("noon"), world.GROUNDS.index("grass")
        other = replace(scenes, colour=(scenes.colour + 1) % len(world.COLOURS))
        recoloured = caption_scenes(other)
        other.time, other.ground = (torch.full_like(scenes.time, 2) for _ in range(2))  # night, snow
        frames = world.render(scenes, size)
        image, thing = frames.image * 2 - 1, frames.segments[:, None] > 0
        wanted, shown, told = caption_scenes(other), caption_scenes(scenes), ["make it night"] * n
    edits = {f"ours: {name}": lab.edit(image, torch.where(thing, *keep), wanted, steps=steps)
             for name, keep in progress(MAPS.items())}
    edits[DIFFEDIT], mask = run_diffedit(lab, image, wanted, shown, steps)
    if lab.instruct:
        edits[INSTRUCT] = run_pix2pix(lab, image, told, steps)
    found, inside = {}, {}
    for name, x in edits.items():
        change = lab.distance(image, x)
        on, off = ((change * t[:, 0]).sum((1, 2)) / t.sum((1, 2, 3)) for t in (thing.float(), 1 - thing.float()))
        inside[name] = on / (on + off)
        found[name] = [mean_error(on), mean_error(off), mean_error(inside[name])]
    if recoloured != wanted:
        _, mask = run_diffedit(lab, image, recoloured, shown, steps)
    around = mean_error((mask * ~thing).sum((1, 2, 3)) / mask.sum((1, 2, 3)))
    covered = mean_error((mask * thing).sum((1, 2, 3)) / thing.sum((1, 2, 3)))
    shown_mask = list(1 - mask[:4, 0])
    lab.save(charts.sheet([image[:4], *(x[:4] for x in edits.values()), shown_mask],
                          labels=["input", *edits, "DiffEdit's mask"]), "figure9.png")
    first, second, _ = (inside[f"ours: {name}"] for name in MAPS)
    parts = [(is_surely_less(second, first),
              f"the thing's share of the change is {plus_minus(mean_error(first))} under a map of "
              f"the thing, and {plus_minus(mean_error(second))} under one of what is around it"),
             (around[0] > 0.5, f"{percent(around)} of DiffEdit's mask is off the thing, of which it has "
              f"{percent(covered)}")]
    if lab.instruct:
        share = found[INSTRUCT][2]
        parts.append((abs(share[0] - 0.5) < 0.1, f"InstructPix2Pix's share is {plus_minus(share)}"))
    return Outcome(
        {"n": n, "steps": steps, "distance": lab.perceptual[0], "change": found, "off the thing": around,
         "of the thing": covered}, judge(*parts),
        [["", "change on the thing", "off it", "share of the thing"],
         *([name, *map(plus_minus, values)] for name, values in found.items())],
        [("figure9.png", "The thing is to be of another colour, on snow at night.")])


# ---------------------------------------------------------------------------------------------------------------------
# Figures 10 and 13, Tables 2 and 3, Figure 22: the same edits, by three methods that take maps or masks

SEEDS = 3
KINDS = ("near", "left", "far")
PAPER_ADHERENCE, PAPER_QUALITY = {OURS: 58, INPAINT: 32, BLD: 10}, {OURS: 55, INPAINT: 35, BLD: 10}


def edit_by_all(lab, pictures, seeds=1):
    """Three prompts, each under its map, on so many pictures each, with several seeds -> image (N, 3, S, S), depth (N,
    1, S, S), maps (N, 1, S, S), prompts, {method: edits (N, 3, S, S)}; seed by seed. The others' masks are the maps,
    cut at a half."""
    edits, steps = ASKED["figure10"] * pictures, lab.steps
    image = lab.images(len(edits), seed=14)
    depth = depth_maps(lab, image, len(image), seed=14)
    mu = make_maps([e["map"] for e in edits], depth).repeat(seeds, 1, 1, 1)
    image, prompts = image.repeat(seeds, 1, 1, 1), words(lab, edits) * seeds
    mask = (mu > 0.5).float()
    made = {OURS: lab.edit(image, mu, prompts, steps=steps),
            BLD: lab.edit(image, mask, prompts, steps=steps, how=blended.edit, dilations=2)}
    if lab.inpainting:
        made[INPAINT] = lab.inpaint(image, mask, prompts, steps=steps)
    return image, depth.repeat(seeds, 1, 1, 1), mu, prompts, made


def measure_seam(change, keep):
    """change (N, 3, S, S) in [-1, 1], masks (N, 1, S, S) -> how much it differs, of 255, between neighbouring pixels of
    which one is inside the mask, (N,)"""
    total = count = 0
    for axis in (2, 3):
        rim = keep.diff(dim=axis).abs()
        total = total + (change.diff(dim=axis).abs() * rim).mean(1).sum((1, 2)) * 127.5
        count = count + rim.sum((1, 2, 3))
    return total / count


@item("figure10", "Figures 10 and 13", needs=("weights", "inpainting_weights"))
def figure10(lab):
    """Blended latent diffusion and an inpainting model know two strengths: they blend nothing gradually, and lose what
    a map keeps in part. That is no matter of the seed.

    {n} pictures under maps from depth and a gradient, each a mean over {seeds} seeds, and differences between methods
    picture by picture. The seam: how much the change jumps where the others' masks end, of 255. CAM of each edit by
    itself, of {distance}. Blended latent diffusion as published: masks that shrink, and in the sheet a decoder that has
    learned each picture's background, whose squared error (thousandths) is given.
    """
    seeds = lab.count(SEEDS, 2)
    image, _, mu, _, made = edit_by_all(lab, lab.count(3, 1), seeds)
    n, asked = len(image) // seeds, words(lab, ASKED["figure10"])
    cams = {m: adhere(lab.distance(image, x), mu) for m, x in made.items()}
    keep, background = (mu > 0.5).float(), {}
    seams = {m: measure_seam(x - image, keep) for m, x in made.items()}
    fitted = torch.cat([blended.reconstruct_background(lab.model.vae, image[i : i + 1].to(lab.device),
                                                       made[BLD][i : i + 1].to(lab.device), keep[i].to(lab.device),
                                                       steps=lab.count(75, 3)).cpu() for i in progress(range(3))])
    for name, x in (("decoded", made[BLD][:3]), ("decoder fitted", fitted)):
        error = ((x - image[:3]).square() / 4 * keep[:3]).sum((1, 2, 3)) / (3 * keep[:3].sum((1, 2, 3)))
        background[name] = mean_error(1000 * error)
    rows, labels = [], []
    for i in range(3):
        rows += [[image[i], mu[i, 0], *x] for x in zip(*(made[m][i::n] for m in made))][:2]
        labels += [asked[i], ""]
        rows[-2][list(made).index(BLD) + 2] = fitted[i]
    lab.save(charts.sheet(rows, ["input", "map", *made], labels), "figure10.png")
    parts = []
    for m in [m for m in made if m != OURS]:
        for what, of, sign in (("CAM", cams, 1), ("the seam", seams, -1)):
            difference = (of[OURS] - of[m]).view(seeds, n)
            less, each = mean_error(difference.mean(0)), difference.mean(1)
            parts.append((sign * less[0] > 2 * less[1] and (sign * each > 0).all(), f"ours less {m} in {what} is "
                          f"{plus_minus(less)}, by seed {write_range(each.tolist(), '{:+.2f}')}"))
    found, seams = ({m: mean_error(x.view(seeds, n).mean(0)) for m, x in of.items()} for of in (cams, seams))
    return Outcome(
        {"n": n, "seeds": seeds, "distance": lab.perceptual[0], "cam": found, "seam": seams,
         "background": background},
        judge(*parts),
        [["", *made], ["CAM, edit by edit", *(plus_minus(v, 3) for v in found.values())],
         ["seam, of 255", *(plus_minus(v, 1) for v in seams.values())],
         ["background's error", "", " then ".join(plus_minus(v) for v in background.values())]],
        [("figure10.png", "Two seeds a row; the first one's blended latent diffusion with its background "
          "reconstructed.")])


def binomial_tail(k, n, p):
    """The chance of k or more of n"""
    return sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k, n + 1))


@item("study", "Tables 2 and 3, Figure 22", needs=("weights", "inpainting_weights"))
def study(lab):
    """People tell which of three maps was applied (80 %), tell an edit with words from one without (92 %), and prefer
    ours to an inpainting model and blended latent diffusion for adherence (58 %) and quality (55 %).

    A stand-in: nobody was asked. Figure 10's edits, on {n} pictures; the map is guessed by CAM; whether words were
    there by the colours of sky and ground, nearest to true renders of what they say; adherence is the highest CAM, and
    quality the least surprise of the base model at the picture. P-values of the binomial, against chance.
    """
    if lab.options.images:
        raise NotHere("The study of words is judged by the toy world's colours, which photographs do not have")
    image, depth, mu, prompts, made = edit_by_all(lab, lab.count(8, 2))
    n, ours = len(image), made[OURS]
    change = lab.distance(image, ours)
    options = {kind: adhere(change, make_maps([kind] * n, depth)) for kind in KINDS}
    guess = torch.stack(list(options.values())).argmax(0).tolist()
    matched = sum(KINDS[g] == ASKED["figure10"][i % 3]["map"] for i, g in enumerate(guess))

    # With words, and without.
    silent = lab.edit(image, mu, "", steps=lab.steps, guidance=1.0)
    told = 0
    for i, prompt in enumerate(prompts):
        ground, _, time = prompt.split()
        truth = lab.scenes(64, 91)
        truth.time[:], truth.ground[:] = world.TIMES.index(time), world.GROUNDS.index(ground)
        goal = sky_and_ground(world.render(truth).image).mean(0)
        with_words, without = ((sky_and_ground(x[i : i + 1] / 2 + 0.5) - goal).norm().item() for x in (ours, silent))
        told += with_words < without

    # Which of three methods.
    side = lab.model.size // lab.model.vae.config.factor
    everywhere = torch.ones(side, side, dtype=torch.bool, device=lab.device)
    adherence = torch.stack([adhere(lab.distance(image, x), mu) for x in made.values()])
    calm = torch.stack([torch.cat([-measure_surprise(lab.model, b.to(lab.device), everywhere)
                                   for b in x.split(lab.at_once)]) for x in made.values()])
    won = {what: {m: (values.argmax(0) == j).float().mean().item() for j, m in enumerate(made)}
           for what, values in (("adherence", adherence), ("quality", calm))}
    p_match, p_told = binomial_tail(matched, n, 1 / 3), binomial_tail(told, n, 1 / 2)
    options = make_maps(KINDS, depth[:1].repeat(3, 1, 1, 1))[:, 0]
    rows = [[image[0], ours[0], *options], [image[0], mu[0, 0], *(x[0] for x in made.values())],
            [image[0], mu[0, 0], ours[0], silent[0]]]
    lab.save(charts.sheet(rows, labels=["which map?", "which method?", f"which says “{prompts[0]}”?"]), "study.png")
    preferred = {what: max(of, key=of.get) for what, of in won.items()}
    return Outcome(
        {"n": n, "map": [matched, p_match], "words": [told, p_told], "preferred": won},
        judge((p_match < 0.05, f"{matched} of {n} maps are told (p = {p_match:.2g})"),
              (p_told < 0.05, f"{told} of {n} edits with words are told from those without (p = {p_told:.2g})"),
              *[(best == OURS, f"for {what} {best} is first, ours in {percent(won[what][OURS])}")
                for what, best in preferred.items()]),
        [["", "paper", "here"], ["maps told, of three", "80 %", percent(matched / n)],
         ["words told", "92 %", percent(told / n)],
         *([f"{what}: {m}", f"{paper[m]} %", percent(share)] for paper, (what, of) in
           zip((PAPER_ADHERENCE, PAPER_QUALITY), won.items()) for m, share in of.items())],
        [("study.png", "Figure 22: the three questions, as they were put to a measure.")])


# ---------------------------------------------------------------------------------------------------------------------
# Galleries: Figures 1, 15, 21, 27


@item("gallery", "Figures 1, 15, 21 and 27")
def gallery(lab):
    """Many edits, each by its own words and map: all change where their maps say. Soft-inpainting blends in.

    {n} edits in {steps} steps: Figure 1's six with two seeds, eight maps for one prompt and one seed (Figure 15),
    Figure 21's twenty, and Figure 27's three masks, whose rims are an eighth of the picture's side wide. CAM of each
    edit's {distance} by itself. In the words of the toy world; of --images in the paper's.
    """
    size, steps, sheets, cams = lab.model.size, lab.steps, {}, []

    def run(image, mu, prompts):
        edited = lab.edit(image, mu, prompts, steps=steps)
        cams.append(adhere(lab.distance(image, edited), mu))
        return edited

    first, many, maps = (ASKED[f][: lab.count(20, 2)] for f in ("figure1", "figure21", "figure27"))
    for name, edits, seeds in progress((("1", first, 2), ("21", many, 1))):
        image = lab.images(len(edits), seed=int(name))
        mu = make_maps([e["map"] for e in edits], depth_maps(lab, image, len(edits), int(name)))
        edited = run(image.repeat(seeds, 1, 1, 1), mu.repeat(seeds, 1, 1, 1), words(lab, edits) * seeds)
        shown = (image, mu[:, 0], *edited.split(len(edits)))
        for j in range(0, len(edits), 10):
            sheets[f"{name}{'b' if j else ''}"] = words(lab, edits)[j : j + 10], [x[j : j + 10] for x in shown]
    eight = ("near", "far", "left", "right", "shapes", "triangles", "disc", "gradient")[: lab.count(8, 2)]
    image = lab.images(1, seed=15)
    mu = make_maps(eight, depth_maps(lab, image, 1, 15).repeat(len(eight), 1, 1, 1))
    image = image.repeat(len(eight), 1, 1, 1)

    def same_noise(denoise, z_init, mu, sampler, noise, **options):
        return diffdiff.differential_diffusion(denoise, z_init, mu, sampler, noise[:1].expand_as(noise), **options)

    edited = lab.edit(image, mu, words(lab, ASKED["figure15"])[0], steps=steps, how=same_noise)
    cams.append(adhere(lab.distance(image, edited), mu))
    sheets["15"] = eight, [mu[:, 0], edited]
    image = lab.images(len(maps), seed=27)
    hard = (disc(size) > 0.5).float()
    mu = diffdiff.soft_inpainting_map(hard, 64 * size / 512).expand(len(maps), 1, size, size)
    sheets["27"] = words(lab, maps), [image, mu[:, 0], run(image, mu, words(lab, maps))]
    for name, (heads, rows) in sheets.items():
        lab.save(charts.sheet(rows, heads, cell=100), f"gallery{name}.png")
    cams = torch.cat(cams)
    follow = (cams > 0).float().mean().item()
    return Outcome(
        {"n": len(cams), "steps": steps, "distance": lab.perceptual[0], "cam": mean_error(cams), "follow": follow},
        judge((follow == 1, f"{percent(follow)} of {len(cams)} edits change more where their map is darker, CAM "
               f"{plus_minus(mean_error(cams))}")),
        [["", ""], ["edits whose CAM is above 0", percent(follow)], ["CAM", plus_minus(mean_error(cams))]],
        [(f"gallery{name}.png", f"Figure {name}.") for name in sheets])
