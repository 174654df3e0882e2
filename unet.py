"""The UNet that denoises, of Stable Diffusion 1.x, 2.x, inpainting and XL, and of the toy.

Rombach et al. 2022, section 3.3 and figure 3; Podell et al. 2023 (XL). Attribute names are Hugging
Face's key names, so that loading is `load_state_dict`.

    z (B, C, h, w), t (B,), context (B, L, D)  -->  (B, C_out, h, w)     the predicted noise, or v

The second attention of a transformer block takes its keys and values from a list, a pair for each
block of the network. Two things come from this:

    Stable Diffusion   makes the list of a prompt, once for all sampling steps (`UNet.keys_values`)
    Magic Fixup        makes it of another UNet's features (`UNet.features`)
"""

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
    depth: tuple = (1, 1, 1, 0)  # transformer blocks after each residual block, per level
    mid_depth: int = 1  # the same at the bottom
    heads: int | None = 8  # attention heads, the same at every width (SD 1) ...
    head_width: int | None = None  # ... or as many heads of this width as fit (SD 2, XL)
    # What the second attention reads: states of this width D, a text encoder's; None: features as
    # wide as the block itself, from another UNet; 0: nothing, there is no second attention.
    context: int | None = 768
    linear_proj: bool = False  # tokens go through a linear layer (SD 2, XL), not a 1x1 convolution
    groups: int = 32  # of every GroupNorm
    added: int = 0  # width of XL's vector of pooled text and picture sizes; 0: it has none
    size_width: int = 256  # of the embedding of each of these sizes

    def heads_at(self, width):
        return self.heads or width // self.head_width


# --------------------------------------------------------------------------------------------------
# Time


def timestep_embedding(t, width):
    """t (B,) in 0 .. T-1 -> (B, width), float32: cosines, then sines (Vaswani et al. 2017, 3.5)."""
    half = width // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(10000) / half * i)  # from 1 down to 1/10000
    angle = t.float()[:, None] * frequency  # (B, half)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Embedding(nn.Module):
    """Two layers that turn an embedding of the time, or XL's vector, into what all blocks read."""

    def __init__(self, c_in, c_out, activation=F.silu):
        super().__init__()
        self.activation = activation
        self.linear_1 = nn.Linear(c_in, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, x):
        """x (B, c_in) -> (B, c_out)"""
        return self.linear_2(self.activation(self.linear_1(x)))


# --------------------------------------------------------------------------------------------------
# Blocks


class ResnetBlock(nn.Module):
    """Two convolutions, the time added between them, and a skip, 1x1 where the width changes."""

    index = None  # its place among the network's blocks, which UNet gives it

    def __init__(self, c_in, c_out, c_time, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_time, c_out)  # `UNet.embed_time` calls it
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, time):
        """x (B, c_in, h, w), time (B or 1, c_out) -> (B, c_out, h, w)"""
        h = self.conv1(F.silu(self.norm1(x))) + time[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Multi-head attention. Keys and values have a method of their own: they can be made ahead."""

    def __init__(self, width, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def split_heads(self, x):
        """(B, L, heads * d) -> (B, heads, L, d)"""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, context):
        """context (B, L, D) -> keys, values (B, heads, L, d)"""
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def forward(self, x, keys_values):
        """x (B, N, width), keys and values (B, heads, L, d) -> (B, N, width)"""
        keys, values = keys_values
        out = F.scaled_dot_product_attention(self.split_heads(self.to_q(x)), keys, values)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020): twice four times the width, half of it gates the other; and back."""

    def __init__(self, width):
        super().__init__()
        gated = nn.ModuleDict({"proj": nn.Linear(width, 8 * width)})
        dropout = nn.Identity()  # the published network has one there, and key names count it
        self.net = nn.ModuleList([gated, dropout, nn.Linear(4 * width, width)])

    def forward(self, x):
        """x (B, N, width) -> (B, N, width)"""
        x, gate = self.net[0].proj(x).chunk(2, dim=-1)  # (B, N, 4 width) each
        return self.net[2](x * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward: each of a layer norm, added to x."""

    index = None  # its entry of `keys_values`, numbered by UNet.__init__

    def __init__(self, width, heads, context):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        if context != 0:
            self.norm2 = nn.LayerNorm(width)
            self.attn2 = Attention(width, context or width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x, keys_values, features=None):
        """x (B, N, width) -> (B, N, width)

        keys_values  what the second attention reads: for every block of the network a pair, or ()
        features     a list that collects every block's input to self-attention, or None
        """
        f = self.norm1(x)  # (B, N, width)
        if features is not None:
            features.append(f)
        x = x + self.attn1(f, self.attn1.keys_values(f))
        # Look up the words of a prompt, or what the same block of Magic Fixup's extractor has seen.
        if hasattr(self, "attn2") and keys_values[self.index]:
            x = x + self.attn2(self.norm2(x), keys_values[self.index])
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, as a residual."""

    def __init__(self, width, cfg, depth):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.groups, width, eps=1e-6)
        self.proj_in = make_projection(width, cfg.linear_proj)
        self.transformer_blocks = nn.ModuleList()
        for _ in range(depth):
            block = TransformerBlock(width, cfg.heads_at(width), cfg.context)
            self.transformer_blocks.append(block)
        self.proj_out = make_projection(width, cfg.linear_proj)

    def forward(self, x, keys_values, features=None):
        """x (B, width, h, w) -> (B, width, h, w)"""
        h = self.norm(x).flatten(2).transpose(1, 2)  # tokens (B, h w, width)
        h = project(self.proj_in, h)
        for block in self.transformer_blocks:
            h = block(h, keys_values, features)
        h = project(self.proj_out, h)
        return x + h.transpose(1, 2).reshape(x.shape)


def make_projection(width, linear):
    return nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)


def project(layer, x):
    """A linear layer, or the 1x1 convolution that is one, on tokens x (B, N, c)."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


class Level(nn.Module):
    """Residual blocks at one resolution. `depths`: of the transformer behind each, 0 for none.

    At the lowest resolution, which is the middle, there are two, and a transformer between them.
    """

    def __init__(self, widths_in, width, cfg, depths, down=False, up=False):
        super().__init__()
        c_time = 4 * cfg.channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(c, width, c_time, cfg.groups) for c in widths_in)
        transformers = (SpatialTransformer(width, cfg, depth) for depth in depths if depth)
        self.attentions = nn.ModuleList(transformers)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()
        if down:
            conv = nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.downsamplers.append(nn.ModuleDict({"conv": conv}))
        if up:
            conv = nn.Conv2d(width, width, 3, padding=1)
            self.upsamplers.append(nn.ModuleDict({"conv": conv}))

    def run_block(self, i, x, times, keys_values, features):
        """x (B, c, h, w) -> (B, width, h, w): the residual block i, and its transformer if any"""
        resnet = self.resnets[i]
        x = resnet(x, times[resnet.index])
        if i < len(self.attentions):
            x = self.attentions[i](x, keys_values, features)
        return x

    def forward(self, x, times, keys_values, features):
        """The middle: x (B, c, h, w) -> (B, c, h, w)"""
        for i in range(len(self.resnets)):
            x = self.run_block(i, x, times, keys_values, features)
        return x

    def down(self, x, skips, times, keys_values, features):
        """x (B, c, h, w) -> the level below's. It puts every feature map on the end of `skips`."""
        for i in range(len(self.resnets)):
            x = self.run_block(i, x, times, keys_values, features)
            skips.append(x)
        for step in self.downsamplers:
            x = step.conv(x)
            skips.append(x)
        return x

    def up(self, x, skips, times, keys_values, features):
        """x (B, c, h, w) -> the level above's. It takes feature maps off the end of `skips`."""
        for i in range(len(self.resnets)):
            x = torch.cat([x, skips.pop()], dim=1)
            x = self.run_block(i, x, times, keys_values, features)
        for step in self.upsamplers:
            size = skips[-1].shape[-2:]  # 2h and 2w, or one less where a side was odd
            x = step.conv(F.interpolate(x, size=size, mode="nearest"))
        return x


# --------------------------------------------------------------------------------------------------
# The network


class UNet(nn.Module):
    """The UNet for a `UNetConfig`."""

    def __init__(self, config):
        super().__init__()
        self.config = cfg = config
        ch = cfg.channels
        self.conv_in = nn.Conv2d(cfg.in_channels, ch[0], 3, padding=1)
        self.time_embedding = Embedding(ch[0], 4 * ch[0])
        if cfg.added:
            self.add_embedding = Embedding(cfg.added, 4 * ch[0])

        # Down. `skips` are the widths of the feature maps that the way up takes back: conv_in's,
        # then those of every residual block and every step down. The last level has no step.
        skips = [ch[0]]
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(ch):
            down = i < len(ch) - 1
            widths_in = [skips[-1]] + [width] * (cfg.layers - 1)
            depths = [cfg.depth[i]] * cfg.layers
            self.down_blocks.append(Level(widths_in, width, cfg, depths, down=down))
            skips += [width] * (cfg.layers + down)

        self.mid_block = Level([ch[-1], ch[-1]], ch[-1], cfg, [cfg.mid_depth])

        # Up. A residual block reads the one before it and the last skip that is left.
        below = ch[-1]
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(ch))):
            widths_in = []
            for _ in range(cfg.layers + 1):
                widths_in.append(below + skips.pop())
                below = ch[i]
            depths = [cfg.depth[i]] * (cfg.layers + 1)
            self.up_blocks.append(Level(widths_in, ch[i], cfg, depths, up=i > 0))

        self.conv_norm_out = nn.GroupNorm(cfg.groups, ch[0], eps=1e-5)
        self.conv_out = nn.Conv2d(ch[0], cfg.out_channels, 3, padding=1)

        # Every block knows which entry of `times`, or of `keys_values`, is its own.
        for index, resnet in enumerate(self.resnets()):
            resnet.index = index
        for index, block in enumerate(self.transformer_blocks()):
            block.index = index

    # Both in the order of the forward pass, which is the order in which __init__ makes them.

    def resnets(self):
        return [m for m in self.modules() if isinstance(m, ResnetBlock)]

    def transformer_blocks(self):
        return [m for m in self.modules() if isinstance(m, TransformerBlock)]

    def keys_values(self, context):
        """context (B, L, D), or a list of one per block -> [(keys, values)], a pair per block.

        They do not depend on z and t: make them once, and pass them at every step instead.
        """
        blocks = self.transformer_blocks()
        contexts = [context] * len(blocks) if torch.is_tensor(context) else context
        return [block.attn2.keys_values(c) for block, c in zip(blocks, contexts, strict=True)]

    def embed_time(self, t, added=None):
        """t (B,), added as for forward -> [(B, c_out)]: what each residual block adds."""
        time = timestep_embedding(t, self.config.channels[0]).to(self.conv_in.weight)
        time = self.time_embedding(time)  # (B, c_time)
        if self.config.added:
            time = time + self.add_embedding(added)
        time = F.silu(time)
        return [resnet.time_emb_proj(time) for resnet in self.resnets()]

    def times_of(self, timesteps, added=None):
        """Embed a sampler's timesteps, numbers, all at once; added (B, ..) as for forward.

        -> a function: t (B,), all equal -> what to pass as t instead; t itself if it is another
        """
        B = 1 if added is None else len(added)
        t = torch.tensor(timesteps, device=self.conv_in.weight.device).repeat_interleave(B)
        table = self.embed_time(t, added if added is None else added.repeat(len(timesteps), 1))
        times = {}  # timestep -> [(1, c_out)], for any batch; with `added` (B, c_out)
        for i, timestep in enumerate(timesteps):
            times[timestep] = [rows[i * B : (i + 1) * B] for rows in table]
        return lambda t: times.get(int(t[0]), t)

    def features(self, z, t):
        """z, t as for forward, of a UNet without a second attention.

        -> [(B, N, width)]: every transformer block's input to self-attention, for another UNet
        """
        features = []
        self(z, t, (), features=features)
        return features

    def forward(self, z, t, context, added=None, features=None):
        """One denoising step.

        z         (B, in_channels, h, w), any h and w
        t         (B,) timesteps, 0 .. 999, or what `embed_time` makes of them
        context   (B, L, D), or what `keys_values` makes of it; () without a second attention
        added     (B, config.added) for XL: pooled text, and the picture's sizes as embeddings
        features  a list, which gets what `features` returns; or None
          ->      (B, out_channels, h, w)
        """
        times = self.embed_time(t, added) if torch.is_tensor(t) else t
        keys_values = self.keys_values(context) if torch.is_tensor(context) else context

        x = self.conv_in(z)
        skips = [x]
        for level in self.down_blocks:
            x = level.down(x, skips, times, keys_values, features)
        x = self.mid_block(x, times, keys_values, features)
        for level in self.up_blocks:
            x = level.up(x, skips, times, keys_values, features)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# --------------------------------------------------------------------------------------------------
# Configurations

SD2 = dict(heads=None, head_width=64, context=1024, linear_proj=True)
XL = dict(heads=None, head_width=64, linear_proj=True)
CONFIGS = {
    "sd1": UNetConfig(),
    "sd1-inpainting": UNetConfig(in_channels=9),
    "sd2": UNetConfig(**SD2),  # both 512-base, which predicts the noise, and 768-v
    "sd2-inpainting": UNetConfig(**SD2, in_channels=9),
    "sdxl": UNetConfig(
        **XL, channels=(320, 640, 1280), depth=(0, 2, 10), mid_depth=10, context=2048, added=2816
    ),
    "sdxl-refiner": UNetConfig(
        **XL, channels=(384, 768, 1536, 1536), depth=(0, 4, 4, 0), mid_depth=4, context=1280,
        added=2560,
    ),
    "toy": UNetConfig(
        in_channels=8, out_channels=8, channels=(48, 96, 128), layers=1, depth=(0, 1, 1), heads=4,
        context=128, groups=8,
    ),
}
