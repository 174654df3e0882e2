"""More strengths than the k + 1 that a change map has in k steps. Not in the paper, and off by default.

`python -m reproduce --only few_steps` measures it beside the paper's rule and two other ways.
"""

import torch

import diffdiff


def blend_overrides(denoise, z_init, change_map, sampler, noise, step_noise=None, callback=None):
    """`diffdiff.differential_diffusion`, but that a strength between two steps counts: such a pixel is overridden in
    full as long as the paper's rule says so, and once more in part.

    The mixture of what is there and the noised original has less variance than either, as their noise is not the same.
    So it is scaled, about the original, to the variance between theirs.

    Arguments and result as there; noise is one draw for all noise levels, and no step is skipped. At whole steps the
    result is the paper's own.
    """
    k = sampler.k
    position = diffdiff.down_sample(change_map.cpu(), z_init.shape[-2:]).double() * k
    whole = position.round()
    position = torch.where((position - whole).abs() < 1e-4, whole, position).float().to(z_init.device)
    z = sampler.noise_to(0, z_init, noise)
    state = None
    for i in range(k + 1):
        weight = (position - i + 1).clamp(0, 1)  # of the original: at i <= mu k all of it, at i >= mu k + 1 nothing
        if i:
            z_prime = sampler.noise_to(i, z_init, noise) if i < k else z_init
            original = sampler.noise_to(i, z_init, torch.zeros_like(noise)) if i < k else z_init
            mixed = original + keep_variance(z - original, z_prime - original, weight)
            z = torch.where(weight == 1, z_prime, torch.where(weight == 0, z, mixed))
        if i < k:
            draw = step_noise(i) if sampler.stochastic else None
            z, state = sampler.step(denoise, z, i, state, draw, weight > 0)
            if callback:
                callback(i, z)
    return z


def keep_variance(a, b, weight):
    """a, b (B, C, h, w), weight (B or 1, 1, h, w) of b -> their mixture, as large as a and b are in the mean"""
    part = ((weight > 0) & (weight < 1)).expand_as(a)
    mixed = torch.lerp(a, b, weight.expand_as(a))
    wanted = torch.lerp(a**2, b**2, weight.expand_as(a))
    wanted, found = ((x * part).sum((1, 2, 3), keepdim=True) for x in (wanted, mixed**2))
    return mixed * torch.where(found > 0, wanted / found, 1.0).sqrt()
