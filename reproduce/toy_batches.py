"""What the toys' trainings share: a recipe, the scenes that they see, what a step is about, and the loss."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import samplers
import sd
import train
import vae
from common.run_state import cache_batches, digest, generator_at
from diffusion import T, draw_timesteps
from kernels.blocks import to_channels_last
from toy import world


@dataclass
class ToyRecipe(train.Recipe):
    """Of the toys."""

    widths: tuple = vae.CONFIGS["toy"].channels  # of the autoencoder's levels: each but the last halves the side
    latent: int = vae.CONFIGS["toy"].latent_channels
    scenes: int = 24_000  # that a base or inpainting model sees; captions are worded anew every time
    # How much smooth noise stands beside the white noise. Stable Diffusion's noisiest level still shows how bright a
    # picture is, and each side of it, which a model learns to trust over the words: noon would never turn into night.
    offset: float = 0.2
    below: int = T  # the timesteps that it learns: a refiner, the lowest alone


DROPPED = 0.1  # share of captions left out, so that there is an unconditional model to guide away from
OFFSETS = 1, 2, 4  # values along a side of the smooth noise, per channel
# Share of pictures of two hours: what a model sees under a change map, where the original shines through. They have no
# caption. So the unconditional model takes what it sees for what is there, and the captioned one believes its words.
MIXED = 0.25
GAMMA = 5.0  # of Min-SNR: low noise levels, where the weight would grow without bound, count no more than this


def render_mixed(scenes, generator):
    """-> (n, 3, S, S) in [0, 1], (n,) bool: MIXED of the pictures become another hour on another ground from one side
    on, and which these are."""
    n, frames = len(scenes), world.render(scenes)
    time, ground = (torch.randint(len(names), (n,), generator=generator) for names in (world.TIMES, world.GROUNDS))
    other = world.render(replace(scenes, time=time, ground=ground))

    # The other's share: a soft step across the picture, at any place and angle
    draw = torch.rand(4, n, 1, 1, generator=generator)
    angle, place, width = 2 * math.pi * draw[0], 1.2 * draw[1] - 0.6, 0.1 + draw[2]
    mixed = draw[3] < MIXED
    p = (torch.arange(frames.image.shape[-1]) + 0.5) / frames.image.shape[-1] * 2 - 1
    step = ((p * angle.cos() + p[:, None] * angle.sin() - place) / width + 0.5).clamp(0, 1)
    return frames.image.lerp(other.image, (step * mixed)[:, None]), mixed.flatten()


def cache_scenes(scenes, path, encode, made_from, device):
    """-> a dict of latents (N, C, h, w), what `encode` makes of the scenes' pictures (B, 3, S, S) in [-1, 1], and mixed
    (N,) bool, as `cache_batches` does"""

    def encode_mixed(i):
        image, mixed = render_mixed(scenes[i : i + 64], generator_at(len(scenes), i))  # not what they come from
        return {"latents": encode(to_channels_last((image * 2 - 1).to(device))), "mixed": mixed}

    return cache_batches(path, made_from, range(0, len(scenes), 64), encode_mixed)


def cache_latents(scenes, path, autoencoder, device):
    """`cache_scenes` as this autoencoder's latents, unscaled"""
    made_from = digest(autoencoder, scenes.x.tolist(), "mixed", MIXED)
    return cache_scenes(scenes, path, lambda image: autoencoder.encode(image)[0].half(), made_from, device)


def draws(recipe, scenes, shape, step, mixed=None):
    """What a step is about: which scenes (B,), B captions, timesteps t (B,), noise (B, *shape), and the generator for
    more. Scenes that are `mixed`, a list of bools, have no caption."""
    g = generator_at(recipe.seed + 1, step)
    index = torch.randint(recipe.scenes, (recipe.batch,), generator=g)
    told = world.captions(scenes[index], g)
    dropped = torch.rand(recipe.batch, generator=g) < DROPPED
    told = ["" if d or mixed and mixed[i] else c for i, c, d in zip(index.tolist(), told, dropped)]
    t = draw_timesteps(recipe.batch, g) * recipe.below // T
    noise = torch.randn(recipe.batch, *shape, generator=g)
    for side in OFFSETS if recipe.offset else ():
        rough = torch.randn(recipe.batch, shape[0], side, side, generator=g)
        noise = noise + recipe.offset * F.interpolate(rough, shape[1:], mode="bilinear")
    return index, told, t, noise, g


def base_loss(model, schedule, z, context, t, noise, beside=None):
    """The simple loss of DDPM, eq. 14, on the noise or on v.

    On the noise it is weighted by Min-SNR (Hang et al. 2023): w = min(SNR, gamma) / SNR
    z, noise (B, C, h, w), context (B, L, D), t (B,), beside (B, 1 + C, h, w) for an inpainting model: of `known`
    """
    z_t = schedule.add_noise(z, noise, t)
    output = model(z_t if beside is None else torch.cat([z_t, beside], 1), t, context)
    alpha, sigma = schedule.alpha_sigma(t, z)
    if schedule.prediction == "v_prediction":
        return (output - (alpha * noise - sigma * z)).square().mean()
    return ((output - noise).square() * (GAMMA * sigma**2 / alpha**2).clamp(max=1)).mean()


def paint(model, denoise, noise):
    """What a sd.StableDiffusion's denoiser makes of noise in 25 steps of DDIM -> (N, 3, S, S) in [0, 1]"""
    with torch.no_grad():
        z = samplers.run_sampler(denoise, noise, samplers.make_sampler("ddim", model.schedule, 25))
        return model.decode(z).cpu() / 2 + 0.5


def given(path, device):
    """The Stable Diffusion to start from. ValueError if its UNet reads more than a latent, or it reads no captions."""
    model = sd.load(path, torch.float32, device)
    if model.unet.config.in_channels != model.unet.config.out_channels:
        raise ValueError(f"{path} is an inpainting model already: start from a plain one, e.g. --init weights/toy")
    if model.tokenizer is None:
        raise ValueError(f"captions need a tokenizer, and there is none: {model.tokenizer_help}")
    return model
