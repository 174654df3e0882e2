"""What -m reproduce reproduces. A claim of a paper is an `Item`; a `Lab` is what an item has to work with.

To add an item, write in dd_tables.py or one of its neighbours

    @item("figure9", "Figure 9")                       its name for --only; where the paper says it
    def figure9(lab):
        \"""The paper's claim, in your own words.         The claim's first sentence is in the page's table of verdicts

        What is done here, on {n} pictures.            {n} becomes results["n"]
        \"""
        image = lab.images(lab.count(64, quick=4))     held-out scenes (or --images); lab has models, edits, distances
        lab.save(charts.sheet(...), "figure9.png")     a picture, which Outcome lists with its caption
        return Outcome(
            {"n": 64, "a": round(a, 3)},               JSON, the same in every run: seeds, and rounded numbers
            judge((a > b, f"a is {a:.2f}")),           joins the parts of a claim: came true / in part / did not
            table=[["", "paper", "here"], ...],        rows of text for the page, the first one the head
            pictures=[("figure9.png", "Left, right.")],
            timings={})                                what a clock said. Then the verdict is no part of `results`
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import diffdiff
import mfx
import samplers
import sd
from checkpoints import published
from common import pictures
from diffusion import draw_noise
from kernels.winograd import quicken
from reproduce import metrics
from toy import world
from toy.captions import caption_scenes

HELD_OUT = 10**9  # common.run_state.generator_at stays below it
TRUE, PART, FALSE, OPEN = "came true", "came true in part", "did not come true", "not measured"  # a verdict is one
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
DD, MFX, TOY = "Differential Diffusion", "Magic Fixup", "The toy weights"  # chapters of the page, in this order


class Outcome(NamedTuple):
    """What an item found."""

    results: dict
    verdict: tuple = (OPEN, "")  # of `judge`
    table: list = ()
    pictures: list = ()  # (name of a file that lab.save wrote, caption)
    timings: dict = {}


@dataclass(frozen=True)
class Item:
    name: str  # of --only
    where: str  # in the paper
    claim: str  # what the paper says there, in our words
    done: str  # what is done here, in a sentence or two; {x} is results["x"]
    run: Callable  # Lab -> Outcome
    chapter: str = DD  # of the page. None: no claim, and run only when it is named
    needs: tuple = ("weights",)  # the options whose files decide the results


REGISTERED = []  # every Item


def item(name, where, **rest):
    """Decorator: the function becomes what the item runs, its docstring's two paragraphs the item's claim and done."""

    def register(run):
        claim, done = (" ".join(text.split()) for text in run.__doc__.split("\n\n"))
        REGISTERED.append(Item(name, where, claim, done, run, **rest))
        return run

    return register


class NotHere(Exception):
    """Models that an item needs and that are not shipped; the text says how to make them. Its verdict is OPEN."""


def judge(*parts):
    """(whether it holds, what was found) of each part of a claim -> verdict, and why as text"""
    yes, no = ("; ".join(why for ok, why in parts if bool(ok) == wanted) for wanted in (True, False))
    if not (yes and no):
        return TRUE if yes else FALSE, sentence(yes or no)
    return PART, f"{sentence(yes)} But: {no}."


def sentence(text):
    return f"{text[0].upper()}{text[1:]}."


def plus_minus(value, digits=2):
    """[mean, error] -> text"""
    return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"


def percent(share, digits=0):
    """share of 1, or [share, standard error] -> text"""
    if isinstance(share, list):
        return f"{100 * share[0]:.{digits}f} ± {100 * share[1]:.{digits}f} %"
    return f"{100 * share:.{digits}f} %"


def progress(things):
    """Goes through them, with a bar if that takes long."""
    return tqdm(list(things), leave=False, delay=1)


# ---------------------------------------------------------------------------------------------------------------------
# What an item works with


class Lab:
    """Models, pictures, edits, distances: made when first asked for.

    options: weights, mfx_weights, ablation_weights, inpainting_weights (or None), instruct_weights (or None), networks
    (or None), images (folder or None), prompt, quick, as_paper, out
    """

    def __init__(self, options, device="cpu", dtype=torch.float32):
        self.options, self.device, self.dtype = options, device, dtype
        self.quick, self.out, self.fixups = options.quick, Path(options.out), {}

    @cached_property
    def model(self):
        """The Stable Diffusion that is edited with: the shipped toy unless --weights names another."""
        model = sd.load(self.options.weights, self.dtype, self.device)
        quicken(model.vae)  # on a CPU. A toy's UNet is at its best as it is
        return model

    @cached_property
    def inpainting(self):
        """An inpainting Stable Diffusion (9 channels), or None."""
        return self.load_wider(self.options.inpainting_weights, 1, "no inpainting model: it takes no mask")

    @cached_property
    def instruct(self):
        """An InstructPix2Pix (8 channels), or None."""
        return self.load_wider(self.options.instruct_weights, 0, "no InstructPix2Pix: it takes no picture, or a mask")

    def load_wider(self, path, more, otherwise):
        """A model that sees a latent and `more` channels beside its own, or None."""
        if not path:
            return None
        model = sd.load(path, self.dtype, self.device)
        if model.unet.config.in_channels != 2 * model.unet.config.out_channels + more:
            raise ValueError(f"{path} is {otherwise}")
        quicken(model.vae)
        return model

    def fixup(self, path=None):
        """The Magic Fixup of --mfx-weights, or another."""
        path = Path(path or self.options.mfx_weights).resolve()
        if path not in self.fixups:
            self.fixups[path] = mfx.load(path, self.dtype, self.device)
            quicken(self.fixups[path].vae)
        return self.fixups[path]

    @property
    def full_size(self):
        """Is this another model than a toy? Then the papers' number of steps is taken."""
        return self.model.size > 128

    @cached_property
    def steps(self):
        """Of a sampler"""
        return 100 if self.full_size else 10 if self.quick else 25

    def count(self, full, quick):
        """How many samples: `full`, or with --quick `quick`."""
        return quick if self.quick else full

    # -----------------------------------------------------------------------------------------------------------------
    # Pictures to edit

    def scenes(self, n, seed, objects=3):
        return world.random_scenes(n, torch.Generator().manual_seed(HELD_OUT + seed), objects)

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
        return world.render(self.meadows(n, seed) if meadow else self.scenes(n, seed), size).image * 2 - 1

    def meadows(self, n, seed=3):
        scenes = self.scenes(n, seed)
        scenes.time[:], scenes.ground[:] = world.TIMES.index("noon"), world.GROUNDS.index("grass")
        return scenes

    def prompts(self, n, seed):
        """n prompts, each naming a random object, ground and time of the toy world; with --images --prompt, n times."""
        return [self.options.prompt] * n if self.options.images else caption_scenes(self.scenes(n, seed, objects=1))

    # -----------------------------------------------------------------------------------------------------------------
    # Edits

    @property
    def at_once(self):
        return 2 if self.full_size else 32

    def noise(self, z, first):
        """Like z (B, C, h, w), of the seeds first, first + 1, .."""
        return draw_noise(z.shape[1:], range(first, first + len(z))).to(z)

    @torch.inference_mode()
    def edit(self, image, change_map, prompt=None, *, steps, sampler="ddim", guidance=7.5, how=None, **options):
        """The whole way of an edit, in batches, every picture with noise of its own.

        image       (N, 3, H, W) in [-1, 1]
        change_map  (H, W), or (N, 1, H, W)
        prompt      a text, or a list of N; None: --prompt
        how         a function that is called as diffdiff's are. None: differential_diffusion
          ->        (N, 3, H, W) in [-1, 1], on the CPU
        """
        how, out = how or diffdiff.differential_diffusion, []
        sampler = samplers.make_sampler(sampler, self.model.schedule, steps)
        for here, batch, prompts in self.batches(image, prompt):
            z_init = self.model.encode_image(batch)
            mu = change_map[here] if change_map.ndim == 4 else change_map
            denoise = self.model.denoiser(prompts, guidance=guidance)
            step_noise = samplers.make_step_noise(z_init.shape[1:], list(range(here.start, here.stop)))
            z = how(denoise, z_init, mu, sampler, self.noise(z_init, here.start), step_noise=step_noise, **options)
            out.append(self.model.decode(z).clamp(-1, 1).cpu())
        return torch.cat(out)

    @torch.inference_mode()
    def inpaint(self, image, mask, prompt=None, *, steps, guidance=7.5):
        """As `edit`, by the inpainting model: from pure noise, shown all the time what to keep, where the mask is 1,
        (H, W) or (N, 1, H, W).

        In the end what was to be kept is put back. Where the words contradict what it sees, a toy follows them, and
        would change everything; that is less than an inpainting model can do, and no measure of the method.
        """
        model, out = self.inpainting, []
        sampler, repaint = samplers.make_sampler("ddim", model.schedule, steps), 1 - mask.to(self.device)
        for here, batch, prompts in self.batches(image, prompt):
            region = repaint[here] if mask.ndim == 4 else repaint[None, None]
            z_init, beside = model.encode_image(batch), model.inpainting_channels(batch, region)
            denoise = model.denoiser(prompts, guidance=guidance, channels=beside)
            z = samplers.run_sampler(denoise, self.noise(z_init, here.start), sampler)
            out.append(model.decode(torch.lerp(z_init, z, beside[:, :1])).clamp(-1, 1).cpu())
        return torch.cat(out)

    def batches(self, image, prompt):
        """-> (which, pictures on the device, a prompt for each), as many as fit at once"""
        prompt = self.options.prompt if prompt is None else prompt
        prompts = [prompt] * len(image) if isinstance(prompt, str) else prompt
        for i in progress(range(0, len(image), self.at_once)):
            here = slice(i, min(i + self.at_once, len(image)))
            yield here, image[here].to(self.device), prompts[here]

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
            return "toy perceptual distance", lambda x, y: metrics.toy_distance(self.model.vae, x, y)

    @torch.inference_mode()
    def distance(self, x, y):
        """(N, 3, H, W) in [-1, 1] -> (N, H, W)"""
        _, between = self.perceptual
        pairs = zip(x.split(self.at_once), y.split(self.at_once))
        return torch.cat([between(a.to(self.device), b.to(self.device))[:, 0].cpu() for a, b in pairs])

    def save(self, picture, name):
        """Into the folder of results."""
        pictures.save_picture(picture, self.out / name, {})


def to_bytes(x):
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8"""
    return np.array(pictures.tensor_to_picture(x / 2 + 0.5))
