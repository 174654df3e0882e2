"""Blended Latent Diffusion, as published. Avrahami, Fried & Lischinski 2023, arXiv 2206.02779.

An edit of one strength, inside a mask. Around it the original is put back at every step's noise, anew each time; thin
masks begin wide and shrink; and in the end the autoencoder's decoder is fitted to the one picture, so that its
background is the original's.
"""

import copy

import torch
import torch.nn.functional as F


def make_masks(mask, size, dilations):
    """mask (..., H, W), 0 = edit -> (dilations + 1, B, 1, h, w) bool, True = keep: from the widest edit to the mask."""
    edited = (mask.reshape(-1, 1, *mask.shape[-2:]) < 0.5).float()
    edited = F.interpolate(edited, size=tuple(size), mode="nearest-exact")  # as the release; ours take the mean
    wider = [F.max_pool2d(edited, 2 * j + 1, 1, j) for j in reversed(range(dilations + 1))]
    return torch.stack(wider) == 0


def edit(denoise, z_init, mask, sampler, noise, dilations=0, step_noise=None):
    """Algorithm 1 of the paper, as its program has it; called as diffdiff's functions are.

    dilations   how often the mask is dilated at first; a step more for each (section 4.3)
    step_noise  of the original at each step; None: `noise` at all of them
    """
    kept = make_masks(mask, z_init.shape[-2:], dilations).to(z_init.device)
    interval = sampler.k // len(kept) + 1  # steps that a mask lasts
    z = sampler.noise_to(0, z_init, noise)
    for i in range(sampler.k):
        fresh = noise if step_noise is None else step_noise(i).to(z)
        z = torch.where(kept[i // interval], sampler.noise_to(i, z_init, fresh), z)
        z, _ = sampler.step(denoise, z, i)
    return z


@torch.inference_mode(False)
def reconstruct_background(vae, original, edited, mask, steps=75, lr=1e-4, weight=100):
    """Section 4.2: a copy of the decoder learns one picture -> what it makes of the edit, (1, 3, H, W).

    original, edited  (1, 3, H, W) in [-1, 1]; mask (..., H, W), 0 = edit
    weight            of the background
    """
    original, edited = original.clone(), edited.clone()  # out of inference mode
    keep = (mask >= 0.5).to(edited).reshape(1, 1, *mask.shape[-2:])
    with torch.no_grad():
        h = vae.post_quant_conv(vae.encode(edited)[0])
    decoder = copy.deepcopy(vae.decoder).requires_grad_(True)
    optimizer = torch.optim.Adam(decoder.parameters(), lr)
    with torch.enable_grad():
        for _ in range(steps):
            x = decoder(h)
            loss = F.mse_loss(x * (1 - keep), edited * (1 - keep))
            loss = loss + weight * F.mse_loss(x * keep, original * keep)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return decoder(h).clamp(-1, 1)
