"""LoRA: a file of small changes to the layers of a model, merged into their weights.

    merge_lora(sd.load("sd-v1-4.ckpt"), "style.safetensors", 0.8)

    W' = W + weight * alpha / rank * up @ down     LoRA, Hu et al. 2021, arXiv 2106.09685, equation 3
    up @ mid @ down in its place                   LoCon: of a convolution, whose kernel is in `mid`, or in `down`
    W' = magnitude * V / |V|, V = W + ...          DoRA, Liu et al. 2024, arXiv 2402.09353, equation 5

Two layouts are read. kohya's has _ where a layer's name has a dot, and names the UNet's layers as Hugging Face or as
the original program does. diffusers' has had several endings since 2023, the last of them PEFT's. PEFT's own files
of a UNet are read as well.
"""

import json
import math
import re
from pathlib import Path

import torch
from torch import nn

from checkpoints.names import translate
from checkpoints.read import FLOATS, read_content
from common.files import read_json, read_metadata

# What a tensor is, the end of its name says: of a layer, "down" (A in PEFT), "up" (B), and so on.
ENDING = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?[._](down|up|A|B|mid|magnitude_vector)(?:\.weight)?"
                    r"|\.(alpha|dora_scale))")
ROLES = {"A": "down", "B": "up"}

# What the layer belongs to, the beginning says. Without one it is the UNet's, as in diffusers' oldest files.
BEGINNING = re.compile(r"(lora_unet|lora_te[12]?|unet|text_encoder(?:_2)?)_(.+)")
PARTS = {"lora_unet": "unet", "unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder",
         "text_encoder": "text_encoder", "lora_te2": "text_encoder_2", "text_encoder_2": "text_encoder_2"}

# PEFT's own files, each of one network, say so before every name
PEFT = "base_model.model."

# Where the original UNet's names have no dot, but a _
WORD = re.compile(r"(?:input|output)_blocks|middle_block|transformer_blocks|time_embed|label_emb|skip_connection"
                  r"|(?:in|out|emb)_layers|proj_(?:in|out)|to_(?:q|k|v|out)|[^_]+")

FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}  # by context's width


@torch.no_grad()
def merge_lora(model, path, weight=1.0):
    """Merge a LoRA, LoCon or DoRA into a model of `sd.load`, in place -> how many layers it changes.

    path    .safetensors, or a pickle, of which nothing is executed
    weight  how much of it, of any sign; 0 leaves every bit as it is. Of a DoRA, the share of the way to W'
    ValueError, one line, if the file is no LoRA, damaged, or for another model: then nothing is merged.
    """
    if type(weight) not in (int, float) or not math.isfinite(weight):
        raise ValueError(f"the weight of {path} is a number, not {weight}")
    lora = read_lora(path)
    layers = list_layers(model)
    found = {layer: find_layer(layer, layers, model.unet.config.layers + 1) for layer in lora}
    if absent := [layer for layer, name in found.items() if name is None]:
        raise ValueError(f"{path} does not fit this model: {len(absent)} of its {len(lora)} layers are not there, "
                         f"e.g. {absent[0]!r:.100}{guess_family(lora, model)}")
    if len(set(found.values())) < len(found):
        raise ValueError(f"{path} is damaged: it changes a layer under two names")

    said = read_config(path, lora)
    alphas = {}
    for layer, name in found.items():
        factors, W = lora[layer], layers[name].weight
        if problem := describe_misfit(factors, W):
            raise ValueError(f"{path} does not fit this model: {layer!r:.100} has {problem}{guess_family(lora, model)}")
        own = find_alpha(path, said, name, len(factors["down"]))
        alphas[layer] = factors["alpha"].item() if "alpha" in factors else own

    def make(layer):
        W = layers[found[layer]].weight
        factors = {role: x.to(W.device, torch.float32) for role, x in lora[layer].items()}
        return change(W.float(), factors, alphas[layer], weight).to(W.dtype)

    # All are made once to see that they are finite, so that a model is never half merged, and once more to stay: a
    # second copy of all weights would not fit beside the first on many a GPU.
    for layer in found:
        if not make(layer).isfinite().all():
            raise ValueError(f"{path} at weight {weight:g} makes {layer!r:.100} not finite: take less, or --precision "
                             "fp32")
    for layer, name in found.items():
        if weight != 0:
            layers[name].weight = nn.Parameter(make(layer), requires_grad=False)
    return len(found)


def change(W, factors, alpha, weight):
    """W (out, in) or (out, in, k, k), {role: tensor} of a layer -> W', all float32"""
    down, up, mid = (factors.get(role) for role in ("down", "up", "mid"))
    if mid is None:
        product = (up.flatten(1) @ down.flatten(1)).reshape(W.shape)
    else:
        product = torch.einsum("or,rsyx,si->oiyx", up.flatten(1), mid, down.flatten(1))
    if "magnitude" not in factors:
        return W + weight * alpha / len(down) * product

    # DoRA's norms are those of the outputs' rows; in older files, whose magnitudes are (1, in), of the inputs' columns.
    V = W + alpha / len(down) * product
    magnitude = factors["magnitude"]
    kept = 0 if len(magnitude) == len(W) else 1
    norms = torch.linalg.vector_norm(V, dim=[i for i in range(W.ndim) if i != kept], keepdim=True)
    return W + weight * (magnitude.reshape(norms.shape) * V / norms - W)


# ---------------------------------------------------------------------------------------------------------------------
# The file


def read_lora(path):
    """A file -> {what it calls a layer: {"down", "up", and some "mid", "alpha", "magnitude": tensor}}"""
    content = read_content(path)
    if isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    lora, unknown = {}, []
    for name, x in content.items():
        match = ENDING.fullmatch(str(name))
        if not match:
            unknown.append(str(name))
            continue
        if match[3] == "alpha" and torch.is_tensor(x) and x.dtype == torch.int64 and x.numel() == 1:
            x = x.item()  # kohya's extracted LoRAs have their rank there
        if type(x) in (int, float) and abs(x) < 1e9:  # as alpha is in a pickle
            x = torch.tensor(float(x))
        if not torch.is_tensor(x) or x.dtype not in FLOATS or x.nbytes > x.untyped_storage().nbytes():
            raise ValueError(f"{path} is damaged: {name!r:.100} is no tensor of floating-point numbers")
        if not x.float().isfinite().all():
            raise ValueError(f"{path} is damaged: {name!r:.100} is not finite")
        role = match[2] or match[3]
        if role == "magnitude_vector":
            x = x.flatten()  # PEFT's of a convolution are (1, out, 1, 1)
        role = "magnitude" if role in ("magnitude_vector", "dora_scale") else ROLES.get(role, role)
        factors = lora.setdefault(match[1], {})
        if role in factors:
            raise ValueError(f"{path} is damaged: {match[1]!r:.100} has two tensors {role}")
        factors[role] = x
    if not lora:
        raise ValueError(f"{path} is no LoRA: its first entry is {next(iter(content), None)!r:.100}")
    if unknown:
        raise ValueError(f"{path} has {len(unknown)} entries that no LoRA, LoCon or DoRA has, e.g. {unknown[0]!r:.100}")
    for layer, factors in lora.items():
        if missing := {"down", "up"} - factors.keys():
            raise ValueError(f"{path} is not whole: {layer!r:.100} has no {sorted(missing)[0]}")
    return lora


def read_config(path, lora):
    """What diffusers and PEFT say of alpha: {"unet.lora_alpha": 8, ...}. diffusers since 2025 in the file, PEFT beside
    it. ValueError or FileNotFoundError where that cannot be read."""
    if any(layer.startswith(PEFT) for layer in lora):
        config = read_json(Path(path).parent / "adapter_config.json")
        return {f"unet.{name}": value for name, value in config.items()}
    try:
        said = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise ValueError(f"{path} is damaged: what it says of itself, lora_adapter_metadata, is no JSON object")
    return said


def find_alpha(path, said, name, rank):
    """alpha of a layer without a tensor that says it: as configured, or its rank, so that alpha / rank is 1."""
    part, _, layer = name.partition(".")
    alpha = said.get(f"{part}.lora_alpha", rank)
    pattern = said.get(f"{part}.alpha_pattern") or {}
    for other in pattern if isinstance(pattern, dict) else ():
        if f"_{layer}".endswith("_" + other.replace(".", "_")):
            alpha = pattern[other]
    if type(alpha) not in (int, float) or not abs(alpha) < 1e9:
        raise ValueError(f"{path} is damaged: {name} has the alpha {alpha!r:.60}")
    return alpha * math.sqrt(rank) if said.get(f"{part}.use_rslora") else alpha


# ---------------------------------------------------------------------------------------------------------------------
# The model


def list_layers(model):
    """-> {"unet.mid_block_resnets_0_conv1": layer}, of all layers that a LoRA may change"""
    networks = {"unet": model.unet, "text_encoder": model.text}
    if model.xl:
        networks |= {"text_encoder": model.xl.text, "text_encoder_2": model.text}
    layers = {}
    for part, network in networks.items():
        for name, module in network.named_modules() if network else ():
            if isinstance(module, nn.Linear | nn.Conv2d):
                layers[f"{part}.{name.replace('.', '_')}"] = module
    return layers


def find_layer(layer, layers, per_level):
    """What a file calls a layer -> its name in `layers`, or None; per_level as for `translate`"""
    name = layer.removeprefix(PEFT).replace(".processor.", ".").replace(".", "_")
    match = BEGINNING.fullmatch(name)
    part, name = (PARTS[match[1]], match[2]) if match else ("unet", name)
    if part == "unet":
        name += "_0" * name.endswith("_to_out")  # what had a place of its own in diffusers' old attention
        if f"{part}.{name}" not in layers:
            original = ".".join(WORD.findall(name)) + ".weight"
            (translated,) = translate(part, {original: None}, per_level)
            name = translated.removesuffix(".weight").replace(".", "_")
    else:
        name = re.sub(r"self_attn_to_(q|k|v|out)$", r"self_attn_\1_proj", name)
    return f"{part}.{name}" if f"{part}.{name}" in layers else None


def describe_misfit(factors, W):
    """What keeps {role: tensor} from changing W, in words; "" if nothing. A 1x1 convolution may be a linear layer."""
    shapes = {role: list(x.shape) for role, x in factors.items()}
    rows, columns, *kernel = trim(W.shape)
    rank = shapes["down"][0] if shapes["down"] else 0
    wanted = {"up": [rows, rank], "down": [rank, columns, *kernel]}
    if "mid" in factors:
        wanted |= {"down": [rank, columns], "mid": [rank, rank, *W.shape[2:]]}
    for role, shape in wanted.items():
        if not rank or (shapes[role] if role == "mid" else trim(shapes[role])) != shape:
            return f"{role} of the shape {tuple(shapes[role])}, and the layer has {tuple(W.shape)}"
    if "alpha" in factors and factors["alpha"].numel() != 1:
        return f"alpha of the shape {tuple(shapes['alpha'])}"
    if "magnitude" in factors and trim(shapes["magnitude"]) not in ([rows], [rows, 1], [1, columns]):
        return f"magnitudes of the shape {tuple(shapes['magnitude'])}, and the layer has {tuple(W.shape)}"
    return ""


def trim(shape):
    """A shape without the 1 x 1 of a convolution's kernel: (8, 4, 1, 1) -> [8, 4]"""
    shape = list(shape)
    return shape[:2] if len(shape) == 4 and shape[2:] == [1, 1] else shape


def guess_family(lora, model):
    """"; it is for Stable Diffusion XL", by how wide the text is that it reads, if that is another than the model's"""
    for layer, factors in lora.items():
        if layer.endswith(("attn2_to_k", "attn2.to_k", "attn2.processor.to_k")) and factors["down"].ndim > 1:
            width = factors["down"].shape[1]
            if width in FAMILIES and width != model.unet.config.context:
                return f"; it is for {FAMILIES[width]}"
    return ""
