"""RAFT, Segment Anything and MiDaS, small and random, in files under their published names."""

import json

import numpy as np
import torch
from PIL import Image

from networks import midas, raft, sam
from tests.runs import MEADOW

FILES = {"raft": "raft_large_C_T_SKHT_V2-ff5fadd5.pth", "sam": "sam_vit_b_01ec64.pth", "midas": "dpt_large_384.pt"}
DPT = midas.DPTConfig(width=64, blocks=4, grid=2, channels=(8, 8, 8, 8), features=8)
DPT_SMALL = {"width": 128, "blocks": 8, "grid": 4, "channels": (8, 16, 32, 32), "features": 32}
DPT_LARGE = {"width": 1024, "blocks": 24, "grid": 24, "channels": (256, 512, 1024, 1024), "features": 256}


def raft_that_says(x, y):
    """RAFT by which everything moves by x, y pixels of 128x128 in the first iteration, whatever it sees."""
    model = raft.RAFT()
    head = model.update_block.flow_head.conv2
    head.weight.data.zero_()
    head.bias.data.copy_(torch.tensor([x / 8, y / 8]))
    return model


def sam_that_is_sure():
    """Segment Anything whose masks are random, but have sharp edges and are thought good."""
    model = sam.SAM(sam.CONFIGS["toy"])
    for name, p in model.named_parameters():
        p.data += (0.5 if "pos" in name else 0.05) * torch.randn(p.shape)
    for mlp in model.mask_decoder.output_hypernetworks_mlps:
        mlp.layers[-1].weight.data *= 1000
    model.mask_decoder.iou_prediction_head.layers[-1].bias.data += 3
    return model


def write_networks(folder, motion=0.0):
    """A file of each kind in the folder; by RAFT all moves by `motion` pixels of 128x128 to the right."""
    torch.manual_seed(0)
    torch.save(raft_that_says(motion, 0).state_dict(), folder / FILES["raft"])
    torch.save(sam_that_is_sure().state_dict(), folder / FILES["sam"])
    torch.save(midas.DPT(DPT).state_dict(), folder / FILES["midas"])


# --- MiDaS's dpt_large_384.pt at any width: its names and shapes, with random numbers ----------------


def published_shapes(width, blocks, grid, channels, features):
    """{name: shape} of dpt_large_384.pt, written down from isl-org/MiDaS (midas/dpt_depth.py, blocks.py, backbones/)
    and timm's VisionTransformer, of which vit_large_patch16_384 is one. Independent of midas.py."""
    D, C, f = width, channels, features
    layers = {  # name: (a weight's shape, has it a bias)
        "pretrained.model.patch_embed.proj": ((D, 3, 16, 16), True),
        "pretrained.model.norm": ((D,), True),
        "pretrained.model.head": ((1000, D), True),
        "pretrained.act_postprocess1.4": ((C[0], C[0], 4, 4), True),
        "pretrained.act_postprocess2.4": ((C[1], C[1], 2, 2), True),
        "pretrained.act_postprocess4.4": ((C[3], C[3], 3, 3), True),
        "scratch.output_conv.0": ((f // 2, f, 3, 3), True),
        "scratch.output_conv.2": ((32, f // 2, 3, 3), True),
        "scratch.output_conv.4": ((1, 32, 1, 1), True),
    }
    for i in range(blocks):
        for name, shape in (("norm1", (D,)), ("attn.qkv", (3 * D, D)), ("attn.proj", (D, D)),
                            ("norm2", (D,)), ("mlp.fc1", (4 * D, D)), ("mlp.fc2", (D, 4 * D))):
            layers[f"pretrained.model.blocks.{i}.{name}"] = shape, True
    for i in (1, 2, 3, 4):
        layers[f"pretrained.act_postprocess{i}.0.project.0"] = (D, 2 * D), True
        layers[f"pretrained.act_postprocess{i}.3"] = (C[i - 1], D, 1, 1), True
        layers[f"scratch.layer{i}_rn"] = (f, C[i - 1], 3, 3), False
        layers[f"scratch.refinenet{i}.out_conv"] = (f, f, 1, 1), True
        for unit in ("resConfUnit1.conv1", "resConfUnit1.conv2", "resConfUnit2.conv1", "resConfUnit2.conv2"):
            layers[f"scratch.refinenet{i}.{unit}"] = (f, f, 3, 3), True
    shapes = {"pretrained.model.cls_token": (1, 1, D), "pretrained.model.pos_embed": (1, grid * grid + 1, D)}
    for name, (shape, bias) in layers.items():
        shapes |= {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})
    return shapes


def random_tensors(shapes):
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=g)
        if ".norm" in name and name.endswith("weight"):
            tensors[name] = 1 + 0.1 * x
        else:
            tensors[name] = x.mul_(np.prod(shape[1:]) ** -0.5 if len(shape) in (2, 4) else 0.2)
    tensors["scratch.output_conv.4.bias"] += 3  # most of the picture above 0, where the last ReLU cuts
    return tensors


# --- A Segment Anything and a MiDaS that see something; a collage that clicks -----------------------

CLICK = "sam:40,60=0;90,30=0.5"


def tuned_sam():
    """A random one, tuned until its masks are neither empty nor full, differ by click, and are what it believes in."""
    torch.manual_seed(0)
    model = sam.SAM(sam.CONFIGS["toy"]).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        if "pos" in name:
            p.copy_(0.5 * torch.randn(p.shape))
        elif "norm" not in name and p.ndim > 1:
            p.copy_(torch.randn(p.shape) * p[0].numel() ** -0.5)
    decoder, last = model.mask_decoder, model.image_encoder.neck[3]
    last.weight *= 0.3
    for layer in decoder.transformer.layers:
        attention = layer.cross_attn_image_to_token
        attention.q_proj.weight *= 3  # places attend to clicks that are near,
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.out_proj.weight *= 0.3  # and remain different
    up1, _, _, up2, _ = decoder.output_upscaling
    for up in (up1, up2):  # smooth, or every mask is dots all over the picture
        up.weight.copy_(2 * up.weight.mean((2, 3), keepdim=True))
    up2.weight[:, 0], up2.bias[0] = 0, 3  # a channel that is 3 everywhere: its weight is a mask's bias
    for mlp in decoder.output_hypernetworks_mlps:
        mlp.layers[-1].weight *= 0.1  # large logits that clicks change a little: stable masks
        mlp.layers[-1].bias.copy_(5000 * torch.randn(mlp.layers[-1].bias.shape))
        mlp.layers[-1].bias[0] = 0
    decoder.iou_prediction_head.layers[-1].weight *= 0.1
    decoder.iou_prediction_head.layers[-1].bias[:] = 1
    points = [[[x, y]] for x in (20, 60, 100) for y in (20, 60, 100)]
    _, _, low_res = model.predict(model.encode(np.asarray(Image.open(MEADOW).convert("RGB"))), points)
    for n in range(3):
        decoder.output_hypernetworks_mlps[n + 1].layers[-1].bias[0] -= low_res[:, n].quantile(0.7) / 3
    return model


def write_tuned_networks(folder):
    torch.save(tuned_sam().state_dict(), folder / FILES["sam"])
    torch.save(random_tensors(published_shapes(**DPT_SMALL)), folder / FILES["midas"])
    return folder


def write_clicks(folder):
    """A collage that moves what is at a click, of a copy of the meadow beside it -> its file"""
    Image.open(MEADOW).convert("RGB").save(folder / "p.png")
    content = {"image": "p.png", "segments": [{"click": [40, 60], "edits": [{"translate": [9, 0]}]}]}
    (folder / "edits.json").write_text(json.dumps(content))
    return folder / "edits.json"
