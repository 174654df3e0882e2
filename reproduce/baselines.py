"""What Differential Diffusion is compared with: other ways to several strengths, and pasting an edit into its original.

The first take their arguments as diffdiff.py's functions do, in latents; the last work on 8-bit pictures.
"""

import cv2
import numpy as np
import torch

import diffdiff
import samplers

# ---------------------------------------------------------------------------------------------------------------------
# Section 5.1. What 5.2 compares with has files of its own: blended, diffedit, pix2pix


def masked_noise(denoise, z_init, change_map, sampler, noise, step_noise=None, callback=None):
    """Baseline II of Figure 8: noise of another size at every pixel, and an ordinary run from there.

    The model has only ever seen noise of one size at a time, and breaks down. (The paper multiplies the noise "by the
    change map"; as its maps are black where the picture changes, that has to be 1 - mu.)
    """
    noise = noise * (1 - diffdiff.down_sample(change_map.cpu(), z_init.shape[-2:])).to(noise.device)
    return samplers.run_sampler(denoise, sampler.noise_to(0, z_init, noise), sampler, 0, step_noise, callback)


def edit_level_by_level(edit, image, change_map, levels, keep_outside):
    """Baselines I, III and IV of Figure 8: the map cut into `levels` masks of one strength, edited one after another.

    edit          (image, map) -> image (B, 3, H, W): a whole edit, through the autoencoder and back
    image         (B, 3, H, W)
    change_map    (..., H, W)
    keep_outside  False, composition (I): each edit is made on the last one's whole picture, which decays with every
                  pass through the autoencoder. True, tiling (III, and IV with 5 levels): pixels outside the mask are
                  put back after each edit
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


ORDER = torch.tensor([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) / 16  # Bayer's


def dither(denoise, z_init, change_map, sampler, noise, **options):
    """More strengths than the k + 1 of k steps: what lies between two of them is shared out among neighbours, over
    4 x 4 latents. Whole k-ths stay as they are, so that black is black and white is white."""
    mu_s = diffdiff.down_sample(change_map.cpu(), z_init.shape[-2:])
    h, w = mu_s.shape[-2:]
    order = ORDER.repeat(-(-h // 4), -(-w // 4))[:h, :w]
    mu_s = torch.floor(mu_s.double() * sampler.k + order + 1e-4).clamp(max=sampler.k) / sampler.k
    return diffdiff.differential_diffusion(denoise, z_init, mu_s, sampler, noise, **options)


def own_schedules(denoise, z_init, change_map, sampler, noise, step_noise=None, callback=None):
    """Likewise, for ddim and lcm: between two of them a pixel starts at a noise level of its own, below that of its
    last override, and its first step goes from there to the next common level.

    With x0 of the model and rho = sigma / alpha, a step of DDIM from rho to rho' keeps rho' / rho of the difference
    between what a pixel was and x0. LCM keeps nothing of it.
    """
    k, ladder, schedule = sampler.k, sampler.ladder, sampler.ladder.schedule
    mu_s = diffdiff.down_sample(change_map.cpu(), z_init.shape[-2:])
    last = diffdiff.last_override(mu_s, k).to(z_init.device)
    weight = (mu_s * k).to(z_init.device) - last  # how far below, 0 .. 1 of the way to the next level
    levels = torch.tensor([*ladder.timesteps, 0.0]).to(weight)
    outputs = []

    def watched(z, t):
        outputs.append((denoise(z, t), z, int(t[0])))
        return outputs[-1][0]

    z = sampler.noise_to(0, z_init, noise)
    state = None
    for i in range(k):
        if i:
            z = torch.where(last < i, z, sampler.noise_to(i, z_init, noise))
        draw = step_noise(i) if sampler.stochastic else None
        z, state = sampler.step(watched, z, i, state, draw)
        x0, _ = schedule.convert_output(*outputs.pop())
        level = torch.lerp(levels[i], levels[i + 1], weight).long().clamp(min=0)
        alpha, sigma = (x.to(z)[level] for x in (schedule.alpha, schedule.sigma))
        kept = ladder.rho[i + 1] * alpha / sigma
        already = 0 if sampler.stochastic else ladder.rho[i + 1] / ladder.rho[i]
        own = z + ladder.alpha[i + 1] * (kept.clamp(max=1) - already) * (z_init - x0)
        z = torch.where((last == i) & (weight > 1e-3), own, z)
    return torch.where(last < k, z, z_init)


# ---------------------------------------------------------------------------------------------------------------------
# Figures 6 and 12: softening


def standard_softening(denoise, z_init, change_map, sampler, noise, step_noise=None):
    """As Stable Diffusion's web UI softens: after each step the latent becomes a mixture with the noised original, in
    the proportions of the blurred mask."""
    keep = diffdiff.down_sample(change_map, z_init.shape[-2:]).to(z_init.device)
    z = sampler.noise_to(0, z_init, noise)
    for i in range(sampler.k):
        z, _ = sampler.step(denoise, z, i)
        original = sampler.noise_to(i + 1, z_init, noise) if i + 1 < sampler.k else z_init
        z = keep * original + (1 - keep) * z
    return z


def paste_alpha(original, edited, mu):
    """Each pixel a mixture of both. Here and below: original, edited (H, W, 3) uint8, mu (H, W) in [0, 1], 1 = the
    original -> (H, W, 3) uint8"""
    mixed = mu[..., None] * original + (1 - mu[..., None]) * edited.astype(np.float64)
    return mixed.round().astype(np.uint8)


def paste_poisson(original, edited, mu):
    """Pérez et al. 2003: the edit's gradients inside, the original's colours at the rim. Inside is where mu < 1/2, but
    for the picture's outermost pixels, which are the rim there."""
    inside = (mu < 0.5).astype(np.uint8) * 255
    inside[[0, 1, -2, -1]] = inside[:, [0, 1, -2, -1]] = 0
    if not inside.any():
        return original.copy()
    x, y, w, h = cv2.boundingRect(inside)
    return cv2.seamlessClone(edited, original, inside, (x + w // 2, y + h // 2), cv2.NORMAL_CLONE)


def paste_laplace(original, edited, mu):
    """Burt & Adelson 1983: each band of frequencies is mixed by a map as smooth as the band."""
    levels = max(1, int(np.log2(min(mu.shape))) - 2)
    a, b, m = (np.asarray(x, np.float32) for x in (original, edited, mu))
    bands = []  # finest first
    for _ in range(levels):
        smaller = [cv2.pyrDown(x) for x in (a, b, m)]
        size = m.shape[::-1]
        bands.append(m[..., None] * (a - cv2.pyrUp(smaller[0], dstsize=size))
                     + (1 - m[..., None]) * (b - cv2.pyrUp(smaller[1], dstsize=size)))
        a, b, m = smaller
    out = m[..., None] * a + (1 - m[..., None]) * b
    for band in reversed(bands):
        out = cv2.pyrUp(out, dstsize=band.shape[1::-1]) + band
    return out.round().clip(0, 255).astype(np.uint8)
