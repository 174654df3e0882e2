"""The autoencoder of Stable Diffusion: pixels in [-1, 1] <-> a latent 8 times smaller on each side.

Rombach et al. 2022, *High-Resolution Image Synthesis with Latent Diffusion Models*, section 3.1, with a KL-regularised
bottleneck. Attribute names are the Hugging Face checkpoint's key names, so that loading is `load_state_dict`.

    x  (B, 3, H, W)  --encode-->  mean, logvar  (B, C, H/8, W/8)        z  (B, C, h, w)  --decode-->  (B, 3, 8h, 8w)

Latents here are *unscaled*; the diffusion model sees them times `config.scaling_factor`, which brings them to about
unit variance. `sd.StableDiffusion.encode_image` and `.decode` do that multiplication, and nothing else does.
A picture that would take too much memory goes through in overlapping tiles: `encode_any_size`, `decode_any_size`.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

MEMORY = 4 * 2**30  # bytes, a VAE's `memory` if nobody sets it: Stable Diffusion's decodes 1182 x 1182 pixels in fp32


@dataclass(frozen=True)
class VAEConfig:
    channels: tuple = (128, 256, 512, 512)  # per level, from the full resolution down
    layers: int = 2  # residual blocks per level in the encoder; the decoder has one more
    latent_channels: int = 4
    groups: int = 32  # of every GroupNorm
    scaling_factor: float = 0.18215  # 1 / the standard deviation of the latents
    size: int = field(default=512, compare=False)  # pixels along a side of what it was trained on; it takes any

    @property
    def factor(self):
        """Pixels per latent pixel, along one side."""
        return 2 ** (len(self.channels) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the skip where the width changes."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Self-attention of every latent pixel to every other, one head of the full width."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, h w, c)
        h = F.scaled_dot_product_attention(*(p(h)[:, None] for p in (self.to_q, self.to_k, self.to_v)))[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Half the side. The padding is on the right and below only, as the published weights were trained."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side: nearest neighbour, then a convolution that smooths the steps."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then a step to the next resolution where there is one."""

    def __init__(self, c_in, c_out, layers, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers))
        if down:
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x):
        for block in (*self.resnets, *getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = block(x)
        return x


class Middle(nn.Module):
    """The lowest resolution: the only place where distant pixels meet."""

    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)])
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


# ---------------------------------------------------------------------------------------------------------------------
# Encoder, decoder


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 2C, H/8, W/8)"""

    def __init__(self, cfg):
        super().__init__()
        ch, last = cfg.channels, len(cfg.channels) - 1
        self.conv_in = nn.Conv2d(3, ch[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(ch[max(i - 1, 0)], ch[i], cfg.layers, cfg.groups, down=i < last) for i in range(len(ch))
        )
        self.mid_block = Middle(ch[-1], cfg.groups)
        self.conv_norm_out = nn.GroupNorm(cfg.groups, ch[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(ch[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """(B, C, h, w) -> (B, 3, 8h, 8w)"""

    def __init__(self, cfg):
        super().__init__()
        ch, last = cfg.channels[::-1], len(cfg.channels) - 1  # from the lowest resolution up
        self.conv_in = nn.Conv2d(cfg.latent_channels, ch[0], 3, padding=1)
        self.mid_block = Middle(ch[0], cfg.groups)
        self.up_blocks = nn.ModuleList(
            Level(ch[max(i - 1, 0)], ch[i], cfg.layers + 1, cfg.groups, up=i < last) for i in range(len(ch))
        )
        self.conv_norm_out = nn.GroupNorm(cfg.groups, ch[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(ch[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """The autoencoder for a `VAEConfig`. `encode` and `decode` are the two halves; there is no forward."""

    def __init__(self, config):
        super().__init__()
        self.config, self.memory = config, MEMORY
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1], H and W multiples of `config.factor` -> mean, logvar, each (B, C, H/8, W/8).

        The posterior is the diagonal Gaussian q(z|x) = N(mean, exp(logvar)). Unscaled. The logarithm is clamped to
        [-30, 20], where the standard deviation exp(logvar / 2) is finite in every precision.
        """
        f = self.config.factor
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"the autoencoder takes (B, 3, H, W) with H, W multiples of {f}, not {tuple(x.shape)}")
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z (B, C, h, w), unscaled -> (B, 3, 8h, 8w), about [-1, 1] but not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def encode_any_size(self, x):
        """`encode` in about `memory` bytes: what would take more goes in parts of the batch, or a picture in tiles."""
        f = self.config.factor
        return self.in_parts(lambda x: torch.cat(self.encode(x), 1), x, f, 1).chunk(2, dim=1)

    def decode_any_size(self, z):
        """`decode` in about `memory` bytes, likewise."""
        return self.in_parts(self.decode, z, 1, self.config.factor)

    def bytes_per_pixel(self):
        """What `encode` and `decode` have in tensors at one time, estimated, without weights and workspaces. (The
        largest is attention's where PyTorch has no fused kernel for it: the number of latent pixels, squared.)"""
        # They are widest in a ResnetBlock at full resolution, when silu has just been made of a norm. In the encoder
        # there are then what the level began with, x, h, norm and silu of h, all c wide. In the decoder the same, but
        # what its level began with is as wide as the level below; or, in its first block, that, norm and silu of that.
        c, below, size = self.config.channels[0], self.config.channels[:2][-1], self.quant_conv.weight.element_size()
        return 5 * c * size, max(below + 4 * c, 3 * below) * size

    def in_parts(self, f, x, a, b):
        """f(x), as a whole if `memory` allows. a, b as in `tiled`."""
        factor, picture = self.config.factor, x[:1, :1].numel() // a**2  # in latent pixels, as what follows
        most = self.memory / (self.bytes_per_pixel()[b > a] * factor**2)
        if len(x) * picture <= most:
            return f(x)
        if len(x) > 1:
            return torch.cat([self.in_parts(f, part, a, b) for part in x.split(max(1, int(most / picture)))])
        side = max(1, self.config.size // factor, math.isqrt(int(most)))  # the larger, the nearer to the whole
        return tiled(f, x, side, side // 4, a, b)


def tiled(f, x, side, overlap, a, b):
    """f(x) from tiles of x, each fading into the next where they overlap.

    f              makes (B, K, b h, b w) of (B, C, a h, a w): for an encoder a, b are 8, 1, for a decoder 1, 8
    side, overlap  of the tiles, in h and w. Spread evenly from edge to edge, they overlap by at least so much

    Exact for an f that takes each of the h w places by itself. The autoencoder does not: the mean and variance in its
    GroupNorms are those of a tile, and attention looks around in a tile, so that the result is a little off, by another
    little in each tile. A tile no smaller than the pictures trained on has the statistics that the network is used to.
    """
    out = None
    for rows, rows_out, v in cuts(x.shape[2], side, overlap, a, b):
        for columns, columns_out, u in cuts(x.shape[3], side, overlap, a, b):
            y = f(x[:, :, rows, columns])
            if out is None:
                out = torch.zeros(*y.shape[:2], *(n // a * b for n in x.shape[2:]), device=y.device)
            out[:, :, rows_out, columns_out] += y * (v[:, None] * u).to(y.device)
    return out.to(y.dtype)


def cuts(pixels, side, overlap, a, b):
    """Tiles along one side of x -> for each the pixels of x, the pixels of f(x), and their weights, whose sum is 1.

    All tiles have one size, so that kernels are chosen once: the last one is not narrower, but overlaps more.
    """
    length = math.ceil(pixels / a)  # where that is not exact, f is given a wrong size, and says so
    side = min(side, length)
    n = 1 + math.ceil((length - side) / max(1, side - overlap))
    starts = [i * (length - side) // max(1, n - 1) for i in range(n)]
    p = (torch.arange(length * b) + 0.5) / b
    # How far each has taken over from the one before, from 0 to 1 over what they share; less how far the next one has.
    taken = [((p - i) / (before + side - i)).clamp(0, 1) for before, i in zip(starts, starts[1:])]
    weights = -torch.stack([torch.ones_like(p), *taken, torch.zeros_like(p)]).diff(dim=0)
    for i, w in zip(starts, weights):
        yield slice(a * i, a * (i + side)), slice(b * i, b * (i + side)), w[b * i : b * (i + side)]


# ---------------------------------------------------------------------------------------------------------------------
# Configurations

CONFIGS = {
    "sd": VAEConfig(),  # Stable Diffusion 1.x and 2.x
    "sdxl": VAEConfig(scaling_factor=0.13025),
    "toy": VAEConfig(channels=(16, 32, 96, 128), layers=1, latent_channels=12, groups=8, scaling_factor=1.0, size=128),
}
