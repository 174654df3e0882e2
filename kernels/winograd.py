"""Stable Diffusion quick on a CPU: 3x3 convolutions with a quarter of the multiplications.

    quicken(model.unet)              each convolution in it goes the fastest way there is
    quicken(model.vae, keep=False)   the same without the memory, for a network that runs once

Lavin & Gray 2015, *Fast Algorithms for Convolutional Neural Networks*, arXiv 1509.09308; after
Winograd, Toom and Cook. For m outputs in a row of a filter g with 3 taps, which see n = m + 2
inputs d, n multiplications are enough, not 3 m:

    y = A^T [(G g) * (B^T d)]                  along one side: their equation 6
    Y = A^T [(G g G^T) * (B^T d B)] A          along both: equation 8

where A, B, G are constant. Filter and signal are polynomials, convolving is multiplying them, and
polynomials that are known at n points are multiplied point by point. Summed over the channels, the
n^2 products `*` are n^2 matrix products, (tiles, C) times (C, K): what a CPU does best. F(2x2, 3x3)
takes 4 multiplications per output, F(4x4, 3x3) takes 2.25, the plain sum 9.

The plain version of everything here is `F.conv2d`.
"""

import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# Besides infinity. Books have 0, 1, -1, 2, -2 for m = 4. These, found by trying, make the largest
# error 4.5 times less: in float32, over 320 channels, 3e-6 of the largest output (m = 2: 6e-7; the
# plain sum: 3e-7).
POINTS = {2: (0, 1, -1), 4: (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)}
# Half precision without AMX tiles is slower than single. It is computed in single, then rounded.
SLOW = () if torch.cpu._is_amx_tile_supported() else (torch.bfloat16, torch.float16)
FORMATS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
TILES = 256  # at a time: enough for a fast matrix product, and not too many for the cache

# --------------------------------------------------------------------------------------------------
# One convolution


def toom_cook(m):
    """A^T (m, n), G (n, 3), B^T (n, n) of F(m, 3), float64."""
    p, n = np.array(POINTS[m]), m + 2
    At, G, Bt = np.zeros((m, n)), np.zeros((n, 3)), np.zeros((n, n))
    for j in range(n - 1):
        others = np.delete(p, j)
        # The value at p_j of a polynomial, from its coefficients
        At[:, j] = p[j] ** np.arange(m)
        # The same, over the denominator of Lagrange's formula ...
        G[j] = p[j] ** np.arange(3) / np.prod(p[j] - others)
        # ... whose numerator this is: the coefficients of prod (x - p_i)
        Bt[j, :-1] = np.poly(others)[::-1]
    # At infinity the highest power is all there is.
    At[-1, -1] = G[-1, -1] = 1
    Bt[-1] = np.poly(p)[::-1]
    return At, G, Bt


def both_sides(matrix):
    """X -> M X M^T, as one matrix for an X that is written as a column."""
    return torch.from_numpy(np.kron(matrix, matrix)).float()


# Of A^T, G and B^T: each takes a tile, or a filter, that is written as a column
A, G, B = ({m: both_sides(toom_cook(m)[i]) for m in POINTS} for i in range(3))


def transform(weight, m):
    """weight (K, C, 3, 3) -> U = G g G^T of each of its filters g, (n^2, C, K)"""
    K, C = weight.shape[:2]
    return (G[m] @ weight.transpose(0, 1).reshape(C * K, 9).T).view(-1, C, K)


def convolve(x, U, bias, m):
    """F.conv2d(x, weight, bias, padding=1) from U = transform(weight, m).

    x (B, C, H, W), of any size  ->  (B, K, H, W), channels last in memory
    """
    pictures, C, H, W = x.shape
    K, n = U.shape[2], m + 2
    h, w = -(-H // m), -(-W // m)  # tiles of m x m outputs; the last ones may stand over

    # At a time: some rows of tiles, or where pictures are small, some pictures
    rows = min(h, max(1, TILES // w))
    some = max(1, TILES // (h * w))
    x = x.permute(0, 2, 3, 1)
    strip = x.new_zeros(min(some, pictures), rows * m + 2, w * m + 2, C)  # a pixel more all round
    out = x.new_empty(pictures, h, m, w, m, K)
    for b in range(0, pictures, some):
        for r in range(0, h, rows):
            # The inputs of these tiles, zero beyond the picture
            part = x[b : b + some, max(0, r * m - 1) : (r + rows) * m + 1]
            first = int(r == 0)
            last = first + part.shape[1]
            strip[:, :first] = strip[:, last:] = 0
            strip[: len(part), first:last, 1 : W + 1] = part
            seen = strip[: len(part), : min(rows, h - r) * m + 2]
            d = seen.unfold(1, n, m).unfold(2, n, m)  # (b, r, w, C, n, n)
            d = d.permute(4, 5, 0, 1, 2, 3)

            # Equation 8, and the bias
            V = B[m] @ d.reshape(n * n, -1)
            M = torch.bmm(V.view(n * n, -1, C), U)  # (n^2, tiles, K)
            Y = (A[m] @ M.view(n * n, -1)).view(m, m, *d.shape[2:5], K)
            here = out[b : b + some, r : r + rows]
            torch.add(Y.permute(2, 3, 0, 4, 1, 5), 0 if bias is None else bias, out=here)
    out = out.view(pictures, h * m, w * m, K)[:, :H, :W].permute(0, 3, 1, 2)
    return out.contiguous(memory_format=torch.channels_last)  # no copy, unless tiles stood over


def product(x, weight, bias, stride, padding):
    """F.conv2d as one matrix product, with the weights as they lie in memory; pairs as there."""
    K, C, *size = weight.shape
    x = F.pad(x.contiguous(), (padding[1], padding[1], padding[0], padding[0])).transpose(0, 1)
    taps = x.unfold(2, size[0], stride[0]).unfold(3, size[1], stride[1])  # (C, B, h, w, 3, 3)
    y = weight.flatten(1) @ taps.permute(0, 4, 5, 1, 2, 3).reshape(weight[0].numel(), -1)
    if bias is not None:
        y += bias[:, None]
    return y.view(K, *taps.shape[1:4]).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def pointwise(x, weight, bias):
    """F.conv2d with a 1x1 kernel, a matrix product for each picture -> (B, K, H, W)"""
    y = weight.flatten(1) @ x.flatten(2)
    if bias is not None:
        y += bias[:, None]
    return y.unflatten(2, x.shape[2:])


# --------------------------------------------------------------------------------------------------
# A network


class QuickConv2d(nn.Conv2d):
    """What `quicken` makes of an nn.Conv2d: parameters, results and gradients are the same."""

    keep = True  # whether U stays between calls
    kept = None  # (the weight that it was made of, that weight's version, U)

    def forward(self, x):
        if x.ndim != 4 or x.shape[1] != self.in_channels or not self.can_hurry(x):
            return super().forward(x)
        way = self.choose_way(*x.shape[2:])
        if way in POINTS:
            return convolve(x.float(), self.transform_weight(way), self.bias, way).to(x.dtype)

        # PyTorch's own convolution, or one matrix product
        y, weight, bias = x, self.weight, self.bias
        if x.dtype in SLOW:
            y, weight = y.float(), weight.float()
            bias = None if bias is None else bias.float()
        if way == "product":
            y = product(y, weight, bias, self.stride, self.padding)
        elif way == "pointwise":
            y = pointwise(y, weight, bias)
        else:
            y = y.contiguous(memory_format=FORMATS[way]) if way in FORMATS else y
            y = F.conv2d(y, weight, bias, self.stride, self.padding)
        return y.to(x.dtype)

    def choose_way(self, H, W):
        """The fastest way for pictures (H, W): m, "product", "pointwise", or the plain one:
        "channels last", "channels first", "as it comes".

        One for all batches, so that U is made once. Milliseconds on one core with AVX-512, plain ->
        quick. (An AMD EPYC, which has it too: 31 -> 28, 32 -> 37, 40 -> 38, 17 -> 21, 79 -> 61.)

             320 ->  320 channels, 64x64     45 ->  21    m = 4
             640 ->  640           32x32     51 ->  28    m = 2
            1280 -> 1280           16x16     70 ->  28    m = 2
            1280 -> 1280             8x8     37 ->  16    product
             512 ->  512           64x64    116 ->  57    m = 4   (the autoencoder's,
             128 ->  128         512x512    451 -> 246    m = 4    without keeping U)
        """
        C, K, pixels = self.in_channels, self.out_channels, H * W
        taps = math.prod(self.kernel_size)
        if taps == 1:
            few = pixels <= 16 * 16 and (*self.stride, *self.padding) == (1, 1, 0, 0)
            return "pointwise" if few else "as it comes"

        # Winograd, where there are enough channels to gain anything, and U is small beside the work
        square = self.kernel_size == (3, 3) and self.stride == self.padding == (1, 1)
        if square and min(K, C) >= 96 and (pixels >= 32 * 32 or K * C >= 256 * 256):
            U = {m: 4 * (m + 2) ** 2 * K * C for m in POINTS}  # bytes
            if U[4] <= pixels * 2**14:
                return 4
            if U[2] <= 2**27 and pixels >= 14 * 14:
                return 2

        # Many weights for few pixels: nn.Conv2d would spend its time on rearranging the weights.
        if taps * K * C >= 2**20 and pixels <= 512 * math.prod(self.stride):
            return "product"
        # Small and narrow: the GroupNorm that follows prefers channels first.
        return "channels last" if pixels >= 32 * 32 else "channels first"

    def can_hurry(self, x):
        """Gradients, other devices, autocast and torch.compile want the plain convolution."""
        w = self.weight
        learning = x.requires_grad or any(p.requires_grad for p in self.parameters())
        if learning and torch.is_grad_enabled():
            return False
        if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        usual = x.dtype == torch.float32 or x.dtype in SLOW
        return x.is_cpu and w.is_cpu and x.dtype == w.dtype and usual

    def transform_weight(self, m):
        """-> U, the one that is kept unless the weight has changed"""
        w = self.weight
        if not self.keep or w.is_inference():  # an inference tensor does not say when it changes
            return transform(w.float(), m)
        version = m, w._version, w.data_ptr()
        if self.kept is None or self.kept[0] is not w or self.kept[1] != version:
            self.kept = w, version, transform(w.float(), m)
        return self.kept[2]

    def __getstate__(self):  # copies and pickles make their own U
        return {name: value for name, value in self.__dict__.items() if name != "kept"}


def quicken(network, keep=True):
    """Let every convolution of a network, in place, go the fastest way on a CPU; -> the network.

    keep  keep the transformed weights between calls: 16/9 or 4 times the memory of the weights, for
          Stable Diffusion's UNet 1.4 GiB in all. False: make them anew in each call

    What it gains depends on the processor. docs/speed.md has an Intel Xeon: with hold_memory, a step
    of Stable Diffusion's UNet takes 0.73 of the plain time, decoding 0.43. On one core of an AMD
    EPYC it takes 1.03 and 0.90: there is next to nothing to be gained.

    Layers stay plain where gradients are asked for, on other devices, and in half precision where
    that is fast (SLOW).
    Weights may change or be loaded later: that is noticed, except where `weight.data` is changed.
    A PyTorch without MKL is left alone: nothing was measured there.
    """
    if not torch.backends.mkl.is_available():
        return network
    for module in network.modules():
        if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
            continue
        if isinstance(module.padding, str) or module.groups != 1 or module.dilation != (1, 1):
            continue
        # Another class for the same object, as torch.nn.utils.parametrize does it: parameters, names
        # in the state_dict, hooks and all references to the layer stay. A new layer would need each
        # of them moved.
        module.__class__ = QuickConv2d
        module.keep = keep
    return network
