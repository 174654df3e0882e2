"""diffusion.py: what holds of schedules, against problems with a known answer, and what Algorithm 1 asks."""

import math

import pytest
import torch

from diffusion import Schedule, T
from models.pipelines import RectifiedFlow, flow_euler
from samplers import SAMPLERS, invert_ddim, make_sampler, make_step_noise, run_sampler
from tests.small import EVERY_SAMPLER, SHAPE, mixture, randn, trajectory

# --- The schedule ---------------------------------------------------------------------------------


def test_schedule_endpoints():
    linear, scaled = Schedule("linear"), Schedule("scaled_linear")
    assert linear.alphas_cumprod.shape == (T,) and linear.alphas_cumprod.dtype == torch.float32
    alpha = linear.alphas_cumprod[1:] / linear.alphas_cumprod[:-1]
    assert linear.alphas_cumprod[0].item() == pytest.approx(0.9999, abs=1e-6)  # Magic Fixup: alpha_1
    assert alpha[-1].item() == pytest.approx(0.98, abs=1e-5)  # and alpha_T
    assert scaled.alphas_cumprod[0].item() == pytest.approx(1 - 0.00085, abs=1e-6)
    assert scaled.alphas_cumprod[-1].item() == pytest.approx(0.00466, abs=1e-5)
    for s in (linear, scaled):
        assert (s.alphas_cumprod.diff() < 0).all()


def test_timesteps():
    assert make_sampler("ddim", Schedule(), 50).timesteps == list(range(981, 0, -20))
    assert make_sampler("ddim", Schedule(), T).timesteps == list(range(999, -1, -1))
    seven = make_sampler("ddim", Schedule(), 7).timesteps
    assert all(make_sampler(name, Schedule(), 7).timesteps == seven for name in SAMPLERS if name != "lcm")


# --- Problems with a known answer -----------------------------------------------------------------


def test_a_rectified_flow_converges_to_the_datas_deviation():
    """Data ~ N(0, 4): the exact flow stretches every draw of the noise by 2. Euler's error falls as 1 / k."""
    noise = randn(1, 1, 1, 64)

    def model(z, t):
        sigma = t.view(-1, 1, 1, 1) / T
        var = 4 * (1 - sigma) ** 2 + sigma**2
        return (sigma - 4 * (1 - sigma)) / var * z  # E[noise - x0 | z]

    error = [(run_sampler(model, noise, flow_euler(RectifiedFlow(), k)) / noise - 2).abs().max() for k in (25, 50, 100)]
    assert error[2] < 0.05 and all(1.7 < a / b < 2.3 for a, b in zip(error, error[1:]))


def gaussian_error(name, k, prediction="epsilon", mean=1.0, std=2.0):
    """Error at the level t = 1, where all samplers' ladders still agree, for data ~ N(mean, std^2): there the exact
    solution of the ODE keeps (z - alpha mean) / sqrt(alpha^2 std^2 + sigma^2) constant."""
    schedule = Schedule(prediction=prediction)
    sampler = make_sampler(name, schedule, k)
    c = randn(1, 1, 1, 64).double()

    def exact(t):
        a = schedule.abar[t]
        return math.sqrt(a) * mean + math.sqrt(a * std**2 + 1 - a) * c

    z = trajectory(mixture(schedule, (mean, mean), std), exact(sampler.timesteps[0]), sampler)[-2]
    return (z - exact(sampler.timesteps[-1])).norm().item() / c.norm().item()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_converges_and_higher_order_is_better(prediction):
    names = [name for name in SAMPLERS if name not in ("ddpm", "lcm")]
    error = {name: [gaussian_error(name, k, prediction) for k in (10, 20, 50, 100, 200)] for name in names}
    for name in names:
        assert error[name][-1] < 0.02 and error[name][-1] < error[name][0] / 10, f"{name}: {error[name]}"
    for name in ("heun", "pndm", "dpm++", "deis"):
        assert error[name][-1] < 1e-3, f"{name}: {error[name]}"
        for better, first_order in zip(error[name], error["ddim"]):
            assert better < 0.5 * first_order, f"{name}: {error[name]} against {error['ddim']}"
    assert error["ddim"] == pytest.approx(error["euler"], rel=1e-3)  # the same method, but for where they end


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_backwards_and_forwards_is_where_it_began(prediction):
    """To any precision by asking again; else to an error that falls as 1 / k. From any level on."""
    schedule, z = Schedule(prediction=prediction), randn(*SHAPE)
    model = mixture(schedule)

    def error(k, rounds, start=0):
        sampler = make_sampler("ddim", schedule, k)
        levels = invert_ddim(model, z, sampler, start, rounds)
        assert len(levels) == k - start + 1
        return (run_sampler(model, levels[0], sampler, start) - z).abs().max()

    assert error(50, 30) < 1e-4 and error(50, 30, start=20) < 1e-4
    assert error(200, 1) < 0.35 * error(50, 1)


@pytest.mark.parametrize("name, options", [("ddpm", {}), ("ddim", {"eta": 1.0})])
def test_stochastic_samplers_have_the_right_moments(name, options):
    schedule = Schedule()
    sampler = make_sampler(name, schedule, 100, **options)
    model, shape = mixture(schedule, (0.5, 0.5), 0.7), (1, 100, 100)
    z = run_sampler(model, randn(1, *shape), sampler, step_noise=make_step_noise(shape, [3]))
    assert z.mean().item() == pytest.approx(0.5, abs=0.04) and z.std().item() == pytest.approx(0.7, abs=0.04)


def test_step_noise_depends_on_seed_and_step_alone():
    both, one = make_step_noise((4, 3, 5), [1, 2]), make_step_noise((4, 3, 5), [2])
    assert both(6).shape == (2, 4, 3, 5) and torch.equal(both(6)[1:], one(6))
    assert not torch.equal(one(6), one(7)) and not torch.equal(both(6)[0], both(6)[1])


@pytest.mark.parametrize("name, calls", [("ddim", 8), ("dpm++", 8), ("deis", 8), ("pndm", 9), ("heun", 15)])
def test_model_calls(name, calls):
    seen = []

    def model(z, t):
        assert t.dtype == torch.long and t.shape == (2,)
        seen.append(t)
        return z

    run_sampler(model, randn(*SHAPE), make_sampler(name, Schedule(), 8))
    assert len(seen) == calls


# --- What Algorithm 1 of Differential Diffusion asks ----------------------------------------------


def overridden(model, sampler, z_init, eps, release, noise, tell_all=True):
    """Algorithm 1 with a given map: a pixel is the noised original up to and with step `release` (B or 1, 1, h, w),
    and free from then on  ->  z after each step. The sampler is told of every override, or of each pixel's last."""
    state, steps, z = None, [], None
    for i in range(sampler.k):
        restarted = i <= release
        z_i = sampler.noise_to(i, z_init, eps)
        z = z_i if z is None else torch.where(restarted, z_i, z)
        z, state = sampler.step(model, z, i, state, noise(i), restarted if tell_all else i == release)
        steps.append(z)
    return steps


@pytest.mark.parametrize("name, options", EVERY_SAMPLER)
@pytest.mark.parametrize("tell_all", [True, False])
def test_each_pixel_starts_where_its_own_override_ends(name, options, tell_all):
    """With a pointwise denoiser every pixel of a mixed map is its own SDEdit, and no pixel disturbs another."""
    schedule = Schedule()
    model, sampler = mixture(schedule), make_sampler(name, schedule, 8, **options)
    z_init, eps, noise = randn(*SHAPE), randn(*SHAPE, seed=1), make_step_noise(SHAPE[1:], [5, 6])
    release = torch.arange(15).view(1, 1, 3, 5) % 8
    end = overridden(model, sampler, z_init, eps, release, noise, tell_all)[-1]
    for start in range(8):
        sdedit = run_sampler(model, sampler.noise_to(start, z_init, eps), sampler, start=start, step_noise=noise)
        here = (release == start).expand(SHAPE)
        torch.testing.assert_close(end[here], sdedit[here], rtol=1e-6, atol=1e-6)
    per_image = torch.stack([release[0], 7 - release[0]])  # (B, 1, h, w): a map of its own for each image
    end_2 = overridden(model, sampler, z_init, eps, per_image, noise, tell_all)[-1]
    torch.testing.assert_close(end_2[0], end[0], rtol=1e-6, atol=1e-6)


def test_a_void_past_matters():
    """The state is not decoration: keeping the stale history gives another picture."""
    schedule = Schedule()
    model, z_init, eps = mixture(schedule), randn(*SHAPE), randn(*SHAPE, seed=1)
    for name in ("pndm", "dpm++", "deis"):
        sampler = make_sampler(name, schedule, 8)
        z, state = sampler.step(model, randn(*SHAPE, seed=2), 0)
        z = sampler.noise_to(1, z_init, eps)
        stale, _ = sampler.step(model, z, 1, state)
        right, _ = sampler.step(model, z, 1, state, restarted=torch.ones(1, 1, 3, 5, dtype=torch.bool))
        assert torch.equal(right, sampler.step(model, z, 1)[0]) and (stale - right).abs().max() > 1e-2
