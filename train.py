"""Train the toy models on the toy world: the autoencoder, then the text-conditional base model.

    python train.py --stage vae            an hour or two on 2 CPU cores, minutes on a GPU
    python train.py --stage base
    python train.py --stage base --resume  goes on exactly where it stopped, with the recipe that it was started with

While it runs, OUT holds the loss curve and a sheet of samples as PNG, and the training state as one safetensors file.
Every batch is a function of (seed, step) alone, so a resumed run sees the very same data and noise as one that never
stopped. Checkpoints appear whole or not at all: they are written beside their place and renamed into it.
"""

import argparse
import copy
import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import clip
import diffdiff
import diffusion
import layouts
import mfx
import sd
import toyworld
import unet
import vae
from pairs import toy_pairs
from sample import Parser, choose_device, choose_precision, number

# ---------------------------------------------------------------------------------------------------------------------
# Recipes. What can be changed from the command line is changed by the option of the same name.


@dataclass
class Recipe:
    steps: int
    batch: int
    lr: float  # Adam's, after a linear warm-up; falls to zero along half a cosine
    warmup: int  # steps
    ema: float  # decay of the weight average that is shipped; ramped up, so that early weights are soon forgotten
    seed: int = 0
    save_every: int = 500
    scenes: int = 24_000  # stage base: distinct scenes; their captions are worded anew every time
    # Stage base: noise of one value per channel and picture, beside the white noise. Stable Diffusion's noisiest level
    # still shows a picture's mean, which a model learns to trust over the words: noon would never turn into night.
    offset: float = 0.2
    motion: str = "both"  # stage mfx: how the first frame is warped to the second, 'flow', 'affine' or half of each
    cross_reference: bool = True  # stage mfx: False is the paper's ablation, without the detail extractor


RECIPES = {
    "vae": Recipe(steps=3600, batch=16, lr=1.2e-3, warmup=200, ema=0.998),
    "base": Recipe(steps=6300, batch=32, lr=1e-3, warmup=300, ema=0.9995),
    "mfx": Recipe(steps=8000, batch=16, lr=5e-4, warmup=300, ema=0.9995, scenes=12_000),
}
# Autoencoder
CROP = 64  # pixels; three quarters of the crops are centred on an object, since the background teaches little
FULL_FROM = 0.85  # share of the steps after which whole pictures (a quarter as many) replace crops: norms see both
KL = 2e-4  # weight of KL(q(z|x) || N(0, 1)) per latent number: enough to keep latents near the origin and smooth
EDGES = 0.5  # weight of the error in neighbouring pixels' differences: crisp edges
OBJECTS = 3.0  # weight of pixels inside objects
# Base model
DROPPED = 0.1  # share of captions left out, so that there is an unconditional model to guide away from
GAMMA = 5.0  # of Min-SNR: low noise levels, where the weight would grow without bound, count no more than this


def at(seed, step):
    """The random generator of one step: exact resume without saving any random state."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# ---------------------------------------------------------------------------------------------------------------------
# Stage vae


def vae_batch(recipe, step):
    """-> images (B, 3, S, S) in [-1, 1], weights (B, 1, S, S)"""
    g = at(recipe.seed, step)
    if step >= FULL_FROM * recipe.steps:
        frames = toyworld.render(toyworld.random_scenes(recipe.batch // 4, g))
        return frames.image * 2 - 1, 1 + (OBJECTS - 1) * (frames.segments[:, None] > 0)
    frames = toyworld.render(toyworld.random_scenes(recipe.batch, g))
    n, size = len(frames.image), frames.image.shape[-1]
    on_object = (frames.segments > 0).flatten(1).float() + 1e-6
    anywhere = torch.rand(n, 1, generator=g) < 0.25
    centre = torch.multinomial(torch.where(anywhere, 1.0, on_object), 1, generator=g)[:, 0]
    jitter = torch.randint(-CROP // 3, CROP // 3, (2, n), generator=g)
    top, left = (torch.stack([centre // size, centre % size]) + jitter - CROP // 2).clamp(0, size - CROP)
    crops = [slice(int(t), int(t) + CROP) for t in top], [slice(int(t), int(t) + CROP) for t in left]
    image = torch.stack([f[:, r, c] for f, r, c in zip(frames.image, *crops)])
    weight = torch.stack([s[None, r, c] for s, r, c in zip(frames.segments, *crops)]) > 0
    return image * 2 - 1, 1 + (OBJECTS - 1) * weight


def vae_loss(model, x, weight, noise):
    """x (B, 3, S, S), weight (B, 1, S, S), noise (B, C, s, s) -> scalar"""
    mean, logvar = (m.float() for m in model.encode(x))
    error = model.decode(mean + (0.5 * logvar).exp() * noise).float() - x
    edges = sum((error.diff(dim=d).abs() * weight.narrow(d, 1, weight.shape[d] - 1)).mean() for d in (2, 3))
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return (error.abs() * weight).mean() + EDGES * edges + KL * kl


def train_vae(recipe, out, resume, device, init):
    """-> OUT/model/vae, as fp16, with the scaling factor that brings its latents to unit variance"""
    model = init.vae.requires_grad_(True) if init else vae.VAE(vae.CONFIGS["toy"])
    model = model.to(device, memory_format=torch.channels_last)

    def loss(step):
        x, weight = vae_batch(recipe, step)
        f, c = model.config.factor, model.config.latent_channels
        noise = torch.randn(len(x), c, x.shape[2] // f, x.shape[3] // f, generator=at(recipe.seed + 1, step))
        x = x.to(device, memory_format=torch.channels_last)
        return vae_loss(model, x, weight.to(device), noise.to(device))

    def sheet(average):
        frames = toyworld.render(toyworld.random_scenes(8, at(recipe.seed + 2, 0)))
        with torch.no_grad():
            back = average.decode(average.encode((frames.image * 2 - 1).to(device))[0]).cpu() / 2 + 0.5
        mse, inside = (back.clamp(0, 1) - frames.image) ** 2, (frames.segments[:, None] > 0).expand_as(back)
        tqdm.write(f"PSNR {-10 * mse.mean().log10():.2f} dB, inside objects {-10 * mse[inside].mean().log10():.2f} dB")
        return torch.cat([frames.image, back])

    average = fit("vae", model, loss, sheet, recipe, out, resume)
    images = toyworld.render(toyworld.random_scenes(256, at(recipe.seed + 3, 0))).image * 2 - 1
    with torch.no_grad():
        spread = average.encode(images.to(device))[0].std().item()
    average.config = replace(average.config, scaling_factor=round(1 / spread, 5))
    sd.save_part(average, out / "model" / "vae", torch.float16, sample_size=images.shape[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Stage base


def encode_scenes(scenes, path, autoencoder, device):
    """-> latents (N, C, h, w), unscaled: made once, and kept in a file for these scenes and this autoencoder."""
    made_from = {"made_from": digest(autoencoder, scenes.x.tolist())}
    if not fresh(path, made_from):
        parts = []
        for i in tqdm(range(0, len(scenes), 64), desc="latents", unit="batch", mininterval=1):
            image = toyworld.render(scenes[i : i + 64]).image
            with torch.no_grad():
                parts.append(autoencoder.encode(channels_last((image * 2 - 1).to(device)))[0].half().cpu())
        with layouts.whole(path) as tmp:
            save_file({"latents": torch.cat(parts).contiguous()}, tmp, made_from)
    return load_file(path)["latents"]


def base_loss(model, schedule, z, ids, t, noise):
    """The simple loss of DDPM, eq. 14, weighted by Min-SNR (Hang et al. 2023): w = min(SNR, gamma) / SNR on epsilon."""
    output = model["unet"](schedule.add_noise(z, noise, t), t, model["text"](ids))
    snr = (schedule.alpha / schedule.sigma).to(z.device)[t] ** 2
    return ((output - noise).square().mean((1, 2, 3)) * snr.clamp(max=GAMMA) / snr).mean()


def new_base(out, scenes, device):
    """The toy Stable Diffusion before its training: the autoencoder of stage vae, and a vocabulary of the captions."""
    autoencoder = sd.load_part(out / "model" / "vae", "vae", torch.float32, device)
    tokenizer = clip.Tokenizer(*clip.learn_bpe(toyworld.captions(scenes[:5000], at(0, 0)), 600))
    text = replace(clip.CONFIGS["toy"], vocab_size=len(tokenizer.vocab), eos=tokenizer.vocab[clip.END])
    model = unet.UNet(unet.CONFIGS["toy"])
    nn.init.zeros_(model.conv_out.weight)  # the first guess is no noise: a calm start
    return sd.StableDiffusion(model, autoencoder, clip.TextEncoder(text), diffusion.Schedule(), tokenizer, size=128)


def train_base(recipe, out, resume, device, init):
    """Text encoder and UNet together (Stable Diffusion's came trained, ours has to learn) -> OUT/model, as fp16"""
    scenes = toyworld.random_scenes(recipe.scenes, at(recipe.seed, 0))
    toy = init or new_base(out, scenes, device)
    latents = encode_scenes(scenes, out / "latents.safetensors", toy.vae, device)
    tokenizer, schedule, factor = toy.tokenizer, toy.schedule, toy.vae.config.scaling_factor
    model = nn.ModuleDict({"unet": toy.unet, "text": toy.text}).requires_grad_(True)
    model = model.to(device, memory_format=torch.channels_last)

    def loss(step):
        g = at(recipe.seed + 1, step)
        index = torch.randint(recipe.scenes, (recipe.batch,), generator=g)
        told = toyworld.captions(scenes[index], g)
        dropped = torch.rand(recipe.batch, generator=g) < DROPPED
        ids = tokenizer(["" if d else c for c, d in zip(told, dropped)])
        t = stratified(recipe.batch, g)
        z = latents[index].float() * factor
        noise = torch.randn(z.shape, generator=g)
        if recipe.offset:
            noise = noise + recipe.offset * torch.randn(*z.shape[:2], 1, 1, generator=g)
        return base_loss(model, schedule, *(channels_last(x.to(device)) for x in (z, ids, t, noise)))

    def sheet(average):
        shown = replace(toy, unet=average["unet"], text=average["text"])
        prompts = toyworld.captions(toyworld.random_scenes(16, at(recipe.seed + 2, 0)), at(recipe.seed + 2, 0))
        noise = torch.randn(16, *latents.shape[1:], generator=at(recipe.seed + 2, 0)).to(device)
        with torch.no_grad():
            z = diffusion.sample(shown.denoiser(prompts, guidance=4.0), noise, diffusion.make("ddim", schedule, 25))
            return shown.decode(z).cpu() / 2 + 0.5

    average = fit("base", model, loss, sheet, recipe, out, resume)
    sd.save(replace(toy, unet=average["unet"], text=average["text"]), out / "model", torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# Stage mfx


def pair_latents(recipe, path, autoencoder, device):
    """Pairs of the toy world as Magic Fixup sees them, made once and kept in a file: a dict of (N, ...) in fp16.

    The run shows each of them several times, under new noise; encoding them again would cost as much as the training.
    """
    made_from = {"made_from": digest(autoencoder, recipe.scenes, recipe.seed, recipe.motion)}
    if not fresh(path, made_from):
        parts = []
        for i in tqdm(range(0, recipe.scenes, 32), desc="pairs", unit="batch", mininterval=1):
            pairs = toy_pairs(32, at(recipe.seed + 4, i), recipe.motion)
            parts.append({name: t.half() for name, t in encode_pairs(pairs, autoencoder, device).items()})
        with layouts.whole(path) as tmp:
            save_file({name: torch.cat([p[name] for p in parts]).contiguous() for name in parts[0]}, tmp, made_from)
    return load_file(path)


@torch.no_grad()
def encode_pairs(pairs, autoencoder, device):
    """reference, target, coarse (B, 3, H, W) and mask (B, 1, H, W) -> latents (B, C, h, w), mask (B, 1, h, w)"""
    factor = autoencoder.config.scaling_factor
    latents = {name: (autoencoder.encode(channels_last(pairs[name].to(device)))[0] * factor).cpu()
               for name in ("reference", "target", "coarse")}
    return latents | {"mask": diffdiff.down_sample(pairs["mask"], latents["target"].shape[-2:])}


def train_mfx(recipe, out, resume, device, init):
    """Both UNets together, from a Stable Diffusion, on pairs of frames: section 3.6 -> OUT/model, as fp16"""
    model = mfx.from_stable_diffusion(init, cross_reference=recipe.cross_reference)
    model = model.to(device, memory_format=torch.channels_last)
    model.unfreeze()
    pairs = pair_latents(recipe, out / "pairs.safetensors", model.vae, device)

    def loss(step):
        g = at(recipe.seed + 1, step)
        index = torch.randint(len(pairs["mask"]), (recipe.batch,), generator=g)
        batch = {name: t[index].float() for name, t in pairs.items()}
        batch |= mfx.draws(batch["target"].shape, g) | {"t": stratified(recipe.batch, g)}
        return model.loss({name: channels_last(t.to(device)) for name, t in batch.items()})

    shown = toy_pairs(8, at(recipe.seed + 2, 0), recipe.motion)

    def sheet(average):
        edit = {name: t.to(device) for name, t in encode_pairs(shown, average.vae, device).items()}
        with torch.no_grad():
            x = average.decode(average.sample(edit["reference"], edit["coarse"], edit["mask"], steps=25)).cpu()
        return torch.cat([shown["reference"], shown["coarse"], x, shown["target"]]) / 2 + 0.5

    mfx.save(fit("mfx", model, loss, sheet, recipe, out, resume), out / "model", torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# The loop that the stages share


def stratified(batch, generator):
    """One timestep from each of `batch` equal parts of 0 .. T-1: uniform, with less variance than free draws."""
    return ((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * diffusion.T).long()


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def digest(autoencoder, *data):
    """Tells cached latents of this autoencoder and data from others."""
    h = hashlib.sha256(repr(data).encode())
    for p in autoencoder.parameters():
        h.update(p.detach().cpu().numpy().tobytes())
    return h.hexdigest()


def fresh(path, made_from):
    """Is there a file of latents, made from that?"""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() == made_from
    except (OSError, SafetensorError):
        return False


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fit(stage, model, loss, sheet, recipe, out, resume):
    """Adam on loss(step) for recipe.steps steps, a sheet of what the average can do at every save. -> the average"""
    state, average = out / f"{stage}-state.safetensors", copy.deepcopy(model).eval().requires_grad_(False)
    parameters, followers = trained(model), dict(average.named_parameters())
    device = next(iter(parameters.values())).device
    bf16 = choose_precision("auto", device) == torch.bfloat16  # weights stay fp32; matrices are multiplied in half
    optimizer = torch.optim.AdamW(parameters.values(), recipe.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    first, losses = restore(state, model, average, optimizer) if resume else (0, [])
    bar = tqdm(range(first, recipe.steps), stage, recipe.steps, initial=first, mininterval=1, smoothing=0.02)
    for step in bar:
        rate = recipe.lr * min(1, (step + 1) / recipe.warmup) * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            value = loss(step)
        optimizer.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        losses.append(value.item())
        if not math.isfinite(losses[-1] * norm.item()):  # before a step, and a checkpoint, that would be beyond repair
            raise FloatingPointError(f"loss or gradient is not finite at step {step}: resume with a lower --lr")
        optimizer.step()
        decay = min(recipe.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_([followers[n] for n in parameters], list(parameters.values()), 1 - decay)
        rate = recipe.batch * (bar.format_dict["rate"] or 0)
        bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", images_s=f"{rate:.0f}", refresh=False)
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            save(state, model, average, optimizer, losses, recipe)
            draw_curve(losses, out / f"{stage}-loss.png")
            draw_sheet(sheet(average), out / f"{stage}-samples.png")
    return average


def save(path, model, average, optimizer, losses, recipe):
    """Everything that the next step depends on, as one safetensors file; no pickle."""
    tensors = {}
    followers = dict(average.named_parameters())
    for name, p in trained(model).items():
        tensors[f"model.{name}"], tensors[f"average.{name}"] = p.detach(), followers[name]
        tensors[f"m.{name}"], tensors[f"v.{name}"] = (optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq"))
    with layouts.whole(path) as tmp:
        more = {"losses": json.dumps(losses), "recipe": json.dumps(asdict(recipe))}
        save_file({k: t.contiguous() for k, t in tensors.items()}, tmp, more)


def saved_recipe(path):
    """The recipe of the run that left its state at `path`: what --resume goes on with."""
    if not path.exists():
        raise ValueError(f"nothing to resume: {path} does not exist; leave out --resume to start")
    try:
        with safe_open(path, "pt") as file:
            return Recipe(**json.loads(file.metadata()["recipe"]))
    except (SafetensorError, TypeError, KeyError, ValueError) as e:
        raise ValueError(f"{path} is damaged, or no training state ({str(e).splitlines()[0]})") from None


def restore(path, model, average, optimizer):
    """-> number of steps done, their losses"""
    try:
        with safe_open(path, "pt") as file, torch.no_grad():
            losses = json.loads(file.metadata()["losses"])
            followers = dict(average.named_parameters())
            for name, p in trained(model).items():
                p.copy_(file.get_tensor(f"model.{name}"))
                followers[name].copy_(file.get_tensor(f"average.{name}"))
                # The moments get the parameters' memory format, as they have in a run that never stopped.
                m, v = (torch.empty_like(p).copy_(file.get_tensor(f"{k}.{name}")) for k in "mv")
                count = torch.tensor(float(len(losses)), device=p.device)  # where fused Adam wants it
                optimizer.state[p] = {"step": count, "exp_avg": m, "exp_avg_sq": v}
    except (SafetensorError, RuntimeError) as e:
        raise ValueError(f"{path} is the state of another model ({str(e).splitlines()[0]})") from None
    return len(losses), losses


def draw_sheet(images, path, columns=8):
    """images (N, 3, H, W) in [0, 1] as a grid PNG."""
    n, _, h, w = images.shape
    grid = images.clamp(0, 1).view(n // columns, columns, 3, h, w).permute(0, 3, 1, 4, 2).reshape(-1, columns * w, 3)
    with layouts.whole(path) as tmp:
        tmp.write_bytes(cv2.imencode(".png", (grid.float().numpy()[..., ::-1] * 255).round().astype(np.uint8))[1])


def draw_curve(losses, path, width=900, height=400):
    """Loss against step, both axes logarithmic: every point is the mean over its column of the picture."""
    canvas = np.full((height, width, 3), 255, np.uint8)
    edges = np.unique(np.geomspace(1, len(losses) + 1, width // 3).astype(int)) - 1
    y = np.log(np.maximum([np.mean(losses[a:b]) for a, b in zip(edges[:-1], edges[1:])], 1e-12))
    x = np.log(edges[1:] + 1)
    px = 60 + (x - x[0]) / max(x[-1] - x[0], 1e-9) * (width - 80)
    py = 20 + (y.max() - y) / max(y.max() - y.min(), 1e-9) * (height - 60)
    cv2.polylines(canvas, [np.stack([px, py], 1).astype(np.int32)], False, (200, 80, 20), 2, cv2.LINE_AA)
    text = dict(fontFace=cv2.FONT_HERSHEY_SIMPLEX, fontScale=0.4, color=(60, 60, 60), lineType=cv2.LINE_AA)
    for value, where in ((y.max(), 24), (y.min(), height - 40)):
        cv2.putText(canvas, f"{math.exp(value):.3g}", (8, where), **text)
    cv2.putText(canvas, f"step 1 .. {len(losses)} (log), loss (log)", (60, height - 12), **text)
    with layouts.whole(path) as tmp:
        tmp.write_bytes(cv2.imencode(".png", canvas)[1])


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(RECIPES), default="base")
    parser.add_argument("--out", type=Path, default=Path("runs/toy"))
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--init", type=Path, help="start from these weights, e.g. weights/toy, instead of from nothing")
    for name in ("steps", "batch", "scenes", "save-every"):
        parser.add_argument(f"--{name}", type=number(int, 1, 10**9))
    parser.add_argument("--lr", type=number(float, 1e-9, 1))
    parser.add_argument("--offset", type=number(float, 0, 1))
    parser.add_argument("--seed", type=number(int, 0, 900))  # the seeds above belong to reproduce.py's held-out scenes
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args(argv)
    try:
        recipe = saved_recipe(args.out / f"{args.stage}-state.safetensors") if args.resume else RECIPES[args.stage]
        recipe = replace(recipe, **{k: v for k in asdict(recipe) if (v := getattr(args, k, None)) is not None})
        device = choose_device(args.device)
        args.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        init = sd.load(args.init, torch.float32, device) if args.init else None
        stages = {"vae": train_vae, "base": train_base, "mfx": train_mfx}
        stages[args.stage](recipe, args.out, args.resume, device, init)
    except (ValueError, OSError, FloatingPointError) as e:
        parser.error(e)


if __name__ == "__main__":
    main()
