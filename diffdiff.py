"""Differential Diffusion: every pixel of an edit has its own strength. Levin & Fried 2023, arXiv 2306.00950.

A change map mu says how much of each pixel is kept: 0 (black) changes fully, 1 (white) stays. Nothing is trained; the
map is turned into nested masks, one for each step of an ordinary sampler, and a pixel joins the edit late if it is to
change little. The model is passed in as a function `denoise(z, t) -> output`, so any diffusion model will do.

What the paper calls step t of k, counting down, is step i = k - t of our samplers, counting up:

    the paper   t = k        t = k - 1    ...   t = 1              t = 0
    here        i = 0        i = 1        ...   i = k - 1          i = k: no noise is left, so denoising changes nothing
    threshold   (k - t) / k  =  i / k

Line numbers in comments are Algorithm 1's. Algorithm 2 is the same with `L = ...` put in before line 4.
"""

import math

import torch
import torch.nn.functional as F

import diffusion

# ---------------------------------------------------------------------------------------------------------------------
# From a map to masks


def down_sample(mu, size):
    """mu (..., H, W) in [0, 1] -> mu_s (B or 1, 1, h, w): the mean over the pixels that each latent pixel covers.

    (The released program interpolates without averaging, which loses or doubles structures thinner than a latent.)
    """
    if not (mu.min() >= 0 and mu.max() <= 1):
        raise ValueError(f"a change map's values lie in 0 .. 1, not {mu.min():.3g} .. {mu.max():.3g}")
    mu = mu.float().reshape(-1, 1, *mu.shape[-2:])
    return F.interpolate(mu, size=tuple(size), mode="area") if mu.shape[-2:] != tuple(size) else mu


def steps_to_run(mu_s, k):
    """L of section 3.3.1: the steps before have no effect, since their results are overwritten everywhere."""
    return math.floor((1 - mu_s.double().min().item()) * k + 1e-4)


def last_override(mu_s, k):
    """The last step at which each pixel is still taken from the noised original: the largest i with i / k <= mu_s.

    All masks in one tensor of whole numbers: line 8's `mu_s < i / k` is `last_override(mu_s, k) < i`. Written so, masks
    are nested by construction, and a map's 0.7 and a step's 7 / 10 are equal although neither is exact in binary.
    """
    return torch.floor(mu_s.double() * k + 1e-4).long()


# ---------------------------------------------------------------------------------------------------------------------
# Algorithms 1 and 2


@torch.no_grad()
def differential_diffusion(
    denoise, z_init, change_map, sampler=None, noise=None, *, skip=True, nested=True, step_noise=None, callback=None
):
    """Algorithm 2 of the paper, or with skip=False Algorithm 1, in latent space: encoding (line 2) and decoding
    (line 12) are the caller's.

    denoise     (z, t) -> the network's output, t (B,) long; guidance and prompt are its own business
    z_init      (B, C, h, w), the encoded original
    change_map  (H, W), (B, 1, H, W) or already at (h, w): 0 = change, 1 = keep
    sampler     of diffusion.make_sampler; None: DDIM, 100 steps, Stable Diffusion's schedule
    noise       (B, C, h, w): one draw noises the original to every level, as in the release. Or a function
                i -> (B, C, h, w), for a fresh draw at each. None: drawn with seed 0
    skip        leave out the steps whose result is overwritten everywhere (section 3.3.1)
    nested      False: the ablation of Figure 3, a pixel is copied from the original once only
    step_noise  i -> (B, C, h, w), needed by a stochastic sampler: diffusion.make_step_noise
    callback    called as callback(i, z) with the result of step i
      ->        z_0 (B, C, h, w).  White pixels of a nested run are z_init's own, bit for bit.
    ValueError for a map outside 0 .. 1, or a stochastic sampler without step_noise.
    """
    sampler = sampler or diffusion.make_sampler("ddim", diffusion.Schedule(), 100)
    if noise is None:
        noise = torch.randn(z_init.shape, generator=torch.Generator().manual_seed(0)).to(z_init)
    k = sampler.k
    mu_s = down_sample(change_map.cpu(), z_init.shape[-2:])  # line 3
    L = steps_to_run(mu_s, k) if skip else k  # Algorithm 2, line 4
    first = k - L

    # All masks are known ahead. So are all z'_t (section 6), but a z'_t costs one pass over a latent when it is needed,
    # and a hundred of them at 64x64 would hold 6.5 MB, twice what the paper's whole method adds (section 5.4).
    fresh = noise if callable(noise) else lambda i: noise

    def z_prime(i):  # lines 4, 7: add_noise
        return sampler.noise_to(i, z_init, fresh(i)) if i < k else z_init

    last = last_override(mu_s, k).to(z_init.device)
    # Line 8: mu_s < (k - t) / k. Without nesting, section 3.3: only pixels between this threshold and the next.
    mask = [(last < i) if nested else (last != i) for i in range(first, k + 1)]
    starts = set(last.unique().tolist())  # steps at which some pixel is overwritten for the last time

    z, state = z_prime(first), None
    for i in range(first, k):  # t = k - i
        if i > first:
            z = torch.where(mask[i - first], z, z_prime(i))  # line 9: z_mix
        # A pixel whose own chain starts here has no past that a multi-step sampler could extrapolate from: tell it what
        # was overwritten. Where no chain starts, what was overwritten will be so again, and its past does not matter.
        restarted = ~mask[i - first] if i > first and i in starts else None
        draw = step_noise(i) if step_noise and sampler.stochastic else None
        z, state = sampler.step(denoise, z, i, state, draw, restarted)  # lines 5 and 10: denoise
        if callback:
            callback(i, z)
    return torch.where(mask[-1], z, z_prime(k))  # t = 0: lines 7 to 9, and line 10 has no noise left to take


# ---------------------------------------------------------------------------------------------------------------------
# Change maps for the paper's applications


def soft_inpainting_map(mask, softness):
    """Section 4.1: mask (..., H, W), 0 = repaint, 1 = keep, blurred by a Gaussian of `softness` pixels -> a change map.

    The softness is the standard deviation, as Pillow's GaussianBlur takes it. 0 leaves the mask hard.
    """
    if softness < 0:
        raise ValueError(f"softness is a blur in pixels, 0 or more, not {softness}")
    x = mask.float().reshape(-1, 1, *mask.shape[-2:])
    if softness == 0:
        return x
    radius = math.ceil(3 * softness)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / softness) ** 2)
    kernel = (kernel / kernel.sum())[None, None, None]  # (1, 1, 1, 2 radius + 1)
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="replicate"), kernel)
    return F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), kernel.mT).clamp(0, 1)


def strength_fan_map(strengths, height, width):
    """Section 4.2: columns of equal strength, from left to right -> a change map (1, 1, height, width)."""
    if not all(0 <= s <= 1 for s in strengths) or not strengths:
        raise ValueError(f"strengths lie in 0 .. 1, not {strengths}")
    columns = torch.arange(width) * len(strengths) // width
    return (1 - torch.tensor(strengths, dtype=torch.float32)[columns]).expand(1, 1, height, width)


# ---------------------------------------------------------------------------------------------------------------------
# What the paper compares with: sections 5.1 and 5.2


def sdedit(denoise, z_init, strength, sampler, noise, step_noise=None, callback=None):
    """SDEdit (Meng et al. 2022): one strength in 0 .. 1 for the whole picture. What a constant map amounts to."""
    start = sampler.k - math.floor(strength * sampler.k + 1e-4)
    z = sampler.noise_to(start, z_init, noise) if start < sampler.k else z_init
    return diffusion.run_sampler(denoise, z, sampler, start, step_noise, callback)


def blended_latent_diffusion(denoise, z_init, mask, sampler, noise, strength=1.0, **options):
    """Blended Latent Diffusion (Avrahami et al. 2023): mask (..., H, W), 0 = edit, 1 = keep; two strengths, no more.

    After each step the region outside the edit is put back at that step's noise level: a map of two values.
    """
    hard = (down_sample(mask.cpu(), z_init.shape[-2:]) > 0.5).float()
    return differential_diffusion(denoise, z_init, 1 - strength * (1 - hard), sampler, noise, **options)


def masked_noise(denoise, z_init, change_map, sampler, noise, step_noise=None, callback=None):
    """Baseline II of Figure 8: noise of another size at every pixel, and an ordinary run from there.

    The model has only ever seen noise of one size at a time, and breaks down. (The paper multiplies the noise "by the
    change map"; as its maps are black where the picture changes, that has to be 1 - mu.)
    """
    noise = noise * (1 - down_sample(change_map.cpu(), z_init.shape[-2:])).to(noise.device)
    return diffusion.run_sampler(denoise, sampler.noise_to(0, z_init, noise), sampler, 0, step_noise, callback)


def one_strength_at_a_time(edit, image, change_map, levels, keep_outside):
    """Baselines I, III and IV of Figure 8: the map cut into `levels` masks of one strength, edited one after another.

    edit          (image, map) -> image (B, 3, H, W): a whole edit, through the autoencoder and back
    image         (B, 3, H, W)
    change_map    (..., H, W)
    keep_outside  False, composition: each edit is made on the last one's whole picture, which decays with every pass
                  through the autoencoder. True, tiling: pixels outside the mask are put back after each edit
      ->          (B, 3, H, W)
    """
    mu = change_map.to(image.device).reshape(-1, 1, *change_map.shape[-2:])
    bin_of = (mu * levels).long().clamp(max=levels - 1)
    for b in bin_of.unique().tolist():  # from the strongest edit to the weakest
        inside = bin_of == b
        strength_map = torch.where(inside, mu[inside].mean(), torch.ones_like(mu))
        edited = edit(image, strength_map)
        image = torch.where(inside, edited, image) if keep_outside else edited
    return image


def composition(edit, image, change_map, levels=100):
    """Baseline I, section 5.1: `levels` edits one upon the other, each of the whole picture. Arguments as above."""
    return one_strength_at_a_time(edit, image, change_map, levels, keep_outside=False)


def tiling(edit, image, change_map, levels=100):
    """Baseline III, section 5.1: `levels` edits, of which only the pixels inside the mask are taken."""
    return one_strength_at_a_time(edit, image, change_map, levels, keep_outside=True)


def five_tiles(edit, image, change_map):
    """Baseline IV, section 5.1: tiling with wide tiles. All levels between two multiples of 0.2 are edited alike."""
    return one_strength_at_a_time(edit, image, change_map, 5, keep_outside=True)


# ---------------------------------------------------------------------------------------------------------------------
# How strong an edit is, where, and how well that follows its map: section 5.2. For anyone's pictures:
#
#     metric = published.load_lpips(*published.find_lpips())
#     E_M = edit_strength_map(metric(x, edited, spatial=True), metric(x, edited_under_a_black_map, spatial=True))
#     cam(M, E_M), dam(M, E_M)


def edit_strength_map(distance, distance_black):
    """E_M of section 5.2.1: the biased measurement under a map, less that under a black one (all changes), (H, W).

    distance, distance_black  (N, H, W) or (N, 1, H, W): how far each of N edits is from its original, at every pixel;
                              of the same N originals, under the map and under the black map. The more, the less noise

    It is 0 where all changes and lower where less does. So it falls as the map rises, and Pearson's correlation of the
    two is negative where an edit obeys; the paper's figures and Table 1 show it the other way round, and so does `cam`.
    """
    if distance.shape != distance_black.shape:
        raise ValueError(f"the same pairs are measured under both maps, not {tuple(distance.shape)} and "
                         f"{tuple(distance_black.shape)}")
    return (distance.double() - distance_black.double()).mean(0).squeeze(0)


def cam(change_map, change):
    """Correlation Adherence Metric: Pearson's correlation of the map with how much each pixel was *kept*.

    change_map, change: of one shape, E_M or any other measure of change. A higher map value means less change, so the
    sign of `change` is turned to make 1 the best score, as in the paper's Table 1. Of a map or a change that is the
    same everywhere there is no correlation: NaN.
    """
    a, b = change_map.double().flatten(), -change.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    return (a @ b / (a.norm() * b.norm())).item()


def dam(change_map, change):
    """Distance Adherence Metric: what is left of the map once the change, scaled and shifted to fit, is taken off.

        min over a, b of || M - a E_M + b ||_F                          0 is best; in map values, over all pixels

    The least squares have a closed form, ||M - mean(M)||_F sqrt(1 - CAM^2). For one map it is therefore a function of
    |CAM|: an edit that does the opposite of its map has the best score as well (Figure 26).
    """
    a, b = change_map.double().flatten(), change.double().flatten()
    a, b = a - a.mean(), b - b.mean()  # the best shift makes both means equal
    slope = a @ b / (b @ b) if b.any() else 0.0  # the best scale; of no change at all, none
    return (a - slope * b).norm().item()


def soft_edges(image, where=None):
    """How soft a picture's edges are, whatever their contrast: the share of its steps from pixel to pixel that another
    blur leaves as they are. Sharp edges lose most of theirs to it, soft ones little (Crete et al. 2007).

    image (B, C, H, W); where (B or 1, 1, H, W), 1 = look here; None: everywhere  ->  (B,) in 0 .. 1, 1 = soft
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
