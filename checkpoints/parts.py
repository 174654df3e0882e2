"""One network and its folder in Hugging Face's layout: config.json and the weights.

    vae = load_part("weights/toy/vae", "vae")
    save_part(vae, "folder/vae", dtype=torch.float16)

The attribute names of our networks are the names in the file, so loading is `load_state_dict`. A
network is built on the meta device, where it has shapes and no memory, and takes over tensors that
are views of the file, mapped into memory: a page is read when it is first computed with, and the
system can drop it again. So loading takes no memory to speak of, unless `dtype` asks for a cast.
"""

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoints import configs
from checkpoints.names import IGNORED, IGNORED_BESIDE_IMAGES, PREFIX, translate
from checkpoints.read import copy_tensors, describe_misfits, read_folder, read_tensors
from clip import TextEncoder
from common.cli import WEIGHTS
from common.devices import choose_stored
from common.files import atomic_write, read_json, write_json
from models import adm, image_encoder, movq, prior, t5
from models.image_encoder import ImageEncoder
from unet import UNet
from vae import VAE

PARTS = {  # folder: (network, configuration from shapes, from config.json, to config.json)
    "unet": (UNet, configs.unet_config_from_shapes,
             configs.unet_config_from_json, configs.unet_config_to_json),
    "vae": (VAE, configs.vae_config_from_shapes,
            configs.vae_config_from_json, configs.vae_config_to_json),
    "text_encoder": (TextEncoder, configs.text_config_from_shapes,
                     configs.text_config_from_json, configs.text_config_to_json),
    # What is in no single file: their config.json says it all, and they are not written.
    "adm": (adm.ADM, None, adm.config_from_json, None),
    "t5": (t5.T5, None, t5.config_from_json, None),
    "movq": (movq.MOVQ, None, movq.config_from_json, None),
    "prior": (prior.Prior, None, prior.config_from_json, None),
    "image_encoder": (ImageEncoder, None, image_encoder.image_config_from_json,
                      image_encoder.image_config_to_json),
    "toy_image_encoder": (image_encoder.ToyImageEncoder, None, image_encoder.toy_image_config_from_json,
                          image_encoder.toy_image_config_to_json),
}


TOY_CAPTIONER = WEIGHTS / "toy-captioner"
CLIP_IMAGES = WEIGHTS / "clip-vit-large-patch14"  # where a user puts it


class SkipInit(torch.overrides.TorchFunctionMode):
    """with torch.device("meta"), SkipInit(): a network is built without drawing initial weights.

    On the meta device there is nothing to draw, but PyTorch imports 800 modules to do so: 0.8 s and
    70 MB, eight times what loading takes otherwise.
    """

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(f, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return f(*args, **kwargs)


def build_part(part, tensors, where, config=None, dtype=None, device="cpu", **known):
    """{Hugging Face name: tensor} -> the network of that part, frozen, which takes them over.

    part    one of PARTS
    where   the file or folder, for the errors. ValueError names the tensors that are missing,
            unexpected or of another shape than the configuration says
    config  None: read off the shapes, but for what is `known`, e.g. activation="gelu"
    """
    network, from_shapes, _, _ = PARTS[part]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        config = config or replace(from_shapes(shapes), **known)
    except (LookupError, ValueError, TypeError, ArithmeticError) as e:
        raise ValueError(f"{where}: these tensors do not make a {part} (at {e})") from None
    try:
        configs.check_sizes(config, tensors)
        with torch.device("meta"), SkipInit():
            model = network(config)
    except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"{where}: its configuration does not make a {part} ({reason})") from None
    if problems := describe_misfits(model, tensors):
        raise ValueError(f"{where}, the {part}: {problems}")
    dtype = dtype or choose_stored({tensor.dtype for tensor in tensors.values()}, device)
    there = copy_tensors(where, tensors, device, dict.fromkeys(tensors, dtype))
    if part in ("vae", "movq") and dtype == torch.float16 and not all(x.isfinite().all() for x in there.values()):
        # What does not fit into fp16 stays in single precision: an autoencoder takes pictures and latents of any.
        return build_part(part, tensors, where, config, torch.float32, device)
    model.load_state_dict(there, assign=True)
    return model.requires_grad_(False).eval()


def load_part(folder, part, dtype=None, device="cpu"):
    """One part's folder -> its network. Arguments and errors as `sd.load`.

    config.json wins over what can be read off the tensors.
    """
    folder = Path(folder)
    file = folder / "config.json"
    config = None
    _, from_shapes, from_json, _ = PARTS[part]
    if file.is_file() or from_shapes is None:
        try:
            config = from_json(read_json(file))
        except KeyError as missing:
            raise ValueError(f"{file} has no {missing}") from None
        except (ValueError, TypeError, AttributeError, IndexError, ArithmeticError) as e:
            raise ValueError(f"{file}: {e}") from None
    ignored = IGNORED_BESIDE_IMAGES if part == "image_encoder" else IGNORED
    tensors = {name: tensor for name, tensor in read_folder(folder).items() if not ignored.fullmatch(name)}
    tensors = translate(part, tensors)
    guided = part == "unet" and fold_guidance(tensors)
    network = build_part(part, tensors, folder, config, dtype, device)
    network.guided = guided  # it needs no other guidance
    return network


def require_folders(path, what, parts):
    """FileNotFoundError unless this model's folder has one for each of its parts"""
    for part in parts:
        if not (path / part).is_dir():
            raise FileNotFoundError(f"{path} is not {what}: there is no folder {part}/ in it")


def load_image_encoder(folder, dtype=None, device="cpu"):
    """CLIP's network for pictures, or the toy world's, as config.json says. Errors as `sd.load`."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"there is no image encoder in {folder}: CLIP ViT-L/14's folder of that name, or a "
                                "toy's captioner")
    is_toy = read_json(folder / "config.json").get("_class_name") == "ToyImageEncoder"
    return load_part(folder, "toy_image_encoder" if is_toy else "image_encoder", dtype, device)


def fold_guidance(tensors, guidance=8.5):
    """A latent consistency model's UNet is told its guidance with the time (2310.04378, section 4.2). At one strength
    that is a bias: make it so, in place, and an ordinary UNet is left.

    tensors   {name: tensor} of a UNet; one without such an input stays as it is
    guidance  w of classifier-free guidance: 8.5 where diffusers' pipeline is told none
      ->      whether it had one
    """
    told = "time_embedding.cond_proj.weight"
    first = "time_embedding.linear_1."
    if told not in tensors:
        return False
    # Damaged tensors stay as they are, and `build_part` names them.
    with contextlib.suppress(LookupError, RuntimeError, ArithmeticError):
        project = tensors[told].float()  # (c, D)
        # Embedded as a timestep is, but with sines before cosines, and to a lowest frequency of 1/10000
        i = torch.arange(project.shape[1] // 2)
        angle = 1000 * (guidance - 1) * torch.exp(-math.log(10000) / (len(i) - 1) * i)
        embedded = torch.cat([angle.sin(), angle.cos()])  # (D,)
        bias = tensors[first + "bias"]
        more = tensors[first + "weight"].float() @ (project @ embedded)
        tensors[first + "bias"] = (bias.float() + more).to(bias)
        del tensors[told]
    return True


def vae_folder(path):
    """A folder of an autoencoder alone or of a whole model -> the autoencoder's"""
    return path / "vae" if (path / "vae").is_dir() else path


def read_vae(path):
    """An autoencoder's tensors, as they are called there: of its own or a whole model's folder or file"""
    path = Path(path)
    tensors = read_folder(vae_folder(path)) if path.is_dir() else read_tensors(path)
    tensors = {name: x for name, x in tensors.items() if not IGNORED.fullmatch(name)}
    whole = {n.removeprefix(PREFIX["vae"]): x for n, x in tensors.items() if n.startswith(PREFIX["vae"])}
    return whole or tensors


def replace_vae(model, path):
    """Give a StableDiffusion another autoencoder, in place: a folder of Hugging Face's, of it alone or of a whole
    model, or a file in either layout, likewise. ValueError if its latents are of another size.
    """
    path, old, weight = Path(path), model.vae.config, model.vae.quant_conv.weight
    if path.is_dir():
        vae = load_part(vae_folder(path), "vae", weight.dtype, weight.device)
    else:
        vae = build_part("vae", translate("vae", read_vae(path)), path, None, weight.dtype, weight.device,
                         scaling_factor=old.scaling_factor, size=old.size)  # which no file says
    new = vae.config
    if (new.latent_channels, new.factor) != (old.latent_channels, old.factor):
        raise ValueError(f"{path} has latents of {new.latent_channels} channels at 1/{new.factor}, and this model's "
                         f"have {old.latent_channels} at 1/{old.factor}")
    model.vae = vae


def read_latent_side(folder, default=64):
    """The side of the latents that a UNet is for, by its config.json, if that says it.

    ValueError where it says something else than a number, or two as diffusers also writes.
    """
    file = Path(folder) / "config.json"
    try:
        return configs.read_side(read_json(file, default={}), default)
    except ValueError as e:
        raise e if str(file) in str(e) else ValueError(f"{file}: {e}") from None


def read_schedule(folder, default=None, read=configs.schedule_from_json):
    """-> what `read` makes of a model's scheduler/scheduler_config.json: a Schedule

    default  the entries where there is no such file; None: it must be there
    """
    file = Path(folder) / "scheduler/scheduler_config.json"
    c = read_json(file, default)
    try:
        return read(c)
    except (ValueError, TypeError) as e:
        raise ValueError(f"{file}: {e}") from None


def save_part(model, folder, dtype=None, config=None, **more):
    """Write a UNet, VAE, text or image encoder as one part's folder, each file whole or not at all.

    dtype   the stored precision; None as it is
    config  config.json; None: of model.config
    more    further entries of config.json, e.g. sample_size=64
    """
    folder = Path(folder)
    stem = "model" if isinstance(model, (TextEncoder, ImageEncoder, t5.T5)) else "diffusion_pytorch_model"
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors[name] = tensor.detach().to("cpu", dtype).contiguous()
    with atomic_write(folder / f"{stem}.safetensors") as file:
        save_file(tensors, file, metadata={"format": "pt"})  # transformers insists on that entry
    if not config:
        config = next(to_json for network, _, _, to_json in PARTS.values() if type(model) is network)(model.config)
    write_json(folder / "config.json", config | more)
