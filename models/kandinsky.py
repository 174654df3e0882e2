"""Kandinsky 2.2, for every edit of Differential Diffusion: Razzhigaev et al. 2023, arXiv 2310.03502.

    model = load("kandinsky-2-2-prior", "kandinsky-2-2-decoder")
    denoise = model.denoiser("a cat in a hat", negative="blurred", guidance=4.0)

A prior (models/prior.py) makes a CLIP image embedding of the prompt, and a latent diffusion model (models/adm.py, with
the autoencoder of models/movq.py) draws what the embedding says. `Kandinsky` has what samplers and sample.py use of a
sd.StableDiffusion, so the algorithms are the same.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import clip
import samplers
from checkpoints.configs import read_number, refuse_other_options, schedule_from_json, show
from checkpoints.parts import load_part, read_latent_side, read_schedule, require_folders
from checkpoints.words import check_tokenizer, load_tokenizer
from diffusion import Schedule, T, draw_noise
from models import adm, movq, prior
from models.image_encoder import ImageEncoder
from models.prompts import list_texts, warn_of_weights

GUIDANCE = 4.0  # of the prior, and where nobody says another of the drawing: the release's
STEPS = 25  # of the prior


@dataclass
class Kandinsky:
    """The parts of both folders, from `load` with frozen weights and in eval mode."""

    unet: adm.ADM
    vae: movq.MOVQ
    schedule: Schedule
    learned: bool  # how random a step is, the UNet says
    prior: prior.Prior
    prior_schedule: Schedule
    text: clip.TextEncoder
    tokenizer: clip.Tokenizer
    image: ImageEncoder | None  # only asked what stands for no prompt
    size: int  # pixels along a side of the square pictures that it was trained on
    xl = None  # it is none

    def encode_image(self, x):
        """x (B, 3, H, W) in [-1, 1], H and W multiples of 8 -> z (B, C, h, w), float32"""
        return self.vae.encode_scaled(x)

    def decode(self, z):
        """z (B, C, h, w) -> (B, 3, H, W), float32, about [-1, 1] but not clamped."""
        return self.vae.decode_scaled(z)

    def encode_prompt(self, prompts):
        """B strings -> states (B, 77, D), pooled (B, D), seen (B, 77): True up to the text's end"""
        warn_of_weights(prompts)
        ids = self.tokenizer(prompts).to(self.prior.prd_embedding.device)
        end = (ids == self.text.config.eos).int().argmax(dim=1, keepdim=True)
        seen = torch.arange(ids.shape[1], device=ids.device) <= end
        return *self.text.encode(ids), seen

    @torch.no_grad()
    def imagine(self, prompts, negative, guidance=GUIDANCE, steps=STEPS, seeds=(0,)):
        """The prior: B strings, B negative ones, and a seed for each -> image embeddings (B, D), float32"""
        guided = guidance != 1
        told = self.encode_prompt(negative + prompts if guided else prompts)

        def denoise(z, t):
            z = z.to(told[0].dtype)
            if not guided:
                return self.prior(z, t, *told)
            unconditional, conditional = self.prior(torch.cat([z, z]), torch.cat([t, t]), *told).float().chunk(2)
            return unconditional + guidance * (conditional - unconditional)

        sampler = samplers.make_sampler("ddpm", self.prior_schedule, steps)
        shape = (self.prior.config.embedding,)
        z = draw_noise(shape, seeds).to(told[0].device)
        z = samplers.run_sampler(denoise, z, sampler, step_noise=samplers.make_step_noise(shape, seeds))
        return z * self.prior.clip_std.float() + self.prior.clip_mean.float()

    @torch.no_grad()
    def embed(self, prompts, negative="", guided=True, seeds=(0,)):
        """What the UNet reads: image embeddings (B, D) of B prompts; with `guided` (2B, D), first what is not wanted.

        That is what the prior makes of the negative prompts, or without one CLIP's embedding of a grey picture.
        ValueError if that is asked for, and its network is not there.
        """
        prompts = list_texts(prompts, "prompts")
        negative = list_texts(negative or "", "negative", len(prompts))
        if guided and not all(negative):
            if any(negative):
                raise ValueError("say a negative prompt for each picture, or for none")
            if self.image is None:
                raise ValueError("Kandinsky without a negative prompt needs the folder image_encoder/ of its prior: "
                                 "put it there, or say a negative prompt")
        seeds = list(seeds) * (len(prompts) // len(seeds))
        wanted = self.imagine(prompts, negative, seeds=seeds)
        if not guided:
            return wanted
        if negative[0]:
            unwanted = self.imagine(negative, negative, guidance=1, seeds=seeds)
        else:
            side = self.image.config.side
            grey = torch.zeros(1, 3, side, side).to(self.image.visual_projection.weight)
            unwanted = self.image(grey).float().expand_as(wanted)
        return torch.cat([unwanted, wanted])

    def denoiser(self, prompts, negative="", guidance=GUIDANCE, channels=None, timesteps=(), a1111=False, size=None,
                 seeds=(0,)):
        """What samplers and Algorithm 1 call: (z, t) -> the guided noise and its variance, (B, 2C, h, w), t (B,).

        Arguments as for sd.StableDiffusion.denoiser, and seeds, one for the prior or one for each picture; ValueError
        for `channels` and `a1111`, which this model has no use for. It is told no size.
        """
        if channels is not None or a1111:
            raise ValueError("Kandinsky takes no mask beside the latent, and no weights in prompts")
        states = self.embed(prompts, negative, guidance != 1, seeds)
        denoise = adm.make_denoiser(self.unet, states, guidance, timesteps)
        return denoise if self.learned else lambda z, t: denoise(z, t)[:, : z.shape[1]]


# ----------------------------------------------------------------------------------------------------------------------
# Files


def load(prior_path, path, dtype=None, device="cpu"):
    """The two folders of Kandinsky 2.2, as Hugging Face has them -> Kandinsky

    prior_path  kandinsky-2-2-prior: prior/, text_encoder/, tokenizer/, scheduler/ and, if there is one, image_encoder/
    path        kandinsky-2-2-decoder: unet/, movq/, scheduler/
    dtype       as for sd.load

    FileNotFoundError or ValueError, of one line, for anything else.
    """
    prior_path, path = Path(prior_path), Path(path)
    require_folders(prior_path, "the prior of a Kandinsky 2.2", ("prior", "text_encoder", "tokenizer"))
    require_folders(path, "the decoder of a Kandinsky 2.2", ("unet", "movq"))
    network = load_part(prior_path / "prior", "prior", dtype, device)
    stored = network.prd_embedding.dtype
    text = load_part(prior_path / "text_encoder", "text_encoder", stored, device)
    image = None
    if (prior_path / "image_encoder").is_dir():
        image = load_part(prior_path / "image_encoder", "image_encoder", stored, device)
    unet = load_part(path / "unet", "adm", dtype, device)
    autoencoder = load_part(path / "movq", "movq", dtype, device)
    tokenizer = load_tokenizer(prior_path / "tokenizer")
    schedule, learned = read_schedule(path, read=read_decoder_schedule)
    prior_schedule = read_schedule(prior_path, read=read_prior_schedule)
    size = read_latent_side(path / "unet", 64) * autoencoder.config.factor
    model = Kandinsky(unet, autoencoder, schedule, learned, network, prior_schedule, text, tokenizer, image, size)
    check_fit(prior_path, path, model)
    return model


def read_prior_schedule(c):
    """A scheduler_config.json of diffusers' UnCLIPScheduler -> Schedule"""
    name = "squaredcos_cap_v2"
    refuse_other_options(c, {
        "_class_name": "UnCLIPScheduler", "prediction_type": "sample", "variance_type": "fixed_small_log",
        "beta_schedule": name, "num_train_timesteps": T,
    })
    return Schedule(name, "sample", "linspace", clip=read_clip(c))


def read_decoder_schedule(c):
    """A scheduler_config.json of diffusers' DDPMScheduler -> Schedule, and whether the step is as random as the UNet
    says, which else is left out"""
    kind = c.get("variance_type", "fixed_small")
    if kind not in ("fixed_small", "learned_range"):
        raise ValueError(f"a variance_type of {kind!r:.60} is not implemented")
    schedule = schedule_from_json({"steps_offset": 0} | c)
    if not c.get("thresholding"):
        schedule.clip = read_clip(c)
    return schedule, kind == "learned_range"


def read_clip(c):
    """`Schedule.clip` by a scheduler_config.json; None: it clips nothing"""
    most = read_number(c.get("clip_sample_range", 1.0))
    if not (isinstance(most, float) and 0 < most < 1e4):
        raise ValueError(f"its clip_sample_range should be a number about 1, not {show(most)}")
    return most if c.get("clip_sample", True) else None


def check_fit(prior_path, path, model):
    """ValueError where the parts, each sound by itself, do not belong together."""
    u, t, D, C = model.unet.config, model.text.config, model.prior.config.embedding, model.vae.config.latent_channels
    if u.text or u.noised or (u.in_channels, u.out_channels) != (C, 2 * C):
        raise ValueError(f"{path} is not the plain decoder of a Kandinsky 2.2, which reads {C} channels of latents and "
                         f"gives {2 * C}: its UNet reads {u.in_channels} and gives {u.out_channels}")
    if u.states != D:
        raise ValueError(f"{path} draws image embeddings of width {u.states}, and {prior_path} makes some of {D}")
    widths = [t.width, t.projection] + ([model.image.config.projection] if model.image else [])
    if set(widths) != {D} or t.length < 77 or model.prior.config.length != 77:
        raise ValueError(f"{prior_path}: its parts do not fit: the prior reads 77 tokens of width {D}, and the others "
                         f"give {t.length} of {', '.join(map(str, widths))}")
    model.tokenizer = check_tokenizer(prior_path, model.tokenizer, model.text)
