"""Lesson 4's checks, and mistakes that they must name: {exercise: [(wrong answer, words of the sentence)]}."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import diffdiff
import samplers
from course.grading import Wrong, call, compare, compare_function, draw, list_mistakes, predicted, resting_on
from course.solutions import lesson4 as right
from diffusion import Schedule

K = 8
MU = (torch.arange(9.0) / K).view(1, 1, 1, 9)  # 0, 1/8, .., 1: without rounding


def run(algorithm):
    """What an Algorithm 1 makes of a small latent -> z_0 (1, 2, 1, 9), and the numbers of the steps that it took"""
    z_init, noise = draw((1, 2, 1, 9), (1, 2, 1, 9))
    steps = []

    def noise_to(i):
        if not 0 <= i < K:
            raise Wrong(f"noise_to is asked for level {i}, and there are 0 .. {K - 1}: at t = 0 take z_init itself")
        return z_init + (1 - i / K) * noise

    def step(z, i):
        steps.append(i)
        return 0.8 * z + 0.1 * z.roll(1, -1) + i + 1  # what a pixel becomes depends on its neighbour

    return call(algorithm, step, noise_to, z_init, MU, K), steps


def ours(step, noise_to, z_init, mu, k):
    """The project's own, on a sampler that calls these functions"""
    sampler = SimpleNamespace(k=k, stochastic=False, noise_to=lambda i, *_: noise_to(i),
                              step=lambda denoise, z, i, *_: (step(z, i), None))
    return diffdiff.differential_diffusion(None, z_init, mu, sampler, z_init, skip=False)


def check_PREDICT_KEPT(module):
    last = diffdiff.last_override(torch.tensor(0.25), K).item()
    predicted(module.PREDICT_KEPT, K - last, {
        "before step 2 it is still replaced, since 2/8 is not more than mu, but what step 2 makes of it stays": 5,
        "that is how many steps' results are thrown away": 2,
        "mu is how much is kept of the picture: mu = 0.25 is a strong edit": 1,
        "it is replaced before the first steps: their results are lost": 8,
    })


def check_PREDICT_CALLS(module):
    calls = []

    def denoise(z, t):
        calls.append(t)
        return z

    sampler = samplers.make_sampler("ddim", Schedule(), 50)
    mu = torch.full((4, 4), 0.9)
    mu[1, 2] = 0.3
    diffdiff.differential_diffusion(denoise, torch.zeros(1, 1, 4, 4), mu, sampler)
    predicted(module.PREDICT_CALLS, len(calls), {
        "that is Algorithm 1, without skipping": 50,
        "that many are skipped": 15,
        "that is for the brightest pixel: the darkest one begins first, and all wait for it": 5,
        "off by one: L = floor((1 - min(mu)) k)": 34,
    })


def check_keep_mask(module):
    mu = (torch.arange(17.0) / (2 * K)).view(1, 1, 1, 17)  # between the thresholds too
    for i in (3, 1):
        compare_function(module.keep_mask, lambda mu, i, k: mu < i / k, WRONG_MASKS, mu, i, K)


WRONG_MASKS = {
    "it is the wrong way round: True where a pixel is *kept from the last step*, which are the dark ones":
        lambda mu, i, k: mu > i / k,
    "it is the wrong way round, and a tie is wrong: mu < i / k keeps": lambda mu, i, k: mu >= i / k,
    "a tie is wrong: a pixel whose mu is i / k is still replaced": lambda mu, i, k: mu <= i / k,
    "off by one step: the threshold is that of step i - 1": lambda mu, i, k: mu < (i - 1) / k,
    "off by one step: the threshold is that of step i + 1": lambda mu, i, k: mu < (i + 1) / k,
    "the threshold counts like the paper's t, from k down: at step i it is i / k": lambda mu, i, k: mu < (k - i) / k,
    "mu is compared with the number of the step: divide by k": lambda mu, i, k: mu < i,
}


def check_first_step(module):
    for values, k in [((0.5, 0.9, 0.7), 10), ((0.33, 0.6, 1.0), 10), ((0.3, 0.7, 0.4), 50), ((1.0, 1.0, 1.0), 10)]:
        mu = torch.tensor(values).view(1, 1, 1, 3)
        low, high = min(values), max(values)
        L = diffdiff.steps_to_run(mu, k).item()
        compare(call(module.first_step, mu, k), k - L, {
            "that is L, how many steps there are: the first of them is k - L": L,
            "it looks at the brightest pixel: the darkest one begins first": k - math.floor((1 - high) * k + 1e-4),
            "that is the mean of the map: one dark pixel is enough to begin early":
                k - math.floor((1 - sum(values) / 3) * k + 1e-4),
            "the rounding is the wrong one: L is rounded down, so the first step is rounded up": math.floor(low * k),
            "a float's 0.3 is a little more than 3/10, and a whole step is lost: add 1e-4 before you round down":
                k - math.floor((1 - mu.min().item()) * k),
            "off by one step: one step too many is skipped": k - L + 1,
        })


def overwrite_after(step, noise_to, z_init, mu, k):
    z = noise_to(0)
    for i in range(k):
        z = step(z, i)
        if i + 1 < k:
            z = torch.where(mu < i / k, z, noise_to(i + 1))
    return torch.where(mu < 1, z, z_init)


def masked(keep, end=lambda mu, i, k: mu < 1):
    """An Algorithm 1 with another line 8: keep(mu, i, k), and `end` at t = 0"""

    def algorithm(step, noise_to, z_init, mu, k):
        z = step(noise_to(0), 0)
        for i in range(1, k):
            z = step(torch.where(keep(mu, i, k), z, noise_to(i)), i)
        return torch.where(end(mu, k, k), z, z_init)

    return algorithm


def overwrite_at_the_old_level(first):
    """Line 9 after line 10, from step `first` on"""

    def algorithm(step, noise_to, z_init, mu, k):
        z = noise_to(0)
        for i in range(k):
            z = step(z, i)
            if i >= first:
                z = torch.where(mu < i / k, z, noise_to(i))
        return torch.where(mu < 1, z, z_init)

    return algorithm


def weighted(at_the_end):
    """mu as a weight in line 9, and at t = 0 too?"""

    def algorithm(step, noise_to, z_init, mu, k):
        z = step(noise_to(0), 0)
        for i in range(1, k):
            z = step((1 - mu) * z + mu * noise_to(i), i)
        return (1 - mu) * z + mu * z_init if at_the_end else torch.where(mu < 1, z, z_init)

    return algorithm


WRONG_ALGORITHMS = {
    "off by one step: what is replaced after step i has the noise of level i + 1 and needs the mask of step i + 1":
        overwrite_after,
    "it is put back after the step, with the noise of before the step: first line 9, then line 10":
        overwrite_at_the_old_level(0),
    "from step 1 on it is put back after the step, with the noise of before the step: first line 9, then line 10":
        overwrite_at_the_old_level(1),
    "mu is used as a weight: it is a moment. A pixel is put back whole or not at all, as line 8 says": weighted(False),
    "mu is used as a weight, at t = 0 too: it is a moment. A pixel is put back whole or not at all, as line 8 says":
        weighted(True),
    "nothing is put back: that is one strength for all": masked(lambda mu, i, k: mu < 2, lambda mu, i, k: mu < 1),
    "nothing is put back, not even white at the end: that is one strength for all":
        masked(lambda mu, i, k: mu < 2, lambda mu, i, k: mu < 2),
    "a pixel is replaced by the clean z_init: it needs the noise of this level, as its neighbours have":
        lambda step, noise_to, z_init, *rest: right.differential_diffusion(
            step, lambda i: z_init if i else noise_to(0), z_init, *rest),
    "the mask is the wrong way round: where it is True, z stays":
        masked(lambda mu, i, k: mu >= i / k, lambda mu, i, k: mu >= 1),
    "the mask is the wrong way round before each step, and right at the end": masked(lambda mu, i, k: mu >= i / k),
    "a tie is wrong: a pixel whose mu is i / k is still replaced": masked(lambda mu, i, k: mu <= i / k),
    "a pixel is replaced once only: the masks are nested, and it is replaced at every step until its own comes":
        masked(lambda mu, i, k: mu != i / k),
    "the end is missing: at t = 0 a white pixel is z_init, and no step follows that could make it so":
        masked(right.keep_mask, lambda mu, i, k: mu <= 1),
    "off by one step: what is put back has the noise of the level before": lambda step, noise_to, *rest: (
        right.differential_diffusion(step, lambda i: noise_to(max(i - 1, 0)), *rest)),
    "the threshold counts like the paper's t, from k down: at step i it is i / k":
        masked(lambda mu, i, k: mu < (k - i) / k),
}


def check_differential_diffusion(module):
    with resting_on(module.keep_mask, MU, 1, K):
        got, steps = run(module.differential_diffusion)
    if steps != list(range(K)):
        raise Wrong(f"the steps that are taken are {steps}, and {list(range(K))} are expected, each once")
    compare(got, run(ours)[0], {sentence: run(wrong)[0] for sentence, wrong in WRONG_ALGORITHMS.items()})


def blur(mask, softness, half=0.5, normalised=True, mode="replicate", radius=3, both=True):
    radius = math.ceil(radius * softness)
    kernel = torch.exp(-half * (torch.arange(-radius, radius + 1) / softness) ** 2)
    kernel = (kernel / kernel.sum() if normalised else kernel).view(1, 1, 1, -1)
    mask = F.conv2d(F.pad(mask, (radius, radius, 0, 0), mode=mode), kernel)
    return F.conv2d(F.pad(mask, (0, 0, radius, radius), mode=mode), kernel.mT) if both else mask


def check_soften(module):
    mask = torch.zeros(1, 1, 14, 12)
    mask[..., 2:9, :5] = 1
    compare_function(module.soften, diffdiff.soft_inpainting_map, WRONG_BLURS, mask, 1.2)


WRONG_BLURS = {
    "the kernel does not add up to 1: divide it by its sum": lambda mask, s: blur(mask, s, normalised=False),
    "the half in the exponent is missing": lambda mask, s: blur(mask, s, half=1),
    "beyond the edge there are zeros, so the map grows dark along the edges: pad with mode='replicate'":
        lambda mask, s: blur(mask, s, mode="constant"),
    "it is blurred along the rows only": lambda mask, s: blur(mask, s, both=False),
    "the radius is too small: 3 softness, rounded up": lambda mask, s: blur(mask, s, radius=1),
}


MISTAKES = {
    "PREDICT_KEPT": [(5, "step 2"), (2, "thrown away"), (1, "strong edit"), (8, "lost")],
    "PREDICT_CALLS": [(50, "without skipping"), (15, "are skipped"), (5, "brightest"), (34, "off by one")],
    "keep_mask": [*list_mistakes(WRONG_MASKS), (lambda mu, i, k: (mu < i / k)[0, 0], "shape")],
    "first_step": [
        (lambda mu, k: k - right.first_step(mu, k), "that is L"),
        (lambda mu, k: right.first_step(mu.amax(), k), "brightest"),
        (lambda mu, k: math.floor(mu.min() * k + 1e-4), "rounding"),
        (lambda mu, k: right.first_step(mu, k) + 1, "too many is skipped"),
        (lambda mu, k: k - math.floor((1 - mu.min().item()) * k), "1e-4"),
    ],
    "differential_diffusion": list_mistakes(WRONG_ALGORITHMS),
    "soften": list_mistakes(WRONG_BLURS),
}
