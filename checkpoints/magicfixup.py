"""The layout of the Magic Fixup release: one pickled state dict for both UNets and the autoencoder."""

import contextlib
import re
from pathlib import Path

import torch

from checkpoints.names import IGNORED, translate, warn_of_unknown
from checkpoints.read import read_tensors
from diffusion import BETAS, Schedule, T

PREFIX = {"synthesizer": "model.diffusion_model.", "extractor": "model.reference_model.", "vae": "first_stage_model."}
# What sampling never reads: a branch that looked at the picture with DINO, the attention to that branch's (once the
# text's) tokens, ways to merge attentions that were tried, and the extractor's attention to the reference.
UNUSED = re.compile(
    r"cond_stage_model\..*|proj_out\..*|learnable_vector|.*\.merge_attentions(_missing)?\..*"
    r"|model\.\w+\..*\.transformer_blocks\.\d+\.attn2\..*"
    r"|model\.reference_model\..*\.transformer_blocks\.\d+\.(attn3|norm2)\..*"
)


def split_released(path, tensors):
    """{name: tensor} of the released file -> {"synthesizer", "extractor", "vae": {Hugging Face name: tensor}}

    `path` is for the errors. ValueError if a part is missing, a warning if something is in the file that no part needs.
    """
    names = [name for name in tensors if not (UNUSED.fullmatch(name) or IGNORED.fullmatch(name))]
    parts = {}
    for part, prefix in PREFIX.items():
        found = {name.removeprefix(prefix): tensors[name] for name in names if name.startswith(prefix)}
        if not found:
            raise ValueError(f"{path} is not a whole Magic Fixup checkpoint: it has no tensors {prefix}*; its first is "
                             f"{next(iter(tensors))}")
        # The attention to the reference is their third, and our second.
        found = {name.replace(".attn3.", ".attn2."): tensor for name, tensor in found.items()}
        parts[part] = translate("vae" if part == "vae" else "unet", found)
    warn_of_unknown(path, names, PREFIX)
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
