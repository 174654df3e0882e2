"""Segment Anything: from a photo and a few clicks to the masks of what was meant.

Kirillov et al. 2023, *Segment Anything*, section 3 and appendix A. Attribute names are the published checkpoints' key
names (sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth, sam_vit_h_4b8939.pth), so that loading is `load_state_dict`.

    sam = published.load("sam", "sam_vit_b_01ec64.pth")
    encoded = sam.encode(image)                                    # (H, W, 3) uint8; once per picture, the slow part
    masks, iou, low_res = sam.predict(encoded, points=[[[x, y]]])  # then as many prompts as you like
    segmenter(sam)(image, (x, y))                                  # the mask at one click, as collage.py asks for it
    automask.automatic_masks(sam, image)                           # everything in the picture, without a prompt

    image (H, W, 3) --resize, pad--> (1, 3, 1024, 1024) --encoder--> embedding (1, 256, 64, 64)
    points --prompt encoder--> tokens (B, N + 1, 256) --decoder, with the embedding--> masks (B, 3, 256, 256), IoU

Points are in pixels of the photo and, as in the published code, (0, 0) is the *centre* of its first pixel.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet's pixels, 0 .. 255
MASKS = 4  # that the decoder draws for a prompt: one for a prompt that is clear, three for one that may mean several


@dataclass(frozen=True)
class SAMConfig:
    width: int = 768  # of the image encoder
    depth: int = 12
    heads: int = 12
    global_blocks: tuple = (2, 5, 8, 11)  # those that attend to the whole image; the others, to windows
    window: int = 14  # patches along a window's side
    patch: int = 16  # pixels along a patch's side
    size: int = 1024  # pixels along the side of the square that photos are fitted into
    dim: int = 256  # of the image embedding, the prompts and the decoder
    hidden: int = 2048  # of the decoder's MLPs

    @property
    def grid(self):
        """Patches along a side: the size of the image embedding."""
        return self.size // self.patch


CONFIGS = {
    "vit_b": SAMConfig(),
    "vit_l": SAMConfig(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
    "vit_h": SAMConfig(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
    "toy": SAMConfig(width=64, depth=4, heads=4, global_blocks=(1, 3), window=5, size=128, dim=32, hidden=64),
}


# ---------------------------------------------------------------------------------------------------------------------
# Image encoder: a plain ViT with windows, as in Li et al. 2022, *Exploring Plain Vision Transformer Backbones*


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeedForward(nn.Module):
    def __init__(self, width, hidden, activation):
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x):
        return self.lin2(self.activation(self.lin1(x)))


class RelativeAttention(nn.Module):
    """Self-attention within a square of s x s patches, with a bias for the distance of two patches in y and in x:

        softmax(q k / sqrt(d) + q R_h[y_q - y_k] + q R_w[x_q - x_k]) v         (Li et al. 2021, MViTv2, equation 4)
    """

    def __init__(self, width, heads, side):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // heads))

    def forward(self, x):
        """(B, s, s, width) -> the same shape"""
        B, s, _, width = x.shape

        # What each table says for each pair of rows and each pair of columns.
        i = torch.arange(s, device=x.device)
        R_h, R_w = (table[i[:, None] - i + s - 1] for table in (self.rel_pos_h, self.rel_pos_w))  # (s, s, d)

        # Head by head: the bias of all at once would be 0.8 GB in a global block of ViT-B, and that of one is 64 MB.
        out = torch.empty(B, s * s, self.heads, width // self.heads, dtype=x.dtype, device=x.device)
        qkv = self.qkv(x).view(B, s * s, 3, self.heads, -1).permute(3, 2, 0, 1, 4)  # (heads, 3, B, s s, d)
        for n, (q, k, v) in enumerate(qkv):
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
        attend = self.attend_in_windows if self.window else self.attn
        x = x + attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend_in_windows(self, x):
        """Those at the right and below are filled up with zeros, which are attended to as the rest is."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Prompt encoder


class PositionalEncoding(nn.Module):
    """Random Fourier features (Tancik et al. 2020): x, y in [0, 1], (..., 2) -> (..., dim), in float32."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))

    def forward(self, xy):
        frequencies = self.positional_encoding_gaussian_matrix
        phase = 2 * math.pi * ((2 * xy.to(frequencies) - 1) @ frequencies)
        return torch.cat([phase.sin(), phase.cos()], -1)


class PromptEncoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.pe_layer = PositionalEncoding(c.dim)
        # Of points on the background, on the object, and of a box's corners. Boxes and masks, which the files know as
        # well, are no prompts here.
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, c.dim) for _ in range(4))
        self.not_a_point_embed, self.no_mask_embed = nn.Embedding(1, c.dim), nn.Embedding(1, c.dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, 4, 2, 2), LayerNorm2d(4, eps=1e-6), nn.GELU(),
            nn.Conv2d(4, 16, 2, 2), LayerNorm2d(16, eps=1e-6), nn.GELU(), nn.Conv2d(16, c.dim, 1))

    def grid(self):
        """The positional encoding of the image embedding, (1, dim, g, g)."""
        g = self.config.grid
        centre = (torch.arange(g, device=self.not_a_point_embed.weight.device) + 0.5) / g
        return self.pe_layer(torch.stack(torch.meshgrid(centre, centre, indexing="xy"), -1)).permute(2, 0, 1)[None]

    def forward(self, points):
        """points (B, N, 2) in pixels of the padded square, on the object -> sparse (B, N + 1, dim), a token per point
        and one of no point, as in training; dense (1, dim, 1, 1), which says that there is no mask"""
        no_mask = self.no_mask_embed.weight
        where = self.pe_layer((points + 0.5) / self.config.size).to(no_mask.dtype)
        no_point = self.not_a_point_embed.weight.expand(len(points), 1, -1)
        return torch.cat([where + self.point_embeddings[1].weight, no_point], 1), no_mask[..., None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Mask decoder. Tokens and image are updated in turn, each attending to the other: figure 14.


class Attention(nn.Module):
    """(B, N, dim), (B, M, dim), (B, M, dim) -> (B, N, dim), within 1 / reduction of the width. A batch of 1 is as
    many as the others': the image is the same for all prompts, and is projected once."""

    HEADS = 8

    def __init__(self, dim, reduction):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim // reduction) for _ in range(3))
        self.out_proj = nn.Linear(dim // reduction, dim)

    def forward(self, q, k, v):
        B = max(len(q), len(k))

        def split_heads(x):  # (B or 1, N, dim) -> (B, heads, N, dim / heads)
            return x.unflatten(-1, (self.HEADS, -1)).transpose(1, 2).expand(B, -1, -1, -1)

        q = split_heads(self.q_proj(q))
        k = split_heads(self.k_proj(k))
        v = split_heads(self.v_proj(v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TwoWayBlock(nn.Module):
    def __init__(self, c, first):
        super().__init__()
        self.first = first
        self.self_attn = Attention(c.dim, 1)
        self.cross_attn_token_to_image, self.cross_attn_image_to_token = Attention(c.dim, 2), Attention(c.dim, 2)
        self.mlp = FeedForward(c.dim, c.hidden, F.relu)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(c.dim) for _ in range(4))

    def forward(self, tokens, image, token_pe, image_pe):
        if self.first:  # the tokens are nothing yet but their own positional encoding
            tokens = self.norm1(self.self_attn(tokens, tokens, tokens))
        else:
            q = tokens + token_pe
            tokens = self.norm1(tokens + self.self_attn(q, q, tokens))
        placed = image + image_pe
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, placed, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(placed, tokens + token_pe, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(c, first) for first in (True, False))
        self.final_attn_token_to_image = Attention(c.dim, 2)
        self.norm_final_attn = nn.LayerNorm(c.dim)

    def forward(self, token_pe, image, image_pe):
        """tokens (B, N, dim), image (B or 1, g g, dim), its encoding (1, g g, dim) -> tokens, image (B, g g, dim)"""
        tokens = token_pe
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe)
        tokens = tokens + self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens), image


class MLP(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, out)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def double_size(conv, x):
    """A transposed convolution of kernel and stride 2, on (..., c): each place becomes (..., 2, 2, c'), rows, columns.

    No two outputs overlap, so it is one matrix product, and no channel has to move.
    """
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (4 c', c)
    return F.linear(x, weight, conv.bias.repeat(4)).unflatten(-1, (2, 2, -1))


class MaskDecoder(nn.Module):
    """`attend` is what a prompt costs, and says how good its masks will be; `draw` is for those that are wanted."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.transformer = TwoWayTransformer(c)
        self.iou_token, self.mask_tokens = nn.Embedding(1, c.dim), nn.Embedding(MASKS, c.dim)
        self.output_upscaling = nn.ModuleList([
            nn.ConvTranspose2d(c.dim, c.dim // 4, 2, 2), nn.LayerNorm(c.dim // 4, eps=1e-6), nn.GELU(),
            nn.ConvTranspose2d(c.dim // 4, c.dim // 8, 2, 2), nn.GELU()])
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(c.dim, c.dim // 8) for _ in range(MASKS))
        self.iou_prediction_head = MLP(c.dim, MASKS)

    def attend(self, embedding, pe, sparse, dense):
        """embedding, pe (1, dim, g, g), encoded prompts -> iou (B, 4), hyper (B, 4, dim / 8), image (B, g g, dim)

        Mask i's logit at a place will be the dot product of hyper[:, i], a classifier made for this prompt, and what
        the image has become there.
        """
        # The tokens are the decoder's own and the prompt's.
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(sparse), -1, -1), sparse], 1)
        image, pe = (x.flatten(2).transpose(1, 2).contiguous() for x in (embedding + dense, pe))
        tokens, image = self.transformer(tokens, image, pe)
        hyper = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        return self.iou_prediction_head(tokens[:, 0]), torch.stack(hyper, 1), image

    def draw(self, image, hyper):
        """image (B, g g, dim), hyper (B, n, dim / 8) -> logits (B, n, 4 g, 4 g)"""
        g = self.config.grid
        up1, norm, gelu, up2, _ = self.output_upscaling
        x = gelu(double_size(up2, gelu(norm(double_size(up1, image))))).flatten(1, -2) @ hyper.transpose(1, 2)
        x = x.view(len(x), g, g, 2, 2, 2, 2, -1).permute(0, 7, 1, 3, 5, 2, 4, 6)  # (B, n; y, y2, y4; x, x2, x4)
        return x.reshape(len(x), -1, 4 * g, 4 * g)


# ---------------------------------------------------------------------------------------------------------------------
# The whole


@dataclass
class Encoded:
    """A picture that prompts can be about."""

    embedding: torch.Tensor  # (1, dim, g, g)
    pe: torch.Tensor  # (1, dim, g, g), the positional encoding of the same places
    size: tuple  # H, W of the picture
    inner: tuple  # h, w that it has inside the padded square


class SAM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config)
        self.prompt_encoder = PromptEncoder(config)
        self.mask_decoder = MaskDecoder(config)

    def encode(self, image):
        """image (H, W, 3) uint8 RGB -> Encoded. ValueError for another kind of picture, or weights that overflow."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"SAM looks at (H, W, 3) uint8, not {tuple(image.shape)} {image.dtype}")
        (H, W), size, weight = image.shape[:2], self.config.size, self.image_encoder.pos_embed
        h, w = (max(1, int(n * (size / max(H, W)) + 0.5)) for n in (H, W))
        fitted = np.array(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))
        x = torch.from_numpy(fitted).to(weight.device).permute(2, 0, 1)[None]
        mean, std = (torch.tensor(c, device=x.device)[:, None, None] for c in (MEAN, STD))
        x = F.pad((x - mean) / std, (0, size - w, 0, size - h))  # with zeros, to the right and below
        embedding = self.image_encoder(x.to(weight.dtype))
        if not embedding.isfinite().all():  # no mask would be found, as where there is nothing
            raise ValueError("what Segment Anything computes is not finite: its file is damaged, or stored in a "
                             "precision that it overflows in")
        return Encoded(embedding, self.prompt_encoder.grid().to(weight.dtype), (H, W), (h, w))

    def attend(self, encoded, points):
        """The first half of `predict`, with its prompts -> what `MaskDecoder.attend` returns."""
        scale = torch.tensor([encoded.inner[i] / encoded.size[i] for i in (1, 0)], dtype=torch.float64)
        points = torch.as_tensor(points, dtype=torch.float64, device="cpu") * scale  # MPS has no float64
        return self.mask_decoder.attend(encoded.embedding, encoded.pe, *self.prompt_encoder(points))

    def predict(self, encoded, points):
        """B prompts about one picture, points (B, N, 2): x, y, each a part of the object. -> masks (B, 3, H, W) bool:
        a click may mean the whole, a part or a subpart; IoU as the model expects it (B, 3) float32; logits
        (B, 3, 4 g, 4 g) float32
        """
        iou, hyper, image = self.attend(encoded, points)
        low_res = self.mask_decoder.draw(image, hyper[:, 1:]).float()
        return self.upscale(low_res, encoded) > 0, iou[:, 1:].float(), low_res

    def upscale(self, low_res, encoded):
        """logits (B, n, 4 g, 4 g) -> (B, n, H, W): to the padded square, cut out of it, and to the picture's size."""
        (h, w), factor = encoded.inner, self.config.patch // 4
        low_res = low_res[..., :h // factor + 2, :w // factor + 2]  # without most of the padding
        x = F.interpolate(low_res, scale_factor=float(factor), mode="bilinear")[..., :h, :w]
        return F.interpolate(x, encoded.size, mode="bilinear") if encoded.size != encoded.inner else x


# ---------------------------------------------------------------------------------------------------------------------
# What a file's shapes say, and what is at a click


def config_from_shapes(shapes):
    """{name: shape} -> SAMConfig. KeyError or ValueError if these are not SAM's."""
    width, _, patch, _ = shapes["image_encoder.patch_embed.proj.weight"]
    _, grid, _, _ = shapes["image_encoder.pos_embed"]
    depth = 0
    tables = []  # how many distances a block knows: 2 s - 1 for a square of s x s patches
    while (name := f"image_encoder.blocks.{depth}.attn.rel_pos_h") in shapes:
        distances, head_width = shapes[name]
        tables.append(distances)
        depth += 1
    if not depth:
        raise KeyError(name)
    return SAMConfig(
        width=width, depth=depth, heads=width // head_width, patch=patch, size=grid * patch,
        global_blocks=tuple(i for i, distances in enumerate(tables) if distances == 2 * grid - 1),
        window=(min(tables) + 1) // 2, dim=shapes["image_encoder.neck.0.weight"][0],
        hidden=shapes["mask_decoder.transformer.layers.0.mlp.lin1.weight"][0])


def segmenter(sam):
    """What is at a click, for editing.edits_json: (image (H, W, 3) uint8, (x, y)) -> (H, W) bool

    Of the three masks that a click may mean, the one that the model thinks best. x, y as in collage.py, where the first
    pixel's centre is at (0.5, 0.5). The last picture stays encoded for the next click.
    """
    last, encoded = None, None

    def segment_at(image, at):
        nonlocal last, encoded
        if last is None or not np.array_equal(image, last):
            last, encoded = image.copy(), sam.encode(image)
        masks, iou, _ = sam.predict(encoded, points=[[[at[0] - 0.5, at[1] - 0.5]]])
        return masks[0, iou[0].argmax()].cpu().numpy()

    return segment_at
