"""diffusion.py's errors, each one clear line, and any number of steps."""

import pytest
import torch

from diffusion import LCM_TIMESTEPS, Schedule, T
from models.pipelines import RectifiedFlow, flow_euler
from samplers import make_sampler, make_step_noise, run_sampler
from tests.small import EVERY_SAMPLER, SHAPE, mixture, randn


@pytest.mark.parametrize("name, options", EVERY_SAMPLER)
@pytest.mark.parametrize("k", [1, 3, T])
def test_any_number_of_steps_stays_finite(name, options, k):
    schedule = Schedule("linear")
    z = randn(1, 1, 1, 2)
    k = min(k, LCM_TIMESTEPS) if name == "lcm" else k
    sampler = make_sampler(name, schedule, k, **options)
    out = run_sampler(mixture(schedule), z, sampler, step_noise=make_step_noise((1, 1, 2), [0]))
    assert torch.isfinite(out).all()
    assert run_sampler(mixture(schedule), z, sampler, start=k) is z


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: Schedule("cosine"), "cosine"),
        (lambda: Schedule(prediction="x0"), "x0"),
        (lambda: Schedule(spacing=["trailing"]), "leading, trailing, linspace, lcm, .* not \\['trailing'\\] with 1"),
        (lambda: Schedule(offset=1.0), "offset of 0 or 1, not .* with 1.0"),
        (lambda: Schedule(offset=-0.0), "with -0.0"),
        (lambda: make_sampler("lcm", Schedule(), 51), "at most as many steps, not 51"),
        (lambda: make_sampler("plms", Schedule(), 10), "plms.*ddpm, ddim, pndm"),
        (lambda: make_sampler("ddim", Schedule(), 0), "1 .. 1000, not 0"),
        (lambda: make_sampler("ddim", Schedule(), T + 1), "not 1001"),
        (lambda: make_sampler("ddim", Schedule(), 10, eta=1.5), "eta"),
        (lambda: make_sampler("ddim", Schedule("zero_snr"), 500), "start at t = 999, where .* nothing of the picture"),
        (lambda: make_sampler("euler", Schedule("zero_snr"), T), "nothing of the picture"),
        (lambda: make_sampler("ddpm", Schedule(), 10).step(lambda z, t: z, randn(*SHAPE), 0), "stochastic"),
        (lambda: run_sampler(lambda z, t: z, randn(*SHAPE), make_sampler("ddim", Schedule(), 10), start=11), "start"),
        (lambda: RectifiedFlow(0), "shift .* more than 0, not 0"),
        (lambda: RectifiedFlow(float("nan")), "shift .* not nan"),
        (lambda: RectifiedFlow(last=1), "between 0 and 1, not 1"),
        (lambda: flow_euler(RectifiedFlow(), 0), "1 or more, not 0"),
    ],
)
def test_errors_are_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as e:
        call()
    assert "\n" not in str(e.value)
