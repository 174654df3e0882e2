"""Train the toys that everything starts from, of the toy world alone: an hour or two each on two CPU cores.

    python -m reproduce.train_toys vae           toy scenes                          ->  runs/toy/model/vae
    python -m reproduce.train_toys base          its latents of scenes, and captions ->  runs/toy/model
    python -m reproduce.train_toys captioner     toy scenes; ten minutes              ->  runs/toy-captioner/model
    python -m reproduce.train_toys inpainting    from weights/toy, with masks        ->  runs/toy-inpainting/model
    python -m reproduce.train_toys instruct      from weights/toy, pairs and orders  ->  runs/toy-instruct/model
    python -m reproduce.train_toys refiner       for weights/toy, low noise alone    ->  runs/toy-refiner/model
    python -m reproduce.train_toys if-1, if-2    scenes and captions, in pixels      ->  runs/toy-if/model/IF-I, IF-II
    python -m reproduce.train_toys base --init weights/toy --out runs/toy2           trains the shipped weights further

Magic Fixup is train.py's, which has the loop as well; --resume goes on exactly where a run stopped.
"""

if __name__ == "__main__":
    from common import interrupts

    interrupts.watch("python -m reproduce.train_toys")

import functools
import math
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import clip
import diffusion
import sd
import train
import unet
import vae
from checkpoints.configs import schedule_to_json
from checkpoints.parts import build_part, load_part, save_part
from common.cli import TOY, Parser, folder_name, number, report_errors
from common.devices import choose_device
from common.files import write_json
from common.run_state import (
    cache_batches,
    change_recipe,
    digest,
    generator_at,
    open_run,
    resume_recipe,
    say_kept,
)
from kernels.blocks import to_channels_last
from kernels.memory import hold_memory
from models import image_encoder, xl
from reproduce import pix2pix
from reproduce.toy_batches import ToyRecipe, base_loss, cache_latents, draws, given, paint
from reproduce.train_cascade import train_first, train_second
from toy import captions, world
from toy.clips import Clip
from toy.edits import random_instructions
from toy.leaves import dead_leaves
from toy.vocabulary import learn_bpe

RECIPES = {
    "vae": ToyRecipe(steps=9000, batch=16, lr=1.5e-3, warmup=100, ema=0.998, muon=True),
    "base": ToyRecipe(steps=6000, batch=16, lr=1e-3, warmup=100, ema=0.999, muon=True),
    "captioner": ToyRecipe(steps=1100, batch=32, lr=2e-3, warmup=50, ema=0.99, muon=True),
    "inpainting": ToyRecipe(steps=1500, batch=16, lr=5e-4, warmup=100, ema=0.995, muon=True, scenes=8000),
    "instruct": ToyRecipe(steps=1500, batch=16, lr=5e-4, warmup=100, ema=0.995, muon=True, scenes=8000),  # never run
    "refiner": ToyRecipe(steps=1600, batch=16, lr=1.5e-3, warmup=100, ema=0.998, muon=True, scenes=3000, offset=0,
                         below=200),
    "if-1": ToyRecipe(steps=2200, batch=32, lr=1.5e-3, warmup=100, ema=0.998, muon=True, scenes=6000, offset=0),
    "if-2": ToyRecipe(steps=1200, batch=16, lr=1.5e-3, warmup=100, ema=0.997, muon=True, scenes=6000, offset=0),
}

FROM_TOY = "refiner", "inpainting", "instruct"  # the stages that begin with weights/toy where --init names nothing else
REFINER = replace(unet.CONFIGS["toy"], channels=(48, 64), depth=(0, 0))  # its context is the text encoder's

# Autoencoder
CROP = 64  # pixels; three quarters of the crops are centred on an object, since the background teaches little
FULL_FROM = 0.85  # share of the steps after which whole pictures (a quarter as many) replace crops: norms see both
KL = 1e-4  # weight of KL(q(z|x) || N(0, 1)) per latent number: enough to keep latents near the origin and smooth
SMALL = 0.03  # an error, of -1 .. 1
OBJECTS = 3.0  # weight of pixels inside objects
# Models that are shown something beside z_t
LEFT_OUT = 0.05  # shares of the pairs whose picture, whose order, and of which both are hidden, as in InstructPix2Pix
WHOLE = 0.25  # share of the masks that cover the whole picture, as of Stable Diffusion's own inpainting model


# ---------------------------------------------------------------------------------------------------------------------
# Stage vae


def vae_batch(recipe, step):
    """-> images (B, 3, S, S) in [-1, 1], weights (B, 1, S, S): half of them scenes, still or in motion, half leaves"""
    g = generator_at(recipe.seed, step)
    whole = step >= FULL_FROM * recipe.steps
    n = max(1, recipe.batch // 8 if whole else recipe.batch // 4)
    frames = world.render(world.random_scenes(n, g) if step % 2 else Clip(n, g)(torch.rand(1, generator=g)))
    image, weight = frames.image, 1 + (OBJECTS - 1) * (frames.segments[:, None] > 0).float()
    if not whole:
        image, weight = (x.repeat(2, 1, 1, 1) for x in (image, weight))
        image, weight = random_crops(image, weight, g)
    leaves = dead_leaves(len(image), image.shape[-1], g)
    return torch.cat([image, leaves]) * 2 - 1, torch.cat([weight, torch.ones_like(leaves[:, :1])])


def random_crops(image, weight, generator):
    """One crop of CROP pixels from each picture (n, C, S, S), three in four centred on an object."""
    n, size = len(image), image.shape[-1]
    on_object = (weight > 1).flatten(1).float() + 1e-6
    anywhere = torch.rand(n, 1, generator=generator) < 0.25
    centre = torch.multinomial(torch.where(anywhere, 1.0, on_object), 1, generator=generator)[:, 0]
    jitter = torch.randint(-CROP // 3, CROP // 3, (2, n), generator=generator)
    top, left = (torch.stack([centre // size, centre % size]) + jitter - CROP // 2).clamp(0, size - CROP)
    crops = [(..., slice(t, t + CROP), slice(l, l + CROP)) for t, l in zip(top.tolist(), left.tolist())]
    return tuple(torch.stack([one[crop] for one, crop in zip(x, crops)]) for x in (image, weight))


def vae_loss(model, x, weight, noise):
    """x (B, 3, S, S), weight (B, 1, S, S), noise (B, C, s, s) -> scalar"""
    mean, logvar = (m.float() for m in model.encode(x))
    error = model.decode(mean + (0.5 * logvar).exp() * noise).float() - x
    error = (error**2 + SMALL**2).sqrt() - SMALL  # squared where small, absolute where large
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return (error * weight).mean() + KL * kl


def train_vae(recipe, out, resume, device):
    """-> OUT/model/vae, as fp16, with the scaling factor that brings its latents to unit variance"""
    init = sd.load(recipe.init, torch.float32, device) if recipe.init else None
    config = replace(vae.CONFIGS["toy"], channels=tuple(recipe.widths), latent_channels=recipe.latent)
    model = init.vae.requires_grad_(True) if init else vae.VAE(config)
    model = model.to(device, memory_format=torch.channels_last)

    def loss(step, _):
        x, weight = vae_batch(recipe, step)
        f, c = model.config.factor, model.config.latent_channels
        noise = torch.randn(len(x), c, x.shape[2] // f, x.shape[3] // f, generator=generator_at(recipe.seed + 1, step))
        x = x.to(device, memory_format=torch.channels_last)
        return vae_loss(model, x, weight.to(device), noise.to(device))

    def sheet(average):
        g = generator_at(recipe.seed + 2, 0)
        frames, leaves = world.render(world.random_scenes(32, g)), dead_leaves(16, 128, g)
        images = torch.cat([frames.image, leaves])
        with torch.no_grad():
            back = [average.decode(average.encode((x * 2 - 1).to(device))[0]).cpu() / 2 + 0.5 for x in images.split(8)]
        back = torch.cat(back).clamp(0, 1)
        mse = (back - images) ** 2
        inside = mse[:32][(frames.segments[:, None] > 0).expand_as(frames.image)]
        scenes, objects, leaves = (-10 * e.mean().log10() for e in (mse[:32], inside, mse[32:]))
        tqdm.write(f"PSNR {scenes:.2f} dB, inside objects {objects:.2f} dB, dead leaves {leaves:.2f} dB")
        return torch.stack([images[26:38], back[26:38]])

    average = train.fit("vae", model, loss, sheet, recipe, out, resume)
    images = world.render(world.random_scenes(256, generator_at(recipe.seed + 3, 0))).image * 2 - 1
    with torch.no_grad():
        spread = average.encode(images.to(device))[0].std().item()
    average.config = replace(average.config, scaling_factor=round(1 / spread, 5))
    save_part(average, out / "model" / "vae", torch.float16, sample_size=images.shape[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Stage base


def new_base(out, scenes, device):
    """The toy Stable Diffusion before its training: the autoencoder of stage vae, and a vocabulary of the captions."""
    if not (out / "model" / "vae").is_dir():
        raise FileNotFoundError(f"there is no autoencoder in {out} yet: first python -m reproduce.train_toys vae "
                                f"--out {out}; or go on from the shipped model, --init weights/toy")
    autoencoder = load_part(out / "model" / "vae", "vae", torch.float32, device)
    tokenizer = clip.Tokenizer(*learn_bpe(world.captions(scenes[:5000], generator_at(0, 0)), 600))
    text = replace(clip.CONFIGS["toy"], vocab_size=len(tokenizer.vocab), eos=tokenizer.vocab[clip.END])
    C = autoencoder.config.latent_channels
    model = unet.UNet(replace(unet.CONFIGS["toy"], in_channels=C, out_channels=C))
    nn.init.zeros_(model.conv_out.weight)  # the first guess is no noise: a calm start
    # All latents of a toy show its hour. Stable Diffusion's own schedule hides that at its noisiest levels alone, so
    # under a gradient it changes all at once. More noise in the middle spreads that. v: see mfx.MagicFixup.loss.
    schedule = diffusion.Schedule("linear_sd", "v_prediction")
    return sd.StableDiffusion(model, autoencoder, clip.TextEncoder(text), schedule, tokenizer, size=128)


def train_base(recipe, out, resume, device):
    """Text encoder and UNet together (Stable Diffusion's came trained, ours has to learn) -> OUT/model, as fp16

    Of a refiner it is a narrow UNet alone, for the lowest timesteps. It reads the words of the model that it refines.
    """
    scenes = world.random_scenes(recipe.scenes, generator_at(recipe.seed, 0))
    refines = recipe.below < diffusion.T
    toy = given(recipe.init or TOY, device) if recipe.init or refines else new_base(out, scenes, device)
    kept = cache_latents(scenes, out / "latents.safetensors", toy.vae, device)
    latents, mixed = kept["latents"], kept["mixed"].tolist()
    tokenizer, schedule, factor = toy.tokenizer, toy.schedule, toy.vae.config.scaling_factor
    C = toy.vae.config.latent_channels
    parts = {"unet": unet.UNet(replace(REFINER, in_channels=C, out_channels=C, context=toy.text.config.width))}
    if not refines:
        parts = {"unet": toy.unet, "text": toy.text}
    model = nn.ModuleDict(parts).requires_grad_(True)
    model = model.to(device, memory_format=torch.channels_last)

    def loss(step, _):
        index, told, t, noise, _ = draws(recipe, scenes, latents.shape[1:], step, mixed)
        z, t, noise = (to_channels_last(x.to(device)) for x in (latents[index].float() * factor, t, noise))
        return base_loss(model["unet"], schedule, z, parts.get("text", toy.text)(tokenizer(told).to(device)), t, noise)

    def sheet(average):
        shown = replace(toy, **dict(average))
        scenes = world.random_scenes(16, generator_at(recipe.seed + 2, 0))
        prompts = world.captions(scenes, generator_at(recipe.seed + 2, 0))
        noise = torch.randn(16, *latents.shape[1:], generator=generator_at(recipe.seed + 2, 0)).to(device)
        denoise = shown.denoiser(prompts, guidance=4.0)
        if refines:
            denoise = xl.hand_over(toy.denoiser(prompts, guidance=4.0), denoise, 1 - recipe.below / diffusion.T)
        return paint(shown, denoise, noise).unflatten(0, (2, 8))

    average = train.fit("refiner" if refines else "base", model, loss, sheet, recipe, out, resume)
    if refines:
        save_part(average["unet"], out / "model" / "unet", torch.float16, sample_size=latents.shape[-1])
        write_json(out / "model/scheduler/scheduler_config.json", schedule_to_json(schedule))
    else:
        sd.save(replace(toy, **dict(average)), out / "model", torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# Stage captioner


def train_captioner(recipe, out, resume, device):
    """-> OUT/model, as fp16: a network that sees what is in a picture of the toy world"""
    model = image_encoder.ToyImageEncoder(image_encoder.ToyImageConfig(sum(captions.SIZES)))
    model = model.to(device, memory_format=torch.channels_last)

    def loss(step, _):
        g = generator_at(recipe.seed, step)
        scenes = world.random_scenes(recipe.batch, g)
        x = world.render(scenes, model.config.side).image * 2 - 1
        x = x + 0.04 * torch.rand(1, generator=g) * torch.randn(x.shape, generator=g)
        return captions.caption_loss(model(to_channels_last(x.to(device))).cpu(), scenes)

    g = generator_at(recipe.seed + 3, 0)
    scenes = world.random_scenes(256, g)
    truth, images = captions.caption_scenes(scenes), world.render(scenes).image * 2 - 1

    def validate(average):
        """The share of captions that are wrong somewhere"""
        return sum(a != b for a, b in zip(captions.describe(average, images), truth)) / len(truth)

    average = train.fit("captioner", model, loss, None, recipe, out, resume, validate)
    save_part(average, out / "model", torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# Stage inpainting


def widened(model, more):
    """A copy of a UNet that reads `more` channels behind z_t. The new columns of its first layer are zero, so that it
    begins as the very model that it was."""
    tensors = {name: w.clone() for name, w in model.state_dict().items()}
    tensors["conv_in.weight"] = F.pad(tensors["conv_in.weight"], (0, 0, 0, 0, 0, more))
    config = replace(model.config, in_channels=model.config.in_channels + more)
    return build_part("unet", tensors, "this Stable Diffusion", config)


def random_masks(n, size, generator):
    """-> (n, 1, size, size), 1 = repaint, 0 = keep: one shape or two, a half plane, rectangle or ellipse each, at any
    place and angle; a quarter of the masks the other way round."""

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 2, 1, 1, generator=generator)

    p = (torch.arange(size) + 0.5) / size * 2 - 1  # a pixel's place, in -1 .. 1
    x, y, angle = p - uniform(-0.8, 0.8), p[:, None] - uniform(-0.8, 0.8), uniform(0, 2 * math.pi)
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()  # (n, 2, S, S), as the shape sees it
    a, b = uniform(0.2, 0.8), uniform(0.2, 0.8)
    shapes = torch.stack([u > 0, (u.abs() < a) & (v.abs() < b), (u / a) ** 2 + (v / b) ** 2 < 1])
    kind = torch.randint(len(shapes), (1, n, 2, 1, 1), generator=generator)
    one, two = shapes.take_along_dim(kind, 0)[0].unbind(1)
    second, turned = torch.rand(2, n, 1, 1, generator=generator) < torch.tensor([0.5, 0.25])[:, None, None, None]
    return ((one | two & second) ^ turned)[:, None].float()


def train_inpainting(recipe, out, resume, device):
    """A base model's UNet learns to fill in what a mask covers -> OUT/model, as fp16

    The way that Stable Diffusion's own inpainting model was made of its version 1.2 (its model card tells): the first
    layer is widened with zeros, and training goes on with masks, a quarter of which cover everything. The text encoder
    and the autoencoder stay as they are.
    """
    scenes = world.random_scenes(recipe.scenes, generator_at(recipe.seed, 0))
    toy = given(recipe.init or TOY, device)
    model = widened(toy.unet, toy.unet.config.in_channels + 1)  # the mask, the latent of the masked picture
    model = model.requires_grad_(True).to(device, memory_format=torch.channels_last)
    size = toy.size

    def encode(i):  # scenes, each with a mask of its own: a new one at every step would need the encoder at every step
        image = to_channels_last((world.render(scenes[i : i + 32], size).image * 2 - 1).to(device))
        repaint = random_masks(len(image), size, generator_at(recipe.seed + 3, i)).to(device)
        return {"z": toy.encode_image(image).half(), "known": toy.inpainting_channels(image, repaint).half()}

    made_from = digest(toy.vae, scenes.x.tolist(), recipe.seed, size)
    latents = cache_batches(out / "masked.safetensors", made_from, range(0, len(scenes), 32), encode)
    nothing = toy.inpainting_channels(torch.zeros(1, 3, size, size), torch.ones(1, 1, size, size))

    def loss(step, _):
        index, told, t, noise, g = draws(recipe, scenes, latents["z"].shape[1:], step)
        whole = torch.rand(recipe.batch, 1, 1, 1, generator=g) < WHOLE
        beside = torch.where(whole.to(device), nothing, latents["known"][index].float().to(device))
        z, t, noise = (to_channels_last(x.to(device)) for x in (latents["z"][index].float(), t, noise))
        return base_loss(model, toy.schedule, z, toy.encode_prompt(told), t, noise, beside)

    g = generator_at(recipe.seed + 2, 0)
    shown = world.random_scenes(8, g)
    prompts, image = world.captions(shown, g), world.render(shown, size).image * 2 - 1
    repaint = random_masks(8, size, g)
    beside = toy.inpainting_channels(image.to(device), repaint.to(device))
    start = torch.randn(8, *latents["z"].shape[1:], generator=g).to(device)

    def sheet(average):
        painter = replace(toy, unet=average)
        painted = paint(painter, painter.denoiser(prompts, guidance=4.0, channels=beside), start)
        return torch.stack([image / 2 + 0.5, image * (1 - repaint) / 2 + 0.5, painted])

    average = train.fit("inpainting", model, loss, sheet, recipe, out, resume)
    sd.save(replace(toy, unet=average), out / "model", torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# Stage instruct


def train_instruct(recipe, out, resume, device):
    """A base model's UNet learns to do as it is told -> OUT/model, as fp16: InstructPix2Pix, on pairs of the toy world.
    The text encoder and the autoencoder stay as they are."""
    scenes = world.random_scenes(recipe.scenes, generator_at(recipe.seed, 0))
    edited, orders = random_instructions(scenes, generator_at(recipe.seed, 1))
    toy = given(recipe.init or TOY, device)
    model = widened(toy.unet, toy.unet.config.in_channels).requires_grad_(True)
    model = model.to(device, memory_format=torch.channels_last)

    def encode(i):  # z as it is wanted, and seen, as it is, not scaled
        wanted, image = (world.render(s[i : i + 32], toy.size).image * 2 - 1 for s in (edited, scenes))
        z, seen = (toy.encode_image(to_channels_last(x.to(device))) for x in (wanted, image))
        return {"z": z.half(), "seen": (seen / toy.vae.config.scaling_factor).half()}

    made_from = digest(toy.vae, scenes.x.tolist(), edited.time.tolist(), toy.size)
    latents = cache_batches(out / "pairs.safetensors", made_from, range(0, len(scenes), 32), encode)

    def loss(step, _):
        index, _, t, noise, g = draws(recipe, scenes, latents["z"].shape[1:], step)
        share = torch.rand(recipe.batch, generator=g) / LEFT_OUT
        told = ["" if s < 2 else orders[i] for i, s in zip(index.tolist(), share.tolist())]
        shown = ((share < 1) | (share > 3)).float()[:, None, None, None]  # below 1 the order alone is hidden
        seen = (latents["seen"][index].float() * shown).to(device)
        z, t, noise = (to_channels_last(x.to(device)) for x in (latents["z"][index].float(), t, noise))
        return base_loss(model, toy.schedule, z, toy.encode_prompt(told), t, noise, seen)

    image, wanted = (world.render(s[:8], toy.size).image * 2 - 1 for s in (scenes, edited))
    seen = pix2pix.look_at(toy, image.to(device))
    start = torch.randn(seen.shape, generator=generator_at(recipe.seed + 2, 0)).to(device)

    def sheet(average):
        painter = replace(toy, unet=average)
        painted = paint(painter, pix2pix.denoiser(painter, seen, orders[:8]), start)
        return torch.stack([image / 2 + 0.5, painted, wanted / 2 + 0.5])

    average = train.fit("instruct", model, loss, sheet, recipe, out, resume)
    sd.save(replace(toy, unet=average), out / "model", torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# The command line

STAGES = {  # how it is trained, the default of --out, and what it would write over there
    "vae": (train_vae, "runs/toy", "model/vae"),
    "base": (train_base, "runs/toy", "model/unet"),
    "refiner": (train_base, "runs/toy-refiner", "model/unet"),
    "captioner": (train_captioner, "runs/toy-captioner", "model/config.json"),
    "inpainting": (train_inpainting, "runs/toy-inpainting", "model/unet"),  # not over the model that it is made of
    "instruct": (train_instruct, "runs/toy-instruct", "model/unet"),
    "if-1": (train_first, "runs/toy-if", "model/IF-I"),
    "if-2": (train_second, "runs/toy-if", "model/IF-II"),
}


def read_widths(text):
    """'24,64,128' -> (24, 64, 128)"""
    return tuple(number(int, 8, 1024)(width) for width in text.split(","))


def main(argv=None):
    parser = Parser(prog="python -m reproduce.train_toys", description=__doc__)
    parser.add_argument("stage", choices=list(STAGES))
    train.add_loop_options(parser)
    parser.add_argument("--out", type=folder_name, help="default: runs/toy, or runs/toy- and the stage")
    parser.add_argument("--widths", type=read_widths, help="of the autoencoder's levels, e.g. 24,64,128")
    parser.add_argument("--latent", type=number(int, 1, 64), help="its latent channels")
    parser.add_argument("--scenes", type=number(int, 1, 10**9), help="to learn from")
    parser.add_argument("--offset", type=number(float, 0, 1), help="how much smooth noise beside the white")
    args = parser.parse_args(argv)
    train_stage, out, model = STAGES[args.stage]
    out = args.out or Path(out)
    kept = functools.partial(say_kept, f"python -m reproduce.train_toys {args.stage}", out, args.stage)
    run = open_run(out, args.stage, args.resume, out / model)
    with report_errors(parser, "try a smaller --batch", kept), run:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("the toys are trained in one process: only train.py can be shared by many")
        if args.stage in ("vae", "captioner") and not (args.scenes is None and args.offset is None):
            raise ValueError(f"--scenes and --offset are not for {args.stage}, which draws new scenes at every step")
        if args.init and args.stage in ("if-2", "captioner"):
            raise ValueError(f"--init is not for {args.stage}, which begins anew")
        if args.resume:
            recipe = resume_recipe(out, args.stage, ToyRecipe, args, TOY if args.stage in FROM_TOY else None)
        else:
            recipe = change_recipe(RECIPES[args.stage], args)
        torch.manual_seed(recipe.seed)
        train_stage(recipe, out, args.resume, choose_device(args.device))


if __name__ == "__main__":
    hold_memory()
    main()
