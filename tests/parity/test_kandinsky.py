"""Kandinsky 2.2 against diffusers: networks, the prior's pipeline, image-to-image, Algorithm 1 under a map.

Both open the same two folders.
"""


import pytest
import torch

import diffdiff
import samplers
from models import adm, kandinsky, movq, prior
from models.image_encoder import ImageConfig, ImageEncoder, normalise
from tests import small_kandinsky
from tests.small import randn, relative_error
from vae import VAEConfig

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PROMPT, NEGATIVE, K = "a red circle", "two blue squares", 10
H, W = 16, 24  # pixels


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Ours; diffusers' pipelines of the prior and for image-to-image"""
    folders = small_kandinsky.write_folders(tmp_path_factory.mktemp("kandinsky"))
    peers = []
    for pipeline, folder, absent in ((diffusers.KandinskyV22PriorPipeline, folders[0], {"image_processor": None}),
                                     (diffusers.KandinskyV22Img2ImgPipeline, folders[1], {})):
        pipe = pipeline.from_pretrained(folder, **absent)
        pipe.set_progress_bar_config(disable=True)
        peers.append(pipe)
    ours = kandinsky.load(*folders)
    for peer, schedule in zip(peers, (ours.prior_schedule, ours.schedule)):
        torch.testing.assert_close(peer.scheduler.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-4, atol=1e-7)
        peer.scheduler.alphas_cumprod = torch.tensor(schedule.abar, dtype=torch.float64)  # its own cancel near t = 0
    return ours, *peers


def draw_in_peers(monkeypatch, module, draws):
    """What diffusers draws in this module, in turn; i -> a tensor that has the shape or is expanded to it"""
    numbers = iter(range(10**6))
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: draws(next(numbers)).expand(shape).clone())


# --- Networks -------------------------------------------------------------------------------------


@torch.no_grad()
def test_images_and_texts(models):
    ours, peer, _ = models
    x = randn(2, 3, 28, 28)
    assert relative_error(ours.image(x), peer.image_encoder(x).image_embeds) <= 1e-4
    wide = torch.rand(2, 3, 40, 60) * 2 - 1
    assert relative_error(ours.image.embed(wide), ours.image(normalise(wide, ours.image.config.side))) <= 1e-6
    pooled, states, seen = peer._encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    got = ours.encode_prompt([NEGATIVE, PROMPT])
    assert relative_error(got[0][seen], states[seen]) <= 1e-4 and relative_error(got[1], pooled) <= 1e-4
    assert torch.equal(got[2], seen)


@torch.no_grad()
def test_autoencoder(models):
    ours, _, peer = models
    x = torch.rand(2, 3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = ours.encode_image(x)
    assert z.shape == (2, 4, H // 2, W // 2) and relative_error(z, peer.movq.encode(x).latents) <= 1e-4
    assert relative_error(ours.decode(z), peer.movq.decode(z, force_not_quantize=True).sample) <= 1e-4


# --- Pipelines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_prior_pipeline(models, monkeypatch, negative):
    ours, peer, _ = models
    noise = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    draw_in_peers(monkeypatch, diffusers.schedulers.scheduling_unclip, samplers.make_step_noise((32,), [3]))
    want = peer(PROMPT, negative, num_inference_steps=kandinsky.STEPS, guidance_scale=kandinsky.GUIDANCE,
                latents=noise.expand(2 if negative else 1, -1))
    got = ours.embed(PROMPT, negative, seeds=[3])
    assert relative_error(got, torch.cat([want.negative_image_embeds, want.image_embeds])) <= 1e-4
    assert torch.equal(ours.embed(PROMPT, negative, guided=False, seeds=[3]), got[1:])


@pytest.mark.parametrize("strength", [0.4, 0.9])
@torch.no_grad()
def test_image_to_image_pipeline(models, monkeypatch, strength):
    """One strength for all pixels, of a map of one grey"""
    ours, _, peer = models
    x = torch.rand(1, 3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1
    states, noise = randn(2, 32, seed=1), randn(1, 4, H // 2, W // 2, seed=2)
    draws, first = samplers.make_step_noise(noise.shape[1:], [0]), K - round(K * strength)
    module = diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2_img2img
    draw_in_peers(monkeypatch, module, lambda i: noise)
    draw_in_peers(monkeypatch, diffusers.schedulers.scheduling_ddpm, lambda i: draws(first + i))
    options = dict(height=H, width=W, num_inference_steps=K, strength=strength, guidance_scale=4.0, output_type="pt")
    monkeypatch.setattr(peer.image_processor, "preprocess", lambda image, *_: image)
    want = peer(states[1:], x, states[:1], **options).images

    sampler = samplers.make_sampler("ddpm", ours.schedule, K)
    denoise = adm.make_denoiser(ours.unet, states, 4.0, sampler.timesteps)
    z = diffdiff.differential_diffusion(denoise, ours.encode_image(x), torch.full((1, 1), 1 - strength), sampler, noise,
                                        step_noise=draws)
    got = (ours.decode(z) / 2 + 0.5).clamp(0, 1)
    assert (got - want).abs().max() <= 2 / 255 and want.std() > 0.05


@torch.no_grad()
def test_a_change_map_as_a_plain_loop_over_the_peers(models):
    """Algorithm 1 as the release writes it, on diffusers' networks and scheduler: every latent."""
    ours, _, peer = models
    h, w = H // 2, W // 2
    z_init, noise = randn(2, 1, 4, h, w, seed=5)
    mu = torch.rand(1, 1, h, w, generator=torch.Generator().manual_seed(6))
    mu[..., :2, :2] = 1
    mu[..., 2:, :2] = 0
    states, draws = randn(2, 32, seed=1), samplers.make_step_noise((4, h, w), [0])
    want, z = [], None
    peer.scheduler.set_timesteps(K)
    for i, t in enumerate(peer.scheduler.timesteps):
        kept = peer.scheduler.add_noise(z_init, noise, t[None])
        z = kept if z is None else torch.where(mu >= i / K, kept, z)
        output = peer.unet(torch.cat([z, z]), t, None, added_cond_kwargs={"image_embeds": states}).sample
        (without, given), (_, variance) = (half.chunk(2) for half in output.split(4, dim=1))
        guided = torch.cat([without + 4 * (given - without), variance], dim=1)
        with pytest.MonkeyPatch.context() as monkeypatch:
            draw_in_peers(monkeypatch, diffusers.schedulers.scheduling_ddpm, lambda _, i=i: draws(i))
            z = peer.scheduler.step(guided, t, z).prev_sample.float()
        want.append(z)

    sampler = samplers.make_sampler("ddpm", ours.schedule, K)
    assert sampler.timesteps == peer.scheduler.timesteps.tolist()
    denoise, got = adm.make_denoiser(ours.unet, states, 4.0, sampler.timesteps), []
    last = diffdiff.differential_diffusion(denoise, z_init, mu, sampler, noise, skip=False, step_noise=draws,
                                           callback=lambda i, z: got.append(z))
    assert len(got) == len(want) == K
    for a, b in zip(got, want):
        assert relative_error(a, b) <= 1e-4
    assert relative_error(last, torch.where(mu >= 1, z_init, want[-1])) <= 1e-4


# --- At full size ---------------------------------------------------------------------------------

MOVQ = VAEConfig((128, 256, 256, 512), scaling_factor=1.0)


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        assert sum(p.numel() for p in movq.MOVQ(MOVQ).parameters()) == 67_766_959
        assert sum(p.numel() for p in prior.Prior(prior.PriorConfig()).parameters()) == 1_026_225_920
        image = ImageConfig(width=1664, layers=48, heads=16, mlp_width=8192, activation="gelu", projection=1280)
        assert sum(p.numel() for p in ImageEncoder(image).parameters()) == 1_844_907_264
