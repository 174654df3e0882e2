"""A Magic Fixup's files: our own folder, and the release's one pickled state dict for both UNets and the autoencoder.

    parts = read_magic_fixup(path)          what mfx.MagicFixup is made of
    save(model, folder)
"""

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import torch

from checkpoints.configs import schedule_to_json
from checkpoints.names import IGNORED, split_parts, translate
from checkpoints.parts import (
    build_part,
    load_image_encoder,
    load_part,
    read_latent_side,
    read_schedule,
    require_folders,
    save_part,
)
from checkpoints.read import read_tensors
from common.files import read_json, write_json
from diffusion import BETAS, Schedule, T

# {"vae": where it is, seen from this folder, "as_paper": see mfx.MagicFixup}; without the file vae/ and false
INDEX = "mfx.json"

PREFIX = {"synthesizer": "model.diffusion_model.", "extractor": "model.reference_model.", "vae": "first_stage_model."}
# What sampling never reads: a branch that looked at the picture with DINO, the attention to that branch's (once the
# text's) tokens, ways to merge attentions that were tried, and the extractor's attention to the reference.
UNUSED = re.compile(
    r"cond_stage_model\..*|proj_out\..*|learnable_vector|.*\.merge_attentions(_missing)?\..*"
    r"|model\.\w+\..*\.transformer_blocks\.\d+\.attn2\..*"
    r"|model\.reference_model\..*\.transformer_blocks\.\d+\.(attn3|norm2)\..*"
)


def read_magic_fixup(path, dtype=None, device="cpu"):
    """A folder that `save` wrote, or the released file -> the arguments of mfx.MagicFixup, by name. As mfx.load."""
    if path.is_dir():
        return read_parts(path, dtype, device)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    tensors = read_tensors(path)
    parts = split_released(path, tensors)
    extractor = build_part("unet", parts["extractor"], path, None, dtype, device)
    config = replace(extractor.config, context=None)
    vae = build_part("vae", parts["vae"], path, None, dtype, device)
    dtype = extractor.conv_in.weight.dtype
    synthesizer = build_part("unet", parts["synthesizer"], path, config, dtype, device)
    return dict(synthesizer=synthesizer, extractor=extractor, vae=vae, schedule=released_schedule(path, tensors),
                size=64 * vae.config.factor)


def read_parts(path, dtype, device):
    require_folders(path, "a Magic Fixup", ("synthesizer", "scheduler"))
    index = read_json(path / INDEX, default={})
    vae = (path / str(index.get("vae", "vae"))).resolve()
    if not vae.is_dir():
        raise FileNotFoundError(f"{path} needs the autoencoder in {vae}: there is no such folder")
    synthesizer = load_part(path / "synthesizer", "unet", dtype, device)
    vae = load_part(vae, "vae", dtype, device)
    dtype = synthesizer.conv_in.weight.dtype  # one reads what the other writes
    extractor = encoder = None
    if synthesizer.config.context is None:
        extractor = load_part(path / "extractor", "unet", dtype, device)
    elif (path / "image_encoder").is_dir():
        encoder = load_image_encoder(path / "image_encoder", dtype, device)
    return dict(synthesizer=synthesizer, extractor=extractor, vae=vae, schedule=read_schedule(path),
                size=read_latent_side(path / "synthesizer") * vae.config.factor,
                as_paper=index.get("as_paper") is True, image_encoder=encoder)


def save(model, folder, dtype=None, vae=None):
    """Write a folder that `load` reads. Each file is written whole or not at all, and the
    scheduler's, without which there is no Magic Fixup, comes last.

    dtype  the stored precision, None as it is
    vae    where this very autoencoder is on the disk already, seen from `folder`: "../toy/vae". It
           is then not written again. ValueError if another one is there
    """
    folder = Path(folder)
    if vae is not None:
        there = load_part((folder / vae).resolve(), "vae").state_dict()
        for name, x in model.vae.state_dict().items():
            if name not in there or not torch.equal(x.cpu().to(there[name].dtype), there[name]):
                raise ValueError(f"{folder / vae} is not the model's autoencoder, e.g. in {name}")
    latent = model.size // model.vae.config.factor
    save_part(model.synthesizer, folder / "synthesizer", dtype, sample_size=latent)
    if model.extractor:
        save_part(model.extractor, folder / "extractor", dtype, sample_size=latent)
    else:
        save_part(model.image_encoder, folder / "image_encoder", dtype)
    if vae is None:
        save_part(model.vae, folder / "vae", dtype, sample_size=model.size)
    write_json(folder / INDEX, {"vae": str(vae or "vae"), "as_paper": model.as_paper})
    write_json(folder / "scheduler" / "scheduler_config.json", schedule_to_json(model.schedule))


def split_released(path, tensors):
    """{name: tensor} of the released file -> {"synthesizer", "extractor", "vae": {Hugging Face name: tensor}}"""
    parts = split_parts(path, tensors, PREFIX, "Magic Fixup", re.compile(f"{UNUSED.pattern}|{IGNORED.pattern}"))
    for part, found in parts.items():
        # The attention to the reference is their third, and our second.
        found = {name.replace(".attn3.", ".attn2."): tensor for name, tensor in found.items()}
        parts[part] = translate("vae" if part == "vae" else "unet", found)
    return parts


def released_schedule(path, tensors):
    """The noise schedule lies in the file as a buffer, which the release reads with the weights, and so goes by."""
    schedules = {name: Schedule(name) for name in BETAS}
    abar = tensors.get("alphas_cumprod", schedules["zero_snr"].alphas_cumprod)
    for schedule in schedules.values():
        if abar.shape == (T,) and torch.allclose(abar.float(), schedule.alphas_cumprod, atol=1e-3, rtol=0):
            return schedule
    raise ValueError(f"{path}: its noise schedule (alphas_cumprod) is none of {', '.join(schedules)}")


def looks_like_magic_fixup(path):
    """Is there a Magic Fixup at that path, whole or not? For the error where something else was expected."""
    with contextlib.suppress(ValueError, OSError):
        prefix = PREFIX["extractor"]
        return (Path(path) / "synthesizer").is_dir() or any(name.startswith(prefix) for name in read_tensors(path))
    return False
