"""The autoencoder of Stable Diffusion: pictures to latents, an eighth of the size, and back.

Rombach et al. 2022, section 3.1, with a KL-regularised bottleneck. Attribute names are Hugging
Face's key names, so that loading is `load_state_dict`.

    x (B, 3, H, W) in [-1, 1]  --encode-->  mean, logvar (B, C, H/8, W/8)
    z (B, C, h, w)             --decode-->  x (B, 3, 8h, 8w)

These latents are unscaled. A diffusion model works with latents times `config.scaling_factor`, of
about unit variance: `encode_scaled` multiplies, `decode_scaled` divides, and nothing else does.
They also take pictures of any size: what would need too much memory goes through in tiles.
"""

import math
import warnings
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

# Bytes, a VAE's `memory` unless set: Stable Diffusion's decodes 1182 x 1182 pixels in float32.
MEMORY = 4 * 2**30


@dataclass(frozen=True)
class VAEConfig:
    channels: tuple = (128, 256, 512, 512)  # per level, from the full resolution down
    layers: int = 2  # residual blocks per level in the encoder; the decoder has one more
    latent_channels: int = 4
    groups: int = 32  # of every GroupNorm
    scaling_factor: float = 0.18215  # 1 / the standard deviation of the latents
    size: int = field(default=512, compare=False)  # pixels along a side of its training pictures

    @property
    def factor(self):
        """Pixels per latent pixel, along one side."""
        return 2 ** (len(self.channels) - 1)


# --------------------------------------------------------------------------------------------------
# Blocks


class ResnetBlock(nn.Module):
    """Two convolutions and a skip, 1x1 where the width changes."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        """x (B, c_in, h, w) -> (B, c_out, h, w)"""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Self-attention of every latent pixel to every other, one head of the full width."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        """x (B, c, h, w) -> (B, c, h, w)"""
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, h w, c)
        q = self.to_q(h)[:, None]  # (B, 1, h w, c)
        k = self.to_k(h)[:, None]
        v = self.to_v(h)[:, None]
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """(B, c, H, W) -> (B, c, H/2, W/2). It pads on the right and below only, as the published
    weights were trained."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, c, H, W) -> (B, c, 2H, 2W): nearest neighbour, then a convolution that smooths steps."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then a step to the next resolution where there is one."""

    def __init__(self, c_in, c_out, layers, groups, down=False, up=False):
        super().__init__()
        widths_in = [c_in] + [c_out] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(c, c_out, groups) for c in widths_in)
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if up else [])

    def forward(self, x):
        for block in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = block(x)
        return x


class Middle(nn.Module):
    """The lowest resolution: the only place where distant pixels meet."""

    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)])
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x):
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


# --------------------------------------------------------------------------------------------------
# The network


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        ch = cfg.channels
        self.conv_in = nn.Conv2d(3, ch[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip((ch[0], *ch), ch)):
            down = i < len(ch) - 1
            self.down_blocks.append(Level(c_in, c_out, cfg.layers, cfg.groups, down=down))
        self.mid_block = Middle(ch[-1], cfg.groups)
        self.conv_norm_out = nn.GroupNorm(cfg.groups, ch[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(ch[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x):
        """x (B, 3, H, W) -> (B, 2C, H/8, W/8)"""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        ch = cfg.channels[::-1]  # from the lowest resolution up
        self.conv_in = nn.Conv2d(cfg.latent_channels, ch[0], 3, padding=1)
        self.mid_block = Middle(ch[0], cfg.groups)
        self.up_blocks = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip((ch[0], *ch), ch)):
            up = i < len(ch) - 1
            self.up_blocks.append(Level(c_in, c_out, cfg.layers + 1, cfg.groups, up=up))
        self.conv_norm_out = nn.GroupNorm(cfg.groups, ch[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(ch[-1], 3, 3, padding=1)

    def forward(self, z):
        """z (B, C, h, w) -> (B, 3, 8h, 8w)"""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """The autoencoder for a `VAEConfig`: two networks, and no forward."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.memory = MEMORY  # bytes of activations; pictures that would take more go in tiles
        C = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1)
        self.post_quant_conv = nn.Conv2d(C, C, 1)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> mean, logvar, each (B, C, H/8, W/8), unscaled.

        The posterior is the diagonal Gaussian q(z|x) = N(mean, exp(logvar)). H and W are multiples
        of `config.factor`, or it is a ValueError.
        """
        f = self.config.factor
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % f or x.shape[3] % f:
            wanted = f"(B, 3, H, W) with H, W multiples of {f}"
            raise ValueError(f"the autoencoder takes {wanted}, not {tuple(x.shape)}")
        return self.split_moments(self.quant_conv(self.encoder(x)))

    def split_moments(self, moments):
        """(B, 2C, h, w) -> mean, logvar"""
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # exp(logvar / 2) is finite in every precision

    def decode(self, z):
        """z (B, C, h, w), unscaled -> (B, 3, 8h, 8w), about [-1, 1] but not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def encode_scaled(self, x):
        """x as for `encode`, on any device -> z (B, C, h, w), float32, scaled: the posterior's
        mean, which is repeatable."""
        mean = self.run_finite(lambda x: self.encode(x)[0], x, self.config.factor, 1)
        return mean.float() * self.config.scaling_factor

    def decode_scaled(self, z):
        """z (B, C, h, w), scaled -> (B, 3, 8h, 8w), float32, about [-1, 1] but not clamped."""
        z = z / self.config.scaling_factor
        return self.run_finite(self.decode, z, 1, self.config.factor).float()

    def run_finite(self, f, x, factor_in, factor_out):
        """f(x) in the weights' precision; the factors are a and b of `run_in_tiles`.

        Some published autoencoders overflow in half precision. Then all of it goes over to single
        precision for good, with a warning.
        """
        weight = self.quant_conv.weight
        x = x.to(weight.device, weight.dtype)
        y = self.run_in_parts(f, x, factor_in, factor_out)
        if weight.dtype == torch.float32 or y.isfinite().all() or not x.isfinite().all():
            return y
        warnings.warn(f"the autoencoder overflows in {weight.dtype}: it goes on in single "
                      "precision", stacklevel=3)
        return self.float().run_finite(f, x, factor_in, factor_out)

    def estimate_bytes(self):
        """The bytes per pixel of all tensors that `encode`, and `decode`, have at one time.

        Most are alive in a ResnetBlock at full resolution, just after a silu: the level's input, x,
        h, norm and silu of h; in the decoder the level's input has the next level's width. Weights
        and workspaces are not counted, nor attention's where PyTorch has no fused kernel for it.
        """
        channels = self.config.channels
        width, wider = channels[0], channels[min(1, len(channels) - 1)]
        size = self.quant_conv.weight.element_size()
        return 5 * width * size, (4 * width + wider) * size

    def run_in_parts(self, f, x, factor_in, factor_out):
        """f(x), of as many pictures at a time as `memory` allows; or of one, in tiles.

        The factors are a and b of `run_in_tiles`.
        """
        factor = self.config.factor
        encode, decode = self.estimate_bytes()
        bytes_per_pixel = encode if factor_in > factor_out else decode
        most = self.memory / (bytes_per_pixel * factor**2)  # latent pixels at one time
        area = math.ceil(x[:1, :1].numel() / factor_in**2)  # of a picture, in latent pixels
        if area <= most:
            return torch.cat([f(part) for part in x.split(int(most / area))])
        # A tile no smaller than the training pictures has statistics that the network is used to.
        side = max(1, self.config.size // factor, math.isqrt(int(most)))
        tiles = side, side // 4, factor_in, factor_out
        return torch.cat([run_in_tiles(f, one, *tiles) for one in x.split(1)])


# --------------------------------------------------------------------------------------------------
# Tiles
#
# They are exact for a network that takes each place by itself. The autoencoder's GroupNorms and
# attention see a tile only, so that the result is a little off, in each tile by another little.


def run_in_tiles(f, x, side, overlap, a, b):
    """f(x) from tiles of x, each fading into the next where they overlap.

    f              (B, C, a h, a w) -> (B, K, b h, b w): an encoder has a, b = 8, 1, a decoder 1, 8
    side, overlap  of the tiles, in h and w; `overlap` is the least
    """
    H, W = x.shape[2:]
    out = None
    for rows, rows_out, v in cut_tiles(H, side, overlap, a, b):
        for columns, columns_out, u in cut_tiles(W, side, overlap, a, b):
            y = f(x[:, :, rows, columns])
            if out is None:
                out = torch.zeros(*y.shape[:2], H // a * b, W // a * b, device=y.device)
            out[:, :, rows_out, columns_out] += y * (v[:, None] * u).to(y.device)
    return out.to(y.dtype)


def cut_tiles(pixels, side, overlap, a, b):
    """Tiles along one side of x -> of each: pixels of x, pixels of f(x), the latter's weights.

    All have one size, so that kernels are chosen once. A pixel's weights add up to 1.
    """
    # Spread n tiles evenly from edge to edge. (Of pixels that a does not divide, f refuses a tile.)
    length = math.ceil(pixels / a)
    side = min(side, length)
    n = 1 + math.ceil((length - side) / max(1, side - overlap))
    starts = [i * (length - side) // max(1, n - 1) for i in range(n)]

    # A tile takes over from the one before: from 0 to 1, straight, over what the two share.
    p = (torch.arange(length * b) + 0.5) / b
    taken = [torch.ones_like(p)]
    for before, start in zip(starts, starts[1:]):
        taken.append(((p - start) / (before + side - start)).clamp(0, 1))
    taken.append(torch.zeros_like(p))

    # Its weight is what it has taken over, less what the next tile has taken from it.
    for k, start in enumerate(starts):
        here = slice(a * start, a * (start + side))
        there = slice(b * start, b * (start + side))
        yield here, there, (taken[k] - taken[k + 1])[there]


# --------------------------------------------------------------------------------------------------
# Configurations

CONFIGS = {
    "sd": VAEConfig(),  # Stable Diffusion 1.x and 2.x
    "sdxl": VAEConfig(scaling_factor=0.13025),
    "toy": VAEConfig(
        channels=(16, 48, 128), layers=1, latent_channels=8, groups=8, scaling_factor=1.0, size=128
    ),
}
