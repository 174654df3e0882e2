"""MiDaS's dpt_large_384.pt at any width: its names and shapes, with random numbers."""

import numpy as np
import torch

SMALL = {"width": 128, "blocks": 8, "grid": 4, "channels": (8, 16, 32, 32), "features": 32}
LARGE = {"width": 1024, "blocks": 24, "grid": 24, "channels": (256, 512, 1024, 1024), "features": 256}


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
