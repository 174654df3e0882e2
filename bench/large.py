"""python -m bench's topic of the large networks: each is loaded at its published size, and makes one pass.

The weights are random, in a folder as they are published: config.json and one file in half precision. Ours and the
peer's read that folder in processes of their own, so that the most memory of each is its own.
"""

import importlib
import json
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import unet
from bench import peers
from bench.clock import Row, compute_difference, run_in_own_process
from checkpoints import configs
from checkpoints.parts import PARTS, SkipInit, load_part
from kernels.memory import hold_memory
from kernels.winograd import quicken
from models.xl import embed_numbers

# ---------------------------------------------------------------------------------------------------------------------
# config.json, as published


def list_blocks(plain, attending):  # of Kandinsky's and DeepFloyd's UNets, from the full resolution down
    down = ["ResnetDownsampleBlock2D"] * plain + ["SimpleCrossAttnDownBlock2D"] * attending
    up = ["SimpleCrossAttnUpBlock2D"] * attending + ["ResnetUpsampleBlock2D"] * plain
    return {"down_block_types": down, "up_block_types": up}


ADM = list_blocks(1, 3) | {
    "_class_name": "UNet2DConditionModel", "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "layers_per_block": 3,
    "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 64,
}
KANDINSKY = ADM | {
    "in_channels": 4, "out_channels": 8, "block_out_channels": [384, 768, 1152, 1536], "encoder_hid_dim": 1280,
    "cross_attention_dim": 768, "addition_embed_type": "image", "encoder_hid_dim_type": "image_proj",
}
PRIOR = {
    "_class_name": "PriorTransformer", "num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 20,
    "embedding_dim": 1280,
}
IF_L = ADM | {
    "in_channels": 3, "out_channels": 6, "block_out_channels": [320, 640, 960, 1280], "encoder_hid_dim": 4096,
    "cross_attention_dim": 1280, "addition_embed_type": "text", "addition_embed_type_num_heads": 64,
    "cross_attention_norm": "group_norm", "act_fn": "gelu",
}
T5_XXL = {
    "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 4096, "d_ff": 10240, "d_kv": 64,
    "num_heads": 64, "num_layers": 24, "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
}

# ---------------------------------------------------------------------------------------------------------------------
# One pass, at the published size of a picture: (model, whether it is ours) -> tensor


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


TIME = torch.tensor([801])
SEEN = torch.arange(77)[None] < 9  # of the tokens of a text


def run_xl(model, ours, numbers=(1024, 1024, 0, 0, 1024, 1024), context=2048):
    z, states, pooled = draw(1, 4, 128, 128), draw(1, 77, context), draw(1, 1280)
    if ours:
        return model(z, TIME, states, torch.cat([pooled, embed_numbers([numbers], 256)], dim=1))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([numbers])}
    return model(z, TIME, states, added_cond_kwargs=added).sample


def run_xl_refiner(model, ours):
    return run_xl(model, ours, (1024, 1024, 0, 0, 6), context=1280)


def run_kandinsky(model, ours):
    z, embedding = draw(1, 4, 64, 64), draw(1, 1280)
    if ours:
        return model(z, TIME, *model.condition(embedding))
    return model(z, TIME, None, added_cond_kwargs={"image_embeds": embedding}).sample


def run_prior(model, ours):
    z, states, pooled = draw(1, 1280), draw(1, 77, 1280), draw(1, 1280)
    if ours:
        return model(z, TIME, states, pooled, SEEN)
    return model(z, TIME, pooled, states, SEEN).predicted_image_embedding


def run_deepfloyd(model, ours):
    z, states = draw(1, 3, 64, 64), draw(1, 77, 4096)
    return model(z, TIME, *model.condition(states)) if ours else model(z, TIME, states).sample


def run_t5(model, ours):
    ids = torch.arange(77)[None] * 400
    return model(ids, SEEN) if ours else model(ids, attention_mask=SEEN).last_hidden_state


@dataclass(frozen=True)
class Large:
    part: str  # of checkpoints.parts.PARTS
    config: dict
    run: callable
    peer: str = "diffusers.UNet2DConditionModel"
    dtype: torch.dtype = torch.float32  # it computes in


NETWORKS = {
    "SDXL's UNet": Large("unet", configs.unet_config_to_json(unet.CONFIGS["sdxl"]), run_xl),
    "its refiner's": Large("unet", configs.unet_config_to_json(unet.CONFIGS["sdxl-refiner"]), run_xl_refiner),
    "Kandinsky 2.2's UNet": Large("adm", KANDINSKY, run_kandinsky),
    "its prior": Large("prior", PRIOR, run_prior, "diffusers.PriorTransformer"),
    "DeepFloyd IF-I-L's UNet": Large("adm", IF_L, run_deepfloyd),
    "T5-XXL, bf16": Large("t5", T5_XXL, run_t5, "transformers.T5EncoderModel", torch.bfloat16),
}


# ---------------------------------------------------------------------------------------------------------------------
# The topic


def write_random(network, folder):
    """A folder of random weights in fp16 -> how many there are"""
    build, _, read_config, _ = PARTS[network.part]
    with torch.device("meta"), SkipInit():
        model = build(read_config(network.config))
    tensors = {}
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
        if network.part == "t5" and name.endswith(".q.weight"):
            scale *= network.config["d_kv"] ** -0.5  # a T5 divides by it here, not in its attention
        centre = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0  # of a norm
        g = torch.Generator().manual_seed(i)
        tensors[name] = torch.randn(tensor.shape, generator=g).mul_(scale).add_(centre).half()
    stem = "model" if network.part == "t5" else "diffusion_pytorch_model"
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(network.config))
    return sum(tensor.numel() for tensor in tensors.values())


@torch.inference_mode()
def load_and_run(name, folder, ours):
    """In a process of its own -> seconds of loading and of one pass, the most memory in bytes; the result as a file"""
    network = NETWORKS[name]
    if ours:
        hold_memory()
        begin = time.perf_counter()
        model = load_part(folder, network.part, network.dtype)
        if network.part in ("unet", "adm"):
            quicken(model)
    else:
        library, kind = network.peer.split(".")
        peer = getattr(importlib.import_module(library), kind)
        begin = time.perf_counter()
        model = peer.from_pretrained(folder, torch_dtype=network.dtype).eval()
    loaded = time.perf_counter()
    result = network.run(model, ours)
    end = time.perf_counter()
    save_file({"result": result.float().contiguous()}, Path(folder) / f"result-{ours}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"load": loaded - begin, "pass": end - loaded,
            "peak": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def large(o):
    """The large networks of XL, Kandinsky 2.2 and DeepFloyd IF: loading them, and one pass. Needs 24 GB."""
    for name, network in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            billions = write_random(network, Path(folder)) / 1e9
            found = {ours: run_in_own_process("bench.large.load_and_run", name=name, folder=folder, ours=ours)
                     for ours in ((True, False) if peers.is_installed() else (True,))}
            result = {ours: load_file(Path(folder) / f"result-{ours}")["result"] for ours in found}
        peaks = ", ".join(f"{f['peak'] / 2**30:.1f}" for f in found.values())
        for what in ("load", "pass"):
            seconds = [[f[what]] for f in found.values()]
            differ = compute_difference(result[True], result[False]) if what == "pass" and len(found) > 1 else None
            shown = f"{name}, {billions:.2f} billion: {what}" + (f"; peak {peaks} GiB" if what == "pass" else "")
            yield Row(shown, *seconds, peer=network.peer.split(".")[0], difference=differ)


TOPICS = {"large": large}
