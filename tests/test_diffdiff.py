"""Algorithms 1 and 2 on an analytic denoiser whose chains never coincide by accident."""

import pytest
import torch

import diffdiff
import diffusion
from diffdiff import differential_diffusion

K = 10
SAMPLERS = list(diffusion.SAMPLERS)
SHAPE = (2, 4, 8, 8)


def denoise(z, t):
    """Not pointwise: neighbours and the mean matter, as in a network. z (B, C, h, w), t (B,)"""
    t = t.view(-1, 1, 1, 1) / 1000
    return torch.tanh(z + 0.3 * z.roll(1, -1) - 0.2 * z.mean((2, 3), keepdim=True)) * (0.5 + t)


def setup(name="ddim", k=K):
    g = torch.Generator().manual_seed(3)
    z_init, noise = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g)
    sampler = diffusion.make_sampler(name, diffusion.Schedule(), k)
    return z_init, noise, sampler, diffusion.make_step_noise(SHAPE[1:], [5, 6])


def random_map(levels=None):
    mu = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    return mu if levels is None else (mu * levels).round() / levels


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", SAMPLERS)
def test_white_map_returns_the_original(name, skip):
    z_init, noise, sampler, step_noise = setup(name)
    z = differential_diffusion(denoise, z_init, torch.ones(8, 8), sampler, noise, skip=skip, step_noise=step_noise)
    assert torch.equal(z, z_init)


@pytest.mark.parametrize("name", SAMPLERS)
def test_black_map_is_an_ordinary_run_from_the_noised_start(name):
    z_init, noise, sampler, step_noise = setup(name)
    z = differential_diffusion(denoise, z_init, torch.zeros(8, 8), sampler, noise, step_noise=step_noise)
    assert torch.equal(z, diffusion.run_sampler(denoise, sampler.noise_to(0, z_init, noise), sampler, 0, step_noise))


# 0.75 * 10 is not whole: Algorithm 1 starts such pixels one step earlier than a strength of 0.25 would.
@pytest.mark.parametrize("grey, skip", [(0.3, True), (0.3, False), (0.7, True), (0.7, False), (0.75, True)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_grey_map_is_sdedit_at_that_strength(name, grey, skip):
    z_init, noise, sampler, step_noise = setup(name)
    mu = torch.full((8, 8), grey)
    z = differential_diffusion(denoise, z_init, mu, sampler, noise, skip=skip, step_noise=step_noise)
    assert torch.equal(z, diffdiff.sdedit(denoise, z_init, 1 - grey, sampler, noise, step_noise))


@pytest.mark.parametrize("name", SAMPLERS)
def test_skipping_changes_nothing_where_k_min_mu_is_whole(name):
    z_init, noise, sampler, step_noise = setup(name)
    mu = 0.3 + 0.7 * random_map()
    mu[0, 0, 0, 0] = 0.3
    plain = differential_diffusion(denoise, z_init, mu, sampler, noise, skip=False, step_noise=step_noise)
    assert torch.equal(plain, differential_diffusion(denoise, z_init, mu, sampler, noise, step_noise=step_noise))


def test_skipping_saves_calls():
    calls = []
    z_init, noise, sampler, _ = setup()

    def counted(z, t):
        calls.append(t)
        return denoise(z, t)

    differential_diffusion(counted, z_init, torch.full((8, 8), 0.8), sampler, noise)
    assert len(calls) == 2
    differential_diffusion(counted, z_init, torch.full((8, 8), 0.8), sampler, noise, skip=False)
    assert len(calls) == 2 + K


def test_pndm_warms_up_only_where_a_chain_starts():
    """Its first step of a chain takes two calls. White pixels are overwritten at every step, and start none."""
    calls = []
    z_init, noise, sampler, _ = setup("pndm", 20)
    mu = torch.zeros(8, 8)
    mu[:, 4:] = 1
    differential_diffusion(lambda z, t: calls.append(t) or denoise(z, t), z_init, mu, sampler, noise)
    assert len(calls) == 21


def test_a_stochastic_sampler_says_what_it_needs():
    z_init, noise, sampler, _ = setup("ddpm")
    with pytest.raises(ValueError, match="stochastic"):
        differential_diffusion(denoise, z_init, torch.zeros(8, 8), sampler, noise)


def test_masks_are_nested_and_follow_the_papers_inequality():
    mu = random_map(levels=7)
    last = diffdiff.last_override(mu, K)
    masks = torch.stack([last < i for i in range(K + 1)])
    assert (masks[1:] >= masks[:-1]).all()
    for i in range(K + 1):
        exact = (mu * 7).round().long() * K < i * 7  # mu_s < i / k, in whole numbers
        assert torch.equal(masks[i], exact)


def test_thresholds_survive_binary_fractions():
    k = 1000
    mu = torch.arange(k + 1) / k
    assert torch.equal(diffdiff.last_override(mu, k), torch.arange(k + 1))


def test_pixels_are_overwritten_with_the_noised_original():
    """What the network sees at a step is, above that step's threshold, the original at that noise level."""
    z_init, noise, sampler, _ = setup()
    mu, seen = random_map(), []

    def spy(z, t):
        seen.append(z.clone())
        return denoise(z, t)

    differential_diffusion(spy, z_init, mu, sampler, noise, skip=False)
    for i, z in enumerate(seen):
        kept = (mu >= i / K).expand(SHAPE)
        assert torch.equal(z[kept], sampler.noise_to(i, z_init, noise)[kept])
        if i:
            assert (z[~kept] != sampler.noise_to(i, z_init, noise)[~kept]).all()


def test_without_nesting_each_pixel_is_copied_once():
    z_init, noise, sampler, _ = setup()
    mu, seen = random_map(), []

    def spy(z, t):
        seen.append(z.clone())
        return denoise(z, t)

    differential_diffusion(spy, z_init, mu, sampler, noise, skip=False, nested=False)
    copied = torch.stack([z == sampler.noise_to(i, z_init, noise) for i, z in enumerate(seen) if i]).sum(0)
    assert torch.equal(copied, (diffdiff.last_override(mu, K) > 0).expand(SHAPE).long())


def test_fresh_noise_at_every_level():
    z_init, noise, sampler, _ = setup()
    mu = random_map()
    same = differential_diffusion(denoise, z_init, mu, sampler, lambda i: noise)
    fresh = differential_diffusion(denoise, z_init, mu, sampler, diffusion.make_step_noise(SHAPE[1:], [7, 8]))
    assert torch.equal(same, differential_diffusion(denoise, z_init, mu, sampler, noise))
    assert not torch.allclose(same, fresh)


def test_fan_columns_are_separate_edits():
    """With a denoiser that looks at one pixel at a time, each column is SDEdit at its strength."""
    z_init, noise, sampler, _ = setup()
    pointwise = lambda z, t: torch.tanh(z) * (0.5 + t.view(-1, 1, 1, 1) / 1000)  # noqa: E731
    strengths = [0.2, 0.5, 0.8, 1.0]
    fan = differential_diffusion(pointwise, z_init, diffdiff.strength_fan_map(strengths, 64, 64), sampler, noise)
    for column, s in enumerate(strengths):
        alone = diffdiff.sdedit(pointwise, z_init, s, sampler, noise)
        assert torch.equal(fan[..., 2 * column : 2 * column + 2], alone[..., 2 * column : 2 * column + 2])


def test_down_sample_is_the_mean_of_each_block():
    mu = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    expected = mu.view(8, 8, 8, 8).mean((1, 3))
    torch.testing.assert_close(diffdiff.down_sample(mu, (8, 8))[0, 0], expected)
    with pytest.raises(ValueError, match="0 .. 1"):
        diffdiff.down_sample(mu * 255, (8, 8))


def test_soft_inpainting_map():
    mask = torch.ones(32, 32)
    mask[8:24, 8:24] = 0
    soft = diffdiff.soft_inpainting_map(mask, 2.0)
    assert torch.equal(diffdiff.soft_inpainting_map(mask, 0)[0, 0], mask)
    assert soft[0, 0, 16, 16] < 0.01 and soft[0, 0, 0, 0] > 0.99
    assert abs(soft[0, 0, 16, 7:9].mean() - 0.5) < 0.02  # half way exactly on the edge
    torch.testing.assert_close(soft, soft.mT)


def test_blended_latent_diffusion_keeps_the_outside():
    z_init, noise, sampler, _ = setup()
    mask = torch.ones(8, 8)
    mask[:, :4] = 0
    z = diffdiff.blended_latent_diffusion(denoise, z_init, mask, sampler, noise)
    assert torch.equal(z[..., 4:], z_init[..., 4:])
    assert (z[..., :4] != z_init[..., :4]).all()


def test_baselines_edit_each_level_once():
    maps = []

    def edit(image, mu):
        maps.append(mu)
        return image + 1

    image, mu = torch.zeros(1, 3, 4, 10), torch.linspace(0, 1, 10).expand(4, 10)
    assert torch.equal(diffdiff.five_tiles(edit, image, mu), torch.ones(1, 3, 4, 10))  # each pixel came through once
    assert [round(m.min().item(), 3) for m in maps] == [0.056, 0.278, 0.5, 0.722, 0.944]  # from the strongest on
    assert torch.equal(diffdiff.tiling(edit, image, mu, levels=5), torch.ones(1, 3, 4, 10))
    assert torch.equal(diffdiff.composition(edit, image, mu, levels=5), torch.full((1, 3, 4, 10), 5.0))


def test_masked_noise_spares_white_pixels_at_the_start():
    z_init, noise, sampler, _ = setup()
    seen = []
    mu = torch.ones(8, 8)
    mu[:, :4] = 0.25
    diffdiff.masked_noise(lambda z, t: seen.append(z) or denoise(z, t), z_init, mu, sampler, noise)
    torch.testing.assert_close(seen[0], sampler.noise_to(0, z_init, noise * (1 - mu)))


def test_cam_signs():
    mu = torch.linspace(0, 1, 50)
    assert diffdiff.cam(mu, 3 - 2 * mu) == pytest.approx(1)
    assert diffdiff.cam(mu, mu) == pytest.approx(-1)
