"""diffusion.py against diffusers' schedules and schedulers, latent by latent."""

import pytest
import torch

import unet
from checkpoints.configs import schedule_from_json, schedule_to_json
from diffdiff import differential_diffusion
from diffusion import BETAS, Schedule, T
from models.pipelines import RectifiedFlow, dynamic_shift, flow_euler
from samplers import make_sampler
from tests.small import EVERY_SAMPLER, SHAPE, UNETS, mixture, randn, randomise, relative_error, trajectory

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # its NumPy 1 spelling


@pytest.mark.parametrize("name, ends", [("linear", (1e-4, 0.02)), ("scaled_linear", (0.00085, 0.012)),
                                        ("linear_sd", (0.00085, 0.012)), ("squaredcos_cap_v2", (0, 0))])
def test_schedule_is_diffusers(name, ends):
    kind = "linear" if name == "linear_sd" else name
    peer = pytest.importorskip("diffusers").DDPMScheduler(beta_schedule=kind, beta_start=ends[0], beta_end=ends[1])
    torch.testing.assert_close(Schedule(name).alphas_cumprod, peer.alphas_cumprod, rtol=1e-4, atol=0)
    t = torch.tensor([0, 999])
    z = Schedule(name).add_noise(randn(*SHAPE), randn(*SHAPE, seed=1), t)
    torch.testing.assert_close(z, peer.add_noise(randn(*SHAPE), randn(*SHAPE, seed=1), t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BETAS)
def test_a_schedule_is_written_as_diffusers_says_it(name):
    config = schedule_to_json(Schedule(name, "v_prediction"))
    peer = pytest.importorskip("diffusers").DDIMScheduler.from_config(config)
    torch.testing.assert_close(Schedule(name).alphas_cumprod, peer.alphas_cumprod, rtol=1e-4, atol=1e-6)
    again = schedule_from_json(config)
    assert (again.name, again.prediction) == (name, "v_prediction")


def test_a_schedule_without_signal_at_its_end_has_two_names():
    assert schedule_from_json({"beta_schedule": "zero_snr", "beta_end": 1.0}).name == "zero_snr"  # as once written
    with pytest.raises(ValueError, match="'linear' noise schedule rescaled to no signal"):
        schedule_from_json({"beta_schedule": "linear", "beta_end": 0.02, "rescale_betas_zero_snr": True})


def peer_trajectory(name, options, schedule, k, timesteps, model, z, generator):
    """The same run in diffusers, as latents in our space: one per timestep, the last of each."""
    diffusers = pytest.importorskip("diffusers")
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    config |= {"steps_offset": 1, "timestep_spacing": schedule.spacing, "prediction_type": schedule.prediction}
    if name == "ddpm":
        peer = diffusers.DDPMScheduler(**config, clip_sample=False)
    elif name == "ddim":
        peer = diffusers.DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=False)
    elif name == "pndm":  # it sees eps always: with v it extrapolates v, where the paper extrapolates eps
        peer = diffusers.PNDMScheduler(**config | {"prediction_type": "epsilon"}, skip_prk_steps=True)
    elif name in ("euler", "heun"):
        peer = getattr(diffusers, f"{name.title()}DiscreteScheduler")(**config)
    elif name == "lcm":
        peer = diffusers.LCMScheduler(**config)
    elif name == "dpm++":
        peer = diffusers.DPMSolverMultistepScheduler(**config)
    else:
        peer = diffusers.DEISMultistepScheduler(**config)
    peer.set_timesteps(**({"timesteps": timesteps} if name == "dpm++" else {"num_inference_steps": k}))
    if name == "deis":  # its own 'leading' divides by k + 1, and it takes no list of timesteps: put it on our ladder
        peer.timesteps = torch.tensor(timesteps)
        abar = peer.alphas_cumprod[timesteps + [0]]
        peer.sigmas = ((1 - abar) / abar) ** 0.5
    step = {"generator": generator} if name in ("ddpm", "ddim", "lcm") else {}

    edm = name in ("euler", "heun")
    if edm:
        z = z * (1 + peer.sigmas[0] ** 2) ** 0.5
    latents = []
    for n, t in enumerate(peer.timesteps):
        output = model(peer.scale_model_input(z, t), t.long().expand(len(z)))
        if name == "pndm":
            output = schedule.convert_output(output, z, int(t))[1]
        z = peer.step(output, t, z, **step, **options).prev_sample
        latents.append(z / (1 + peer.sigmas[n + 1] ** 2) ** 0.5 if edm else z)
    calls = [int(t) for t in peer.timesteps]  # Heun and PNDM: a step's second call is made at the next timestep
    if name == "heun":
        latents = latents[1::2] + latents[-1:]
    elif name == "pndm" and k > 1:
        latents = latents[1:]
    assert sorted(set(calls), reverse=True) == timesteps
    return latents


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("k", [1, 2, 5, 20, 30, 50])
@pytest.mark.parametrize("name, options", EVERY_SAMPLER)
def test_trajectory_is_diffusers(name, options, k, prediction):
    schedule = Schedule(prediction=prediction)
    model, z = mixture(schedule), randn(*SHAPE)
    sampler = make_sampler(name, schedule, k, **options)
    assert len(sampler.timesteps) == sampler.k == k and (sampler.timesteps[-1] == 1) == (name != "lcm")
    check_trajectory(name, options, schedule, sampler, model, z)


@pytest.mark.parametrize("name, spacing, k", [
    *((name, "trailing", k) for name in ("ddim", "euler", "heun") for k in (1, 4)),
    *((name, "linspace", k) for name in ("euler", "heun") for k in (4, 10)),  # no peer's DDIM meets these levels
])
def test_trajectory_of_few_steps_is_diffusers(name, spacing, k):
    """With a network, of random weights, as Turbo, Lightning and Hyper-SD run theirs."""
    schedule = Schedule(spacing=spacing)
    network = randomise(unet.UNet(UNETS["sd1"]))
    context = randn(2, 77, 64)
    sampler = make_sampler(name, schedule, k)
    with torch.no_grad():
        check_trajectory(name, {}, schedule, sampler, lambda z, t: network(z, t, context), randn(2, 4, 8, 8))


def test_algorithm_1_in_few_steps_is_a_loop_over_diffusers():
    """A latent consistency model under a random map: every latent, and white bit for bit."""
    peer = pytest.importorskip("diffusers").LCMScheduler(beta_schedule="scaled_linear")
    peer.set_timesteps(4)
    network = randomise(unet.UNet(UNETS["sd1"]))
    z_init, noise, context = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), randn(2, 77, 64)
    mu = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    mu[..., 5:] = 1
    ours, theirs = [], []
    draws = torch.Generator().manual_seed(7)
    options = {"skip": False, "step_noise": lambda i: torch.randn(z_init.shape, generator=draws)}
    z_0 = differential_diffusion(lambda z, t: network(z, t, context), z_init, mu, make_sampler("lcm", Schedule(), 4),
                                 noise, callback=lambda i, z: ours.append(z), **options)
    assert torch.equal(z_0[..., 5:], z_init[..., 5:])
    draws = torch.Generator().manual_seed(7)
    z = peer.add_noise(z_init, noise, peer.timesteps[:1])
    with torch.no_grad():
        for i, t in enumerate(peer.timesteps):
            z = torch.where(mu < i / 4, z, peer.add_noise(z_init, noise, t[None]))
            z = peer.step(network(z, t.expand(2), context), t, z, generator=draws).prev_sample
            theirs.append(z)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) <= 1e-4


@pytest.mark.parametrize("k", [*range(1, 51), 200, 600, T])
def test_timesteps_are_diffusers(k):
    diffusers = pytest.importorskip("diffusers")
    for spacing in ("leading", "trailing", "linspace"):
        peer = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=int(k < T))
        peer.set_timesteps(k)
        assert Schedule().space_timesteps(k, spacing) == peer.timesteps[:k].tolist()  # its arange may go too far
    if k <= 50:
        peer = diffusers.LCMScheduler()
        peer.set_timesteps(k)
        assert Schedule().space_timesteps(k, "lcm") == peer.timesteps.tolist()


def check_trajectory(name, options, schedule, sampler, model, z):
    k = sampler.k
    draws = torch.Generator().manual_seed(7)
    ours = trajectory(model, z, sampler, step_noise=lambda i: torch.randn(z.shape, generator=draws))
    generator = torch.Generator().manual_seed(7)
    theirs = peer_trajectory(name, options, schedule, k, sampler.timesteps, model, z, generator)
    assert len(ours) == len(theirs) == k
    for i, (a, b) in enumerate(zip(ours, theirs)):
        error = ((a - b).norm() / b.norm()).item()
        assert error <= 1e-4, f"step {i} of {k}: relative error {error:.1e}"


@pytest.mark.parametrize("k", [2, 5, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_learned_variance_and_clipping_are_diffusers(prediction, k):
    """Kandinsky's. The network is any function."""
    schedule = Schedule("linear_sd", prediction, offset=0, clip=0.8)
    peer = pytest.importorskip("diffusers").DDPMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, variance_type="learned_range",
        prediction_type=prediction, clip_sample_range=0.8)
    peer.alphas_cumprod = torch.tensor(schedule.abar, dtype=torch.float64)  # its own cancel near t = 0
    peer.set_timesteps(k)

    def model(z, t):
        return torch.cat([torch.tanh(z + 0.3 * z.roll(1, -1)), torch.sin(3 * z)], dim=1)

    sampler, z = make_sampler("ddpm", schedule, k), randn(*SHAPE)
    assert sampler.timesteps == peer.timesteps.tolist()
    ours = trajectory(model, z, sampler, step_noise=lambda i: randn(*SHAPE, seed=i))
    fixed = trajectory(lambda z, t: model(z, t)[:, :4], z, sampler, step_noise=lambda i: randn(*SHAPE, seed=i))
    for i, t in enumerate(peer.timesteps):
        generator = torch.Generator().manual_seed(i)
        z = peer.step(model(z, t), t, z, generator=generator).prev_sample.float()
        torch.testing.assert_close(ours[i], z, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours[-2], fixed[-2], atol=1e-3)


# --- Rectified flow -------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_flow_levels_are_diffusers(shift, k):
    """As Stable Diffusion 3's pipeline asks for them (from the scheduler's own last level), and as Flux's does."""
    peer = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(k)
    ours = RectifiedFlow(shift, last=shift / (T + shift - 1))
    torch.testing.assert_close(torch.tensor(ours.sigmas(k)), peer.sigmas, rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(flow_euler(ours, k).timesteps), peer.timesteps, rtol=1e-4, atol=0)
    peer.set_timesteps(sigmas=[1 - i / k for i in range(k)])
    torch.testing.assert_close(torch.tensor(RectifiedFlow(shift).sigmas(k)), peer.sigmas, rtol=1e-4, atol=0)


@pytest.mark.parametrize("k", [1, 4, 28, 50])
@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 10000])
def test_flow_levels_of_a_dynamic_shift_are_diffusers(tokens, k):
    flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")
    peer = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    peer.set_timesteps(sigmas=[1 - i / k for i in range(k)], mu=flux.calculate_shift(tokens))
    ours = RectifiedFlow(dynamic_shift(tokens))
    torch.testing.assert_close(torch.tensor(ours.sigmas(k)), peer.sigmas, rtol=1e-4, atol=0)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_flow_trajectory_is_diffusers(k):
    def model(z, t):
        return torch.tanh(z + 0.3 * z.roll(1, -1)) * (0.5 + t.view(-1, 1, 1, 1) / T)

    peer = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=3.0)
    peer.set_timesteps(k)
    x0, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    sampler = flow_euler(RectifiedFlow(3.0, last=3 / (T + 2)), k)
    ours = trajectory(model, noise, sampler)
    z = noise
    for i, t in enumerate(peer.timesteps):
        level = peer.scale_noise(x0, t[None], noise)
        torch.testing.assert_close(sampler.noise_to(i, x0, noise), level, rtol=1e-4, atol=1e-5)
        z = peer.step(model(z, t.expand(len(z))), t, z).prev_sample
        torch.testing.assert_close(ours[i], z, rtol=1e-4, atol=1e-5)
