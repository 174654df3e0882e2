"""DragDiffusion: points are dragged, and the picture follows. Shi et al. 2023, arXiv 2306.14435, section 3.

A UNet is tuned to the one picture. Its latent, inverted to a middle step, is optimised so that the UNet's features near
each handle point move a pixel towards its target; then the handle is found again, and so on. Denoising it, the edit's
self-attention reads keys and values of the picture's, as MasaCtrl does.
"""

import copy
from collections import deque

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import samplers
from reproduce import masactrl
from reproduce.toy_batches import base_loss

STEPS = 80  # of tuning, and of dragging at most
RANK, TUNING_RATE, TUNING_BATCH = 16, 5e-4, 4
STRENGTH = 0.7  # how far the picture is taken back to noise, 35 of 50 steps
RATE, KEPT = 0.01, 0.1  # Adam's, on the latent; lambda, the weight of what the mask keeps
SUPERVISED, TRACKED = 1, 3  # r_1 and r_2, of half the picture's pixels


class LowRank(nn.Module):
    """W -> W + B A, B zero at first (LoRA, Hu et al. 2021)"""

    def __init__(self, W, generator):
        super().__init__()
        self.A = nn.Parameter(torch.randn(RANK, W.shape[1], generator=generator) / RANK)
        self.B = nn.Parameter(torch.zeros(W.shape[0], RANK))

    def forward(self, W):
        return W + self.B @ self.A


def tune(model, z_init, context, steps):
    """Section 3.3 -> a copy of the UNet, all of whose attention has learned the one picture"""
    unet, added, generator = copy.deepcopy(model.unet).requires_grad_(False), [], torch.Generator().manual_seed(0)
    for block in unet.transformer_blocks():
        for attention in (block.attn1, block.attn2):
            for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
                added.append(LowRank(layer.weight, generator).to(layer.weight))
                parametrize.register_parametrization(layer, "weight", added[-1])
    optimizer = torch.optim.AdamW([p for a in added for p in a.parameters()], TUNING_RATE)
    z, context = (x.expand(TUNING_BATCH, *x.shape[1:]) for x in (z_init, context))
    for _ in range(steps):
        t = torch.randint(len(model.schedule.alphas_cumprod), (len(z),), generator=generator).to(z.device)
        noise = torch.randn(z.shape, generator=generator).to(z)
        base_loss(unet, model.schedule, z, context, t, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    for a in added:
        a.requires_grad_(False)
    return unet


def look(features, points):
    """features (1, C, h, w) at points (..., 2), x and y in their pixels -> (..., C)"""
    h, w = features.shape[-2:]
    grid = 2 * (points + 0.5) / torch.tensor([w, h]).to(points) - 1
    found = F.grid_sample(features, grid.reshape(1, 1, -1, 2), align_corners=False, padding_mode="border")
    return found[0, :, 0].T.unflatten(0, points.shape[:-1])


def square(radius):
    """All whole (x, y) of a square about 0, (N, 2)"""
    along = torch.arange(-radius, radius + 1.0)
    return torch.cartesian_prod(along, along)


def drag(step, z, keep, handles, targets, steps=STEPS):
    """Sections 3.4 and 3.5: motion supervision and point tracking, in turn -> z, and where the handles have come to

    step     z -> the next, less noisy latent; and features (1, C, H, W)
    keep     (1, 1, h, w), 1 = is to stay as it is; handles, targets (n, 2), in pixels of the features
    """
    near, nearby, h = square(SUPERVISED).to(z), square(TRACKED).to(z), handles
    with torch.no_grad():
        z_next, features = step(z)
        wanted = look(features, handles)  # (n, C)
    z = z.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], RATE)
    for i in range(steps):
        found, features = step(z)
        if i:  # the handle is where its features are now; equation 4
            around = h[:, None] + nearby
            apart = (look(features.detach(), around) - wanted[:, None]).abs().sum(2)
            h = around[torch.arange(len(h)), apart.argmin(1)]
        way = targets - h
        far = way.norm(dim=1)
        if (far < 1).all():
            break
        d = way / far.clamp(min=1)[:, None]
        patch = h[:, None] + near  # (n, 9, 2); equation 3. As in the release, the mean over channels is taken
        moved = look(features, patch + d[:, None]) - look(features.detach(), patch)
        loss = moved.abs().mean(2).sum() + KEPT * ((found - z_next) * keep).abs().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return z.detach(), h


@torch.inference_mode(False)
@torch.enable_grad()
def edit(model, z_init, shown, keep, handles, targets, k=50, steps=STEPS):
    """The whole of it, of one picture -> the edit (1, C, h, w), and how far from its target each handle is left (n,)

    model    sd.StableDiffusion; shown, a prompt that says what the picture shows
    z_init   (1, C, h, w)
    keep     (1, 1, H, W), 1 = is not to change; handles, targets (n, 2), x and y in the picture's pixels
    k        steps of DDIM
    """
    z_init, factor = z_init.clone(), model.vae.config.factor
    size = [side * factor // 2 for side in z_init.shape[-2:]]  # features are compared at half the picture's
    with torch.no_grad():
        context = model.encode_prompt([shown])
    unet = tune(model, z_init, context, steps)
    sampler, start = samplers.make_sampler("ddim", model.schedule, k), k - int(STRENGTH * k + 1e-4)
    seen = deque(maxlen=1)  # the last but one level's features
    unet.up_blocks[-2].upsamplers[0].conv.register_forward_hook(lambda module, args, out: seen.append(out))

    def denoise(z, t):
        return unet(z, t, context.expand(len(z), -1, -1))

    def step(z):
        z_next, _ = sampler.step(denoise, z, start)
        return z_next, F.interpolate(seen.pop(), size=size, mode="bilinear")

    with torch.no_grad():
        z = samplers.invert_ddim(denoise, z_init, sampler, start)[0]
    keep = F.interpolate(keep, size=z.shape[-2:], mode="area").to(z)
    dragged, h = drag(step, z, keep, handles.to(z) / 2, targets.to(z) / 2, steps)
    both, first = torch.cat([z, dragged]), round(masactrl.FIRST_BLOCK * len(unet.transformer_blocks()))
    with torch.no_grad(), masactrl.look_at_pictures(unet, 1, first):
        for i in range(start, k):
            both, _ = sampler.step(denoise, both, i)
    return both[1:], 2 * (targets.to(z) / 2 - h).norm(dim=1)
