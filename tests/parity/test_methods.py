"""reproduce/'s other methods against diffusers, and against a release's computation, written anew."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import samplers
import sd
from reproduce import blended, pix2pix
from tests import small
from tests.small import randn

K = 6


@pytest.mark.slow
@pytest.mark.parametrize("guidance, image_guidance", [(7.5, 1.5), (3.0, 1.0)])
@torch.no_grad()
def test_both_guidances_of_instruct_pix2pix(tmp_path, guidance, image_guidance):
    """From the folder that we write, which diffusers opens as its own pipeline, and we again."""
    diffusers = pytest.importorskip("diffusers")
    model = small.stable_diffusion("pix2pix")
    sd.save(model, tmp_path)
    model = sd.load(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe).__name__ == "StableDiffusionInstructPix2PixPipeline"
    pipe.set_progress_bar_config(disable=True)
    image, noise, words = randn(2, 3, 16, 16).tanh(), randn(2, 4, 8, 8), ["a red circle", "two cats"]
    want = pipe(words, image / 2 + 0.5, K, guidance, image_guidance, latents=noise, output_type="latent").images
    denoise = pix2pix.denoiser(model, pix2pix.look_at(model, image), words, guidance, image_guidance)
    got = samplers.run_sampler(denoise, noise, samplers.make_sampler("ddim", model.schedule, K))
    assert small.relative_error(got, want) <= 1e-4


def test_a_single_file_of_instruct_pix2pix_and_other_models(tmp_path):
    file, _, model = small.original_file(tmp_path, "pix2pix", ".safetensors")
    assert sd.load(file).unet.config.in_channels == 8
    with pytest.raises(ValueError, match="reads 8 channels"):
        pix2pix.denoiser(small.stable_diffusion(), randn(1, 4, 8, 8), ["cats"])


@torch.no_grad()
def test_blended_latents_are_the_release_s(tmp_path):
    """Its DDIM loop on diffusers' network and scheduler: at each step another noise, and a mask that shrinks."""
    diffusers = pytest.importorskip("diffusers")
    model = small.stable_diffusion()
    sd.save(model, tmp_path)
    peer = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    z_init, first, draws = randn(1, 4, 8, 8), randn(1, 4, 8, 8, seed=1), randn(K, 1, 4, 8, 8, seed=2)
    keep = torch.ones(16, 16)
    keep[6:10, 4:8] = 0
    context, guidance = model.encode_prompt(["", "a red circle"]), 5.0

    small_mask = (1 - keep[::2, ::2]).numpy()
    masks = [cv2.dilate(small_mask, np.ones((n, n))) for n in (5, 3)] + [small_mask]
    masks = torch.stack([torch.as_tensor(m).float() for m in masks])
    scheduler.set_timesteps(K)
    z = scheduler.add_noise(z_init, first, scheduler.timesteps[:1])
    for i, t in enumerate(scheduler.timesteps):
        mask = masks[i // (K // len(masks) + 1)]
        z = scheduler.add_noise(z_init, draws[i], t[None]) * (1 - mask) + mask * z
        without, given = peer(torch.cat([z, z]), t, context).sample.chunk(2)
        z = scheduler.step(without + guidance * (given - without), t, z).prev_sample

    denoise = model.denoiser("a red circle", guidance=guidance)
    sampler = samplers.make_sampler("ddim", model.schedule, K)
    got = blended.edit(denoise, z_init, keep, sampler, first, 2, lambda i: draws[i])
    assert small.relative_error(got, z) <= 1e-4


@pytest.mark.slow
def test_the_background_is_reconstructed_as_in_the_release(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model, steps = small.stable_diffusion(), 5
    sd.save(model, tmp_path)
    peer = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").requires_grad_(False)
    original, edited, mask = randn(1, 3, 16, 16).tanh(), randn(1, 3, 16, 16, seed=1).tanh(), torch.zeros(1, 1, 16, 16)
    mask[..., :6] = 1  # theirs: 1 = edit
    z = peer.encode(edited).latent_dist.mode()
    before = peer.decode(z).sample
    optimizer = torch.optim.Adam(peer.decoder.requires_grad_(True).parameters(), lr=0.0001)
    for _ in range(steps):
        optimizer.zero_grad()
        x = peer.decode(z).sample
        loss = F.mse_loss(edited * mask, x * mask) + F.mse_loss(original * (1 - mask), x * (1 - mask)) * 100
        loss.backward()
        optimizer.step()
    want = peer.decode(z).sample.detach()
    got = blended.reconstruct_background(model.vae, original, edited, 1 - mask, steps)
    assert (want - before).abs().max() > 0.01  # something was learned
    assert small.relative_error(got, want.clamp(-1, 1)) <= 1e-4
