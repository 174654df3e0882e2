"""Stable Diffusion XL: what it has beside its predecessors. Podell et al. 2023, arXiv 2307.01952.

    two text encoders   CLIP's and OpenCLIP's: their states stand beside each other, token by token, and the second's
                        pooled state is told to the UNet with the time (section 2.1)
    sizes               so are the size of the picture, where it is cropped, and the size to draw (section 2.2)
    a refiner           a second UNet for the last of the noise (section 2.5). It has OpenCLIP's encoder alone, and is
                        told how beautiful the picture is in place of the size to draw

The networks are those of unet.py, vae.py and clip.py. `sd.load` reads base and refiner, and sd.StableDiffusion asks
here what its UNet is to be told. An edit with both is one denoiser, for any sampler and under any map:

    denoise = hand_over(base.denoiser(prompt), refiner.denoiser(prompt), switch=0.8)
"""

import warnings
from dataclasses import dataclass, replace

import torch

import clip
from checkpoints.configs import schedule_to_json
from checkpoints.parts import load_part, read_schedule
from diffusion import T
from unet import timestep_embedding

SIDE = 128  # latent pixels along a side of its training pictures
VAE = {"scaling_factor": 0.13025, "size": 1024}  # what a file without a config.json does not say of its autoencoder
SCORE, NEGATIVE_SCORE = 6.0, 2.5  # aesthetic scores that a refiner is told, with the prompt and without
SWITCH = 0.8  # the share of the steps that the base runs where a refiner runs the rest: the release's


@dataclass
class XL:
    """What an XL has that Stable Diffusion 1 and 2 lack: the field `xl` of sd.StableDiffusion.

    Its `text` and `tokenizer` are OpenCLIP's, which base and refiner have.
    """

    text: clip.TextEncoder | None  # CLIP's; a refiner has none
    tokenizer: clip.Tokenizer | None
    zeros: bool  # without a negative prompt the UNet reads zeros, in place of an empty text

    @property
    def refines(self):
        return self.text is None


# ----------------------------------------------------------------------------------------------------------------------
# What the UNet is told


def make_conditions(model, texts, guided, size=None, a1111=False):
    """What the UNet reads at every step -> context (B, 77, D), added (B, model.unet.config.added)

    texts  B strings; with `guided` the negative ones first, and as many prompts after them
    size   (height, width) of the picture in pixels; None: what the model was trained on

    The picture counts as whole, at its original size: cropped at (0, 0), and drawn as large as it is.
    """
    context, pooled = model.encode_texts(texts, a1111)
    unwanted = len(texts) // 2 if guided else 0
    if model.xl.zeros:
        for i, text in enumerate(texts[:unwanted]):
            if not text:
                context[i] = 0
                pooled[i] = 0

    height, width = size or (model.size, model.size)
    numbers = []
    for i in range(len(texts)):
        score = NEGATIVE_SCORE if i < unwanted else SCORE
        numbers.append([height, width, 0, 0, *([score] if model.xl.refines else [height, width])])
    return context, torch.cat([pooled, embed_numbers(numbers, model.unet.config.size_width).to(pooled)], dim=1)


def embed_numbers(numbers, width):
    """B lists of n numbers -> (B, n width), each number embedded as a timestep is"""
    numbers = torch.tensor(numbers, dtype=torch.float32)
    return timestep_embedding(numbers.flatten(), width).reshape(len(numbers), -1)


# ----------------------------------------------------------------------------------------------------------------------
# Base and refiner


def hand_over(base, refiner, switch=SWITCH, timesteps=()):
    """Two denoisers (z, t) -> output as one: the base for the noisiest share `switch` of the timesteps, the refiner
    for the rest. Section 11.1 of Differential Diffusion; the map goes on as if there were one.

    timesteps  the sampler's: a warning if the refiner runs at none of them
    ValueError for a share outside 0 .. 1.
    """
    if not 0 <= switch <= 1:
        raise ValueError(f"the base runs a share of the steps in 0 .. 1, not {switch}")
    last = round((1 - switch) * T)  # the base's last timestep
    if switch < 1 and timesteps and min(timesteps) >= last:
        warnings.warn(f"of {len(timesteps)} steps none is the refiner's, after {switch:g} of the way: take more steps, "
                      "or a smaller --switch", stacklevel=2)
    return lambda z, t: (base if int(t[0]) >= last else refiner)(z, t)


def load_unet(base, path, dtype, device):
    """A folder that has a unet/, and no words of its own -> a refiner, whose other parts are those of `base`"""
    schedule = read_schedule(path, schedule_to_json(base.schedule))
    return replace(base, unet=load_part(path / "unet", "unet", dtype, device), schedule=schedule)


def check_refiner(base, refiner, name):
    """ValueError, one line, unless these two models of sd.load work together; name is the refiner's.

    A base of Stable Diffusion XL takes a refiner of it. Any other takes any plain model of its own latents.
    """
    if base.xl and not (refiner.xl and refiner.xl.refines):
        raise ValueError(f"{name} is no refiner of Stable Diffusion XL: take a model that was trained to be one")
    if refiner.xl and not base.xl:
        raise ValueError(f"{name} is a Stable Diffusion XL, which refines its own base alone: these weights are none")
    if refiner.unet.config.in_channels != refiner.unet.config.out_channels:
        raise ValueError(f"{name} is an inpainting model: a refiner is a plain one")
    ours, theirs = base.vae.config, refiner.vae.config
    if (ours.latent_channels, ours.factor) != (theirs.latent_channels, theirs.factor):
        raise ValueError(f"{name} has other latents than the base")
    schedules = [(model.schedule.name, model.schedule.prediction) for model in (base, refiner)]
    if schedules[0] != schedules[1]:
        said = " and ".join(schedules[1])
        raise ValueError(f"{name} was trained with {said}, the base with {' and '.join(schedules[0])}")


# ----------------------------------------------------------------------------------------------------------------------
# Files


def list_encoders(folder, index):
    """The folders of text encoders that belong in a Hugging Face folder with this model_index.json, in the order of
    what the UNet reads: CLIP's alone, unless it is an XL; OpenCLIP's after it, or alone in a refiner."""
    if not ("text_encoder_2" in index or (folder / "text_encoder_2").is_dir()):
        return ["text_encoder"]
    first = index["text_encoder"] != [None, None] if "text_encoder" in index else (folder / "text_encoder").is_dir()
    return ["text_encoder", "text_encoder_2"] if first else ["text_encoder_2"]


def make_xl(texts, tokenizers, vae, zeros, upcast=True):
    """-> XL, of two text encoders or one and their tokenizers, which it changes as no file says it

    zeros   as in `XL`
    upcast  what is said of the autoencoder: it overflows in fp16. Then it computes in fp32; made not to, it may try
    """
    for encoder in texts:  # the UNet reads the states before the last layer, without a norm
        encoder.config = replace(encoder.config, skip_last=1, final_norm=False)
    if upcast and vae.quant_conv.weight.dtype == torch.float16:
        vae.float()
    first, tokenizer = (texts[0], tokenizers[0]) if len(texts) == 2 else (None, None)
    return XL(first, tokenizer, bool(zeros))


def check_fit(path, model):
    """ValueError where an XL's parts do not belong together."""
    u = model.unet.config
    pooled = model.text.config.projection or model.text.config.width
    count = 5 if model.xl.refines else 6
    if u.added != pooled + count * u.size_width:
        what = f"{count} sizes of {u.size_width} and pooled text of {pooled}"
        raise ValueError(f"{path}: its parts do not fit: the UNet is told a vector of {u.added}, not {what}")
    if any(encoder.config.layers < 2 for encoder, _ in model.readers()):
        raise ValueError(f"{path}: its text encoder has one layer, and an XL reads the one before the last")


def make_index(model, task):
    """The entries of model_index.json that are an XL's, in place of what `sd.save` writes of others."""
    index = {
        "_class_name": f"StableDiffusionXL{task}Pipeline",
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "image_encoder": [None, None],
        "force_zeros_for_empty_prompt": model.xl.zeros,
    }
    if model.xl.refines:
        index["_class_name"] = "StableDiffusionXLImg2ImgPipeline"
        index["text_encoder"] = index["tokenizer"] = [None, None]
        index["requires_aesthetics_score"] = True
    return index
