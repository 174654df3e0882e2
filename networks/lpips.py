"""LPIPS 0.1: how different two pictures look, as a pretrained network sees them. Zhang et al. 2018, arXiv 1801.03924.

    model = published.load_lpips("alexnet-owt-7be5be79.pth", "alex.pth")
    d = model(x, y)                   one distance per pair: 0 = the same, larger = less alike
    d = model(x, y, spatial=True)     where they differ: a map of the pictures' size

Equation 1 of the paper: at several depths l of the network, features y^l are scaled to unit length along the channels,
and their squared differences are weighted by w_l, learned from human judgements, summed over the channels and averaged
over the picture:

    d(x, y) = sum_l  1/(H_l W_l)  sum_hw  || w_l * (y^l_x,hw - y^l_y,hw) ||^2

The released heads hold the squares of w_l, none of them negative. Two files make one model:

    backbone   torchvision's alexnet, whose key names are `features.*`
    heads      alex.pth, of the `lpips` package's weights/v0.1: `lin0.model.1.weight`, ...
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

# ImageNet's mean and standard deviation, for pictures in [-1, 1]. Version 0.0 of the metric forgot this step.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

TAPS = (1, 4, 7, 9, 11)  # the layers whose output is compared
CHANNELS = (64, 192, 384, 256, 256)  # of these outputs


def make_alexnet():
    """Krizhevsky 2014, in one column, as far as it is looked into: numbered as torchvision's `features` are."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True),
    )


class LPIPS(nn.Module):
    """The metric on AlexNet. published.load_lpips makes one with weights."""

    def __init__(self):
        super().__init__()
        self.features = make_alexnet()
        for l, channels in enumerate(CHANNELS):
            # w_l^2, as a 1x1 convolution to one channel. Its place is 1, behind the dropout of the training.
            w = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{l}", nn.ModuleDict({"model": w}))

    def forward(self, x, y, spatial=False):
        """Pictures x, y (B, 3, H, W) in [-1, 1], sides of 31 pixels or more -> (B,), or (B, 1, H, W) if spatial.

        The average of a map is about, not exactly, the scalar: coarse layers are enlarged bilinearly. Differentiable
        everywhere, also where a layer sees nothing at all. ValueError if the pictures do not go together.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < 31:
            raise ValueError(f"two batches of pictures (B, 3, H, W) of one size, 31 pixels or more, are compared, not "
                             f"{tuple(x.shape)} and {tuple(y.shape)}")
        heads = [getattr(self, f"lin{l}")["model"] for l in range(len(TAPS))]
        return distance(zip(self.depths(x), self.depths(y)), heads, x.shape[2:] if spatial else None)

    def depths(self, x):
        """The features that are compared, (B, C_l, h_l, w_l), from the shallowest down."""
        shift, scale = (x.new_tensor(c)[:, None, None] for c in (SHIFT, SCALE))
        x = ((x - shift) / scale).contiguous(memory_format=torch.channels_last)  # poolings are faster so
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in TAPS:
                yield x


def distance(depths, heads, size=None):
    """Equation 1 on any network's features.

    depths  of each depth l the features of x and those of y, (B, C_l, h_l, w_l) each
    heads   of each depth (B, C_l, h_l, w_l) -> (B, 1, h_l, w_l), the weighted sum over the channels
    size    None, or (H, W)
      ->    (B,), or at a size where they differ, (B, 1, H, W)
    """
    def scale_to_unit(f):  # the norm's gradient at 0 is 0, not NaN
        return f * (1 / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10))

    d = 0
    for (f_x, f_y), head in zip(depths, heads):
        d_l = head((scale_to_unit(f_x) - scale_to_unit(f_y)).square())
        if size:
            d = d + F.interpolate(d_l, size=size, mode="bilinear", align_corners=False)
        else:
            d = d + d_l.mean((1, 2, 3))
    return d
