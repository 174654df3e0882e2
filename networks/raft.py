"""RAFT-Large: dense optical flow. Teed & Deng 2020, *RAFT: Recurrent All-Pairs Field Transforms for Optical Flow*.

    model = published.load("raft", "raft-things.pth")         from torchvision's file or the authors'
    model(first, second)                                     (B, 3, H, W) twice, in [-1, 1] -> flow (B, 2, H, W)
    model.flows(frames)                                      a clip (N, 3, H, W) -> (N - 1, 2, H, W)
    clip_flows(model, pictures)                              the same of uint8 pictures, as Magic Fixup makes its pairs

    first, second --g--> features at 1/8 size --> all-pairs correlation, a pyramid of 4 levels     (3.1, 3.2)
    first         --h--> hidden state, context                                                     (3.1)
    12 times: flow --> 9x9 correlations around where it leads, on each level --> GRU --> flow      (3.3)

Attribute names are torchvision's key names, so that loading is `load_state_dict`; the original names go through one
table. A flow is in pixels, x to the right before y down: the point q of the first picture is at q + flow[q] in the
second. Inside, (h, w) = (H/8, W/8), and flows are in units of 8 pixels.

Faster than the published code, with the same result: the context's share of the GRU's convolutions is computed once,
only the last flow is brought to full size, and a look-up reads 10x10 whole positions, as its points share fractions.
"""

import re
from collections import OrderedDict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

LEVELS, RADIUS = 4, 4  # of the correlation pyramid, and of the look-up on each of its levels
FEATURES, HIDDEN, CONTEXT, MOTION = 256, 128, 128, 128  # channels
MEMORY = 2**31  # bytes that correlation volumes and activations may take together

# ---------------------------------------------------------------------------------------------------------------------
# Encoders, section 3.1. Both have the same layers; features are normalised per picture, context by frozen statistics.


def make_conv(c_in, c_out, kernel, stride=1, norm=None, relu=True):
    """Convolution, normalisation if any, ReLU if any: attributes 0, 1, ..."""
    layers = [nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2)]
    if norm:
        layers.append(norm(c_out))
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def make_instance_norm(c):
    """A GroupNorm with one group per channel computes the same, and is as fast in channels_last."""
    return nn.GroupNorm(c, c, affine=False)


class ResidualBlock(nn.Module):
    """relu(x + f(x)), where f ends with a ReLU too; a 1x1 convolution on the skip where the size changes."""

    def __init__(self, c_in, c_out, stride, norm):
        super().__init__()
        self.convnormrelu1 = make_conv(c_in, c_out, 3, stride, norm)
        self.convnormrelu2 = make_conv(c_out, c_out, 3, 1, norm)
        self.downsample = nn.Identity() if stride == 1 else make_conv(c_in, c_out, 1, stride, norm, relu=False)

    def forward(self, x):
        return F.relu_(self.convnormrelu2(self.convnormrelu1(x)) + self.downsample(x))


def make_encoder(c_out, norm):
    """(B, 3, H, W) -> (B, c_out, h, w)"""

    def layer(c_in, c_out, stride):
        return nn.Sequential(ResidualBlock(c_in, c_out, stride, norm), ResidualBlock(c_out, c_out, 1, norm))

    return nn.Sequential(OrderedDict(
        convnormrelu=make_conv(3, 64, 7, 2, norm), layer1=layer(64, 64, 1), layer2=layer(64, 96, 2),
        layer3=layer(96, 128, 2), conv=nn.Conv2d(128, c_out, 1),
    ))


# ---------------------------------------------------------------------------------------------------------------------
# Correlation, section 3.2


def make_look_up(g1, g2):
    """Features g1, g2 (B, C, h, w) -> the look-up L_C: x' (B, 2, h, w), positions x, y -> (B, 4 * 9 * 9, h, w).

    Entry C_ijkl = <g1_ij, g2_kl> / sqrt(C) (equation 1, which leaves the scale to the code). Level k of the pyramid
    pools the last two dimensions by 2^k; as C is linear in g2, pooling g2 comes to the same. Read bilinearly around
    x' / 2^k, zero out of frame; x moves along the window's first axis, y along its second.
    """
    B, C, h, w = g1.shape

    # The pyramid: of each level its size, and the correlations (B h w, cells of this level).
    queries = g1.permute(0, 2, 3, 1).reshape(B, h * w, C) / C**0.5
    pyramid = []
    for _ in range(LEVELS):
        size = g2.shape[-2:]
        keys = F.pad(g2, (1, 1, 1, 1)).permute(0, 2, 3, 1).flatten(1, 2)
        pyramid.append((size, torch.bmm(queries, keys.mT).flatten(0, 1)))
        g2 = F.avg_pool2d(g2, 2)
    steps = torch.arange(-RADIUS, RADIUS + 2, device=g1.device)  # the 10 positions between which 9 are interpolated

    def window(positions, size, correlations):
        """positions (n, 2) on one level -> (n, 9, 9)"""
        low = positions.floor()
        X, Y = (low.long()[:, :, None] + steps).unbind(1)  # (n, 10) each
        X = X.clamp(-1, size[1]) + 1  # what is out of frame reads the border
        Y = Y.clamp(-1, size[0]) + 1
        index = (X[:, :, None] + Y[:, None, :] * (size[1] + 2)).flatten(1)  # (n, 100)
        v = correlations.gather(1, index).view(-1, len(steps), len(steps))

        # All points of a window lie at the same fractions between whole positions.
        fx, fy = (positions - low)[:, :, None, None].unbind(1)
        v = torch.lerp(v[:, :-1], v[:, 1:], fx)
        return torch.lerp(v[:, :, :-1], v[:, :, 1:], fy)

    def look_up(x):
        x = x.permute(0, 2, 3, 1).reshape(B * h * w, 2)
        windows = [window(x / 2**level, *of_level) for level, of_level in enumerate(pyramid)]
        return torch.stack(windows, 1).view(B, h, w, -1).permute(0, 3, 1, 2)

    return look_up


# ---------------------------------------------------------------------------------------------------------------------
# Iterative updates, section 3.3


class MotionEncoder(nn.Module):
    """flow (B, 2, h, w) and what was looked up where it leads (B, 324, h, w) -> (B, 128, h, w), flow included"""

    def __init__(self):
        super().__init__()
        self.convcorr1 = make_conv(LEVELS * (2 * RADIUS + 1) ** 2, 256, 1)
        self.convcorr2 = make_conv(256, 192, 3)
        self.convflow1 = make_conv(2, 128, 7)
        self.convflow2 = make_conv(128, 64, 3)
        self.conv = make_conv(192 + 64, MOTION - 2, 3)

    def forward(self, flow, found):
        of_found = self.convcorr2(self.convcorr1(found))
        of_flow = self.convflow2(self.convflow1(flow))
        return torch.cat([self.conv(torch.cat([of_found, of_flow], 1)), flow], 1)


class ConvGRU(nn.Module):
    """Equations 3 to 6, with x_t = [context, motion]: the horizontal or the vertical half of a separable GRU."""

    def __init__(self, kernel):
        super().__init__()
        shape = HIDDEN + CONTEXT + MOTION, HIDDEN, kernel
        self.convz, self.convr, self.convq = (nn.Conv2d(*shape, padding="same") for _ in range(3))

    def with_context(self, context):
        """context (B, 128, h, w) -> a function (h, motion) -> h, all (B, 128, h, w), for every iteration with it"""
        # The gates read the same, so their weights become one tensor, split by what it reads: h, context, motion.
        gates = self.convz, self.convr, self.convq
        weight = torch.cat([gate.weight for gate in gates])  # (3 * 128, 128 + 128 + 128, ...)
        of_h, of_context, of_motion = weight.split((HIDDEN, CONTEXT, MOTION), 1)
        constant = F.conv2d(context, of_context, torch.cat([gate.bias for gate in gates]), padding="same")
        zr, q = torch.cat([of_h, of_motion], 1).split((2 * HIDDEN, HIDDEN))  # z and r read the same: one convolution
        constant_zr, constant_q = constant.split((2 * HIDDEN, HIDDEN), 1)

        def step(h, motion):
            z, r = (F.conv2d(torch.cat([h, motion], 1), zr, padding="same") + constant_zr).sigmoid_().chunk(2, 1)
            h_new = (F.conv2d(torch.cat([r * h, motion], 1), q, padding="same") + constant_q).tanh_()
            return torch.lerp(h, h_new, z)

        return step


class RAFT(nn.Module):
    """RAFT-Large, the only size here. Computes in the weights' precision, but correlation and flow in float32."""

    def __init__(self):
        super().__init__()
        self.feature_encoder = make_encoder(FEATURES, make_instance_norm)
        self.context_encoder = make_encoder(HIDDEN + CONTEXT, nn.BatchNorm2d)
        self.update_block = nn.ModuleDict({
            "motion_encoder": MotionEncoder(),
            "recurrent_block": nn.ModuleDict({"convgru1": ConvGRU((1, 5)), "convgru2": ConvGRU((5, 1))}),
            "flow_head": nn.Sequential(OrderedDict(
                conv1=nn.Conv2d(HIDDEN, 256, 3, padding=1), relu=nn.ReLU(), conv2=nn.Conv2d(256, 2, 3, padding=1),
            )),
        })
        self.mask_predictor = nn.Sequential(OrderedDict(
            convrelu=make_conv(HIDDEN, 256, 3), conv=nn.Conv2d(256, 9 * 64, 1),
        ))

    def forward(self, first, second, iterations=12, every=False):
        """Flow from the first pictures to the second.

        first, second  (B, 3, H, W) in [-1, 1], RGB, any size. Padded by repeating the edge, as the authors' InputPadder
                       does, to multiples of 8 and at least 128, below which the coarsest correlations lose their sense
        iterations     of the update; trained with 12, evaluated by the authors with 24 or 32
        every          True: the flow after each iteration, (iterations, B, 2, H, W), instead of after the last
          ->           (B, 2, H, W) float32, in pixels

        ValueError for shapes that do not fit.
        """
        if first.shape != second.shape:
            raise ValueError(f"pictures of one size, not {tuple(first.shape)} and {tuple(second.shape)}")
        pictures, crop = self.prepare(torch.cat([first, second]))
        g1, g2 = self.feature_encoder(pictures).chunk(2)
        return self.update(g1, g2, pictures[: len(first)], iterations, every)[crop]

    def flows(self, frames, iterations=12, memory=MEMORY):
        """A clip's frames (N, 3, H, W) in [-1, 1] -> the flow from each to the next, (N - 1, 2, H, W), in pixels.

        As many pairs at once as fit in `memory` bytes, but at least one, and the features of each frame once.
        """
        frames, crop = self.prepare(frames)
        h, w = frames.shape[2] // 8, frames.shape[3] // 8

        # At their peak, early in an encoder, activations are 4 times 64 channels at half size: 16 KB for 8 x 8 pixels.
        # And the pyramid has so many numbers for each pixel of the first features, with its borders of zeros.
        cells = sum(((h >> level) + 2) * ((w >> level) + 2) for level in range(LEVELS))
        at_once = max(1, memory // (h * w * (4 * cells + 2**14)))

        # The last frame of a batch is the first of the next one.
        flows = [frames.new_empty(0, 2, *frames.shape[2:], dtype=torch.float32)]
        last = self.feature_encoder(frames[:1])
        for i in range(0, len(frames) - 1, at_once):
            g = torch.cat([last, self.feature_encoder(frames[i + 1 : i + at_once + 1])])
            flows.append(self.update(g[:-1], g[1:], frames[i : i + len(g) - 1], iterations))
            last = g[-1:]
        return torch.cat(flows)[crop]

    def prepare(self, pictures):
        """(B, 3, H, W) -> padded, where and how the weights are; and the index that crops the padding off a flow"""
        if pictures.ndim != 4 or pictures.shape[1] != 3 or 0 in pictures.shape:
            raise ValueError(f"pictures are (B, 3, H, W), not {tuple(pictures.shape)}")
        H, W = pictures.shape[2:]
        more_y, more_x = (max(128, -(-n // 8) * 8) - n for n in (H, W))
        top, left = more_y // 2, more_x // 2
        weight = self.mask_predictor.conv.weight
        pictures = F.pad(pictures.to(weight), (left, more_x - left, top, more_y - top), mode="replicate")
        return pictures.contiguous(memory_format=torch.channels_last), (..., slice(top, top + H), slice(left, left + W))

    def update(self, g1, g2, first, iterations, every=False):
        """Features of both pictures (B, 256, h, w) and the first picture -> flow, as `forward`."""
        B, _, h, w = g1.shape
        dtype = first.dtype
        block = self.update_block

        # The state of the GRU, and what stays the same in all iterations.
        hidden, context = self.context_encoder(first).split((HIDDEN, CONTEXT), 1)
        hidden = hidden.tanh()
        context = context.relu()
        grus = [gru.with_context(context) for gru in block.recurrent_block.values()]
        look_up = make_look_up(g1.float(), g2.float())
        rows, columns = (torch.arange(n, device=first.device) for n in (h, w))
        here = torch.stack(torch.meshgrid(columns, rows, indexing="xy")).float()  # (2, h, w)

        # Each iteration looks where the flow leads, and corrects it.
        flow = here.new_zeros(B, 2, h, w)
        flows = []
        for _ in range(iterations):
            motion = block.motion_encoder(flow.to(dtype), look_up(here + flow).to(dtype))
            for gru in grus:
                hidden = gru(hidden, motion)
            flow = flow + block.flow_head(hidden).float()
            if every:
                flows.append(self.upsample(hidden, flow))
        return torch.stack(flows) if every else self.upsample(hidden, flow)

    def upsample(self, hidden, flow):
        """flow (B, 2, h, w) -> (B, 2, H, W) in pixels: each is a convex combination of 3x3 coarse neighbours (3.3)"""
        B, _, h, w = flow.shape
        mask = 0.25 * self.mask_predictor(hidden).float()  # a factor from training, "to balance gradients"
        mask = mask.reshape(B, 1, 9, 64, h, w).softmax(2)
        coarse = F.unfold(8 * flow, 3, padding=1).view(B, 2, 9, 1, h, w)
        return F.pixel_shuffle((mask * coarse).sum(2).view(B, 2 * 64, h, w), 8)


# ---------------------------------------------------------------------------------------------------------------------
# Names in the authors' files

ORIGINAL = {  # theirs -> torchvision's, which are ours; each row is a pattern, and applies after those above it
    r"^module\.": "",  # files were saved from nn.DataParallel
    r"^fnet\.": "feature_encoder.",
    r"^cnet\.": "context_encoder.",
    r"^(\w+_encoder)\.conv1\.": r"\1.convnormrelu.0.",
    r"^(\w+_encoder)\.norm1\.": r"\1.convnormrelu.1.",
    r"^(\w+_encoder)\.conv2\.": r"\1.conv.",
    r"(layer\d\.\d)\.conv(\d)\.": r"\1.convnormrelu\2.0.",
    r"(layer\d\.\d)\.norm([12])\.": r"\1.convnormrelu\2.1.",
    r"(layer\d\.\d)\.norm3\.": r"\1.downsample.1.",  # stored under both names
    r"^update_block\.encoder\.": "update_block.motion_encoder.",
    r"(motion_encoder\.conv)c(\d)\.": r"\1corr\2.0.",
    r"(motion_encoder\.conv)f(\d)\.": r"\1flow\2.0.",
    r"(motion_encoder\.conv)\.(?!0)": r"\1.0.",
    r"\.gru\.conv([zrq])(\d)\.": r".recurrent_block.convgru\2.conv\1.",
    r"^update_block\.mask\.0\.": "mask_predictor.convrelu.0.",
    r"^update_block\.mask\.2\.": "mask_predictor.conv.",
}


def rename(name):
    for old, new in ORIGINAL.items():
        name = re.sub(old, new, name)
    return name


# ---------------------------------------------------------------------------------------------------------------------
# The flows of a clip of pictures


def clip_flows(model, frames, size=(520, 960), iterations=12, memory=MEMORY):
    """N pictures (H, W, 3) uint8 RGB -> the flow from each to the next, (N - 1, 2, H, W) float32 in pixels, on the CPU.

    As the release of Magic Fixup (`compute_flow`), it resizes every picture to `size`, whatever its shape, rounds it to
    whole numbers, and stretches the flow back.
    """
    H, W = frames[0].shape[:2]
    resized = []
    for frame in frames:
        x = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
        resized.append(F.interpolate(x, size, mode="bilinear").round_().div_(127.5).sub_(1))
    flow = model.flows(torch.cat(resized), iterations, memory).cpu()
    return F.interpolate(flow, (H, W), mode="bilinear") * torch.tensor([W / size[1], H / size[0]]).view(2, 1, 1)
