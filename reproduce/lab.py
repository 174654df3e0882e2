"""What -m reproduce reproduces. A claim of a paper is an `Item`; a `Lab` is what an item has to work with.

The items themselves: dd_tables.py, dd_costs.py, dd_figures.py and dd_applications.py for Differential Diffusion,
mfx_tables.py for Magic Fixup, reproduce/toy.py for what both rest upon. How to add one: -m reproduce's docstring.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import diffdiff
import diffusion
import sd
from checkpoints import published
from common import pictures
from kernels.winograd import quicken
from networks import lpips
from toy import world as toyworld

HELD_OUT = 10**9  # train.generator_at() stays below it for the seeds that train.py takes
TRUE, PART, FALSE, OPEN = "came true", "came true in part", "did not come true", "not measured"  # a verdict is one


class Outcome(NamedTuple):
    """What an item found."""

    results: dict  # JSON, and the same every time: numbers rounded to what can be trusted
    pictures: list = []  # (name of a file that lab.save wrote, caption)
    timings: dict = {}  # JSON that is never the same twice; a verdict on it stays out of results.json


@dataclass(frozen=True)
class Item:
    name: str  # of --only
    where: str  # in the paper
    claim: str  # what the paper says there, in our words
    done: str  # what is done here, in a sentence or two; {x} is results["x"]
    run: Callable  # Lab -> Outcome
    verdict: Callable  # (results, timings) -> (TRUE, PART, FALSE or OPEN; why)
    table: Callable  # (results, timings) -> rows of text, the first one is the head
    cost: float  # seconds that it takes in full, on two cores: for the progress bar
    chapter: str = "Differential Diffusion"  # of the page
    needs: tuple = ("weights",)  # the options whose files decide the results
    shown: bool = True  # False: not a claim, only done when it is named


ITEMS = {}  # name: Item


def item(name, where, **rest):
    """Decorator: the function becomes what the item runs."""

    def register(run):
        ITEMS[name] = Item(name, where, run=run, **rest)
        return run

    return register


def judge(*parts):
    """(whether it holds, what was found) of each part of a claim -> verdict, and why as text"""
    held = [bool(ok) for ok, _ in parts]
    state = TRUE if all(held) else PART if any(held) else FALSE
    if state in (TRUE, FALSE):
        return state, sentence("; ".join(why for _, why in parts))
    yes, no = ("; ".join(why for ok, why in parts if bool(ok) == wanted) for wanted in (True, False))
    return state, f"{sentence(yes)} But: {no}."


def sentence(text):
    return f"{text[0].upper()}{text[1:]}."


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def resampled(n, draws=1000):
    """How often each of n pairs is drawn, over n: bootstrap weights (draws, n) that sum to 1. Always the same ones, so
    that what is computed with them is compared pair by pair."""
    picks = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    return torch.zeros(draws, n).scatter_add_(1, picks, torch.full((draws, n), 1 / n))


def mean_error(x):
    """(n,) -> mean and its standard error, rounded to four digits after the point."""
    x = torch.as_tensor(x, dtype=torch.float64)
    return [round(x.mean().item(), 4), round((x.std() / len(x) ** 0.5).item(), 4)]


def surely_less(a, b):
    """Is a, pair by pair, less than b by more than two standard errors?  (n,) each"""
    difference, error = mean_error(torch.as_tensor(a).double() - torch.as_tensor(b).double())
    return difference < -2 * error


def plus_minus(value, digits=2):
    """[mean, error] -> text"""
    return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"


def sharpness(image):
    """image (B, 3, H, W) in [0, 1] -> (B, H - 1, W - 1): how steep its grey values are, per pixel. Blur lowers it."""
    grey = image.mean(1)
    dx, dy = grey[:, :-1, 1:] - grey[:, :-1, :-1], grey[:, 1:, :-1] - grey[:, :-1, :-1]
    return (dx**2 + dy**2).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# What an item works with


def quick(model):
    """-> the model, its autoencoder quick on a CPU. A toy's UNet is at its best as it is."""
    quicken(model.vae)
    return model


class Lab:
    """Models, pictures, edits, distances: made when first asked for.

    options: weights, mfx_weights, ablation_weights, inpainting_weights (or None), networks (or None), images (folder or
    None), prompt, quick, out
    """

    def __init__(self, options, device="cpu", dtype=torch.float32, tick=lambda share: None):
        self.options, self.device, self.dtype, self.tick = options, device, dtype, tick
        self.quick, self.out = options.quick, Path(options.out)

    @cached_property
    def model(self):
        """The Stable Diffusion that is edited with: the shipped toy unless --weights names another."""
        return quick(sd.load(self.options.weights, self.dtype, self.device))

    @cached_property
    def inpainting(self):
        """An inpainting Stable Diffusion (9 channels), or None."""
        if not self.options.inpainting_weights:
            return None
        model = quick(sd.load(self.options.inpainting_weights, self.dtype, self.device))
        if model.unet.config.in_channels == model.unet.config.out_channels:
            raise ValueError(f"{self.options.inpainting_weights} is no inpainting model: it takes no mask")
        return model

    @property
    def full_size(self):
        """Is this another model than a toy? Then the papers' number of steps is taken."""
        return self.model.size > 128

    def steps(self, toy):
        return 100 if self.full_size else 10 if self.quick else toy

    def count(self, full, quick):
        """How many samples: `full`, or with --quick `quick`."""
        return quick if self.quick else full

    def each(self, things):
        """Goes through them and moves the progress bar on, over all of the item's share. For an item's one long loop;
        more than one: each moves it for itself, and it stops at the end of the share."""
        things = list(things)
        for thing in things:
            yield thing
            self.tick(1 / len(things))

    # -----------------------------------------------------------------------------------------------------------------
    # Pictures to edit

    def scenes(self, n, seed, objects=3):
        return toyworld.random_scenes(n, torch.Generator().manual_seed(HELD_OUT + seed), objects)

    def images(self, n, seed=3, meadow=True):
        """n held-out pictures (n, 3, S, S) in [-1, 1]: of the folder that --images names, over and over if it has
        fewer; otherwise toy scenes, at noon on grass if `meadow` (which --prompt's "snow at night" then changes)."""
        size = self.model.size
        if self.options.images:
            files = sorted(f for f in Path(self.options.images).iterdir() if f.suffix.lower() in IMAGES)
            if not files:
                raise ValueError(f"{self.options.images} has no pictures in it")
            some = [pictures.picture_to_tensor(pictures.open_picture(f), (size, size)) for f in files[:n]]
            return torch.cat([some[i % len(some)] for i in range(n)])
        return toyworld.render(self.meadows(n, seed) if meadow else self.scenes(n, seed), size).image * 2 - 1

    def meadows(self, n, seed=3):
        scenes = self.scenes(n, seed)
        scenes.time[:], scenes.ground[:] = toyworld.TIMES.index("noon"), toyworld.GROUNDS.index("grass")
        return scenes

    def prompts(self, n, seed):
        """n prompts, each naming a random object, ground and time of the toy world; with --images --prompt, n times."""
        if self.options.images:
            return [self.options.prompt] * n
        scenes = self.scenes(n, seed, objects=1)
        words = zip(scenes.colour[:, 0], scenes.kind[:, 0], scenes.ground, scenes.time)
        return [f"a {toyworld.COLOURS[c]} {toyworld.KINDS[k]} on {toyworld.GROUNDS[g]} at {toyworld.TIMES[t]}"
                for c, k, g, t in words]

    def prompts_for(self, prompt, n):
        prompt = self.options.prompt if prompt is None else prompt
        return [prompt] * n if isinstance(prompt, str) else prompt

    # -----------------------------------------------------------------------------------------------------------------
    # Edits

    @property
    def at_once(self):
        return 2 if self.full_size else 32

    @torch.inference_mode()
    def edit(self, image, change_map, prompt=None, *, steps, sampler="ddim", guidance=7.5, how=None, each=iter,
             **options):
        """The whole way of an edit, in batches, every picture with noise of its own.

        image       (N, 3, H, W) in [-1, 1]
        change_map  (H, W), or (N, 1, H, W)
        prompt      a text, or a list of N; None: --prompt
        how         the function of diffdiff, or one that is called as they are. None: differential_diffusion
        each        lab.each, for one loop of the item
          ->        (N, 3, H, W) in [-1, 1], on the CPU
        """
        model, prompts, out = self.model, self.prompts_for(prompt, len(image)), []
        sampler, how = diffusion.make_sampler(sampler, model.schedule, steps), how or diffdiff.differential_diffusion
        for i in each(range(0, len(image), self.at_once)):
            batch = image[i : i + self.at_once].to(self.device)
            z_init = model.encode_image(batch)
            seeds = range(i, i + len(batch))
            noise = self.noise(z_init, i)
            mu = change_map[i : i + len(batch)] if change_map.ndim == 4 else change_map
            denoise = model.denoiser(prompts[i : i + len(batch)], guidance=guidance)
            step_noise = diffusion.make_step_noise(z_init.shape[1:], list(seeds))
            z = how(denoise, z_init, mu, sampler, noise, step_noise=step_noise, **options)
            out.append(model.decode(z).clamp(-1, 1).cpu())
        return torch.cat(out)

    @torch.inference_mode()
    def inpaint(self, image, mask, prompt=None, *, steps, sampler="ddim", guidance=7.5, each=iter):
        """As `edit`, by the inpainting model: from pure noise, told all the time what to keep, mask (H, W) = 1.

        In the end what was to be kept is put back. Where the words contradict what it sees, a toy follows them, and
        would change everything; that is less than an inpainting model can do, and no measure of the method.
        """
        model, prompts, out = self.inpainting, self.prompts_for(prompt, len(image)), []
        sampler = diffusion.make_sampler(sampler, model.schedule, steps)
        for i in each(range(0, len(image), self.at_once)):
            batch, mask = image[i : i + self.at_once].to(self.device), mask.to(self.device)
            z_init, beside = model.encode_image(batch), model.inpainting_channels(batch, 1 - mask[None, None])
            noise = self.noise(z_init, i)
            denoise = model.denoiser(prompts[i : i + len(batch)], guidance=guidance, channels=beside)
            step_noise = diffusion.make_step_noise(z_init.shape[1:], list(range(i, i + len(batch))))
            z = torch.lerp(z_init, diffusion.run_sampler(denoise, noise, sampler, 0, step_noise), beside[:, :1])
            out.append(model.decode(z).clamp(-1, 1).cpu())
        return torch.cat(out)

    def noise(self, z, first):
        """Like z (B, C, h, w), of the seeds first, first + 1, .."""
        draws = [torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(first + i)) for i in range(len(z))]
        return torch.stack(draws).to(z)

    @torch.inference_mode()
    def round_trip(self, image):
        """Through the autoencoder and back. (N, 3, H, W) in [-1, 1], both"""
        return torch.cat([self.model.decode(self.model.encode_image(x)).clamp(-1, 1).cpu()
                          for x in image.split(self.at_once)])

    # -----------------------------------------------------------------------------------------------------------------
    # How different two pictures look

    @cached_property
    def perceptual(self):
        """(name, function of pictures x, y (B, 3, H, W) in [-1, 1] -> maps (B, 1, H, W)): LPIPS where its files are,
        otherwise the same construction on the features of our own autoencoder's encoder. FileNotFoundError if they are
        not in a folder that was named."""
        try:
            files = published.find_lpips(folder=self.options.networks or published.FOLDER)
            model = published.load_lpips(*files).to(self.device)
            return "LPIPS (AlexNet)", lambda x, y: model(x, y, spatial=True)
        except FileNotFoundError:
            if self.options.networks:
                raise
            return "toy perceptual distance", lambda x, y: toy_distance(self.model.vae, x, y)

    @torch.inference_mode()
    def distance(self, x, y):
        """(N, 3, H, W) in [-1, 1] -> (N, H, W)"""
        _, between = self.perceptual
        pairs = zip(x.split(self.at_once), y.split(self.at_once))
        return torch.cat([between(a.to(self.device), b.to(self.device))[:, 0].cpu() for a, b in pairs])

    def save(self, picture, name):
        """Into the folder of results; -> its name, for Outcome.pictures"""
        pictures.save_picture(picture, self.out / name, {})
        return name


IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


DEPTHS = (0, 1)  # of the encoder's resolutions, those that are compared: `python -m reproduce --only distance` says why


def toy_distance(vae, x, y, depths=DEPTHS):
    """LPIPS's equation 1 with nothing learned from people: our autoencoder's encoder, all of its channels alike.

    x, y (B, 3, H, W) in [-1, 1] -> (B, 1, H, W).  Not LPIPS: its numbers cannot be compared with the papers'.
    """
    features = list(encoder_depths(vae, torch.cat([x, y])))
    heads = [lambda d: d.sum(1, keepdim=True)] * len(depths)
    return lpips.distance([features[i].chunk(2) for i in depths], heads, x.shape[2:])


def encoder_depths(vae, x):
    """What the encoder sees at each resolution (B, C_l, h_l, w_l), and at the last one with a view of everything."""
    encoder, weight = vae.encoder, vae.quant_conv.weight
    x = encoder.conv_in(x.to(weight.dtype))
    for level in encoder.down_blocks:
        for block in level.resnets:
            x = block(x)
        yield x.float()
        for block in getattr(level, "downsamplers", ()):
            x = block(x)
    yield encoder.mid_block(x).float()


def to_picture(x):
    """(3, H, W) in [-1, 1], or a map (H, W) in [0, 1] -> picture"""
    return pictures.tensor_to_picture(x / 2 + 0.5 if x.ndim == 3 else x[None])


def to_bytes(x):
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8"""
    return np.array(to_picture(x))
