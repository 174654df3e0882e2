"""Any Stable Diffusion checkpoint -> one `StableDiffusion`, and back to the standard Hugging Face folder.

    sd = load("weights/toy")                       a Hugging Face folder: unet/ vae/ text_encoder/ tokenizer/ scheduler/
    sd = load("v1-5-pruned-emaonly.safetensors")   one file in the original latent-diffusion layout
    sd = load("sd-v1-4.ckpt")                      the same as a pickle, of which nothing is executed
    save(sd, "folder")                             diffusers' StableDiffusionPipeline opens it

Our modules' attribute names are the Hugging Face key names, so loading is `load_state_dict`; NAMES, the one table that
translates the original layout into them, is in checkpoints/names.py. A model is built on the meta device, where it has
shapes and no memory, and is given tensors that are views of the file, mapped into memory: a page is read when it is
first computed with, and the system can drop it again. So loading takes no memory to speak of, unless `dtype` asks for
a cast.
"""

import contextlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import clip
import unet
import vae
from checkpoints import configs
from checkpoints.names import IGNORED, split_parts, translate
from checkpoints.read import describe_misfits, read_folder, read_tensors, uncollected
from common.files import atomic_write, read_json, write_json
from diffusion import BETAS, Schedule, T


@dataclass
class StableDiffusion:
    """The parts of a latent diffusion model. All weights are frozen (`requires_grad` False) and in eval mode.

    Pictures may be of any size: above `vae.memory` bytes of activations the autoencoder works in tiles.
    """

    unet: unet.UNet
    vae: vae.VAE
    text: clip.TextEncoder
    schedule: Schedule
    tokenizer: clip.Tokenizer | None  # None: everything works but encode_prompt
    size: int  # pixels along a side of the square pictures that it was trained on
    tokenizer_help: str = ""  # which files to put where, if there is none

    def encode_image(self, x, noise=None):
        """x (B, 3, H, W) in [-1, 1], H and W multiples of `vae.config.factor` -> z (B, C, h, w), float32, scaled.

        noise  as for `VAE.encode_scaled`: None for the posterior's mean
        """
        return self.vae.encode_scaled(x, noise)

    def inpainting_channels(self, x, repaint):
        """What an inpainting model sees beside z at every step: `channels` of `denoiser`.

        x (B, 3, H, W) in [-1, 1], repaint (B or 1, 1, H, W), 1 = repaint  ->  (B, 1 + C, h, w): the mask, 0 or 1, and
        the scaled latent of the picture whose masked part is 0, mid-grey
        """
        seen = self.encode_image(x * (1 - repaint))
        mask = F.interpolate(repaint, size=seen.shape[-2:], mode="area").round()
        return torch.cat([mask.expand(len(seen), -1, -1, -1).to(seen), seen], dim=1)

    def decode(self, z):
        """z (B, C, h, w), scaled -> (B, 3, H, W), float32, about [-1, 1] but not clamped."""
        return self.vae.decode_scaled(z)

    def encode_prompt(self, prompts):
        """A list of B strings -> context (B, 77, D) for the UNet. ValueError if the model came without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError(f"a prompt needs a tokenizer, and there is none: {self.tokenizer_help}")
        return self.text(self.tokenizer(prompts).to(self.text.text_model.final_layer_norm.weight.device))

    def denoiser(self, prompts, negative="", guidance=1.0, channels=None, timesteps=()):
        """The function that samplers and Algorithm 1 call: (z, t) -> the guided output, both (B, C, h, w), t (B,).

        prompts    B strings, one per picture; or one string, for B = 1
        guidance   w of classifier-free guidance (Ho & Salimans 2022): 1 = the prompt alone, and half the work
        channels   (B, C', h, w), put beside z at every step: mask and masked picture of an inpainting model
        timesteps  a sampler's, where t is the same for all pictures: a little quicker

        Keys and values of the text are made here, once, since they are the same at every step; and what the UNet makes
        of `timesteps`, all at once.
        """
        guided, prompts = guidance != 1, [prompts] if isinstance(prompts, str) else list(prompts)
        context = self.encode_prompt(([negative] * len(prompts) if guided else []) + prompts)
        keys_values, times = self.unet.keys_values(context), self.unet.times_of(timesteps)

        def denoise(z, t):
            z = torch.cat([z, channels.to(z)], 1) if channels is not None else z
            if not guided:
                return self.unet(z.to(context.dtype), times(t), keys_values)
            both = self.unet(torch.cat([z, z]).to(context.dtype), times(torch.cat([t, t])), keys_values)  # one batch
            unconditional, conditional = both.float().chunk(2)
            return unconditional + guidance * (conditional - unconditional)

        return denoise


# ---------------------------------------------------------------------------------------------------------------------
# scheduler_config.json <-> Schedule


def schedule_from_json(c, prediction=None):
    """A scheduler_config.json of any scheduler -> Schedule. ValueError for another noise schedule than we know."""
    name = c.get("beta_schedule", "linear")
    if name in BETAS:
        for key, beta in (("beta_start", BETAS[name][0]), ("beta_end", BETAS[name][-1])):
            said = c.get(key, float(beta))
            if not isinstance(said, (int, float)) or abs(said - beta) > 1e-6:
                raise ValueError(f"a {name!r} noise schedule with {key} = {c[key]} is not implemented")
    if c.get("num_train_timesteps", T) != T or c.get("trained_betas") or c.get("rescale_betas_zero_snr"):
        raise ValueError("a noise schedule of other than 1000 steps, or with betas of its own, is not implemented")
    return Schedule(name, prediction or c.get("prediction_type", "epsilon"))


def schedule_to_json(schedule):
    betas = BETAS[schedule.name]
    return {  # DDIM, as Stable Diffusion runs it: timesteps 1, 21, 41, .., and an end at the first noise level
        "_class_name": "DDIMScheduler", "num_train_timesteps": T, "beta_schedule": schedule.name,
        "beta_start": round(float(betas[0]), 8), "beta_end": round(float(betas[-1]), 8),
        "prediction_type": schedule.prediction, "steps_offset": 1, "timestep_spacing": "leading",
        "set_alpha_to_one": False, "clip_sample": False,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Load


PARTS = {  # name: (network, configuration from shapes, from config.json, to config.json)
    "unet": (unet.UNet, configs.unet_config_from_shapes, configs.unet_config_from_json, configs.unet_config_to_json),
    "vae": (vae.VAE, configs.vae_config_from_shapes, configs.vae_config_from_json, configs.vae_config_to_json),
    "text_encoder": (
        clip.TextEncoder, configs.text_config_from_shapes, configs.text_config_from_json, configs.text_config_to_json
    ),
}


class Bare(torch.overrides.TorchFunctionMode):
    """with torch.device("meta"), Bare(): builds a network without drawing its initial weights. On the meta device there
    is nothing to draw, but PyTorch would spend a second and 60 MB on importing what it takes to do so."""

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if getattr(f, "__module__", "") == "torch.nn.init" else f(*args, **kwargs)


def build(part, tensors, where, config=None, dtype=None, device="cpu"):
    """{Hugging Face name: tensor} -> the model of that part, which takes the tensors over. `where` is for the errors.

    ValueError names the tensors that are missing, unexpected or of another shape than the configuration says.
    """
    network, from_shapes, *_ = PARTS[part]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        config = config or from_shapes(shapes)
    except (KeyError, ValueError, IndexError) as e:
        raise ValueError(f"{where}: these tensors do not make a {part} (at {e})") from None
    try:
        with torch.device("meta"), Bare():
            model = network(config)
    except (LookupError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as e:
        raise ValueError(f"{where}: its config.json does not make a {part} ({str(e).splitlines()[0]})") from None
    if problems := describe_misfits(model, shapes):
        raise ValueError(f"{where}, the {part}: {problems}")
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in tensors.items()}, assign=True)
    return model.requires_grad_(False).eval()


def load_part(folder, part, dtype=None, device="cpu"):
    """One part of a Hugging Face folder: load_part('weights/toy/vae', 'vae') -> model. Arguments, errors as `load`."""
    folder, config = Path(folder), None
    if (folder / "config.json").is_file():
        _, _, from_json, _ = PARTS[part]
        try:
            config = from_json(read_json(folder / "config.json"))
        except KeyError as missing:
            raise ValueError(f"{folder / 'config.json'} has no {missing}") from None
        except (ValueError, TypeError, AttributeError, IndexError, ZeroDivisionError) as e:
            raise ValueError(f"{folder / 'config.json'}: {e}") from None
    tensors = {name: tensor for name, tensor in read_folder(folder).items() if not IGNORED.fullmatch(name)}
    return build(part, translate(part, tensors), folder, config, dtype, device)


@uncollected()
def load(path, dtype=None, device="cpu", prediction=None):
    """Read a Stable Diffusion 1 or 2 checkpoint, of any width, in any layout.

    path        a Hugging Face folder, or a single .safetensors, .ckpt or .pt in the original layout
    dtype       None: as stored, and the weights stay in the file, mapped. Otherwise cast, tensor by tensor.
    prediction  what the UNet predicts, 'epsilon' or 'v_prediction'. None: a folder says it. A single file does not:
                then it is v for an SD 2 with 768 in its file name (768-v-ema.ckpt, v2-1_768-ema-pruned.safetensors),
                as published, and epsilon for any other.
      ->        StableDiffusion

    A config.json wins over what can be read off the tensors. FileNotFoundError or ValueError, of one line, for a path
    that is not there, damaged, not a Stable Diffusion, refused (see `read`), or of an architecture not implemented.
    """
    path = Path(path)
    if path.is_dir():
        sd = load_folder(path, dtype, device, prediction)
    elif path.exists():
        sd = load_file(path, dtype, device, prediction)
    else:
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    u, v, t = sd.unet.config, sd.vae.config, sd.text.config
    if (u.context, u.out_channels) != (t.width, v.latent_channels):
        raise ValueError(f"{path}: its parts do not fit: the UNet reads text of width {u.context} and gives "
                         f"{u.out_channels} channels, the text encoder gives {t.width}, the VAE {v.latent_channels}")
    if u.in_channels not in (v.latent_channels, 2 * v.latent_channels + 1):
        raise ValueError(f"{path}: a UNet of {u.in_channels} input channels is neither a plain model "
                         f"({v.latent_channels}) nor an inpainting one ({2 * v.latent_channels + 1})")
    if sd.tokenizer and max(sd.tokenizer.symbols) >= t.vocab_size:
        raise ValueError(f"{path}: its tokenizer is not the text encoder's, which knows {t.vocab_size} symbols only")
    return sd


def load_folder(path, dtype, device, prediction):
    index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    if "text_encoder_2" in index:
        raise ValueError(f"{path} is a Stable Diffusion XL, whose two text encoders load() does not read")
    for part in PARTS:
        if not (path / part).is_dir():
            raise FileNotFoundError(f"{path} is not a Stable Diffusion: there is no folder {part}/ in it")
    models = [load_part(path / part, part, dtype, device) for part in PARTS]

    def config_json(name):
        return read_json(path / name) if (path / name).is_file() else {}

    scheduler = config_json("scheduler/scheduler_config.json") or schedule_to_json(Schedule())
    side = latent_side(path / "unet")
    tokenizer = find_tokenizer([path / "tokenizer"])
    hint = f"put vocab.json and merges.txt, of the checkpoint's own tokenizer/, into {path / 'tokenizer'}/"
    try:
        schedule = schedule_from_json(scheduler, prediction)
    except ValueError as e:
        raise ValueError(f"{path / 'scheduler/scheduler_config.json'}: {e}") from None
    return StableDiffusion(*models, schedule, tokenizer, side * models[1].config.factor, hint)


def latent_side(folder):
    """The side of the latents that a UNet is for, by its config.json. diffusers may leave that open, or name both."""
    config = folder / "config.json"
    side = read_json(config).get("sample_size") or 64 if config.is_file() else 64
    side = side[0] if isinstance(side, list) else side
    if not isinstance(side, int):
        raise ValueError(f"{config}: its sample_size is a number of latent pixels, not {side!r}")
    return side


def load_file(path, dtype, device, prediction):
    parts, openclip = split_parts(path, read_tensors(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in parts["text_encoder"].items()}
    try:  # which activation is not in the tensors, but OpenCLIP has always had GELU, and OpenAI its own
        text = replace(configs.text_config_from_shapes(shapes), activation="gelu" if openclip else "quick_gelu")
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    models = [build(part, tensors, path, text if part == "text_encoder" else None, dtype, device)
              for part, tensors in parts.items()]
    prediction = prediction or ("v_prediction" if openclip and "768" in path.name else "epsilon")
    side = 96 if prediction == "v_prediction" else 64
    tokenizer = find_tokenizer([path.parent / "tokenizer", path.parent], pad="!" if openclip else clip.END)
    hint = (f"put vocab.json and merges.txt (from the tokenizer/ of any Stable Diffusion 1 or 2 on Hugging Face), or "
            f"{clip.ARCHIVE} (of openai/CLIP), into {path.parent.resolve()}/")
    return StableDiffusion(*models, Schedule(prediction=prediction), tokenizer, side * models[1].config.factor, hint)


def find_tokenizer(folders, pad=None):
    """The first folder's tokenizer, or None. A damaged one is an error (ValueError), not an absent one."""
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            return clip.Tokenizer.load(folder, pad)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Save


def save_part(model, folder, dtype=None, **more):
    """Write a UNet, VAE or TextEncoder as one part of a Hugging Face folder: config.json and the weights.

    dtype: the stored precision, None as it is. more: further entries of config.json, e.g. sample_size=64.
    """
    folder = Path(folder)
    to_json = next(to_json for network, _, _, to_json in PARTS.values() if isinstance(model, network))
    stem = "model" if isinstance(model, clip.TextEncoder) else "diffusion_pytorch_model"
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(folder / f"{stem}.safetensors") as file:
        save_file(tensors, file, metadata={"format": "pt"})  # transformers insists on that entry
    write_json(folder / "config.json", to_json(model.config) | more)


def save(sd, folder, dtype=None):
    """Write the standard folder that diffusers' StableDiffusionPipeline.from_pretrained opens, and `load`.

    dtype: the stored precision, e.g. torch.float16 for half the size; None as it is. Each file is written whole or not
    at all, and model_index.json, without which diffusers sees no pipeline, comes last.
    """
    folder = Path(folder)
    save_part(sd.unet, folder / "unet", dtype, sample_size=sd.size // sd.vae.config.factor)
    save_part(sd.vae, folder / "vae", dtype, sample_size=sd.size)
    save_part(sd.text, folder / "text_encoder", dtype)
    write_json(folder / "scheduler" / "scheduler_config.json", schedule_to_json(sd.schedule))
    if sd.tokenizer:
        with tempfile.TemporaryDirectory() as made:
            sd.tokenizer.save(made)
            for file in Path(made).iterdir():
                with atomic_write(folder / "tokenizer" / file.name) as out:
                    out.write_bytes(file.read_bytes())
    inpainting = sd.unet.config.in_channels > sd.unet.config.out_channels
    write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline",
        **({"_diffusers_version": "0.6.0"} if inpainting else {}),  # that pipeline asks whether it is newer than 0.5.1
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    })
