"""MasaCtrl: another pose of the same thing, by looking at the picture. Cao et al. 2023, arXiv 2304.08465.

Picture and edit are sampled side by side, from the same inverted noise. From a step and a block on, the edit's
self-attention reads keys and values of the picture's, while its queries stay its own: where things are comes from the
words, what they look like from the picture.
"""

import contextlib

import torch

import samplers

FIRST_STEP, FIRST_BLOCK = 4 / 50, 10 / 16  # shares of the steps and of Stable Diffusion's blocks, as in the release


@contextlib.contextmanager
def look_at_pictures(unet, B, first):
    """Inside, blocks from number `first` on read a batch of B pictures, B edits, and again for every pass of guidance:
    the keys and values (passes 2 B, heads, N, d) of edits are those of the pictures (equation 1)."""
    attentions = [block.attn1 for block in unet.transformer_blocks()[first:]]

    def of_pictures(attention):
        own = attention.keys_values

        def keys_values(f):
            rows = torch.arange(len(f)).view(-1, 2, B)[:, :1].expand(-1, 2, -1).flatten()
            return own(f[rows])

        return keys_values

    for attention in attentions:
        attention.keys_values = of_pictures(attention)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.keys_values


@torch.no_grad()
def edit(model, z_init, wanted, k, shown="", guidance=7.5, start=FIRST_STEP, block=FIRST_BLOCK):
    """Algorithm 1: the pictures z_init (B, C, h, w) as `wanted`, B prompts, say -> their edits, and the pictures again

    model  sd.StableDiffusion; k, steps of DDIM
    shown  what the pictures show; the release, which is followed here, leaves that empty
    """
    B, sampler = len(z_init), samplers.make_sampler("ddim", model.schedule, k)
    plain = model.denoiser([shown] * B)
    both = model.denoiser([shown] * B + list(wanted), guidance=guidance)
    z = samplers.invert_ddim(plain, z_init, sampler)[0].repeat(2, 1, 1, 1)
    first = round(block * len(model.unet.transformer_blocks()))
    for i in range(k):
        with look_at_pictures(model.unet, B, first) if i >= start * k else contextlib.nullcontext():
            z, _ = sampler.step(both, z, i)
    pictures, edits = z.chunk(2)
    return edits, pictures
