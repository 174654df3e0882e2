"""MOVQ, the autoencoder of Kandinsky 2.2: Zheng et al. 2022, arXiv 2209.09002. It is that of vae.py, but

    attention   follows every residual block at the lowest resolution, not one of them
    encoder     gives the latent, without a variance. Training rounded latents to a codebook, `quantize.*` in its file;
                Kandinsky's diffusion model reads and writes them as they are, and unscaled
    decoder     looks at the latent in every norm
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import vae
from checkpoints.configs import VAE_OPTIONS, refuse_other_options

GROUPS = 32  # of the decoder's norms, whatever the encoder has


class SpatialNorm(nn.Module):
    """Equation 5: what is normalised is scaled and shifted by the latent, place by place."""

    z = None  # (B, C, h, w), which `MOVQ.decode` shows to all norms

    def __init__(self, c, latent_channels):
        super().__init__()
        self.norm_layer = nn.GroupNorm(GROUPS, c, eps=1e-6)
        self.conv_y = nn.Conv2d(latent_channels, c, 1)
        self.conv_b = nn.Conv2d(latent_channels, c, 1)

    def forward(self, x):
        """x (B, c, .., ..), at any resolution -> the same"""
        # A convolution of one pixel commutes with nearest neighbours, and is cheaper before them.
        scale, shift = (F.interpolate(conv(self.z), x.shape[2:]) for conv in (self.conv_y, self.conv_b))
        return self.norm_layer(x) * scale + shift


class AttentiveLevel(nn.Module):
    """A vae.Level, with an attention behind each of its residual blocks."""

    def __init__(self, level, c, groups):
        super().__init__()
        self.resnets = level.resnets
        self.attentions = nn.ModuleList(vae.Attention(c, groups) for _ in level.resnets)
        self.upsamplers = level.upsamplers

    def forward(self, x):
        for resnet, attention in zip(self.resnets, self.attentions):
            x = attention(resnet(x))
        for step in self.upsamplers:
            x = step(x)
        return x


class MOVQ(vae.VAE):
    """The network for a `VAEConfig`. Names are Hugging Face's, but for `spatial_norm`, which is `group_norm` here."""

    def __init__(self, config):
        super().__init__(config)
        C, lowest = config.latent_channels, config.channels[-1]
        self.encoder.conv_out = nn.Conv2d(lowest, C, 3, padding=1)
        self.quant_conv = nn.Conv2d(C, C, 1)
        for levels, i in ((self.encoder.down_blocks, -1), (self.decoder.up_blocks, 0)):
            levels[i] = AttentiveLevel(levels[i], lowest, config.groups)
        for block in list(self.decoder.modules()):
            for name, norm in list(block.named_children()):
                if isinstance(norm, nn.GroupNorm):
                    setattr(block, name, SpatialNorm(norm.num_channels, C))

    def split_moments(self, moments):
        return moments, torch.full_like(moments, -30)

    def decode(self, z):
        norms = [m for m in self.decoder.modules() if isinstance(m, SpatialNorm)]
        for norm in norms:
            norm.z = z
        x = super().decode(z)
        for norm in norms:
            norm.z = None
        return x


def config_from_json(c):
    """The content of the config.json of diffusers' VQModel -> VAEConfig. Errors as in checkpoints/configs.py."""
    channels = tuple(c["block_out_channels"])
    plain = len(channels) - 1
    options = {name: VAE_OPTIONS[name] for name in ("act_fn", "in_channels", "out_channels", "mid_block_add_attention")}
    refuse_other_options(c, options | {
        "_class_name": "VQModel", "norm_type": "spatial", "vq_embed_dim": c["latent_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * plain + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * plain,
    })
    return vae.VAEConfig(channels, c["layers_per_block"], c["latent_channels"], c.get("norm_num_groups", 32), 1.0)
