"""Segment Anything's image encoder: the slow part, which sam.py runs once per picture.

    (B, 3, 1024, 1024), normalised and padded  -->  the image embedding (B, 256, 64, 64)

A plain ViT with windows, as in Li et al. 2022, *Exploring Plain Vision Transformer Backbones for Object Detection*:
four blocks attend to the whole picture, and the others within windows of 14 x 14 patches.

Attribute names are the published checkpoints' key names, as in sam.py; c is its SAMConfig.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeedForward(nn.Module):
    def __init__(self, width, hidden, activation):
        super().__init__()
        self.lin1, self.lin2, self.activation = nn.Linear(width, hidden), nn.Linear(hidden, width), activation

    def forward(self, x):
        return self.lin2(self.activation(self.lin1(x)))


class RelativeAttention(nn.Module):
    """Self-attention within a square of s x s patches, told how far apart two patches are, separately in y and x:

        softmax(q k / sqrt(d) + q R_h[y_q - y_k] + q R_w[x_q - x_k]) v         (Li et al. 2021, MViTv2, equation 4)
    """

    def __init__(self, width, heads, side):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // heads))

    def forward(self, x):
        """(B, s, s, width) -> the same shape"""
        B, s, _, width = x.shape
        i = torch.arange(s, device=x.device)
        R_h, R_w = (table[i[:, None] - i + s - 1] for table in (self.rel_pos_h, self.rel_pos_w))  # (s, s, d)
        out = torch.empty(B, s * s, self.heads, width // self.heads, dtype=x.dtype, device=x.device)
        # Head by head: the bias of all at once would be 0.8 GB in a global block of ViT-B, and that of one, 64 MB.
        for n, (q, k, v) in enumerate(self.qkv(x).view(B, s * s, 3, self.heads, -1).permute(3, 2, 0, 1, 4)):
            by_place = q.view(B, s, s, -1)
            bias_h = torch.einsum("byxd,yjd->byxj", by_place, R_h).contiguous()
            bias_w = torch.einsum("byxd,xjd->byxj", by_place, R_w).contiguous()
            bias = (bias_h[..., :, None] + bias_w[..., None, :]).view(B, 1, s * s, s * s)
            out[:, :, n] = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=bias)[:, 0]
        return self.proj(out.view(x.shape))


class Block(nn.Module):
    """Attention, then an MLP, on (B, g, g, width). window: its side in patches; 0: one window of everything."""

    def __init__(self, c, window):
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(c.width, eps=1e-6), nn.LayerNorm(c.width, eps=1e-6)
        self.attn = RelativeAttention(c.width, c.heads, window or c.grid)
        self.mlp = FeedForward(c.width, 4 * c.width, F.gelu)

    def forward(self, x):
        x = x + (self.windowed(self.norm1(x)) if self.window else self.attn(self.norm1(x)))
        return x + self.mlp(self.norm2(x))

    def windowed(self, x):
        """Cut into windows, those at the right and below filled up with zeros, which are attended to as the rest is."""
        B, g, _, width = x.shape
        w, n = self.window, -(-g // self.window)  # n windows along a side
        x = F.pad(x, (0, 0, 0, n * w - g, 0, n * w - g))
        x = self.attn(x.view(B, n, w, n, w, width).transpose(2, 3).reshape(B * n * n, w, w, width))
        return x.view(B, n, n, w, w, width).transpose(2, 3).reshape(B, n * w, n * w, width)[:, :g, :g]


class ImageEncoder(nn.Module):
    """(B, 3, size, size), normalised and padded -> image embedding (B, dim, g, g)"""

    def __init__(self, c):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, c.width, c.patch, c.patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, c.grid, c.grid, c.width))
        self.blocks = nn.ModuleList(Block(c, 0 if i in c.global_blocks else c.window) for i in range(c.depth))
        self.neck = nn.Sequential(
            nn.Conv2d(c.width, c.dim, 1, bias=False), LayerNorm2d(c.dim, eps=1e-6),
            nn.Conv2d(c.dim, c.dim, 3, padding=1, bias=False), LayerNorm2d(c.dim, eps=1e-6))

    def forward(self, x):
        x = self.patch_embed["proj"](x).permute(0, 2, 3, 1) + self.pos_embed  # (B, g, g, width)
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))
