"""Magic Fixup's released program (github.com/adobe-research/MagicFixup), which may not be copied here, written anew.

It computes what the release computes, in its layout, as directly as possible. tests/test_mfx.py holds it to the real
one where a checkout of that is at hand.
"""

import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests import small
from tests.small import to_original


class PlainAttention(nn.Module):
    def __init__(self, width, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, width, bias=False) for c in (width, context, context))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))
        self.merge_attentions = nn.Conv2d(3 * heads, heads, 1)  # in the file, and never used
        self.merge_attentions_missing = nn.Conv2d(2 * heads, heads, 1)

    def forward(self, x, context):
        parts = []
        every = self.to_q(x), self.to_k(context), self.to_v(context)
        for q, k, v in zip(*(y.chunk(self.heads, dim=2) for y in every)):
            parts.append((q @ k.mT / math.sqrt(q.shape[2])).softmax(dim=2) @ v)
        return self.to_out(torch.cat(parts, dim=2))


class PlainBlock(nn.Module):
    def __init__(self, width, context, heads):
        super().__init__()
        self.attn1, self.attn2, self.attn3 = (PlainAttention(width, c, heads) for c in (width, context, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        gated = nn.Module()
        gated.proj = nn.Linear(width, 8 * width)
        self.ff = nn.Module()
        self.ff.net = nn.ModuleList([gated, nn.Dropout(0.0), nn.Linear(4 * width, width)])

    def forward(self, x, feature):
        own = self.norm1(x)
        x = x + self.attn1(own, own)
        if feature is not None:
            x = x + self.attn3(self.norm2(x), feature)
        value, gate = self.ff.net[0].proj(self.norm3(x)).chunk(2, dim=2)
        return x + self.ff.net[2](value * F.gelu(gate)), own


class PlainTransformer(nn.Module):
    def __init__(self, width, context, heads):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([PlainBlock(width, context, heads)])

    def forward(self, x, feature):
        y = self.proj_in(self.norm(x))
        y, own = self.transformer_blocks[0](y.flatten(2).mT, feature)
        return x + self.proj_out(y.mT.reshape(x.shape)), own


class PlainResnet(nn.Module):
    def __init__(self, c_in, c_out, c_time):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(c_time, c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, c_out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


def make_down(c):
    return nn.Sequential(OrderedDict(op=nn.Conv2d(c, c, 3, stride=2, padding=1)))


def make_up(c):
    return nn.Sequential(OrderedDict(up=nn.Upsample(scale_factor=2), conv=nn.Conv2d(c, c, 3, padding=1)))


class Plain(nn.Module):
    """One UNet of the release: (z, t, features or None) -> output, own features."""

    def __init__(self, width=32, times=(1, 2), attends=(True, False), context=64, heads=8):
        super().__init__()
        self.width, c_time = width, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, c_time), nn.SiLU(), nn.Linear(c_time, c_time))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(9, width, 3, padding=1)])])
        c, widths = width, [width]
        for level, factor in enumerate(times):
            for _ in range(2):
                layers, c = [PlainResnet(c, factor * width, c_time)], factor * width
                layers += [PlainTransformer(c, context, heads)] * attends[level]
                self.input_blocks.append(nn.ModuleList(layers))
                widths.append(c)
            if level + 1 < len(times):
                self.input_blocks.append(nn.ModuleList([make_down(c)]))
                widths.append(c)
        self.middle_block = nn.ModuleList(
            [PlainResnet(c, c, c_time), PlainTransformer(c, context, heads), PlainResnet(c, c, c_time)]
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(times))):
            for i in range(3):
                layers, c = [PlainResnet(c + widths.pop(), times[level] * width, c_time)], times[level] * width
                layers += [PlainTransformer(c, context, heads)] * attends[level]
                layers += [make_up(c)] * (level > 0 and i == 2)
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))

    def forward(self, z, t, features=None):
        angle = t[:, None] * 10000 ** -(torch.arange(self.width // 2) / (self.width // 2))
        time = self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=1))
        given, own = iter(features or ()), []

        def run(layers, h):
            for layer in layers:
                if isinstance(layer, PlainTransformer):
                    h, feature = layer(h, next(given, None))
                    own.append(feature)
                else:
                    h = layer(h, time) if isinstance(layer, PlainResnet) else layer(h)
            return h

        skips = [z]
        for layers in self.input_blocks:
            skips.append(run(layers, skips[-1]))
        h = run(self.middle_block, skips[-1])
        for layers in self.output_blocks:
            h = run(layers, torch.cat([h, skips.pop()], dim=1))
        return self.out(h), own


def plain_abar():
    """Stable Diffusion's schedule, its signal shifted and scaled to nothing at the end (2305.08891)."""
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    return ((root - root[-1]) / (root[0] - root[-1]) * root[0]) ** 2


class PlainMagicFixup(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model, self.model.reference_model = Plain(**sizes), Plain(**sizes)

    def forward(self, x_t, t, reference, coarse, mask, noise):
        abar = plain_abar()[t].float()[:, None, None, None]
        noisy = abar.sqrt() * reference + (1 - abar).sqrt() * noise
        _, features = self.model.reference_model(torch.cat([noisy, reference, mask], 1), t)
        return self.model.diffusion_model(torch.cat([x_t, coarse, mask], 1), t, features)[0]

    def ddim(self, k, noise, reference, coarse, mask, reference_noise):
        """eta = 0. Timesteps 1, 1 + 1000 / k, ..; the last step ends at t = 0, not at no noise at all."""
        abar, times = plain_abar(), [i * (1000 // k) + 1 for i in range(k)]
        x = abar[times[-1]].sqrt().float() * coarse + (1 - abar[times[-1]]).sqrt().float() * noise
        for i in reversed(range(k)):
            t = torch.tensor([times[i]])
            a, a_next = abar[times[i]].float(), abar[times[i - 1] if i else 0].float()
            eps = self(x, t, reference, coarse, mask, reference_noise(times[i]))
            x = a_next.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - a_next).sqrt() * eps
        return x


def released_tensors(plain, stable):
    """What the release's training would save: `plain`, the autoencoder of `stable`, and all that we have no use for."""
    tensors = dict(plain.state_dict())
    tensors |= {k: v for k, v in to_original(stable).items() if not k.startswith(("model.", "cond_stage"))}
    others = ("cond_stage_model.dino_model.cls_token", "cond_stage_model.final_ln.weight", "proj_out.weight",
              "proj_out.bias", "learnable_vector")
    return tensors | {name: torch.zeros(2) for name in others}


def write_released(folder):
    """The release on random weights -> it, and the file of them"""
    torch.manual_seed(5)
    plain = small.randomise(PlainMagicFixup(), seed=6)
    path = folder / "magicfixup.pt"
    torch.save(released_tensors(plain, small.stable_diffusion()), path)
    return plain, path
