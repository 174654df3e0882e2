"""Lesson 7's checks, and mistakes that they must name: {exercise: [(wrong answer, words of the sentence)]}."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from course.grading import Wrong, call, compare, compare_function, draw, list_mistakes, predicted
from course.solutions import lesson7 as right
from diffusion import Schedule
from unet import TransformerBlock

ABAR = 0.7


def check_PREDICT_PICTURES(module):
    """The page's block counts them on the toy."""
    predicted(module.PREDICT_PICTURES, right.PREDICT_PICTURES, {
        "the extractor runs once a step, but not once a seed: it never sees the edit's own latent x_t": (50, 50),
        "the extractor does not run once for all: it sees the reference noised to the step's t": (50, 1),
        "that is one seed: the synthesizer sees each of the five at each of the ten steps": (10, 10),
        "these are the steps of DDIM's default, 50: here there are ten": (250, 50),
    })


def check_extractor_input(module):
    I, noise, M = draw((2, 3, 4, 4), (2, 3, 4, 4), (2, 1, 4, 4))
    M = (M > 0).float()
    compare_function(module.extractor_input, right.extractor_input, WRONG_INPUTS, I, noise, M, ABAR)


def stack_input(I, noise, M, alpha, sigma):
    return torch.cat([alpha * I + sigma * noise, I, M], 1)


WRONG_INPUTS = {
    "that is equation 2 as it is printed: (1 - abar) has lost its square root there": lambda I, noise, M, abar: (
        stack_input(I, noise, M, abar**0.5, 1 - abar)),
    "both square roots are missing": lambda I, noise, M, abar: stack_input(I, noise, M, abar, 1 - abar),
    "abar and 1 - abar are the wrong way round: abar goes with the reference": lambda I, noise, M, abar: (
        stack_input(I, noise, M, (1 - abar) ** 0.5, abar**0.5)),
    "the order is wrong: first the noised reference, then the clean one, then M": lambda I, noise, M, abar: (
        right.extractor_input(I, noise, M, abar)[:, [3, 4, 5, 0, 1, 2, 6]]),
    "the clean reference is missing: the extractor sees it beside the noised one": lambda I, noise, M, abar: (
        right.extractor_input(I, noise, M, abar)[:, [0, 1, 2, 6]]),
    "M is missing": lambda I, noise, M, abar: right.extractor_input(I, noise, M, abar)[:, :6],
    "M is the wrong way round: 1 where content survived": lambda I, noise, M, abar: (
        right.extractor_input(I, noise, 1 - M, abar)),
}


@torch.no_grad()
def check_cross_reference(module):
    torch.manual_seed(7)
    block = TransformerBlock(8, 1, None)
    for p in block.parameters():
        nn.init.normal_(p, std=0.7)
    x, f = draw((2, 5, 8), (2, 5, 8))
    compare_function(module.cross_reference, right.cross_reference, WRONG_ATTENTIONS, block, x, f)


def attend(block, queries_of, keys_of, values_of, scale=None, dim=-1):
    """What a second attention of these finds, without the skip"""
    a = block.attn2
    q, k, v = a.to_q(queries_of), a.to_k(keys_of), a.to_v(values_of)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return a.to_out[0](F.softmax(scores, dim) @ v)


WRONG_ATTENTIONS = {
    "queries and keys are the wrong way round: the synthesizer asks, the extractor answers":
        lambda block, x, f: x + attend(block, f, block.norm2(x), block.norm2(x)),
    "queries and keys are the wrong way round, though the values are right: the synthesizer asks":
        lambda block, x, f: x + attend(block, f, block.norm2(x), f),
    "the values are the synthesizer's own: it finds the place in the reference, and takes nothing from it":
        lambda block, x, f: x + attend(block, block.norm2(x), f, block.norm2(x)),
    "the keys are the synthesizer's own: it looks for itself, and takes what is in the reference at that place":
        lambda block, x, f: x + attend(block, block.norm2(x), block.norm2(x), f),
    "that is self-attention: f is not used": lambda block, x, f: (
        x + attend(block, block.norm2(x), block.norm2(x), block.norm2(x))),
    "the skip is missing: what is found is added to x": lambda block, x, f: attend(block, block.norm2(x), f, f),
    "norm2 is missing before the queries": lambda block, x, f: x + attend(block, x, f, f),
    "norm1 takes the place of norm2: norm1 belongs to self-attention": lambda block, x, f: (
        x + attend(block, block.norm1(x), f, f)),
    "f is normalised once more: norm1 was behind it already": lambda block, x, f: (
        x + attend(block, block.norm2(x), block.norm2(f), block.norm2(f))),
    "it is not divided by the square root of the width: the softmax is too sharp": lambda block, x, f: (
        x + attend(block, block.norm2(x), f, f, scale=1.0)),
    "it is divided by the width, and not by its square root": lambda block, x, f: (
        x + attend(block, block.norm2(x), f, f, scale=1 / x.shape[-1])),
    "the softmax goes over the queries: over the keys, every query's weights sum to 1": lambda block, x, f: (
        x + attend(block, block.norm2(x), f, f, dim=-2)),
    "to_out is missing": lambda block, x, f: x + F.scaled_dot_product_attention(
        block.attn2.to_q(block.norm2(x)), block.attn2.to_k(f), block.attn2.to_v(f)),
    "that is self-attention with attn1: the cross-reference is attn2": lambda block, x, f: (
        x + block.attn1(block.norm1(x), block.attn1.keys_values(f))),
}


def check_start_latent(module):
    coarse, epsilon = draw((1, 3, 4, 4), (1, 3, 4, 4))
    schedule = Schedule()
    steps = schedule.space_timesteps(50)
    inputs = coarse, epsilon, schedule, steps
    compare_function(module.start_latent, right.start_latent, WRONG_STARTS, *inputs, tolerance=1e-5)


def noise_to(coarse, epsilon, abar):
    return abar**0.5 * coarse + (1 - abar) ** 0.5 * epsilon


WRONG_STARTS = {
    "that is pure noise: Figure 4 shows what it does to deep blacks": lambda z, e, schedule, steps: e.clone(),
    "that is the coarse edit without noise": lambda z, e, schedule, steps: z.clone(),
    "the noise is that of t = 999: the sampler's first step is 981, and it takes away no more than that":
        lambda z, e, schedule, steps: noise_to(z, e, schedule.abar[999]),
    "off by one step: that is the sampler's second step": lambda z, e, schedule, steps: (
        noise_to(z, e, schedule.abar[steps[1]])),
    "that is the sampler's last step, where hardly any noise is left: it begins with timesteps[0]":
        lambda z, e, schedule, steps: noise_to(z, e, schedule.abar[steps[-1]]),
    "(1 - abar) has no square root, as equation 4 is printed": lambda z, e, schedule, steps: (
        schedule.abar[steps[0]] ** 0.5 * z + (1 - schedule.abar[steps[0]]) * e),
    "both square roots are missing": lambda z, e, schedule, steps: (
        schedule.abar[steps[0]] * z + (1 - schedule.abar[steps[0]]) * e),
    "abar and 1 - abar are the wrong way round: abar goes with the coarse edit": lambda z, e, schedule, steps: (
        noise_to(e, z, schedule.abar[steps[0]])),
}


def check_v_loss(module):
    output, x_0, noise = draw((3, 2, 4, 4), (3, 2, 4, 4), (3, 2, 4, 4))
    alpha = torch.tensor([0.9, 0.6, 0.3]).view(3, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    inputs = output, x_0, noise, alpha, sigma
    compare_function(module.v_loss, right.v_loss, WRONG_LOSSES, *inputs)


def squared(a, b):
    return (a - b).square().mean()


WRONG_LOSSES = {
    "that is the paper's loss, of the noise: the toy predicts v": lambda o, x, n, a, s: squared(o, n),
    "the sign of x_0 is wrong: v = alpha noise - sigma x_0": lambda o, x, n, a, s: squared(o, a * n + s * x),
    "alpha and sigma are the wrong way round: alpha goes with the noise": lambda o, x, n, a, s: (
        squared(o, s * n - a * x)),
    "the sign of v is wrong": lambda o, x, n, a, s: squared(o, s * x - a * n),
    "that is the error of x_0": lambda o, x, n, a, s: squared(o, x),
    "that is the noised latent z_t, not v": lambda o, x, n, a, s: squared(o, a * x + s * n),
    "the square is missing": lambda o, x, n, a, s: (o - (a * n - s * x)).abs().mean(),
    "it is the square root of the mean: the mean squared error has none": lambda o, x, n, a, s: (
        math.sqrt(squared(o, a * n - s * x))),
    "it is the sum and not the mean: it would grow with the picture": lambda o, x, n, a, s: (
        (o - (a * n - s * x)).square().sum()),
}


def check_drop_coarse(module):
    reference, coarse, mask = draw((4, 3, 2, 2), (4, 3, 2, 2), (4, 1, 2, 2))
    batch = {"reference": reference, "coarse": coarse, "mask": mask}
    dropped = torch.tensor([True, False, False, True])
    before = {name: x.clone() for name, x in batch.items()}
    got = call(module.drop_coarse, batch, dropped)
    if any(not torch.equal(x, batch[name]) for name, x in before.items()):
        raise Wrong("it changes the batch in place: the next step may need it whole")
    compare(got, right.drop_coarse(batch, dropped), {
        sentence: wrong(batch, dropped) for sentence, wrong in WRONG_DROPS.items()})


def keep(batch, known, *names):
    known = known.float()[:, None, None, None]
    return tuple(x * known if name in names else x for name, x in batch.items())


WRONG_DROPS = {
    "the wrong ones are dropped: zeros where dropped is True": lambda b, d: keep(b, d, "coarse", "mask"),
    "the mask stays, and shows where the holes of the hidden edit are": lambda b, d: keep(b, ~d, "coarse"),
    "the reference is dropped too: the model is still to learn from it": lambda b, d: (
        keep(b, ~d, "reference", "coarse", "mask")),
    "the reference is dropped, and the coarse edit shown": lambda b, d: keep(b, ~d, "reference", "mask"),
    "the whole batch is dropped as soon as one sample is": lambda b, d: keep(b, d & ~d, "coarse", "mask"),
    "nothing is dropped": lambda b, d: keep(b, d | ~d),
    "a dropped mask is zeros, as if all were holes, and not ones": lambda b, d: (
        b["reference"], keep(b, ~d, "coarse")[1], torch.where(d[:, None, None, None], 1, b["mask"])),
}


MISTAKES = {
    "PREDICT_PICTURES": [((50, 50), "not once a seed"), ((50, 1), "not run once for all"), ((10, 10), "one seed"),
                         ((10, 50), "wrong way round"), (50, "2 things"), ((50, 11), "number 2 of the 2: off by one")],
    "extractor_input": list_mistakes(WRONG_INPUTS),
    "cross_reference": list_mistakes(WRONG_ATTENTIONS),
    "start_latent": list_mistakes(WRONG_STARTS),
    "v_loss": [
        *list_mistakes(WRONG_LOSSES),
        (lambda o, x, n, a, s: (o - (a * n - s * x)).square().mean((1, 2, 3)), "shape"),
        (lambda o, x, n, a, s: squared(o, a * n - s * x) / 2, "0.5 times"),
    ],
    "drop_coarse": [*list_mistakes(WRONG_DROPS), (lambda b, d: b["coarse"].mul_(0), "in place")],
}
