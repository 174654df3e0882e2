"""LPIPS 0.1: how different two pictures look, as a pretrained network sees them. Zhang et al. 2018, arXiv 1801.03924.

    model = published.load_lpips("alexnet-owt-7be5be79.pth", "alex.pth")
    d = model(x, y)                   one distance per pair: 0 = the same, larger = less alike
    d = model(x, y, spatial=True)     where they differ: a map of the pictures' size

Equation 1 of the paper: at several depths l of the network, features y^l are scaled to unit length along the channels,
and their squared differences are weighted by w_l, learned from human judgements, summed over the channels and averaged
over the picture:

    d(x, y) = sum_l  1/(H_l W_l)  sum_hw  || w_l * (y^l_x,hw - y^l_y,hw) ||^2

The released heads hold the squares of w_l, none of them negative. Two files make one model:

    backbone   torchvision's alexnet, vgg16 or squeezenet1_1, whose key names are `features.*`
    heads      alex.pth, vgg.pth or squeeze.pth, of the `lpips` package's weights/v0.1: `lin0.model.1.weight`, ...
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# ImageNet's mean and standard deviation, for pictures in [-1, 1]. Version 0.0 of the metric forgot this step.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

# ---------------------------------------------------------------------------------------------------------------------
# The three networks, as far as they are looked into: the classifier and the last pooling are not built


class Fire(nn.Module):
    """SqueezeNet's block, Iandola et al. 2016: few channels in the middle, then 1x1 and 3x3 side by side."""

    def __init__(self, c_in, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(c_in, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = self.squeeze(x).relu_()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu_()


def alexnet():
    """Krizhevsky 2014, in one column."""
    return [
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True),
    ]


def vgg16():
    """Simonyan & Zisserman 2014, configuration D."""
    layers = []
    c_in = 3
    for c, n in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for _ in range(n):
            layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU(inplace=True)]
            c_in = c
    return layers


def squeezenet1_1():
    """Iandola et al. 2016, in the version that pools earlier. Its pooling covers the last, incomplete window too."""
    def pool():
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return [
        nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(inplace=True), pool(),
        Fire(64, 16, 64), Fire(128, 16, 64), pool(),
        Fire(128, 32, 128), Fire(256, 32, 128), pool(),
        Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
    ]


@dataclass(frozen=True)
class Network:
    layers: callable  # () -> the layers, numbered as torchvision's `features` are
    taps: tuple  # the layers whose output is compared
    channels: tuple  # of these outputs


NETWORKS = {
    "alexnet": Network(alexnet, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)),
    "vgg16": Network(vgg16, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)),
    "squeezenet1_1": Network(squeezenet1_1, (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512)),
}

# ---------------------------------------------------------------------------------------------------------------------
# The metric


class Head(nn.Module):
    """One layer's w_l^2, as a 1x1 convolution to one channel. Its place is 1, behind the dropout of the training."""

    def __init__(self, channels):
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x):
        return self.model(x)


class LPIPS(nn.Module):
    """network: a name in NETWORKS. published.load_lpips makes one with weights."""

    def __init__(self, network):
        super().__init__()
        self.network = NETWORKS[network]
        self.features = nn.Sequential(*self.network.layers())
        for l, channels in enumerate(self.network.channels):
            setattr(self, f"lin{l}", Head(channels))

    def forward(self, x, y, spatial=False):
        """Pictures x, y (B, 3, H, W) in [-1, 1], sides of 31 pixels or more -> (B,), or (B, 1, H, W) if spatial.

        The average of a map is about, not exactly, the scalar: coarse layers are enlarged bilinearly. Differentiable
        everywhere, also where a layer sees nothing at all. ValueError if the pictures do not go together.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < 31:
            raise ValueError(f"two batches of pictures (B, 3, H, W) of one size, 31 pixels or more, are compared, not "
                             f"{tuple(x.shape)} and {tuple(y.shape)}")
        heads = [getattr(self, f"lin{l}") for l in range(len(self.network.taps))]
        return distance(zip(self.depths(x), self.depths(y)), heads, x.shape[2:] if spatial else None)

    def depths(self, x):
        """The features that are compared, (B, C_l, h_l, w_l), from the shallowest down."""
        shift, scale = (x.new_tensor(c)[:, None, None] for c in (SHIFT, SCALE))
        x = ((x - shift) / scale).contiguous(memory_format=torch.channels_last)  # poolings are faster so
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.network.taps:
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
