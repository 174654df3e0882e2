"""LoRAs of random numbers for a model, and their names in every layout that people download."""

import re

import torch
from safetensors.torch import save_file
from torch import nn

from tests import small

PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}


def parts(model):
    if model.xl and model.xl.refines:
        return {"unet": model.unet, "text_encoder_2": model.text}
    if model.xl:
        return {"unet": model.unet, "text_encoder": model.xl.text, "text_encoder_2": model.text}
    return {"unet": model.unet, "text_encoder": model.text}


def layers(model):
    """-> {("unet", "mid_block.resnets.0.conv1"): layer}"""
    return {(part, name): layer for part, network in parts(model).items() for name, layer in network.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)}


def make(model, seed=0, rank=3, alpha=2.0, mid=False, dora=None, only=""):
    """-> {(part, layer): {"down", "up" and more}} of all layers whose name has `only` in it

    dora  "out" or "in": the side of the weight on which the magnitudes are
    """
    g = torch.Generator().manual_seed(seed)
    lora = {}
    for (part, name), layer in layers(model).items():
        if not re.search(only, f"{part}.{name}"):
            continue
        rows, columns, *kernel = layer.weight.shape
        ones = [1] * len(kernel)
        cp = mid and kernel == [3, 3]
        factors = {"down": torch.randn(rank, columns, *(ones if cp else kernel), generator=g) / columns**0.5,
                   "up": torch.randn(rows, rank, *ones, generator=g) / 10}
        if cp:
            factors["mid"] = torch.randn(rank, rank, *kernel, generator=g) / 3
        if alpha is not None:
            factors["alpha"] = torch.tensor(alpha)
        if dora:
            shape = (rows, 1, *ones) if dora == "out" else (1, columns, *ones)
            factors["dora_scale"] = torch.rand(*shape, generator=g) + 0.5
        lora[part, name] = factors
    return lora


def kohya(lora, model, te="lora_te_"):
    """lora_unet_mid_block_resnets_0_conv1.lora_down.weight"""
    beginnings = PARTS | {"text_encoder": "lora_te1_" if model.xl else te}
    out = {}
    for (part, name), factors in lora.items():
        for role, x in factors.items():
            ending = role if role in ("alpha", "dora_scale") else f"lora_{role}.weight"
            out[f"{beginnings[part]}{name.replace('.', '_')}.{ending}"] = x.contiguous()
    return out


def original(lora, model):
    """The same, where the UNet's layers are called as in the original program"""
    prefix = "model.diffusion_model."
    weights = {x.data_ptr(): name for name, x in small.to_original(model).items() if name.startswith(prefix)}
    out = kohya({key: factors for key, factors in lora.items() if key[0] != "unet"}, model)
    for (part, name), factors in lora.items():
        if part == "unet":
            there = weights[model.unet.get_submodule(name).weight.data_ptr()]
            there = there.removeprefix(prefix).removesuffix(".weight").replace(".", "_")
            out |= kohya({(part, there): factors}, model)
    return out


def diffusers(lora, model, endings="PEFT"):
    """unet.mid_block.resnets.0.conv1.lora_A.weight, or as diffusers wrote it before ('dots', 'processor', 'bare')"""
    out = {}
    for (part, name), factors in lora.items():
        down, up = {"PEFT": (".lora_A.weight", ".lora_B.weight")}.get(
            endings, (".lora.down.weight", ".lora.up.weight"))
        before = f"{part}.{name}"
        if endings != "PEFT" and part != "unet":
            down, up = down.replace(".lora.", ".lora_linear_layer."), up.replace(".lora.", ".lora_linear_layer.")
        if endings in ("processor", "bare"):
            if match := re.fullmatch(r"(unet\..*attn[12])\.(to_\w+)(\.0)?", before):
                before, down, up = f"{match[1]}.processor.{match[2]}_lora", ".down.weight", ".up.weight"
            elif match := re.fullmatch(r"(text.*self_attn)\.(q|k|v|out)_proj", before):
                before, down, up = f"{match[1]}.to_{match[2]}_lora", ".down.weight", ".up.weight"
        if endings == "bare":
            before = before.removeprefix("unet.")
        out[before + down], out[before + up] = factors["down"].contiguous(), factors["up"].contiguous()
        if "alpha" in factors:
            out[before.removesuffix("_lora") + ".alpha"] = factors["alpha"]
        if "dora_scale" in factors:
            ones = [1] * (factors["dora_scale"].ndim - 2)
            out[before + ".lora_magnitude_vector"] = factors["dora_scale"].reshape(*[1][: len(ones)], -1, *ones)
    return out


def save(file, tensors, **metadata):
    """-> the file: safetensors, or a pickle"""
    if file.suffix == ".safetensors":
        save_file({name: x.clone() for name, x in tensors.items()}, file, metadata=metadata or None)
    else:
        torch.save(tensors, file)
    return file


def weights(model):
    """{(part, layer): weight} as it is now, a copy"""
    return {key: layer.weight.clone() for key, layer in layers(model).items()}
