"""The denoising UNet of Stable Diffusion 1.x, 2.x, inpainting and XL, and the toy one, from one small configuration.

Rombach et al. 2022, section 3.3 and figure 3; Podell et al. 2023 (XL). Attribute names are the Hugging Face
checkpoint's key names, so that loading is `load_state_dict`.

    z (B, C, h, w), t (B,), context (B, L, D)  -->  (B, C_out, h, w)      the predicted noise, or velocity

One path through the network serves three uses. The second attention of every transformer block reads keys and values
that are made from `context` *before* the network runs (`UNet.keys_values`): for a prompt they do not change over the
sampling steps, so a sampler makes them once and passes them instead of the context. Where keys and values come from is
not the block's business, which is what Magic Fixup needs: there they come from another UNet. And `taps`, a list, is
filled with each block's input to its self-attention, which is what that other UNet is asked for (`UNet.features`).
What the time adds to every residual block is made ahead likewise, for all steps at once (`UNet.times`).
"""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 4  # 9 for inpainting: latent, mask, latent of the masked image
    out_channels: int = 4
    channels: tuple = (320, 640, 1280, 1280)  # per level, from the full resolution down
    layers: int = 2  # residual blocks per level on the way down; one more on the way up
    depth: tuple = (1, 1, 1, 0)  # transformer blocks after each residual block, per level; 0 = none
    mid_depth: int = 1  # the same at the bottom
    heads: int | None = 8  # attention heads, the same at every width (SD 1) ...
    head_width: int | None = None  # ... or as many heads of this width as fit (SD 2, XL)
    # What the second attention reads: states of this width D, a text encoder's; None: features as wide as the block
    # itself, from another UNet; 0: nothing, there is no second attention.
    context: int | None = 768
    linear_proj: bool = False  # tokens are projected by a linear layer (SD 2, XL) or by a 1x1 convolution (SD 1)
    groups: int = 32  # of every GroupNorm
    added: int = 0  # width of XL's vector of pooled text and picture sizes, joined to the time embedding; 0 = none

    def heads_at(self, width):
        return self.heads or width // self.head_width


# ---------------------------------------------------------------------------------------------------------------------
# Time


def timestep_embedding(t, width):
    """t (B,) in 0 .. T-1 -> (B, width): cosines, then sines, of t at frequencies from 1 down to 1/10000. fp32."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Embedding(nn.Module):
    """Two layers from an embedding of time (or of XL's sizes) to what every residual block adds."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(c_in, c_out), nn.Linear(c_out, c_out)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class ResnetBlock(nn.Module):
    """Two convolutions, the time embedding added between them, with a 1x1 convolution on the skip of another width."""

    def __init__(self, c_in, c_out, c_time, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_time, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, time):
        """x (B, c_in, h, w), time (B or 1, c_out), of `time_emb_proj` -> (B, c_out, h, w)"""
        h = self.conv1(F.silu(self.norm1(x))) + time[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Multi-head attention. Keys and values are made by a method of their own, so that they can be made ahead."""

    def __init__(self, width, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def split(self, x):
        """(B, L, heads * d) -> (B, heads, L, d)"""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, context):
        """context (B, L, D) -> keys, values (B, heads, L, d)"""
        return self.split(self.to_k(context)), self.split(self.to_v(context))

    def forward(self, x, keys_values):
        """x (B, N, width) -> (B, N, width)"""
        out = F.scaled_dot_product_attention(self.split(self.to_q(x)), *keys_values)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each on the layer norm of its input, and added to it."""

    def __init__(self, width, heads, context):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, width, heads)
        if context != 0:
            self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, context or width, heads)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x, keys_values, taps=None):
        """x (B, N, width); keys_values: an iterator over pairs, of which this block takes the next"""
        h = self.norm1(x)
        if taps is not None:
            taps.append(h)
        x = x + self.attn1(h, self.attn1.keys_values(h))
        if hasattr(self, "attn2"):
            x = x + self.attn2(self.norm2(x), next(keys_values))
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, as a residual."""

    def __init__(self, width, cfg, depth):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.groups, width, eps=1e-6)
        make = (lambda: nn.Linear(width, width)) if cfg.linear_proj else (lambda: nn.Conv2d(width, width, 1))
        self.proj_in = make()
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, cfg.heads_at(width), cfg.context) for _ in range(depth)
        )
        self.proj_out = make()

    def forward(self, x, keys_values, taps=None):
        """x (B, width, h, w) -> (B, width, h, w)"""
        h = tokens(self.proj_in, self.norm(x).flatten(2).transpose(1, 2))  # (B, h w, width)
        for block in self.transformer_blocks:
            h = block(h, keys_values, taps)
        return x + tokens(self.proj_out, h).transpose(1, 2).reshape(x.shape)


def tokens(proj, x):
    """A linear layer, or the 1x1 convolution that is one, on tokens x (B, N, c)."""
    return F.linear(x, proj.weight.flatten(1), proj.bias)


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x, size):
        """To `size`, that of the skip connection to come: twice x's size, or one less where a side was odd."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by a transformer where `depth` > 0."""

    def __init__(self, widths_in, width, cfg, depth, down=False, up=False):
        super().__init__()
        c_time = 4 * cfg.channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(c, width, c_time, cfg.groups) for c in widths_in)
        if depth:
            self.attentions = nn.ModuleList(SpatialTransformer(width, cfg, depth) for _ in widths_in)
        if down:
            self.downsamplers = nn.ModuleList([Downsample(width)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(width)])

    def down(self, x, times, keys_values, taps):
        """Yields every feature map that the way up will want back."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, next(times))
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, keys_values, taps)
            yield x
        if hasattr(self, "downsamplers"):
            yield self.downsamplers[0](x)

    def up(self, x, skips, times, keys_values, taps):
        """Takes feature maps off the end of `skips`, one per residual block."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), next(times))
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, keys_values, taps)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, skips[-1].shape[-2:])
        return x


class Middle(nn.Module):
    def __init__(self, width, cfg):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, 4 * cfg.channels[0], cfg.groups) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(width, cfg, cfg.mid_depth)])

    def forward(self, x, times, keys_values, taps):
        x = self.attentions[0](self.resnets[0](x, next(times)), keys_values, taps)
        return self.resnets[1](x, next(times))


# ---------------------------------------------------------------------------------------------------------------------
# The network


class Taps(list):
    """A list for `taps` that ends the forward pass, by an exception, as soon as it holds `wanted` features."""

    class Full(Exception):
        pass

    def __init__(self, wanted):
        super().__init__()
        self.wanted = wanted

    def append(self, h):
        super().append(h)
        if len(self) == self.wanted:
            raise self.Full


class UNet(nn.Module):
    """The UNet for a `UNetConfig`."""

    def __init__(self, config):
        super().__init__()
        self.config = cfg = config
        ch, n = cfg.channels, len(cfg.channels)
        self.conv_in = nn.Conv2d(cfg.in_channels, ch[0], 3, padding=1)
        self.time_embedding = Embedding(ch[0], 4 * ch[0])
        if cfg.added:
            self.add_embedding = Embedding(cfg.added, 4 * ch[0])

        self.down_blocks, skips = nn.ModuleList(), [ch[0]]  # skips: widths of the feature maps kept for the way up
        for i in range(n):
            widths_in = [skips[-1]] + [ch[i]] * (cfg.layers - 1)
            self.down_blocks.append(Level(widths_in, ch[i], cfg, cfg.depth[i], down=i < n - 1))
            skips += [ch[i]] * (cfg.layers + (i < n - 1))
        self.mid_block = Middle(ch[-1], cfg)
        self.up_blocks, width = nn.ModuleList(), ch[-1]
        for i in reversed(range(n)):
            widths_in = []
            for _ in range(cfg.layers + 1):
                widths_in.append(width + skips.pop())
                width = ch[i]
            self.up_blocks.append(Level(widths_in, width, cfg, cfg.depth[i], up=i > 0))
        self.conv_norm_out = nn.GroupNorm(cfg.groups, ch[0], eps=1e-5)
        self.conv_out = nn.Conv2d(ch[0], cfg.out_channels, 3, padding=1)

    def levels(self):
        """Down, the middle, and up again, as the forward pass goes."""
        return *self.down_blocks, self.mid_block, *self.up_blocks

    def transformer_blocks(self):
        """Every TransformerBlock, in the order in which the forward pass meets them."""
        return [b for level in self.levels() for a in getattr(level, "attentions", ()) for b in a.transformer_blocks]

    def keys_values(self, context):
        """context (B, L, D) -> [(keys, values)] per transformer block, to be passed instead of the context.

        They depend on the prompt alone: make them once, use them at every step. A list has a context for every block.
        """
        blocks = self.transformer_blocks()
        contexts = [context] * len(blocks) if torch.is_tensor(context) else context
        return [block.attn2.keys_values(c) for block, c in zip(blocks, contexts, strict=True)]

    def times(self, t, added=None):
        """t (B,), added as for forward -> [(B, c_out)] per residual block: what it adds, to be passed instead of t.

        They depend on the timestep alone: a sampler makes those of all its steps at once, by `times_of`.
        """
        time = self.time_embedding(timestep_embedding(t, self.config.channels[0]).to(self.conv_in.weight))
        if self.config.added:
            time = time + self.add_embedding(added)
        time = F.silu(time)
        return [resnet.time_emb_proj(time) for level in self.levels() for resnet in level.resnets]

    def times_of(self, timesteps):
        """A sampler's timesteps, numbers -> a function of t (B,), all the same -> what to pass to forward instead of t.

        Of another timestep, and without any, it returns t itself.
        """
        table = self.times(torch.tensor(timesteps, device=self.conv_in.weight.device)) if timesteps else ()
        ready = {t: [row[i : i + 1] for row in table] for i, t in enumerate(timesteps)}  # (1, c_out), for any batch
        return lambda t: ready.get(int(t[0]), t) if ready else t

    def features(self, z, t):
        """z, t as for forward, of a UNet without a second attention -> [(B, N, width)], one per transformer block: its
        input to self-attention. What comes after the last of them is not computed."""
        taps = Taps(len(self.transformer_blocks()))
        with contextlib.suppress(Taps.Full):
            self(z, t, (), taps=taps)
        return taps

    def forward(self, z, t, context, added=None, taps=None):
        """One denoising step.

        z        (B, in_channels, h, w), any h and w
        t        (B,) timesteps, 0 .. 999, or what `times` made of them
        context  (B, L, D), or what `keys_values` made of it; () if there is no second attention
        added    (B, config.added) for XL: pooled text, and the picture's sizes as embeddings
        taps     a list, filled with each transformer block's input to self-attention, (B, N, width)
          ->     (B, out_channels, h, w)
        """
        if torch.is_tensor(context):
            context = self.keys_values(context)
        times, keys_values = iter(self.times(t, added) if torch.is_tensor(t) else t), iter(context)
        skips = [self.conv_in(z)]
        for level in self.down_blocks:
            for x in level.down(skips[-1], times, keys_values, taps):
                skips.append(x)
        x = self.mid_block(skips[-1], times, keys_values, taps)
        for level in self.up_blocks:
            x = level.up(x, skips, times, keys_values, taps)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# ---------------------------------------------------------------------------------------------------------------------
# Configurations

SD2 = dict(heads=None, head_width=64, context=1024, linear_proj=True)
XL = dict(heads=None, head_width=64, linear_proj=True)
CONFIGS = {
    "sd1": UNetConfig(),
    "sd1-inpainting": UNetConfig(in_channels=9),
    "sd2": UNetConfig(**SD2),  # both 512-base, which predicts the noise, and 768-v
    "sd2-inpainting": UNetConfig(**SD2, in_channels=9),
    "sdxl": UNetConfig(**XL, channels=(320, 640, 1280), depth=(0, 2, 10), mid_depth=10, context=2048, added=2816),
    "sdxl-refiner": UNetConfig(
        **XL, channels=(384, 768, 1536, 1536), depth=(0, 4, 4, 0), mid_depth=4, context=1280, added=2560
    ),
    "toy": UNetConfig(
        in_channels=12, out_channels=12, channels=(64, 128), layers=1, depth=(1, 1), heads=4, context=128
    ),
}
