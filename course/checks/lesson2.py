"""Lesson 2's checks, and mistakes that they must name: {exercise: [(wrong answer, words of the sentence)]}."""

import functools
import math

import torch

import samplers
from course.grading import Wrong, call, compare, compare_function, draw, list_mistakes, predicted, resting_on
from course.solutions import lesson2 as right
from diffusion import Schedule

SCHEDULE = Schedule()
SHAPE = 2, 3, 4, 4


def two_bumps(z, t):
    """The exact eps where a picture is one number, near -1 or near 1: 0.3 is each bump's standard deviation."""
    alpha, sigma = SCHEDULE.alpha_sigma(t, z)
    var = (0.3 * alpha) ** 2 + sigma**2
    x0 = (0.09 * alpha * z + sigma**2 * torch.tanh(alpha * z / var)) / var
    return (z - alpha * x0) / sigma


def check_PREDICT_START(module):
    predicted(module.PREDICT_START, SCHEDULE.space_timesteps(4)[0], {
        "that is 'trailing', of models that are made for few steps. 'leading' counts up from 1 by strides of 250": 999,
        "there is no such timestep: they are 0 .. 999": 1000,
        "'leading' has an offset of 1: 1, 251, 501, ...": 750,
    })


@functools.cache
def measure_factor():
    """By how much 100 steps of DDIM are better than 50, as lesson 2 measures it"""
    trailing = Schedule(spacing="trailing")
    z = draw((64, 1, 1, 1))[0].double()
    ends = {k: samplers.run_sampler(two_bumps, z, samplers.make_sampler("ddim", trailing, k)) for k in (50, 100, 500)}
    errors = [(ends[k] - ends[500]).abs().mean().item() for k in (50, 100)]
    return round(errors[0] / errors[1], 2)


def check_PREDICT_FACTOR(module):
    predicted(module.PREDICT_FACTOR, measure_factor(), {
        "that is a method of second order, such as Heun: DDIM is Euler's, of first order": 4,
        "that is the ratio upside down: say by what number the error is divided": 0.5,
        "the error does fall with more steps": 1,
    }, within=0.4)


def check_ddim_step(module):
    z, eps = draw(SHAPE, SHAPE)
    sampler = samplers.ddim(SCHEDULE, 10)
    want, _ = sampler.step(lambda z, t: eps, z, 3)
    a, b = sampler.ladder.abar[3:5]  # abar, abar_next
    x0 = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
    compare(call(module.ddim_step, z, eps, a, b), want, {
        "that is x0, without any noise: go back to the level abar_next": x0,
        "it is off by one step: it comes back to the level where it was": z,
        "the levels are the wrong way round: z is at abar, the result at abar_next": right.ddim_step(z, eps, b, a),
        "x0 is not made smaller by alpha of the next level": x0 + math.sqrt(1 - b) * eps,
        "the noise comes back with the wrong sign": math.sqrt(b) * x0 - math.sqrt(1 - b) * eps,
        "the noise comes back with sigma of this level, not of the next": math.sqrt(b) * x0 + math.sqrt(1 - a) * eps,
        "alpha and sigma are without their square roots": b * (z - (1 - a) * eps) / a + (1 - b) * eps,
    })


def run_ladder(loop):
    """A loop's result on the two bumps, in 8 steps; Wrong for a t that is no tensor (B,)"""
    ladder = samplers.ddim(SCHEDULE, 8).ladder

    def model(z, t):
        if not torch.is_tensor(t) or t.shape != (len(z),):
            raise Wrong("the model wants t as a tensor (B,): the same timestep for each picture of the batch")
        if int(t[0]) not in ladder.timesteps:
            raise Wrong("the model is asked with the number of the step, not with its timestep")
        return two_bumps(z, t)

    return call(loop, model, *draw(SHAPE), ladder.timesteps, ladder.abar)


def ask_once(model, z, timesteps, abar):
    eps = model(z, torch.full((len(z),), timesteps[0]))
    return right.sample(lambda z, t: eps, z, timesteps, abar)


WRONG_LOOPS = {
    "off by one step: the last step is not taken":
        lambda model, z, timesteps, abar: right.sample(model, z, timesteps[:-1], abar),
    "off by one step: the first step is not taken":
        lambda model, z, timesteps, abar: right.sample(model, z, timesteps[1:], abar[1:]),
    "off by one step: step i goes from abar[i] to abar[i + 1], and yours from abar[i + 1] to abar[i + 2]":
        lambda model, z, timesteps, abar: right.sample(model, z, timesteps, abar[1:] + [1.0]),
    "the model is asked once: ask it again at every step, about the new z": ask_once,
}


def check_sample(module):
    z, = draw(SHAPE)
    with resting_on(module.ddim_step, z, z, 0.4, 0.6):
        compare(run_ladder(module.sample), run_ladder(right.sample),
                {sentence: run_ladder(loop) for sentence, loop in WRONG_LOOPS.items()})


def check_ddim_sigma(module):
    # Of eta = 1 it is DDPM's, whose variance is the posterior's.
    compare_function(module.ddim_sigma, right.ddim_sigma, WRONG_SIGMAS, 0.4, 0.6, 0.5)


WRONG_SIGMAS = {
    "that is the variance: take the square root": lambda a, b, eta: right.ddim_sigma(a, b, eta) ** 2 / eta,
    "eta stands inside the square root: it multiplies the standard deviation":
        lambda a, b, eta: right.ddim_sigma(a, b, 1) * math.sqrt(eta),
    "eta is missing": lambda a, b, eta: right.ddim_sigma(a, b, 1),
    "the two factors are upside down: abar is the smaller one, and less noise is at abar_next":
        lambda a, b, eta: eta * math.sqrt((1 - a) / (1 - b) * (1 - a / b)),
    "the second factor is missing: 1 - abar / abar_next": lambda a, b, eta: eta * math.sqrt((1 - b) / (1 - a)),
    "the first factor is missing: (1 - abar_next) / (1 - abar)": lambda a, b, eta: eta * math.sqrt(1 - a / b),
}


def check_dpmpp_step(module):
    z, x0, before = draw(SHAPE, SHAPE, SHAPE)
    sampler = samplers.dpmpp(Schedule(prediction="sample"), 10)

    def step(z, x0, before, *_):
        return sampler.step(lambda z, t: x0, z, 3, samplers.History([before], torch.tensor(1)))[0]

    compare_function(module.dpmpp_step, step, WRONG_SOLVERS, z, x0, before, *sampler.ladder.abar[2:5])


def correct(times):
    """A dpmpp_step whose correction is so many times the right one. times: a number, or a function of the three abar"""

    def step(z, x0, x0_before, *abar):
        first = right.dpmpp_step(z, x0, x0, *abar)
        share = times(*abar) if callable(times) else times
        return first + share * (right.dpmpp_step(z, x0, x0_before, *abar) - first)

    return step


def upside_down(abar_before, abar, abar_next):
    before, now, after = (math.log(a / (1 - a)) for a in (abar_before, abar, abar_next))
    return ((now - before) / (after - now)) ** 2


WRONG_SOLVERS = {
    "the correction is missing: this is the step of first order, which is DDIM's": correct(0),
    "the correction is twice too large: divide by 2 h_before": correct(2),
    "the correction is upside down: h / h_before, the step to come over the step before": correct(upside_down),
    "the correction has the wrong sign: go on in the direction from x0_before to x0": correct(-1),
    "the sign of the second term is wrong: exp(-h) - 1 is negative, so minus it adds":
        lambda z, x0, x0_before, *abar: right.dpmpp_step(z, -x0, -x0_before, *abar),
}


MISTAKES = {
    "PREDICT_START": [(999, "trailing"), (1000, "no such"), (750, "offset"), (600, "too small")],
    "PREDICT_FACTOR": [(4, "second order"), (1, "does fall"), (0.5, "upside down"), (8, "too large")],
    "ddim_step": [
        (lambda z, eps, a, b: right.ddim_step(z, eps, a, 1.0), "without any noise"),
        (lambda z, eps, a, b: right.ddim_step(z, eps, b, a), "levels are the wrong way round"),
        (lambda z, eps, a, b: right.ddim_step(z, eps, a, a), "off by one step"),
        (lambda z, eps, a, b: b * (z - (1 - a) * eps) / a + (1 - b) * eps, "square roots"),
    ],
    "sample": [
        *list_mistakes(WRONG_LOOPS),
        (lambda model, z, timesteps, abar: right.sample(lambda z, t: model(z, int(t[0])), z, timesteps, abar), "(B,)"),
        (lambda model, z, timesteps, abar: right.sample(model, z, list(range(8)), abar), "number of the step"),
    ],
    "ddim_sigma": list_mistakes(WRONG_SIGMAS),
    "dpmpp_step": [
        *list_mistakes(WRONG_SOLVERS),
        (lambda z, x0, before, a0, a, b: right.dpmpp_step(z, before, x0, a0, a, b), "expected"),
    ],
}
