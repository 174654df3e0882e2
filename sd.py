"""Any Stable Diffusion checkpoint -> one `StableDiffusion`, and back to Hugging Face's folder.

    sd = load("weights/toy")                       a Hugging Face folder
    sd = load("v1-5-pruned-emaonly.safetensors")   one file in the original latent-diffusion layout
    sd = load("sd-v1-4.ckpt")                      the same as a pickle: nothing in it is executed
    save(sd, "folder")                             diffusers' StableDiffusionPipeline opens it

Both layouts end as tensors under Hugging Face's names, which are the attribute names of our
networks: checkpoints/names.py translates, checkpoints/parts.py makes a network of the tensors.
What an XL, base or refiner, has beside that is in models/xl.py.
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import clip
from checkpoints.configs import schedule_from_json, schedule_to_json
from checkpoints.names import PREFIX, split_stable_diffusion
from checkpoints.parts import (
    build_part,
    load_part,
    read_latent_side,
    read_schedule,
    read_vae,
    require_folders,
    save_part,
)
from checkpoints.read import read_tensors
from checkpoints.words import check_tokenizer, load_tokenizer
from common.files import read_json, read_metadata, write_json
from diffusion import Schedule, T, draw_noise
from models import xl
from models.prompts import encode_weighted, list_texts, warn_of_weights
from models.xl import XL
from unet import UNet
from vae import VAE


@dataclass
class StableDiffusion:
    """The parts of a latent diffusion model, from `load` with frozen weights and in eval mode.

    Pictures may be of any size: above `vae.memory` bytes of activations the VAE works in tiles.
    """

    unet: UNet
    vae: VAE
    text: clip.TextEncoder
    schedule: Schedule
    tokenizer: clip.Tokenizer | None  # None: everything works but encode_prompt
    size: int  # pixels along a side of the square pictures that it was trained on
    tokenizer_help: str = ""  # which files to put where, if there is none
    xl: XL | None = None  # what only an XL has

    def readers(self):
        """[(text encoder, tokenizer)], in the order of what the UNet reads: two in XL's base"""
        pairs = [(self.text, self.tokenizer)]
        if self.xl and not self.xl.refines:
            pairs.insert(0, (self.xl.text, self.xl.tokenizer))
        return pairs

    def require_tokenizers(self):
        """ValueError where one is missing, with which files to put where"""
        if any(tokenizer is None for _, tokenizer in self.readers()):
            raise ValueError("a prompt needs a tokenizer, and there is none: "
                             f"{self.tokenizer_help}")

    def encode_image(self, x):
        """x (B, 3, H, W) in [-1, 1], H and W multiples of `vae.config.factor`
        -> z (B, C, h, w), float32, scaled"""
        return self.vae.encode_scaled(x)

    def decode(self, z):
        """z (B, C, h, w), scaled -> (B, 3, H, W), float32, about [-1, 1] but not clamped."""
        return self.vae.decode_scaled(z)

    def inpainting_channels(self, x, repaint):
        """What an inpainting model sees beside z at every step: `channels` of `denoiser`.

        x (B, 3, H, W) in [-1, 1]; repaint (B or 1, 1, H, W), 1 = repaint
          -> (B, 1 + C, h, w): the mask, 0 or 1, and the scaled latent of x with mid-grey there
        """
        seen = self.encode_image(x * (1 - repaint))  # (B, C, h, w)
        mask = F.interpolate(repaint, size=seen.shape[-2:], mode="area").round()
        return torch.cat([mask.expand(len(seen), -1, -1, -1).to(seen), seen], dim=1)

    def encode_prompt(self, prompts, a1111=False):
        """B strings, or one -> context (B, 77, D) for the UNet. Arguments as for `encode_texts`."""
        return self.encode_texts(list_texts(prompts, "prompts"), a1111)[0]

    def encode_texts(self, texts, a1111=False):
        """B strings -> context (B, 77, D), of all text encoders beside each other, and pooled
        (B, P) of the last, which an XL reads as well. ValueError without a tokenizer.

        a1111  read weights, and prompts of any length, as models/prompts.py says: (B, 77 n, D)
        """
        if not a1111:
            warn_of_weights(texts)
        self.require_tokenizers()
        contexts = []
        for encoder, tokenizer in self.readers():
            if a1111:
                context, pooled = encode_weighted(encoder, tokenizer, texts)
            else:
                device = encoder.text_model.final_layer_norm.weight.device
                context, pooled = encoder.encode(tokenizer(texts).to(device))
            contexts.append(context)
        return torch.cat(contexts, dim=2), pooled

    def denoiser(self, prompts, negative="", guidance=1.0, channels=None, timesteps=(),
                 a1111=False, size=None):
        """What samplers and Algorithm 1 call: (z, t) -> the guided output, (B, C, h, w), t (B,).

        prompts    B strings, one per picture; or one string, for B = 1
        negative   a string for all of them, or B
        guidance   w of classifier-free guidance (Ho & Salimans 2022): 1 = the prompt alone, and
                   half the work
        channels   (B, C', h, w), put beside z at every step: `inpainting_channels`
        timesteps  a sampler's, where t is the same for all pictures: a little quicker
        a1111      as for `encode_prompt`
        size       (height, width) of the picture in pixels, which an XL is told; None: its own
        ValueError for prompts that are no strings, or another number of negative ones
        """
        texts = list_texts(prompts, "prompts")
        guided = guidance != 1
        if guided:
            texts = list_texts(negative or "", "negative", len(texts)) + texts

        # What is the same at every step is made here, once: the text's keys and values, and what
        # the UNet makes of `timesteps`.
        if self.xl:
            context, added = xl.make_conditions(self, texts, guided, size, a1111)
        else:
            context = self.encode_prompt(texts, a1111)  # (B or 2 B, 77, D)
            added = None
        keys_values = self.unet.keys_values(context)
        times = self.unet.times_of(timesteps, added)

        def denoise(z, t):
            if channels is not None:
                z = torch.cat([z, channels.to(z).expand(len(z), -1, -1, -1)], dim=1)
            if not guided:
                return self.unet(z.to(context.dtype), times(t), keys_values, added)
            z, t = torch.cat([z, z]), torch.cat([t, t])  # with and without the prompt, in one batch
            output = self.unet(z.to(context.dtype), times(t), keys_values, added)
            unconditional, conditional = output.float().chunk(2)
            return unconditional + guidance * (conditional - unconditional)

        return denoise


# --------------------------------------------------------------------------------------------------
# Load


def load(path, dtype=None, device="cpu", prediction=None, vae=None):
    """Read a Stable Diffusion 1, 2 or XL, base or refiner, of any width, in any layout.

    path        a Hugging Face folder, or a .safetensors, .ckpt or .pt in the original layout
    dtype       None: as stored, and the weights stay in the file, mapped, if that is a precision in
                which the device computes well (common/devices.py: choose_stored). Otherwise cast
    prediction  what the UNet predicts, 'epsilon' or 'v_prediction'. None: a folder says it, and a
                file may (`find_prediction`)
    vae         for a file without an autoencoder: where one is, a folder or a file
      ->        StableDiffusion

    FileNotFoundError or ValueError, of one line, for a path that is not there, damaged, refused,
    not a Stable Diffusion, or of an architecture that is not implemented.
    """
    path = Path(path)
    if path.is_dir():
        sd = load_folder(path, dtype, device, prediction)
    elif path.exists():
        sd = load_file(path, dtype, device, prediction, vae)
    else:
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    check_fit(path, sd)
    return sd


def load_folder(path, dtype, device, prediction):
    """Hugging Face's layout: a folder for each part, and config.json files."""
    index = read_json(path / "model_index.json", default={})
    encoders = xl.list_encoders(path, index)
    require_folders(path, "a Stable Diffusion", ("unet", "vae", *encoders))
    unet = load_part(path / "unet", "unet", dtype, device)
    vae = load_part(path / "vae", "vae", dtype, device)
    # The UNet's precision: it reads what the text encoder writes.
    stored = unet.conv_in.weight.dtype
    texts = [load_part(path / part, "text_encoder", stored, device) for part in encoders]

    # Without a scheduler's file it is Stable Diffusion's own.
    own = schedule_to_json(Schedule())
    schedule = read_schedule(path, own, lambda c: schedule_from_json(c, prediction))

    folders = [path / part.replace("text_encoder", "tokenizer") for part in encoders]
    tokenizers = [find_tokenizer([folder]) for folder in folders]
    tokenizer_help = ("put vocab.json and merges.txt, of the checkpoint's own tokenizer, into "
                      + " and ".join(f"{folder}/" for folder in folders))

    is_xl = "text_encoder_2" in encoders
    if not is_xl:
        schedule.offset = 1  # whatever the file says, as in diffusers' pipelines
    side = read_latent_side(path / "unet", xl.SIDE if is_xl else 64)
    beside = None
    if is_xl:
        zeros = index.get("force_zeros_for_empty_prompt", len(texts) == 2)
        upcast = read_json(path / "vae/config.json", default={}).get("force_upcast", True)
        beside = xl.make_xl(texts, tokenizers, vae, zeros, upcast)
    return StableDiffusion(unet, vae, texts[-1], schedule, tokenizers[-1],
                           side * vae.config.factor, tokenizer_help, beside)


def load_file(path, dtype, device, prediction, vae):
    """The original layout: the tensors of all parts in one file, and nothing about them."""
    tensors = read_tensors(path)
    if vae and not any(name.startswith(PREFIX["vae"]) for name in tensors):
        tensors |= {PREFIX["vae"] + name: x for name, x in read_vae(vae).items()}
    parts, openclip = split_stable_diffusion(path, tensors)
    is_xl = "text_encoder_2" in parts
    unet = build_part("unet", parts["unet"], path, None, dtype, device)
    known = xl.VAE if is_xl else {}
    vae = build_part("vae", parts["vae"], path, None, dtype, device, **known)
    stored = unet.conv_in.weight.dtype

    # The tokenizer lies beside the file. How prompts are padded, and the encoder's activation, no
    # tensor says: OpenAI and OpenCLIP have always had their own.
    folders = [path.parent / "tokenizer", path.parent]
    tokenizer_help = ("put vocab.json and merges.txt (from the tokenizer/ of any Stable Diffusion "
                      f"1 or 2 on Hugging Face), or {clip.ARCHIVE} (of openai/CLIP), into "
                      f"{path.parent.resolve()}/")
    texts, tokenizers = [], []
    for part in ("text_encoder", "text_encoder_2"):
        if part in parts:
            is_openclip = openclip or part == "text_encoder_2"
            activation, pad = ("gelu", "!") if is_openclip else ("quick_gelu", clip.END)
            texts.append(build_part("text_encoder", parts[part], path, None, stored, device,
                                    activation=activation))
            tokenizers.append(find_tokenizer(folders, pad))

    if any(name.startswith("edm_") for name in tensors):
        raise ValueError(f"{path} was trained on EDM's noise levels, as CosXL and Playground 2.5 "
                         "are: that is not implemented")

    # SD 2 with velocity prediction was trained at 768 pixels, XL at 1024, all others at 512.
    prediction = prediction or find_prediction(path, tensors, unet, openclip)
    side = 64
    if is_xl:
        side = xl.SIDE
    elif openclip and prediction == "v_prediction":
        side = 96
    schedule = Schedule("zero_snr" if "ztsnr" in tensors else "scaled_linear", prediction)
    beside = xl.make_xl(texts, tokenizers, vae, zeros=len(texts) == 2) if is_xl else None
    return StableDiffusion(unet, vae, texts[-1], schedule, tokenizers[-1],
                           side * vae.config.factor, tokenizer_help, beside)


PARAMETERIZATION = re.compile(rb"""^\s*parameterization\s*:\s*["']?(v|eps)\b""", re.MULTILINE)


def find_prediction(path, tensors, unet, openclip):
    """What a single file's UNet predicts: 'epsilon' or 'v_prediction'.

    The first that says it: the YAML of the same name beside it, which training programs leave; the
    file, by an entry v_pred or the metadata modelspec.prediction_type; an SD 2's UNet itself. Any
    other predicts the noise.
    """
    with contextlib.suppress(OSError), open(path.with_suffix(".yaml"), "rb") as file:
        if found := PARAMETERIZATION.search(file.read(2**20)):
            return "v_prediction" if found[1] == b"v" else "epsilon"
    said = read_metadata(path).get("modelspec.prediction_type")
    if "v_pred" in tensors or said in ("v", "v_prediction"):
        return "v_prediction"
    plain = unet.config.in_channels == unet.config.out_channels and not unet.config.added
    return ask_prediction(unet) if openclip and plain and said is None else "epsilon"


@torch.no_grad()
def ask_prediction(unet):
    """What a trained UNet predicts, by what it makes of noise at the last t. There
    z = 0.07 x0 + 0.998 epsilon, so epsilon is about z, and v = 0.07 epsilon - 0.998 x0 is not."""
    w = unet.conv_in.weight
    z = draw_noise((unet.config.in_channels, 16, 16), [0])
    context = torch.zeros(1, 77, unet.config.context)
    output = unet(z.to(w), torch.tensor([T - 1], device=w.device), context.to(w)).cpu().float()
    return "v_prediction" if (output * z).sum() < 0.5 * (z * z).sum() else "epsilon"


def check_fit(path, sd):
    """ValueError where the parts, each sound by itself, do not belong together."""
    u, v = sd.unet.config, sd.vae.config
    width = sum(text.config.width for text, _ in sd.readers())
    if (u.context, u.out_channels) != (width, v.latent_channels):
        raise ValueError(f"{path}: its parts do not fit: the UNet reads text of width {u.context} "
                         f"and gives {u.out_channels} channels, the text encoder gives {width}, "
                         f"the VAE {v.latent_channels}")
    C = v.latent_channels
    if u.in_channels not in (C, 2 * C, 2 * C + 1):
        raise ValueError(f"{path}: a UNet of {u.in_channels} input channels is neither a plain "
                         f"model ({C}), nor InstructPix2Pix ({2 * C}) or inpainting ({2 * C + 1})")
    if sd.xl:
        xl.check_fit(path, sd)
        if sd.xl.text:
            sd.xl.tokenizer = check_tokenizer(path, sd.xl.tokenizer, sd.xl.text)
    elif u.added:
        raise ValueError(f"{path}: its UNet is an XL's, and its text encoder is not")
    sd.tokenizer = check_tokenizer(path, sd.tokenizer, sd.text)


def find_tokenizer(folders, pad=None):
    """The first folder's tokenizer, or None. ValueError for a damaged one."""
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            return load_tokenizer(folder, pad)
    return None


# --------------------------------------------------------------------------------------------------
# Save


def save(sd, folder, dtype=None):
    """Write the folder that `load` opens, and diffusers' pipeline for this model.

    dtype  the stored precision, e.g. torch.float16 for half the size; None as it is

    Weights and configurations are written whole or not at all, and model_index.json, without which
    diffusers sees no pipeline, comes last.
    """
    folder = Path(folder)
    save_part(sd.unet, folder / "unet", dtype, sample_size=sd.size // sd.vae.config.factor)
    save_part(sd.vae, folder / "vae", dtype, sample_size=sd.size)
    # The encoder that every model of its kind has comes last.
    suffixes = ("_2", "") if sd.xl else ("",)
    for (text, tokenizer), suffix in zip(reversed(sd.readers()), suffixes):
        save_part(text, folder / f"text_encoder{suffix}", dtype)
        if tokenizer:
            tokenizer.save(folder / f"tokenizer{suffix}")
    C = sd.unet.config.out_channels
    task = {C: "", 2 * C: "InstructPix2Pix", 2 * C + 1: "Inpaint"}[sd.unet.config.in_channels]
    index = {
        "_class_name": f"StableDiffusion{task}Pipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    if task == "Inpaint":
        index["_diffusers_version"] = "0.6.0"  # that pipeline asks whether it is newer than 0.5.1
    if sd.xl:
        index |= xl.make_index(sd, task)
    if sd.schedule.spacing == "lcm":
        index["scheduler"] = ["diffusers", "LCMScheduler"]
    scheduler = schedule_to_json(sd.schedule) | {"_class_name": index["scheduler"][1]}
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", index)
