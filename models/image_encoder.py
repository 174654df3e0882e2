"""Networks that make one vector of a whole picture: CLIP's vision transformer (2103.00020), and the toy world's.

    encoder.embed(x)        pictures (B, 3, H, W) in [-1, 1], of any size  ->  (B, config.projection)

Attribute names are Hugging Face's key names.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
from checkpoints.configs import read_sizes, refuse_other_options, write_sizes
from networks.blip import normalise

# ---------------------------------------------------------------------------------------------------------------------
# CLIP's


@dataclass(frozen=True)
class ImageConfig(clip.TextConfig):
    """The sizes of its layers are named as a text encoder's. A ViT-L/14 has 24 layers of 1024."""

    side: int = 224  # pixels
    patch: int = 14  # pixels along a side


class ImageEncoder(nn.Module):
    """CLIP's vision transformer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.width
        m = self.vision_model = nn.Module()
        m.embeddings = nn.Module()
        m.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
        m.embeddings.patch_embedding = nn.Conv2d(3, width, config.patch, config.patch, bias=False)
        m.embeddings.position_embedding = nn.Embedding((config.side // config.patch) ** 2 + 1, width)
        m.pre_layrnorm = nn.LayerNorm(width)  # the published name
        m.encoder = nn.Module()
        m.encoder.layers = nn.ModuleList(clip.Layer(config) for _ in range(config.layers))
        for layer in m.encoder.layers:
            layer.self_attn.causal = False
        m.post_layernorm = nn.LayerNorm(width)
        self.visual_projection = nn.Linear(width, config.projection, bias=False)

    def embed(self, x):
        """As above"""
        return self(normalise(x, self.config.side).to(self.visual_projection.weight))

    def forward(self, x):
        """x (B, 3, side, side), of `normalise` -> (B, projection)"""
        m = self.vision_model
        x = m.embeddings.patch_embedding(x).flatten(2).mT
        x = torch.cat([m.embeddings.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = m.pre_layrnorm(x + m.embeddings.position_embedding.weight)
        for layer in m.encoder.layers:
            x = layer(x)
        return self.visual_projection(m.post_layernorm(x[:, 0]))


IMAGE_KEYS = {
    "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "mlp_width": "intermediate_size", "activation": "hidden_act", "projection": "projection_dim", "side": "image_size",
    "patch": "patch_size",
}
IMAGE_OPTIONS = {"num_channels": 3, "attention_dropout": 0.0, "layer_norm_eps": 1e-5}


def image_config_from_json(c):
    """The content of the config.json of transformers' CLIPVisionModelWithProjection, or CLIPModel -> ImageConfig"""
    c = {"projection_dim": 768, "image_size": 224, "hidden_act": "quick_gelu"} | c.get("vision_config", {}) | c
    refuse_other_options(c, IMAGE_OPTIONS)
    return ImageConfig(**read_sizes(c, IMAGE_KEYS))


def image_config_to_json(config):
    kind = {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model"}
    return kind | write_sizes(config, IMAGE_KEYS) | IMAGE_OPTIONS


# ---------------------------------------------------------------------------------------------------------------------
# The toy world's, which is its captioner as well: toy/captions.py


@dataclass(frozen=True)
class ToyImageConfig:
    projection: int
    channels: tuple = (24, 48, 96)  # of its levels, each of half the side
    layers: int = 2  # convolutions per level
    hidden: int = 128
    side: int = 64  # pixels
    groups: int = 8


class ToyImageEncoder(nn.Module):
    """Convolutions, the largest value of each column, which keeps left and right apart, and two linear layers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = 3
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for wider in config.channels:
            for i in range(config.layers):
                self.convolutions.append(nn.Conv2d(width, wider, 3, 1 if i else 2, 1))
                self.norms.append(nn.GroupNorm(config.groups, wider))
                width = wider
        columns = config.side >> len(config.channels)
        self.hidden = nn.Linear(width * columns, config.hidden)
        self.projection = nn.Linear(config.hidden, config.projection)

    def embed(self, x):
        """As above"""
        x = F.interpolate(x.float(), (self.config.side, self.config.side), mode="area")
        return self(x.to(self.projection.weight))

    def forward(self, x):
        """x (B, 3, side, side) in [-1, 1] -> (B, projection)"""
        for convolution, norm in zip(self.convolutions, self.norms):
            x = F.silu(norm(convolution(x)))
        x = x.amax(2).flatten(1)  # (B, width * columns)
        return self.projection(F.silu(self.hidden(x)))


def toy_image_config_from_json(c):
    c = dict(c)
    if c.pop("_class_name", None) != "ToyImageEncoder":
        raise ValueError("this is no image encoder of the toy world")
    return ToyImageConfig(**c | {"channels": tuple(c["channels"])})


def toy_image_config_to_json(config):
    return {"_class_name": "ToyImageEncoder"} | asdict(config)
