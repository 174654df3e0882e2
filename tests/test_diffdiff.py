"""Algorithms 1 and 2 on an analytic denoiser whose chains never coincide by accident."""

import warnings

import pytest
import torch

import diffdiff
import diffusion
import samplers
from models import pipelines

K = 10
SHAPE = (2, 4, 8, 8)
G = torch.Generator().manual_seed(3)
Z_INIT, NOISE = torch.randn(SHAPE, generator=G), torch.randn(SHAPE, generator=G)
STEP_NOISE = samplers.make_step_noise(SHAPE[1:], [5, 6])
MU = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
every_sampler = pytest.mark.parametrize("name", [*samplers.SAMPLERS, "rectified flow"])


def denoise(z, t):
    """Not pointwise: neighbours and the mean matter, as in a network. z (B, C, h, w), t (B,)"""
    t = t.view(-1, 1, 1, 1) / 1000
    return torch.tanh(z + 0.3 * z.roll(1, -1) - 0.2 * z.mean((2, 3), keepdim=True)) * (0.5 + t)


def watch(seen):
    """The denoiser, which keeps what it is shown."""
    return lambda z, t: seen.append(z.clone()) or denoise(z, t)


def make(name="ddim", k=K):
    if name == "rectified flow":
        return pipelines.flow_euler(pipelines.RectifiedFlow(shift=3), k)
    return samplers.make_sampler(name, diffusion.Schedule(), k)


def run(mu, name="ddim", model=denoise, k=K, noise=NOISE, **options):
    options = {"step_noise": STEP_NOISE} | options
    return diffdiff.differential_diffusion(model, Z_INIT, mu, make(name, k), noise, **options)


@pytest.mark.parametrize("skip", [True, False])
@every_sampler
def test_white_map_returns_the_original(name, skip):
    assert torch.equal(run(torch.ones(8, 8), name, skip=skip), Z_INIT)


@every_sampler
def test_black_map_is_an_ordinary_run_from_the_noised_start(name):
    start = make(name).noise_to(0, Z_INIT, NOISE)
    ordinary = samplers.run_sampler(denoise, start, make(name), 0, STEP_NOISE)
    assert torch.equal(run(torch.zeros(8, 8), name), ordinary)


# 0.75 * 10 is not whole: Algorithm 1 starts such pixels one step earlier than a strength of 0.25 would.
@pytest.mark.parametrize("grey, skip", [(0.3, True), (0.3, False), (0.7, True), (0.7, False), (0.75, True)])
@every_sampler
def test_grey_map_is_sdedit_at_that_strength(name, grey, skip):
    z = run(torch.full((8, 8), grey), name, skip=skip)
    assert torch.equal(z, diffdiff.sdedit(denoise, Z_INIT, 1 - grey, make(name), NOISE, STEP_NOISE))


@every_sampler
def test_skipping_changes_nothing_where_k_min_mu_is_whole(name):
    mu = 0.3 + 0.7 * MU
    mu[:, 0, 0, 0] = 0.3  # of each picture
    assert torch.equal(run(mu, name, skip=False), run(mu, name))


def test_skipping_saves_calls():
    for skip, calls in ((True, 2), (False, K)):
        seen = []
        run(torch.full((8, 8), 0.8), model=watch(seen), skip=skip)
        assert len(seen) == calls


def test_pndm_warms_up_only_where_a_chain_starts():
    """Its first step of a chain takes two calls. White pixels are overwritten at every step, and start none."""
    seen = []
    run(torch.tensor([0.0, 1]).repeat_interleave(4).expand(8, 8), "pndm", watch(seen), k=20)
    assert len(seen) == 21


@pytest.mark.filterwarnings("ignore:a strength of 0.05")
@pytest.mark.parametrize("skip, nested", [(True, True), (False, True), (True, False)])
@every_sampler
def test_each_of_several_pictures_is_as_if_alone(name, skip, nested):
    """Whatever the other's map: black, light grey of which no step is run, white, or a start between two steps."""
    alone = lambda z, t: torch.cat([denoise(one, t[:1]) for one in z.split(1)])  # noqa: E731, bit-equal in any batch
    maps = [torch.zeros(1, 8, 8), torch.full((1, 8, 8), 0.35), torch.ones(1, 8, 8), torch.full((1, 8, 8), 0.95),
            0.26 + 0.7 * MU[0], 0.3 + 0.7 * MU[1], torch.linspace(0.47, 1, 8).expand(1, 8, 8)]  # fmt: skip
    n = len(maps)
    z, noise = torch.randn(2, n, *SHAPE[1:], generator=torch.Generator().manual_seed(5))
    step_noise = samplers.make_step_noise(SHAPE[1:], range(n))
    together = diffdiff.differential_diffusion(
        alone, z, torch.stack(maps), make(name), noise, skip=skip, nested=nested, step_noise=step_noise)
    for j in range(n):
        one = slice(j, j + 1)
        want = diffdiff.differential_diffusion(alone, z[one], maps[j], make(name), noise[one], skip=skip, nested=nested,
                                               step_noise=lambda i, one=one: step_noise(i)[one])
        assert torch.equal(together[one], want)


def test_noise_that_is_left_out_is_the_same_for_each_picture():
    z = diffdiff.differential_diffusion(denoise, Z_INIT[:1].repeat(2, 1, 1, 1), MU[:1], make())
    torch.testing.assert_close(z[0], z[1], rtol=1e-5, atol=1e-6)


def test_maps_of_any_shape_that_says_what_is_meant():
    mu = MU[0, 0]
    for same in (mu[None], mu[None, None], mu.expand(2, 8, 8), mu.expand(2, 1, 8, 8), mu.numpy()):
        assert torch.equal(run(same), run(mu))
    assert torch.equal(run(MU[:, 0]), run(MU))
    for other in ((3, 8, 8), (8, 8, 3), (1, 3, 8, 8), (2, 3, 8, 8), (3, 1, 8, 8), (8,), (), (0, 8), (1, 1, 1, 8, 8)):
        with pytest.raises(ValueError, match="^change_map is .*grey, .* mean over its channels"):
            run(torch.zeros(other))
    with pytest.raises(ValueError, match="^change_map is"):  # colours, or three maps?
        diffdiff.differential_diffusion(denoise, Z_INIT[:1].expand(3, -1, -1, -1), torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="^z_init is"):
        diffdiff.differential_diffusion(denoise, Z_INIT[0], mu)


@pytest.mark.parametrize("strength, k, said", [(0.05, 10, True), (0.09, 10, True), (0, 10, False), (0.1, 10, False),
                                               (0.05, 20, False), (1 / 255, 100, True)])  # fmt: skip
def test_less_than_a_step_is_said(strength, k, said):
    for edit in (lambda: run(torch.full((8, 8), 1 - strength), k=k),
                 lambda: diffdiff.sdedit(denoise, Z_INIT, strength, make(k=k), NOISE)):  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(edit(), Z_INIT) == (said or not strength)
        assert ["less than one step" in str(w.message) for w in caught] == [True] * said


def test_a_stochastic_sampler_says_what_it_needs():
    with pytest.raises(ValueError, match="stochastic"):
        run(torch.zeros(8, 8), "ddpm", step_noise=None)


def test_masks_are_nested_and_follow_the_papers_inequality():
    mu = (MU * 7).round() / 7
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


@pytest.mark.parametrize("name", ["ddim", "rectified flow"])
def test_pixels_are_overwritten_with_the_noised_original(name):
    """What the network sees at a step is, above that step's threshold, the original at that noise level."""
    seen = []
    run(MU, name, model=watch(seen), skip=False)
    assert len(seen) == K
    for i, z in enumerate(seen):
        kept, original = (MU >= i / K).expand(SHAPE), make(name).noise_to(i, Z_INIT, NOISE)
        assert torch.equal(z[kept], original[kept])
        assert i == 0 or (z[~kept] != original[~kept]).all()


def test_without_nesting_each_pixel_is_copied_once():
    seen = []
    run(MU, model=watch(seen), skip=False, nested=False)
    copied = torch.stack([z == make().noise_to(i, Z_INIT, NOISE) for i, z in enumerate(seen) if i]).sum(0)
    assert torch.equal(copied, (diffdiff.last_override(MU, K) > 0).expand(SHAPE).long())


def test_new_noise_at_every_level():
    same = run(MU, noise=lambda i: NOISE)
    assert torch.equal(same, run(MU))
    assert not torch.allclose(same, run(MU, noise=samplers.make_step_noise(SHAPE[1:], [7, 8])))


def test_fan_columns_are_separate_edits():
    """With a denoiser that looks at one pixel at a time, each column is SDEdit at its strength."""
    pointwise = lambda z, t: torch.tanh(z) * (0.5 + t.view(-1, 1, 1, 1) / 1000)  # noqa: E731
    strengths = [0.2, 0.5, 0.8, 1.0]
    fan = run(diffdiff.strength_fan_map(strengths, 64, 64), model=pointwise)
    for column, s in enumerate(strengths):
        alone = diffdiff.sdedit(pointwise, Z_INIT, s, make(), NOISE)
        assert torch.equal(fan[..., 2 * column : 2 * column + 2], alone[..., 2 * column : 2 * column + 2])
    with pytest.raises(ValueError, match="4 strengths do not fit into 3 columns"):
        diffdiff.strength_fan_map(strengths, 64, 3)


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
    with pytest.raises(ValueError, match="0 .. 1, not 0 .. 255"):
        diffdiff.soft_inpainting_map(255 * mask, 2.0)
    assert torch.equal(diffdiff.soft_inpainting_map(mask, 0)[0, 0], mask)
    assert soft[0, 0, 16, 16] < 0.01 and soft[0, 0, 0, 0] > 0.99
    assert abs(soft[0, 0, 16, 7:9].mean() - 0.5) < 0.02  # half way exactly on the edge
    for softness in (0.5, 1.0, 2.0):  # white stays white, in any number of steps
        assert diffdiff.soft_inpainting_map(mask, softness)[0, 0, 0, 0] == 1
    torch.testing.assert_close(soft, soft.mT)
