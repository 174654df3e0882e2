"""DiffEdit: an edit that finds its own mask. Couairon et al. 2022, arXiv 2210.11427, section 3.2.

Where a network tells noise differently for what a picture shows and for what is wanted, the picture is to change. Its
three models are one: (z, t) -> the network's output, for the text of either, and for none.

    wanted, shown, plain = (model.denoiser(text, guidance=g) for text, g in (("a cat", 7.5), ("a dog", 7.5), ("", 1)))
    z, mask = edit(wanted, shown, plain, z_init, sampler, noises)
"""

import torch

import samplers


@torch.no_grad()
def find_mask(wanted, shown, z_init, schedule, noises, level=0.5, extreme=3.0):
    """Step 1: (B, 1, h, w) bool, True where the two predictions differ.

    z_init   (B, C, h, w)
    noises   draws like z_init; the paper averages over 10
    level    of the noise: this share of all timesteps
    extreme  differences above so many times the mean count as so much, and half of it is the threshold. (The paper
             removes extreme values, scales to 0 .. 1 and cuts at 0.5; the number is of the program that people use)
    """
    t, difference = torch.full((len(z_init),), int(level * len(schedule.alphas_cumprod)), device=z_init.device), 0
    for noise in noises:
        z = schedule.add_noise(z_init, noise, t)
        a, b = (schedule.convert_output(denoise(z, t), z, t)[1] for denoise in (wanted, shown))
        difference = difference + (a - b).abs().mean(1, keepdim=True)
    return difference > extreme / 2 * difference.mean((1, 2, 3), keepdim=True)


@torch.no_grad()
def edit(wanted, shown, plain, z_init, sampler, noises, strength=0.8):
    """Steps 1 to 3 -> the edit (B, C, h, w), and its mask.

    sampler   DDIM's
    strength  how far the picture is taken back to noise: the paper's encoding ratio r
    """
    mask = find_mask(wanted, shown, z_init, sampler.ladder.schedule, noises)
    start = sampler.k - int(strength * sampler.k + 1e-4)
    levels = samplers.invert_ddim(plain, z_init, sampler, start)  # step 2
    z = levels[0]
    for i in range(start, sampler.k):  # step 3
        z, _ = sampler.step(wanted, z, i)
        z = torch.where(mask, z, levels[i + 1 - start])
    return z, mask
