"""InstructPix2Pix: an edit told as an instruction. Brooks et al. 2023, arXiv 2211.09800.

Its network is a Stable Diffusion whose first layer also sees the picture, as an unscaled latent. It was trained with
either left out at times, so that there are two guidances: to the picture, and beyond that to the words. sd.load opens
its published weights, a folder or a file.
"""

import torch


def denoiser(model, seen, instructions, guidance=7.5, image_guidance=1.5, negative=""):
    """(z, t) -> the output (B, C, h, w) that both guidances give, equation 3.

    model         sd.StableDiffusion of 2 C input channels
    seen          (B, C, h, w), of `look_at`; instructions B texts
    negative      a text in place of none
    ValueError for another model.
    """
    C = model.vae.config.latent_channels
    if model.xl or model.unet.config.in_channels != 2 * C:
        raise ValueError(f"a model that follows instructions reads {2 * C} channels, the picture's beside its own")
    B = len(seen)
    context = model.encode_prompt([*instructions, negative])
    without = context[-1:].expand(B, -1, -1)
    keys_values = model.unet.keys_values(torch.cat([context[:-1], without, without]))
    beside = torch.cat([seen, seen, torch.zeros_like(seen)])

    def denoise(z, t):
        x = torch.cat([z.repeat(3, 1, 1, 1), beside], 1).to(context.dtype)
        both, image, neither = model.unet(x, t.repeat(3), keys_values).float().chunk(3)
        return neither + image_guidance * (image - neither) + guidance * (both - image)

    return denoise


def look_at(model, image):
    """(B, 3, H, W) in [-1, 1] -> (B, C, h, w): the posterior's mean, not scaled"""
    return model.encode_image(image) / model.vae.config.scaling_factor
