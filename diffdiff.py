"""Differential Diffusion: every pixel has its own strength. Levin & Fried 2023, arXiv 2306.00950.

A change map mu says how much of each pixel is kept: 0 (black) changes fully, 1 (white) stays.
Nothing is trained. The map becomes nested masks, one for each step of an ordinary sampler, and a
pixel that is to change little joins the edit late. The model is a function `denoise(z, t)`, so
that any diffusion model will do.

The paper counts steps t down from k. Our samplers count steps i = k - t up from 0:

    the paper   t = k        t = k - 1    ...   t = 1              t = 0
    here        i = 0        i = 1        ...   i = k - 1          i = k: there is no noise left
    threshold   (k - t) / k  =  i / k

Line numbers in comments are Algorithm 1's. Algorithm 2 puts `L = ...` in before line 4.
"""

import math
import warnings

import cv2
import numpy as np
import torch
import torch.nn.functional as F

import diffusion
import samplers

# -------------------------------------------------------------------------------------------------
# From a map to masks


def down_sample(mu, size):
    """mu (..., H, W) in [0, 1] -> mu_s (B or 1, 1, h, w), each value the mean over its block.

    (The release interpolates without a mean. That loses or doubles what is thinner than a latent.)
    ValueError for values outside 0 .. 1.
    """
    if not (mu.min() >= 0 and mu.max() <= 1):
        raise ValueError(
            f"a change map's values lie in 0 .. 1, not {mu.min():.3g} .. {mu.max():.3g}"
        )
    mu = mu.float().reshape(-1, 1, *mu.shape[-2:])
    return F.interpolate(mu, size=tuple(size), mode="area") if mu.shape[-2:] != tuple(size) else mu


def check_shape(change_map, z_init):
    """ValueError for anything but a grey map, one for all pictures or one for each."""
    if z_init.ndim != 4:
        raise ValueError(f"z_init is (B, C, h, w), not {tuple(z_init.shape)}")
    shape, B = tuple(change_map.shape), len(z_init)
    known = ((), (1,), (B,), (1, 1), (B, 1))
    # (3, H, W) looks like colours, also where there are three pictures.
    if len(shape) < 2 or 0 in shape or shape[:-2] not in known or shape[:-2] == (3,):
        raise ValueError(
            f"change_map is {shape}: it is grey, (H, W) or, for the {B} of z_init, ({B}, 1, H, W). "
            "Of an RGB map take the mean over its channels"
        )


def steps_to_run(mu_s, k):
    """L of section 3.3.1, for each picture: (B or 1, 1, 1, 1) of whole numbers.

    All results of the steps before are replaced, and have no effect. Where k min(mu_s) is no whole
    number, the paper's floor leaves out one more step, which would have had a small one.
    """
    return torch.floor((1 - mu_s.double().amin((1, 2, 3), keepdim=True)) * k + 1e-4).long()


def warn_of_no_step(strength, k):
    """A weak edit in few steps is none at all. A strength of 0, or nearly, asks for that."""
    if strength > 1e-4:
        warnings.warn(f"a strength of {strength:.2g} in {k} steps is less than one step: the "
                      "picture stays as it is. Take more steps, or more strength", stacklevel=3)


def last_override(mu_s, k):
    """The last step i at which a pixel is taken from the original: the largest i with i/k <= mu_s.

    One tensor of whole numbers, shaped as mu_s, holds all masks: line 8 is `last_override < i`.
    So masks are nested by construction, and a map's 0.7 equals a step's 7/10, which binary
    fractions do not.
    """
    return torch.floor(mu_s.double() * k + 1e-4).long()


# -------------------------------------------------------------------------------------------------
# Algorithms 1 and 2


@torch.no_grad()
def differential_diffusion(
    denoise, z_init, change_map, sampler=None, noise=None, *,
    skip=True, nested=True, step_noise=None, callback=None,
):
    """Algorithm 2, or with skip=False Algorithm 1. The caller encodes (line 2) and decodes (12).

    denoise     (z, t) -> the network's output, t (B,) long. Guidance and prompt are its business
    z_init      (B, C, h, w), the encoded original
    change_map  (H, W) or (B, 1, H, W), in pixels or in latents: 0 = change, 1 = keep. Each picture
                comes out as if it were alone
    sampler     of samplers.make_sampler. None: DDIM, 100 steps, Stable Diffusion's schedule
    noise       (B, C, h, w): one draw for all noise levels, as in the release. Or a function
                i -> (B, C, h, w), for a new draw at each level. None: drawn with seed 0
    skip        leave out the steps before L, whose results are all replaced (section 3.3.1)
    nested      False: Figure 3's ablation, which copies a pixel from the original only once
    step_noise  i -> (B, C, h, w), which a stochastic sampler needs: samplers.make_step_noise
    callback    called as callback(i, z) with the result of step i
      ->        z_0 (B, C, h, w). White pixels of a nested run are z_init's own, bit for bit
    ValueError for a map outside 0 .. 1 or of another shape, or a stochastic sampler without
    step_noise. A warning for a picture of which no step is run, though its map is not white.
    """
    # What the caller left out.
    sampler = sampler or samplers.make_sampler("ddim", diffusion.Schedule(), 100)
    if noise is None:
        noise = diffusion.draw_noise(z_init.shape[1:], [0] * len(z_init)).to(z_init)

    # The map in latents, and how many steps there are to run.
    k = sampler.k
    change_map = torch.as_tensor(change_map).cpu()
    check_shape(change_map, z_init)
    mu_s = down_sample(change_map, z_init.shape[-2:])  # line 3
    L = steps_to_run(mu_s, k)  # Algorithm 2, line 4
    if not skip:
        L = torch.full_like(L, k)
    skipped = k - L  # steps of each picture: while another's run, all of it is replaced
    for strength in (1 - mu_s.amin((1, 2, 3))[L.flatten() == 0]).tolist():
        warn_of_no_step(strength, k)
    first = skipped.min().item()
    last = last_override(mu_s, k).maximum(skipped).to(z_init.device)  # (B or 1, 1, h, w)
    skipped = skipped.to(z_init.device)
    chain_starts = set(last.unique().tolist())  # the steps at which the own chain of a pixel starts

    # Section 6 makes all z'_t ahead. At 64x64 they hold 6.5 MB, twice the paper's limit for the
    # whole method (section 5.4). To make one when it is needed costs one pass over a latent.
    def z_prime(i):  # lines 4 and 7: add_noise
        return sampler.noise_to(i, z_init, noise(i) if callable(noise) else noise)

    z = z_prime(first) if first < k else z_init
    state = None  # what a multi-step sampler remembers
    restarted = None  # (B or 1, 1, h, w) bool: the pixels whose past it must forget
    for i in range(first, k):  # t = k - i
        if i > first:
            mask = last < i if nested else (last != i) & (skipped < i)  # line 8: mu_s < (k - t) / k
            z = torch.where(mask, z, z_prime(i))  # line 9: z_mix
            # A pixel whose own chain starts here has no past to extrapolate from. Where no chain
            # starts, what was replaced will be replaced again, and its past does not matter.
            restarted = ~mask if i in chain_starts else None
        draw = step_noise(i) if step_noise and sampler.stochastic else None
        z, state = sampler.step(denoise, z, i, state, draw, restarted)  # lines 5, 10: denoise
        if callback:
            callback(i, z)
    return torch.where(last < k, z, z_init)  # t = 0: the original, without noise


# -------------------------------------------------------------------------------------------------
# Change maps for the paper's applications, and the one strength that they generalize


def soft_inpainting_map(mask, softness):
    """Section 4.1: mask (..., H, W), 0 = repaint, 1 = keep -> change map (B or 1, 1, H, W).

    softness  the standard deviation of the Gaussian blur, in pixels. 0 leaves the mask hard
    ValueError for a negative softness, or a mask outside 0 .. 1.
    """
    if softness < 0:
        raise ValueError(f"softness is a blur in pixels, 0 or more, not {softness}")
    x = down_sample(mask, mask.shape[-2:])
    if softness == 0:
        return x
    size = 2 * math.ceil(3 * softness) + 1
    blurred = [cv2.GaussianBlur(m, (size, size), softness, borderType=cv2.BORDER_REPLICATE)
               for m in x[:, 0].cpu().numpy()]
    soft = torch.from_numpy(np.stack(blurred))[:, None].to(x.device)
    return soft.round(decimals=5).clamp(0, 1)  # so that white stays 1


def strength_fan_map(strengths, height, width):
    """Section 4.2: one column for each strength, from left to right -> (1, 1, height, width).

    ValueError for strengths outside 0 .. 1, for none, or for more than `width`.
    """
    if not all(0 <= s <= 1 for s in strengths) or not strengths:
        raise ValueError(f"strengths lie in 0 .. 1, not {strengths}")
    if len(strengths) > width:
        raise ValueError(f"{len(strengths)} strengths do not fit into {width} columns")
    mu = 1 - torch.tensor(strengths, dtype=torch.float32)
    column = torch.arange(width) * len(strengths) // width
    return mu[column].expand(1, 1, height, width)


def sdedit(denoise, z_init, strength, sampler, noise, step_noise=None, callback=None):
    """SDEdit (Meng et al. 2022): one strength in 0 .. 1 for all pixels, as a constant map gives."""
    start = sampler.k - math.floor(strength * sampler.k + 1e-4)
    if start == sampler.k:
        warn_of_no_step(strength, sampler.k)
    z = sampler.noise_to(start, z_init, noise) if start < sampler.k else z_init
    return samplers.run_sampler(denoise, z, sampler, start, step_noise, callback)
