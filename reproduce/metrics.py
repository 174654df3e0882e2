"""What the papers measure: how strong an edit is, where, how well that follows its map; edges, shadows, errors.

For anyone's pictures, Differential Diffusion's section 5.2 is

    metric = published.load_lpips(*published.find_lpips())
    E_M = (metric(x, edited, spatial=True) - metric(x, edited_under_a_black_map, spatial=True)).mean(0)[0]
    cam(M, E_M), dam(M, E_M)

E_M is 0 where all changes and falls as the map rises, so that Pearson's correlation of the two is negative where an
edit obeys. The paper's figures and Table 1 show it the other way round, and so does `cam`.

The share of wrong shadows and reflections that Magic Fixup puts right, where the truth is known, is

    region = changed_shadows(reference, truth, objects)
    before, after, share = shadow_share(coarse, output, truth, region)
"""

import itertools

import torch
import torch.nn.functional as F

from networks import lpips

# ---------------------------------------------------------------------------------------------------------------------
# How strong an edit is, where, and how well that follows its map: Differential Diffusion, section 5.2


def cam(change_map, change):
    """Correlation Adherence Metric: Pearson's correlation of a map with how much each pixel was *kept*, 1 is best.

    change_map, change: of one shape, E_M or any other measure of change. NaN where either is the same everywhere.
    """
    a, b = change_map.double().flatten(), -change.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    return (a @ b / (a.norm() * b.norm())).item()


def dam(change_map, change):
    """Distance Adherence Metric: min over a, b of || M - a E_M + b ||_F, in map values over all pixels, 0 is best.

    The least squares have a closed form, ||M - mean(M)||_F sqrt(1 - CAM^2). So for one map DAM is a function of |CAM|,
    and an edit that does the opposite of its map has the best score as well (Figure 26).
    """
    a, b = change_map.double().flatten(), change.double().flatten()
    a, b = a - a.mean(), b - b.mean()  # the best shift makes both means equal
    slope = a @ b / (b @ b) if b.any() else 0.0  # the best scale; of no change at all, none
    return (a - slope * b).norm().item()


# ---------------------------------------------------------------------------------------------------------------------
# The toy perceptual distance: LPIPS without LPIPS's weights

DEPTHS = 2  # so many of the encoder's resolutions are compared: `python -m reproduce --only distance` says why


def toy_distance(vae, x, y):
    """LPIPS's equation 1 with nothing learned from people: our autoencoder's encoder, all of its channels alike.

    x, y (B, 3, H, W) in [-1, 1] -> (B, 1, H, W).  Not LPIPS: its numbers cannot be compared with the papers'.
    """
    return sum(itertools.islice(distances_by_depth(vae, x, y), DEPTHS))


def distances_by_depth(vae, x, y):
    """The same at each of the encoder's depths alone, one after another"""
    for features in encoder_depths(vae, torch.cat([x, y])):
        yield lpips.distance([features.chunk(2)], [lambda d: d.sum(1, keepdim=True)], x.shape[2:])


def encoder_depths(vae, x):
    """What the encoder sees at each resolution (B, C_l, h_l, w_l), and at the last one with a view of everything."""
    encoder, weight = vae.encoder, vae.quant_conv.weight
    x = encoder.conv_in(x.to(weight.dtype))
    for level in encoder.down_blocks:
        for block in level.resnets:
            x = block(x)
        yield x.float()
        for block in getattr(level, "downsamplers", ()):
            x = block(x)
    yield encoder.mid_block(x).float()


# ---------------------------------------------------------------------------------------------------------------------
# Colours, edges


def sky_and_ground(images):
    """images (B, 3, H, W) -> (B, 6): mean colour of the upper fifth, median colour of the lowest eighth"""
    h = images.shape[2]
    sky, land = images[:, :, : h // 5], images[:, :, -h // 8 :]
    return torch.cat([sky.mean((2, 3)), land.flatten(2).median(2).values], 1)


def sharpness(image):
    """image (B, 3, H, W) in [0, 1] -> (B, H - 1, W - 1): how steep its grey values are, per pixel. Blur lowers it."""
    grey = image.mean(1)
    dx, dy = grey[:, :-1, 1:] - grey[:, :-1, :-1], grey[:, 1:, :-1] - grey[:, :-1, :-1]
    return (dx**2 + dy**2).sqrt()


def soft_edges(image, where=None):
    """How soft a picture's edges are, whatever their contrast: the share of its steps from pixel to pixel that another
    blur leaves. Sharp edges lose most of theirs to it, soft ones little (Crete et al. 2007).

    image (B, C, H, W); where (B or 1, 1, H, W), 1 = look here, None: everywhere  ->  (B,) in 0 .. 1, 1 = soft
    A picture without any edge there has 1.
    """
    grey = image.double().mean(1, keepdim=True)
    where = torch.ones_like(grey) if where is None else where.to(grey)
    softness = []
    for axis in (2, 3):
        x, w = (y.transpose(axis, 3) for y in (grey, where.expand_as(grey)))  # along the last axis
        blurred = F.avg_pool2d(F.pad(x, (4, 4, 0, 0), mode="replicate"), (1, 9), stride=1)
        steps, left = x.diff(dim=3).abs(), blurred.diff(dim=3).abs()
        w = torch.minimum(w[..., 1:], w[..., :-1])
        total, lost = (steps * w).sum((1, 2, 3)), ((steps - left).clamp(min=0) * w).sum((1, 2, 3))
        softness.append(torch.where(total > 0, 1 - lost / total.clamp(min=1e-12), torch.nan))
    across, down = softness  # the softer of both, of those that there are
    return torch.fmax(across, down).nan_to_num(1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Shadows and reflections. Neither paper has this, since it takes the truth: a scene rendered, or photographed, again


def changed_shadows(reference, truth, objects, least=0.02):
    """Where an edit changes shadows and reflections: what differs, and is no object.

    reference, truth  (B, 3, H, W) in [0, 1], before the edit and truly after it, with the same camera and light
    objects           (B, H, W) bool: where any object is in either; a pixel more is left out, for their smoothed edges
    least             the smallest difference that counts: a photograph's noise may ask for more
      ->              (B, H, W) bool
    """
    near = F.max_pool2d(objects[:, None].float(), 3, 1, 1)[:, 0] > 0
    return ((truth - reference).abs().amax(1) > least) & ~near


def shadow_share(coarse, output, truth, region, norm=torch.square):
    """The coarse edit's mean error in a region, the output's, and the share of the former that is gone: three floats.

    coarse, output, truth  (B, 3, H, W)
    region                 (B, H, W) bool, of `changed_shadows`, or any other. ValueError if it is empty
    norm                   of a difference: torch.square or torch.abs

    The share is 1 where all is right, 0 where as much is wrong as before, negative where more is.
    """
    if not region.any():
        raise ValueError("the region is empty: nothing changes in it, so that there is nothing to put right")
    before, after = (norm(x - truth).mean(1)[region].mean() for x in (coarse, output))
    return before.item(), after.item(), (1 - after / before).item()


# ---------------------------------------------------------------------------------------------------------------------
# Standard errors


def resample(n, draws=1000):
    """How often each of n pairs is drawn, over n: weights (1 + draws, n) that sum to 1. First each once, then as a
    bootstrap draws them; always the same ones, so that what is computed with them is compared pair by pair."""
    picks = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    drawn = torch.zeros(draws, n).scatter_add_(1, picks, torch.full((draws, n), 1 / n))
    return torch.cat([torch.full((1, n), 1 / n), drawn])


def drawn_error(x, digits=4):
    """What was computed with `resample`'s weights, (1 + draws,) -> [its value, its standard error], rounded"""
    drawn = x[1:][x[1:].isfinite()]  # a draw of few pairs may have nothing to measure
    return [round(x[0].item(), digits), round(drawn.std().item(), digits)]


def mean_error(x):
    """(n,) -> [mean, its standard error], rounded to four digits after the point."""
    x = torch.as_tensor(x, dtype=torch.float64)
    return [round(x.mean().item(), 4), round((x.std() / len(x) ** 0.5).item(), 4)]


def is_surely_less(a, b):
    """Is a, pair by pair, less than b by more than two standard errors?  (n,) each"""
    difference, error = mean_error(torch.as_tensor(a).double() - torch.as_tensor(b).double())
    return difference < -2 * error
