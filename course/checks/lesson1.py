"""Lesson 1's checks, and mistakes that they must name: {exercise: [(wrong answer, words of the sentence)]}."""

import torch
import torch.nn as nn
import torch.nn.functional as F

import unet
import vae
from course.grading import compare_function, draw, list_mistakes, predicted
from course.solutions import lesson1 as right
from diffusion import Schedule

T = 200
ABAR = Schedule().abar[T]  # 0.76


def check_PREDICT_NUMBERS(module):
    config = vae.CONFIGS["toy"]
    side = 128 // config.factor
    predicted(module.PREDICT_NUMBERS, config.latent_channels * side**2, {
        "that is one channel: the toy's latents have 8, see CONFIGS at the end of vae.py": side**2,
        "that is four channels, as in Stable Diffusion: the toy has 8, see CONFIGS in vae.py": 4 * side**2,
        "that is an eighth of the side: the toy's autoencoder halves the side twice, not three times":
            config.latent_channels * 16**2,
        "these are the numbers of the picture, not of its latent": 3 * 128**2,
    })


def check_PREDICT_HALF(module):
    abar = Schedule().alphas_cumprod
    half = (abar - 0.5).abs().argmin().item()
    predicted(module.PREDICT_HALF, half, {
        "the middle of the timesteps is not the middle of the noise: at t = 500 abar is already 0.28": 500,
    }, within=25)


def check_noise_latent(module):
    x0, noise = draw((2, 3, 4, 4), (2, 3, 4, 4))
    compare_function(module.noise_latent, lambda x0, noise, _: Schedule().add_noise(x0, noise, T), WRONG_NOISES,
                     x0, noise, ABAR)


WRONG_NOISES = {
    "alpha and sigma are without their square roots": lambda x0, noise, abar: abar * x0 + (1 - abar) * noise,
    "only sigma is without its square root, as in Magic Fixup's printed equation 2":
        lambda x0, noise, abar: abar**0.5 * x0 + (1 - abar) * noise,
    "x0 and the noise are the wrong way round: alpha goes with x0":
        lambda x0, noise, abar: right.noise_latent(noise, x0, abar),
    "the sign of the noise is wrong: noise is added": lambda x0, noise, abar: right.noise_latent(x0, -noise, abar),
    "x0 is not made smaller: where noise comes in, the picture goes down by alpha":
        lambda x0, noise, abar: x0 + (1 - abar) ** 0.5 * noise,
}


def check_clean_latent(module):
    z, eps = draw((2, 3, 4, 4), (2, 3, 4, 4))
    compare_function(module.clean_latent, lambda z, eps, _: Schedule().convert_output(eps, z, T)[0], WRONG_CLEANS,
                     z, eps, ABAR)


WRONG_CLEANS = {
    "the noise is taken away, but the rest is not divided by alpha": lambda z, eps, abar: z - (1 - abar) ** 0.5 * eps,
    "the sign of the noise is wrong: it has to be taken away": lambda z, eps, abar: right.clean_latent(z, -eps, abar),
    "only z is divided by alpha: put brackets around z - sigma eps":
        lambda z, eps, abar: z / abar**0.5 - (1 - abar) ** 0.5 * eps,
    "that is noise_latent again: this is its inverse": right.noise_latent,
    "alpha and sigma are without their square roots": lambda z, eps, abar: (z - (1 - abar) * eps) / abar,
}


def check_split_velocity(module):
    z, v = draw((2, 3, 4, 4), (2, 3, 4, 4))
    schedule = Schedule(prediction="v_prediction")
    compare_function(module.split_velocity, lambda z, v, _: schedule.convert_output(v, z, T), WRONG_SPLITS, z, v, ABAR)


WRONG_SPLITS = {
    "the sign of v is wrong: v is alpha eps - sigma x0, so x0 has less where v is more":
        lambda z, v, abar: right.split_velocity(z, -v, abar),
    "alpha and sigma are the wrong way round": lambda z, v, abar: right.split_velocity(z, v, 1 - abar),
    "v is taken for the noise: this is how an eps model's output is read":
        lambda z, v, abar: (right.clean_latent(z, v, abar), v),
}


@torch.no_grad()
def check_resnet_block(module):
    x, time = draw((2, 4, 5, 5), (2, 4))
    block = unet.ResnetBlock(4, 4, 4, groups=2)
    for p in block.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(2))
    layers = block.norm1, block.conv1, block.norm2, block.conv2
    compare_function(module.resnet_block, lambda x, time, *_: block(x, time), WRONG_BLOCKS, x, time, *layers)


def norm_after(x, time, norm1, conv1, norm2, conv2):
    h = F.silu(norm1(conv1(x) + time[:, :, None, None]))
    return x + F.silu(norm2(conv2(h)))


def time_at_the_start(x, time, norm1, conv1, norm2, conv2):
    h = conv1(F.silu(norm1(x + time[:, :, None, None])))
    return x + conv2(F.silu(norm2(h)))


def silu_first(x, time, norm1, conv1, norm2, conv2):
    h = conv1(norm1(F.silu(x))) + time[:, :, None, None]
    return x + conv2(norm2(F.silu(h)))


WRONG_BLOCKS = {
    "each GroupNorm stands after its convolution: here it stands before, so that the skip is never normalised":
        norm_after,
    "the time is added to the input, where the first GroupNorm takes most of it away: add it after conv1":
        time_at_the_start,
    "the time is added at the end: add it after conv1, where norm2 and conv2 still see it":
        lambda x, time, *layers: right.resnet_block(x, 0 * time, *layers) + time[:, :, None, None],
    "the skip is missing: what the block makes is added to x": lambda x, *rest: right.resnet_block(x, *rest) - x,
    "F.silu is missing after norm2": lambda x, time, norm1, conv1, norm2, conv2: (
        x + conv2(norm2(conv1(F.silu(norm1(x))) + time[:, :, None, None]))),
    "F.silu stands before the norms: it follows each of them": silu_first,
    "the skip is normalised: x itself is what is added to":
        lambda x, time, norm1, *rest: right.resnet_block(x, time, norm1, *rest) - x + norm1(x),
    "the skip is normalised and activated: x itself is what is added to":
        lambda x, time, norm1, *rest: right.resnet_block(x, time, norm1, *rest) - x + F.silu(norm1(x)),
}


MISTAKES = {
    "PREDICT_NUMBERS": [(1024, "one channel"), (4096, "four channels"), (2048, "an eighth"), (49152, "of the picture")],
    "PREDICT_HALF": [(500, "middle"), (100, "too small"), (750, "too large")],
    "noise_latent": [
        *list_mistakes(WRONG_NOISES),
        (lambda x0, noise, abar: right.noise_latent(x0, noise, abar)[0], "shape"),
        (lambda x0, noise, abar: x0.mul_(abar**0.5).add_((1 - abar) ** 0.5 * noise), "in place"),
    ],
    "clean_latent": [
        *list_mistakes(WRONG_CLEANS),
        (lambda z, eps, abar: -right.clean_latent(z, eps, abar), "sign"),
    ],
    "split_velocity": [
        *list_mistakes(WRONG_SPLITS),
        (lambda z, v, abar: right.split_velocity(z, v, abar)[::-1], "order"),
        (lambda z, v, abar: right.split_velocity(z, v, abar)[0], "2 things"),
    ],
    "resnet_block": list_mistakes(WRONG_BLOCKS),
}
