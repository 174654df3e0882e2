"""MiDaS DPT-Large: inverse depth from one photo. Ranftl et al. 2021, arXiv 2103.13413.

A vision transformer cuts the picture into patches of 16x16 pixels. What it knows of them after each quarter of its
blocks is *reassembled* into a feature map, the earlier the finer, and *fused* from coarse to fine:

    blocks 6, 12, 18, 24  ->  tokens (B, 1 + hw, D)  --reassemble-->  (B, C_s, H/s, W/s), s = 4, 8, 16, 32
    refinenet 4, 3, 2, 1  ->  (B, F, H/2, W/2)       --output_conv-->  inverse depth (B, H, W)

    model = published.load("midas", "dpt_large_384.pt")
    d = depth(model, image)                        (H, W), larger = nearer, up to an unknown scale and shift

Attribute names are the published file's key names, so that loading is `load_state_dict`.
"""

import math
import re
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

PATCH = 16  # pixels along a patch's side
HEAD_WIDTH = 64  # channels of one attention head, as in every ViT of Dosovitskiy et al. 2021 but the smallest


@dataclass(frozen=True)
class DPTConfig:
    """DPT-Large is the default; any width can be read off a file."""

    width: int = 1024  # D of a token
    blocks: int = 24
    grid: int = 24  # patches along the side of the pictures that it was trained on: 384 pixels
    channels: tuple = (256, 512, 1024, 1024)  # C_s of the reassembled maps, from fine to coarse
    features: int = 256  # F of the fusion


# ---------------------------------------------------------------------------------------------------------------------
# The vision transformer


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, 64)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    """Pictures (B, 3, H, W) -> the tokens after each quarter of the blocks, four of (B, 1 + hw, D)."""

    def __init__(self, config):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, config.width, PATCH, stride=PATCH)})
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(config.blocks))

    def position(self, h, w):
        """What was learned for a square grid, at h x w patches -> (1, 1 + hw, D), the first token's first."""
        readout, grid = self.pos_embed.split([1, self.pos_embed.shape[1] - 1], dim=1)
        side = math.isqrt(grid.shape[1])
        grid = grid.transpose(1, 2).unflatten(2, (side, side))
        grid = F.interpolate(grid, (h, w), mode="bilinear", align_corners=False)
        return torch.cat([readout, grid.flatten(2).transpose(1, 2)], 1)

    def forward(self, x):
        x = self.patch_embed["proj"](x)  # (B, D, h, w)
        position = self.position(*x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + position
        taken = []
        for i, block in enumerate(self.blocks, 1):
            x = block(x)
            if i * 4 % len(self.blocks) == 0:
                taken.append(x)
        return taken


# ---------------------------------------------------------------------------------------------------------------------
# Reassemble and fuse


class Reassemble(nn.ModuleDict):
    """Tokens (B, 1 + hw, D) -> a map of C channels, at h x w patches times the factor of `resize`, a layer."""

    def __init__(self, width, channels, resize):
        project = nn.Sequential(nn.Linear(2 * width, width), nn.GELU())
        super().__init__({"0": nn.ModuleDict({"project": project}), "3": nn.Conv2d(width, channels, 1), "4": resize})

    def forward(self, tokens, h, w):
        readout, places = tokens[:, :1], tokens[:, 1:]  # Read_proj: each reads the first one, which stands for no place
        x = self["0"]["project"](torch.cat([places, readout.expand_as(places)], 2)).transpose(1, 2).unflatten(2, (h, w))
        return self["4"](self["3"](x))


class ResidualConvUnit(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.conv1(x.relu()).relu())


class FeatureFusionBlock(nn.Module):
    """The coarser path x and this scale's own map, both (B, F, h, w) -> (B, F, 2h, 2w). The coarsest has only a map."""

    def __init__(self, features, coarsest=False):
        super().__init__()
        self.resConfUnit1 = None if coarsest else ResidualConvUnit(features)
        self.resConfUnit2 = ResidualConvUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x, own=None):
        x = x if own is None else x + self.resConfUnit1(own)
        # The paper enlarges first. A 1x1 convolution and an interpolation may trade places, and here it has less to do.
        return double_size(self.out_conv(self.resConfUnit2(x)))


def double_size(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class DPT(nn.Module):
    """The whole network, from a DPTConfig. published.load makes one with weights."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        c, features = config.channels, config.features
        self.pretrained = nn.Module()
        self.pretrained.model = ViT(config)
        resize = (
            nn.ConvTranspose2d(c[0], c[0], 4, stride=4), nn.ConvTranspose2d(c[1], c[1], 2, stride=2), nn.Identity(),
            nn.Conv2d(c[3], c[3], 3, stride=2, padding=1),
        )
        self.scratch = nn.Module()
        for i in (1, 2, 3, 4):  # from fine to coarse
            setattr(self.pretrained, f"act_postprocess{i}", Reassemble(config.width, c[i - 1], resize[i - 1]))
            setattr(self.scratch, f"layer{i}_rn", nn.Conv2d(c[i - 1], features, 3, padding=1, bias=False))
            setattr(self.scratch, f"refinenet{i}", FeatureFusionBlock(features, coarsest=i == 4))
        self.scratch.output_conv = nn.Sequential(
            nn.Conv2d(features, features // 2, 3, padding=1),
            nn.UpsamplingBilinear2d(scale_factor=2),  # with its corners aligned, as in `double_size`
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 1, 1), nn.ReLU(),
        )

    def forward(self, x):
        """Pictures (B, 3, H, W) in [-1, 1], sides multiples of 32 -> inverse depth (B, H, W), 0 or more, no unit.

        ValueError for other sides, at which the scales would not be twice each other.
        """
        H, W = x.shape[2:]
        if H % 32 or W % 32:
            raise ValueError(f"DPT takes pictures whose sides are multiples of 32 pixels, not {W}x{H}")
        own = []
        for i, tokens in enumerate(self.pretrained.model(x), 1):
            maps = getattr(self.pretrained, f"act_postprocess{i}")(tokens, H // PATCH, W // PATCH)
            own.append(getattr(self.scratch, f"layer{i}_rn")(maps))  # (B, F, H/s, W/s)
        path = self.scratch.refinenet4(own[3])
        for i in (3, 2, 1):
            path = getattr(self.scratch, f"refinenet{i}")(path, own[i - 1])
        return self.scratch.output_conv(path)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# What a file's names and shapes say


# The file holds these tensors too, and nothing reads them: the end of the classifier that the transformer once was, and
# the part of the coarsest fusion that would take in a coarser path.
UNUSED = re.compile(r"pretrained\.model\.(norm|head)\..*|scratch\.refinenet4\.resConfUnit1\..*")


def config_from_shapes(shapes):
    """{key: shape} of a published file -> DPTConfig. KeyError names a tensor that is not there, ValueError says what
    does not make a transformer."""
    width = shapes["pretrained.model.pos_embed"][2]
    blocks = {k.split(".")[3] for k in shapes if k.startswith("pretrained.model.blocks.")}
    grid = math.isqrt(shapes["pretrained.model.pos_embed"][1] - 1)
    if width % HEAD_WIDTH or not blocks or len(blocks) % 4:
        raise ValueError(f"{len(blocks)} blocks of width {width} are not four quarters of whole heads")
    channels = tuple(shapes[f"pretrained.act_postprocess{i}.3.weight"][0] for i in (1, 2, 3, 4))
    return DPTConfig(width, len(blocks), grid, channels, shapes["scratch.layer1_rn.weight"][0])


def rename(name):
    """A tensor's name in the file -> its name here, which is the same; None for one that is not used"""
    return None if UNUSED.fullmatch(name) else name


# ---------------------------------------------------------------------------------------------------------------------
# A picture's depth


def fit_size(width, height, side):
    """The size at which the network sees a picture: about its aspect, in multiples of 32, and one side is `side`.

    Of the two possible scales it is the one nearer to 1, as released ('minimal'), and no side is below 32."""
    scale = min(side / height, side / width, key=lambda s: abs(1 - s))
    return tuple(max(32, round(scale * x / 32) * 32) for x in (width, height))


@torch.no_grad()
def depth(model, image):
    """image (H, W, 3) uint8 RGB -> inverse depth (H, W), float32, on the CPU: larger = nearer.

    Its scale and shift are unknown: it compares places within a picture, and is no distance. It can be a little below
    0, where the bicubic enlargement overshoots.
    """
    H, W = image.shape[:2]
    weight = model.scratch.output_conv[0].weight
    size = fit_size(W, H, PATCH * model.config.grid)
    x = cv2.resize(image.astype(np.float32) / 255, size, interpolation=cv2.INTER_CUBIC)
    x = torch.from_numpy((x - 0.5) / 0.5).permute(2, 0, 1)[None].to(weight)
    d = model(x).float().cpu()[:, None]
    return F.interpolate(d, (H, W), mode="bicubic", align_corners=False)[0, 0]
